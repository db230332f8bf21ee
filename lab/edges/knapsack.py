"""Search unit by unit: the finest units of all layers together, least loss for their weight first.

Each round 1 measures what cutting each unit alone would do now, exactly, on the few samples whose answers are least sure;
with too few samples to pay for that it takes scores instead (`lab.edges.scores`), made anew under what is cut   2 cuts
units in that order, many at once: as long as far too many are tried, fewer   3 where a run of them is too much, finds
the unit to blame on the samples that suffered most, keeps it for this round and tries the run without it.
A trial that fails does so on its first samples and costs little; one that holds costs a forward a sample, so there
should be few of them, and large. Rounds share what is left of the budget, so that the first one, which knows least,
cannot spend it all. What is measured here orders the trials; every cut is tried exactly on all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lab.edges.units import Unit
from lab.runs import progress

ROUNDS = 3
AFFORDED = 0.3  # share of the forwards left that measuring single units may take, were each a whole forward
LEAST = 1e-6  # nats of KL below which units are alike: rounding
SCORING = 4.0  # forwards a sample that scores take: one forward, one backward with sums on the way
COARSE = 8  # a run longer than this part of what there is to cut is halved when it fails; a shorter one loses its culprit
CULPRITS, LAST = 24, 240  # a round ends after so many; and the last round
LOOKED_AT = 4  # samples that blame is found on


def fill(search: Any, *, show: bool) -> None:
    """Carry the rounds out on a `lab.edges.searcher.Searcher`, until its forwards are spent."""
    for done in progress(range(ROUNDS), desc="search", show=show, cancel=search.cancel):
        last = done == ROUNDS - 1
        order = _ordered(search, _leaves(search, small=last))
        _fill(search, order, share=1 / (ROUNDS - done), spare=LAST if last else CULPRITS)


def _leaves(search: Any, *, small: bool) -> list[Unit]:
    """What is not cut yet, parted at every grain asked for where that is worth it; small: those too that save little."""
    least = search.asked.worth * search.total
    units = [u for u in search.units if search.open(u) and (small or search.weight(u) >= least)]
    for grain in search.asked.finer:
        units = [p for u in units for p in (search.split(u, grain) if search.weight(u) >= least else [u])]
    return [u for u in units if search.open(u)]


def _ordered(search: Any, leaves: list[Unit]) -> list[Unit]:
    """Least loss for its weight first: by exact KL where that is cheap enough, else by scores made anew."""
    samples = search.unsure(max(LOOKED_AT, len(search.trials) // 40))
    if len(leaves) * len(samples) <= AFFORDED * search.left():
        kl = search.alone(leaves, samples)
        return sorted(leaves, key=lambda u: (max(kl[u], LEAST) / max(search.weight(u), 1e-9), u))
    if (search.cut or search.guess is None) and search.left() > 2 * SCORING * len(search.trials):
        search.relinearise()
    return search.ordered(leaves)


def _fill(search: Any, order: Sequence[Unit], *, share: float, spare: int) -> None:
    """One round. share: of what is left of the budget; spare: culprits until it ends."""
    left, size, fine = list(order), len(order), max(1, len(order) // COARSE)
    while left and spare > 0:
        run = left[:size]
        if search.attempt(f"{len(run)} units of least loss", [(u,) for u in run], share=share):
            search.bury()
            left, size = [u for u in left[size:] if search.open(u)], 2 * size
        elif len(run) > fine:
            size = max(fine, len(run) // 2)
        else:
            kept = culprit(search, run)
            search.reject(kept, search.steps[-1].effect.mean_kl)
            left.remove(kept)
            size, spare = max(1, 3 * len(run) // 4), spare - 1


def culprit(search: Any, run: Sequence[Unit]) -> Unit:
    """The unit of a run just refused with which, in its order, half of what the run did is done."""
    bad, before = search.steps[-1].effect.kl, search.effect.kl
    harm = np.nan_to_num(bad - before)
    samples = np.argsort(-harm, kind="stable")[: min(LOOKED_AT, int(np.isfinite(bad).sum()))].tolist()
    low, high = 0, len(run)  # units in: with `low` less than half is done, with `high` at least half
    while high - low > 1:
        middle = (low + high) // 2
        done = search.look(run[:middle], samples).kl - before
        enough = done[samples].sum() >= harm[samples].sum() / 2
        low, high = (low, middle) if enough else (middle, high)
    return run[high - 1]
