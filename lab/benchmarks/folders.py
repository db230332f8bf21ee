"""A benchmark's folder: which question files it has, which of their questions are asked, where the videos lie."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.benchmarks import candidates, tempcompass, tomato
from lab.errors import ConfigError
from lab.recipe import BenchmarkSpec

MAX_BYTES = 50_000_000  # the largest published question file has 1.5 MB
Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How one benchmark lies on disk.

    questions  the folder of its question files, one a task
    rows       (content of a question file, task, benchmark's folder) -> rows with video, question, options, answer, id,
               task and clip; raises ConfigError that names the row
    """

    questions: str
    rows: Callable[[Any, str, Path], list[Row]]


LAYOUTS = {
    "tvbench": Layout("json", candidates.rows),
    "mvbench": Layout("json", candidates.rows),
    "tomato": Layout("data", tomato.rows),
    "tempcompass": Layout("questions", tempcompass.rows),
}


def rows_of(spec: BenchmarkSpec, base: Path) -> list[Row]:
    """The questions a spec names, with paths that exist; `base` is where a relative folder starts.

    Raises ConfigError: a folder or file that is not there (with its path), an unknown task (with the closest), another
    hash, a row that is not as published.
    """
    files = question_files(spec, base)
    if spec.sha256 is not None and (have := hash_of(files)) != spec.sha256:
        raise ConfigError(
            f"{spec.benchmark}: the question files in {files[0][1].parent} have sha256 {have[:12]}..., the recipe was made "
            f"with {spec.sha256[:12]}...; get those"
        )
    folder, layout = _folder(spec, base), LAYOUTS[spec.benchmark]
    found = [r for task, path in files for r in _chosen(spec, layout.rows(_content(path), task, folder))]
    _check_videos(found, spec.benchmark)
    return found


def question_files(spec: BenchmarkSpec, base: Path) -> list[tuple[str, Path]]:
    """(task, file) of every question file the spec asks for, in the order of their names or of `spec.task`."""
    folder = _folder(spec, base) / LAYOUTS[spec.benchmark].questions
    there = {p.stem: p for p in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
    if not there:
        raise ConfigError(
            f"no question files {folder / '*.json'}; {spec.benchmark}: the folder that holds {folder.name}/"
        )
    names = list(dict.fromkeys(t.partition("/")[0] for t in _tasks(spec))) or list(there)
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1) or list(there)
            raise ConfigError(
                f"{spec.benchmark}: no file {folder / name}.json for the task {name!r}; closest: {', '.join(near)}"
            )
    return [(name, there[name]) for name in names]


def hash_of(files: Sequence[tuple[str, Path]]) -> str:
    """sha256 over the names and contents of question files."""
    digest = hashlib.sha256()
    for task, path in files:
        digest.update(task.encode() + b"\0" + hashlib.sha256(_bytes(path)).digest())
    return digest.hexdigest()


def _folder(spec: BenchmarkSpec, base: Path) -> Path:
    try:
        folder = base / Path(spec.folder).expanduser()
        there = folder.is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such home folder
        raise ConfigError(f"{spec.benchmark}: no folder {spec.folder[:200]!r}") from None
    if not there:
        raise ConfigError(f"{spec.benchmark}: no folder {folder}; download the benchmark and give its folder")
    return folder


def _tasks(spec: BenchmarkSpec) -> list[str]:
    return [] if spec.task is None else [t.strip() for t in spec.task.split(",")]


def _chosen(spec: BenchmarkSpec, rows: list[Row]) -> list[Row]:
    """The rows of the tasks asked for, the first n of each."""
    asked, taken, counts = _tasks(spec), [], dict[str, int]()
    for row in rows:
        task = row["task"]
        if asked and task not in asked and task.partition("/")[0] not in asked:
            continue
        counts[task] = counts.get(task, 0) + 1
        if spec.n is None or counts[task] <= spec.n:
            taken.append(row)
    _check_asked(asked, rows)
    return taken


def _check_asked(asked: Sequence[str], rows: Sequence[Row]) -> None:
    known = sorted({r["task"] for r in rows})
    files = {k.partition("/")[0] for k in known}
    for task in asked:
        if "/" in task and task.partition("/")[0] in files and task not in known:
            near = difflib.get_close_matches(task, known, n=1) or known
            raise ConfigError(f"no task {task!r} in this file; closest: {', '.join(near)}")


def _check_videos(rows: Sequence[Mapping[str, Any]], benchmark: str) -> None:
    """Videos may be files, folders or frames one by one; all that are missing are counted, the first is named."""
    wanted = {v: r for r in rows for v in (r["video"] if isinstance(r["video"], tuple) else [r["video"]])}
    missing = [v for v in wanted if not Path(v).exists()]
    if missing:
        row = wanted[missing[0]]
        raise ConfigError(
            f"{benchmark}: {len(missing)} of {len(wanted)} videos are not there, the first {missing[0]} ({row['id']}); "
            "download them, or name the tasks to take"
        )


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path} has {size} bytes, more than the {MAX_BYTES} allowed")
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from None


def _content(path: Path) -> Any:
    try:
        return json.loads(_bytes(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: not JSON: {e}") from None
