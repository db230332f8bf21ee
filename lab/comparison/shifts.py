"""Variants minus vanilla, question by question, and numbers with their intervals as text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lab.result import Result


def shift(result: Result) -> Result:
    """Every variant minus vanilla on the same question: axes as `result`, which has "item" and "variant"; vanilla is 0."""
    base = result.select(variant=result.notes["vanilla"])
    at = result.axes.index("variant")
    values = result.values - np.expand_dims(base.values, at)
    return replace(
        result, values=values, unit=f"{result.unit}, minus vanilla's", low=None, high=None, baseline=0.0
    )


def moved(result: Result, place: Any) -> bool:
    """Whether the interval of one mean leaves its baseline out."""
    if result.low is None or result.high is None:
        return False
    base = result.baseline or 0.0
    return bool(result.low[place] > base or result.high[place] < base)


def written(result: Result, place: Any, form: str) -> str:
    """One number of a Result with its interval, e.g. written(r, (0, 2), "+.1f") is "-1.2 [-2.0, -0.3]"; "-" for nan."""
    value = float(result.values[place])
    if not np.isfinite(value):
        return "-"
    ends = "" if result.low is None or result.high is None else _ends(result, place, form)
    return f"{number(value, form)}{ends}"


def _ends(result: Result, place: Any, form: str) -> str:
    assert result.low is not None and result.high is not None
    return f" [{number(float(result.low[place]), form)}, {number(float(result.high[place]), form)}]"


def number(value: float, form: str) -> str:
    """A number as text; what rounds to 0 without a minus."""
    text = f"{value:{form}}"
    return f"{0.0:{form}}" if float(text) == 0 else text
