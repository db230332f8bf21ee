"""Makes one figure: compute, then draw. Also the worker process of `vlab figures`. Drawing needs no torch.

python -m figures.making NAME FOLDER [--set key=value ...] [--redo] [--from-data] [--data-only]
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import manifest
from figures.shelf import Entry, find
from lab.errors import ConfigError, LabError
from lab.overriding import setting
from lab.recipe import FigureRecipe, dump, sha256_of
from lab.view.plate_out import save_plate


def folder_of(entry: Entry, recipe: FigureRecipe, out: Path) -> Path:
    """out/NAME; with other values than the recipe file's, out/NAME-ID."""
    return out / (entry.name if recipe == entry.recipe() else f"{entry.name}-{recipe.id}")


def recipe_of(entry: Entry, changes: Mapping[str, Any]) -> FigureRecipe:
    """The figure's recipe with other values at dotted keys."""
    recipe = entry.recipe()
    return recipe.override(changes) if changes else recipe


def is_whole(entry: Entry, recipe: FigureRecipe, folder: Path) -> bool:
    """Whether the figure is there, made by this recipe and script from these weights, with no file changed."""
    return _fits(entry, recipe, folder, manifest.MANIFEST, "outputs")


def has_data(entry: Entry, recipe: FigureRecipe, folder: Path) -> bool:
    """Whether the data are there, made by this recipe and the measuring half of the script from these weights."""
    return _fits(entry, recipe, folder, manifest.COMPUTED, "data")


def _fits(entry: Entry, recipe: FigureRecipe, folder: Path, name: str, files: str) -> bool:
    try:
        told = manifest.read(folder / name)
    except ConfigError:
        return False
    same = told["recipe_id"] == recipe.id and told["compute_sha256"] == entry.measuring()
    if name == manifest.MANIFEST:
        same = same and told["script_sha256"] == sha256_of(entry.script)
    return (
        same
        and _weights(recipe) in (None, told["model"]["weights"])
        and not manifest.changed(folder, told[files])
    )


def _weights(recipe: Any) -> str | None:
    """Hash of a bundled model's or folder's weights; None where it is not known. Without torch."""
    import hashlib

    folder = Path(__file__).resolve().parents[1] / "lab" / "data" / recipe.model.name
    folder = folder if folder.is_dir() else Path(recipe.model.name).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12] if files else None


def compute(entry: Entry, recipe: FigureRecipe, folder: Path) -> None:
    """Measures and writes data and computed.json. An older manifest goes first: the folder is not whole meanwhile."""
    import torch

    torch.set_num_threads(1)  # figures run side by side, and one thread repeats its sums in the same order
    for name in (manifest.MANIFEST, manifest.COMPUTED):
        (folder / name).unlink(missing_ok=True)
    start = time.perf_counter()
    data = manifest.save_data(recipe.run(progress=True), folder)
    manifest.write(
        folder / manifest.COMPUTED,
        manifest.computed(entry, recipe, data, folder, time.perf_counter() - start),
    )
    dump(recipe, folder / "recipe.yaml")


def draw(entry: Entry, folder: Path) -> dict[str, Any]:
    """Draws from the data in the folder and writes the manifest. Imports no torch."""
    told = manifest.read(folder / manifest.COMPUTED)
    wrong = manifest.changed(folder, told["data"])
    if wrong:
        raise ConfigError(
            f"{folder / wrong[0]} is missing or was changed after it was computed; run the figure with --redo"
        )
    plate = entry.module.draw(manifest.load_data(folder))
    drawn = save_plate(plate, folder, about=f"recipe {told['recipe_id']}")
    return manifest.finish(entry, folder, plate, drawn)


def make(
    entry: Entry,
    recipe: FigureRecipe,
    folder: Path,
    *,
    redo: bool = False,
    from_data: bool = False,
    data_only: bool = False,
) -> str:
    """Does what is missing; says what was done: "kept", "drawn" or "computed"."""
    if from_data:
        draw(entry, folder)
        return "drawn"
    if not redo and not data_only and is_whole(entry, recipe, folder):
        return "kept"
    fresh = redo or not has_data(entry, recipe, folder)
    if fresh:
        compute(entry, recipe, folder)
    if not data_only:
        draw(entry, folder)
    return "computed" if fresh else "drawn"


def main(argv: Sequence[str] | None = None) -> int:
    """The worker: exit code 0, or that of the error, which is one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m figures.making", description="Makes one figure in a folder."
    )
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", dest="changes", action="append", default=[])
    for flag in ("--redo", "--from-data", "--data-only"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args(argv)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        entry = find(given.name)
        recipe = recipe_of(entry, dict(setting(c) for c in given.changes))
        print(
            make(
                entry,
                recipe,
                given.folder,
                redo=given.redo,
                from_data=given.from_data,
                data_only=given.data_only,
            )
        )
    except LabError as e:
        print(" ".join(str(e).split()), file=sys.stderr)
        return e.exit_code
    return 0


def _end_with_parent(parent: int) -> None:
    """A worker whose `vlab` was killed must not go on and write into a folder that the next one is working on."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
