"""Resizing that equals Pillow bit for bit, in torch.

Pillow resizes 8-bit pictures in two passes, one along each side. Each pass weighs the source pixels under the filter
with integers (22 fractional bits), rounds, and clips to 0..255. The products and sums stay below 2**53, so float64
matrix products give the same integers, on any device that has float64; devices without it (mps) are served by the CPU.

Each pass rounds, so their order shows, by a level or so. Before Pillow 13 the horizontal pass always came first. Pillow
13 begins with the vertical one where the height shrinks by more than twice as many pixels as the width: tall frames.
We follow Pillow 13 whatever is installed, so that a number does not depend on it; `first="horizontal"` is the old way.

torch's own `interpolate(..., antialias=True)` on uint8, which torchvision's `resize` calls, keeps 16-bit weights:
it differs from Pillow, and so from this file, by 1 level (rarely 2) in under 1 % of the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from lab.errors import UsageError

BITS = 22  # fractional bits of Pillow's weights: 32 - 8 bits of pixel - 2 of headroom
BLOCK = 32  # outputs per matrix product: small enough that few of a product's weights are zero
CHUNK = 1 << 26  # bytes of float64 that one chunk of frames may take


def _box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def _triangle(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _cubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _hamming(x: float) -> float:
    x = abs(x)
    if x == 0 or x >= 1:
        return float(x == 0)
    return math.sin(x * math.pi) / (x * math.pi) * (0.54 + 0.46 * math.cos(x * math.pi))


def _sinc(x: float) -> float:
    return 1.0 if x == 0 else math.sin(x * math.pi) / (x * math.pi)


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


# filter, and how many source pixels it reaches on either side at scale 1
FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "box": (_box, 0.5), "bilinear": (_triangle, 1.0), "hamming": (_hamming, 1.0),
    "bicubic": (_cubic, 2.0), "lanczos": (_lanczos, 3.0),
}  # fmt: skip
RESAMPLES = ("nearest", *FILTERS)


class _Block(NamedTuple):
    """Outputs of one pass: `weight` [output, stop - start] over the source pixels start..stop."""

    start: int
    stop: int
    weight: Tensor


def resize(
    x: UInt8[Tensor, "n 3 h w"],
    size: tuple[int, int],
    resample: str = "bicubic",
    first: Literal["auto", "horizontal", "vertical"] = "auto",
) -> UInt8[Tensor, "n 3 height width"]:
    """x resized to `size` = (height, width), equal to `PIL.Image.resize((width, height), resample)` bit for bit.

    first  which pass comes first; "auto" decides as Pillow 13 does
    Raises UsageError for another dtype, an unknown filter or a size below 1.
    """
    _check(x, size, resample)
    height, width = size
    if x.device.type == "mps":  # no float64 there
        return resize(x.cpu(), size, resample, first).to(x.device)
    if (height, width) == tuple(x.shape[-2:]):
        return x.clone()
    if x.is_meta:  # shapes alone, for predictions
        return x.new_empty(*x.shape[:2], height, width)
    if resample == "nearest":
        rows, cols = _nearest(x.shape[-2], height), _nearest(x.shape[-1], width)
        return x.index_select(-2, rows.to(x.device)).index_select(-1, cols.to(x.device))
    per_frame = 8 * 3 * max(x.shape[-2], height) * max(x.shape[-1], width)
    chunks = x.split(max(1, CHUNK // per_frame))
    if first == "vertical" or (first == "auto" and _tall(x, size)):
        return torch.cat([_horizontal(_vertical(c, height, resample), width, resample) for c in chunks])
    return torch.cat([_vertical(_horizontal(c, width, resample), height, resample) for c in chunks])


def _tall(x: Tensor, size: tuple[int, int]) -> bool:
    lost_rows, lost_cols = x.shape[-2] - size[0], x.shape[-1] - size[1]
    return lost_rows > 0 and lost_rows > 2 * lost_cols


def _check(x: Tensor, size: tuple[int, int], resample: str) -> None:
    if x.dtype != torch.uint8 or x.ndim != 4:
        raise UsageError(f"resize takes uint8 [n, 3, h, w], got {x.dtype} {tuple(x.shape)}")
    if resample not in RESAMPLES:
        raise UsageError(f"unknown resample {resample!r}; known: {', '.join(RESAMPLES)}")
    if min(size) < 1 or min(x.shape) < 1:
        raise UsageError(f"cannot resize {tuple(x.shape)} to {tuple(size)}: every size must be at least 1")


def _horizontal(x: Tensor, width: int, resample: str) -> Tensor:
    if width == x.shape[-1]:
        return x
    blocks = _blocks(x.shape[-1], width, resample)
    return torch.cat(
        [_to_bytes(x[..., b.start : b.stop].double() @ b.weight.to(x.device).T) for b in blocks], dim=-1
    )


def _vertical(x: Tensor, height: int, resample: str) -> Tensor:
    if height == x.shape[-2]:
        return x
    blocks = _blocks(x.shape[-2], height, resample)
    return torch.cat(
        [_to_bytes(b.weight.to(x.device) @ x[..., b.start : b.stop, :].double()) for b in blocks], dim=-2
    )


def _to_bytes(x: Tensor) -> Tensor:
    return x.add_(1 << (BITS - 1)).div_(1 << BITS).floor_().clamp_(0, 255).to(torch.uint8)


@lru_cache(maxsize=64)
def _blocks(n_in: int, n_out: int, resample: str) -> tuple[_Block, ...]:
    taps = [_taps(o, n_in, n_out, resample) for o in range(n_out)]
    return tuple(_pack(taps[s : s + BLOCK]) for s in range(0, n_out, BLOCK))


def _pack(taps: list[tuple[int, list[int]]]) -> _Block:
    start, stop = min(t[0] for t in taps), max(t[0] + len(t[1]) for t in taps)
    weight = torch.zeros(len(taps), stop - start, dtype=torch.float64)
    for row, (first, weights) in zip(weight, taps, strict=True):
        row[first - start : first - start + len(weights)] = torch.tensor(weights, dtype=torch.float64)
    return _Block(start, stop, weight)


def _taps(out: int, n_in: int, n_out: int, resample: str) -> tuple[int, list[int]]:
    """First source pixel under the filter of output pixel `out`, and the integer weights from there on."""
    kernel, reach = FILTERS[resample]
    scale = n_in / n_out
    stretch = max(scale, 1.0)  # when shrinking, the filter widens: this is the antialiasing
    centre = (out + 0.5) * scale
    start = max(int(centre - reach * stretch + 0.5), 0)
    stop = min(int(centre + reach * stretch + 0.5), n_in)
    raw = [kernel((i + start - centre + 0.5) * (1.0 / stretch)) for i in range(stop - start)]
    total = 0.0
    for (
        w
    ) in raw:  # in order, one by one: from Python 3.12 on, sum() compensates and may differ in the last bit
        total += w
    return start, [_fixed(w / total if total else w) for w in raw]


def _fixed(w: float) -> int:
    return int(w * (1 << BITS) + (-0.5 if w < 0 else 0.5))


@lru_cache(maxsize=64)
def _nearest(n_in: int, n_out: int) -> Tensor:
    """Source pixel of every output pixel. Pillow steps along by adding, so the rounding error adds up; so do we."""
    step = n_in / n_out
    at = accumulate([step * 0.5] + [step] * (n_out - 1))
    return torch.tensor([min(int(a), n_in - 1) for a in at])
