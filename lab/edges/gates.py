"""Trained gates: which heads of which segment pairs an answer needs, learned for all of them at once.

1 every (layer, head, query segment, key segment) has a gate that is open with a probability of its own   2 at every step
each gate is thrown, the model runs with the closed ones' edges cut (exactly as a policy cuts them), and is compared with
its own uncut answer   3 a gate that costs less than its price closes: the loss is KL to the uncut answer plus price times
the share that is open   4 `search_gates` cuts the units least often open, as many as exact trials allow.

Throwing is a step that has no slope, so the gradient is the relaxed gate's (binary concrete, arXiv 1611.00712; L0
gates, arXiv 1712.01312), straight through. What opening a gate does to a row is not taken to first order but exact: the
row with the segment minus the row without, all other gates as thrown. (A gate on the scores has no slope at all in a
row that reads one segment only.) For many small units: searching them one by one costs a trial each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.edges.bounds import mean_bound, most_hits
from lab.edges.budget import Budget
from lab.edges.found import as_policy
from lab.edges.joining import joined, offsets
from lab.edges.searching import Found
from lab.edges.sweeping import as_ready
from lab.edges.trials import Effect, Trials
from lab.edges.units import Grid, Roles, Unit, segments_of
from lab.errors import RunError, UsageError
from lab.model.answering import letter_ids
from lab.model.decoder import decode
from lab.model.ready import Ready
from lab.model.run import Call, Run
from lab.result import Result
from lab.runs import Cancel, progress

START = 3.0  # log odds: nearly all open, so that the first answers are the model's own
TEMPERATURES = (1.0, 0.3)  # of the relaxed gates, from the first step to the last
EMPTY = 1e-30  # a row with less attention than this left reads nothing
UNIT = "probability that the gate is open"
AXES = ("layer", "head", "query", "key")


# ---- attention with gates -------------------------------------------------------------------------------------------


def gated_rows(mass: Tensor, read: Tensor, thrown: Tensor, relaxed: Tensor) -> Tensor:
    """What rows read when some of their segments are cut, [..., d_head]; a row with nothing left reads zero.

    mass     [..., segment] share of attention on each; read [..., segment, d_head]: sum of share x value over it
    thrown   [..., segment] 1 open, 0 cut; relaxed: the same, with the slope that reaches the gates
    """
    kept, shares = read * thrown[..., None], mass * thrown
    out = _over(kept.sum(-2), shares.sum(-1, keepdim=True))
    with torch.no_grad():
        # sums over the other segments, not differences: what is left of a row may be tiny
        others = 1 - torch.eye(mass.shape[-1], dtype=mass.dtype, device=mass.device)
        rest, left = torch.einsum("...sd,st->...td", kept, others), (shares @ others)[..., None]
        opening = _over(rest + read, left + mass[..., None]) - _over(rest, left)
    return out + ((relaxed - relaxed.detach())[..., None] * opening).sum(-2)


def _over(read: Tensor, mass: Tensor) -> Tensor:
    return torch.where(mass > EMPTY, read / mass.clamp_min(EMPTY), 0.0)


@dataclass(frozen=True)
class Gated:
    """`Run.attend` of a batch: gates [layer, head, query segment, key segment] thrown once for all its worlds.

    segment  [world, pos] which segment a position is of; padding stands on the left, before `offsets`
    """

    thrown: Tensor
    relaxed: Tensor
    segment: Tensor
    offsets: Sequence[int]

    def __call__(self, call: Call, query: Tensor, key: Tensor, value: Tensor, kw: dict[str, Any]) -> Tensor:
        for name in ("softcap", "s_aux", "position_bias"):
            if kw.get(name) is not None:
                raise RunError(f"edges cannot be gated here: this model's attention uses {name}")
        scale = query.shape[-1] ** -0.5 if kw.get("scaling") is None else kw["scaling"]
        k, v = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        pattern = self._pattern(query @ k.transpose(2, 3) * scale)
        one_hot = torch.nn.functional.one_hot(self.segment, self.thrown.shape[-1]).to(pattern)
        mass = torch.einsum("whqk,wks->whqs", pattern, one_hot)
        read = torch.einsum("whqk,wks,whkd->whqsd", pattern, one_hot, v)
        thrown, relaxed = (self._of_rows(g[call.parts.index]) for g in (self.thrown, self.relaxed))
        return gated_rows(mass, read, thrown, relaxed).transpose(1, 2)

    def _of_rows(self, gates: Tensor) -> Tensor:
        """[head, query segment, key segment] -> [world, head, row, key segment]."""
        return gates[:, self.segment].transpose(0, 1)

    def _pattern(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        at = torch.arange(n, device=scores.device)
        real = at[None, :] >= torch.tensor(self.offsets, device=scores.device)[:, None]
        seen = (at[None, :] <= at[:, None])[None] & real[:, None, :]
        return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)


# ---- training -------------------------------------------------------------------------------------------------------


def train_gates(
    model: Any, items: Any, *, price: float = 1.0, steps: int = 200, batch: int = 8, lr: float = 0.2, roles: Roles = "all",
    seed: int = 0, n_frames: int = 8, cancel: Cancel | None = None, show_progress: bool = True,
) -> Result:  # fmt: skip
    """Learn how often each gate must be open.

    items    VideoQA or Ready, one world each, prepared without mechanisms; all of them calibration items
    price    nats of KL that having everything open may cost: half of it shared out by edges, half by units
    steps    each on `batch` items drawn with `seed`; one forward and one backward each

    Returns a Result with axes (layer, head, query, key): probability of being open, nan where no prompt has the pair.
    `notes["trail"]`: KL and open share at every step. The model's weights are not touched. Raises UsageError for wrong
    numbers, RunError for mechanisms and for layers without softmax attention.
    """
    _check(model, price=price, steps=steps, batch=batch, lr=lr)
    readies = as_ready(model, items, None, n_frames)
    trainer = _Trainer(model, readies, price, roles, seed)
    dice = np.random.default_rng(seed)
    optimiser = torch.optim.Adam([trainer.odds], lr=lr)
    trail: list[tuple[float, float]] = []
    for step in progress(range(steps), desc="gates", show=show_progress, cancel=cancel):
        chosen = dice.choice(len(readies), min(batch, len(readies)), replace=False).tolist()
        done = step / max(1, steps - 1)
        loss, said = trainer.loss(chosen, TEMPERATURES[0] + done * (TEMPERATURES[1] - TEMPERATURES[0]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        trail.append(said)
    return trainer.result(trail)


def _check(model: Any, **numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not np.isfinite(value) or value <= 0:
            raise UsageError(f"{name} must be above 0, got {value!r}")
    for part in model.parts:
        if part.attn is None or not part.causal or part.window is not None:
            raise RunError(
                f"layer {part.index + 1} (blocks.{part.index}) has no full causal softmax attention to gate"
            )


class _Trainer:
    """Gates of one model on one set of items. odds [layer, head, query, key]: log odds of being open."""

    def __init__(self, model: Any, readies: Sequence[Ready], price: float, roles: Roles, seed: int) -> None:
        if any(
            r.n_worlds != 1 or r.plan.stages or r.plan.detours or r.plan.cache or r.plan.hooks
            for r in readies
        ):
            raise RunError("gates are trained on prompts of one world, prepared without mechanisms")
        self.model, self.readies, self.price = model, readies, price
        self.names = tuple(dict.fromkeys(n for r in readies for n in segments_of(r.maps[0], roles)))
        self.segments = [self._segment(r) for r in readies]
        edges = self._edges()
        self.exists = edges > 0
        share = edges / edges.sum() + self.exists.double() / self.exists.sum()
        c = model.cfg
        self.share = (share / (2 * c.n_layers * c.n_heads)).float()  # sums to 1 over all gates
        self.odds = torch.full((c.n_layers, c.n_heads, *edges.shape), START, requires_grad=True)
        self.dice = torch.Generator().manual_seed(seed)
        self.clean: dict[int, Tensor] = {}

    def _segment(self, ready: Ready) -> Tensor:
        """[pos] which of the names each position is of."""
        tokens = ready.maps[0]
        grid = Grid(tokens, self.model.cfg.n_layers, self.model.cfg.n_heads, ready.item)
        out = torch.full((len(tokens),), -1)
        for i, name in enumerate(self.names):
            out[grid.bound.members(name)] = i
        if bool((out < 0).any()):
            raise UsageError(
                f"position {int((out < 0).nonzero()[0])} of a prompt is in none of {', '.join(self.names)}"
            )
        return out

    def _edges(self) -> Tensor:
        """[query, key] existing edges, mean over the items."""
        n = len(self.names)
        total = torch.zeros(n, n, dtype=torch.double)
        for segment in self.segments:
            one = torch.nn.functional.one_hot(segment, n).double()
            total += one.T @ torch.ones(len(segment), len(segment), dtype=torch.double).tril() @ one
        return total / len(self.segments)

    def loss(self, chosen: Sequence[int], temperature: float) -> tuple[Tensor, tuple[float, float]]:
        """KL of some items under gates thrown anew plus the price of what is open; and both, as numbers."""
        noise = torch.rand(self.odds.shape, generator=self.dice).clamp(1e-6, 1 - 1e-6).logit()
        relaxed = ((self.odds + noise) / temperature).sigmoid()
        thrown = (self.odds + noise > 0).float().detach()
        kl = torch.stack(
            [self._kl(i, logp) for i, logp in zip(chosen, self._run(chosen, thrown, relaxed), strict=True)]
        ).mean()
        open_ = (self.odds.sigmoid() * self.share).sum()
        return kl + self.price * open_, (float(kl.detach()), float(open_.detach()))

    def _run(self, chosen: Sequence[int], thrown: Tensor, relaxed: Tensor) -> Tensor:
        """Log probabilities [item, d_vocab] at the last position."""
        model = self.model
        with model.lock.shared():
            with torch.no_grad():
                door = joined([model.arrive(self.readies[i])[0] for i in chosen])
            before = offsets(door)
            segment = torch.zeros(door.embeds.shape[:2], dtype=torch.long)
            for row, (i, start) in enumerate(zip(chosen, before, strict=True)):
                segment[row, start:] = self.segments[i]
            here = door.embeds
            attend = Gated(thrown.to(here), relaxed.to(here), segment.to(here.device), before)
            resid, side = decode(model, door, Run(attend=attend))
            return model.read(resid, side, "last")[:, 0].float().log_softmax(-1).cpu()

    def _kl(self, i: int, logp: Tensor) -> Tensor:
        """KL divergence from the uncut answer over the options and everything else (over all tokens, if open)."""
        clean, found = self._clean(i), self._classes(i, logp)
        return (clean.exp() * (clean - found)).nan_to_num(0.0).sum()

    def _clean(self, i: int) -> Tensor:
        if i not in self.clean:
            with torch.no_grad():
                self.clean[i] = self._classes(
                    i, self.model(self.readies[i])[0, -1].float().log_softmax(-1).cpu()
                )
        return self.clean[i]

    def _classes(self, i: int, logp: Tensor) -> Tensor:
        item = self.readies[i].item
        if item is None or len(item.options) < 2:
            return logp
        letters = torch.tensor(letter_ids(self.model.need_tokenizer(), len(item.options)))
        rest = logp.index_fill(0, letters, -torch.inf)
        return torch.cat([logp[letters], rest.logsumexp(0, keepdim=True)])

    def result(self, trail: Sequence[tuple[float, float]]) -> Result:
        values = self.odds.detach().sigmoid().double().masked_fill(~self.exists, torch.nan).numpy()
        c = self.model.cfg
        return Result(
            values=values, axes=AXES, unit=UNIT, recipe={}, name="trained gates",
            coords={"layer": list(range(1, c.n_layers + 1)), "head": list(range(c.n_heads)), "query": list(self.names), "key": list(self.names)},
            notes={"price": self.price, "trail": {"kl": [k for k, _ in trail], "open": [o for _, o in trail]}, "n": {"item": len(self.readies)}},
        )  # fmt: skip


# ---- from gates to a policy -----------------------------------------------------------------------------------------


def search_gates(
    model: Any, calibration: Any, gates: Result, *, budget: Budget | Mapping[str, float] | None = None, roles: Roles = "all",
    n_frames: int = 8, cancel: Cancel | None = None, show_progress: bool = True,
) -> Found:  # fmt: skip
    """Cut the units least often open: as many as keep the budget, found by halving, each try an exact trial.

    Afterwards each unit that is left is tried once more by itself. Returns `Found`; the trail has axes (step, measure),
    and `notes["kept"]` the units kept as [layer, query, key, head], layers 1-based. Raises UsageError for gates of another
    model.
    """
    trials = Trials(model, as_ready(model, calibration, None, n_frames))
    order = _ordered(model, gates)
    limit, done = Budget.of(budget), list[tuple[float, ...]]()

    def holds(units: set[Unit]) -> bool:
        effect = trials.effect(units, lambda e: _hopeless(e, limit))
        ok = effect.whole and not _hopeless(effect, limit)
        ok = ok and mean_bound(effect.kl, limit.confidence) <= limit.kl
        done.append((float(ok), effect.mean_kl, float(effect.n_flips), float(len(units))))
        return ok

    low, high = 0, len(order) + 1  # cutting `low` units holds, `high` does not (or is too many)
    while high - low > 1:
        if cancel is not None:
            cancel.check()
        middle = (low + high) // 2
        low, high = (middle, high) if holds(set(order[:middle])) else (low, middle)
    cut = set(order[:low])
    for unit in progress(order[low:], desc="kept gates", show=show_progress, cancel=cancel):
        if holds(cut | {unit}):
            cut.add(unit)
    trail = Result(
        values=np.array(done), axes=("step", "measure"), unit="various", recipe={}, name="search by gates",
        coords={"step": list(range(1, len(done) + 1)), "measure": ["accepted", "kl", "flips", "units cut"]},
        notes={"kept": [[u.layer + 1, u.q, u.k, u.heads[0]] for u in order if u not in cut], "ledger": trials.spent.plain()},
    )  # fmt: skip
    policy = as_policy(trials, roles, cut, ())
    return Found(policy.model_copy(update={"name": "gates"}), trail)


def _ordered(model: Any, gates: Result) -> list[Unit]:
    """Every gate as a unit, the least often open first."""
    c = model.cfg
    if gates.axes != AXES or gates.values.shape[:2] != (c.n_layers, c.n_heads):
        raise UsageError(
            f"gates of {dict(zip(gates.axes, gates.values.shape, strict=True))} do not fit {c.n_layers} layers of {c.n_heads} heads; "
            "train them on this model with train_gates"
        )
    found = [
        (
            float(gates.values[tuple(at)]),
            Unit(at[0], gates.coords["query"][at[2]], gates.coords["key"][at[3]], "", (at[1],)),
        )
        for at in np.argwhere(np.isfinite(gates.values)).tolist()
    ]
    return [unit for _, unit in sorted(found)]


def _hopeless(effect: Effect, budget: Budget) -> bool:
    """Whether KL or flips are beyond the budget, whatever the samples still to come say."""
    n = len(effect.kl)
    flips = max(0, most_hits(budget.flips, n, budget.confidence))
    return effect.n_flips > flips or float(np.nansum(effect.kl)) > budget.kl * n
