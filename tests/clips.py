"""Test clips, made with PyAV when a test asks for them.

Every frame carries its number twice: as a grey level in its left half (coarse, survives lossy codecs) and as eight
black or white bars in its right half (exact). `number(frame)` reads the bars back.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from torch import Tensor

BITS = 8


def picture(i: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 [height, width, 3]: the left half grey and drifting with i, the right half the bits of i as bars."""
    frame = np.zeros((height, width, 3), np.uint8)
    ramp = np.linspace(0, 60, height)[:, None] + 3 * (i % 60)
    frame[:, : width // 2] = ramp[..., None]
    for b in range(BITS):
        top, bottom = b * height // BITS, (b + 1) * height // BITS
        frame[top:bottom, width // 2 :] = 255 * (i >> b & 1)
    return frame


def number(frame: Tensor) -> int:
    """The number that `picture` wrote into a frame [3, h, w]."""
    grey = frame.float().mean(0).numpy()
    height, width = grey.shape
    at = [(2 * b + 1) * height // (2 * BITS) for b in range(BITS)]
    return sum(int(grey[y, width * 5 // 8 : width * 7 // 8].mean() > 127) << b for b, y in enumerate(at))


def numbers(pixels: Tensor) -> list[int]:
    return [number(p) for p in pixels]


def make(
    path: Path,
    codec: str,
    n: int = 40,
    *,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    pix_fmt: str = "yuv420p",
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    draw: Callable[[int, int, int], np.ndarray] = picture,
) -> Path:
    """A clip of n numbered frames of `size` = (width, height). times: presentation times in ms, else i / fps."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream: Any = out.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        base = Fraction(1, 1000) if times else Fraction(1, fps)
        stream.codec_context.time_base = base
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(draw(i, *size), format="rgb24")
            frame.pts, frame.time_base = (times[i] if times else i), base
            out.mux(stream.encode(frame.reformat(format=pix_fmt)))
        out.mux(stream.encode(None))
    return path


X264 = {"crf": "12", "preset": "ultrafast"}
B_FRAMES = {**X264, "preset": "fast", "bf": "3", "g": "12", "b_strategy": "0"}  # reordered, many keyframes
OPEN_GOP = {**B_FRAMES, "x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}
VP9 = {"crf": "10", "b": "0", "cpu-used": "8", "g": "12", "deadline": "realtime"}


def audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("aac", rate=16000, layout="mono")
        for i in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, i * 1024
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def no_frames(path: Path) -> Path:
    """A header that promises pictures, and no picture (mp4 or avi)."""
    options = {"movflags": "frag_keyframe+empty_moov"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as out:
        stream: Any = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()
    return path


def boxes(data: bytes) -> dict[bytes, tuple[int, int]]:
    """Top-level mp4 boxes: name -> (start, length)."""
    found, at = {}, 0
    while at + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[at : at + 8])
        found[name] = (at, length)
        at += max(length, 8)
    return found


def without_index(path: Path) -> Path:
    """The mp4 as a broken download leaves it: the moov box, which comes last, is missing."""
    data = path.read_bytes()
    path.write_bytes(data[: boxes(data)[b"moov"][0]])
    return path


def cut(path: Path, keep: float) -> Path:
    """The first `keep` (0..1) of the bytes of the mdat box (of the whole file if there is none)."""
    data = path.read_bytes()
    start, length = boxes(data).get(b"mdat", (0, len(data)))
    path.write_bytes(data[: start + int(length * keep)])
    return path


def damage(path: Path, start: float, stop: float, seed: int = 0) -> Path:
    """Random bytes over a part (0..1) of the mdat box, or of the whole file."""
    data = bytearray(path.read_bytes())
    first, length = boxes(bytes(data)).get(b"mdat", (0, len(data)))
    a, b = max(first + 8, first + int(length * start)), first + int(length * stop)
    data[a:b] = np.random.default_rng(seed).integers(0, 256, b - a, np.uint8).tobytes()
    path.write_bytes(bytes(data))
    return path


def turn(path: Path, matrix: Iterable[int]) -> Path:
    """Writes a display matrix (a, b, c, d of the upper left 2 x 2) into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (v << 16 for v in matrix)
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    return path
