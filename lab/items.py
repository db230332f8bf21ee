"""Items: lists of questions about videos, from files, simulators or recipes, and back to files.

load_items("clips.jsonl")                                       one JSON object per line
load_items("clips.yaml")                                        a list, or {items: [...]}, or {sim: ...}
load_items("tvbench/json/action_sequence.json", videos="tvbench/video")
load_items({"sim": "moving_direction", "n": 8, "seed": 0})      made by lab.sim; several tasks with commas between
load_items({"benchmark": "tomato", "folder": "/data/TOMATO", "task": "count", "n": 20})      see lab.benchmarks
load_items("tomato:/data/TOMATO:count:20"), load_items("sim:moving_direction:8:0")           the same in a word
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lab.benchmark_rows import as_item_rows, is_benchmark
from lab.benchmarks.folders import hash_of, question_files, rows_of
from lab.carriers import LETTERS, VideoQA
from lab.errors import ConfigError, LabError, UsageError
from lab.recipe import (
    BenchmarkSpec,
    ItemFile,
    ItemSpec,
    Part,
    SimSpec,
    VideoSpec,
    explain,
    items_named,
    sha256_of,
)
from lab.result import write_bytes
from lab.runs import unique
from lab.yamlfile import as_yaml, parse_yaml, read_text

FIELDS = ("video", "question", "options", "answer", "id", "task", "clip")


def load_items(
    source: Any, *, base: str | Path | None = None, videos: str | Path | None = None
) -> list[VideoQA]:
    """Items from a path, a simulator spec, a benchmark's folder, a recipe's `items`, or a list of dicts; at least one.

    base    folder that relative paths start from: by default the file's own folder, or the working folder
    videos  folder below which a benchmark file's videos lie (see `lab.benchmark_rows`); None: the file's own folder
    Items without an id get one from their place. Raises ConfigError with the file and line of what is wrong.
    """
    folder = Path(base) if base is not None else Path.cwd()
    if isinstance(source, Part):
        source = source.model_dump(mode="json")
    if isinstance(source, str) and "file" not in (named := _named(source)):
        source = named
    if isinstance(source, str | Path):
        items = _from_file(folder / source, videos)
    elif isinstance(source, Mapping):
        items = _from_mapping(dict(source), folder, "items")
    elif isinstance(source, Sequence):
        items = _from_list(list(source), folder, "items")
    else:
        raise UsageError(f"items come from a path, a mapping or a list, got {type(source).__name__}")
    if not items:
        named = source.get("file", source) if isinstance(source, Mapping) else source
        raise ConfigError(f"{named} holds no items; give at least one")
    unique([i.id for i in items], "item id")
    return items


def dump_items(items: Sequence[VideoQA], path: str | Path) -> Path:
    """Writes items as .jsonl or .yaml; video paths become relative to the file's folder where they lie inside it.

    Simulator state and twins are not written. Raises UsageError for videos that are not files.
    """
    path = Path(path)
    rows = [_row(item, path.parent) for item in items]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    elif path.suffix in (".yaml", ".yml"):
        text = as_yaml(rows)
    else:
        raise UsageError(f"cannot tell the format of {path}; end its name in .jsonl or .yaml")
    return write_bytes(path, text.encode())


def spec_of(item: VideoQA, **sampling: Any) -> ItemSpec:
    """The item as a piece of a recipe, with the hash of its video; `sampling` as in `VideoSpec`."""
    row = _row(item, Path.cwd())
    video = VideoSpec(path=row.pop("video"), sha256=sha256_of(item.video), **sampling)
    row["options"] = tuple(row.get("options", ()))
    row["clip"] = item.clip
    return ItemSpec(video=video, **row)


def item_of(spec: ItemSpec, *, base: str | Path | None = None, name: str = "item") -> VideoQA:
    """The item a recipe names. Raises ConfigError if the video is missing or is not the one the recipe was made with."""
    video = _video_path(spec.video.path, Path(base) if base is not None else Path.cwd(), name)
    _check_hash(video, spec.video.sha256, name)
    return VideoQA(video, spec.question, spec.options, spec.answer, spec.id, spec.task, clip=spec.clip)


def _from_file(path: Path, videos: str | Path | None = None) -> list[VideoQA]:
    text = read_text(path)
    folder = path.resolve().parent
    if path.suffix == ".jsonl":
        return _from_lines(text, folder, path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ConfigError(f"cannot tell the format of {path}; items are .jsonl, .yaml or .json")
    data = parse_yaml(text, str(path))  # every JSON text is YAML too
    if isinstance(data, dict) and set(data) == {"items"}:
        data = data["items"]
    if isinstance(data, dict):
        return _from_mapping(data, folder, str(path))
    if is_benchmark(data):
        data = as_item_rows(data, path, None if videos is None else Path(videos).expanduser())
    if not isinstance(data, list):
        raise ConfigError(f"{path}: expected a list of items, got {type(data).__name__}")
    return _from_list(data, folder, str(path), path.stem)


def _from_lines(text: str, folder: Path, path: Path) -> list[VideoQA]:
    items: list[VideoQA] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{where}: not JSON: {e}") from None
        items.append(_item(data, folder, where, f"{path.stem}:{number}"))
    return items


def _named(text: str) -> dict[str, Any]:
    try:
        return items_named(text)
    except ValueError as e:
        raise ConfigError(f"items {text}: {e}") from None


def pinned(spec: Any, base: Path) -> Any:
    """A source of items with the hash of its files filled in, so that a recipe says which ones were meant.

    Raises ConfigError if they cannot be read.
    """
    if isinstance(spec, ItemFile):
        return spec.model_copy(update={"sha256": sha256_of(base / spec.file)})
    if isinstance(spec, BenchmarkSpec):
        return spec.model_copy(update={"sha256": hash_of(question_files(spec, base))})
    return spec


def _from_mapping(data: dict[str, Any], folder: Path, where: str) -> list[VideoQA]:
    if "sim" in data:
        return _simulated(_checked(SimSpec, data, where))
    if "file" in data:
        spec = _checked(ItemFile, data, where)
        _check_hash(folder / spec.file, spec.sha256, where)
        return _from_file(folder / spec.file, None if spec.videos is None else folder / spec.videos)
    if "benchmark" in data:
        spec = _checked(BenchmarkSpec, data, where)
        rows = rows_of(spec, folder)
        return [_built(r, folder, f"{spec.benchmark} {r['id']}", r["id"]) for r in rows]
    return [_item(data, folder, where, "item:1")]


def _from_list(rows: list[Any], folder: Path, where: str, stem: str = "item") -> list[VideoQA]:
    return [_item(row, folder, f"{where} item {i}", f"{stem}:{i}") for i, row in enumerate(rows, 1)]


def _item(row: Any, folder: Path, where: str, default_id: str) -> VideoQA:
    if isinstance(row, VideoQA):
        return row if row.id else replace(row, id=default_id)
    if isinstance(row, ItemSpec):
        row = row.model_dump(mode="json")
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where}: an item is a mapping of {', '.join(FIELDS)}; got {type(row).__name__}")
    if isinstance(row.get("video"), Mapping):
        spec = _checked(ItemSpec, dict(row), where)
        row = {**row, "video": str(_hashed_video(spec, folder, where).absolute())}
    _check_fields(row, where)
    return _built(dict(row), folder, where, default_id)


def _built(row: dict[str, Any], folder: Path, where: str, default_id: str) -> VideoQA:
    options = row.get("options") or ()
    if isinstance(options, str) or not isinstance(options, Sequence):
        raise ConfigError(f"{where}: options must be a list of texts, got {options!r}")
    for name in ("id", "task"):
        if not isinstance(row.get(name, ""), str):
            raise ConfigError(f"{where}: {name} must be text, got {row[name]!r}; quote it")
    try:
        answer = _answer(row.get("answer"), tuple(options))
        given = row["video"]
        video = given if isinstance(given, tuple) else str(_video_path(given, folder, where))
        return VideoQA(
            video, row["question"], tuple(options), answer, row.get("id") or default_id, row.get("task", ""),
            clip=row.get("clip"),
        )  # fmt: skip
    except UsageError as e:
        raise ConfigError(f"{where}: {e}") from None


def _answer(given: Any, options: tuple[str, ...]) -> int | str | None:
    """An option may be named by its index, its text or its letter; in this order, so that texts "B", "A" mean themselves."""
    if isinstance(given, bool) or not isinstance(given, int | str | None):
        raise UsageError(f"answer must be an index, an option or its letter, got {given!r}")
    if not options or not isinstance(given, str):
        return given
    if given in options:
        return options.index(given)
    if given in LETTERS[: len(options)] and len(given) == 1:
        return LETTERS.index(given)
    raise UsageError(
        f"answer {given!r} is none of the {len(options)} options {options!r} nor a letter of one"
    )


def _check_fields(row: Mapping[str, Any], where: str) -> None:
    for name in row:
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), FIELDS, n=1)
            raise ConfigError(
                f"{where}: there is no field {name!r}; {'closest' if near else 'known'}: {', '.join(near or FIELDS)}"
            )
    for name in ("video", "question"):
        if name not in row:
            raise ConfigError(f"{where}: {name} is missing")


def _video_path(given: Any, folder: Path, where: str) -> Path:
    if not isinstance(given, str) or not given:
        raise ConfigError(f"{where}: video must be the path of a file, got {given!r}")
    if re.match(r"[a-z]+://", given):
        raise ConfigError(f"{where}: {given} is an address; the lab reads files only, download it first")
    path = folder / given
    try:
        found = path.exists()
    except (OSError, ValueError):  # too long, or a zero byte
        found = False
    if not found:
        raise ConfigError(f"{where}: no video {given!r} (looked for {path})")
    return path


def _hashed_video(spec: ItemSpec, folder: Path, where: str) -> Path:
    video = _video_path(spec.video.path, folder, where)
    _check_hash(video, spec.video.sha256, where)
    return video


def _check_hash(path: Path, want: str | None, where: str) -> None:
    if want is not None and (have := sha256_of(path)) != want:
        raise ConfigError(
            f"{where}: {path} has sha256 {have[:12]}..., the recipe was made with {want[:12]}...; get that file"
        )


def _checked(cls: type[Any], data: dict[str, Any], where: str) -> Any:
    try:
        return cls.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as e:
        raise ConfigError(f"{where}: {explain(e, cls)}") from None
    except TypeError as e:
        raise ConfigError(f"{where}: {e}") from None


def _simulated(spec: SimSpec) -> list[VideoQA]:
    out: list[VideoQA] = []
    for task in importlib.import_module("lab.sim.tasks").named_tasks(spec.sim):
        made = _simulator(task).items(n=spec.n, seed=spec.seed)
        out += [_item(item, Path.cwd(), task, f"{task}:{spec.seed}:{i}") for i, item in enumerate(made)]
    return out


def _simulator(name: str) -> Any:
    """Module lab.sim.NAME, or that of its first words: moving_direction is found in lab.sim.moving."""
    words = name.split("_") if re.fullmatch(r"[a-z][a-z0-9_]*", name) else []
    for n in range(len(words), 0, -1):
        module = f"lab.sim.{'_'.join(words[:n])}"
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as e:
            if e.name != module:
                raise LabError(f"{module} needs the package {e.name!r}; install it") from None
            continue
        if hasattr(found, "items"):
            return found
    known = list(importlib.import_module("lab.sim").TASKS)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known
    raise ConfigError(
        f"no simulator {name!r}; {'closest: ' + ', '.join(near) if near else 'none is installed'}"
    )


def _row(item: VideoQA, folder: Path) -> dict[str, Any]:
    if not isinstance(item.video, str):
        raise UsageError(
            f"the video of {item.id or item.question!r} is a {type(item.video).__name__}, not a file; write it first"
        )
    try:
        item.video.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the name of the video {item.video!r} is not UTF-8; rename it") from None
    video = Path(item.video).absolute()
    inside = video.is_relative_to(folder.absolute())
    row: dict[str, Any] = {n: getattr(item, n) for n in FIELDS}
    row["video"] = (video.relative_to(folder.absolute()) if inside else video).as_posix()
    row["options"] = list(item.options)
    row["clip"] = None if item.clip is None else list(item.clip)
    return {k: v for k, v in row.items() if v not in ("", None) and v != []}
