"""Folds: which items belong together when some train and others test. Twins and questions about one video never part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lab.carriers import Frames, VideoQA
from lab.errors import UsageError
from lab.recipe import sha256_of


def groups_of_items(items: Sequence[VideoQA | None]) -> list[int]:
    """A group number for every item: the same for items with the same video (by content), and for items and twins.

    Items that were not prepared by `prepare` show no video here; each is a group of its own.
    """
    prints = [(_fingerprint(i.video), None if i.twin is None else _fingerprint(i.twin.video)) if i else (f"none:{n}", None) for n, i in enumerate(items)]  # fmt: skip
    of: dict[str, int] = {}
    parent: list[int] = []

    def find(n: int) -> int:
        while parent[n] != n:
            n = parent[n]
        return n

    for pair in prints:
        known = [of[p] for p in pair if p is not None and p in of]
        if not known:
            parent.append(len(parent))
            known = [len(parent) - 1]
        root = find(known[0])
        for other in known:
            parent[find(other)] = root
        for p in pair:
            if p is not None:
                of.setdefault(p, root)
    return [find(of[first]) for first, _ in prints]


def _fingerprint(video: Any) -> str:
    """Of a video's content."""
    if isinstance(video, str):
        return sha256_of(video)
    pixels = video.pixels if isinstance(video, Frames) else video
    data = np.ascontiguousarray(np.asarray(pixels))
    return hashlib.sha256(str(data.shape).encode() + data.tobytes()).hexdigest()


def folds_of(groups: Sequence[int], n_folds: int, seed: int) -> list[int]:
    """A fold for every sample, 0..n_folds-1; whole groups together, folds of about equal numbers of groups.

    Raises UsageError if there are fewer groups than folds.
    """
    names = sorted(set(groups))
    if n_folds < 2 or len(names) < n_folds:
        raise UsageError(
            f"{n_folds} folds need as many videos (twins count as one); there are {len(names)}. Give more items or fewer "
            "folds, at least 2"
        )
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    fold = {names[j]: i % n_folds for i, j in enumerate(order)}
    return [fold[g] for g in groups]
