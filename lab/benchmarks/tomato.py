"""TOMATO (arXiv 2410.23266): six tasks of temporal reasoning, 3 to 7 options, the answer given by its index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab.errors import ConfigError

TYPES = ("human", "object", "simulated")


def rows(data: Any, task: str, folder: Path) -> list[dict[str, Any]]:
    """Rows of data/TASK.json, {id: {question, options, answer, key, demonstration_type, ...}}."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{task}.json: expected a mapping of ids to questions, got {type(data).__name__}")
    return [_row(row, f"{task}:{key}", task, folder) for key, row in data.items()]


def _row(row: Any, name: str, task: str, folder: Path) -> dict[str, Any]:
    _check(row, name)
    video = folder / "videos" / row["demonstration_type"] / f"{row['key']}.mp4"
    return {
        "video": str(video), "question": row["question"], "options": row["options"], "answer": row["answer"],
        "id": name, "task": task,
    }  # fmt: skip


def _check(row: Any, name: str) -> None:
    needed = {"question": str, "options": list, "answer": int, "key": str, "demonstration_type": str}
    for field, kind in needed.items():
        if not isinstance(row, Mapping) or not isinstance(row.get(field), kind):
            raise ConfigError(f"{name}: {field} must be there, a {kind.__name__}; got {str(row)[:60]}")
    if row["demonstration_type"] not in TYPES:
        raise ConfigError(
            f"{name}: demonstration_type {row['demonstration_type']!r}; known: {', '.join(TYPES)}"
        )
    if Path(row["key"]).name != row["key"]:
        raise ConfigError(f"{name}: key {row['key']!r} is not the name of a video")
