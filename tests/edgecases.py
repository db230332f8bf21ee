"""Random cuts for the tests of the edge engine: roles, frame pairs, heads, empty rows, single edges, any layers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lab.carriers import TokenMap
from tests import families

Mask = Callable[[random.Random, TokenMap, int], Tensor]


def rectangle(q: Tensor, k: Tensor, n: int) -> Tensor:
    cut = torch.zeros(n, n, dtype=torch.bool)
    cut[q[:, None], k[None, :]] = True
    return cut


def _segments(dice: random.Random, tokens: TokenMap, heads: int) -> Tensor:
    """One role or frame cut from another."""
    n, roles = len(tokens), ["frame", "text", "last"]
    pick = [tokens.where(role=dice.choice(roles)) for _ in range(2)]
    frames = [tokens.where(role="frame", frame=f) for f in range(tokens.n_frames)]
    q, k = (dice.choice([p, dice.choice(frames)]) for p in pick)
    return rectangle(q, k, n)


def _frame_pairs(dice: random.Random, tokens: TokenMap, heads: int) -> Tensor:
    """Frames that lie more than so far apart."""
    distance = tokens.frame[:, None] - tokens.frame[None, :]
    video = tokens.frame >= 0
    return video[:, None] & video[None, :] & (distance > dice.randint(0, tokens.n_frames - 1))


def _empty_rows(dice: random.Random, tokens: TokenMap, heads: int) -> Tensor:
    """Rows that may read nothing, not even themselves."""
    n = len(tokens)
    rows = torch.tensor(dice.sample(range(n), dice.randint(1, 4)) + dice.choice([[], [n - 1]]))
    return rectangle(rows, torch.arange(n), n)


def _scattered(dice: random.Random, tokens: TokenMap, heads: int) -> Tensor:
    """Single edges anywhere, those that never existed among them."""
    n = len(tokens)
    g = torch.Generator().manual_seed(dice.randrange(1 << 30))
    rows = torch.rand(n, generator=g) < dice.choice([0.05, 0.5])
    return (torch.rand(n, n, generator=g) < dice.choice([0.02, 0.3, 0.9])) & rows[:, None]


def by_head(dice: random.Random, tokens: TokenMap, heads: int) -> Tensor:
    """A different cut, or none, in every head."""
    made = [
        dice.choice((_segments, _frame_pairs, _empty_rows, _scattered))(dice, tokens, heads)
        for _ in range(heads)
    ]
    return torch.stack([m & (dice.random() < 0.6) for m in made])


KINDS: tuple[Mask, ...] = (_segments, _frame_pairs, _empty_rows, _scattered, by_head)


def random_cuts(dice: random.Random, tokens: TokenMap, n_layers: int, heads: int) -> dict[int, Tensor]:
    """Cuts in one layer, a window, the first and last, or any layers; one mask for all or one each."""
    first = dice.randrange(n_layers)
    layers = dice.choice(
        [
            [first], [0], [n_layers - 1], [0, n_layers - 1], list(range(first, min(n_layers, first + 3))),
            [i for i in range(n_layers) if dice.random() < 0.5],
        ]
    )  # fmt: skip
    one = dice.choice(KINDS)(dice, tokens, heads)
    each = dice.random() < 0.3
    return {i: dice.choice(KINDS)(dice, tokens, heads) if each else one for i in layers}


def exact(hf: Any) -> Any:
    """The model in fp64 throughout: transformers' RMS norms work in fp32 whatever they are given."""
    hf = hf.double()
    for module in hf.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm(module)
    return hf


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return module.weight * (x * (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).rsqrt())

    return forward


def inputs(name: str, dtype: torch.dtype = torch.float32, **kw: Any) -> dict[str, Tensor]:
    x = families.inputs(name, **kw)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in x.items()}


@contextlib.contextmanager
def attention_only_in(model: Any, layer: int) -> Iterator[None]:
    """A planted truth: the attention of every other layer writes nothing to the stream; undone afterwards."""
    saved = [p.attn.o_proj.weight.detach().clone() for p in model.parts]
    try:
        with torch.no_grad():
            for p in model.parts:
                if p.index != layer:
                    p.attn.o_proj.weight.zero_()
        yield
    finally:
        with torch.no_grad():
            for p, weight in zip(model.parts, saved, strict=True):
                p.attn.o_proj.weight.copy_(weight)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns (views aside)."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t._base is None and not func.is_view:
                self.numel = max(self.numel, t.numel())
        return out
