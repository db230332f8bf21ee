"""Qwen3-VL: like Qwen2.5-VL, but every tubelet stands alone, after its time in words: <0.3 seconds>vision_start..end."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lab.carriers import Frames, VideoGrid
from lab.model.families.chat import chatml
from lab.model.families.geometry import frame_spans, spoken_time
from lab.model.families.qwen2_5_vl import Qwen25VL, marked
from lab.spans import Span


class Qwen3VL(Qwen25VL):
    """DeepStack features ride along in the model itself; nothing here knows of them.

    The prompt is the one of the release: groups per tubelet and no further marks round them. transformers from 5.10 on
    leaves the template's own vision_start and vision_end standing round the whole, one pair more than in training.
    """

    model_types = ("qwen3_vl",)
    chat = chatml(after_video="", video=("<|vision_start|><|video_pad|><|vision_end|>",))
    default_size = {"shortest_edge": 128 * 32 * 32, "longest_edge": 32 * 32 * 768}
    statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    budget = "video"

    def video_spans(self, frames: Frames, grid: VideoGrid) -> list[Span]:
        """For every tubelet: its time to a tenth of a second, vision_start, its tokens, vision_end."""
        spans: list[Span] = []
        for span in frame_spans(grid):
            text = f"<{spoken_time(span):.1f} seconds>"
            time = Span("separator", text, kind="time", frame=span.frame, seconds=span.seconds)
            spans += [time, *marked([span], frame=span.frame)]
        return spans

    def _timing(self, frames: Frames, config: Any) -> dict[str, Tensor]:
        return {}
