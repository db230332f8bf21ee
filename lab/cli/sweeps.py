"""`vlab sweep`: knock-out curves over many questions, from one stored clean run a question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.cli.asking import Setting
from lab.cli.output import Reply
from lab.cli.rerunning import resumable, write_results
from lab.errors import UsageError


def sweep_items(
    items: str, setting: Setting, pathways: Sequence[str], window: int | None, executor: str, out: str
) -> Reply:
    """Result, report, picture and recipe in folder `out`; interrupted, the same command goes on where it stopped."""
    from lab.cli.tracing import window_for
    from lab.recipe import ModelSpec, dump
    from probes.knockout import PATHWAYS, KnockoutRecipe

    if executor not in ("fast", "reference"):
        raise UsageError(f"--executor {executor!r}: use fast or reference")
    if setting.fps is not None:
        raise UsageError("--fps: a sweep takes the same number of frames of every video; use --frames")
    if window is not None and window < 1:
        raise UsageError(f"--window {window}: at least 1 layer is needed")
    folder = Path(out)
    model = setting.load()
    recipe = KnockoutRecipe(
        model=ModelSpec(**(model.spec or {})), items=_source(items), n_frames=setting.frames or 8,
        pathways=tuple(pathways or PATHWAYS), window=window or window_for(model.cfg.n_layers),
    )  # fmt: skip
    results = resumable(recipe, folder, model=model, executor=executor)
    files = write_results(results, folder)
    dump(recipe, folder / "recipe.yaml")
    ledger = results[0].ledger
    data = {
        "recipe": recipe.id,
        "ledger": ledger,
        "files": [str(f) for f in [*files, folder / "recipe.yaml"]],
        "results": [json.loads(r.to_json()) for r in results],
    }
    spent = f"{ledger['forwards']:.1f} forward-equivalents in place of {ledger['naive']:.0f}"
    return Reply(data, "\n".join([repr(results[0]), spent, *data["files"]]))


def _source(items: str) -> Any:
    """A file of items, named with its hash, or a simulator task as JSON ({"sim": ..., "n": ..., "seed": ...})."""
    from lab.recipe import ItemFile, SimSpec, sha256_of

    if items.lstrip().startswith("{"):
        try:
            return SimSpec(**json.loads(items))
        except (ValueError, TypeError) as e:
            raise UsageError(f"--items {items}: not a simulator task such as {{\"sim\": \"moving_direction\", \"n\": 8}} ({str(e).splitlines()[0]})") from None  # fmt: skip
    path = Path(items).expanduser()
    if not path.is_file():
        raise UsageError(
            f"--items {items}: no such file; give a .jsonl or .yaml of items, or a simulator task as JSON"
        )
    return ItemFile(file=str(path.resolve()), sha256=sha256_of(path))
