"""The passes of edge scoring: prompts batched at the decoder's door, run forward and backward, tallied.

Knows no segment pairs and no Result: what is kept of a backward pass is a tally's affair (`lab.edges.tallies`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.dropping import Dropped, droppable
from lab.edges.joining import joined, offsets
from lab.edges.margins import Metric, margin_of
from lab.edges.pairs import Grid, segments_of
from lab.edges.policy import Policy
from lab.edges.reuse import staged
from lab.edges.sweeping import _keys, as_ready
from lab.edges.tallies import Tally
from lab.edges.tapping import Seat, Tap
from lab.errors import RunError, UsageError
from lab.model.decoder import decode
from lab.model.door import Door
from lab.model.ready import Ready
from lab.model.run import Run
from lab.runs import Cancel, Ledger, progress
from lab.spans import ROLES

MetricFn = Callable[[Tensor], Tensor]
# how far the path is gone (0 to 1), and what the pass weighs in the sum
Node = tuple[float, float]


@dataclass(frozen=True)
class Passes:
    """What is run: forwards at every node, and behind each one backward, or one more for every layer dropped.

    policy  edges cut throughout; path: edges that the nodes cut by and by
    """

    metric: Metric
    nodes: Sequence[Node]
    drop: bool
    policy: Policy | None
    path: Policy | None


@dataclass(frozen=True)
class World:
    """One prompt to be scored: one world of a Ready."""

    key: str
    ready: Ready
    tokens: TokenMap
    item: VideoQA | None
    segments: dict[str, Tensor]


@dataclass
class Found:
    """What was found about one prompt.

    tallies  of the plain backward pass, then one for every layer dropped
    clean    the metric without the path; closed: with all of it cut (None without a path); choice: what it is about
    """

    world: World
    tallies: list[Tally]
    clean: float
    closed: float | None
    choice: str
    spent: Ledger


# ---- prompts --------------------------------------------------------------------------------------------------------


def worlds_of(model: Any, items: Any, grid: Grid, n_frames: int) -> list[list[World]]:
    """The worlds of every item, prepared. Raises UsageError if there is nothing to score; RunError for mechanisms."""
    ready = as_ready(model, items, None, n_frames)
    out: list[list[World]] = []
    for key, r in zip(_keys([r.item for r in ready]), ready, strict=True):
        if r.plan.detours or r.plan.cache is not None or staged(r.plan):
            raise RunError(
                f"{key} was prepared with a mechanism that takes detours, keeps its own cache or changes what the decoder "
                "reads; score it without"
            )
        names = [key] if r.n_worlds == 1 else [f"{key}/{w + 1}" for w in range(r.n_worlds)]
        maps = [t.only((t.role != ROLES.index("pad")).nonzero().squeeze(1)) for t in r.maps]
        out.append(
            [World(n, r, t, r.item, segments_of(t, grid, r.item)) for n, t in zip(names, maps, strict=True)]
        )
    return out


def batches(groups: Sequence[list[World]], batch: int) -> list[list[World]]:
    """Items that are run together; one whose plan has hooks runs alone."""
    if type(batch) is not int or batch < 1:
        raise UsageError(f"batch must be at least 1 prompt, got {batch!r}")
    out: list[list[list[World]]] = []
    for group in groups:
        hooked = bool(group[0].ready.plan.hooks)
        if not out or hooked or out[-1][0][0].ready.plan.hooks or len(out[-1]) >= batch:
            out.append([])
        out[-1].append(group)
    return [[world for group in some for world in group] for some in out]


def scored(
    model: Any, groups: Sequence[list[World]], what: Passes, tally: Callable[[World], Tally], *, batch: int,
    cancel: Cancel | None, show: bool,
) -> Iterator[Found]:  # fmt: skip
    """Every prompt, scored: `tally` makes the listener of one prompt and one backward pass."""
    if model.hf.training:
        raise RunError(
            "in training mode dropout makes every run another one; call model.hf.eval() to score edges"
        )
    for worlds in progress(batches(groups, batch), desc="edge scores", show=show, cancel=cancel):
        calls = model.tower_calls
        with ExitStack() as held:
            held.enter_context(model.plan_hooks(worlds[0].ready.plan))
            dropped = held.enter_context(droppable(model, what.drop))
            held.enter_context(model.lock.shared())
            found = _Batch(model, worlds, what).scored(tally, dropped)
        found[0].spent += Ledger(tower_calls=model.tower_calls - calls)
        yield from found


# ---- runs -----------------------------------------------------------------------------------------------------------


class _Batch:
    """Prompts at the decoder's door, and the seats they take in attention. `runs` counts forwards and backwards."""

    def __init__(self, model: Any, worlds: Sequence[World], what: Passes) -> None:
        self.model, self.worlds, self.what = model, worlds, what
        with torch.no_grad():
            doors = {id(w.ready): model.arrive(w.ready)[0] for w in worlds}
        self.door: Door = joined(list(doors.values()))
        self.seats = [self._seat(w, at) for w, at in zip(worlds, offsets(self.door), strict=True)]
        self.runs = 0

    def _seat(self, world: World, offset: int) -> Seat:
        n_layers, n_heads = self.model.cfg.n_layers, self.model.cfg.n_heads
        base, path = (
            None if p is None else p.bind(world.tokens, n_layers, n_heads, world.item)
            for p in (self.what.policy, self.what.path)
        )
        if path is not None and all(path.removed(layer) is None for layer in range(n_layers)):
            raise UsageError(
                f"the path cuts no edge of {world.key}; give a policy whose cuts touch this prompt"
            )
        return Seat(offset, len(world.tokens), base, path)

    def scored(self, tally: Callable[[World], Tally], dropped: Dropped) -> list[Found]:
        what, n = self.what, len(self.model.parts)
        layers: list[int | None] = [None, *(range(n) if what.drop else ())]
        tallies = [[tally(w) for _ in layers] for w in self.worlds]
        metrics, clean = self._metrics()
        for shut, weight in what.nodes:
            logits, start = self._forward(self.seats, shut, grad=True)
            metrics = metrics or self._bound(logits)
            margins = [m(logits[i]) for i, (m, _) in enumerate(metrics)]
            clean = clean or [float(m.detach()) for m in margins]
            total = torch.stack([m.float() for m in margins]).sum()
            for i, layer in enumerate(layers):
                dropped.layer = layer
                self._backward(total, start, [t[i] for t in tallies], weight, last=layer is layers[-1])
            dropped.layer = None
        closed = self._values(metrics, self.seats, 1.0) if what.path is not None else [None] * len(metrics)
        return [
            Found(w, t, c, shut, said, Ledger(float(self.runs)))
            for w, t, c, shut, (_, said) in zip(self.worlds, tallies, clean, closed, metrics, strict=True)
        ]

    def _metrics(self) -> tuple[list[tuple[MetricFn, str]], list[float]]:
        """The metrics, bound to the choice of the run without any cut, and their values without the path.

        Empty where the first forward will tell both: nothing is cut and there is no path.
        """
        if self.what.policy is None and self.what.path is None:
            return [], []
        bare = [Seat(s.offset, s.n) for s in self.seats]
        metrics = self._bound(self._forward(bare, 0.0, grad=False)[0])
        return metrics, [] if self.what.path is None else self._values(metrics, self.seats, 0.0)

    def _bound(self, logits: Tensor) -> list[tuple[MetricFn, str]]:
        known = [
            margin_of(self.model, self.what.metric, w.item, x)
            for w, x in zip(self.worlds, logits.detach(), strict=True)
        ]
        return known

    def _values(self, metrics: Sequence[tuple[MetricFn, str]], seats: list[Seat], shut: float) -> list[float]:
        logits, _ = self._forward(seats, shut, grad=False)
        return [float(m(x)) for (m, _), x in zip(metrics, logits, strict=True)]

    def _forward(self, seats: list[Seat], shut: float, *, grad: bool) -> tuple[Tensor, Tensor]:
        """Last logits [world, d_vocab], and the leaf that gradients are taken to."""
        self.runs += 1
        for seat in seats:
            seat.shut = shut
        with torch.set_grad_enabled(grad):
            start = self.door.embeds.detach().requires_grad_(grad)
            resid, side = decode(self.model, replace(self.door, embeds=start), Run(attend=Tap(seats)))
            return self.model.read(resid, side, "last")[:, 0], start

    def _backward(
        self, total: Tensor, start: Tensor, tallies: Sequence[Tally], weight: float, *, last: bool
    ) -> None:
        """Worlds do not touch each other, so one backward of the sum gives each its own gradient."""
        self.runs += 1
        for seat, tally in zip(self.seats, tallies, strict=True):
            tally.weight = weight
            seat.listener = tally
        try:
            torch.autograd.grad(total, start, retain_graph=not last)
        finally:
            for seat in self.seats:
                seat.listener = None
