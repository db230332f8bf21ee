"""TVBench and MVBench question files: their rows as rows of our own items, their videos found below a video root.

Both are JSON lists of {video, question, candidates, answer}, the answer a candidate's text; some rows add `start` and
`end`, the seconds of the video the question is about. The file's name is the task. Videos lie in ROOT/TASK (TVBench),
or in ROOT/SOURCE by the set they were taken from (MVBench). Read: daniel-cores/tvbench `infer.ipynb`, `vqa_dataset.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.errors import ConfigError

NEEDED = ("video", "question", "candidates", "answer")
USED = (*NEEDED, "start", "end")
# said about a row's source, and not needed to ask the question
KNOWN = (*USED, "accurate_start", "accurate_end", "fps", "video_length", "question_id", "subtitle")
# where MVBench keeps the videos of a task, below its video folder
MVBENCH = {
    "action_sequence": "star/Charades_v1_480", "action_prediction": "star/Charades_v1_480",
    "object_interaction": "star/Charades_v1_480", "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos", "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation", "moving_direction": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation", "moving_attribute": "clevrer/video_validation",
    "counterfactual_inference": "clevrer/video_validation", "object_shuffle": "perception/videos",
    "action_count": "perception/videos", "state_change": "perception/videos", "character_order": "perception/videos",
    "action_localization": "sta/sta_video", "scene_transition": "scene_qa/video", "fine_grained_pose": "nturgbd",
    "egocentric_navigation": "vlnqa", "episodic_reasoning": "tvqa/frames_fps3_hq",
}  # fmt: skip


def is_benchmark(data: Any) -> bool:
    """Whether a file's content is a list of such rows."""
    return isinstance(data, list) and bool(data) and isinstance(data[0], Mapping) and "candidates" in data[0]


def as_item_rows(rows: Sequence[Any], file: Path, root: Path | None) -> list[dict[str, Any]]:
    """Rows with video, question, options, answer, id, task and clip. `root`: None for the file's own folder.

    Raises ConfigError, naming the row, for unknown or missing keys, an answer that is no candidate, a missing video.
    """
    root = file.parent if root is None else root
    if not root.is_dir():
        raise ConfigError(
            f"no folder {root} to look for videos in; give the benchmark's video folder (--video-root)"
        )
    return [_row(row, f"{file.name} row {i}", file.stem, root, i) for i, row in enumerate(rows, 1)]


def _row(row: Any, where: str, task: str, root: Path, number: int) -> dict[str, Any]:
    _check(row, where)
    candidates = row["candidates"]
    if row["answer"] not in candidates:
        raise ConfigError(
            f"{where}: answer {row['answer']!r} is none of the {len(candidates)} candidates {candidates!r}"
        )
    out = {
        "video": str(_video(row["video"], where, task, root)), "question": row["question"], "options": list(candidates),
        "answer": candidates.index(row["answer"]), "id": f"{task}:{number}", "task": task,
    }  # fmt: skip
    if row.get("start") is not None and row.get("end") is not None:
        out["clip"] = [row["start"], row["end"]]
    return out


def _check(row: Any, where: str) -> None:
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where}: a row is a mapping of {', '.join(NEEDED)}; got {type(row).__name__}")
    missing = [k for k in NEEDED if k not in row]
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing; it has {', '.join(map(str, row))}")
    for key in row:
        if key not in KNOWN:
            near = difflib.get_close_matches(str(key), KNOWN, n=1) or KNOWN
            raise ConfigError(f"{where}: there is no key {key!r} in these files; closest: {', '.join(near)}")
    texts = row["candidates"]
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise ConfigError(f"{where}: candidates must be a list of texts, got {texts!r}")
    if not isinstance(row["video"], str) or not row["video"]:
        raise ConfigError(f"{where}: video must be the name of a file, got {row['video']!r}")


def _video(name: str, where: str, task: str, root: Path) -> Path:
    places = [root / task / name, root / name]
    if task in MVBENCH:
        places.insert(1, root / MVBENCH[task] / name)
    for place in places:
        if place.exists():
            return place
    raise ConfigError(
        f"{where}: no video {name!r} (looked for {', '.join(map(str, places))}); --video-root is the benchmark's video folder"
    )
