"""What `--items` names: a file, simulator tasks, a benchmark's folder, or a recipe's `items` as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lab.errors import ConfigError, UsageError

HELP = (
    "give a .jsonl or .yaml of items, a TVBench or MVBench .json, sim:TASK:N, or BENCHMARK:FOLDER[:TASK][:N]"
)


def source_of(items: str, video_root: str | None = None) -> Any:
    """A file or a benchmark's folder, named with the hash of its questions, or simulator tasks.

    sim:TASKS:N:SEED, BENCHMARK:FOLDER:TASKS:N (see `lab.benchmarks`), JSON, or a path. Raises UsageError, ConfigError.
    """
    spec = _checked(items)
    if video_root is not None and not hasattr(spec, "videos"):
        whose = "simulated items bring their videos" if hasattr(spec, "sim") else "the folder holds them"
        raise UsageError(f"--video-root {video_root}: {whose}; leave it out")
    if hasattr(spec, "sim"):
        return _with_known_tasks(spec) if items.startswith("sim:") else spec
    from lab.items import pinned

    named = _absolute(spec, items, video_root)
    try:
        return pinned(named, Path("/"))
    except ConfigError as e:
        raise UsageError(f"--items {items}: {e}") from None


def _checked(items: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    from lab.recipe import ItemsSpec

    adapter: TypeAdapter[Any] = TypeAdapter(ItemsSpec)
    as_json = items.lstrip().startswith("{")
    try:
        return adapter.validate_python(json.loads(items) if as_json else items)
    except ValidationError as e:
        said = e.errors(include_url=False)[0]
        where = ".".join(str(p) for p in said["loc"][1:])
        why = f"{where}: " * bool(where) + said["msg"].removeprefix("Value error, ")
    except (ValueError, RecursionError) as e:
        why = f"not JSON: {e}"
    kind = 'not a simulator task such as {"sim": "moving_direction", "n": 8} ' if as_json else ""
    raise UsageError(f"--items {items[:200]}: {kind}{f'({why})' if as_json else why}")


def _with_known_tasks(spec: Any) -> Any:
    from lab.sim.tasks import module_of, named_tasks

    names = named_tasks(spec.sim)
    for name in names:
        module_of(name)
    return spec.model_copy(update={"sim": ",".join(names)})


def _absolute(spec: Any, items: str, video_root: str | None) -> Any:
    """The same source by paths that hold from any folder."""
    field = "file" if hasattr(spec, "file") else "folder"
    path = Path(getattr(spec, field)).expanduser()
    if not (path.is_file() if field == "file" else path.is_dir()):
        raise UsageError(f"--items {items}: no such {field}; {HELP}")
    given = {field: str(path.resolve())}
    if field == "file":
        videos = spec.videos if video_root is None else video_root
        given |= {} if videos is None else {"videos": _folder(videos)}
    return spec.model_copy(update=given)


def _folder(videos: str) -> str:
    path = Path(videos).expanduser()
    if not path.is_dir():
        raise UsageError(f"--video-root {videos}: no such folder")
    return str(path.resolve())
