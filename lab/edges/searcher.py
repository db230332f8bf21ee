"""The state of one search, and its trials: `lab.edges.searching` says how it goes from step to step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import fsum
from typing import Any

import numpy as np

from lab.edges.bounds import items_needed, most_hits, share_bound
from lab.edges.budget import Asked
from lab.edges.closure import closure_of
from lab.edges.fingerprints import Calibration
from lab.edges.found import as_policy, plain_unit
from lab.edges.knapsack import fill
from lab.edges.policy import Policy
from lab.edges.scoring import scores as scores_of
from lab.edges.trials import Effect, Trials
from lab.edges.units import Grain, Unit, disjoint, split, units_of, wholes
from lab.edges.warm import Predicted, told
from lab.result import Result
from lab.runs import Cancel, Ledger, Run, progress

Bundle = tuple[Unit, ...]  # units that are cut together or not at all
MEASURES = ("accepted", "kl", "kl_bound", "flips", "flips_bound", "kept", "kept_video", "forwards")
SLACK = 3.0  # how many times its share of the remaining edges a set may take of the remaining budget
SAMPLE = 2.0  # the most forwards that one sample of a trial takes: its clean run made again, and the cut one
FLOOR = 0.02  # share of the KL budget that sets without weight may take, all together


class _Enough(Exception):
    """The budget of forwards is spent."""


@dataclass(frozen=True)
class Step:
    """One trial: what was cut on top of what is accepted, and what it did."""

    name: str
    units: Bundle
    accepted: bool
    effect: Effect
    forwards: float


class Searcher:
    """The state of one search: what is cut, what that does, and every trial so far. Valid at any time."""

    def __init__(
        self, trials: Trials, asked: Asked, guess: Predicted | None, run: Run | None, cancel: Cancel | None
    ) -> None:
        self.trials, self.asked, self.guess, self.run_, self.cancel = trials, asked, guess, run, cancel
        self.n_layers = trials.model.cfg.n_layers
        maps = [g.bound.tokens for g, _ in trials.layouts]
        self.units = [u for u in units_of(maps, self.n_layers, asked.roles) if self._softmax(u.layer)]
        self.cut: set[Unit] = set()
        self.dead: set[Unit] = set()
        self.rejected: dict[
            Unit, float
        ] = {}  # least KL seen when it was cut alone on top of what was accepted
        self.effect = Effect.none(len(trials))
        self.steps: list[Step] = []
        self.spent = Ledger()
        self.stopped = ""
        self.relinearised = 0
        self._weights: dict[Unit, float] = {}
        self.total = fsum(map(self.weight, self.units))
        n, b = len(trials), asked.budget
        self.most_flips = max(0, most_hits(b.flips, n, b.confidence))

    def _softmax(self, layer: int) -> bool:
        return self.trials.model.parts[layer].attn is not None

    def weight(self, unit: Unit) -> float:
        """Edges of a unit, mean over the samples; all heads together count 1."""
        if unit not in self._weights:
            self._weights[unit] = self.trials.weight([unit])
        return self._weights[unit]

    # ---- the search -------------------------------------------------------------------------------------------------

    def search(self, show: bool) -> None:
        """Carries the search out; stops early, without a word, when the forwards are spent."""
        try:
            self.bury()
            self._carry_out(show)
        except _Enough:
            self.stopped = "forwards spent"
        self.bury()

    def _carry_out(self, show: bool) -> None:
        if self.asked.method == "knapsack":
            fill(self, show=show)
        else:
            self._exit()
            (self._greedy if self.asked.method == "greedy" else self._descend)(show)
            self._polish()

    def _exit(self) -> None:
        """Nobody reads video from some layer on: as early as it can be had."""
        for first in reversed(range(self.n_layers)):
            group = [u for u in self.units if u.k == "video" and u.layer >= first and self.open(u)]
            if group and not self.attempt(f"video exits after layer {first}", [tuple(group)]):
                return
            self.bury()

    def _descend(self, show: bool) -> None:
        layers = list(reversed(range(self.n_layers)))
        for layer in progress(layers, desc="search", show=show, cancel=self.cancel):
            if self._due(layer):
                self.relinearise()
            until = self._allotment(layer)
            self.bury()
            here = [u for u in self.units if u.layer == layer and self.open(u)]
            for group in self._groups(here):
                self.take([self._bundle(u) for u in group], until)

    def _due(self, layer: int) -> bool:
        every, done = self.asked.relinearise, self.n_layers - 1 - layer
        return bool(every and self.guess and self.cut and done and done % every == 0)

    def relinearise(self) -> None:
        """Scores under what is cut so far: what the layers below are worth once those above read less."""
        policy = as_policy(self.trials, self.asked.roles, self.cut, ())
        found = scores_of(self.trials.model, list(self.trials.readies), policy=policy, show_progress=False)
        self.guess = told(found)
        self.spent += Ledger(**found.ledger)
        self.relinearised += 1

    def _groups(self, units: Sequence[Unit]) -> list[list[Unit]]:
        """What is tried together first: what the scores call cheap, then cheap trials (few rows), then dear ones."""
        chosen = self.guess.knapsack(units, self.weight) if self.guess else set[Unit]()
        rest = [u for u in units if u not in chosen]
        groups = [sorted(chosen), [u for u in rest if u.q != "video"], [u for u in rest if u.q == "video"]]
        return [self.ordered(g) for g in groups if g]

    def ordered(self, units: Iterable[Unit]) -> list[Unit]:
        """Least predicted loss for its weight first; without scores the heaviest first."""
        if self.guess is None:
            return sorted(units, key=lambda u: (-self.weight(u), u))
        guess = self.guess
        return sorted(units, key=lambda u: (guess.loss(u) / max(self.weight(u), 1e-9), u))

    def _greedy(self, show: bool) -> None:
        """The cheapest first, in batches that double when they hold and halve when they do not."""
        left, size = self.ordered([u for u in self.units if self.open(u)]), 8
        while left:
            if self.cancel is not None:
                self.cancel.check()
            batch = left[:size]
            if self.attempt(f"{len(batch)} cheapest units", [(u,) for u in batch]):
                left, size = left[size:], 2 * size
                self.bury()
                left = [u for u in left if self.open(u)]
            elif len(batch) > 1:
                size = len(batch) // 2
            else:
                left = left[1:]
                self._finer(self._bundle(batch[0]), self.asked.budget.forwards * len(self.trials))

    def _polish(self) -> None:
        """Kept units once more, those that cost least for their weight first; a trial may take all that is left."""
        order = sorted(self.rejected, key=lambda u: (self.rejected[u] / max(self.weight(u), 1e-9), u))
        for unit in order[: 2 * self.n_layers]:
            if self.open(unit) and self.asked.layers == "free":
                self.attempt(f"again {unit}", [(unit,)], share=1.0)

    # ---- groups -----------------------------------------------------------------------------------------------------

    def take(self, bundles: list[Bundle], until: float, bad: float | None = None) -> None:
        """Cut as many of the bundles as the budget allows: all at once, or the halves, down to single ones.

        until  forwards after which single bundles are kept whole instead of parted
        bad    mean KL of all together, if they were too much already
        """
        bundles = [b for b in bundles if any(self.open(u) for u in b)]
        if not bundles or (bad is None and self.attempt(_title(bundles), bundles)):
            return
        seen = self.steps[-1].effect.mean_kl if bad is None else bad
        if len(bundles) == 1:
            self.rejected.setdefault(bundles[0][0], seen)
            self._finer(bundles[0], until)
            return
        half = len(bundles) // 2
        before = len(self.cut)
        self.take(bundles[:half], until)
        whole = len(self.cut) - before == sum(len(b) for b in bundles[:half])
        # the first half went whole, so the second half on top of it is what was too much just now
        self.take(bundles[half:], until, seen if whole else None)

    def _finer(self, bundle: Bundle, until: float) -> None:
        """Part a bundle that cannot be cut whole, at the first grain that parts it."""
        unit = bundle[0]
        if self.spent.forwards > until or self.weight(unit) < self.asked.worth * self.total:
            return
        for grain in self.asked.finer:
            parts = self.split(unit, grain)
            if len(parts) > 1:
                self.take([self._bundle(p) for p in self.ordered(parts)], until, self.rejected.get(unit, 0.0))
                return

    def split(self, unit: Unit, grain: Grain) -> list[Unit]:
        if (grain == "head" and unit.heads) or (grain == "distance" and unit.where):
            return [unit]
        options = max((len(r.item.options) for r in self.trials.readies if r.item is not None), default=0)
        parts = split(unit, grain, n_heads=self.trials.model.cfg.n_heads, n_options=options)
        return [p for p in parts if self.weight(p) > 0]

    def _bundle(self, unit: Unit) -> Bundle:
        """The unit; with contiguous layers, one whose pair is kept further up goes in all layers below or not at all."""
        if self.asked.layers == "free" or not any(
            u.layer > unit.layer and _overlap(u, unit) for u in self.rejected
        ):
            return (unit,)
        return tuple(
            replace(unit, layer=layer) for layer in range(unit.layer, -1, -1) if self._softmax(layer)
        )

    def open(self, unit: Unit) -> bool:
        """Whether it is not cut yet, in whole or in part, nor dead."""
        return not any(u in self.cut or u in self.dead for u in wholes(unit))

    def _allotment(self, layer: int) -> float:
        """Forwards that may be spent when this layer is done: what is left, in proportion to the layers a trial runs."""
        left = self.left()
        work = [self.n_layers - i for i in range(layer + 1)]
        return self.spent.forwards + max(0.0, left) * work[-1] / sum(work)

    # ---- one trial --------------------------------------------------------------------------------------------------

    def attempt(self, name: str, bundles: Sequence[Bundle], share: float | None = None) -> bool:
        """Try the bundles on top of what is cut; accept them if the answers allow it. Journalled."""
        units = tuple(sorted({u for b in bundles for u in b} - self.cut))
        if not units:
            return True
        most_kl, most_flips = self._limits(units, share)
        effect = self._measured(units, most_kl, most_flips)
        accepted = effect.whole and not self._too_much(effect, most_kl, most_flips)
        self.steps.append(Step(name, units, accepted, effect, self.spent.forwards))
        if accepted:
            self.cut |= set(units)
            self.effect = effect
        elif len(bundles) == 1:
            self.reject(bundles[0][0], effect.mean_kl)
        return accepted

    def reject(self, unit: Unit, kl: float) -> None:
        """A unit is kept for now: cutting it on top of what is cut gave this mean KL."""
        self.rejected[unit] = min(kl, self.rejected.get(unit, np.inf))

    def _limits(self, units: Sequence[Unit], share: float | None) -> tuple[float, int]:
        """Largest mean KL and most flips allowed if these units are cut too."""
        b, now = self.asked.budget, self.effect
        if share is None:
            undecided = {u for u in self.units if self.open(u) and u not in self.rejected}
            # exact sums: sets have no order of their own, and limits name entries of the journal
            rest = fsum(map(self.weight, undecided - set(units)))
            mine = fsum(map(self.weight, units))
            share = min(1.0, SLACK * mine / max(mine + rest, 1e-9))
        spare = max(0.0, b.kl - now.bounds(b.confidence)[0])
        floor = FLOOR * b.kl / max(1, self.n_layers)
        flips = now.n_flips + int((self.most_flips - now.n_flips) * share)
        return now.mean_kl + max(spare * share, min(floor, spare)), flips

    def _too_much(self, effect: Effect, most_kl: float, most_flips: int) -> bool:
        """Whether a trial, finished or not, is beyond its limits: samples still to come can only add."""
        if np.nansum(effect.kl) > most_kl * len(self.trials) or effect.n_flips > most_flips:
            return True
        b = self.asked.budget
        return effect.whole and effect.bounds(b.confidence)[0] > b.kl

    def _measured(self, units: Sequence[Unit], most_kl: float, most_flips: int) -> Effect:
        """The effect of what is cut and these units, as far as it takes to know that it is too much."""
        wanted = frozenset(self.cut) | set(units)  # dead units change nothing, and would only make rows run
        key = _key(len(self.steps), wanted, most_kl, most_flips)
        return self._run(key, wanted, lambda e: self._too_much(e, most_kl, most_flips))

    def look(self, units: Sequence[Unit], samples: Sequence[int]) -> Effect:
        """What some units on top of what is cut do to some samples; not a step of the search. Journalled."""
        wanted = frozenset(self.cut) | set(units)
        key = f"{_key(len(self.steps), wanted, 0.0, 0)}|{','.join(map(str, samples))}"
        return self._run(key, wanted, lambda e: False, samples)

    def _run(
        self,
        key: str,
        wanted: frozenset[Unit],
        too_much: Callable[[Effect], bool],
        only: Sequence[int] | None = None,
    ) -> Effect:
        """A trial, or what the journal knows of it. Raises _Enough if there are not the forwards to finish it."""
        if self.run_ is not None and self.run_.done(key):
            return self._known(self.run_.results()[key])
        if self.cancel is not None:
            self.cancel.check()
        before = self.trials.spent
        most = before.forwards + self.left() - SAMPLE
        if most < before.forwards:
            raise _Enough
        effect = self.trials.effect(wanted, lambda e: too_much(e) or self.trials.spent.forwards > most, only)
        spent = self._since(before)
        if effect.seen.sum() < len(only or self.trials) and not too_much(effect):
            raise _Enough  # broken off for want of forwards: says nothing about the units
        if self.run_ is not None:
            self.run_.record(key, {"effect": effect.plain(), "spent": spent.plain()}, spent)
        return effect

    def alone(self, units: Sequence[Unit], samples: Sequence[int]) -> dict[Unit, float]:
        """Mean KL on some samples of cutting each unit alone on top of what is cut. Journalled."""
        key = f"alone|{_key(len(self.steps), self.cut, 0.0, 0)}|{','.join(map(str, samples))}"
        if self.run_ is not None and self.run_.done(key):
            found = self.run_.results()[key]
            self.spent += Ledger(**found["spent"])
            return dict(zip(units, found["kl"], strict=True))
        before = self.trials.spent
        kl = self.trials.alone(units, frozenset(self.cut), samples).tolist()
        spent = self._since(before)
        if self.run_ is not None:
            self.run_.record(key, {"kl": kl, "spent": spent.plain()}, spent)
        return dict(zip(units, kl, strict=True))

    def unsure(self, n: int) -> list[int]:
        """The samples whose answers are least sure (see `Trials.unsure`); takes everybody's clean run."""
        before = self.trials.spent
        found = self.trials.unsure(n)
        self._since(before)
        return found

    def _since(self, before: Ledger) -> Ledger:
        """What trials have spent since; booked."""
        now = self.trials.spent
        spent = Ledger(
            now.forwards - before.forwards, now.naive - before.naive, now.tower_calls - before.tower_calls
        )
        self.spent += spent
        return spent

    def _known(self, found: Mapping[str, Any]) -> Effect:
        effect = Effect.read(found["effect"])
        self.trials.learn(effect)
        self.spent += Ledger(**found["spent"])
        return effect

    def left(self) -> float:
        """Forwards of all samples together that may still be spent."""
        return self.asked.budget.forwards * len(self.trials) - self.spent.forwards

    # ---- what is dead -----------------------------------------------------------------------------------------------

    def bury(self) -> None:
        """Units whose queries reach nothing in any layout: cutting them changes nothing, exactly."""
        alive: set[tuple[int, str]] = set()
        for grid, _ in self.trials.layouts:
            cuts = grid.cuts(self.cut)
            live = closure_of(cuts, grid.bound.n, self.n_layers, [grid.bound.n - 1]).live
            for name in dict.fromkeys(u.q for u in self.units):
                rows = grid.bound.members(name)
                alive |= {(i, name) for i in range(self.n_layers) if bool((live[i + 1] & rows).any())}
        self.dead = {u for u in self.units if (u.layer, u.q) not in alive}

    # ---- what came of it --------------------------------------------------------------------------------------------

    def kept(self, cut: Iterable[Unit], only: Callable[[Unit], bool] = lambda u: True) -> float:
        """Share of edges left, by the paper's rule."""
        total = fsum(self.weight(u) for u in self.units if only(u))
        return 1.0 - fsum(self.weight(u) for u in disjoint(cut) if only(u)) / max(total, 1e-9)

    def kept_units(self) -> dict[Unit, float]:
        """The finest units that were tried and kept, with the least mean KL seen when they were cut."""
        tried = {*self.rejected, *self.cut}
        parted = {w for u in tried for w in wholes(u) if w != u}
        return {u: kl for u, kl in self.rejected.items() if self.open(u) and u not in parted}

    def policy(self, owner: str) -> Policy:
        """What is cut so far, as a policy."""
        b = self.asked.budget
        made = as_policy(self.trials, self.asked.roles, self.cut, self.dead)
        told = Calibration(data_sha=owner, n=len(self.trials), eps_kl=b.kl, flip_max=b.flips)
        return made.model_copy(update={"calibration": told})

    def trail(self, owner: str) -> Result:
        """Every trial: axes (step, measure). Notes hold the units, so that policies along the way can be made again."""
        cut, rows = (
            set(self.dead),
            list[list[float]](),
        )  # what is dead in the end counts as cut from the start
        kept = self._shares(cut)
        for step in self.steps:
            if step.accepted:
                cut |= set(step.units)
                kept = self._shares(cut)
            rows.append(self._row(step, kept))
        return Result(
            values=np.array(rows).reshape(len(rows), len(MEASURES)), axes=("step", "measure"),
            coords={"step": list(range(1, len(rows) + 1)), "measure": list(MEASURES)}, recipe={},
            unit="see measure: shares of 1, KL in nats, forward-equivalents per item", name="search for the edges that matter",
            notes=self._notes(owner),
        )  # fmt: skip

    def _shares(self, cut: set[Unit]) -> tuple[float, float]:
        """Edges left of all, and of those that touch video."""
        return self.kept(cut), self.kept(cut, lambda u: u.touches_video)

    def _row(self, step: Step, kept: tuple[float, float]) -> list[float]:
        kl, flips = step.effect.bounds(self.asked.budget.confidence)
        share = step.effect.n_flips / int(step.effect.seen.sum())
        spent = step.forwards / len(self.trials)
        return [float(step.accepted), step.effect.mean_kl, kl, share, flips, *kept, spent]

    def _notes(self, owner: str) -> dict[str, Any]:
        b, n = self.asked.budget, len(self.trials)
        least = share_bound(0, n, b.confidence)
        caution = f"{n} items cannot show that fewer than {least:.1%} of answers flip; {items_needed(b.flips, b.confidence)} would do for {b.flips:.1%}" if least > b.flips else ""  # fmt: skip
        return {
            "complete": not self.stopped, "stopped": self.stopped, "caution": caution, "search": owner,
            "budget": asdict(b), "asked": {k: v for k, v in asdict(self.asked).items() if k != "budget"}, "n": {"item": n},
            "ledger": self.spent.plain(), "forwards_per_item": self.spent.forwards / n,
            "naive_per_item": self.spent.naive / n, "roles": self.asked.roles, "relinearised": self.relinearised,
            "steps": [s.name for s in self.steps], "cut": [list(map(plain_unit, s.units)) for s in self.steps],
            "kept": [[*plain_unit(u), kl] for u, kl in self.kept_units().items()],
            "effect": self.effect.plain(),
        }  # fmt: skip


def _overlap(a: Unit, b: Unit) -> bool:
    pair = (a.q, a.k) == (b.q, b.k) and (not a.where or not b.where or a.where == b.where)
    return pair and (not a.heads or not b.heads or bool(set(a.heads) & set(b.heads)))


def _title(bundles: Sequence[Bundle]) -> str:
    first = bundles[0][0]
    return str(first) if len(bundles) == 1 else f"layer {first.layer + 1}: {len(bundles)} units"


def _key(step: int, units: Iterable[Unit], most_kl: float, most_flips: int) -> str:
    said = "\n".join(map(str, sorted(units))) + f"|{most_kl!r}|{most_flips}"
    return f"{step:05d}|{hashlib.sha256(said.encode()).hexdigest()[:16]}"
