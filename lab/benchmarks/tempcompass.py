"""TempCompass (arXiv 2403.00476): five aspects of time in four formats; options stand in the text of the question.

multi-choice      "What ...?\\nA. left\\nB. right", answer "B. right"
yes_no            options are yes and no
caption_matching  "Which ...?\\nCaption A: ...\\nCaption B: ..." (also Option 1/2, Sentence A/B), answer the whole line
captioning        no options: a caption is asked for; the answer is the fact it must tell
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lab.errors import ConfigError

_LABEL = re.compile(r"(?P<label>[A-Z]\.|(?:Caption|Option|Sentence) [A-Z0-9]:)\s+(?P<text>.*\S)\s*")


def rows(data: Any, task: str, folder: Path) -> list[dict[str, Any]]:
    """Rows of questions/FORMAT.json, {video id: {aspect: [{question, answer}]}}; the task is FORMAT/ASPECT."""
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{task}.json: expected a mapping of videos to questions, got {type(data).__name__}"
        )
    return [
        {
            "video": str(folder / "videos" / f"{video}.mp4"), "id": name, "task": f"{task}/{aspect}",
            **_asked(row, task, name),
        }
        for video, aspect, name, row in _flat(data, task)
    ]  # fmt: skip


def _flat(data: Mapping[str, Any], task: str) -> Iterator[tuple[str, str, str, Any]]:
    for video, aspects in data.items():
        if not isinstance(aspects, Mapping) or Path(video).name != video:
            raise ConfigError(
                f"{task}.json: {video!r}: expected a video's id, and a mapping of aspects to questions"
            )
        for aspect, rows in aspects.items():
            if not isinstance(rows, list):
                raise ConfigError(f"{task}.json: {video}: {aspect}: expected a list of questions")
            for number, row in enumerate(rows, 1):
                yield video, aspect, f"{task}:{video}:{aspect}:{number}", row


def _asked(row: Any, task: str, name: str) -> dict[str, Any]:
    if not isinstance(row, Mapping) or not all(isinstance(row.get(k), str) for k in ("question", "answer")):
        raise ConfigError(f"{name}: expected question and answer, both texts; got {str(row)[:60]}")
    question, answer = row["question"], row["answer"].strip()
    if task == "captioning":
        return {"question": question, "options": [], "answer": _unlabelled(answer)}
    if task == "yes_no":
        return {"question": question, "options": ["yes", "no"], "answer": _index(answer, ["yes", "no"], name)}
    lines = question.split("\n")
    found = [(i, m) for i, line in enumerate(lines) if (m := _LABEL.fullmatch(line.strip()))]
    if len(found) < 2:
        raise ConfigError(f"{name}: no options such as 'A. left' in the question {question[:60]!r}")
    stem = "\n".join(line for i, line in enumerate(lines) if i not in {i for i, _ in found})
    labels, texts = [m["label"] for _, m in found], [m["text"] for _, m in found]
    given = _LABEL.fullmatch(answer)
    at = _index(given["label"] if given else answer, labels if given else texts, name)
    return {"question": stem.strip(), "options": texts, "answer": at}


def _unlabelled(text: str) -> str:
    given = _LABEL.fullmatch(text)
    return given["text"] if given else text


def _index(answer: str, among: list[str], name: str) -> int:
    if answer not in among:
        raise ConfigError(f"{name}: the answer {answer!r} is none of {among!r}")
    return among.index(answer)
