"""InternVL (hf layout): frames are images of g x g tokens after pixel shuffle, each after "FrameN: " between <img> marks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lab.carriers import Frames, VideoGrid
from lab.model.families.base import Family
from lab.model.families.chat import chatml
from lab.model.families.geometry import check_square, clock, frame_spans, pair, timed
from lab.pixels import Preprocessor, stack_pixels
from lab.spans import Span

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InternVL(Family):
    """The placeholder is the image token. Tiles of a cropped image, if a processor made any, would count as frames."""

    model_types = ("internvl",)
    marks = ("<img>", "</img>")
    frames_are_images = True
    chat = chatml(video=("<video>",))

    def placeholder(self, config: Any) -> int:
        """The image token: frames are images to this family."""
        return int(config.image_token_id)

    def video_grids(self, config: Any, inputs: dict[str, Tensor]) -> list[VideoGrid]:
        """One grid per image of `pixel_values` [image, 3, h, w]."""
        pixels = inputs.get("pixel_values")
        return [] if pixels is None else [_grid(config, x[None]) for x in pixels]

    def pixels(
        self, frames: Frames, config: Any, preprocessor: Preprocessor | None
    ) -> tuple[dict[str, Tensor], VideoGrid]:
        """`pixel_values` [frame, 3, side, side], and the grid of one video."""
        height, width = pair(config.vision_config.image_size)
        pre = preprocessor or Preprocessor(
            size={"height": height, "width": width}, image_mean=_IMAGENET_MEAN, image_std=_IMAGENET_STD
        )
        x = stack_pixels(frames, pre)
        check_square(x, config)
        return {"pixel_values": x}, timed(_grid(config, x), clock(frames))

    def video_spans(self, frames: Frames, grid: VideoGrid) -> list[Span]:
        """ "Frame1: <img>...</img>", counted from 1, a newline between frames."""
        spans: list[Span] = []
        for span in frame_spans(grid):
            label = f"Frame{(span.frame or 0) + 1}: "
            label = f"\n{label}" if spans else label
            before, start, end = (Span("separator", t, frame=span.frame) for t in (label, *self.marks))
            spans += [before, start, span, end]
        return spans


def _grid(config: Any, images: Tensor) -> VideoGrid:
    """images [frame, 3, h, w]; pixel shuffle puts 1 / ratio x 1 / ratio patches into one token."""
    ratio = float(config.downsample_ratio)
    side = int(images.shape[-1] // pair(config.vision_config.patch_size)[0] * ratio)
    return VideoGrid.regular(len(images), side, side, seconds=None, weight=round(1 / ratio) ** 2)
