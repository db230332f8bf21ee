"""Scores of sets of edges that no single pair of segments names: units of a search, and any subset of a row's keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.edges.cuts import Cut
from lab.edges.formulas import RowStats, subset
from lab.edges.margins import UNIT, Metric
from lab.edges.pairs import Grid
from lab.edges.passes import World, scored, worlds_of
from lab.edges.policy import Policy
from lab.edges.scoring import Scoring, base_of, layer_coords, notes_of, softmax_layers
from lab.edges.tallies import RowTally, UnitTally
from lab.errors import UsageError
from lab.result import Result
from lab.runs import Cancel


def unit_scores(
    model: Any, items: Any, units: Sequence[Cut], *, metric: Metric = "margin", policy: Policy | None = None,
    n_frames: int = 8, batch: int = 8, cancel: Cancel | None = None, show_progress: bool = True,
) -> Result:  # fmt: skip
    """Predicted change if all edges of a unit are cut together, in every layer and head: exact in each row's output.

    units     cuts (segments, `where`, heads) with names of the strict segmentation; their layers are not looked at

    A unit may name what no pair of segments does: Cut(q="video", k="video", where="frame(q) > frame(k)").
    Returns a Result with axes (item, layer, head, unit) in logits; heads that a unit leaves out score 0.
    """
    if isinstance(units, Cut) or not len(units) or not all(isinstance(u, Cut) for u in units):
        raise UsageError(f"units must be a list of lab.edges.Cut, got {str(units)[:80]}")
    what = Scoring(metric=metric, policy=base_of(model, policy))
    holder = Policy(cuts=tuple(Cut(q=u.q, k=u.k, where=u.where, heads=u.heads) for u in units))
    shape = (model.cfg.n_layers, model.cfg.n_heads)

    def tally(world: World) -> UnitTally:
        return UnitTally(holder.cuts, holder.bind(world.tokens, *shape, world.item), shape)

    groups = worlds_of(model, items, "strict", n_frames)
    found = list(scored(model, groups, what.passes(), tally, batch=batch, cancel=cancel, show=show_progress))
    values = np.stack([f.tallies[0].sums["knockout"].numpy() for f in found])
    values[:, ~softmax_layers(model)] = np.nan
    names = [unit_name(u) for u in units]
    return Result(
        values=values, axes=("item", "layer", "head", "unit"), unit=UNIT, recipe={}, name="unit scores", baseline=0.0,
        coords={"item": [f.world.key for f in found], **layer_coords(model), "unit": names},
        notes=notes_of(model, what, found, naive=values.size),
    )  # fmt: skip


def unit_name(unit: Cut) -> str:
    """A unit as a coordinate: "last<-video", "video<-video [frame(q) > frame(k)]"."""
    where = f" [{unit.where}]" if unit.where else ""
    heads = "" if unit.heads == "all" else f" heads {','.join(map(str, unit.heads))}"
    return f"{unit.q}<-{unit.k}{where}{heads}"


@dataclass(frozen=True)
class RowScores:
    """One prompt, row by row: what any subset of its edges would do can be asked without another run.

    lse, mean  [layer, head, pos, key], see `lab.edges.formulas.RowStats`; keys of no segment stand last, without a name
    segments   name -> positions; clean: the metric of the clean run
    """

    lse: Tensor
    mean: Tensor
    segments: dict[str, Tensor]
    clean: float

    def effect(
        self, layer: int, queries: Sequence[str], keys: Sequence[str], heads: Sequence[int] | None = None
    ) -> float:
        """Predicted change if the edges from all `keys` to all `queries` are cut in a layer (1-based) and some heads.

        Raises UsageError for layers, heads and segments that are not there.
        """
        names, n_layers, n_heads = list(self.segments), *self.lse.shape[:2]
        unknown = [n for n in (*queries, *keys) if n not in names]
        if unknown or not queries or not keys:
            raise UsageError(f"segments {unknown or 'none'}: name some of {', '.join(names)}")
        some = list(range(n_heads)) if heads is None else list(heads)
        if not 1 <= layer <= n_layers or not all(0 <= h < n_heads for h in some):
            raise UsageError(
                f"layer {layer}, heads {some}: there are layers 1-{n_layers}, heads 0-{n_heads - 1}"
            )
        removed = torch.tensor([n in keys for n in names] + [False])
        rows = torch.cat([self.segments[q] for q in dict.fromkeys(queries)])
        lse, mean = (x[layer - 1][some][:, rows] for x in (self.lse, self.mean))
        return float(subset(RowStats(lse, mean), removed).sum())


def row_scores(
    model: Any, item: Any, *, segmentation: Grid = "strict", metric: Metric = "margin", policy: Policy | None = None,
    n_frames: int = 8,
) -> RowScores:  # fmt: skip
    """The scores of one prompt before they are summed. Takes 2 x layers x heads x positions x segments numbers.

    Raises UsageError for more than one prompt.
    """
    what = Scoring(segmentation, metric, policy=base_of(model, policy))
    groups = worlds_of(model, item, segmentation, n_frames)
    if len(groups) != 1 or len(groups[0]) != 1:
        raise UsageError(
            f"row scores are of one prompt, got {sum(map(len, groups))}; ask for them one by one"
        )
    shape = (model.cfg.n_layers, model.cfg.n_heads)

    def tally(world: World) -> RowTally:
        return RowTally(list(world.segments.values()), shape, len(world.tokens))

    (found,) = scored(model, groups, what.passes(), tally, batch=1, cancel=None, show=False)
    sums = found.tallies[0].sums
    return RowScores(sums["lse"], sums["mean"], found.world.segments, found.clean)
