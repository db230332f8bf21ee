"""The one attention function, registered with transformers under `lab_<kernel>`; q k v -> edges, scores, pattern, z.

Without a current Call (vision towers, plain use of the wrapped model) it is the kernel it stands in for. Scores and
pattern exist only for layers somebody looks at; a cut alone is a boolean mask under the fast kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lab.errors import RunError, UsageError
from lab.model.masks import base_keep, needs_mask
from lab.model.run import CURRENT, Call, Front, watched

NEG = float("-inf")
Kernel = Callable[..., tuple[Tensor, Any]]


def register(kernel: str) -> str:
    """Register the lab's function around one of transformers' kernels; returns its name.

    The mask function is registered under the same name: without it transformers builds no mask at all, and padding
    and causality vanish without a word. "flash" stays in the name because towers test for it.
    """
    name = kernel if kernel.startswith("lab_") else f"lab_{kernel}"
    kernel = name.removeprefix("lab_")
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _LabAttention(kernel))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    return name


class _LabAttention:
    """The registered callable: one per kernel."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kw: Any
    ) -> tuple[Tensor, Any]:
        call = CURRENT.get()
        if isinstance(call, Front) and call.attend is not None and module in call.towers:
            return call.attend(self, call, module, query, key, value, attention_mask, kw)
        if not isinstance(call, Call) or call.parts.attn is not module:
            return self.plain(module)(module, query, key, value, attention_mask, **kw)
        call.run.reached.add(call.parts.index)
        return _attend(self, call, module, query, key, value, kw), None

    def plain(self, module: nn.Module) -> Kernel:
        """The kernel itself. "eager" lives in each model's own file."""
        if self.kernel == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[self.kernel]


def swap(x: Tensor) -> Tensor:
    """world head pos d_head <-> world pos head d_head."""
    return x.transpose(1, 2)


def through_points(call: Call, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """New keys (after RoPE) and values, [world, kv_head, pos, d_head], through hook_rot_k and hook_v."""
    points = call.block.attn
    return swap(points.hook_rot_k(swap(key))), swap(points.hook_v(swap(value)))


def _attend(
    lab: _LabAttention,
    call: Call,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kw: dict[str, Any],
) -> Tensor:
    points = call.block.attn
    query = swap(points.hook_rot_q(swap(query)))
    if call.k_order is None:  # no cache: a cache has sent its new rows through the points already
        key, value = through_points(call, key, value)
    k_order = call.side.order if call.k_order is None else call.k_order
    layer = call.parts.index
    for sink in tuple(call.run.sinks.values()):
        sink(call, query, key, k_order, kw)
    if call.run.attend is not None:
        return points.hook_z(call.run.attend(call, query, key, value, kw))
    edges = call.run.edges.get(layer)
    look = layer in call.run.look or watched(points.hook_attn_scores, points.hook_pattern)
    if look or lab.kernel == "eager":
        return points.hook_z(_explicit(call, query, key, value, k_order, kw))
    if edges is None and not needs_mask(call, query.shape[2], k_order):
        z, _ = lab.plain(module)(module, query, key, value, None, **kw)
        return points.hook_z(z)
    return points.hook_z(_masked(lab, call, module, query, key, value, k_order, kw))


def _allowed(call: Call, query: Tensor, k_order: Tensor) -> tuple[Tensor, Tensor | None]:
    """Bool keep [world|1, head|1, q, k] and a float bias of such a shape or None."""
    order = call.side.order.to(query.device)
    return with_edges(
        call, base_keep(call, k_order, query.device), order, k_order.to(query.device), query.dtype
    )


def with_edges(
    call: Call, keep: Tensor, order: Tensor, k_order: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A keep mask of the rows at `order` under the run's edges: bool keep, and a float bias or None."""
    edges = call.run.edges.get(call.parts.index)
    if edges is None:
        return keep, None
    cut = edges(order, k_order)
    if not isinstance(cut, Tensor):
        raise UsageError(f"the edges of layer {call.parts.index + 1} gave {type(cut).__name__}, not a tensor")
    ends = (len(order), len(k_order))
    if cut.ndim > 4 or any(a not in (1, b) for a, b in zip(cut.shape[-2:][::-1], ends[::-1], strict=False)):
        raise UsageError(
            f"the edges of layer {call.parts.index + 1} have shape {tuple(cut.shape)}; need {ends} (q, k) at the end"
        )
    cut = cut.reshape((1,) * (4 - cut.ndim) + tuple(cut.shape))
    if cut.dtype == torch.bool:
        return keep & cut, None
    return keep & (cut > NEG), cut.to(dtype)


def _masked(
    lab: _LabAttention, call: Call, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    k_order: Tensor, kw: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The fast kernel under a mask. A row with no key left gives z = 0 and no gradient, on every device.

    Kernels differ in what they make of such a row (0, nan, nan gradients): it is shown all keys, and zeroed after.
    """
    keep, bias = _allowed(call, query, k_order)
    cut = call.parts.index in call.run.edges
    dead = ~keep.any(-1, keepdim=True) if cut else None
    mask = keep if bias is None else bias.masked_fill(~keep, NEG)
    if dead is not None:
        mask = mask | dead if bias is None else mask.masked_fill(dead, 0.0)
    # flash kernels take no mask: such layers fall back to SDPA, which does
    kernel = (
        ALL_ATTENTION_FUNCTIONS["sdpa"]
        if "flash" in lab.kernel or "flex" in lab.kernel
        else lab.plain(module)
    )
    z, _ = kernel(module, query, key, value, mask, **{**kw, "is_causal": False})
    return z if dead is None else z.masked_fill(swap(dead), 0.0)


def _explicit(
    call: Call, query: Tensor, key: Tensor, value: Tensor, k_order: Tensor, kw: dict[str, Any]
) -> Tensor:
    """Scores, softmax and values written out, with their HookPoints."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kw.get(name) is not None:
            raise RunError(
                f"scores are not available here: this model's attention uses {name}; look at hook_z instead"
            )
    points, groups = call.block.attn, query.shape[1] // key.shape[1]
    keep, bias = _allowed(call, query, k_order)
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = kw.get("scaling")
    scores = query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if bias is None else scores + bias
    scores = points.hook_attn_scores(scores.masked_fill(~keep, NEG))
    pattern = points.hook_pattern(masked_softmax(scores))
    weights = nn.functional.dropout(pattern, kw.get("dropout") or 0.0, training=call.parts.layer.training)
    return swap(weights.to(values.dtype) @ values).contiguous()


def masked_softmax(scores: Tensor) -> Tensor:
    """Softmax over keys in fp32; a row of -inf alone becomes zeros (and passes no gradient), never nan."""
    dead = (scores == NEG).all(-1, keepdim=True)
    pattern = scores.masked_fill(dead, 0.0).softmax(-1, dtype=torch.float32)
    return pattern.masked_fill(dead, 0.0).to(scores.dtype)
