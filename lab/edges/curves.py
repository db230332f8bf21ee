"""Curves of accuracy against edges kept, and the areas under them (CPR and CMD of the MIB circuit track). Torch-free.

At x percent kept, a family of policies is worth the best of its members that keep at most x: a step curve, defined at
every x for every family, so that families can be compared. f = (M(P) - M(none)) / (M(full) - M(none)), M the accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.result import Result

DRAWN = (0.5, *range(1, 101))  # percent
SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def envelope(kept: Sequence[float], accuracy: Sequence[float], at: Sequence[float]) -> list[float]:
    """The best accuracy among the points that keep at most each share; nan where no point is that small."""
    points = [(k, a) for k, a in zip(kept, accuracy, strict=True) if np.isfinite(a)]
    best = [[a for k, a in points if k <= x + 1e-9] for x in at]
    return [max(b) if b else float("nan") for b in best]


def areas(families: Sequence[str], kept: NDArray[Any], accuracy: NDArray[Any]) -> dict[str, Any]:
    """The step curve of every family at `SHARES`, and its two areas; for the notes of an evaluation.

    cpr  mean of f over all shares kept, 1 for a curve that never falls; cmd: mean of |1 - f|, 0 for such a one
    """
    full = float(accuracy[list(families).index("full")])
    none = float(min(a for f, a in zip(families, accuracy, strict=True) if f in ("exit", "full")))
    curves: dict[str, Any] = {}
    for family in dict.fromkeys(f for f in families if f != "full"):
        at = [i for i, f in enumerate(families) if f == family]
        points = [[float(kept[i]), float(accuracy[i])] for i in at]
        fine = np.array(_steps(points, full, none, np.linspace(0, 1, 401).tolist()))
        height = (fine - none) / (full - none) if full != none else None
        curves[family] = {
            "accuracy": _steps(points, full, none, SHARES), "points": points,
            "cpr": None if height is None else float(height.mean()),
            "cmd": None if height is None else float(np.abs(1 - height).mean()),
        }  # fmt: skip
    return {"curves": curves, "shares": list(SHARES), "full": full, "none": none}


def _steps(points: Sequence[Sequence[float]], full: float, none: float, at: Sequence[float]) -> list[float]:
    """The envelope of a family, whose ends are the model without video and the full model."""
    return envelope([*(p[0] for p in points), 0.0, 1.0], [*(p[1] for p in points), none, full], at)


def curve_of(evaluation: Result) -> Result:
    """The step curves of an evaluation: axes (policy, kept), for drawing."""
    curves, full, none = (evaluation.notes[name] for name in ("curves", "full", "none"))
    shares = list(DRAWN)
    rows = [_steps(c["points"], full, none, [x / 100 for x in shares]) for c in curves.values()]
    return Result(
        values=np.array(rows).reshape(len(curves), len(shares)),
        axes=("policy", "kept"), coords={"policy": list(curves), "kept": shares}, unit="accuracy",
        recipe=evaluation.recipe, name="accuracy against edges kept", baseline=float(evaluation.notes["full"]),
        notes={"n_items": evaluation.notes["n"]["item"], "best": "at most so many edges kept"},
    )  # fmt: skip
