"""Bounds: how bad it may really be, given what a sample shows. One-sided unless said otherwise. Torch-free.

share_bound   Clopper-Pearson: the largest share under which so few hits in n are still at least alpha likely
mean_bound    Student's t for the mean of a sample
paired_bound  bootstrap of a paired difference, whole groups (videos) drawn together
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import exp, lgamma, log, log1p, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.errors import UsageError

CONFIDENCE = 0.95


@lru_cache(maxsize=4096)
def share_bound(hits: int, n: int, confidence: float = CONFIDENCE) -> float:
    """Upper bound of a share of which `hits` in `n` were seen. Raises UsageError for n < 1 or hits outside 0..n."""
    if n < 1 or not 0 <= hits <= n:
        raise UsageError(f"{hits} hits of {n}: need n >= 1 and hits from 0 to n")
    if hits == n:
        return 1.0
    low, high = hits / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(hits, n, middle) > 1 - confidence else (low, middle)
    return high


def _at_most(hits: int, n: int, share: float) -> float:
    """Probability of at most so many hits."""
    if share <= 0.0:
        return 1.0
    if share >= 1.0:
        return float(hits == n)
    up, down = log(share), log1p(-share)
    return sum(
        exp(lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) + i * up + (n - i) * down)
        for i in range(hits + 1)
    )


@lru_cache(maxsize=256)
def most_hits(share: float, n: int, confidence: float = CONFIDENCE) -> int:
    """The most hits in `n` whose bound is still at most `share`; -1 if even none is too uncertain."""
    hits = -1
    while hits < n and share_bound(hits + 1, n, confidence) <= share:
        hits += 1
    return hits


def items_needed(share: float, confidence: float = CONFIDENCE) -> int:
    """How many items without a hit bring the bound down to `share`."""
    return int(np.ceil(log(1 - confidence) / log1p(-share))) if 0 < share < 1 else 1


def mean_bound(values: Sequence[float] | NDArray[Any], confidence: float = CONFIDENCE) -> float:
    """Upper bound of a mean; of a single value that value itself, which bounds nothing."""
    x = np.asarray(values, dtype=float)
    if not x.size:
        raise UsageError("no values to bound the mean of")
    if x.size == 1:
        return float(x[0])
    return float(x.mean() + _student(confidence, x.size - 1) * x.std(ddof=1) / sqrt(x.size))


def _student(confidence: float, freedom: int) -> float:
    """Quantile of Student's t by the expansion round the normal one; within 3 % from 3 degrees of freedom on."""
    z = NormalDist().inv_cdf(confidence)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def paired_bound(
    difference: NDArray[Any],
    groups: Sequence[Any],
    *,
    confidence: float = CONFIDENCE,
    n_boot: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """(low, high, upper) of the mean of `difference` [item]: a two-sided interval of 95 %, and the one-sided bound.

    groups  what each item belongs to; groups are drawn whole, with replacement
    Where no item differs the bootstrap says 0 whatever n is; then high and upper are those of no hit in so many groups.
    """
    x = np.asarray(difference, dtype=float)
    if not x.size or x.size != len(groups):
        raise UsageError(f"{x.size} differences for {len(groups)} groups; give one each, at least one")
    _, at = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    n = int(at.max()) + 1
    if not x.any():
        bound = share_bound(0, n, confidence)
        return -bound, bound, bound
    sums, sizes = np.bincount(at, x, n), np.bincount(at, minlength=n)
    rng = np.random.default_rng(seed)
    means = np.empty(n_boot)
    for i in range(n_boot):
        drawn = rng.integers(0, n, n)
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high), float(np.quantile(means, confidence))
