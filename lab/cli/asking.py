"""`vlab ask`: one question, one model, one answer. Also what `trace` and `tokens` share with it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.cli.output import Reply, table
from lab.errors import UsageError, VideoError

if TYPE_CHECKING:
    from lab.carriers import VideoQA
    from lab.model.videollm import VideoLLM


@dataclass(frozen=True)
class Setting:
    """Which model, where, and how the video is sampled. None leaves the choice to the model's own defaults."""

    model: str
    device: str | None
    dtype: str | None
    frames: int | None
    fps: float | None

    def __post_init__(self) -> None:
        if self.frames is not None and self.fps is not None:
            raise UsageError(f"--frames {self.frames} and --fps {self.fps:g} are given; choose one")
        if self.frames is not None and self.frames < 1:
            raise UsageError(f"--frames {self.frames}: at least 1 is needed")
        if self.fps is not None and not self.fps > 0:
            raise UsageError(f"--fps {self.fps:g}: it must be above 0")

    def load(self) -> VideoLLM:
        """The model. Raises ModelError, UsageError."""
        from lab.model.zoo import load

        quiet_bars()
        return load(self.model, device=self.device, dtype=self.dtype)

    def outline(self) -> VideoLLM:
        """The model without its weights: enough to prepare. Raises ModelError, UsageError."""
        from lab.model.zoo import outline

        return outline(self.model)

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments of `model.prepare` and of `lab.recipe.VideoSpec`."""
        return {k: v for k, v in (("n_frames", self.frames), ("fps", self.fps)) if v is not None}


def quiet_bars() -> None:
    """No bar for loading weights where nobody watches it move."""
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def question_about(video: str, question: str, options: Sequence[str], answer: str | None) -> VideoQA:
    """The item that the words on the command line describe. Raises VideoError, UsageError."""
    from lab.carriers import LETTERS, VideoQA

    _check_there(video)
    if not question.strip():
        raise UsageError("the question is empty")
    right: int | str | None = answer
    if options and answer is not None:
        letters = list(LETTERS[: len(options)])
        if answer not in options and answer not in letters:
            raise UsageError(
                f"--answer {answer!r} is none of the {len(options)} options, nor a letter {letters[0]}-{letters[-1]}"
            )
        right = list(options).index(answer) if answer in options else letters.index(answer)
    return VideoQA(video, question, tuple(options), right)


def _check_there(video: str) -> None:
    """Before a model is loaded for nothing. Raises VideoError."""
    if "://" in video:
        raise VideoError(
            f"{video}: nothing is read over the network; download it first and give the local path"
        )
    try:
        there = bool(video.strip()) and Path(video).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such home folder
        there = False
    if not there:
        shown = video if len(video) <= 200 else f"{video[:197]}..."
        raise VideoError(f"no video at {shown or 'an empty path'}; give a file or a folder of images")


def ask(item: VideoQA, setting: Setting, max_tokens: int) -> Reply:
    """The model's answer to the item."""
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: at least 1 is needed")
    model = setting.load()
    ready = model.prepare(item, **setting.sampling())
    found = model.answer(ready, max_new_tokens=max_tokens)
    seen = {"model": setting.model, "frames": len(ready.frames or ()), "positions": ready.n_pos}
    if found.letter is None:
        more = {"target": found.target, "logprob": found.logprob} if found.target is not None else {}
        forced = f"\nlog p({found.target!r}) = {found.logprob:.4f}" if found.logprob is not None else ""
        return Reply({"answer": found.text, **more, **seen}, f"{found.text}{forced}")
    return Reply({**choice(found, item), **seen}, choice_text(found, item))


def choice(found: Any, item: VideoQA) -> dict[str, Any]:
    """A multiple-choice answer as plain data."""
    probs = dict(zip(item.options, found.option_probs.tolist(), strict=True))
    return {"letter": found.letter, "answer": found.text, "option_probs": probs, "correct": found.correct}


def choice_text(found: Any, item: VideoQA) -> str:
    """A multiple-choice answer as a table; > marks the choice."""
    verdict = {None: "", True: " (right)", False: f" (wrong: the answer is {item.letter})"}[found.correct]
    rows = [
        (">" if i == found.index else "", f"({chr(65 + i)}) {text}", f"{p:.1%}")
        for i, (text, p) in enumerate(zip(item.options, found.option_probs.tolist(), strict=True))
    ]
    return f"({found.letter}) {found.text}{verdict}\n\n{table(('', 'option', 'probability'), rows)}"
