"""What every command leaves beside its results, so that the same recipe need not be run twice: recipe.yaml and run.json.

A folder holds the results of one recipe. They are used again if recipe, code, versions, device, weights and the files
the items come from are what they were, and no result file has changed since; otherwise everything is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lab.benchmarks.folders import hash_of, question_files
from lab.errors import ConfigError, UsageError
from lab.recipe import ROOTS, BenchmarkSpec, ItemFile, ModelSpec, Recipe, VideoSpec, dump, sha256_of
from lab.result import Result, write_bytes
from lab.yamlfile import read_text

NAME = "run.json"
FORMAT = "videollm-lab run/1"
LARGE = 2**31  # bytes of weights; beyond, hashing takes minutes, and names and sizes must do


@dataclass(frozen=True)
class Kept:
    """Results in a folder. `changed`: why they cannot be used again, "" if they can."""

    results: tuple[Result, ...]
    files: tuple[Path, ...]
    changed: str


def keep(recipe: Recipe, files: Sequence[Path | str], out: Path, started: float) -> list[Path]:
    """Writes recipe.yaml and `run.json`: what the recipe was run with, how long it took, and the hash of every file.

    files    what was written to `out`; the .npz among them are the Results, in order
    started  what `time.monotonic()` said at the start

    Returns the files and recipe.yaml.
    """
    dump(recipe, out / "recipe.yaml")
    written = [*map(Path, files), out / "recipe.yaml"]
    data = {
        "format": FORMAT, "recipe": recipe.id, "kind": recipe.kind, "with": made_with(recipe),
        "seconds": round(time.monotonic() - started, 3),
        "results": [f.name for f in written if f.suffix == ".npz"],
        "files": {f.relative_to(out).as_posix(): sha256_of(f) for f in written},
    }  # fmt: skip
    write_bytes(out / NAME, (json.dumps(data, indent=2) + "\n").encode())
    return written


def kept(recipe: Recipe, out: Path) -> Kept | None:
    """What folder `out` holds of this recipe, None if nothing. Raises UsageError if it holds another recipe's results."""
    said = _said(out / NAME)
    if said is None:
        return None
    if said["recipe"] != recipe.id:
        raise UsageError(
            f"{out} holds the results of recipe {said['recipe']} ({said['kind']}), this is {recipe.id}; name another folder, "
            "or remove that one"
        )
    changed = _changed(said, recipe, out)
    files = tuple(out / name for name in said["files"])
    return Kept(() if changed else tuple(Result.load(out / n) for n in said["results"]), files, changed)


def made_with(recipe: Recipe) -> dict[str, Any]:
    """Everything besides the recipe that decides about the numbers, as names and hashes."""
    from lab.environment import versions

    packages = {
        k: v for k, v in versions().items() if k in ("python", "torch", "transformers", "numpy", "av")
    }
    return {"code": code_hash(), **packages, "device": _device(), **dict(_sources(recipe, recipe.folder))}


def code_hash() -> str:
    """Hash of the project's Python files."""
    digest = hashlib.sha256()
    for root in ROOTS:
        spec = find_spec(root)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _sources(part: Any, base: Path) -> Iterator[tuple[str, str]]:
    """(name, hash) of the models and files that a recipe names, at whatever depth."""
    match part:
        case ModelSpec():
            yield f"model {part.name}", _weights(part.name)
        case ItemFile():
            yield f"items {part.file}", sha256_of(base / part.file)
        case VideoSpec():
            yield f"video {part.path}", sha256_of(base / part.path)
        case BenchmarkSpec():
            yield f"items {part.folder}", hash_of(question_files(part, base))
        case BaseModel():
            for _, value in part:
                yield from _sources(value, base)
        case list() | tuple() | dict():
            for value in part.values() if isinstance(part, dict) else part:
                yield from _sources(value, base)
        case _:
            pass


def _weights(name: str) -> str:
    from lab.model.zoo import weights_files, weights_hash

    files = weights_files(name)
    if sum(f.stat().st_size for f in files) < LARGE:
        return weights_hash(name) or "from a hub"
    return ", ".join(f"{f.name} {f.stat().st_size}" for f in files)


def _said(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        data = json.loads(read_text(path))
        if data["format"] != FORMAT or not data["results"] or not set(data["results"]) <= set(data["files"]):
            raise ValueError(f"format {data['format']!r}, results {data['results']!r:.40}")
        return {k: data[k] for k in ("recipe", "kind", "with", "results", "files")}
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ConfigError(
            f"{path} is damaged ({type(e).__name__}: {e}); remove it, and the run is done anew"
        ) from None


def _changed(said: dict[str, Any], recipe: Recipe, out: Path) -> str:
    now = made_with(recipe)
    for name in [*now, *said["with"]]:
        if now.get(name) != said["with"].get(name):
            return f"{name} was {said['with'].get(name)}, is {now.get(name)}"
    for name, want in said["files"].items():
        path = out / name
        if not path.resolve().is_relative_to(out.resolve()) or not path.is_file():
            return f"{name} is gone"
        if sha256_of(path) != want:
            return f"{name} is not as it was written"
    return ""
