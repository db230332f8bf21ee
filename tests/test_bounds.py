"""Bounds against tables, and against how often they hold."""

from __future__ import annotations

import numpy as np
import pytest

from lab.edges.bounds import items_needed, mean_bound, most_hits, paired_bound, share_bound
from lab.errors import UsageError


@pytest.mark.parametrize(
    ("hits", "n", "bound"),
    [(0, 10, 0.2589), (1, 10, 0.3942), (0, 59, 0.04951), (5, 100, 0.10225), (10, 10, 1.0)],
)
def test_share_bound_is_clopper_pearson(hits, n, bound):
    assert share_bound(hits, n) == pytest.approx(bound, abs=2e-4)


def test_most_hits_is_the_last_that_fits():
    for n in (20, 99, 100, 256):
        k = most_hits(0.03, n)
        assert (k < 0 or share_bound(k, n) <= 0.03) and share_bound(k + 1, n) > 0.03
    assert items_needed(0.03) == 99 and most_hits(0.03, 98) == -1 and most_hits(0.03, 99) == 0


@pytest.mark.parametrize(("n", "t"), [(5, 2.1318), (11, 1.8125), (31, 1.6973), (201, 1.6525)])
def test_mean_bound_is_students(n, t):
    x = np.arange(n, dtype=float)
    assert (mean_bound(x) - x.mean()) / (x.std(ddof=1) / n**0.5) == pytest.approx(t, rel=4e-3)


def test_paired_bound_draws_whole_groups():
    rng = np.random.default_rng(0)
    videos = np.repeat(np.arange(40), 10)
    difference = rng.integers(0, 2, 40)[videos].astype(float)  # all questions of a video fall together
    by_video = paired_bound(difference, videos.tolist())
    by_item = paired_bound(difference, list(range(400)))
    assert by_video[2] - difference.mean() > 2.5 * (by_item[2] - difference.mean())
    assert by_video[0] < difference.mean() < by_video[2] < by_video[1]


def test_bounds_hold_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = [share_bound(int(rng.binomial(50, 0.1)), 50) >= 0.1 for _ in range(400)]
    assert np.mean(held) > 0.93
    drops = [
        paired_bound((rng.random(120) < 0.2).astype(float), list(range(120)), n_boot=300)[2]
        for _ in range(150)
    ]
    assert 0.88 < np.mean(np.array(drops) >= 0.2) < 0.99


def test_no_difference_is_no_certainty():
    low, high, bound = paired_bound(np.zeros(30), list(range(30)))
    assert bound == pytest.approx(share_bound(0, 30)) and (low, high) == (-bound, bound)


@pytest.mark.parametrize(
    "bad", [lambda: share_bound(3, 2), lambda: mean_bound([]), lambda: paired_bound(np.zeros(2), [1])]
)
def test_nonsense_is_refused(bad):
    with pytest.raises(UsageError):
        bad()
