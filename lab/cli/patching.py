"""`vlab patch` and `vlab attribute`: probes over many questions, with the same items as `vlab sweep`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.cli.asking import Setting
from lab.cli.keeping import keep
from lab.cli.output import Reply, folder_for
from lab.cli.probing import checked
from lab.cli.rerunning import resumable, write_results
from lab.cli.sources import source_of
from lab.cli.switching import switched_on
from lab.errors import UsageError


def patch_items(
    items: str, setting: Setting, by: str, window: int | None, asked: Mapping[str, Any], out: str
) -> Reply:
    """A patching grid: result, report, picture and recipe in folder `out`; interrupted, the same command goes on."""
    from probes.patching import PatchingRecipe

    fields = {**asked, "by": by, "window": 1 if window is None else window}
    return _probed(PatchingRecipe, items, setting, fields, out)


def attribute_items(
    items: str, setting: Setting, layer: int | None, asked: Mapping[str, Any], out: str
) -> Reply:
    """An attribution, with the first question's frames painted over."""
    from probes.attributed import LAYERED
    from probes.attribution import AttributionRecipe

    place = asked["place"]
    if layer is None and place in LAYERED:
        raise UsageError(f"--at {place} needs a --layer: 1 is the first")
    if layer is not None and place not in LAYERED:
        raise UsageError(f"--layer {layer} goes with --at {', '.join(LAYERED)}; not with {place}")
    fields = {**asked, "layer": None if layer is None else layer - 1}  # 1-based on the command line
    return _probed(AttributionRecipe, items, setting, fields, out, paint=True)


def _probed(
    kind: Any, items: str, setting: Setting, fields: Mapping[str, Any], out: str, *, paint: bool = False
) -> Reply:
    from lab.cli.policies import find
    from lab.recipe import ModelSpec

    if setting.fps is not None:
        raise UsageError("--fps: a probe takes the same number of frames of every video; use --frames")
    source, started = source_of(items), time.monotonic()
    given = {k: v for k, v in fields.items() if v is not None}
    given["mechanisms"] = switched_on(given.get("mechanisms"))
    model = setting.load()
    if "policy" in given:
        given["policy"] = find(given["policy"], model.cfg.n_layers).to_dict()
    recipe = checked(
        kind, model=ModelSpec(**(model.spec or {})), items=source, n_frames=setting.frames or 8, **given
    )
    folder = folder_for(out)
    results = resumable(recipe, folder, model=model)
    files = write_results(results, folder)
    if paint:
        _painted(model, recipe, results, folder)
    files = keep(recipe, files, folder, started)
    ledger = results[0].ledger
    data = {
        "recipe": recipe.id, "ledger": ledger, "files": [str(f) for f in files],
        "results": [json.loads(r.to_json()) for r in results],
    }  # fmt: skip
    spent = (
        f"{ledger['forwards']:.1f} forward-equivalents in place of {ledger['naive']:.0f}" if ledger else ""
    )
    lines = [repr(results[0]), *_reading(results), spent, *data["files"]]
    return Reply(data, "\n".join(line for line in lines if line))


def _reading(results: Sequence[Any]) -> list[str]:
    from lab.view.specs import figure_spec

    return [figure_spec(r).reading for r in results]


def _painted(model: Any, recipe: Any, results: Sequence[Any], folder: Path) -> None:
    """The report once more, with the first item's frames and what they are worth painted on them."""
    from lab.items import load_items
    from lab.view.draw import report
    from lab.view.overlay import overlay

    result = results[0]
    if "frame" not in result.axes:
        return
    item = load_items(recipe.items, base=recipe.folder)[0]
    frames = model.prepare(item, recipe.n_frames).frames
    pixels = frames.pictures
    pictures = {
        item.question: pixels,
        f"What each piece is worth ({result.name})": overlay(result.values[0], pixels),
    }
    report(list(results), folder / "report.html", title=result.name, pictures=pictures)
