"""What is written beside a figure: where its numbers come from, and the sha256 of every file. Torch-free at import.

data_1.npz ...      the Results      data_1.csv ...   the same as text, where it is short
computed.json       how the data were made; written after them, so data without it are not whole
recipe.yaml, figure.svg, .pdf, .png, .html
manifest.json       all of it; written last: a folder with a manifest is whole
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from figures.shelf import HERE, Entry
from lab.errors import ConfigError
from lab.recipe import FigureRecipe, sha256_of
from lab.result import Result, write_bytes

SCHEMA = 1
COMPUTED, MANIFEST = "computed.json", "manifest.json"
MOST_ROWS = 20_000  # values of a Result that is also written as CSV
PACKAGES = (
    "videollm-lab", "torch", "transformers", "transformer-lens", "nnsight", "captum", "numpy", "matplotlib", "plotly", "pydantic", "pillow",
)  # fmt: skip


def save_data(results: Sequence[Result], folder: Path) -> list[str]:
    """Writes the Results; returns the names of the files."""
    names: list[str] = []
    for i, result in enumerate(results, 1):
        names.append(result.save(folder / f"data_{i}.npz").name)
        if result.values.size <= MOST_ROWS:
            names.append(result.to_csv(folder / f"data_{i}.csv").name)
    return names


def load_data(folder: Path) -> list[Result]:
    """The Results of a folder, in their order. Raises ConfigError if they are not whole."""
    names = [n for n in read(folder / COMPUTED)["data"] if n.endswith(".npz")]
    return [Result.load(folder / n) for n in names]


def computed(
    entry: Entry, recipe: FigureRecipe, data: Sequence[str], folder: Path, seconds: float
) -> dict[str, Any]:
    """Everything about how the data were made. Call it in the process that made them: it holds the peak of the memory."""
    import torch

    return {
        "schema": SCHEMA, "figure": entry.name, "recipe_id": recipe.id, "recipe": recipe.plain(), "script": entry.script.name,
        "compute_sha256": entry.measuring(), "argv": sys.argv[1:], "determinism": recipe.determinism, "tolerance": recipe.tolerance,
        "git": git(), "versions": versions(), "python": platform.python_version(), "os": platform.platform(),
        **_machine(recipe), "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(), "seeds": _seeds(recipe.plain()),
        "model": _model(recipe), "items": _items(recipe), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "wall_seconds": round(seconds, 2), "cpu_seconds": round(_cpu(), 2), "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "data": {n: sha256_of(folder / n) for n in data},
    }  # fmt: skip


def _cpu() -> float:
    """CPU seconds of this process so far, and of those it waited for: what a busy machine does not stretch."""
    mine, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + others.ru_utime + others.ru_stime


def _machine(recipe: Any) -> dict[str, str]:
    import torch

    from lab.bench.measuring import setting

    asked = recipe.model.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    dtype = recipe.model.dtype
    return {
        "device": device, "device_name": setting(device)["device_name"],
        "dtype": dtype if dtype != "auto" or device != "cpu" else "float32",
    }  # fmt: skip


def _model(recipe: Any) -> dict[str, Any]:
    from lab.model.zoo import weights_hash

    return {
        "id": recipe.model.name,
        "revision": recipe.model.revision,
        "weights": weights_hash(recipe.model.name),
    }


def _items(recipe: Any) -> dict[str, Any]:
    """Number and hash of every list of items the recipe names."""
    return {name: _hashed(recipe.drawn(name)) for name in recipe.item_fields()}


def _hashed(items: Sequence[Any]) -> dict[str, Any]:
    from lab.edges.evidence import video_key

    told = [[i.id, i.task, i.question, list(i.options), i.answer, video_key(i)] for i in items]
    return {
        "n": len(items),
        "sha256": hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest(),
    }


def _seeds(data: Any, where: str = "") -> dict[str, int]:
    if isinstance(data, Mapping):
        parts: Iterable[tuple[Any, Any]] = data.items()
    elif isinstance(data, list):
        parts = enumerate(data)
    else:
        return {}
    out: dict[str, int] = {}
    for key, value in parts:
        here = f"{where}.{key}".lstrip(".")
        out |= {here: value} if key == "seed" else _seeds(value, here)
    return out


def versions() -> dict[str, str]:
    """Installed versions of what figures are made with."""
    out: dict[str, str] = {}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def git() -> dict[str, Any]:
    """Commit of the code, whether files differ from it, and the hash of the difference; nothing outside a checkout."""
    sha, status, diff = (
        _git(*a) for a in (("rev-parse", "HEAD"), ("status", "--porcelain"), ("diff", "HEAD"))
    )
    if sha is None:
        return {"sha": None, "dirty": None, "diff_sha256": None}
    changed = bool(status)
    return {
        "sha": sha,
        "dirty": changed,
        "diff_sha256": hashlib.sha256((diff or "").encode()).hexdigest() if changed else None,
    }


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def finish(entry: Entry, folder: Path, plate: Any, drawn: Sequence[Path]) -> dict[str, Any]:
    """Writes manifest.json, last and at once."""
    told = read(folder / COMPUTED)
    outputs = {p.name: sha256_of(p) for p in [*drawn, folder / "recipe.yaml"]}
    whole = {
        **told, "script_sha256": sha256_of(entry.script), "title": plate.title, "caption": plate.caption, "width_inches": plate.width,
        "height_inches": round(sum(plate.heights), 3), "outputs": {**told["data"], **outputs},
    }  # fmt: skip
    write(folder / MANIFEST, whole)
    return whole


def write(path: Path, data: Mapping[str, Any]) -> None:
    """JSON to a file, all at once."""
    write_bytes(path, (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """A manifest or computed.json. Raises ConfigError if it is missing, damaged or newer."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"no {path}: make the figure first, `vlab figures run {path.parent.name}`"
        ) from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ConfigError(f"{path} is no manifest of schema {SCHEMA}; make the figure anew")
    return data


def changed(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Names of files that are missing or whose bytes are not those of their sha256."""
    return [n for n, sha in files.items() if not os.path.isfile(folder / n) or sha256_of(folder / n) != sha]
