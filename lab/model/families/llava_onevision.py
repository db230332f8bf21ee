"""LLaVA-OneVision: frames pooled 2 x 2 by interpolation, frame-major, then one image_newline for the whole video."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lab.carriers import Frames, VideoGrid
from lab.model.families.base import Family
from lab.model.families.chat import ChatMarks
from lab.model.families.geometry import check_square, clock, pair, timed
from lab.pixels import Preprocessor, stack_pixels


class LlavaOnevision(Family):
    """One tower pass per frame; side -> ceil(side / 2) by bilinear interpolation; +1 newline token, of no frame."""

    model_types = ("llava_onevision",)
    chat = ChatMarks(
        system=("<|im_start|>system \n", "<|im_end|>"),
        user_open="<|im_start|>user ",
        user_close="<|im_end|><|im_start|>assistant\n",
        video=("<video>",),
    )

    def video_grids(self, config: Any, inputs: dict[str, Tensor]) -> list[VideoGrid]:
        """One grid per video of `pixel_values_videos` [video, frame, 3, h, w]."""
        pixels = inputs.get("pixel_values_videos")
        return [] if pixels is None else [_grid(config, pixels.shape[1]) for _ in pixels]

    def pixels(
        self, frames: Frames, config: Any, preprocessor: Preprocessor | None
    ) -> tuple[dict[str, Tensor], VideoGrid]:
        """`pixel_values_videos` [1, frame, 3, side, side], and the grid of one video."""
        height, width = pair(config.vision_config.image_size)
        pre = preprocessor or Preprocessor(size={"height": height, "width": width})
        x = stack_pixels(frames, pre)
        check_square(x, config)
        return {"pixel_values_videos": x[None]}, timed(_grid(config, len(frames)), clock(frames))


def _grid(config: Any, n_frames: int) -> VideoGrid:
    patches = pair(config.vision_config.image_size)[0] // pair(config.vision_config.patch_size)[0]
    side = math.ceil(patches / 2)
    # an odd side does not pool evenly (27 -> 14): every token stands for the same share of the patches
    weight = (patches / side) ** 2
    return VideoGrid.regular(n_frames, side, side, seconds=None, weight=weight).plus_newline()
