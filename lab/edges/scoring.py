"""Scores: what cutting each set of attention edges would do to the answer, predicted for all of them at once.

1 one forward of the prompt, one backward of the option margin to the activations (weights get no gradient)   2 on the
way back, in every layer and head, for every row and every segment of keys: how much attention the segment gets and what
it contributes; both are sums of what the backward pass computes anyway   3 in closed form (`lab.edges.formulas`): the
exact change of the row's output if the segment is cut and the rest renormalised, times the gradient; summed over the
rows of a query segment.

What later layers make of the change is linearised, so scores must be held against real cuts (`lab.edges.validating`)
before anything is cut by them. The idea: edge attribution patching and AtP* (arXiv 2310.10348, 2403.00745).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.edges.formulas import FORMS, RowStats
from lab.edges.margins import UNIT, Metric, check_metric
from lab.edges.pairs import Grid, check_grid, merged
from lab.edges.passes import Found, Node, Passes, World, scored, worlds_of
from lab.edges.policy import Policy
from lab.edges.tallies import PairTally
from lab.errors import LabWarning, UsageError
from lab.result import Result
from lab.runs import Cancel, Ledger

Form = Literal["knockout", "gate", "read", "integrated"]
POINTS = 5
AXES = ("item", "layer", "head", "query", "key")


@dataclass(frozen=True)
class Scoring:
    """How edges are scored.

    segmentation  see `lab.edges.pairs`
    metric        see `lab.edges.margins`
    form          "knockout": exact renormalised effect on the row; "gate": the gradient of an additive gate; "read":
                  what is read becomes zero, nothing is renormalised; "integrated": along `path`
    path          for "integrated": the policy whose edges are cut together, by and by (see `lab.edges.tapping`). Scores are
                  each edge's part in that and add up to all of it; edges that it leaves alone score 0
    points        forwards and backwards along the path
    drop          GradDrop: one backward more for every layer, with that layer's gradient dropped; the mean size over
                  these, so that paths through the dropped layers cannot cancel the others
    policy        edges that are cut already
    """

    segmentation: Grid = "strict"
    metric: Metric = "margin"
    form: Form = "knockout"
    path: Policy | None = None
    points: int = POINTS
    drop: bool = False
    policy: Policy | None = None

    def __post_init__(self) -> None:
        check_grid(self.segmentation)
        check_metric(self.metric)
        if self.form not in get_args(Form):
            raise UsageError(f"form={self.form!r}; use one of {', '.join(get_args(Form))}")
        if (self.form == "integrated") != (self.path is not None):
            raise UsageError(
                f"form={self.form!r} with {'no path' if self.path is None else 'a path'}: 'integrated' needs path=, the "
                "policy whose cuts lie on it, and no other form takes one"
            )
        if type(self.points) is not int or self.points < 1:
            raise UsageError(f"points must be a whole number of at least 1, got {self.points!r}")
        for name in ("path", "policy"):
            if not isinstance(getattr(self, name), Policy | None):
                raise UsageError(
                    f"{name} must be a lab.edges.Policy, got {type(getattr(self, name)).__name__}"
                )

    def passes(self) -> Passes:
        """What is run for it."""
        return Passes(self.metric, self._nodes(), self.drop, self.policy, self.path)

    def _nodes(self) -> list[Node]:
        """Along the path: Gauss-Legendre."""
        if self.form != "integrated":
            return [(0.0, 1.0)]
        x, weight = np.polynomial.legendre.leggauss(self.points)
        return [(float(t + 1) / 2, float(w) / 2) for t, w in zip(x, weight, strict=True)]


def scores(
    model: Any, items: Any, *, segmentation: Grid = "strict", metric: Metric = "margin", form: Form = "knockout",
    path: Policy | None = None, points: int = POINTS, drop: bool = False, policy: Policy | None = None,
    n_frames: int = 8, batch: int = 8, cancel: Cancel | None = None, show_progress: bool = True,
) -> Result:  # fmt: skip
    """Predicted change of the metric if the edges from a key segment to a query segment are cut, in one layer and head.

    items     one or several VideoQA or Ready
    batch     prompts run together
    the rest  see `Scoring`

    Returns a Result with axes (item, layer, head, query, key), in units of the metric (logits): negative where cutting
    hurts. Layers are 1-based, heads 0-based. 0 where there is no edge; nan where the prompt lacks a segment or the layer
    has no softmax attention. `notes` holds the metric of the clean run, the choice it is about, and the ledger.
    Raises UsageError for metrics without a gradient (KL to clean), unknown segments or forms; RunError for models and
    mechanisms whose edges cannot be scored.
    """
    what = Scoring(segmentation, metric, form, path, points, drop, base_of(model, policy))
    groups = worlds_of(model, items, segmentation, n_frames)
    tally = _pair_tally(model, {form: FORMS.get(form, FORMS["gate"])}, on_path=form == "integrated")
    found = list(scored(model, groups, what.passes(), tally, batch=batch, cancel=cancel, show=show_progress))
    grid = _Table(model, found)
    values = grid.filled([combined(f, form) for f in found])
    _warn_if_flat(values)
    return Result(
        values=values, axes=AXES, coords=grid.coords, unit=UNIT, recipe={}, name="edge scores", baseline=0.0,
        notes=notes_of(model, what, found, naive=grid.cells),
    )  # fmt: skip


def scalars(
    model: Any, items: Any, *, segmentation: Grid = "strict", metric: Metric = "margin", policy: Policy | None = None,
    n_frames: int = 8, batch: int = 8, cancel: Cancel | None = None, show_progress: bool = True,
) -> Result:  # fmt: skip
    """The two numbers behind the scores, with axes (scalar, item, layer, head, query, key).

    mass          attention that a row of the query segment pays to the key segment, mean over rows (0 to 1)
    contribution  what the reads add to the metric to first order, sum over rows (units of the metric)
    """
    what = Scoring(segmentation, metric, policy=base_of(model, policy))
    groups = worlds_of(model, items, segmentation, n_frames)
    forms: dict[str, Callable[[RowStats], Tensor]] = {"mass": _mass, "contribution": _contribution}
    tally = _pair_tally(model, forms, on_path=False)
    found = list(scored(model, groups, what.passes(), tally, batch=batch, cancel=cancel, show=show_progress))
    grid = _Table(model, found)
    values = np.stack([
        grid.filled([_per_row(f) for f in found]), grid.filled([combined(f, "contribution") for f in found])
    ])  # fmt: skip
    return Result(
        values=values, axes=("scalar", *AXES), coords={"scalar": list(forms), **grid.coords}, recipe={},
        unit="mass: share of attention; contribution: logits", name="edge scalars", baseline=0.0,
        notes=notes_of(model, what, found, naive=grid.cells),
    )  # fmt: skip


def _mass(rows: RowStats) -> Tensor:
    return rows.mass


def _contribution(rows: RowStats) -> Tensor:
    return rows.contribution


def _per_row(f: Found) -> Tensor:
    rows = torch.tensor([len(at) for at in f.world.segments.values()])
    return f.tallies[0].sums["mass"] / rows[:, None]


def base_of(model: Any, policy: Policy | None) -> Policy | None:
    """The policy that holds in every run: the one given, else that of an open `model.pruned`."""
    chosen = model.pruning.chosen(policy)
    return None if isinstance(chosen, Policy) and chosen.is_null else chosen


def _pair_tally(
    model: Any, forms: dict[str, Callable[[RowStats], Tensor]], *, on_path: bool
) -> Callable[[World], PairTally]:
    shape = (model.cfg.n_layers, model.cfg.n_heads)

    def made(world: World) -> PairTally:
        parts = list(world.segments.values())
        return PairTally(parts, parts, forms, shape, len(world.tokens), on_path)

    return made


def combined(f: Found, name: str) -> Tensor:
    """The score of the plain backward pass. With dropped layers: the mean size over the passes in which one layer is
    dropped, under the sign of their sum. A layer's own pass gives nothing of itself, hence n - 1."""
    plain, *dropped = (t.sums[name] for t in f.tallies)
    if len(dropped) < 2:
        return plain
    each = torch.stack(dropped)
    return each.sum(0).sign() * each.abs().sum(0) / (len(dropped) - 1)


# ---- tables ---------------------------------------------------------------------------------------------------------


class _Table:
    """Prompts with their own segments, written into one array over the segments of all."""

    def __init__(self, model: Any, found: Sequence[Found]) -> None:
        self.names = merged(list(f.world.segments) for f in found)
        self.softmax = softmax_layers(model)
        self.found = found
        self.coords: dict[str, list[Any]] = {
            "item": [f.world.key for f in found], **layer_coords(model), "query": self.names, "key": self.names,
        }  # fmt: skip

    @property
    def cells(self) -> int:
        """Pairs of segments that edges run between, in layers and heads, over all prompts: one cut run each, naively."""
        pairs = sum(
            int(k[0]) <= int(q[-1])
            for f in self.found for q in f.world.segments.values() for k in f.world.segments.values()
        )  # fmt: skip
        return pairs * int(self.softmax.sum()) * len(self.coords["head"])

    def filled(self, tables: Sequence[Tensor]) -> NDArray[np.float64]:
        """tables [layer, head, query, key] of every prompt; nan for segments a prompt has not, layers without edges."""
        out = np.full([len(c) for c in self.coords.values()], np.nan)
        for i, (f, table) in enumerate(zip(self.found, tables, strict=True)):
            at = [self.names.index(name) for name in f.world.segments]
            out[i][:, :, np.array(at)[:, None], np.array(at)] = table.numpy()
        out[:, ~self.softmax] = np.nan
        return out


def softmax_layers(model: Any) -> NDArray[np.bool_]:
    """Which layers have softmax attention, and so edges."""
    return np.array([p.attn is not None for p in model.parts])


def layer_coords(model: Any) -> dict[str, list[Any]]:
    """Coordinates of layers (1-based) and heads (0-based)."""
    return {"layer": list(range(1, model.cfg.n_layers + 1)), "head": list(range(model.cfg.n_heads))}


def notes_of(model: Any, what: Scoring, found: Sequence[Found], *, naive: int) -> dict[str, Any]:
    """What a Result says beside its numbers. naive: how many cut runs the same numbers would take."""
    spent = sum((f.spent for f in found), Ledger(naive=float(naive)))
    notes: dict[str, Any] = {
        "model": model.cfg.model_name, "metric": what.metric if isinstance(what.metric, str) else "function",
        "form": what.form, "drop": what.drop, "segmentation": what.segmentation if isinstance(what.segmentation, str) else list(what.segmentation),
        "clean": {f.world.key: f.clean for f in found}, "choice": {f.world.key: f.choice for f in found},
        "ledger": spent.plain(), "no_edges": [i + 1 for i, has in enumerate(softmax_layers(model)) if not has],
    }  # fmt: skip
    if what.policy is not None:
        notes["policy"] = what.policy.to_dict()
    if what.path is not None:
        notes["path"], notes["points"] = what.path.to_dict(), what.points
        notes["closed"] = {f.world.key: f.closed for f in found}
    return notes


def _warn_if_flat(values: NDArray[Any]) -> None:
    if not np.nan_to_num(values).any():
        warnings.warn(
            "every score is 0: the metric has no gradient at this run (a saturated or constant metric?)",
            LabWarning,
            stacklevel=3,
        )
