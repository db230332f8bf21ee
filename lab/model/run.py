"""What travels beside one forward pass: the Run, the Call of the layer being run, and the torch hooks that consult them.

One ContextVar holds the current Call (a decoder layer) or Front (the way to the decoder's door). Hook functions are
module-level and find their HookPoint through it, so that deep copies and pickles of a model fire their own points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lab.side import Side

# q_order [q], k_order [k] (source positions) -> bool keep, or float bias to add, broadcastable to [world, head, q, k]
Edges = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LayerParts:
    """The checkpoint's own modules of one decoder layer. `attn` is None where the layer has no softmax attention."""

    layer: nn.Module
    index: int
    attn: nn.Module | None
    mixer: nn.Module | None
    mixed: (
        nn.Module | None
    )  # the module whose output is added to the stream: attn, mixer, or the norm after it
    mlp: nn.Module | None  # likewise: the MLP, or the norm after it
    q: nn.Module | None  # its output is the pre-RoPE query: q_norm if there is one, else q_proj
    k: nn.Module | None
    o: nn.Module | None
    n_heads: int
    n_kv_heads: int
    d_head: int
    window: int | None  # sliding attention window in positions, None for full attention
    causal: bool


@dataclass
class Run:
    """One forward pass (or one cached generation): its cuts, what is looked at, what has been reached.

    attend  stands in for the attention kernel: (call, query, key, value, keywords) -> z [world, pos, head, d_head],
            heads of keys not repeated. For runs whose rows are not one sequence; None: the kernel.
    sinks   by owner; called in every softmax layer before its attention, whatever computes that: (call, query, key,
            k_order, keywords). They look on: query [world, head, q, d_head] and key [world, kv_head, k, d_head] as
            attention sees them, k_order the keys' source positions. `lab.model.masks.keep_rows` and the run's edges say
            what may be read
    absent  layer -> [world, source pos] True where a row left no key in that world (see `Side.absent`)
    notes   what mechanisms keep for as long as the run lasts, each under a key of its own
    """

    edges: Mapping[int, Edges] = field(default_factory=dict)
    look: frozenset[int] = frozenset()
    pad: Tensor | None = None
    entered: set[int] = field(default_factory=set)
    reached: set[int] = field(default_factory=set)
    rope: list[tuple[Tensor, Any]] = field(default_factory=list)  # last (rope positions, embeddings) computed
    masks: dict[int | None, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    policy: Any = None  # what the run was called with; becomes edges once the token maps are known
    attend: Callable[..., Tensor] | None = None
    sinks: dict[Any, Callable[..., None]] = field(default_factory=dict)
    absent: dict[int, Tensor] = field(default_factory=dict)
    notes: dict[Any, Any] = field(default_factory=dict)

    def leave_out(self, layer: int, order: Tensor, absent: Tensor) -> None:
        """Note that the rows at `order` left no key in the layer in the worlds where `absent` [world, pos] says so."""
        held = self.absent.get(layer)
        wide = max(int(order.max()) + 1, 0 if held is None else held.shape[1])
        full = absent.new_zeros(len(absent), wide)
        if held is not None:
            full[:, : held.shape[1]] = held
        full[:, order] = absent
        self.absent[layer] = full


@dataclass
class Call:
    """One layer of one run, as hooks and the attention function see it."""

    run: Run
    parts: LayerParts
    block: Any
    side: Side
    resid_pre: Tensor
    k_order: Tensor | None = None  # source positions of all keys; set by the cache

    def point(self, module: nn.Module) -> HookPoint | None:
        """The HookPoint that this module's output goes through."""
        if module is self.parts.mlp:
            return self.block.hook_mlp_out
        return None

    def gained(self, value: Tensor) -> Tensor:
        """What the MLP adds, times `Side.mlp_gain`."""
        gain = self.side.mlp_gain
        return value if gain is None else value * gain.to(value)


class AtDoor(Exception):
    """Raised to stop transformers at the door of its language model. Never leaves the front end."""


@dataclass(frozen=True)
class TowerAttn:
    """The points of one tower layer's attention (see `lab.model.tower`)."""

    index: int
    points: Any


@dataclass
class Front:
    """The way to the decoder's door: which points tower and connector go through, and what arrived at the door.

    towers   attention modules of the tower; attend: what computes those that somebody looks at
    lengths  patches of every frame of a packed tower; borders: ends of what may see each other in the layer being run
    """

    after: dict[nn.Module, HookPoint]
    before: dict[nn.Module, HookPoint]
    arrived: dict[str, Any] | None = None
    towers: dict[nn.Module, TowerAttn] = field(default_factory=dict)
    attend: Callable[..., Any] | None = None
    lengths: tuple[int, ...] = ()
    every: bool = False  # points fire although no torch hook shows that somebody looks (nnsight)
    inside: TowerAttn | None = None
    borders: list[int] | None = None

    def point(self, module: nn.Module) -> HookPoint | None:
        return self.after.get(module)

    def shown(self, tower: TowerAttn) -> bool:
        """Whether the points of this attention fire."""
        return self.every or watched(*tower.points.children())

    def module_inside(self) -> nn.Module | None:
        """The attention module being run."""
        return next((m for m, t in self.towers.items() if t is self.inside), None)


CURRENT: ContextVar[Call | Front | None] = ContextVar("lab_current", default=None)


def watched(*points: HookPoint) -> bool:
    """Whether anybody holds a torch hook on one of the points (TransformerLens, captum and plain torch alike)."""
    return any(p._forward_hooks or p._backward_hooks or p._forward_pre_hooks for p in points)


def masked_as(output: Any, value: Tensor) -> Any:
    """A module's output with its tensor replaced."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


# ---- torch hooks, placed once when a model is wrapped -------------------------------------------------------------


def at_door(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Pre-hook of the language model: hand over what arrived and stop."""
    front = CURRENT.get()
    if isinstance(front, Front):
        front.arrived = kwargs
        raise AtDoor


def enter_attention(
    module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Pre-hook of self-attention: take the Call that was handed to the layer.

    Gradient checkpointing runs the layer again after the forward has ended, when the ContextVar is gone; the Call
    comes back with the layer's own arguments, and `leave_layer` lets go of it.
    """
    if "lab_call" not in kwargs:
        if isinstance(CURRENT.get(), Call):
            CURRENT.set(None)  # plain use of the wrapped model after a recomputation in this thread
        return None
    kwargs = dict(kwargs)
    CURRENT.set(kwargs.pop("lab_call"))
    return args, kwargs


def leave_layer(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a layer's last module, called even if it raises (as an early-stopped recomputation does).

    A Call left behind would hold a layer's tensors. (transformers 5.23 recomputes the layer's forward, past any hook
    of the layer itself.)
    """
    if isinstance(CURRENT.get(), Call):
        CURRENT.set(None)


def through(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook: the module's output goes through the HookPoint that the current run names."""
    current = CURRENT.get()
    point = None if current is None else current.point(module)
    if point is None:
        return None
    value = output[0] if isinstance(output, tuple) else output
    new = point(current.gained(value) if isinstance(current, Call) else value)
    return None if new is value else masked_as(output, new)


def into(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Pre-hook of a tower layer: its input goes through the HookPoint that the current run names."""
    front = CURRENT.get()
    point = front.before.get(module) if isinstance(front, Front) else None
    if point is None:
        return None
    if args:
        return (point(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": point(kwargs["hidden_states"])}


def pre_rope(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Forward hook of q_proj / k_proj (or q_norm / k_norm): hook_q, hook_k as world pos head d_head."""
    call = CURRENT.get()
    if not isinstance(call, Call):
        return None
    parts, points = call.parts, call.block.attn
    if module is parts.q:
        point, n = points.hook_q, parts.n_heads
    elif module is parts.k:
        point, n = points.hook_k, parts.n_kv_heads
    else:
        return None
    value = output.reshape(*output.shape[:2], n, parts.d_head)
    return point(value).reshape(output.shape)  # also where no torch hook is: nnsight leaves none


def attn_out(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of self-attention: attn_out, and a writable resid_mid (the change rides on attn_out)."""
    call = CURRENT.get()
    if not isinstance(call, Call) or module is not call.parts.mixed:
        return None
    value = output[0] if isinstance(output, tuple) else output
    own = call.block.hook_attn_out if call.parts.attn is not None else call.block.mixer.hook_out
    new = own(value)
    new = _through_mid(call, new)
    return None if new is value else masked_as(output, new)


def _through_mid(call: Call, new: Tensor) -> Tensor:
    """attn_out, such that the stream after it is what hook_resid_mid leaves."""
    point, pre = call.block.hook_resid_mid, call.resid_pre.to(new.device)
    mid = pre + new
    version = written(mid)
    edited = point(mid)
    shown = watched(point) or call.parts.index in call.run.look
    if (
        edited is mid
        and written(mid) == version
        and not (shown and (mid.requires_grad or mid.is_inference()))
    ):
        return new
    # `pre + new` anew: the hook may have written into mid, and gradients at mid must not cancel
    return new + (edited - (pre + new))


def written(value: Tensor) -> int:
    """How often the tensor was written in place; inference tensors do not count."""
    return 0 if value.is_inference() else value._version


@torch.no_grad()
def changed(before: Tensor, after: Tensor) -> bool:
    """Whether an edit changed anything (nan counts as equal to nan)."""
    if before is after:
        return False
    same = before.shape == after.shape and before.dtype == after.dtype
    return not (same and bool(torch.equal(torch.nan_to_num(before), torch.nan_to_num(after))))
