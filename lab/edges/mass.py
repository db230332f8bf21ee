"""Segment mass: how much of its attention every row gives to every segment of the prompt, in all layers and heads.

    mass = segment_mass(model, ready)                      # or with policy=, or inside `with model.pruned(policy)`
    mass.mean                                              # [layer, head, query segment, key segment]
    segment_mass(model, ready, rows=True).rows             # [layer, head, pos, key segment]

The mass that a row gives to a segment is the sum of its pattern over the segment's keys. That is the row's attention
over values that are 1 on the segment and 0 elsewhere, so the fast kernel computes it: in the layer's own call, where
these columns are put beside the values', or in a call of its own (half precision, more segments than a head has
dimensions, hooks on scores or pattern). No object of positions x positions is made. What is measured is the softmax
over the edges that are kept, before any hook on scores or pattern.
High mass is not importance: sinks draw it (arXiv 2503.03321). It is a baseline to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lab.carriers import TokenMap, VideoQA
from lab.edges.segments import segment
from lab.errors import RunError, TooBig, UsageError
from lab.model.activations import free_bytes
from lab.model.attention import NEG, with_edges
from lab.model.masks import keep_rows, needs_mask
from lab.model.run import Call, Run, watched
from lab.result import Result
from lab.spans import ROLES

UNIT = "attention mass (share of a query row)"
CELLS = 1 << 20  # masks are made in blocks of at most so many head x query x key cells
HEAD_BYTES = 1 << 20  # of what a kernel returns at once on a CPU; a GPU is only busy with more


@dataclass(frozen=True)
class Mass:
    """Attention mass between segments of one prompt. Layers without softmax attention hold nan.

    names   the segments
    n_rows  positions of each segment
    sums    [layer, head, query segment, key segment], summed over the query segment's rows, float64
    n_ran   [layer, query segment] rows of each segment that a layer ran: fewer than `n_rows` where a mechanism lets
            rows skip the layer
    rows    [layer, head, pos, key segment] if asked for: every row by itself, nan where a layer did not run a row
    """

    names: tuple[str, ...]
    n_rows: tuple[int, ...]
    sums: Float[Tensor, "layer head query key"]
    n_ran: Int[Tensor, "layer query"]
    rows: Float[Tensor, "layer head pos key"] | None = None

    @property
    def mean(self) -> Float[Tensor, "layer head query key"]:
        """Mass per row of the query segment that the layer ran: 0..1; nan where it ran none.

        Over segments that partition the prompt it sums to 1 (0 in rows without a key).
        """
        return self.sums / self.n_ran[:, None, :, None]

    def result(self, name: str = "segment attention mass") -> Result:
        """The mean as a Result with axes (layer, head, query, key); layers 1-based."""
        layers, heads = self.sums.shape[:2]
        return Result(
            values=self.mean.numpy(), axes=("layer", "head", "query", "key"), unit=UNIT, name=name, recipe={},
            coords={
                "layer": list(range(1, layers + 1)), "head": list(range(heads)), "query": list(self.names),
                "key": list(self.names),
            },
            notes={"n_rows": dict(zip(self.names, self.n_rows, strict=True))},
        )  # fmt: skip


def partition(tokens: TokenMap) -> tuple[str, ...]:
    """Segments that partition this prompt's real positions: every frame, every option, and the other roles."""
    roles = dict.fromkeys(tokens.roles())
    numbered = {"frame": tokens.frame, "option": tokens.option}
    names: list[str] = []
    for role in roles:
        column, here = numbered.get(role), tokens.role == ROLES.index(role)
        if column is not None and bool((column[here] >= 0).all()):
            names += [f"{role}:{n}" for n in column[here].unique().tolist()]
        elif role != "pad":
            names.append(role)
    return tuple(names)


@torch.no_grad()
def segment_mass(
    model: Any, ready: Any, segments: Sequence[str] | None = None, *, policy: Any = None, rows: bool = False
) -> Mass:
    """One run of `ready` (a Ready or VideoQA, one world), with the attention mass between its segments.

    segments  names as in `lab.edges.segments`, overlapping or not; None: `partition` of the prompt
    policy    measure under these cuts; None: those of an open `model.pruned`, if any
    rows      keep every row by itself too: layers x heads x positions x segments x 4 bytes
    Raises UsageError for unknown or empty segments and for several worlds; TooBig if the rows would not fit in memory;
    RunError where a layer's attention is not a plain softmax.
    """
    ready = model._ready(ready)
    if ready.n_worlds != 1:
        raise UsageError(f"segment mass takes one world, got {ready.n_worlds}; prepare them one by one")
    run = Run(policy=model.pruning.chosen(policy))
    with model.plan_hooks(ready.plan), model.lock.shared():
        door, maps = model.arrive(ready, run=run)
        sink = _Sink.over(model, maps[0], ready.item, segments, keep=rows)
        if sink.fits_beside(model):
            run.attend = sink.attend
        else:
            run.sinks[segment_mass] = sink
        model.stream(door, run, plan=ready.plan, tokens=maps)
    n_rows = tuple(int(m.sum()) for m in sink.of)
    return Mass(sink.names, n_rows, sink.sums, sink.n_ran, sink.rows)


@dataclass
class _Sink:
    """Looks on in every layer. of: bool [segment, pos]."""

    names: tuple[str, ...]
    of: Bool[Tensor, "segment pos"]
    sums: Tensor
    n_ran: Tensor
    rows: Tensor | None
    _values: tuple[Tensor, list[Tensor]] | None = None  # for the key positions they were made for

    @staticmethod
    def over(
        model: Any, tokens: TokenMap, item: VideoQA | None, segments: Sequence[str] | None, keep: bool
    ) -> _Sink:
        names = tuple(partition(tokens) if segments is None else segments)
        if not names:
            raise UsageError("no segments given; leave segments out for a partition of the prompt")
        of = torch.zeros(len(names), len(tokens), dtype=torch.bool)
        for i, name in enumerate(names):
            of[i, segment(tokens, name, item)] = True
        n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
        sums = torch.full((n_layers, n_heads, len(names), len(names)), torch.nan, dtype=torch.float64)
        n_ran = torch.zeros(n_layers, len(names), dtype=torch.long)
        shape = (n_layers, n_heads, len(tokens), len(names))
        return _Sink(names, of, sums, n_ran, _room(shape) if keep else None)

    def fits_beside(self, model: Any) -> bool:
        """Whether one kernel call can give z and mass: enough precision, and nobody edits scores or pattern."""
        points = [b.attn for b, p in zip(model.blocks, model.parts, strict=True) if p.attn is not None]
        free = not any(watched(p.hook_attn_scores, p.hook_pattern) for p in points)
        exact = model.dtype in (torch.float32, torch.float64)
        return free and exact and len(self.names) <= model.cfg.d_head

    def attend(self, call: Call, query: Tensor, key: Tensor, value: Tensor, kw: dict[str, Any]) -> Tensor:
        """In the kernel's place: the segments' columns stand beside the values', and one call does both."""
        _refuse(kw)
        k_order = call.side.order if call.k_order is None else call.k_order
        d, per, scaling = query.shape[-1], query.shape[1] // key.shape[1], kw.get("scaling")
        n = len(self.names)
        beside = self._columns(k_order, query)[0][:, : n + -n % 8]  # kernels like round widths
        z = torch.empty_like(query[0].transpose(0, 1))
        for heads in torch.arange(query.shape[1]).split(_together(query)):
            q, k, v = (
                t[0, at.to(t.device)]
                for t, at in ((query, heads), (key, heads // per), (value, heads // per))
            )
            v = torch.cat([v, beside.to(v.dtype).expand(len(heads), -1, -1)], -1)
            q, k = (
                torch.nn.functional.pad(t, (0, beside.shape[1])) for t in (q, k)
            )  # zeros add nothing to a score
            out = _mass(call, q, k, [v], k_order, heads, d**-0.5 if scaling is None else scaling)
            z[:, heads.to(z.device)] = out[..., :d].transpose(0, 1)
            self._note(call, heads, out[..., d : d + n])
        return z[None]

    def __call__(self, call: Call, query: Tensor, key: Tensor, k_order: Tensor, kw: dict[str, Any]) -> None:
        """Beside the layer's own kernel."""
        _refuse(kw)
        per, values = query.shape[1] // key.shape[1], self._columns(k_order, query)
        for heads in torch.arange(query.shape[1]).split(_together(query)):
            q, k = query[0, heads.to(query.device)], key[0, (heads // per).to(key.device)]
            found = _mass(call, q, k, values, k_order, heads, kw.get("scaling"))
            self._note(call, heads, found[..., : len(self.names)])

    def _note(self, call: Call, heads: Tensor, found: Tensor) -> None:
        """Keep the mass [head, q, segment] of some heads of a layer."""
        layer, order, found = call.parts.index, call.side.order.cpu(), found.cpu()
        here = self.of[:, order]
        self.n_ran[layer] = here.sum(1)
        self.sums[layer, heads] = here.double() @ found.double()
        if self.rows is not None:
            self.rows[layer, heads[:, None], order] = found.to(self.rows.dtype)

    def _columns(self, k_order: Tensor, like: Tensor) -> list[Tensor]:
        """Values that are 1 on a segment: [k, d_head] each, the last one filled up with zeros."""
        if self._values is None or self._values[0] is not k_order:
            # half precision would round the sums
            wide, width = torch.promote_types(like.dtype, torch.float32), like.shape[-1]
            here = self.of[:, k_order.cpu()].T.to(wide)
            filled = torch.nn.functional.pad(here, (0, -here.shape[1] % width))
            self._values = k_order, [part.contiguous() for part in filled.split(width, 1)]
        return [v.to(like.device) for v in self._values[1]]


def _refuse(kw: dict[str, Any]) -> None:
    for name in ("softcap", "s_aux", "position_bias"):
        if kw.get(name) is not None:
            raise RunError(f"segment mass knows no {name}, which this model's attention uses")


def _together(query: Tensor) -> int:
    """Heads that go through the kernel at once: what it returns is as wide as the heads, however few segments there are."""
    most = HEAD_BYTES if query.device.type == "cpu" else 16 * HEAD_BYTES
    return max(1, most // (4 * query.shape[2] * query.shape[3]))


def _room(shape: tuple[int, ...]) -> Tensor:
    need, free = 4 * torch.Size(shape).numel(), free_bytes(torch.device("cpu"))
    if need > free // 2:
        raise TooBig(
            f"the mass of every row takes {need:,} bytes, more than half of the {free:,} free; leave rows out, or name "
            "fewer segments"
        )
    return torch.full(shape, torch.nan)


def _mass(
    call: Call,
    q: Tensor,
    k: Tensor,
    values: list[Tensor],
    k_order: Tensor,
    heads: Tensor,
    scaling: float | None,
) -> Float[Tensor, "head q column"]:
    """Of some heads: q and k [head, pos, d_head]."""
    q, k = q.to(values[0].dtype)[None], k.to(values[0].dtype)[None]
    if call.run.edges.get(call.parts.index) is None and not needs_mask(call, q.shape[2], k_order):
        return _attend(q, k, values, None, scaling)
    blocks = [_block(q[:, :, at], k, values, mask, scaling) for at, mask in _masks(call, k_order, q, heads)]
    return torch.cat(blocks, 1)


def _attend(q: Tensor, k: Tensor, values: list[Tensor], mask: Tensor | None, scaling: float | None) -> Tensor:
    """[head, q, column] of queries and keys [1, head, pos, d_head]."""
    causal = mask is None and q.shape[2] > 1
    done = [
        scaled_dot_product_attention(
            q, k, v.expand(1, k.shape[1], -1, -1), attn_mask=mask, is_causal=causal, scale=scaling
        )[0]
        for v in values
    ]
    return done[0] if len(done) == 1 else torch.cat(done, -1)


def _masks(call: Call, k_order: Tensor, q: Tensor, heads: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, bool keep or float bias [1, head | 1, q, k]) of some heads, a few rows at a time."""
    order, keys = call.side.order.to(q.device), k_order.to(q.device)
    size = max(1, CELLS // (len(keys) * call.parts.n_heads))
    for start in range(0, len(order), size):
        at = slice(start, start + size)
        keep, bias = with_edges(call, keep_rows(call, order[at], keys), order[at], keys, q.dtype)
        mask = keep if bias is None else bias.masked_fill(~keep, NEG)
        yield at, mask if mask.shape[1] == 1 else mask[:, heads.to(mask.device)]


def _block(q: Tensor, k: Tensor, values: list[Tensor], mask: Tensor, scaling: float | None) -> Tensor:
    """A row with no key left gives no mass: it is shown all keys, and zeroed after (kernels differ on such rows)."""
    kept = mask if mask.dtype == torch.bool else mask > NEG
    dead = ~kept.any(-1, keepdim=True)
    mask = mask | dead if mask.dtype == torch.bool else mask.masked_fill(dead, 0.0)
    return _attend(q, k, values, mask, scaling).masked_fill(dead[0], 0.0)
