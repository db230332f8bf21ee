"""Against what: the corrupted world, or the baseline, that goes with an item.

twin       the item's own twin (simulated items have one)       reversed   the same frames in reverse order
blank      every frame filled with the video's mean colour      noise, mean   the clean world with its video tokens'
                                                                embeddings corrupted (`lab.patch.noise`, `mean`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab.carriers import VideoQA
from lab.errors import UsageError
from lab.model.ready import Ready
from lab.patch.edits import Edit, mean, noise

NAMES = ("twin", "reversed", "blank", "noise", "mean")
PIXELS = ("pixel_values_videos", "pixel_values")


def usual(items: Sequence[Any]) -> str:
    """ "twin" if every item has one, else "reversed"."""
    asked = [i.item if isinstance(i, Ready) else i for i in items]
    return "twin" if all(isinstance(a, VideoQA) and a.twin is not None for a in asked) else "reversed"


def corrupted(model: Any, ready: Ready, against: Any, n_frames: int, mechanisms: Sequence[Any]) -> Any:
    """The other world of a prepared item, to be prepared like it; `against` is a name, or the world itself."""
    if not isinstance(against, str):
        return against
    match against:
        case "twin":
            twin = None if ready.item is None else ready.item.twin
            if twin is None:
                raise UsageError(
                    f"{_name(ready)} has no twin (simulated items have one); use against='reversed', 'blank' or 'noise', "
                    "or give the other world"
                )
            return model.prepare(twin, **(ready.sampling or {"n_frames": n_frames}), mechanisms=mechanisms)
        case "reversed":
            return _repainted(ready, lambda pixels, axis: pixels.flip(axis))
        case "blank":
            return _repainted(ready, _blank)
        case "noise" | "mean":
            return replace(ready, memo={})
        case _:
            raise UsageError(
                f"against={against!r}; use one of {', '.join(NAMES)}, or give the other world itself"
            )


def standing(against: Any, into: str, seed: int) -> list[Edit]:
    """Edits of the embeddings that make the world `into` corrupted; none where it is one by its video."""
    if against == "noise":
        return [noise(into, site="embed", role="video", seed=seed)]
    return [mean(into, site="embed", role="video")] if against == "mean" else []


def _name(ready: Ready) -> str:
    return repr(ready.item.id or ready.item.question) if ready.item is not None else "this prompt"


def _repainted(ready: Ready, paint: Any) -> Ready:
    """The same prompt over other pixels: as the model is given them, [world, frame, 3, y, x] or patches frame by frame."""
    name = next((n for n in PIXELS if isinstance(ready.inputs.get(n), Tensor)), None)
    if name is None:
        raise UsageError(f"{_name(ready)} has no pixels among its inputs: {', '.join(ready.inputs)}")
    pixels = ready.inputs[name]
    frames = ready.maps[0].n_frames
    shape = pixels.shape
    if pixels.ndim == 5:
        new = paint(pixels, 1)
    elif pixels.ndim == 4 and len(pixels) == frames:
        new = paint(pixels, 0)
    elif len(pixels) % frames == 0:  # flat patches, frame (tubelet) after frame
        new = paint(pixels.reshape(frames, -1, shape[-1]), 0).reshape(shape)
    else:
        raise UsageError(
            f"cannot tell the {frames} frames apart in {name} of shape {tuple(shape)}; give the other world"
        )
    return replace(
        ready, inputs={**ready.inputs, name: new.contiguous()}, memo={}, item=_without_answer(ready.item)
    )


def _without_answer(item: VideoQA | None) -> VideoQA | None:
    """Nobody knows the right answer over other pixels."""
    return (
        None
        if item is None
        else replace(item, answer=None, twin=None, id=f"{item.id}/repainted" if item.id else "")
    )


def _blank(pixels: Tensor, axis: int) -> Tensor:
    """Mean colour of the video: of every channel, or of every entry of a patch."""
    over = [i for i in range(pixels.ndim) if i != (axis + 1 if pixels.ndim >= 4 else pixels.ndim - 1)]
    return pixels.mean(over, keepdim=True).expand_as(pixels) if pixels.ndim >= 4 else _blank_patches(pixels)


def _blank_patches(pixels: Tensor) -> Tensor:
    """Patches hold their channels one after the other (3 equal parts, whatever the tubelet)."""
    third = pixels.shape[-1] // 3
    colours = pixels.reshape(*pixels.shape[:-1], 3, third).mean((0, 1, 3), keepdim=True)
    return torch.ones_like(pixels).reshape(*pixels.shape[:-1], 3, third).mul(colours).reshape(pixels.shape)
