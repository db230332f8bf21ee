"""How well predicted numbers agree with measured ones. Numpy only; None where a number is not defined."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def ranks(x: Numbers) -> Numbers:
    """Ranks from 0; equal numbers share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum() - 1
    return (last - (counts - 1) / 2)[inverse].astype(float)


def pearson(a: Numbers, b: Numbers) -> float | None:
    """Correlation; None for fewer than 3 pairs, or where one side does not vary."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def spearman(a: Numbers, b: Numbers) -> float | None:
    """Correlation of ranks."""
    return pearson(ranks(a), ranks(b))


def slope(predicted: Numbers, exact: Numbers) -> float | None:
    """Least-squares factor that turns predictions into measured values (a line through 0); 1 is calibrated."""
    size = float((predicted**2).sum())
    return float((predicted * exact).sum() / size) if size > 0 else None


def same_sign(predicted: Numbers, exact: Numbers, tau: float) -> float | None:
    """Share of the measured effects larger than tau whose sign was predicted."""
    large = np.abs(exact) > tau
    return float((np.sign(predicted[large]) == np.sign(exact[large])).mean()) if large.any() else None


def recall(predicted: Numbers, exact: Numbers, k: int) -> float | None:
    """Share of the k largest measured sizes that are among the 2k largest predicted ones."""
    if not 0 < k <= len(exact):
        return None
    best = np.argsort(-np.abs(exact), kind="stable")[:k]
    shown = np.argsort(-np.abs(predicted), kind="stable")[: 2 * k]
    return float(np.isin(best, shown).mean())


def agreement(predicted: Numbers, exact: Numbers, tau: float) -> dict[str, Any]:
    """All of these for pairs of numbers, as plain data; pairs with nan are left out."""
    known = np.isfinite(predicted) & np.isfinite(exact)
    p, e = predicted[known], exact[known]
    return {
        "n": len(p), "spearman": spearman(p, e), "pearson": pearson(p, e), "same_sign": same_sign(p, e, tau),
        "slope": slope(p, e), "mean_size": float(np.abs(e).mean()) if len(e) else None,
    }  # fmt: skip
