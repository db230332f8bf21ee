"""Activation patching: where does taking one world's values into the other's run carry the answer over?

1 run a question and its twin (clean, corrupted)   2 for every cell of a grid - layers by frames, roles or heads - run the
corrupted world with the clean world's values there   3 how far the answer moves towards the clean one is the cell.
`path_patching` lets one group of tokens alone read the other world's keys and values of another group;
`attribution_patching` estimates every cell at once from backward passes and says how far it is from the exact grid.
The work is done by `lab.patch`. Draws nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lab.edges.segments import names as parts_of
from lab.edges.segments import roles_here
from lab.edges.sweeping import layers_of
from lab.errors import LabWarning, UsageError
from lab.model.ready import Ready
from lab.patch.edits import Edit, take
from lab.patch.gradients import Path as GradientPath
from lab.patch.gradients import attribution_patch, passes
from lab.patch.metrics import BASELINES, UNITS, Metric, Score, answers_of
from lab.patch.paths import SHADOW, token_path
from lab.patch.sites import EMBED, check_site, hook_name, n_heads
from lab.patch.worlds import Worlds
from lab.recipe import Recipe
from lab.result import Result
from lab.runs import Cancel, Ledger, Run, progress
from probes import against as corrupting
from probes.asking import ProbeRecipe, load_spec

By = Literal["frame", "role", "head"]
CLEAN, CORRUPTED = "clean", "corrupted"
POOR = 0.5  # correlation with the exact grid below which estimates are warned of
PATHS = ("video->question+option", "video->last", "question+option->last", "last->last")


class PatchingRecipe(ProbeRecipe):
    """A patching grid; see `patching` for the fields."""

    by: By = "frame"
    site: str = "resid_pre"
    role: str | None = None
    window: int = Field(default=1, ge=1)
    into: str = CORRUPTED
    against: str | None = None
    metric: Metric = "recovered"
    added: ClassVar[tuple[str, ...]] = ("mechanisms", "policy")

    def run(self, *, progress: bool = True, model: Any = None, out: str | Path | None = None) -> list[Result]:
        """Load what the recipe names (or use `model`) and patch. Raises ConfigError if a file or the weights changed."""
        names = ("by", "site", "role", "window", "into", "against", "metric", "n_frames")
        given = {n: getattr(self, n) for n in names}
        return [
            patching(
                model or load_spec(self.model), self.questions(), **given, policy=self.edge_policy(), mechanisms=self.on(),
                out=out, show_progress=progress, recipe=self,
            )
        ]  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """How every item of a probe is set up: both worlds, what holds in them, and what is measured."""

    into: str
    against: Any
    metric: Metric
    n_frames: int
    policy: Any
    mechanisms: tuple[Any, ...]
    executor: str = "fast"
    window: int = 1

    def __post_init__(self) -> None:
        if self.into not in (CLEAN, CORRUPTED):
            raise UsageError(
                f"into={self.into!r}; patch into 'corrupted' (restoring) or 'clean' (corrupting)"
            )
        if self.window < 1:
            raise UsageError(f"window must be at least 1 layer, got {self.window}")
        if self.metric not in get_args(Metric):
            raise UsageError(f"metric={self.metric!r}; use one of {', '.join(get_args(Metric))}")

    @property
    def source(self) -> str:
        return CLEAN if self.into == CORRUPTED else CORRUPTED

    @property
    def way(self) -> str:
        return f"{self.source} -> {self.into}"

    def worlds(self, model: Any, item: Any, other: Any, shadow: bool = False) -> Worlds:
        """The worlds of one item."""
        clean = item if isinstance(item, Ready) else _prepared(model, item, self)
        second = corrupting.corrupted(model, clean, other, self.n_frames, self.mechanisms)
        mechanisms = self.mechanisms if isinstance(item, Ready) else ()
        given: dict[str, Any] = {CLEAN: clean, CORRUPTED: second}
        if shadow:
            given[SHADOW] = given[self.into]
        return Worlds.of(
            model, policy=self.policy, mechanisms=mechanisms, n_frames=self.n_frames,
            standing=[e for w in (CORRUPTED, SHADOW)[: 1 + (shadow and self.into == CORRUPTED)] for e in corrupting.standing(other, w, 0)],
            **given,
        )  # fmt: skip


def patching(
    model: Any, items: Any, *, by: By | Sequence[str] = "frame", site: str = "resid_pre", role: str | None = None,
    window: int = 1, into: str = CORRUPTED, against: Any = None, metric: Metric = "recovered", n_frames: int = 8,
    policy: Any = None, mechanisms: Sequence[Any] = (), executor: str = "fast", out: str | Path | None = None,
    cancel: Cancel | None = None, show_progress: bool = True, recipe: Recipe | None = None,
) -> Result:  # fmt: skip
    """A grid of patches: layers by frames, roles or heads, for every item.

    items     one or several VideoQA or Ready (one world each)
    by        "frame", "role" (every role the prompt has), "head" (of `site`, e.g. "z"), or a list of segments
    site      where values are taken (see `lab.patch.sites`); "resid_pre" is the stream that enters a layer
    role      which rows: of frames, "video" at most; of heads, all rows if None
    window    layers patched together round each layer, clipped at the ends
    into      "corrupted": clean values restore the clean answer; "clean": corrupted values undo it
    against   the corrupted world: "twin", "reversed", "blank", "noise", "mean" (see `probes.against`), or one world per
              item (VideoQA, Ready); None: "twin" where every item has one, else "reversed"
    metric    "recovered" (nan, with the reason in `notes["worlds"]`, where both worlds score alike), "logit_diff",
              "probability" (of the source world's answer), "flip"
    executor  "fast" runs only rows that can change, from stored runs; "reference" one forward a cell
    out       folder for a journal (with a recipe): an interrupted grid goes on where it stopped

    Returns a Result with axes (item, layer, frame | role | head); layers 1-based. `notes` holds the answers and scores
    of both worlds and the ledger. Raises UsageError for worlds whose tokens do not correspond, with the reason.
    """
    given = _listed(items)
    setup = Setup(
        into,
        _against(given, against),
        metric,
        n_frames,
        model.pruning.chosen(policy),
        tuple(mechanisms),
        executor,
        window,
    )
    check_site(site)
    axis = by if isinstance(by, str) else "role"
    if axis not in get_args(By):
        raise UsageError(f"by={by!r}; use one of {', '.join(get_args(By))}, or a list of segments")

    def grid(worlds: Worlds) -> tuple[list[Any], Any]:
        columns = _columns(worlds, by, site, role, setup)
        n = 1 if site == EMBED else model.cfg.n_layers
        cells = [edits(layer) for layer in range(n) for edits in columns.values()]
        return list(columns), (worlds.evaluate(cells, into=into, executor=executor), n)

    rows = list(_rows(model, given, setup, grid, out, recipe, cancel, show_progress, "patching"))
    return _result(
        rows, axis, setup, "activation patching", {"site": site, "by": by, "window": window}, recipe
    )


def path_patching(
    model: Any, items: Any, paths: Sequence[str] = PATHS, *, via: Literal["kv", "k", "v"] = "kv", window: int = 1, head: Any = None,
    into: str = CORRUPTED, against: Any = None, metric: Metric = "recovered", n_frames: int = 8, policy: Any = None,
    mechanisms: Sequence[Any] = (), cancel: Cancel | None = None, show_progress: bool = True,
) -> Result:  # fmt: skip
    """Receiver tokens alone read the other world's keys and values of the sender tokens, in a window of layers.

    paths   "sender->receiver" between segments, in the direction information flows, as knock-out pathways are written
    via     "kv", "k" (where they look) or "v" (what they find there); head: query heads of the receivers, None: all
    The rest as in `patching`. Returns a Result with axes (item, path, layer). One batched pass of three worlds a point.
    """
    given = _listed(items)
    setup = Setup(
        into,
        _against(given, against),
        metric,
        n_frames,
        model.pruning.chosen(policy),
        tuple(mechanisms),
        "reference",
        window,
    )
    ends = [_ends(p) for p in paths]
    if not ends:
        raise UsageError("no paths given; write 'video->last' or the like")
    n = model.cfg.n_layers

    def grid(worlds: Worlds) -> tuple[list[Any], Any]:
        at = worlds.names.index(into)
        points = [
            token_path(setup.way, s, r, layers=_softmax(model, layer, window), via=via, head=head)
            for layer in range(n)
            for s, r in ends
        ]
        return list(paths), (torch.stack([worlds.run(p)[at, -1] for p in points]), n)

    rows = list(
        _rows(model, given, setup, grid, None, None, cancel, show_progress, "path patching", shadow=True)
    )
    made = _result(rows, "path", setup, "path patching", {"via": via, "window": window}, None)
    return Result(
        np.moveaxis(made.values, 1, 2), ("item", "path", "layer"), made.coords, made.unit, {}, made.name, made.notes,
        baseline=made.baseline,
    )  # fmt: skip


def attribution_patching(
    model: Any, items: Any, *, by: By | Sequence[str] = "frame", site: str = "resid_pre", role: str | None = None,
    into: str = CORRUPTED, against: Any = None, metric: Metric = "recovered", n_frames: int = 8, policy: Any = None,
    mechanisms: Sequence[Any] = (), steps: int = 8, path: GradientPath = "inputs", exact: bool = True,
    cancel: Cancel | None = None, show_progress: bool = True,
) -> Result:  # fmt: skip
    """The grid of `patching`, estimated from gradients: first order, or its mean on the way between the worlds.

    steps   1: the gradient of the world patched (attribution patching proper, one backward pass). More: the mean over so many
            points on the way between the two worlds
    path    what moves on that way: "inputs" (the embeddings; `steps` passes in all) or "activations" (the site's own values,
            `steps` passes a layer, which sums right over the rows of a layer). See `lab.patch.gradients`
    exact   also compute the exact grid and report, in `notes["against_exact"]`, the correlation, the slope and the mean
            and largest absolute error over all cells; a LabWarning below a correlation of 0.5

    Do not trust it without that number. On `tiny` between twins (logit_diff, five tasks, 20 questions) the correlation with
    the exact grid lies, by task, with one step | eight | eight along activations, at
        frames of resid_pre  0.1-0.25 | 0.67-0.79 | 0.66-0.79      roles  0.5-0.8 | 0.89-0.98 | 0.94-0.99
        heads of z           0.7-0.9  | 0.84-0.89 | 0.90-0.97      (one step on other draws: frames from -0.1, roles from 0)
    One step sees neither saturated attention nor saturated answers; no step sees that frames stand in for one another.
    "probability" is worst: near 0 or 1 it has no gradient. A pass costs three forwards: for a few cells a layer, frames or
    roles, exact patching is as cheap. This is for many, such as all heads of all rows.
    Raises UsageError for metric "flip", which has no gradient.
    """
    if metric == "flip":
        raise UsageError("'flip' has no gradient; use 'recovered', 'logit_diff' or 'probability'")
    given = _listed(items)
    setup = Setup(
        into, _against(given, against), metric, n_frames, model.pruning.chosen(policy), tuple(mechanisms)
    )
    found: list[tuple[Any, Any]] = []

    def grid(worlds: Worlds, score: Score) -> tuple[list[Any], Any]:
        effect = attribution_patch(worlds, setup.source, into, score, site=site, steps=steps, path=path)
        columns = _columns(worlds, by, site, role, setup)
        tokens, item = worlds.tokens(into), worlds.ready[into].item
        layers = sorted(effect)
        values = torch.stack(
            [_summed(effect[i], edits(i)[0], tokens, item) for i in layers for edits in columns.values()]
        )
        if exact:
            logits = worlds.evaluate([e(i) for i in layers for e in columns.values()], into=into)
            found.append((values, score(logits).cpu() - _start(score)))
        return list(columns), (values + _start(score), len(layers))

    rows = list(
        _rows(
            model, given, setup, grid, None, None, cancel, show_progress, "attribution patching", scored=True
        )
    )
    axis = by if isinstance(by, str) else "role"
    error = _error(found) if exact else None
    _warn_if_poor(error)
    taken = passes(model, site, steps, path)
    notes = {
        "site": site,
        "by": by,
        "steps": steps,
        "path": path,
        "passes": taken,
        **({"against_exact": error} if error else {}),
    }
    return _result(rows, axis, setup, "attribution patching", notes, None)


# ---- what is patched ------------------------------------------------------------------------------------------------


def _columns(
    worlds: Worlds, by: Any, site: str, role: str | None, setup: Setup
) -> dict[Any, Callable[[int], list[Edit]]]:
    """Coordinate -> the edits of a layer (0-based), in order."""
    tokens, model = worlds.tokens(setup.into), worlds.model

    def column(**which: Any) -> Callable[[int], list[Edit]]:
        def edits(layer: int) -> list[Edit]:
            layers = (
                None
                if site == EMBED
                else _having(model, site, layers_of(layer, setup.window, model.cfg.n_layers))
            )
            return [] if layers == () else [take(setup.way, site=site, layers=layers, **which)]

        return edits

    if role is not None and by not in ("frame", "head"):
        raise UsageError(
            f"role={role!r} chooses the rows of by='frame' and 'head'; by={by!r} names its rows itself"
        )
    match by:
        case "frame":
            if not tokens.n_frames:
                raise UsageError("this prompt has no video tokens; use by='role'")
            return {
                f: column(role=role or "video", frame=f)
                for f in sorted(set(tokens.frame[tokens.where(role="video")].tolist()))
            }
        case "head":
            if not n_heads(model, site):
                raise UsageError(f"site {site!r} has no heads; use site='z'")
            return {h: column(role=role or "*", head=h) for h in range(n_heads(model, site))}
        case "role":
            return {r: column(role=r) for r in roles_here(tokens) if r != "pad"}
        case _:
            segments = [str(s) for s in by]
            if not segments:
                raise UsageError("by=[]: name at least one segment")
            return {s: column(role=s) for s in segments}


def _having(model: Any, site: str, layers: Sequence[int]) -> tuple[int, ...]:
    return tuple(i for i in layers if hook_name(site, i) in model.hook_dict)


def _softmax(model: Any, layer: int, window: int) -> list[int]:
    return [i for i in layers_of(layer, window, model.cfg.n_layers) if model.parts[i].attn is not None]


def _ends(path: str) -> tuple[str, str]:
    sender, arrow, receiver = (p.strip() for p in str(path).partition("->"))
    if not arrow or not sender or not receiver:
        raise UsageError(f"a path is written 'sender->receiver', such as 'video->last'; got {path!r}")
    for name in (sender, receiver):
        parts_of(name)
    return sender, receiver


def _summed(effect: Tensor, edit: Edit, tokens: Any, item: Any) -> Tensor:
    part = effect[edit.rows(tokens, item)]
    return part[:, list(edit.heads)].sum() if edit.heads is not None else part.sum()


# ---- items ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One item's grid [layer, column], its columns, and what is known of its two worlds."""

    key: str
    columns: list[Any]
    values: list[list[float]]
    notes: dict[str, Any]
    spent: Ledger


def _rows(
    model: Any, items: Sequence[Any], setup: Setup, grid: Any, out: Any, recipe: Recipe | None, cancel: Cancel | None,
    show: bool, desc: str, *, shadow: bool = False, scored: bool = False,
) -> Any:  # fmt: skip
    others = _others(items, setup.against)
    keys = _keys(items)
    run = None
    if out is not None:
        if recipe is None:
            raise UsageError(
                "a journal needs a recipe: items from a file or a simulator, by `vlab patch` or PatchingRecipe"
            )
        run = Run(out, recipe, cancel=cancel).__enter__()
    try:
        for key, item, other in progress(
            list(zip(keys, items, others, strict=True)), desc=desc, show=show, cancel=cancel
        ):
            if run is not None and run.done(key):
                held = run.results()[key]
                yield _Row(key, held["columns"], held["values"], held["notes"], Ledger(**held["spent"]))
                continue
            worlds = setup.worlds(model, item, other, shadow)
            with worlds.storing():
                row = _row(model, key, worlds, setup, grid, scored)
            if run is not None:
                plain = {
                    "columns": row.columns,
                    "values": row.values,
                    "notes": row.notes,
                    "spent": row.spent.plain(),
                }
                run.record(key, plain, row.spent)
            yield row
    finally:
        if run is not None:
            run.__exit__(None, None, None)


def _row(model: Any, key: str, worlds: Worlds, setup: Setup, grid: Any, scored: bool) -> _Row:
    calls = model.tower_calls
    logits = worlds.logits(setup.executor)
    source, into = (worlds.ready[w].item for w in (setup.source, setup.into))
    tokens, choices = answers_of(model, source, into)
    score = Score.between(logits[setup.source], logits[setup.into], setup.metric, tokens, choices)
    columns, (found, n) = grid(worlds, score) if scored else grid(worlds)
    values = (found if scored else score(found)).detach().float().cpu().reshape(n, len(columns))
    notes = {
        "answers": {setup.source: _text(model, score.theirs), setup.into: _text(model, score.own)},
        "score": {setup.source: score.end, setup.into: score.start}, "reason": worlds.reason,
        "score_is": "logit difference" if score.theirs != score.own else "log probability (both worlds answer alike)",
    }  # fmt: skip
    if score.lost:
        notes["nan"] = score.lost
        warnings.warn(f"{key}: {score.lost}", LabWarning, stacklevel=2)
    spent = worlds.ledger + Ledger(tower_calls=model.tower_calls - calls)
    return _Row(key, columns, values.tolist(), notes, spent)


def _result(
    rows: Sequence[_Row], axis: str, setup: Setup, name: str, notes: dict[str, Any], recipe: Recipe | None
) -> Result:
    columns = list(dict.fromkeys(c for row in rows for c in row.columns))
    if axis == "frame" and any(row.columns != columns for row in rows):
        counts = sorted({len(row.columns) for row in rows})
        raise UsageError(f"the items have {counts} frames; a grid needs as many in each: give n_frames")
    values = np.full((len(rows), len(rows[0].values), len(columns)), np.nan)
    for i, row in enumerate(rows):
        values[i][:, [columns.index(c) for c in row.columns]] = row.values
    spent = sum((row.spent for row in rows), Ledger())
    return Result(
        values=values, axes=("item", "layer", axis),
        coords={"item": [r.key for r in rows], "layer": list(range(1, values.shape[1] + 1)), axis: columns},
        unit=UNITS[setup.metric], recipe=recipe.plain() if recipe else {}, name=name, baseline=BASELINES[setup.metric],
        notes={
            **notes, "into": setup.into, "metric": setup.metric, "ledger": spent.plain(),
            "against": setup.against if isinstance(setup.against, str) else "given",
            "worlds": {r.key: {k: v for k, v in r.notes.items() if k != "reason"} for r in rows},
            "fallbacks": sorted({r.notes["reason"] for r in rows} - {""}),
        },
    )  # fmt: skip


def _prepared(model: Any, item: Any, setup: Setup) -> Ready:
    if isinstance(item, dict):
        return model.prepare_inputs(**item)
    return model.prepare(item, setup.n_frames, mechanisms=setup.mechanisms)


def _listed(items: Any) -> list[Any]:
    given = list(items) if isinstance(items, list | tuple) else [items]
    if not given:
        raise UsageError("no items given; a probe needs at least one question")
    return given


def _against(items: Sequence[Any], against: Any) -> Any:
    return corrupting.usual(items) if against is None else against


def _others(items: Sequence[Any], against: Any) -> list[Any]:
    """The corrupted world, or its name, for every item."""
    if isinstance(against, str):
        return [against] * len(items)
    given = list(against) if isinstance(against, list | tuple) else [against]
    if len(given) != len(items):
        raise UsageError(f"{len(given)} worlds to compare with for {len(items)} items; give one each")
    return given


def _keys(items: Sequence[Any]) -> list[str]:
    asked = [i.item if isinstance(i, Ready) else i for i in items]
    names = [getattr(a, "id", "") or f"item:{n}" for n, a in enumerate(asked, 1)]
    return [name if names.count(name) == 1 else f"{name}#{n}" for n, name in enumerate(names, 1)]


def _text(model: Any, token: int) -> str:
    return model.tokenizer.decode([token]) if model.tokenizer is not None else str(token)


def _start(score: Score) -> float:
    """The metric's value where nothing is patched."""
    match score.metric:
        case "logit_diff":
            return score.start
        case _:
            return 0.0


def _error(found: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    """How far the estimates of all cells are from the exact effects."""
    est, true = (torch.cat([pair[i].reshape(-1) for pair in found]).double().numpy() for i in (0, 1))
    known = np.isfinite(est) & np.isfinite(true)
    est, true = est[known], true[known]
    spread = len(est) > 1 and est.std() > 0 and true.std() > 0
    return {
        "pearson": float(np.corrcoef(est, true)[0, 1]) if spread else float("nan"),
        "slope": float((est * true).sum() / max(float((true * true).sum()), 1e-30)),
        "mean_abs": float(np.abs(est - true).mean()) if len(est) else float("nan"),
        "max_abs": float(np.abs(est - true).max()) if len(est) else float("nan"),
        "mean_abs_effect": float(np.abs(true).mean()) if len(true) else float("nan"),
    }


def _warn_if_poor(error: dict[str, float] | None) -> None:
    if error is None or not error["pearson"] < POOR:
        return
    warnings.warn(
        f"these estimates correlate only {error['pearson']:.2f} with exact patching (mean error {error['mean_abs']:.2g}, mean "
        f"effect {error['mean_abs_effect']:.2g}): use patching(), or more steps along path='activations'",
        LabWarning,
        stacklevel=3,
    )
