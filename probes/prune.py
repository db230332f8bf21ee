"""Pruning: which attention edges does a model need for its answers? Search, evidence on other items, and pictures.

1 search the smallest set of edges on calibration items (`lab.edges.search`)   2 measure it on held-out items beside
every baseline (`lab.edges.evaluate`)   3 pictures: accuracy against edges kept, which units are kept, which rows live.
The work is done in `lab.edges`; here are the question's name, its recipe and its pictures as Results. Draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from lab.edges.budget import FINER, Budget, Layers, Method
from lab.edges.closure import closure_of
from lab.edges.curves import curve_of
from lab.edges.evidence import evaluate
from lab.edges.fingerprints import Evidence
from lab.edges.found import ladder
from lab.edges.policy import Policy
from lab.edges.scoring import scores
from lab.edges.searching import Found, search
from lab.edges.units import Grain, Grid, Roles, segments_of
from lab.edges.validating import validate_scores
from lab.errors import UsageError
from lab.items import load_items
from lab.model.ready import Ready
from lab.recipe import ItemsSpec, ModelSpec, Part, Recipe
from lab.result import Result
from lab.runs import Cancel, Cancelled
from probes.knockout import load_spec

__all__ = ["PruneRecipe", "Pruned", "curve_of", "liveness", "proven", "prune", "unit_map"]

WORTH = 0.001  # units with a smaller share of all edges are not parted
VALIDATED = 16  # items whose scores are held against real cuts
RUNGS = 12  # points of the accuracy-vs-kept curve besides the policy itself


@dataclass(frozen=True)
class Pruned:
    """What pruning found. evaluation is None without held-out items; pictures: unit map, liveness, and the curve."""

    policy: Policy
    trail: Result
    evaluation: Result | None
    pictures: dict[str, Result]

    def results(self) -> list[Result]:
        """All Results, the most telling first."""
        found = [r for r in (self.pictures.get("curve"), self.evaluation) if r is not None]
        return [*found, *(r for name, r in self.pictures.items() if name != "curve"), self.trail]


class BudgetSpec(Part):
    """A recipe's budget; see `lab.edges.Budget`."""

    kl: float = Field(default=0.02, gt=0)
    flips: float = Field(default=0.03, gt=0, le=1)
    confidence: float = Field(default=0.95, gt=0, lt=1)
    forwards: float = Field(default=80.0, gt=0)


class PruneRecipe(Recipe):
    """A pruning: model, calibration items, held-out items (none: no evidence), how to search, what to compare with."""

    model: ModelSpec = ModelSpec()
    items: ItemsSpec
    holdout: ItemsSpec | None = None
    n_frames: int = Field(default=8, ge=1)
    budget: BudgetSpec = BudgetSpec()
    method: Method = "acdc"
    roles: Roles = "all"
    finer: tuple[Grain, ...] = ("distance", *FINER)
    layers: Layers = "free"
    worth: float = Field(default=WORTH, ge=0, le=1)
    warm: bool = False
    baselines: tuple[str, ...] | str = "all"

    def run(self, *, progress: bool = True, model: Any = None, out: str | Path | None = None) -> list[Result]:
        """Load what the recipe names (or use `model`), search, evaluate. Raises ConfigError if a file changed."""
        found = self.prune(progress=progress, model=model, out=out)
        if found.trail.notes["stopped"] == "interrupted":  # a recipe's numbers are whole, or there are none
            raise Cancelled(
                "stopped; what was measured is kept in the journal, run the same command to go on"
            )
        return found.results()

    def prune(self, *, progress: bool = True, model: Any = None, out: str | Path | None = None) -> Pruned:
        """As `run`, with the policy too."""
        model = model or load_spec(self.model)
        items, held = self._load(self.items), None if self.holdout is None else self._load(self.holdout)
        found = prune(
            model, items, held, budget=self.budget.model_dump(), method=self.method, roles=self.roles, finer=self.finer,
            layers=self.layers, worth=self.worth, warm=self.warm, baselines=self.baselines, n_frames=self.n_frames, out=out,
            show_progress=progress,
        )  # fmt: skip
        told = self.plain()
        trail = replace(found.trail, notes={**found.trail.notes, "policy": found.policy.to_dict()})
        return Pruned(
            found.policy, replace(trail, recipe=told), found.evaluation and replace(found.evaluation, recipe=told),
            {name: replace(r, recipe=told) for name, r in found.pictures.items()},
        )  # fmt: skip

    def _load(self, spec: Any) -> list[Any]:
        return list(load_items(spec, base=self.folder))

    def further(self, results: Sequence[Result], folder: Path) -> list[Path]:
        """Writes the policy that was found."""
        Policy.from_dict(results[-1].notes["policy"], "policy").save(folder / "policy.yaml")
        return [folder / "policy.yaml"]


def prune(
    model: Any, calibration: Sequence[Any], holdout: Sequence[Any] | None = None, *,
    budget: Budget | Mapping[str, float] | None = None, method: Method = "acdc", roles: Roles = "all",
    finer: Sequence[Grain] = ("distance", *FINER), layers: Layers = "free", worth: float = WORTH, warm: bool = False, baselines: Any = "all",
    n_frames: int = 8, out: str | Path | None = None, cancel: Cancel | None = None, show_progress: bool = True,
) -> Pruned:  # fmt: skip
    """Search a policy on the calibration items; with held-out items, measure it beside the baselines.

    warm  order the search by first-order scores (`lab.edges.scores`), validated first; else by exact effects alone
    out   folder for journals: an interrupted run goes on where it stopped
    The rest as in `lab.edges.search` and `lab.edges.evaluate`. Raises UsageError if an item is in both lists.
    """
    _disjoint(calibration, holdout or [])
    folder = None if out is None else Path(out)
    readies = [c if isinstance(c, Ready) else model.prepare(c, n_frames) for c in calibration]
    found: Found = search(
        model, readies, budget=budget, scores=_scores(model, readies) if warm else None, method=method, roles=roles,
        finer=tuple(finer), layers=layers, worth=worth, out=folder and folder / "search", cancel=cancel, show_progress=show_progress,
    )  # fmt: skip
    pictures = {
        "units": unit_map(found.policy, model, readies[0]),
        "live": liveness(found.policy, model, readies[0]),
    }
    if not holdout or found.trail.notes["stopped"] == "interrupted":
        return Pruned(found.policy, found.trail, None, pictures)
    rungs = ladder(found.policy, found.trail)
    every = max(1, len(rungs) // RUNGS)
    told = evaluate(
        model, found.policy, list(holdout), baselines, curve=rungs[::every], n_frames=n_frames,
        out=folder and folder / "evaluate", cancel=cancel, show_progress=show_progress,
    )  # fmt: skip
    return Pruned(proven(found.policy, told), found.trail, told, {**pictures, "curve": curve_of(told)})


def _disjoint(calibration: Sequence[Any], holdout: Sequence[Any]) -> None:
    def names(items: Sequence[Any]) -> set[str]:
        known = (i.item if isinstance(i, Ready) else i for i in items)
        return {i.id for i in known if i is not None and i.id}

    both = names(calibration) & names(holdout)
    if both:
        raise UsageError(
            f"{len(both)} items are both for calibration and held out, {sorted(both)[0]!r} for one; evidence needs others"
        )


def _scores(model: Any, readies: Sequence[Ready]) -> Result:
    """Scores, with their validation beside them."""
    found = scores(model, list(readies))
    return validate_scores(model, list(readies[:VALIDATED]), found)


def proven(policy: Policy, evaluation: Result) -> Policy:
    """The policy with its evidence written into it."""
    rows = evaluation.select(task="all")
    full, mine = (rows.select(policy=name) for name in ("full", "policy"))
    drop = mine.select(measure="drop")
    bounds = None if drop.low is None or drop.high is None else (float(drop.low), float(drop.high))
    told = Evidence(
        holdout=f"{evaluation.notes['n']['item']} items, {evaluation.notes['videos']} videos",
        acc_full=float(full.select(measure="accuracy").values), acc_policy=float(mine.select(measure="accuracy").values),
        drop_ci95=bounds, flips=float(mine.select(measure="flips").values),
    )  # fmt: skip
    return policy.model_copy(update={"evidence": told})


# how the pictures are drawn: options of `lab.view.draw.save`
DRAWN: dict[str, dict[str, Any]] = {
    "curve": {"kind": "lines"}, "units": {"kind": "heat", "limits": (0.0, 1.0)},
    "live": {"kind": "heat", "limits": (0.0, 1.0)}, "overlap": {"kind": "heat", "limits": (0.0, 1.0)},
}  # fmt: skip

# ---- pictures -------------------------------------------------------------------------------------------------------


def unit_map(policy: Policy, model: Any, ready: Ready, roles: Roles = "all") -> Result:
    """Share of each segment pair's edges that is kept in each layer, axes (pathway, layer); pairs written keys->queries.

    Pairs of which no layer keeps anything are left out, and named in `notes["cut_everywhere"]`.
    """
    c, tokens = model.cfg, ready.maps[0]
    grid, names = Grid(tokens, c.n_layers, c.n_heads, ready.item), segments_of(tokens, roles)
    masks = policy.masks(tokens, c.n_layers, c.n_heads, ready.item)
    pairs = [(q, k) for q in names for k in names if bool(grid.mask((q, k, "")).any())]
    every = {
        f"{k}->{q}": [_kept(masks.get(layer), grid.mask((q, k, ""))) for layer in range(c.n_layers)] for q, k in pairs
    }  # fmt: skip
    rows = {name: row for name, row in every.items() if any(row)} or every
    return Result(
        values=np.array(list(rows.values())), notes={"cut_everywhere": [n for n in every if n not in rows]}, axes=("pathway", "layer"), recipe={}, unit="share of edges kept", name="edges kept, by unit",
        coords={"pathway": list(rows), "layer": list(range(1, c.n_layers + 1))},
    )  # fmt: skip


def _kept(cut: Any, pair: Any) -> float:
    return 1.0 if cut is None else 1.0 - float((cut & pair).float().sum((-2, -1)).mean() / pair.sum())


def liveness(policy: Policy, model: Any, ready: Ready) -> Result:
    """Share of each segment's rows whose output can still reach the answer, axes (role, layer). 0: the rows are dead."""
    c, tokens = model.cfg, ready.maps[0]
    grid = Grid(tokens, c.n_layers, c.n_heads, ready.item)
    masks = policy.masks(tokens, c.n_layers, c.n_heads, ready.item)
    live = closure_of(masks, len(tokens), c.n_layers, [len(tokens) - 1]).live
    names = segments_of(tokens)
    rows = [
        [float(live[i + 1][grid.bound.members(n)].float().mean()) for i in range(c.n_layers)] for n in names
    ]
    return Result(
        values=np.array(rows), axes=("role", "layer"), recipe={}, unit="share of rows that reach the answer",
        coords={"role": list(names), "layer": list(range(1, c.n_layers + 1))}, name="which rows live",
    )  # fmt: skip
