"""LLaVA-NeXT-Video: CLIP patches of every frame pooled by `spatial_pool_stride`, frame-major, nothing between frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lab.carriers import Frames, VideoGrid
from lab.model.families.base import Family
from lab.model.families.chat import ChatMarks
from lab.model.families.geometry import check_square, clock, pair, timed
from lab.pixels import Preprocessor, stack_pixels

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class LlavaNextVideo(Family):
    """Vicuna prompt. The 32K and 34B checkpoints bring other chat templates with their tokenizers; those win."""

    model_types = ("llava_next_video",)
    chat = ChatMarks(
        bos="<s>", system=("", " "), user_open="USER: ", user_close=" ASSISTANT:", video=("<video>",)
    )

    def video_grids(self, config: Any, inputs: dict[str, Tensor]) -> list[VideoGrid]:
        """One grid per video of `pixel_values_videos` [video, frame, 3, h, w]."""
        pixels = inputs.get("pixel_values_videos")
        return [] if pixels is None else [_grid(config, v) for v in pixels]

    def pixels(
        self, frames: Frames, config: Any, preprocessor: Preprocessor | None
    ) -> tuple[dict[str, Tensor], VideoGrid]:
        """`pixel_values_videos` [1, frame, 3, side, side], and the grid of one video."""
        side = pair(config.vision_config.image_size)[0]
        pre = preprocessor or Preprocessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            do_center_crop=True,
            image_mean=_CLIP_MEAN,
            image_std=_CLIP_STD,
        )
        x = stack_pixels(frames, pre)
        check_square(x, config)
        return {"pixel_values_videos": x[None]}, timed(_grid(config, x), clock(frames))


def _grid(config: Any, video: Tensor) -> VideoGrid:
    """video [frame, 3, h, w]. Pooling drops what does not fill a window (side 27, stride 2 -> 13)."""
    stride = int(config.spatial_pool_stride)
    side = video.shape[-1] // pair(config.vision_config.patch_size)[0] // stride
    return VideoGrid.regular(len(video), side, side, seconds=None, weight=stride * stride)
