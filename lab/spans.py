"""Spans: the pieces a prompt is made of, each with its role. Torch-free; knows no tokenizer and no model.

A prompt is a list of spans. It is rendered by joining their texts, tokenised once, and every token takes the
role of the span its first character lies in. Text is never searched for afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "video", "time", "region"]
Role = Literal[
    "pad",  # left padding of a shorter world
    "bos",
    "system",  # system prompt
    "frame",  # a video token of one frame (or tubelet)
    "separator",  # timestamps, frame labels, vision start/end marks, newline tokens between or after frames
    "connector",  # text between the video and the question
    "question",  # question stem, without the options
    "option",  # one answer option with its letter
    "instruction",  # "Only give the best option." and the like
    "template",  # chat-template tokens and the answer prefix
    "text",  # text whose role nobody told us (prompts we did not render)
    "last",  # the final prompt position: the answer is read here
    "generated",
]

KINDS: tuple[str, ...] = ("text", "video", "time", "region")
ROLES: tuple[str, ...] = (
    "pad", "bos", "system", "frame", "separator", "connector", "question", "option",
    "instruction", "template", "text", "last", "generated",
)  # fmt: skip

# Names a caller may use in `where(role=...)` beside the roles themselves: unions that hold for any prompt.
GROUPS: dict[str, tuple[str, ...]] = {
    "video": ("frame",),
    "text": ("bos", "system", "connector", "question", "option", "instruction", "template", "text"),
}


@dataclass(frozen=True)
class Span:
    """One piece of the prompt.

    A text span has `text` (kind "text", or "time" for timestamps). A vision span has kind "video", no text, and
    `rows = (start, stop)`: the rows of the `VisionTokens` that stand here, in order.
    `frame` and `seconds` say which frame a vision or timestamp span belongs to; `option` which answer option.
    """

    role: Role
    text: str = ""
    kind: Kind = "text"
    rows: tuple[int, int] | None = None
    frame: int | None = None
    option: int | None = None
    seconds: float | None = None
