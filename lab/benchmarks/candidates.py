"""TVBench and MVBench: their rows are read by `lab.benchmark_rows`; here are MVBench's folders of frames."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lab.benchmark_rows import as_item_rows, is_benchmark
from lab.errors import ConfigError

FRAMES_A_SECOND = 3  # of the folders of frames: tvqa/frames_fps3_hq


def rows(data: Any, task: str, folder: Path) -> list[dict[str, Any]]:
    """Rows of json/TASK.json; videos lie below video/. Where a video is a folder of frames, the frames of its clip."""
    if not is_benchmark(data):
        raise ConfigError(f"{task}.json: expected a list of rows with video, question, candidates, answer")
    return [_frames(row) for row in as_item_rows(data, Path(f"{task}.json"), folder / "video")]


def _frames(row: dict[str, Any]) -> dict[str, Any]:
    """Frames have no clock, so a clip of them is written out: the frames of its seconds, counted from 1 as published."""
    place = Path(row["video"])
    if "clip" not in row or not place.is_dir():
        return row
    files = sorted((p for p in place.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")), key=_number)
    start, end = row["clip"]
    first, last = max(1, round(start * FRAMES_A_SECOND)), min(len(files), round(end * FRAMES_A_SECOND))
    if first > last:
        raise ConfigError(
            f"{row['id']}: no frame from {start:g} to {end:g} s in {place}, which has {len(files)} at {FRAMES_A_SECOND} a second"
        )
    rest = {k: v for k, v in row.items() if k != "clip"}
    return {**rest, "video": tuple(str(f) for f in files[first - 1 : last])}


def _number(path: Path) -> tuple[int, str]:
    found = re.search(r"\d+", path.stem)
    return (int(found.group()) if found else 0, path.name)
