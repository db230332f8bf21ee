"""Choosing rows: groups of rows, how many of each may stay, and which; and the linear routers that learn to score them.

Knows tensors and token maps. Does not know what is done with the rows that stay or go.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lab.carriers import TokenMap
from lab.errors import ConfigError, UsageError
from lab.spans import ROLES

Scope = Literal["frame", "sequence"]
Routed = Literal["vision", "prefix"]
Budget = Callable[[int], int]  # rows in a group -> how many stay


# ---- groups: which rows compete with which --------------------------------------------------------------------------


def groups_of(tokens: TokenMap, scope: Scope, routed: Routed) -> Int[Tensor, " pos"]:
    """The group of every row, -1 for rows that always stay.

    scope   "frame": the tokens of a frame compete with each other; "sequence": all with all
    routed  "vision": frame tokens; "prefix": everything up to the last of them but padding (gamma-MoD's released code
            routes image and instruction together)
    """
    frames = tokens.frame.masked_fill(tokens.role != ROLES.index("frame"), -1)
    if scope == "frame":
        return frames
    video = (frames >= 0).nonzero().squeeze(1)
    member = frames >= 0
    if routed == "prefix" and len(video):
        member[: int(video[-1])] = True
        member &= tokens.role != ROLES.index("pad")
    return torch.where(member, 0, -1)


def group_sizes(group: Int[Tensor, " pos"]) -> list[int]:
    """Rows of each group 0, 1, ... (0 for numbers that no row has)."""
    return torch.bincount(group[group >= 0]).tolist()


def budget(ratio: float, least: int, rounding: Literal["round", "floor"]) -> Budget:
    """How many rows of a group stay at a keep ratio: at least `least`, never more than there are."""

    def kept(rows: int) -> int:
        share = round(ratio * rows) if rounding == "round" else int(ratio * rows)
        return min(rows, max(least, share))

    return kept


def top(
    score: Float[Tensor, " pos"], group: Int[Tensor, " pos"], kept: Budget
) -> tuple[Bool[Tensor, " pos"], int]:
    """The rows with the highest scores of every group, and all rows of no group; ties go to the earlier row.

    Also returns in how many groups the last row that stays has the same score as the first that goes.
    """
    by_score = score.argsort(descending=True, stable=True)
    order = by_score[group[by_score].argsort(stable=True)]
    counts = group_sizes(group)
    free = len(score) - sum(counts)
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1] + free
    budgets = torch.tensor([kept(c) for c in counts], dtype=torch.long)
    g = group[order].cpu()
    rank = torch.arange(len(order)) - starts[g.clamp(min=0)] if counts else torch.zeros(len(order))
    stays = g < 0
    if counts:
        stays = stays | (rank < budgets[g.clamp(min=0)])
    keep = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    keep[order] = stays.to(score.device)
    return keep, _ties(score[order], starts.tolist(), budgets.tolist(), counts)


def _ties(ordered: Tensor, starts: Sequence[int], budgets: Sequence[int], counts: Sequence[int]) -> int:
    edges = [s + b for s, b, c in zip(starts, budgets, counts, strict=True) if 0 < b < c]
    at = torch.tensor(edges, dtype=torch.long, device=ordered.device)
    return int((ordered[at - 1] == ordered[at]).sum()) if edges else 0


def ends_of_groups(group: Int[Tensor, " pos"], *, first: bool) -> Bool[Tensor, " pos"]:
    """True at the first (or last) row of every group."""
    marked = torch.zeros_like(group, dtype=torch.bool)
    for g in group[group >= 0].unique().tolist():
        at = (group == g).nonzero().squeeze(1)
        marked[at[0] if first else at[-1]] = True
    return marked


# ---- scores that nobody learns --------------------------------------------------------------------------------------


def stride(group: Int[Tensor, " pos"], kept: Budget) -> Float[Tensor, " pos"]:
    """1 at evenly spaced rows of every group, as many as stay; 0 elsewhere."""
    score = torch.zeros(len(group), device=group.device)
    for g in group[group >= 0].unique().tolist():
        at = (group == g).nonzero().squeeze(1)
        k, n = kept(len(at)), len(at)
        picks = [(2 * i + 1) * n // (2 * k) for i in range(k)]  # the middle of each of k equal stretches
        score[at[torch.tensor(picks, dtype=torch.long)]] = 1.0
    return score


def scrambled(ids: Int[Tensor, " pos"], seed: int, layer: int) -> Float[Tensor, " pos"]:
    """A random number in 0..1 for every id, the same whatever runs beside it (so that pieces choose as the whole)."""
    g = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
    table = torch.rand(max(1, int(ids.max()) + 1), generator=g)  # a longer table begins with the shorter one
    return table[ids.clamp(min=0).cpu()].to(ids.device)


# ---- routers --------------------------------------------------------------------------------------------------------


class Routers(nn.Module):
    """One linear scorer a routed layer (0-based), d_model -> `outputs`, saved as safetensors.

    start  "random": normal directions of length about 1; "zero": every score equal
    """

    def __init__(
        self, layers: Sequence[int], d_model: int, *, outputs: int = 1, bias: bool = False,
        start: Literal["random", "zero"] = "random", seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers, self.d_model, self.outputs, self.bias = tuple(layers), d_model, outputs, bias
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.ParameterDict()
        self.offset = nn.ParameterDict()
        for layer in self.layers:
            drawn = torch.randn(outputs, d_model, generator=g) * d_model**-0.5
            self.weight[str(layer)] = nn.Parameter(drawn if start == "random" else torch.zeros_like(drawn))
            if bias:
                self.offset[str(layer)] = nn.Parameter(torch.zeros(outputs))

    def forward(self, layer: int, x: Float[Tensor, "world pos d_model"]) -> Float[Tensor, "world pos out"]:
        """Logits in fp32, on the stream's device. Raises UsageError for a layer without a router."""
        name = str(layer)
        if name not in self.weight:
            raise UsageError(
                f"no router for layer {layer + 1} (blocks.{layer}); there are routers for layers "
                f"{[i + 1 for i in self.layers]}"
            )
        if x.shape[-1] != self.d_model:
            raise UsageError(f"routers of width {self.d_model} cannot read a stream of width {x.shape[-1]}")
        offset = self.offset[name].to(x.device).float() if self.bias else None
        return F.linear(x.float(), self.weight[name].to(x.device).float(), offset)

    def save(self, path: str | Path) -> Path:
        """Write weights and sizes to one safetensors file."""
        from safetensors.torch import save_file

        made = {"layers": self.layers, "d_model": self.d_model, "outputs": self.outputs, "bias": self.bias}
        tensors = {n: p.detach().contiguous() for n, p in self.state_dict().items()}
        save_file(tensors, path, metadata={"routers": json.dumps(made)})
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> Routers:
        """Read what `save` wrote. Raises ConfigError if it is not that."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                made = json.loads((file.metadata() or {}).get("routers", "null"))
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as e:
            raise ConfigError(f"cannot read routers from {path}: {str(e).splitlines()[0]}") from None
        if made is None:
            raise ConfigError(f"{path} holds no routers; write them with Routers.save")
        out = Routers(made["layers"], made["d_model"], outputs=made["outputs"], bias=made["bias"])
        out.load_state_dict(tensors)
        return out
