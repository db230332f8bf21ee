"""`vlab run`: carry out a recipe, and say how far the numbers are from those that lie beside it."""

from __future__ import annotations

import inspect
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.cli.keeping import keep, kept
from lab.cli.output import Reply, folder_for
from lab.errors import ConfigError
from lab.overriding import setting
from lab.recipe import Recipe, dump, load
from lab.result import Result

# Numbers on other hardware, or with another torch, differ in the last digits: this much in a Result's own unit is no difference.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Changes:
    """What `vlab run` is told to do otherwise than the recipe says: `--set` first, then the short ways."""

    settings: Sequence[str] = ()
    model: str | None = None
    items: str | None = None
    device: str | None = None

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with them. Raises ConfigError and UsageError, naming the key."""
        from lab.cli.sources import source_of

        told = dict(setting(s) for s in self.settings)
        if self.items is not None:
            told["items"] = source_of(self.items)
        told |= {k: v for k, v in (("model", self.model), ("model.device", self.device)) if v is not None}
        return recipe.override(told) if told else recipe


@dataclass(frozen=True)
class Asked:
    """The options of one `vlab run`."""

    recipe: str
    changes: Changes = Changes()
    out: str | None = None
    fresh: bool = False
    dry: bool = False


def rerun(asked: Asked) -> Reply:
    """Runs a recipe; saves to `out`, or, where no results lie beside the recipe, to out/ID; compares with those beside it.

    Results that lie in the folder already are used again if nothing has changed since (`lab.cli.keeping`).
    The exit code is 1 if the numbers differ from those beside the recipe by more than `TOLERANCE`.
    """
    recipe = asked.changes.applied(load(asked.recipe))
    before = _beside(recipe, Path(asked.recipe).resolve().parent, asked.changes)
    folder = _folder(asked, recipe, before)
    if asked.dry:
        return _planned(recipe, folder)
    results, files, how = _results(recipe, folder, asked.fresh)
    apart = None if before is None else difference(results[0], before)
    data = {
        "recipe": recipe.id, "kind": recipe.kind, "max_difference": apart, "files": [str(f) for f in files],
        "reused": how.startswith("used again"), "results": [json.loads(r.to_json()) for r in results],
    }  # fmt: skip
    lines = [f"recipe {recipe.id} ({recipe.kind})", how, *map(repr, results), *_reading(results), _verdict(apart), *map(str, files)]  # fmt: skip
    return Reply(
        data, "\n".join(line for line in lines if line), int(apart is not None and apart > TOLERANCE)
    )


def _beside(recipe: Recipe, folder: Path, changes: Changes) -> Result | None:
    """The Result beside the recipe; of a recipe that was changed, only if it is that recipe's."""
    if changes == Changes():
        return _saved(folder)
    found = _saved(folder)
    return found if found is not None and found.recipe == recipe.plain() else None


def _folder(asked: Asked, recipe: Recipe, before: Result | None) -> Path | None:
    if asked.out is not None:
        return folder_for(asked.out) if not asked.dry else Path(asked.out)
    return None if before is not None else Path("out") / recipe.id


def _planned(recipe: Recipe, folder: Path | None) -> Reply:
    """What would be run, and what is there already; nothing is."""
    found = None if folder is None else kept(recipe, folder)
    state = "nothing there yet" if found is None else f"computed anew: {found.changed}" if found.changed else "used again"  # fmt: skip
    where = "nothing is written" if folder is None else f"{folder}: {state}"
    data = {
        "recipe": recipe.id, "kind": recipe.kind, "out": None if folder is None else str(folder),
        "reused": found is not None and not found.changed, "fields": recipe.plain(),
    }  # fmt: skip
    return Reply(data, f"# recipe {recipe.id}; not run\n# results: {where}\n{dump(recipe)}".rstrip())


def _results(recipe: Recipe, folder: Path | None, fresh: bool) -> tuple[list[Result], list[Path], str]:
    """Results, their files, and how they came about."""
    if folder is None:
        return resumable(recipe, None), [], ""
    found = kept(recipe, folder)
    if found is not None and not found.changed and not fresh:
        return list(found.results), list(found.files), f"used again from {folder}: nothing has changed since"
    start = time.monotonic()
    results = resumable(recipe, folder)
    files = keep(recipe, write_results(results, folder, recipe), folder, start)
    why = found.changed if found is not None else ""
    return results, files, f"computed anew: {why}" if why else ""


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


def write_results(results: Sequence[Result], out: Path, recipe: Recipe | None = None) -> list[Path]:
    """result.npz (result_2.npz ... for further ones), report.html and flow.png in folder `out`, and what the recipe adds.

    A recipe may have `write(results, folder)`, which writes its own files in place of these, or `further(results,
    folder)`, which writes more; both return the paths.
    """
    if hasattr(recipe, "write"):
        return list(recipe.write(results, out))  # type: ignore[union-attr]
    more = recipe.further(results, out) if hasattr(recipe, "further") else []  # type: ignore[union-attr]
    return [*_usual(results, out), *more]


def _usual(results: Sequence[Result], out: Path) -> list[Path]:
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
