"""`vlab run`: carry out a recipe, and say how far the numbers are from those that lie beside it."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lab.cli.output import Reply
from lab.errors import ConfigError
from lab.recipe import Recipe, load
from lab.result import Result

# Numbers on other hardware, or with another torch, differ in the last digits: this much in a Result's own unit is no difference.
TOLERANCE = 1e-3


def rerun(path: str, out: str | None) -> Reply:
    """Runs the recipe at `path`; compares with result.npz in its folder, if there; saves to `out`, if given.

    The exit code is 1 if the numbers differ by more than `TOLERANCE`.
    """
    recipe = load(path)
    before = _saved(Path(path).resolve().parent)
    results = resumable(recipe, None if out is None else Path(out))
    write = getattr(recipe, "write", write_results)
    files = [] if out is None else write(results, Path(out))
    apart = None if before is None else difference(results[0], before)
    data = {
        "recipe": recipe.id, "kind": recipe.kind, "max_difference": apart, "files": [str(f) for f in files],
        "results": [json.loads(r.to_json()) for r in results],
    }  # fmt: skip
    lines = [
        f"recipe {recipe.id} ({recipe.kind})",
        *map(repr, results),
        *_reading(results),
        _verdict(apart),
        *map(str, files),
    ]
    return Reply(
        data, "\n".join(line for line in lines if line), int(apart is not None and apart > TOLERANCE)
    )


def resumable(recipe: Recipe, out: Path | None, **more: Any) -> list[Result]:
    """The recipe's results. With a folder, what is finished is kept there until all is: the same command goes on."""
    from lab.cli.asking import quiet_bars

    quiet_bars()
    if out is None or "out" not in inspect.signature(recipe.run).parameters:
        return recipe.run(progress=True, **more)
    journal = out / f"journal-{recipe.id}"
    results = recipe.run(progress=True, **{**more, "out": journal})
    shutil.rmtree(journal, ignore_errors=True)  # the next run measures anew
    return results


def difference(new: Result, old: Result) -> float:
    """Largest absolute difference of two Results, in their unit. Raises ConfigError if they are not about the same things."""
    if new.axes != old.axes or new.coords != old.coords or new.unit != old.unit:
        raise ConfigError(
            f"result.npz beside the recipe holds {old!r}, the recipe gives {new!r}; it was made by another recipe"
        )
    if not np.array_equal(np.isfinite(new.values), np.isfinite(old.values)):
        return float("inf")
    known = np.isfinite(new.values)
    return float(np.abs(new.values[known].astype(float) - old.values[known].astype(float)).max(initial=0.0))


def write_results(results: Sequence[Result], out: Path) -> list[Path]:
    """result.npz (result_2.npz ... for further ones), report.html and flow.png in folder `out`."""
    from lab.view.draw import report, save
    from lab.view.panels import panels

    names = ["result.npz", *(f"result_{i}.npz" for i in range(2, len(results) + 1))]
    written = [r.save(out / n) for r, n in zip(results, names, strict=False)]
    return [
        *written,
        save(panels(results[0])[0], out / "flow.png"),
        report([p for r in results for p in panels(r)], out / "report.html", title=results[0].name),
    ]


def _saved(folder: Path) -> Result | None:
    path = folder / "result.npz"
    return Result.load(path) if path.exists() else None


def _verdict(apart: float | None) -> str:
    if apart is None:
        return ""
    if apart == 0:
        return "the same numbers as result.npz beside it (max difference 0)"
    same = "the same numbers as" if apart <= TOLERANCE else "NOT the numbers of"
    return f"{same} result.npz beside it (max difference {apart:.3g})"


def _reading(results: Sequence[Result]) -> list[str]:
    from lab.view.specs import figure_spec

    said: list[Any] = [figure_spec(r).reading for r in results]
    return [str(s) for s in said if s]
