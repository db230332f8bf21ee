"""Values of video tokens laid out over frames, rows and columns; groups of video tokens (players); object places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lab.errors import UsageError
from lab.sim.shapes import SIDE, Scene


def grid_shape(tokens: Any) -> tuple[int, int, int]:
    """(frames, rows, columns) of a prompt's video tokens. Raises UsageError without a video."""
    video = tokens.where(role="video")
    if not len(video):
        raise UsageError("this prompt has no video tokens to attribute to")
    return (
        int(tokens.frame[video].max()) + 1,
        int(tokens.row[video].max()) + 1,
        int(tokens.col[video].max()) + 1,
    )


def standing(tokens: Any) -> Bool[Tensor, "frame row col"]:
    """Where on the grid a token stands: everywhere, unless a mechanism dropped some."""
    video = tokens.where(role="video")
    out = torch.zeros(grid_shape(tokens), dtype=torch.bool)
    out[tokens.frame[video], tokens.row[video], tokens.col[video]] = True
    return out


def painted(tokens: Any, values: Float[Tensor, " pos"]) -> np.ndarray:
    """Values of positions on [frame, row, col]; nan where no token stands."""
    video = tokens.where(role="video")
    out = torch.full(grid_shape(tokens), torch.nan, dtype=torch.float64)
    out[tokens.frame[video], tokens.row[video], tokens.col[video]] = values[video].double()
    return out.numpy()


def pooled(
    values: Float[Tensor, "..."], shape: tuple[int, int, int], *, channels: str
) -> Float[Tensor, "frame row col"]:
    """Attributions of pixels, patches or connector outputs, summed over what each video token covers.

    channels  "first": [frame, channel, y, x]; "last": [..., channel], flat over frames, patches in order of the tokens'
              rows and columns, or (more patches than tokens) of square blocks that become one token
    Raises UsageError where the sizes do not fit.
    """
    frames, rows, cols = shape
    if channels == "first":
        return _areas(values.sum(1), shape)
    flat = values.sum(-1).reshape(-1)
    if len(flat) % frames:
        raise UsageError(f"{len(flat)} values do not divide into {frames} frames")
    each = len(flat) // frames
    if each == rows * cols:
        return flat.reshape(shape)
    side = round((each * rows / cols) ** 0.5)
    if each % (rows * cols) == 0 and side * (each // max(side, 1)) != each:
        return flat.reshape(frames, rows, cols, -1).sum(-1)
    if side * (each // max(side, 1)) != each:
        raise UsageError(f"{each} values a frame do not lie over {rows} x {cols} tokens")
    return _areas(flat.reshape(frames, side, each // side), shape)


def merged(
    values: Float[Tensor, "patch feature"], shape: tuple[int, int, int]
) -> Float[Tensor, "frame row col"]:
    """Attributions of a family's flat patches, whose merged groups lie side by side, summed over each token's group."""
    n = shape[0] * shape[1] * shape[2]
    if values.shape[0] % n:
        raise UsageError(f"{values.shape[0]} patches do not divide into {n} tokens")
    return values.sum(-1).reshape(*shape, -1).sum(-1)


def _areas(values: Float[Tensor, "frame y x"], shape: tuple[int, int, int]) -> Float[Tensor, "frame row col"]:
    frames, rows, cols = shape
    if len(values) != frames:  # tubelets: consecutive frames are one
        values = values.reshape(frames, -1, *values.shape[1:]).sum(1)
    y = torch.arange(values.shape[1]) * rows // values.shape[1]
    x = torch.arange(values.shape[2]) * cols // values.shape[2]
    out = torch.zeros(frames, rows, values.shape[2], dtype=values.dtype).index_add_(1, y, values.cpu())
    return torch.zeros(shape, dtype=values.dtype).index_add_(2, x, out)


# ---- players --------------------------------------------------------------------------------------------------------


def players_of(
    tokens: Any, kind: str, block: Sequence[int], item: Any
) -> tuple[list[str], Bool[Tensor, "player pos"]]:
    """Names and members of the groups of video tokens: "frames", "tubelets" (blocks), "tokens", or "objects".

    Raises UsageError for "objects" of a video whose ground truth is not known.
    """
    shape = grid_shape(tokens)
    place = torch.stack([tokens.frame, tokens.row, tokens.col], 1)
    video = torch.zeros(len(tokens), dtype=torch.bool)
    video[tokens.where(role="video")] = True
    match kind:
        case "frames":
            size = (1, shape[1], shape[2])
        case "tokens":
            size = (1, 1, 1)
        case "tubelets":
            size = tuple(int(b) for b in block)
            if len(size) != 3 or min(size) < 1:
                raise UsageError(
                    f"a tubelet has a length, height and width of at least 1 token, got {tuple(block)}"
                )
        case "objects":
            return _objects(tokens, video, shape, item)
        case _:
            raise UsageError(f"players={kind!r}; use 'frames', 'tubelets', 'tokens' or 'objects'")
    which = torch.div(place, torch.tensor(size), rounding_mode="floor")
    groups = sorted({tuple(w) for w in which[video].tolist()})
    members = torch.stack([(which == torch.tensor(g)).all(1) & video for g in groups])
    return [_named(g, size, kind) for g in groups], members


def _named(group: Sequence[int], size: Sequence[int], kind: str) -> str:
    starts = [g * s for g, s in zip(group, size, strict=True)]
    if kind == "frames":
        return f"frame {starts[0]}"
    ends = [a + s - 1 for a, s in zip(starts, size, strict=True)]
    spans = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return f"frame {spans[0]}, row {spans[1]}, col {spans[2]}"


def _objects(tokens: Any, video: Tensor, shape: tuple[int, int, int], item: Any) -> tuple[list[str], Tensor]:
    """Every object's tokens in all frames, by its bounding boxes; what is in no box is the background."""
    boxes = object_boxes(None if item is None else item.state)
    if not boxes:
        raise UsageError(
            "players='objects' needs a simulated video (its item's state); use 'frames' or 'tubelets'"
        )
    names, groups, free = [], [], video.clone()
    for name, per_frame in boxes.items():
        hit = torch.zeros_like(video)
        for f in range(shape[0]):
            spans = [
                b for i, b in enumerate(per_frame) if i * shape[0] // len(per_frame) == f and b is not None
            ]
            for left, top, right, bottom in spans:
                hit |= (
                    (tokens.frame == f)
                    & _over(tokens.col, left, right, shape[2])
                    & _over(tokens.row, top, bottom, shape[1])
                )
        hit &= free
        if bool(hit.any()):
            names.append(name)
            groups.append(hit)
            free &= ~hit
    return [*names, "background"], torch.stack([*groups, free])


def _over(at: Tensor, low: float, high: float, n: int) -> Tensor:
    """Cells of a grid of `n` over the picture's side that the span covers."""
    cell = SIDE / n
    return ((at + 1) * cell > low) & (at * cell < high)


def object_boxes(state: Any) -> dict[str, list[Any]]:
    """Object -> its bounding box (left, top, right, bottom in pixels of a 64 x 64 picture) in every frame, None if hidden."""
    if isinstance(state, Scene):
        return {f"{state.colour} {state.shape}": list(state.boxes)}
    things = getattr(state, "things", ())
    out: dict[str, list[Any]] = {}
    for i, t in enumerate(things):
        name = t.name if t.name not in out else f"{t.name} #{i + 1}"
        out[name] = [
            (x - r, y - r, x + r, y + r) if shown else None
            for (x, y), r, shown in zip(t.track, t.radius, t.shown, strict=True)
        ]
    return out
