"""Evidence: what a policy does to answers on data it was not made on, beside every baseline it must be better than.

Every item has one clean run; all policies are run from it exactly. Differences are paired, and bounds come from a
bootstrap that draws whole videos. Flips and KL count changes of wrong answers too: to keep the model is more than to
keep its score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.bounds import mean_bound, paired_bound, share_bound
from lab.edges.curves import areas
from lab.edges.fast import run_cut
from lab.edges.identity import weights_id
from lab.edges.policy import Policy
from lab.edges.rivals import FULL, MINE, SHUFFLED, Contestant, check_rival, contestants
from lab.edges.store import Store
from lab.edges.sweeping import _fingerprint, _keys, as_ready
from lab.edges.trials import Answers, Reader, check_items
from lab.edges.units import Grid
from lab.errors import UsageError
from lab.model.ready import Ready
from lab.recipe import Recipe as Owner  # not listed among the recipes that can be run
from lab.result import Result
from lab.runs import Cancel, Ledger, Run, progress

MEASURED = (
    "accuracy", "drop", "drop_bound", "flips", "flips_bound", "flips_correct", "kl", "kl_bound", "margin",
)  # fmt: skip
COUNTED = ("kept", "kept_live", "live_of_total", "kept_video", "excess_over_exit")
MEASURES = (*MEASURED, *COUNTED)
ALL = "all"
COUNTED_LAYOUTS, LOOKED_AT = (
    4,
    32,
)  # layouts a policy is counted on (their mean counts), found among the first items


class EvaluationJournal(Owner):
    """What an evaluation's journal belongs to. It cannot be run by itself."""

    model: str
    weights: str
    dtype: str
    items: tuple[str, ...]
    policies: tuple[str, ...]
    seed: int

    def run(self, *, progress: bool = True) -> list[Result]:
        """Raises UsageError: the items are only known by their fingerprints."""
        raise UsageError(
            "this journal knows its items only by fingerprint; call lab.edges.evaluate with the same items"
        )


def evaluate(
    model: Any, policy: Policy, items: Any, baselines: Any = "all", *, curve: Sequence[Policy] = (), n_frames: int = 8,
    seed: int = 0, out: str | Path | None = None, cancel: Cancel | None = None, show_progress: bool = True,
) -> Result:  # fmt: skip
    """A policy on held-out items, beside baselines: a Result with axes (policy, task, measure).

    items      VideoQA or Ready with options and right answers, none of them used to make the policy
    baselines  "all", "none", some of `lab.edges.rivals.SORTS`, or a mapping of name -> policy
    curve      further policies of the same search (`lab.edges.found.ladder`), for the accuracy-vs-kept curve
    out        folder for a journal: an interrupted evaluation goes on where it stopped

    Measures: accuracy; drop of accuracy against the full model, with its one-sided 95 % bound (bootstrap by video,
    paired); flips (changed choices) of all and of right answers; KL in nats; margin (change, nats); edges kept by the
    paper's rule, live, and of those that touch a video token; live edges to video beyond the best exit of no worse
    accuracy. low and high: 95 % intervals where there are any. `notes` holds every answer, curves and areas.
    Raises UsageError for items without options or answers, ConfigError for a policy made for something else.
    """
    if model.pruning.chosen(None) is not None:
        raise UsageError(
            "an evaluation runs policies of its own, and `model.pruned` is open: evaluate outside of it"
        )
    given = list(items) if isinstance(items, list | tuple) else [items]
    check_items(given)
    check_rival("policy", policy)
    readies = as_ready(model, given[:16], None, n_frames)
    for ready in readies:
        policy.edges(ready.maps[0], model.sizes, ready.item)  # before hours of work: says what does not fit
    rows = contestants(model, policy, readies, baselines, curve, seed)
    shuffled = baselines == "all" or (not isinstance(baselines, Mapping) and "controls" in (baselines or ()))
    judge = Judge(model, rows, seed, shuffled)
    found = _run(judge, given, n_frames, out, cancel, show_progress)
    return _result(model, rows, judge, found, policy)


# ---- one item -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One item under every contestant (shuffled frames last, if asked): choice, KL and margin change."""

    key: str
    task: str
    group: str
    right: int
    choice: list[int]
    kl: list[float]
    margin: list[float]

    def plain(self) -> dict[str, Any]:
        return vars(self)


class Judge:
    """Runs all contestants on one item after another, and counts what it took."""

    def __init__(self, model: Any, rows: Sequence[Contestant], seed: int, shuffled: bool) -> None:
        self.model, self.rows, self.seed = model, rows, seed
        self.names = [r.name for r in rows] + ([SHUFFLED] if shuffled else [])
        self.read = Reader(model)
        self.spent = Ledger()
        self.layouts: dict[bytes, tuple[TokenMap, VideoQA | None]] = {}
        self._masks: dict[tuple[int, bytes], dict[int, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, key: str, ready: Ready) -> Outcome:
        item = ready.item
        if item is None or len(item.options) < 2 or not isinstance(item.answer, int):
            raise UsageError(f"{key}: an evaluation needs items with options and the index of the right one")
        store = Store.of(self.model, ready)
        clean = self.read(store.clean(self.model)[-1], item)
        cuts = [self._cuts(i, row, ready) for i, row in enumerate(self.rows)]
        answers = [self.read(logits[-1], item) for logits in run_cut(self.model, store, cuts)]
        self.spent += store.ledger
        if len(self.names) > len(self.rows):
            answers.append(self._shuffled(ready))
        of = clean.choice
        return Outcome(
            key, item.task, video_key(item), item.answer, [a.choice for a in answers],
            [clean.kl(a) for a in answers], [a.margin(of) - clean.margin(of) for a in answers],
        )  # fmt: skip

    def _cuts(self, i: int, row: Contestant, ready: Ready) -> dict[int, Tensor]:
        """Masks of a contestant; made once for a layout."""
        tokens, item, c = ready.maps[0], ready.item, self.model.cfg
        layout = Grid.key(tokens) + str(item.answer if item is not None else "").encode()
        if (i, layout) not in self._masks:
            if len(self._masks) > 16 * len(self.rows):
                self._masks.clear()
            masks = row.policy.masks(tokens, c.n_layers, c.n_heads, item)
            parts = self.model.parts
            self._masks[i, layout] = {layer: m for layer, m in masks.items() if parts[layer].attn is not None}
        return self._masks[i, layout]

    def note(self, ready: Ready) -> None:
        """Remember the prompt's layout, to count edges on."""
        if len(self.layouts) < COUNTED_LAYOUTS:
            self.layouts.setdefault(Grid.key(ready.maps[0]), (ready.maps[0], ready.item))

    def _shuffled(self, ready: Ready) -> Answers:
        """The full model on the same frames in another order."""
        assert ready.item is not None
        frames = ready.frames
        if frames is None:
            raise UsageError(
                "shuffled frames need items whose videos can be read; leave 'controls' out of the baselines"
            )
        rng = np.random.default_rng([self.seed, int(video_key(ready.item)[:8], 16)])
        order = torch.from_numpy(_other_order(rng, len(frames.pixels)))
        mixed = replace(frames, pixels=frames.pixels[order])
        again = self.model.prepare(replace(ready.item, video=mixed), index=range(len(order)))
        self.spent += Ledger(1, 1)
        return self.read(self.model(again)[0, -1], ready.item)


def _other_order(rng: np.random.Generator, n: int) -> NDArray[Any]:
    """A random order that is not the one there is (of one frame there is no other)."""
    order = np.arange(n)
    while n > 1 and (order == np.arange(n)).all():
        order = rng.permutation(n)
    return order


def video_key(item: VideoQA) -> str:
    """Equal for questions about the same video: of its path, or of its pixels."""
    video = item.video
    if isinstance(video, str):
        return hashlib.sha256(video.encode()).hexdigest()[:16]
    pixels = getattr(video, "pixels", video)
    array = pixels.cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def _run(
    judge: Judge, given: Sequence[Any], n_frames: int, out: Any, cancel: Cancel | None, show: bool
) -> list[Outcome]:
    """All items; from the journal where they are there."""
    keys = _keys([g.item if isinstance(g, Ready) else g for g in given])
    found: list[Outcome] = []
    with nullcontext() if out is None else Run(out, _owner(judge, given), cancel=cancel) as run:
        pieces = list(zip(keys, given, strict=True))
        for i, (key, item) in enumerate(progress(pieces, desc="evaluate", show=show, cancel=cancel)):
            done = run.results()[key] if run is not None and run.done(key) else None
            if done is None or i < LOOKED_AT:
                ready = item if isinstance(item, Ready) else judge.model.prepare(item, n_frames)
                judge.note(ready)
                found.append(_judged(judge, key, ready, run) if done is None else Outcome(**done))
            else:
                found.append(Outcome(**done))
        judge.spent = judge.spent if run is None else run.ledger
    return found


def _judged(judge: Judge, key: str, ready: Ready, run: Run | None) -> Outcome:
    """One item, written into the journal."""
    before = judge.spent
    found = judge(key, ready)
    if run is not None:
        now = judge.spent
        run.record(key, found.plain(), Ledger(now.forwards - before.forwards, now.naive - before.naive))
    return found


def _owner(judge: Judge, given: Sequence[Any]) -> EvaluationJournal:
    items = tuple(_fingerprint(g) if isinstance(g, Ready) else _named(g) for g in given)
    made = [f"{r.name}|{getattr(r.policy, 'id', repr(r.policy))}" for r in judge.rows]
    return EvaluationJournal(
        model=judge.model.cfg.model_name, weights=weights_id(judge.model), dtype=str(judge.model.dtype), items=items,
        policies=tuple(made + judge.names[len(made) :]), seed=judge.seed,
    )  # fmt: skip


def _named(item: VideoQA) -> str:
    said = f"{video_key(item)}|{item.question}|{item.options}|{item.answer}"
    return hashlib.sha256(said.encode()).hexdigest()[:16]


# ---- all items ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Outcomes as arrays: right [item], choice, kl and margin [item, policy]."""

    right: NDArray[Any]
    choice: NDArray[Any]
    kl: NDArray[Any]
    margin: NDArray[Any]
    task: NDArray[Any]
    group: NDArray[Any]

    @classmethod
    def of(cls, found: Sequence[Outcome]) -> _Table:
        columns = ("right", "choice", "kl", "margin", "task", "group")
        return cls(*(np.array([getattr(o, name) for o in found]) for name in columns))

    def only(self, task: str) -> _Table:
        at = np.ones(len(self.task), bool) if task == ALL else self.task == task
        return _Table(*(getattr(self, name)[at] for name in self.__dataclass_fields__))

    def row(self, i: int, seed: int) -> tuple[list[float], list[float], list[float]]:
        """(values, low, high) of what is measured of contestant i; of the full model's row the differences are 0."""
        full, mine = self.choice[:, 0] == self.right, self.choice[:, i] == self.right
        flips = self.choice[:, i] != self.choice[:, 0]
        drop = full.astype(float) - mine
        low, high, bound = (0.0, 0.0, 0.0) if i == 0 else paired_bound(drop, self.group.tolist(), seed=seed)
        n, kl = len(mine), self.kl[:, i]
        values = [
            mine.mean(), drop.mean(), bound, flips.mean(), share_bound(int(flips.sum()), n),
            flips[full].mean() if full.any() else np.nan, kl.mean(), mean_bound(kl), self.margin[:, i].mean(),
        ]  # fmt: skip
        if i == 0:
            values[4] = values[7] = 0.0
        blank = [np.nan] * len(values)
        return values, [*blank[:1], low, *blank[2:]], [*blank[:1], high, *blank[2:]]


def _result(
    model: Any, rows: Sequence[Contestant], judge: Judge, found: Sequence[Outcome], policy: Policy
) -> Result:
    table = _Table.of(found)
    tasks = [ALL, *sorted(set(table.task.tolist()) - {""})]
    tasks = tasks if len(tasks) > 2 else [ALL]
    shape = (len(judge.names), len(tasks), len(MEASURES))
    values, low, high = (np.full(shape, np.nan) for _ in range(3))
    for t, task in enumerate(tasks):
        part = table.only(task)
        for i in range(len(judge.names)):
            for into, got in zip((values, low, high), part.row(i, judge.seed), strict=True):
                into[i, t, : len(MEASURED)] = got
    counts = _counted(model, rows, judge)
    exit_ = _best_exit(rows, values[:, 0, 0], counts)
    for i, count in enumerate(counts):
        extra = count["kept_video_edges"] - counts[exit_]["kept_video_edges"]
        values[i, :, len(MEASURED) :] = [*(count[name] for name in COUNTED[:-1]), extra]
    kept, accuracy = values[: len(rows), 0, len(MEASURED)], values[: len(rows), 0, 0]
    families = [r.family for r in rows]
    return Result(
        values=values, axes=("policy", "task", "measure"), low=low, high=high, recipe={},
        coords={"policy": judge.names, "task": tasks, "measure": list(MEASURES)}, name="what the policy does to answers",
        unit="shares of 1; KL and margin in nats; excess in edges",
        notes={
            "n": {"item": len(found)}, "videos": len(set(table.group.tolist())), "ledger": judge.spent.plain(),
            "best_exit": rows[exit_].name, "policy_id": policy.id, "families": families, **areas(families, kept, accuracy),
            "items": [o.key for o in found],
            "answers": {n: table.choice[:, i].tolist() for i, n in enumerate(judge.names) if n in (FULL, MINE, SHUFFLED)},
        },
    )  # fmt: skip


def _counted(model: Any, rows: Sequence[Contestant], judge: Judge) -> list[dict[str, float]]:
    """Counts of every contestant, mean over a few layouts."""
    return [
        {k: float(np.mean([o[k] for o in one])) for k in one[0]}
        for one in ([_count(model, row, *layout) for layout in judge.layouts.values()] for row in rows)
    ]


def _count(model: Any, row: Contestant, tokens: TokenMap, item: VideoQA | None) -> dict[str, float]:
    c = model.cfg
    found = row.policy.count(tokens, c.n_layers, c.n_heads, item)
    return {
        "kept": found.kept_fraction, "kept_live": found.kept_live_fraction, "live_of_total": found.live_of_total,
        "kept_video": kept_video(row.policy.masks(tokens, c.n_layers, c.n_heads, item), tokens, c.n_layers),
        "kept_video_edges": found.kept_video / found.n_heads,
    }  # fmt: skip


def kept_video(masks: Mapping[int, Tensor], tokens: TokenMap, n_layers: int) -> float:
    """Share kept of the edges whose query or key is a video token; 1 without a video."""
    n = len(tokens)
    video = torch.zeros(n, dtype=torch.bool)
    video[tokens.where(role="video")] = True
    touch = (video[:, None] | video[None, :]).tril()
    total = int(touch.sum()) * n_layers
    gone = sum(float((m & touch).float().sum((-2, -1)).mean()) for m in masks.values())
    return 1.0 - gone / total if total else 1.0


def _best_exit(rows: Sequence[Contestant], accuracy: NDArray[Any], counts: Sequence[dict[str, float]]) -> int:
    """The exit with fewest live edges that is no less accurate than the policy; the full model if there is none."""
    mine = next(i for i, r in enumerate(rows) if r.name == MINE)
    good = [i for i, r in enumerate(rows) if r.family in ("exit", FULL) and accuracy[i] >= accuracy[mine]]
    return min(good, key=lambda i: counts[i]["kept_live"], default=0)


def overlap(
    policies: Mapping[str, Any], tokens: TokenMap, n_layers: int, n_heads: int, item: VideoQA | None = None
) -> Result:
    """How far policies keep the same edges: kept by both over kept by either (Jaccard), axes (policy, other)."""
    if len(policies) < 2:
        raise UsageError(f"overlap compares policies, got {len(policies)}; give at least 2")
    kept = [_kept(p, tokens, n_layers, n_heads, item) for p in policies.values()]
    values = [[float((a & b).sum()) / max(1.0, float((a | b).sum())) for b in kept] for a in kept]
    names = list(policies)
    return Result(
        values=np.array(values), axes=("policy", "other"), coords={"policy": names, "other": names}, recipe={},
        unit="edges kept by both, of those kept by either", name="overlap of policies",
    )  # fmt: skip


def _kept(policy: Any, tokens: TokenMap, n_layers: int, n_heads: int, item: VideoQA | None) -> Tensor:
    masks = policy.masks(tokens, n_layers, n_heads, item)
    n = len(tokens)
    out = torch.ones(n, n, dtype=torch.bool).tril().repeat(n_layers, n_heads, 1, 1)
    for layer, mask in masks.items():
        out[layer] &= ~mask
    return out
