"""What cutting edges does to a metric, to first order in a row's output and exactly in its softmax (notes C6, C7).

A row reads disjoint parts of its keys. For part B: lse_B = log sum of e^score, and mean_B = <g, o_B>, where o_B is what
attention over B alone would give and g the gradient of the metric at the row's output. Then, with weights over parts

    mass  m_B = e^(lse_B - lse),   contribution  c_B = m_B mean_B,   C = sum of c_B = <g, o>

1 knock-out of B with renormalisation: <g, o without B> - C = (m_B C - c_B) / (1 - m_B)
2 gate on B's scores (a multiplies e^score): dM/da at 1 = c_B - m_B C, the gradient of a bias added to B's scores
3 gate on what is read (no renormalisation): c_B
4 any set R of parts: m_R and c_R are sums, and 1 holds for R

All are computed as m_B (mean of the rest - mean_B), which loses no digits where m_B is near 0 or near 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NEG = float("-inf")


@dataclass(frozen=True)
class RowStats:
    """Rows of one layer. A part a row has no key of has lse -inf and mean 0.

    lse   log-sum-exp of the scores of every part; mean: <g, attention over the part alone>, in units of the metric
    """

    lse: Float[Tensor, "*rows part"]
    mean: Float[Tensor, "*rows part"]

    @property
    def mass(self) -> Float[Tensor, "*rows part"]:
        """Attention mass of every part; a row without any key has none."""
        return shares(self.lse)

    @property
    def contribution(self) -> Float[Tensor, "*rows part"]:
        """c of every part."""
        return self.mass * self.mean

    @property
    def total(self) -> Float[Tensor, "*rows 1"]:
        """C = <g, o>."""
        return self.contribution.sum(-1, keepdim=True)


def shares(lse: Tensor) -> Tensor:
    """Softmax over the last axis; zeros where all of it is -inf."""
    dead = (lse == NEG).all(-1, keepdim=True)
    return lse.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)


def knockout(rows: RowStats) -> Float[Tensor, "*rows part"]:
    """Change of the metric when one part is cut and the rest renormalised. A row left without keys outputs zero."""
    return rows.mass * (_without_each(rows) - rows.mean)


def gate(rows: RowStats) -> Float[Tensor, "*rows part"]:
    """Change that the gradient of an additive gate predicts for cutting a part: too small by the factor 1 - m."""
    return rows.mass * (rows.total - rows.mean)


def read(rows: RowStats) -> Float[Tensor, "*rows part"]:
    """Change when what is read of a part becomes zero and nothing is renormalised."""
    return -rows.contribution


def subset(rows: RowStats, removed: Bool[Tensor, " part"]) -> Float[Tensor, "*rows"]:
    """Change of the metric when several parts are cut together. Exact in the row's output, as `knockout`."""
    gone, left = (_merged(rows, chosen) for chosen in (removed, ~removed))
    lse = torch.stack([gone[0], left[0]], -1)
    return shares(lse)[..., 0] * (left[1] - gone[1])


FORMS: dict[str, Callable[[RowStats], Tensor]] = {"knockout": knockout, "gate": gate, "read": read}


def _merged(rows: RowStats, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """lse and mean of the chosen parts taken together."""
    lse, mean = rows.lse[..., chosen], rows.mean[..., chosen]
    if not lse.shape[-1]:
        return torch.full_like(rows.lse[..., 0], NEG), torch.zeros_like(rows.mean[..., 0])
    return lse.logsumexp(-1), (shares(lse) * mean).sum(-1)


def _without_each(rows: RowStats) -> Tensor:
    """<g, o> over all parts but one, for every part; 0 where nothing is left."""
    top, at = rows.lse.max(-1, keepdim=True)
    weight = (rows.lse - top.masked_fill(top == NEG, 0.0)).exp()
    worth = weight * rows.mean
    left = weight.sum(-1, keepdim=True) - weight
    # where the heaviest part stays, what is left is at least 1: no digits are lost
    others = (worth.sum(-1, keepdim=True) - worth) / left.clamp_min(1.0)
    without_top = (shares(rows.lse.scatter(-1, at, NEG)) * rows.mean).sum(-1, keepdim=True)
    return others.scatter(-1, at, without_top)
