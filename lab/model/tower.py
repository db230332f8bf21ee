"""The attention inside a vision tower: its HookPoints, and where every row of it lies on the video.

Layout of `vision.N.attn.*`: q, k, v, z are [frame, patch, head, d_head], scores and pattern [frame, head, q, k]. Towers
that pack all frames into one row (Qwen-VL, VideoLLaMA3) are unpacked: `frame` counts frames (tubelets) over all worlds,
and what lies outside a patch's window is -inf. Should a tower let frames see each other, or frames differ in size, there
is one entry, and `patch` runs over all of them. `tower_map` says which frame, row and column every patch is.
Unwatched layers are computed as if nobody were here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lab.errors import TooBig, UsageError
from lab.model.activations import free_bytes
from lab.model.attention import NEG, masked_softmax, swap
from lab.model.points import Points
from lab.model.run import CURRENT, Front, TowerAttn, changed, watched, written

ATTENTION = ("self_attn", "attn", "attention")
POINTS = (
    "hook_q",
    "hook_k",
    "hook_rot_q",
    "hook_rot_k",
    "hook_v",
    "hook_attn_scores",
    "hook_pattern",
    "hook_z",
)


# ---- the parts of a tower -----------------------------------------------------------------------------------------


class TowerBlock(Points):
    """Points of one tower layer; `attn` only where its attention is found."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__("hook_resid_pre", "hook_resid_post")
        if attention_of(layer) is not None:
            self.attn = Points(*POINTS)


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The self-attention of a tower layer, None if it has no known name."""
    found = (getattr(layer, name, None) for name in ATTENTION)
    return next((m for m in found if isinstance(m, nn.Module)), None)


def attentions(model: Any) -> dict[nn.Module, TowerAttn]:
    """Attention module -> its points, for every tower layer that has any."""
    pairs = zip(model.family.tower_layers(model.hf), model.vision, strict=True)
    found = [(attention_of(layer), block) for layer, block in pairs]
    return {module: TowerAttn(i, block.attn) for i, (module, block) in enumerate(found) if module is not None}


def frame_lengths(inputs: Any) -> tuple[int, ...]:
    """Patches of every frame (tubelet) of a packed tower, over all worlds; () for towers that take frames one by one."""
    grids = [inputs.get(name) for name in ("video_grid_thw", "image_grid_thw")]
    rows = [row for grid in grids if isinstance(grid, Tensor) for row in grid.tolist()]
    return tuple(h * w for t, h, w in rows for _ in range(t))


# ---- torch hooks, placed once when a model is wrapped -------------------------------------------------------------


def place_tower_hooks(layer: nn.Module) -> None:
    """Hooks of one tower layer's attention and projections."""
    attn = attention_of(layer)
    if attn is None:
        return
    attn.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    for name in ("qkv", *(_projection(attn, side) for side in "qk")):
        projection = getattr(attn, name, None)
        if isinstance(projection, nn.Module):
            projection.register_forward_hook(before_rotary, prepend=True)


def _projection(attn: nn.Module, side: str) -> str:
    return f"{side}_norm" if isinstance(getattr(attn, f"{side}_norm", None), nn.Module) else f"{side}_proj"


def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Pre-hook of tower attention. A packed tower would call the attention function once per frame or window: where
    somebody looks it is told of one sequence, so that it calls once, and `attend` keeps to the true borders."""
    front = CURRENT.get()
    mine = front.towers.get(module) if isinstance(front, Front) else None
    if not isinstance(front, Front) or mine is None or not front.shown(mine):
        return None
    cu = kwargs.get("cu_seqlens")
    front.inside, front.borders = mine, None if cu is None else [int(i) for i in cu]
    if cu is None:
        return None
    return args, {**kwargs, "cu_seqlens": cu[[0, -1]]}


def before_rotary(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Forward hook of the projections: hook_q and hook_k before any rotary turn."""
    front = CURRENT.get()
    if not isinstance(front, Front) or front.inside is None:
        return None
    attn, points = front.module_inside(), front.inside.points
    if attn is None or module not in attn.children():
        return None
    if module is getattr(attn, "qkv", None):
        q, k, v = output.chunk(3, -1)
        return torch.cat(
            [_shown(front, attn, points.hook_q, q), _shown(front, attn, points.hook_k, k), v], -1
        )
    names = {id(getattr(attn, _projection(attn, side))): side for side in "qk"}
    side = names.get(id(module))
    return None if side is None else _shown(front, attn, getattr(points, f"hook_{side}"), output)


def _shown(front: Front, attn: nn.Module, point: Any, value: Tensor) -> Tensor:
    """A projection's output through a point, as [frame, patch, head, d_head]."""
    flat = value.reshape(
        1 if front.borders is not None else value.shape[0], -1, heads_of(attn), _d_head(attn, value)
    )
    return _regroup(point, flat, _groups(front, flat.shape[1])).reshape(value.shape)


def heads_of(attn: Any) -> int:
    """Heads of a tower's attention."""
    return int(getattr(attn, "num_heads", None) or attn.config.num_attention_heads)


def _d_head(attn: nn.Module, value: Tensor) -> int:
    return value.shape[-1] // heads_of(attn)


# ---- the attention ------------------------------------------------------------------------------------------------


def attend(
    lab: Any, front: Front, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kw: dict[str, Any]
) -> tuple[Tensor, Any]:  # fmt: skip
    """Tower attention with its points. query, key, value [row, head, pos, d_head] -> z [row, pos, head, d_head].

    Raises TooBig if the maps looked at take more than a quarter of free memory.
    """
    mine = front.towers[module]
    if not front.shown(mine):
        return lab.plain(module)(module, query, key, value, mask, **kw)
    groups, points = _groups(front, query.shape[2]), mine.points
    query, key, value = (
        swap(_regroup(point, swap(x), groups))
        for point, x in ((points.hook_rot_q, query), (points.hook_rot_k, key), (points.hook_v, value))
    )
    z = None
    if watched(points.hook_attn_scores, points.hook_pattern):
        z = _explicit(front, mine, query, key, value, mask, kw)
    if z is None:
        z = _by_borders(lab, front, module, query, key, value, mask, kw)
    front.inside = None
    return _regroup(points.hook_z, z, groups), None


def _groups(front: Front, n: int) -> int | None:
    """Into how many frames a packed sequence of n patches falls; None where frames come as rows by themselves."""
    if front.borders is None:
        return None
    lengths = front.lengths
    ends = set(torch.tensor(lengths or (n,)).cumsum(0).tolist())
    alike = len(set(lengths)) == 1 and sum(lengths) == n
    return len(lengths) if alike and ends <= set(front.borders) else 1


def _regroup(point: Any, x: Tensor, groups: int | None) -> Tensor:
    """[row, pos, head, d_head] through a point, where packed rows fall into frames."""
    if groups is None:
        return point(x)
    return point(x.reshape(groups, -1, *x.shape[2:])).reshape(x.shape)


def _by_borders(
    lab: Any, front: Front, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kw: dict[str, Any]
) -> Tensor:  # fmt: skip
    """The kernel, one call for every frame or window, as transformers does it."""
    if front.borders is None:
        return lab.plain(module)(module, query, key, value, mask, **kw)[0]
    # flash kernels were told of one sequence; the pieces go through SDPA
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"] if "flash" in lab.kernel else lab.plain(module)
    sizes = [b - a for a, b in zip(front.borders, front.borders[1:], strict=False)]
    pieces = zip(*(x.split(sizes, 2) for x in (query, key, value)), strict=True)
    kw = {k: v for k, v in kw.items() if not k.startswith(("cu_seq", "max_length"))}
    return torch.cat([kernel(module, q, k, v, None, **kw)[0] for q, k, v in pieces], 1)


def _explicit(
    front: Front, mine: TowerAttn, query: Tensor, key: Tensor, value: Tensor, mask: Any, kw: dict[str, Any]
) -> Tensor | None:
    """Scores, softmax and values written out; None if the hooks only looked: then the kernel's own numbers hold."""
    groups, points = _groups(front, query.shape[2]), mine.points
    q, k, v = (x if groups is None else _unpacked(x, groups) for x in (query, key, value))
    _check_room(front, q)
    scaling = kw.get("scaling")
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if isinstance(mask, Tensor):
        scores = scores.masked_fill(~mask, NEG) if mask.dtype == torch.bool else scores + mask
    if groups is not None:
        scores = scores.masked_fill(~_within(front.borders or [], groups, scores.device), NEG)
    new_scores, edited = _through(points.hook_attn_scores, scores)
    pattern, again = _through(points.hook_pattern, masked_softmax(new_scores))
    if not (edited or again or pattern.requires_grad):
        return None
    z = swap(pattern.to(v.dtype) @ v)
    return z.reshape(query.shape[0], query.shape[2], *z.shape[2:]).contiguous()


def _through(point: Any, value: Tensor) -> tuple[Tensor, bool]:
    """What the point's hooks leave, and whether they edited it (a value that does not count its writes may have been)."""
    version, before = written(value), value
    new = point(value)
    return new, value.is_inference() or written(value) != version or changed(before, new)


def _unpacked(x: Tensor, groups: int) -> Tensor:
    """[1, head, frame * patch, d_head] -> [frame, head, patch, d_head]"""
    return x[0].unflatten(1, (groups, -1)).transpose(0, 1)


def _within(borders: list[int], groups: int, device: torch.device) -> Tensor:
    """Which patches of a frame see each other, [frame, 1, q, k]: those of one window."""
    window = torch.bucketize(torch.arange(borders[-1]), torch.tensor(borders), right=True)
    window = window.reshape(groups, -1).to(device)
    return (window[:, :, None] == window[:, None])[:, None]


def _check_room(front: Front, q: Tensor) -> None:
    frames, heads, patches = q.shape[:3]
    lazy = ("hook_attn_scores", "hook_pattern")
    maps = sum(watched(getattr(t.points, name)) for t in front.towers.values() for name in lazy)
    need, free = (maps + 2) * frames * heads * patches**2 * q.element_size(), free_bytes(q.device)
    if need > free // 4:
        raise TooBig(
            f"{maps} maps of the tower's attention need {need:,} bytes, more than a quarter of the {free:,} bytes free; "
            "name fewer layers, or fewer frames"
        )


# ---- where the patches lie ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerMap:
    """Which frame (tubelet; counted over all worlds), row and column every row of the tower is; -1 for class tokens.

    `frame`, `row`, `col` are [frame, patch], the axes of `vision.N.attn.*`, in the order the tower's layers have them.
    """

    frame: Int[Tensor, "frame patch"]
    row: Int[Tensor, "frame patch"]
    col: Int[Tensor, "frame patch"]


def tower_map(model: Any, ready: Any) -> TowerMap:
    """Where the tower's patches lie, from the inputs alone. Raises UsageError for a tower whose layout is not known."""
    if frame_lengths(ready.inputs):
        return _packed_map(model.hf.config, ready.inputs)
    pixels = ready.inputs.get("pixel_values_videos", ready.inputs.get("pixel_values"))
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
        raise UsageError(
            "where this tower's patches lie is not known; look at vision.N.hook_resid_post as it is"
        )
    height, width = _sides(model.hf.config.vision_config.patch_size)
    rows, cols = pixels.shape[-2] // height, pixels.shape[-1] // width
    n = pixels.shape[0] * (pixels.shape[1] if pixels.ndim == 5 else 1)
    return _square_map(n, rows, cols, has_class_token(model))


def has_class_token(model: Any) -> bool:
    """Whether the tower's first row of every frame stands for no patch (CLIP, InternVL)."""
    names = [n for n, _ in cast(nn.Module, model.hf).named_parameters() if "lm" not in n.split(".")]
    return any(n.endswith(("class_embedding", "cls_token")) for n in names)


def _sides(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def _square_map(n: int, rows: int, cols: int, extra: bool) -> TowerMap:
    at = torch.arange(rows * cols)
    row, col = (torch.cat([torch.full((int(extra),), -1), x]).expand(n, -1) for x in (at // cols, at % cols))
    frame = torch.where(row[0] < 0, -1, torch.arange(n)[:, None])
    return TowerMap(frame, row, col)


def _packed_map(config: Any, inputs: Any) -> TowerMap:
    """Patches merge x merge together, row by row of such blocks; windows after windows where the tower has them."""
    vision, lengths = config.vision_config, frame_lengths(inputs)
    grid = inputs.get("video_grid_thw", inputs.get("image_grid_thw")).tolist()
    merges = inputs.get("video_merge_sizes")
    default = int(getattr(vision, "spatial_merge_size", 1) or 1)
    sizes = [default] * len(grid) if merges is None else [int(m) for m in merges]
    window = getattr(vision, "window_size", None)
    side = 0 if window is None else int(window) // default // _sides(vision.patch_size)[0]
    places = [_blocks(h, w, m, side) for (t, h, w), m in zip(grid, sizes, strict=True) for _ in range(t)]
    frame = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    row, col = (torch.cat(list(x)) for x in zip(*places, strict=True))
    groups = len(lengths) if len(set(lengths)) == 1 else 1
    return TowerMap(*(x.reshape(groups, -1) for x in (frame, row, col)))


def _blocks(h: int, w: int, merge: int, side: int) -> tuple[Tensor, Tensor]:
    """Row and column of the patches of one frame, in the order of the tower."""
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    row, col = (
        x.reshape(h // merge, merge, w // merge, merge).transpose(1, 2).reshape(-1, merge * merge)
        for x in (row, col)
    )
    if side:  # stable: inside a window the blocks keep their order
        width = -(-(w // merge) // side)
        order = (row[:, 0] // merge // side * width + col[:, 0] // merge // side).argsort(stable=True)
        row, col = row[order], col[order]
    return row.reshape(-1), col.reshape(-1)
