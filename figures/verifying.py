"""Whether figures are what their recipes give: bytes of every file, drawings from the data, and the numbers once more.

exact      the data files of a second run have the same bytes (on another machine or with other versions: the same
           numbers within `FOREIGN` of the largest)
tolerance  every number lies within the recipe's bound
measured   the figure's own `check` holds for the saved numbers and for new ones: counts, units, order or ratio
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from figures import manifest
from figures.shelf import Entry
from lab.errors import ConfigError, LabError
from lab.recipe import from_plain
from lab.result import Result
from lab.view.matplotlib_out import SUFFIXES
from lab.view.plate_out import plate_bytes

FOREIGN = 1e-3  # of the largest number: float32 sums in another order, through a whole model


def saved(entry: Entry, folder: Path) -> list[str]:
    """What is wrong with a folder as it is: files changed, a recipe that is not the manifest's, drawings that differ."""
    try:
        told = manifest.read(folder / manifest.MANIFEST)
        wrong = [
            f"{n} is missing or its bytes have changed" for n in manifest.changed(folder, told["outputs"])
        ]
        if from_plain(told["recipe"]).id != told["recipe_id"]:
            wrong.append(f"the manifest's recipe has not the id {told['recipe_id']} that it states")
        if wrong:
            return wrong
        results = manifest.load_data(folder)
        wrong += _checked(entry, results)
        return wrong + _redrawn(entry, folder, results, told["recipe_id"])
    except LabError as e:
        return [str(e)]


def _checked(entry: Entry, results: Sequence[Result]) -> list[str]:
    check = getattr(entry.module, "check", None)
    return [] if check is None else list(check(results))


def _redrawn(entry: Entry, folder: Path, results: Sequence[Result], recipe_id: str) -> list[str]:
    plate = entry.module.draw(results)
    made = {s: plate_bytes(plate, s, about=f"recipe {recipe_id}") for s in SUFFIXES}
    return [
        f"figure{s} drawn again from its data has other bytes"
        for s, b in made.items()
        if (folder / f"figure{s}").read_bytes() != b
    ]


def repeated(entry: Entry, folder: Path, fresh: Path) -> list[str]:
    """What is wrong with the saved numbers beside those of a second run in the folder `fresh`."""
    try:
        told, new = manifest.read(folder / manifest.COMPUTED), manifest.read(fresh / manifest.COMPUTED)
        old, again = manifest.load_data(folder), manifest.load_data(fresh)
    except LabError as e:
        return [str(e)]
    if told["determinism"] == "measured":
        return _alike(old, again, numbers=False) + [f"second run: {w}" for w in _checked(entry, again)]
    wrong = _alike(old, again, numbers=True)
    if wrong:
        return wrong
    here = all(told[k] == new[k] for k in ("versions", "python", "device_name", "threads"))
    return [
        w for i, (a, b) in enumerate(zip(old, again, strict=True), 1) if (w := _apart(i, a, b, told, here))
    ]


def _alike(old: Sequence[Result], new: Sequence[Result], *, numbers: bool) -> list[str]:
    """Axes, units and counts; with `numbers`, coordinates too (measured ones may stand in them)."""
    if len(old) != len(new):
        return [f"{len(old)} Results are saved, a second run gives {len(new)}"]
    wrong: list[str] = []
    for i, (a, b) in enumerate(zip(old, new, strict=True), 1):
        if (a.axes, a.shape, a.unit) != (b.axes, b.shape, b.unit) or (numbers and a.coords != b.coords):
            wrong.append(f"data_{i}: {a!r} is saved, a second run gives {b!r}")
    return wrong


def _apart(i: int, old: Result, new: Result, told: dict[str, Any], here: bool) -> str:
    if told["determinism"] == "exact" and here:
        return (
            ""
            if _bytes(old) == _bytes(new)
            else f"data_{i}: a second run gives other bytes ({_difference(old, new)})"
        )
    scale = float(np.nanmax(np.abs(np.where(np.isfinite(old.values), old.values, 0.0)), initial=0.0))
    bound = told["tolerance"] if told["determinism"] == "tolerance" else FOREIGN * max(1.0, scale)
    if not np.array_equal(np.isfinite(old.values), np.isfinite(new.values)):
        return f"data_{i}: a second run has other missing values"
    known = np.isfinite(old.values)
    apart = float(np.abs(old.values[known].astype(float) - new.values[known].astype(float)).max(initial=0.0))
    return "" if apart <= bound else f"data_{i}: a second run differs by {apart:.3g}, more than {bound:.3g}"


def _bytes(result: Result) -> bytes:
    """All numbers with their names; recipes of another folder and the costs in notes are compared with the rest of them."""
    out = io.BytesIO()
    for a in (result.values, result.low, result.high):
        out.write(b"none" if a is None else a.tobytes())
    return out.getvalue() + result.to_json().encode()


def _difference(old: Result, new: Result) -> str:
    if old.shape != new.shape:
        return f"shapes {old.shape} and {new.shape}"
    known = np.isfinite(old.values) & np.isfinite(new.values)
    apart = np.abs(old.values[known].astype(float) - new.values[known].astype(float)).max(initial=0.0)
    return (
        f"largest difference {float(apart):.3g}" if apart else "the numbers are equal, notes or names are not"
    )


def whole(folder: Path) -> bool:
    """Whether a folder has a manifest at all."""
    try:
        manifest.read(folder / manifest.MANIFEST)
    except ConfigError:
        return False
    return True
