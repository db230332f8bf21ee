"""Qwen2.5-VL: tubelets of 2 frames, patches merged 2 x 2, one run of tokens between vision_start and vision_end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lab.carriers import Frames, VideoGrid
from lab.model.families.base import Family
from lab.model.families.chat import chatml
from lab.model.families.geometry import clock, frame_spans, merged_grids, temporal_patch, timed, tubelet_times
from lab.pixels import Budget, Preprocessor, qwen_pixels
from lab.spans import Span

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MARKS = ("<|vision_start|>", "<|vision_end|>")


class Qwen25VL(Family):
    """Rope positions count time in seconds, so the inputs carry `second_per_grid_ts`; M-RoPE needs `mm_token_type_ids`."""

    model_types = ("qwen2_5_vl",)
    marks = MARKS
    needs = ("video_grid_thw", "mm_token_type_ids")
    chat = chatml(
        default_system="You are a helpful assistant.",
        after_video="",
        video=("<|vision_start|><|video_pad|><|vision_end|>",),
    )
    default_size: ClassVar[dict[str, int]] = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
    statistics: ClassVar[tuple[tuple[float, float, float], tuple[float, float, float]]] = (
        _CLIP_MEAN,
        _CLIP_STD,
    )
    budget: ClassVar[Budget] = "frame"

    def video_grids(self, config: Any, inputs: dict[str, Tensor]) -> list[VideoGrid]:
        """One grid per row of `video_grid_thw`; seconds from `second_per_grid_ts` where it is there."""
        grid_thw, seconds = inputs.get("video_grid_thw"), inputs.get("second_per_grid_ts")
        times = None if seconds is None else torch.as_tensor(seconds).flatten().tolist()
        return [] if grid_thw is None else merged_grids(config, grid_thw, _merge(config), times)

    def pixels(
        self, frames: Frames, config: Any, preprocessor: Preprocessor | None
    ) -> tuple[dict[str, Tensor], VideoGrid]:
        """`pixel_values_videos` [patch, feature], `video_grid_thw` [1, 3] and what else the family's rope asks for."""
        x, grid_thw = qwen_pixels(frames, self._preprocessor(config, preprocessor))
        grid = merged_grids(config, grid_thw, _merge(config))[0]
        times = tubelet_times(clock(frames), temporal_patch(config))
        inputs = {"pixel_values_videos": x, "video_grid_thw": grid_thw, **self._timing(frames, config)}
        return inputs, timed(grid, times)

    def video_spans(self, frames: Frames, grid: VideoGrid) -> list[Span]:
        """vision_start, the tubelets, vision_end."""
        return marked(frame_spans(grid))

    def _preprocessor(self, config: Any, given: Preprocessor | None) -> Preprocessor:
        mean, std = self.statistics
        pre = given or Preprocessor(size=self.default_size, image_mean=mean, image_std=std)
        return replace(
            pre,
            patch_size=int(config.vision_config.patch_size),
            temporal_patch_size=temporal_patch(config),
            merge_size=_merge(config),
            budget=self.budget,
        )

    def _timing(self, frames: Frames, config: Any) -> dict[str, Tensor]:
        fps = sampled_fps(frames)
        # 1.0 is what the model itself assumes when nobody says
        seconds = temporal_patch(config) / fps if fps > 0 else 1.0
        return {"second_per_grid_ts": torch.tensor([seconds], device=frames.pixels.device)}


def marked(spans: Sequence[Span], *, frame: int | None = None, seconds: float | None = None) -> list[Span]:
    """The spans between vision_start and vision_end."""
    start, end = (Span("separator", text, frame=frame, seconds=seconds) for text in MARKS)
    return [start, *spans, end]


def sampled_fps(frames: Frames) -> float:
    """Sampled frames per second of source, as transformers counts it: sampled / total frames * fps; 0.0 if unknown."""
    total = round(frames.duration * frames.fps)
    if total > 0:
        return len(frames) / total * frames.fps
    span = float(frames.seconds[-1] - frames.seconds[0]) if len(frames) > 1 else 0.0
    return (len(frames) - 1) / span if span > 0 else 0.0


def _merge(config: Any) -> int:
    return int(config.vision_config.spatial_merge_size)
