"""From decoded frames to the tensors a vision tower takes, in torch, on the device the frames are on.

Equal to transformers' Pillow-based image processors (bit for bit, see tests/test_pixels.py), frame by frame, with the
sizes and the patch order of its *video* processors. Those exist only on torchvision, whose uint8 resize differs from
Pillow's by a level in under 1 % of the values (`lab.resample`), and whose fused rescale-and-normalise rounds
differently (up to 2.4e-7).

What each family asks for:

LLaVA-OneVision    `stack_pixels`: plain resize to a square
LLaVA-NeXT-Video   `stack_pixels`: resize the short side, centre crop
InternVL           `stack_pixels`: plain resize to a square; no tiling for videos
Qwen2(.5)-VL       `qwen_pixels`: size from the pixels of one frame, two frames a patch
Qwen3-VL           `qwen_pixels`: size from the pixels of the whole video, two frames a patch
VideoLLaMA3        `qwen_pixels`: size from an equal share of the video's pixels, one frame a patch
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from lab.carriers import Frames
from lab.errors import ConfigError, VideoError
from lab.preprocessor import Budget as Budget
from lab.preprocessor import Preprocessor as Preprocessor
from lab.resample import resize as resize
from lab.sizes import smart_resize as smart_resize
from lab.sizes import smart_resize_3d as smart_resize_3d
from lab.sizes import target_size as target_size


def stack_pixels(frames: Frames, pre: Preprocessor) -> Float[Tensor, "frame 3 h w"]:
    """Frames resized, cropped and normalised, one picture a frame, float32.

    Raises ConfigError if the preprocessor asks for patches, VideoError if there is no frame.
    """
    if pre.patch_size is not None:
        raise ConfigError(f"the preprocessor asks for patches of {pre.patch_size}: use qwen_pixels")
    x = _checked(frames)
    if pre.pad_to_square:
        x = pad_to_square(x, pre.image_mean)
    if pre.do_resize:
        x = resize(x, target_size(pre, *_shape(x)), pre.resample)
    if pre.do_center_crop:
        x = center_crop(x, _crop_size(pre))
    return _normalised(x, pre)


def qwen_pixels(
    frames: Frames, pre: Preprocessor
) -> tuple[Float[Tensor, "patch values"], Int[Tensor, "1 3"]]:
    """(patches float32 [patch, 3 * t * p * p], grid_thw [[t, rows, cols]] in patches before merging).

    Patches that the model merges stand together (see `patchify`). A frame count that does not fill the last patch
    repeats the last frame; one frame alone is repeated too, where transformers' Qwen3-VL gives up.
    Raises ConfigError if the preprocessor has no patch size or its patches do not fit, VideoError for no frame or
    an aspect ratio above 200.
    """
    if pre.patch_size is None:
        raise ConfigError("the preprocessor has no patch_size: use stack_pixels")
    x = _checked(frames)
    if pre.do_resize:
        x = resize(x, target_size(pre, *_shape(x)), pre.resample)
    return patchify(_normalised(x, pre), pre.patch_size, pre.temporal_patch_size, pre.merge_size)


def patchify(
    x: Float[Tensor, "frame 3 h w"], patch: int, temporal: int, merge: int
) -> tuple[Float[Tensor, "patch values"], Int[Tensor, "1 3"]]:
    """(patches, grid_thw). Order of patches: tubelet, row and column of the merged square, then inside the square.

    Values of one patch: channel, frame of the tubelet, row, column. The last frame is repeated to fill its tubelet.
    """
    n, channels, height, width = x.shape
    if height % (patch * merge) or width % (patch * merge):
        raise ConfigError(
            f"frames of {width} x {height} do not divide into {merge} x {merge} patches of {patch}"
        )
    x = torch.cat([x, x[-1:].expand(-n % temporal, -1, -1, -1)])
    grid = (len(x) // temporal, height // patch, width // patch)
    cut = x.reshape(
        grid[0], temporal, channels, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
    )  # t, frame, channel, (merged row, row in it, y), (merged col, col in it, x)
    patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4)
    return patches, torch.tensor([grid], device=x.device)


def center_crop(x: UInt8[Tensor, "n 3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "n 3 height width"]:
    """The middle `size` = (height, width) of x, padded with 0 where x is smaller.

    An odd margin loses its larger half below and to the right; odd padding gets its larger half above and to the
    left, as transformers' numpy version has it (its torchvision version: below and to the right).
    """
    for dim, want in ((-2, size[0]), (-1, size[1])):
        have = x.shape[dim]
        start = (have - want) // 2 if have >= want else 0
        x = x.narrow(dim, start, min(have, want))
        before, after = -((have - want) // 2), (want - have) // 2
        if have < want:
            x = functional.pad(x, (0, 0, before, after) if dim == -2 else (before, after))
    return x


def pad_to_square(
    x: UInt8[Tensor, "n 3 h w"], mean: tuple[float, float, float]
) -> UInt8[Tensor, "n 3 side side"]:
    """x in the middle of a square as wide as its longer side, on the colour int(255 * mean)."""
    n, _, height, width = x.shape
    side = max(height, width)
    colour = torch.tensor([int(m * 255) for m in mean], dtype=torch.uint8, device=x.device)
    square = colour[None, :, None, None].expand(n, 3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    square[:, :, top : top + height, left : left + width] = x
    return square


def normalise(
    x: UInt8[Tensor, "n 3 h w"],
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    rescale_factor: float | None = 1 / 255,
) -> Float[Tensor, "n 3 h w"]:
    """(x * rescale_factor - mean) / std in float32; None leaves that step out.

    A byte has 256 values, so the arithmetic is done once for each of them on the CPU, in the order transformers does
    it (scaled in float64, rounded, then float32), and looked up: the same bits on every device.
    """
    table = torch.arange(256, dtype=torch.float64) * (1.0 if rescale_factor is None else rescale_factor)
    tables = table.float().repeat(3, 1)
    if mean is not None and std is not None:
        tables = (tables - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
    tables = tables.to(x.device)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    for frame, into in zip(x, out, strict=True):  # frame by frame: the lookup needs 8-byte indices
        for c in range(3):
            into[c] = tables[c][frame[c].long()]
    return out


def compression_mask(
    patches: Float[Tensor, "patch values"],
    grid_thw: Int[Tensor, "video 3"],
    merge_size: int,
    threshold: float = 0.1,
) -> Bool[Tensor, " token"]:
    """VideoLLaMA3's token compression: True for the merged tokens that stay.

    A token of a later frame stays if its pixels differ from the frame before by more than `threshold` on average
    (of values times 255, after normalisation); each frame keeps at least its first token.
    """
    masks: list[Tensor] = []
    for video, (t, rows, cols) in zip(
        patches.split(grid_thw.prod(1).tolist()), grid_thw.tolist(), strict=True
    ):
        tokens = video.reshape(t, rows * cols // merge_size**2, -1)
        moved = tokens.diff(dim=0).abs().mean(-1) * 255 > threshold
        keep = torch.cat([moved.new_ones(1, tokens.shape[1]), moved])
        keep[~keep.any(dim=1), 0] = True
        masks.append(keep.flatten())
    return torch.cat(masks)


def _checked(frames: Frames) -> UInt8[Tensor, "n 3 h w"]:
    if not frames.pixels.numel():
        raise VideoError(f"{frames.source}: no pixels to prepare, frames are {tuple(frames.pixels.shape)}")
    return frames.pixels


def _shape(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3]


def _crop_size(pre: Preprocessor) -> tuple[int, int]:
    if pre.crop_size is None:
        raise ConfigError("do_center_crop is on but the preprocessor has no crop_size")
    short = pre.crop_size.get("shortest_edge", 0)
    return pre.crop_size.get("height", short), pre.crop_size.get("width", short)


def _normalised(x: Tensor, pre: Preprocessor) -> Tensor:
    mean, std = (pre.image_mean, pre.image_std) if pre.do_normalize else (None, None)
    return normalise(x, mean, std, pre.rescale_factor if pre.do_rescale else None)
