"""Which rows a cut can change, and which of them can still reach what is read.

`dirty[l]` holds the rows whose stream may differ from the clean run when layer l begins, `live[l]` those that a read
position can still learn about. A row that is not both need not be computed: its keys and values are the clean run's.
Exact on positions, for causal decoders (notes: the invariance lemma). Cuts and layers are 0-based.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lab.edges.cutrows import LayerCut, blocks, length_of
from lab.errors import UsageError

# layer -> True where an edge is removed: [q, k] for all heads, [head, q, k], or made by rows (`lab.edges.cutrows`)
Cuts = Mapping[int, LayerCut]


@dataclass(frozen=True)
class Closure:
    """Rows of one cut run. Every list has one entry more than the model has layers: the last is the final stream.

    dirty, live   bool [pos] per layer, on the stream that enters it
    """

    dirty: tuple[Bool[Tensor, " pos"], ...]
    live: tuple[Bool[Tensor, " pos"], ...]

    def rows(self, layer: int) -> Int[Tensor, " rows"]:
        """Rows that layer must be run for: those whose new state matters, and dirty ones that a live row reads."""
        after = self.dirty[layer + 1] & self.live[layer + 1]
        return (after | (self.dirty[layer] & self.live[layer])).nonzero().squeeze(1)

    @property
    def reaches(self) -> bool:
        """Whether anything that is read can differ from the clean run."""
        return bool((self.dirty[-1] & self.live[-1]).any())

    @property
    def start(self) -> int:
        """The first layer that must be run; the number of layers if none must."""
        n = len(self.dirty) - 1
        return next((layer for layer in range(n) if len(self.rows(layer))), n) if self.reaches else n

    @property
    def row_layers(self) -> int:
        """How many rows times layers are run."""
        return sum(len(self.rows(layer)) for layer in range(self.start, len(self.dirty) - 1))


def closure_of(
    cuts: Cuts,
    n_pos: int,
    n_layers: int,
    read: Sequence[int] | Tensor,
    memo: dict[int, Tensor] | None = None,
) -> Closure:
    """The rows that `cuts` can change and the rows that matter for the positions `read`.

    memo  touched rows by id of the mask, for many closures over the same masks (which must stay alive meanwhile)
    Raises UsageError for a layer that does not exist or a mask of another length.
    """
    _check(cuts, n_pos, n_layers)
    memo = {} if memo is None else memo
    for cut in cuts.values():
        if id(cut) not in memo:
            memo[id(cut)] = touched_rows(cut)
    touched = {layer: memo[id(cut)] for layer, cut in cuts.items()}
    return Closure(_dirty(touched, n_pos, n_layers), _live(cuts, touched, n_pos, n_layers, read))


def touched_rows(cut: LayerCut) -> Bool[Tensor, " pos"]:
    """Rows that lose an edge they had, in some head (keys after the query were never there)."""
    at = torch.arange(length_of(cut))
    return torch.cat([_lost(rows, part, at) for rows, part in blocks(cut, at)])


def _lost(rows: Tensor, removed: Tensor, at: Tensor) -> Tensor:
    return (removed & (at[None, :] <= rows[:, None])).any(-1).any(0)


def _dirty(touched: Mapping[int, Tensor], n_pos: int, n_layers: int) -> tuple[Tensor, ...]:
    """Forwards: cut rows, and every row that reads a dirty one. An uncut row reads all rows up to itself."""
    dirty = [torch.zeros(n_pos, dtype=torch.bool)]
    for layer in range(n_layers):
        after = (
            dirty[-1].cumsum(0) > 0
        )  # from the first dirty row on; a cut row is dirty whatever it still reads
        dirty.append(after | touched[layer] if layer in touched else after)
    return tuple(dirty)


def _live(
    cuts: Cuts,
    touched: Mapping[int, Tensor],
    n_pos: int,
    n_layers: int,
    read: Sequence[int] | Tensor,
) -> tuple[Tensor, ...]:
    """Backwards from the rows read: every row that a live row still reads in some head."""
    last = torch.zeros(n_pos, dtype=torch.bool)
    last[torch.as_tensor(read, dtype=torch.long).cpu()] = True
    live = [last]
    for layer in reversed(range(n_layers)):
        now = live[0]
        cut = now & touched[layer] if layer in touched else torch.zeros_like(now)
        seen = now | ((now & ~cut).flip(0).cumsum(0).flip(0) > 0)
        if bool(cut.any()):
            seen = seen | read_by(cuts[layer], cut.nonzero().squeeze(1))
        live.insert(0, seen)
    return tuple(live)


def read_by(cut: LayerCut, rows: Tensor) -> Tensor:
    """Keys that some of the rows read in some head after the cut."""
    at = torch.arange(length_of(cut))
    seen = torch.zeros(len(at), dtype=torch.bool)
    for some, removed in blocks(cut, rows):
        seen |= ((at[None, :] <= some[:, None]) & ~removed.all(0)).any(0)
    return seen


def _check(cuts: Cuts, n_pos: int, n_layers: int) -> None:
    for layer, cut in cuts.items():
        if not 0 <= layer < n_layers:
            raise UsageError(f"no layer {layer + 1} (blocks.{layer}): the model has layers 1..{n_layers}")
        if not isinstance(cut, Tensor):
            _check_length(layer, cut, n_pos)
        elif cut.dtype != torch.bool or cut.ndim not in (2, 3) or tuple(cut.shape[-2:]) != (n_pos, n_pos):
            raise UsageError(
                f"the cut of layer {layer + 1} (blocks.{layer}) is {cut.dtype} {tuple(cut.shape)}; expected bool "
                f"[{n_pos}, {n_pos}] or [head, {n_pos}, {n_pos}], True where an edge is removed"
            )


def _check_length(layer: int, cut: LayerCut, n_pos: int) -> None:
    if length_of(cut) != n_pos:
        raise UsageError(
            f"the cut of layer {layer + 1} (blocks.{layer}) is for {length_of(cut)} positions, the prompt has {n_pos}"
        )
