"""Where frames may come from besides video files: folders and lists of images, arrays, tensors, `Frames`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lab.carriers import Frames
from lab.errors import UsageError, VideoError
from lab.video_files import FileSource, on_white
from lab.video_info import VideoInfo

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class Source(Protocol):
    """Frames that can be counted, timed and taken. seconds: one entry a frame, nan where there is no clock."""

    info: VideoInfo
    seconds: list[float]

    def take(self, index: Sequence[int]) -> tuple[list[int], Tensor]:
        """(indices really taken, uint8 pixels [n, 3, h, w]) for ascending distinct indices."""
        ...


def open_source(video: Any) -> Source:
    """The source for whatever a caller calls a video. Raises VideoError or UsageError, see `lab.video.read`."""
    if isinstance(video, str | os.PathLike):
        return _from_path(os.fspath(video))
    if isinstance(video, Frames):
        return TensorSource(video.pixels, video.seconds.tolist(), video.fps, video.duration, video.source)
    if isinstance(video, Tensor | np.ndarray):
        pixels = _pixels(video, "the video")
        return TensorSource(pixels, [float("nan")] * len(pixels), 0.0, 0.0, f"array {tuple(video.shape)}")
    if isinstance(video, list | tuple):
        return ImageSource(list(video), f"list of {len(video)} images")
    raise UsageError(
        f"a video is a path, an array [frame, height, width, 3], Frames or a list of images, got {type(video).__name__}"
    )


def _from_path(video: str | bytes) -> Source:
    name = os.fsdecode(video)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        raise VideoError(
            f"{name}: nothing is read over the network; download it first and give the local path"
        )
    if not name.strip():
        raise VideoError("the name of the video is empty; give a file or a folder of images")
    try:
        path = Path(name).expanduser()
        folder, file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, no such home folder
        why = getattr(error, "strerror", None) or error
        raise VideoError(f"{name[:200]!r}: not a path that can be read ({why}); check it") from None
    if folder:
        return ImageSource(_images_in(path), str(path))
    if file and path.suffix.lower() in IMAGES:
        return ImageSource([path], str(path))
    return FileSource(path)


def _images_in(folder: Path) -> list[Any]:
    try:
        names = [p for p in folder.iterdir() if not p.name.startswith(".")]
    except OSError as error:
        raise VideoError(f"{folder}: the folder cannot be read ({error.strerror})") from None
    images = sorted((p for p in names if p.suffix.lower() in IMAGES), key=_natural)
    if not images:
        seen = ", ".join(sorted(p.name for p in names)[:3]) or "nothing"
        raise VideoError(
            f"{folder}: a folder without images (found {seen}); name the video file, or put images in it"
        )
    return images


def _natural(path: Path) -> list[Any]:
    """Sorts frame2 before frame10."""
    return [
        (0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"([0-9]+)", path.name.lower()) if p
    ]


class TensorSource:
    """Frames already in memory, uint8 [n, 3, h, w]."""

    def __init__(self, pixels: Tensor, seconds: list[float], fps: float, duration: float, name: str) -> None:
        if not pixels.numel():
            raise VideoError(f"{name}: no frames in it, pixels are {tuple(pixels.shape)}")
        self._pixels, self.seconds = pixels, seconds
        self.info = VideoInfo(name, len(pixels), fps, duration, pixels.shape[3], pixels.shape[2])

    def take(self, index: Sequence[int]) -> tuple[list[int], Tensor]:
        if list(index) == list(range(len(self._pixels))):
            return list(index), self._pixels
        return list(index), self._pixels[torch.tensor(list(index), device=self._pixels.device)]


class ImageSource:
    """Images as frames, in the order given: paths, PIL images or arrays [h, w, 3]. They have no clock."""

    def __init__(self, items: list[Any], name: str) -> None:
        if not items:
            raise VideoError(f"{name}: no images in it")
        self._items, self._name = items, name
        self.seconds = [float("nan")] * len(items)
        width, height = _size_of(items[0])
        self.info = VideoInfo(name, len(items), 0.0, 0.0, width, height)

    def take(self, index: Sequence[int]) -> tuple[list[int], Tensor]:
        frames = [_image(self._items[i]) for i in index]
        for i, frame in zip(index, frames, strict=True):
            if frame.shape != frames[0].shape:
                raise VideoError(
                    f"{self._name}: image {i} is {_wh(frame)}, image {index[0]} is {_wh(frames[0])}; "
                    "frames of one video must have one size: resize or crop them first"
                )
        return list(index), torch.stack(frames)


def _wh(frame: Tensor) -> str:
    return f"{frame.shape[2]} x {frame.shape[1]}"


def _size_of(item: Any) -> tuple[int, int]:
    """(width, height), for a path from its header alone."""
    if isinstance(item, np.ndarray | Tensor):
        frame = _image(item)
        return frame.shape[2], frame.shape[1]
    image = _opened(item)
    try:
        turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 lie on their side
    except (OSError, ValueError, SyntaxError) as error:
        raise VideoError(f"{_name(item)}: the image is damaged ({error}); replace it") from None
    return image.size[::-1] if turned else image.size


def _image(item: Any) -> Tensor:
    """uint8 [3, h, w], upright."""
    if isinstance(item, np.ndarray | Tensor):
        return _pixels(item, "an image of the list")[0]
    from PIL import ImageOps

    image = _opened(item)
    try:
        image = ImageOps.exif_transpose(image)
        array = _rgb(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise VideoError(f"{_name(item)}: the image is damaged ({error}); replace it") from None
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _opened(item: Any) -> Any:
    """A PIL image from a path or a PIL image. Raises VideoError."""
    from PIL import Image

    if isinstance(item, Image.Image):
        return item
    if not isinstance(item, str | os.PathLike):
        raise UsageError(f"a list of frames holds paths, PIL images or arrays, got {type(item).__name__}")
    try:
        image = Image.open(item)
    except FileNotFoundError:
        raise VideoError(f"{item}: no such image; check the path") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(
            f"{item}: cannot be read as an image ({type(error).__name__}); check that it opens"
        ) from None
    if getattr(image, "n_frames", 1) > 1 and image.format in {"WEBP", "PNG"}:
        raise VideoError(f"{item}: an animated {image.format}; convert it to gif or mp4")
    return image


def _name(item: Any) -> str:
    return str(item) if isinstance(item, str | os.PathLike) else "an image of the list"


def _rgb(image: Any) -> np.ndarray:
    """uint8 [h, w, 3] from any PIL mode; transparent parts show white, 16-bit grey keeps its upper byte."""
    if image.mode == "F":
        raise ValueError("float image; convert it to 8 bit")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        return np.repeat(
            (grey >> 8 if grey.max(initial=0) > 255 else grey).clip(0, 255).astype(np.uint8)[..., None], 3, 2
        )
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        return on_white(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def _pixels(given: np.ndarray | Tensor, what: str) -> Tensor:
    """uint8 [n, 3, h, w] from [n, h, w, c], [n, c, h, w], [h, w, c] or [c, h, w] with c 1, 3 or 4.

    Where both could be the channels, the last axis is, unless only the other one is 3.
    """
    _check_dtype(str(given.dtype).removeprefix("torch."), given, what)
    x = torch.from_numpy(np.ascontiguousarray(given)) if isinstance(given, np.ndarray) else given
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or not {x.shape[-1], x.shape[1]} & {1, 3, 4}:
        shape = list(given.shape)
        raise UsageError(
            f"{what} must be [frame, height, width, 3] or [frame, 3, height, width], got {shape}"
        )
    if x.shape[-1] in {1, 3, 4} and (x.shape[-1] == 3 or x.shape[1] != 3):
        x = x.movedim(-1, 1)
    if x.shape[1] == 4:
        blended = np.stack([on_white(f) for f in x.movedim(1, -1).cpu().numpy()])
        x = torch.from_numpy(blended).movedim(-1, 1).to(x.device)
    return x.expand(-1, 3, -1, -1).contiguous()


def _check_dtype(dtype: str, x: np.ndarray | Tensor, what: str) -> None:
    if dtype == "uint8":
        return
    if not x.shape or 0 in x.shape:
        raise UsageError(f"{what} must be uint8, got {dtype} {list(x.shape)}")
    if dtype.startswith(("float", "bfloat")):
        t = torch.as_tensor(x).float()
        bad = int((~t.isfinite()).sum())
        good = t[t.isfinite()]
        low, high = (float(good.min()), float(good.max())) if good.numel() else (float("nan"), float("nan"))
        scale = " * 255" if high <= 1.0 else ""
        raise UsageError(
            f"{what} must be uint8 with values 0..255, got {dtype} with values {low:g}..{high:g} and {bad} not finite; "
            f"convert it: (x{scale}).round().clip(0, 255) as uint8"
        )
    raise UsageError(f"{what} must be uint8 with values 0..255, got {dtype}; convert it as the values mean")
