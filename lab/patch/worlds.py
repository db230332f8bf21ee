"""Worlds: runs of one model on prompts with one layout, in one batched pass, with edits that carry values between them.

The plain way, in which everything is allowed: hooks at the sites edited, whole forwards. `lab.patch.suffix` computes the
same numbers from stored runs. Mechanisms that act on one prompt at a time (detours, caches, hooks) take the worlds one
after the other, sources first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lab.carriers import VideoQA
from lab.errors import UsageError
from lab.model.door import Door
from lab.model.reading import Read
from lab.model.ready import Ready
from lab.model.run import Run
from lab.patch.alike import same_tokens
from lab.patch.doors import arrived, edges_of, joined, unlike, with_deep_taken
from lab.patch.edits import Edit
from lab.patch.points import Held, Order, Point, points_of
from lab.patch.sites import EMBED, hook_name, layers_with
from lab.runs import Ledger
from lab.slots import Plan, plan_of


@dataclass
class Worlds:
    """Prompts of one layout on one model. Make them with `Worlds.of`; the order of the names is the order of the batch.

    standing  edits of the embeddings (noise, means) that hold in every run: how a world is corrupted without a twin
    ledger    what `evaluate` has cost so far, in forwards of one world
    reason    why the last `evaluate` took the reference way although "fast" was asked; "" if it did not
    kept      the stored runs, inside `storing`
    """

    model: Any
    ready: dict[str, Ready]
    policy: Any = None
    standing: tuple[Edit, ...] = ()
    ledger: Ledger = Ledger()
    reason: str = ""
    kept: dict[str, Any] | None = None

    @classmethod
    def of(
        cls, model: Any, *, policy: Any = None, mechanisms: Sequence[Any] = (), n_frames: int | None = None,
        standing: Sequence[Edit] = (), **worlds: Any,
    ) -> Worlds:  # fmt: skip
        """Worlds by name: each a VideoQA, a Ready of one world, or a processor's tensors.

        policy      cuts that hold in every world (`lab.edges.Policy`); an open `model.pruned` counts
        mechanisms  act in every world; which video tokens are dropped before the decoder is the first world's choice
        standing    noise or means at "embed" that hold in every run
        Raises UsageError, with the reason, for worlds whose positions do not correspond.
        """
        if len(worlds) < 2:
            raise UsageError(
                f"patching needs at least two worlds, got {len(worlds)}: clean=..., corrupted=..."
            )
        ready = same_tokens(model, {n: _ready(model, w, n_frames, mechanisms) for n, w in worlds.items()})
        made = cls(model, ready, model.pruning.chosen(policy), tuple(standing))
        made._check(standing)
        made.check({n: r.maps[0] for n, r in ready.items()})
        if any(e.site != EMBED or e.source is not None for e in standing):
            raise UsageError("standing edits are noise or means at site 'embed'")
        return made

    def check(self, maps: Mapping[str, Any]) -> None:
        """Raises UsageError if positions of the maps do not correspond."""
        why = unlike(maps)
        if why:
            raise UsageError(why)

    @property
    def names(self) -> list[str]:
        """The worlds, in order."""
        return list(self.ready)

    def tokens(self, world: str) -> Any:
        """The prompt's token map of a world."""
        return self.ready[self._known(world)].maps[0]

    def _known(self, world: str) -> str:
        if world not in self.ready:
            raise UsageError(f"no world {world!r}; there are {', '.join(self.ready)}")
        return world

    def arrive(self, world: str) -> tuple[Door, Any]:
        """The state at the door of a world, standing edits made, before `embed.hook_out`; and its token map."""
        ready = self.ready[self._known(world)]
        door, tokens = arrived(self.model, ready)
        for edit in (e for e in self.standing if e.into == world):
            rows = edit.rows(tokens, ready.item)
            embeds = door.embeds.clone()
            embeds[0, rows.to(embeds.device)] = edit.values(embeds[0], rows.to(embeds.device), None).to(
                embeds
            )
            door = replace(door, embeds=embeds)
        return door, tokens

    # ---- run --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, edits: Sequence[Edit] = (), *, read: Read = "last") -> Float[Tensor, "world read d_vocab"]:
        """Logits of all worlds, in order, with the edits. What an edit takes is what passes in the same pass.

        Edits of one point all see what arrived there, before any of them. Raises UsageError for unknown worlds and
        rows.
        """
        self._check(edits)
        if not self.one_by_one:
            return self.forward(self.names, edits, {}, read)
        held: Held = {}
        order = _sources_first(self.names, edits)
        if order is None:
            return self._rounds(edits, read)
        done = {name: self.forward([name], edits, held, read) for name in order}
        return torch.cat([done[name] for name in self.names])

    def _rounds(self, edits: Sequence[Edit], read: Read) -> Tensor:
        """World after world, where they take from each other: again until nothing that is taken changes.

        What is taken at a point depends on points before it alone, so every round makes at least one more of them final.
        """
        watch: dict[str, list[str]] = {}
        for edit in (e for e in edits if e.source is not None):
            for layer in layers_with(self.model, edit.site, edit.layers):
                watch.setdefault(hook_name(edit.site, layer), []).append(str(edit.source))
        held: Held = {}
        for name in self.names:
            self.forward([name], (), held, read, watch)
        while True:
            before = dict(held)
            out = torch.cat([self.forward([name], edits, held, read, watch) for name in self.names])
            if all(held[at].same(passed) for at, passed in before.items()):
                return out

    @property
    def one_by_one(self) -> bool:
        """Whether mechanisms ask for worlds one at a time."""
        return any(r.plan.detours or r.plan.cache is not None or r.plan.hooks for r in self.ready.values())

    def forward(
        self, worlds: Sequence[str], edits: Sequence[Edit], held: Held, read: Read, watch: Mapping[str, Sequence[str]] | None = None,
    ) -> Tensor:  # fmt: skip
        """One pass over some of the worlds. `held` gives, and gets, the values that edits take.

        watch  hook point -> worlds whose values there are kept in `held` besides
        """
        ready = [self.ready[w] for w in worlds]
        order = Order()
        points = points_of(self, worlds, edits, held, order, watch or {})
        with ExitStack() as open_:
            open_.enter_context(self.model.plan_hooks(_one_plan(ready)))
            if points:
                open_.enter_context(self.model.hooks([(p.name, p) for p in points]))
            open_.enter_context(self.model.lock.shared())
            return self._pass(worlds, ready, edits, points, order, read)

    def _deepened(self, doors: dict[str, Door], edits: Sequence[Edit], maps: dict[str, Any]) -> list[Door]:
        """The doors of this pass with the DeepStack additions that edits bring along."""
        here = list(doors.values())
        if not any(d.deep for d in here):
            return here
        some = [e for e in edits if e.source is not None]
        all_doors = doors | {
            w: self.arrive(w)[0] for e in some for w in (e.source, e.into) if w not in doors and w
        }
        done = with_deep_taken(
            all_doors, some, lambda e: e.rows(maps.get(e.into, self.tokens(e.into)), self.ready[e.into].item)
        )
        return [done[name] for name in doors]

    def _pass(
        self, worlds: Sequence[str], ready: Sequence[Ready], edits: Sequence[Edit], points: Sequence[Point], order: Order,
        read: Read,
    ) -> Tensor:  # fmt: skip
        came = [self.arrive(w) for w in worlds]
        doors, maps = [door for door, _ in came], [m for _, m in came]
        self.check(dict(zip(worlds, maps, strict=True)))
        items = {w: r.item for w, r in zip(worlds, ready, strict=True)}
        for point in points:
            point.place(dict(zip(worlds, maps, strict=True)), items)
        door = joined(
            self._deepened(dict(zip(worlds, doors, strict=True)), edits, dict(zip(worlds, maps, strict=True)))
        )
        door = Door(self.model.embed.hook_out(door.embeds), door.rope, door.pad, door.deep)
        run = Run(edges_of(self.model, self.policy, ready, maps))
        plan = _one_plan(ready)
        resid, side = self.model.stream(
            door, run, plan=replace(plan, detours=(order, *plan.detours)), tokens=tuple(maps)
        )
        return self.model.read(resid, side, read)

    # ---- many sets of edits -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(
        self, cells: Sequence[Sequence[Edit]], *, into: str, executor: str = "fast", n_rows: int | None = None
    ) -> Float[Tensor, "cell d_vocab"]:
        """Logits of world `into` at the last position under each set of edits; the other worlds run as they are.

        executor  "fast": from one stored run of every world, only rows that can change and matter are computed; takes
                  the reference way where that is not exact, and `reason` says why. "reference": one forward a cell
        n_rows    about how many rows "fast" runs together; None: what suits the device
        Raises UsageError for edits of another world.
        """
        from lab.patch.suffix import evaluate, rows_together

        if executor not in ("fast", "reference"):
            raise UsageError(f"executor={executor!r}; use 'fast' or 'reference'")
        for cell in cells:
            self._check(cell, only=self._known(into))
        if n_rows is not None and n_rows < 1:
            raise UsageError(f"n_rows must be at least 1, got {n_rows}")
        if not cells:
            raise UsageError("no sets of edits given; an empty set, (), gives the run as it is")
        out, spent, self.reason = evaluate(self, cells, into, executor, n_rows or rows_together(self.model))
        self.ledger = self.ledger + spent
        return out

    @contextmanager
    def storing(self) -> Iterator[None]:
        """Inside, stored runs are kept from one `evaluate` to the next, and given back at the end."""
        before, self.kept = self.kept, {} if self.kept is None else self.kept
        try:
            yield
        finally:
            self.kept = before

    @torch.no_grad()
    def logits(self, executor: str = "fast") -> dict[str, Float[Tensor, " d_vocab"]]:
        """Logits at the last position of every world as it is; "fast": from stored runs, which `storing` keeps."""
        from lab.patch.suffix import own_logits

        found = own_logits(self) if executor == "fast" else None
        if found is None:
            found = dict(zip(self.names, self.run()[:, -1], strict=True)), len(self.names)
        logits, n = found
        self.ledger = self.ledger + Ledger(n, n)
        return logits

    def _check(self, edits: Sequence[Edit], only: str | None = None) -> None:
        for edit in edits:
            self._known(edit.into)
            if edit.source is not None:
                self._known(edit.source)
            if only is not None and edit.into != only:
                raise UsageError(f"this evaluates world {only!r}, an edit goes into {edit.into!r}")


def _ready(model: Any, given: Any, n_frames: int | None, mechanisms: Sequence[Any]) -> Ready:
    """One prepared world whose plan holds the mechanisms."""
    if isinstance(given, VideoQA):
        return model.prepare(given, n_frames, mechanisms=mechanisms)
    ready: Ready = model._ready(given, n_frames)
    if ready.n_worlds != 1:
        raise UsageError(f"a world is one prompt, got {ready.n_worlds} in a batch; prepare them one by one")
    plan: Plan = ready.plan + plan_of(mechanisms, model.sizes)
    return replace(ready, plan=plan)


def _one_plan(ready: Sequence[Ready]) -> Plan:
    """What of the worlds' plans acts on the decoder; all worlds have the same mechanisms."""
    return replace(ready[0].plan, sampler=None, encoder=None, stages=(), layout=None, heads=())


def _sources_first(names: Sequence[str], edits: Sequence[Edit]) -> list[str] | None:
    """An order in which every world comes after those it takes from; None where some take from each other."""
    needs = {n: {e.source for e in edits if e.into == n and e.source is not None} for n in names}
    out: list[str] = []
    while len(out) < len(names):
        free = [n for n in names if n not in out and needs[n] <= set(out)]
        if not free:
            return None
        out.append(free[0])
    return out
