"""What tests of mechanisms run on: a random LLaVA-OneVision of 8 layers with 8 frames x 16 tokens, and simple vision tokens."""

from __future__ import annotations

from typing import Any

import torch

from lab.carriers import Frames, VideoGrid, VideoQA, VisionTokens
from lab.model.zoo import wrap
from lab.preprocessor import Preprocessor
from tests import families

FRAMES, SIDE = 8, 4


def model(layers: int = 8, seed: int = 0) -> Any:
    """Random, fp32, eval: patches of 4 x 4 pixels, 8 x 8 of them pooled to 4 x 4 tokens a frame."""
    hf = families.build(
        "llava_onevision",
        seed=seed,
        text_config={"num_hidden_layers": layers},
        vision_config={"image_size": 32},
    )
    hf.requires_grad_(False)
    pre = Preprocessor(size={"height": 32, "width": 32}, resample="bilinear")
    return wrap(hf, families.tokenizer("llava_onevision"), preprocessor=pre)


def clip(frames: int = FRAMES, *, moving: bool = True, seed: int = 0) -> Frames:
    """A still noisy picture over which a bright block walks, one cell a frame; without `moving` nothing changes."""
    g = torch.Generator().manual_seed(seed)
    still = torch.randint(0, 120, (1, 3, 32, 32), generator=g, dtype=torch.uint8)
    pixels = still.repeat(frames, 1, 1, 1)
    for t in range(frames if moving else 0):
        x = (t % SIDE) * 8
        pixels[t, :, 8:16, x : x + 8] = 250
    return Frames(pixels, torch.arange(frames) / 2.0, torch.arange(frames), 2.0, frames / 2, "block")


def question(frames: int = FRAMES, **kw: Any) -> VideoQA:
    return VideoQA(clip(frames, **kw), "Where?", ("left", "right"), answer=0, id="block")


def vision(x: torch.Tensor, rows: int = 1) -> VisionTokens:
    """x [frame, cell, feature] as vision tokens of `rows` rows, with 1-D rope positions that start at 5."""
    frames, cells, d = x.shape
    grid = VideoGrid.regular(frames, rows, cells // rows, seconds=torch.arange(frames), weight=1.0)
    return VisionTokens(x.reshape(-1, d), grid, (), torch.arange(5, 5 + frames * cells)[None])


def blank(frames: int, *, side: int = 8) -> Frames:
    """Black frames."""
    pixels = torch.zeros(frames, 3, side, side, dtype=torch.uint8)
    return Frames(pixels, torch.arange(float(frames)), torch.arange(frames), 1.0, float(frames), "blank")
