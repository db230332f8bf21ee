"""Low-rank deltas (LoRA, arXiv 2106.09685): learn W + B A in place of W, keep A and B, put them on a model and take them off.

A delta is one small safetensors file beside the base model it belongs to, in place of a copy of the whole checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lab.errors import ConfigError, UsageError

Delta = Mapping[str, tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]]


class _Added(nn.Module):
    """weight -> weight + b a"""

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, shape[1], generator=generator) * shape[1] ** -0.5)
        self.b = nn.Parameter(torch.zeros(shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def linears(root: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers below `root` by name."""
    return {name: m for name, m in root.named_modules() if isinstance(m, nn.Linear)}


@contextmanager
def learning(root: nn.Module, rank: int, *, seed: int = 0) -> Iterator[dict[str, nn.Module]]:
    """Inside, every linear layer below `root` has a delta that asks for gradients; yields them by name. Gone afterwards.

    Raises UsageError for a rank below 1.
    """
    if rank < 1:
        raise UsageError(f"rank must be at least 1, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    found = linears(root)
    added: dict[str, nn.Module] = {
        n: _Added((m.out_features, m.in_features), rank, generator) for n, m in found.items()
    }
    try:
        for name, module in found.items():
            parametrize.register_parametrization(module, "weight", added[name].to(module.weight))
        yield added
    finally:
        for module in found.values():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def taken(added: Mapping[str, nn.Module], dtype: torch.dtype = torch.float32) -> Delta:
    """A and B of what `learning` yielded, detached, rounded to `dtype`."""
    copies = {
        n: (m.a.detach().clone(), m.b.detach().clone()) for n, m in added.items() if isinstance(m, _Added)
    }
    return {n: (a.to(dtype), b.to(dtype)) for n, (a, b) in copies.items()}


@contextmanager
def applied(root: nn.Module, delta: Delta) -> Iterator[None]:
    """The model with the delta added, inside. The weights are put back bit for bit.

    Raises UsageError for a delta of another model.
    """
    kept = put(root, delta)
    try:
        yield
    finally:
        found = linears(root)
        with torch.no_grad():
            for name, weight in kept.items():
                found[name].weight.copy_(weight)


@torch.no_grad()
def put(root: nn.Module, delta: Delta) -> dict[str, Tensor]:
    """Add a delta for good; returns the weights as they were. Raises UsageError for a delta of another model."""
    found = linears(root)
    for name, (a, b) in delta.items():
        want = tuple(found[name].weight.shape) if name in found else None
        if want != (len(b), a.shape[1]):
            raise UsageError(
                f"the delta changes {name} {(len(b), a.shape[1])}, this model has {want}: it is of another model"
            )
    kept = {name: found[name].weight.detach().clone() for name in delta}
    for name, (a, b) in delta.items():
        weight = found[name].weight
        weight += (b.float() @ a.float()).to(weight)
    return kept


def save(delta: Delta, path: str | Path, **about: Any) -> Path:
    """Write A and B to one safetensors file, with what is to be known `about` them."""
    tensors = {
        f"{n}.{x}": t.contiguous().cpu() for n, ab in delta.items() for x, t in zip("ab", ab, strict=True)
    }
    save_file(tensors, path, metadata={"delta": json.dumps(about)})
    return Path(path)


def load(path: str | Path) -> tuple[Delta, dict[str, Any]]:
    """What `save` wrote: the delta, and what is known about it. Raises ConfigError if it is not that."""
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {}).get("delta", "null"))
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as e:
        raise ConfigError(f"cannot read a delta from {path}: {str(e).splitlines()[0]}") from None
    names = sorted({n.rpartition(".")[0] for n in tensors})
    if about is None or any(f"{n}.{x}" not in tensors for n in names for x in "ab"):
        raise ConfigError(f"{path} holds no delta; write it with lab.model.lowrank.save")
    return {n: (tensors[f"{n}.a"], tensors[f"{n}.b"]) for n in names}, about
