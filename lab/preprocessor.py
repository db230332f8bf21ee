"""A checkpoint's preprocessor json as a frozen, checked dataclass. Reads json; touches no pixels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from lab.errors import ConfigError

Budget = Literal["frame", "video", "share"]

# Pillow's numbers, as the json writes them
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
LONGEST_SIDE = 16_384  # a frame of such sides takes 3 GB; more is a mistake in the file
SIZE_KEYS = {"height", "width", "shortest_edge", "longest_edge", "min_pixels", "max_pixels"}
FILES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Preprocessor:
    """How a checkpoint wants its frames.

    size, crop_size       as in the json: {"height", "width"}, {"shortest_edge"} or {"shortest_edge", "longest_edge"}.
                          With `patch_size` the two edges are *numbers of pixels* (smallest and largest picture);
                          old min_pixels and max_pixels are folded into them
    resample              name of the filter, one of `lab.resample.RESAMPLES`
    image_mean, image_std per channel, of values already times rescale_factor
    patch_size            side of a patch in pixels; None: the family takes whole frames
    temporal_patch_size   frames per patch; merge_size: patches per side that the model merges into one token
    budget                what the largest number of pixels counts: those of one "frame" (Qwen2-VL, Qwen2.5-VL),
                          of the whole "video" (Qwen3-VL), or the video's, each frame getting an equal "share"
                          (VideoLLaMA3; its smallest number still counts one frame)
    cap_pixels_per_frame, max_video_tokens   the further limit of newer transformers, off unless the json asks
    use_token_compression VideoLLaMA3: drop tokens that hardly differ from the frame before
    pad_to_square         pad with the mean colour before resizing (LLaVA 1.5)
    fps, num_frames, min_frames, max_frames  sampling the checkpoint recommends; None where it does not
    """

    size: dict[str, int]
    crop_size: dict[str, int] | None = None
    do_resize: bool = True
    do_center_crop: bool = False
    do_rescale: bool = True
    do_normalize: bool = True
    resample: str = "bicubic"
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    patch_size: int | None = None
    temporal_patch_size: int = 1
    merge_size: int = 1
    budget: Budget = "frame"
    cap_pixels_per_frame: bool = False
    max_video_tokens: int | None = None
    use_token_compression: bool = False
    pad_to_square: bool = False
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None

    @staticmethod
    def from_folder(source: str | Path | Mapping[str, Any]) -> Preprocessor:
        """The video preprocessor of a checkpoint folder, of a json file, or of the json's content.

        In a folder the first of these that is there counts, as in transformers: "video_processor" inside
        processor_config.json, video_preprocessor_config.json, preprocessor_config.json (the image processor's),
        "image_processor" inside processor_config.json.
        Raises ConfigError if none is there, or if what it says makes no sense.
        """
        if isinstance(source, Mapping):
            where, said = "the preprocessor given", _nested(source)
        else:
            where, said = _find(Path(source))
        return _parse({k: v for k, v in said.items() if v is not None}, where)


def _find(path: Path) -> tuple[str, Mapping[str, Any]]:
    if path.is_file():
        return str(path), _nested(_load(path))
    found = {name: _load(path / name) for name in FILES if (path / name).is_file()}
    nested = found.pop(FILES[0], {})
    if "video_processor" in nested:
        return str(path / FILES[0]), nested["video_processor"]
    for name, said in found.items():
        return str(path / name), said
    if "image_processor" in nested:
        return str(path / FILES[0]), nested["image_processor"]
    raise ConfigError(f"{path}: no preprocessor json; looked for {', '.join(FILES)}")


def _load(path: Path) -> Mapping[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as json: {error}") from None
    if not isinstance(said, dict):
        raise ConfigError(f"{path}: must hold a json object, holds {type(said).__name__}")
    return cast("dict[str, Any]", said)


def _nested(said: Mapping[str, Any]) -> Mapping[str, Any]:
    return said.get("video_processor") or said.get("image_processor") or said


def _parse(said: dict[str, Any], where: str) -> Preprocessor:
    check = _Checked(said, where)
    kind = " ".join(
        str(said.get(k, "")) for k in ("video_processor_type", "image_processor_type", "processor_class")
    )
    patched, crop = "patch_size" in said, check.size("crop_size")
    if said.get("do_normalize", True) and not {"image_mean", "image_std"} <= said.keys():
        raise ConfigError(f"{where}: do_normalize needs image_mean and image_std")
    return Preprocessor(
        size=check.pixel_counts() if patched else check.needed_size(),
        crop_size=crop,
        do_resize=check.flag("do_resize", True),
        do_center_crop=check.flag("do_center_crop", crop is not None),
        do_rescale=check.flag("do_rescale", True),
        do_normalize=check.flag("do_normalize", True),
        resample=check.resample(),
        rescale_factor=check.number("rescale_factor", 1 / 255),
        image_mean=check.triple("image_mean", positive=False),
        image_std=check.triple("image_std", positive=True),
        patch_size=check.count("patch_size"),
        temporal_patch_size=check.count("temporal_patch_size")
        or (2 if patched and "VideoLlama3" not in kind else 1),
        merge_size=check.count("merge_size") or (2 if patched else 1),
        budget="video" if "Qwen3VL" in kind else "share" if "VideoLlama3" in kind else "frame",
        cap_pixels_per_frame=check.flag("cap_pixels_per_frame", False),
        max_video_tokens=check.count("max_video_tokens"),
        use_token_compression=check.flag("use_token_compression", "VideoLlama3" in kind),
        pad_to_square="LlavaImageProcessor" in kind and check.flag("do_pad", False),
        fps=check.number("fps", None),
        num_frames=check.count("num_frames"),
        min_frames=check.count("min_frames"),
        max_frames=check.count("max_frames"),
    )


@dataclass(frozen=True)
class _Checked:
    """Typed reads from the json; every complaint names the file, the field and the value."""

    said: dict[str, Any]
    where: str

    def fail(self, name: str, want: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name} must be {want}, got {self.said.get(name)!r}")

    def flag(self, name: str, default: bool) -> bool:
        got = self.said.get(name, default)
        if not isinstance(got, bool):
            raise self.fail(name, "true or false")
        return got

    def number(self, name: str, default: float | None) -> Any:
        got = self.said.get(name, default)
        if got is not None and not (_is_number(got) and got > 0):
            raise self.fail(name, "a positive number")
        return got

    def count(self, name: str) -> int | None:
        got = self.said.get(name)
        if got is not None and not _is_count(got):
            raise self.fail(name, "a whole number of at least 1")
        return None if got is None else int(got)

    def triple(self, name: str, *, positive: bool) -> tuple[float, float, float]:
        got = self.said.get(name, (0.5, 0.5, 0.5))
        values = [got] * 3 if _is_number(got) else got
        good = isinstance(values, list | tuple) and len(values) == 3 and all(map(_is_number, values))
        if not good or (positive and min(values) <= 0):
            raise self.fail(name, f"three {'positive ' if positive else ''}numbers")
        return (float(values[0]), float(values[1]), float(values[2]))

    def resample(self) -> str:
        got = self.said.get("resample", 3)
        name = RESAMPLE.get(got) if isinstance(got, int) else str(got).lower()
        if name not in RESAMPLE.values():
            raise self.fail("resample", f"one of {', '.join(f'{k} ({v})' for k, v in RESAMPLE.items())}")
        return str(name)

    def size(self, name: str) -> dict[str, int] | None:
        """A size as a dict; a bare number is the short side where there is a crop, else both sides."""
        got: Any = self.said.get(name)
        if got is None:
            return None
        if _is_number(got):
            got = {"shortest_edge": got} if name == "size" and "crop_size" in self.said else [got, got]
        if isinstance(got, list | tuple) and len(got) == 2:
            got = {"height": got[0], "width": got[1]}
        given = {k: v for k, v in got.items() if v is not None} if isinstance(got, dict) else {}
        sides = {k: v for k, v in given.items() if k in ("height", "width")}
        if any(_is_count(v) and v > LONGEST_SIDE for v in sides.values()):
            raise self.fail(name, f"at most {LONGEST_SIDE:,} pixels a side")
        if not given or set(given) - SIZE_KEYS or not all(_is_count(v) for v in given.values()):
            raise self.fail(
                name, "positive whole numbers under height and width, or shortest_edge (and longest_edge)"
            )
        return {str(k): int(v) for k, v in given.items()}

    def needed_size(self) -> dict[str, int]:
        got = self.size("size")
        if got is None or not ({"height", "width"} <= got.keys() or "shortest_edge" in got):
            raise self.fail("size", "given, as height and width or as shortest_edge")
        return got

    def pixel_counts(self) -> dict[str, int]:
        """Smallest and largest number of pixels, wherever the json puts them; top-level min_/max_pixels win."""
        got = self.size("size") or {}
        low = self.count("min_pixels") or got.get("shortest_edge") or got.get("min_pixels")
        high = self.count("max_pixels") or got.get("longest_edge") or got.get("max_pixels")
        if low is None or high is None or low > high:
            raise self.fail("size", f"shortest_edge <= longest_edge, in pixels (found {low} and {high})")
        return {"shortest_edge": low, "longest_edge": high}


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _is_count(x: Any) -> bool:
    return _is_number(x) and x == int(x) and x >= 1
