"""Checks of what somebody set: numbers, names, texts. Each raises UsageError that says what was given and what may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, get_args

from lab.errors import UsageError


def check_whole(name: str, value: Any, low: int | None = None) -> None:
    """A whole number, from `low` on. A bool is none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or (low is not None and value < low):
        start = "" if low is None else f" from {low}"
        raise UsageError(f"{name} must be a whole number{start}, got {value!r}")


def check_number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """A number from `low` to `high`; nan is none, and a bool neither."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        end = "" if high == float("inf") else f" to {high:g}"
        raise UsageError(f"{name} must be a number from {low:g}{end}, got {value!r}")


def check_names(owner: Any, allowed: Mapping[str, Any], *, also: Iterable[Any] = ()) -> None:
    """Fields of `owner` against the Literal that each may hold, or one of `also`."""
    for name, kind in allowed.items():
        value = getattr(owner, name)
        if value not in get_args(kind) and not any(value is a for a in also):
            raise UsageError(f"{name}={value!r}; use one of {', '.join(str(a) for a in get_args(kind))}")


def check_texts(owner: Any, names: Iterable[str]) -> None:
    """Fields of `owner` that must be texts."""
    for name in names:
        if not isinstance(getattr(owner, name), str):
            raise UsageError(f"{name} must be a text, got {getattr(owner, name)!r}")
