"""Attention that tells what its backward pass knows: scores, and what every key is worth to the metric.

1 forward: softmax attention of one world, in blocks of query rows   2 backward, the same blocks: scores are computed
again, <g, v_j> is needed for the gradient anyway, and both are shown to a listener before they are let go. Nothing of
the size heads x positions x positions is ever held. Stands in for the kernel through `Run.attend`.

A path leads from attention as it is to attention without some edges, in a straight line of every row's output: at
`shut` t a row gives (1 - t) softmax(all edges) + t softmax(the edges left). (A gate on the scores would do nothing to a
row that has nearly all its attention on the path, until the very end.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lab.edges.binding import Bound
from lab.edges.formulas import NEG
from lab.errors import RunError
from lab.model.run import Call, LayerParts

CELLS = 1 << 24  # head x query row x key of one block


@dataclass(frozen=True)
class Seen:
    """What a listener is shown: one block of rows of one layer of one world.

    layer    0-based; rows: source positions of the block
    scores   [head, row, key], in at least fp32, -inf where there is no edge; keys are the first ones of the prompt
    lse      [head, row] log-sum-exp of the scores; pattern: [head, row, key] their softmax, zeros in a row without edges
    worth    [head, row, key] <g, v_key>, g the gradient of the metric at the row's output
    weighted [head, row, key] pattern x worth
    path     [head | 1, row, key] edges on the path, None if there are none; left: [head, row] <g, o without them>
    """

    layer: int
    rows: slice
    scores: Tensor
    lse: Tensor
    pattern: Tensor
    worth: Tensor
    weighted: Tensor
    path: Tensor | None
    left: Tensor | None


Listener = Callable[[Seen], None]


@dataclass
class Seat:
    """One world of a batch: where its rows begin (padding stands before), what is cut, who listens.

    base    edges that are cut; path: edges that are cut by the share `shut` (0: as they are, 1: cut)
    """

    offset: int
    n: int
    base: Bound | None = None
    path: Bound | None = None
    shut: float = 0.0
    listener: Listener | None = None


@dataclass(frozen=True)
class Tap:
    """`Run.attend` for a batch of worlds, one seat each."""

    seats: Sequence[Seat]

    def __call__(self, call: Call, query: Tensor, key: Tensor, value: Tensor, kw: dict[str, Any]) -> Tensor:
        """z [world, pos, head, d_head]; query [world, head, pos, d_head], key and value [world, kv_head, pos, d_head]."""
        for name in ("softcap", "s_aux", "position_bias"):
            if kw.get(name) is not None:
                raise RunError(f"edges cannot be scored here: this model's attention uses {name}")
        scaling = kw.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out: list[Tensor] = []
        for world, seat in enumerate(self.seats):
            real = slice(seat.offset, seat.offset + seat.n)
            q, k, v = (t[world, :, real] for t in (query, key, value))
            z = _tapped(q, k, v, _Site(call.parts, float(scale), seat))
            out.append(torch.nn.functional.pad(z, (0, 0, seat.offset, 0)))  # padding stands on the left
        return torch.stack(out).transpose(1, 2)


@dataclass(frozen=True)
class _Site:
    """One layer of one world."""

    parts: LayerParts
    scale: float
    seat: Seat

    def blocks(self, heads: int) -> Iterator[slice]:
        n = self.seat.n
        size = max(1, CELLS // (heads * n))
        yield from (slice(start, min(start + size, n)) for start in range(0, n, size))

    def width(self, rows: slice) -> int:
        """How many keys a block can read at most."""
        return rows.stop if self.parts.causal else self.seat.n

    def scores(self, q: Tensor, k: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """[head, row, key] scores of a block, and the edges on the path. q [head, row, d_head], k [kv_head, key, d_head]."""
        raw = grouped(q, k.transpose(1, 2)) * self.scale
        keep, added, path = self._edges(rows, raw.shape[-1])
        raw = raw if added is None else raw + added.to(raw)
        return raw.masked_fill_(~keep.to(raw.device), NEG), None if path is None else path.to(raw.device)

    def softmaxes(self, scores: Tensor, path: Tensor | None) -> list[tuple[float, Tensor]]:
        """The patterns whose weighted sum is what the rows read: with the path's edges, and without."""
        shut = 0.0 if path is None else self.seat.shut
        both = [(1.0 - shut, scores), (shut, scores if path is None else scores.masked_fill(path, NEG))]
        return [(weight, softmax(x)[1]) for weight, x in both if weight]

    def _edges(self, rows: slice, width: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Edges there are [head | 1, row, key], what base gates add to their scores, and which lie on the path."""
        at, layer, seat = torch.arange(rows.start, rows.stop), self.parts.index, self.seat
        distance = at[:, None] - torch.arange(width)[None, :]
        keep = (distance >= 0 if self.parts.causal else torch.ones_like(distance, dtype=torch.bool))[None]
        if self.parts.window is not None:
            keep = keep & (distance < self.parts.window)[None]
        cut = None if seat.base is None else seat.base.removed(layer, at)
        keep = keep if cut is None else keep & ~cut[..., :width]
        added = None if seat.base is None else seat.base.bias(layer, at)
        path = None if seat.path is None else seat.path.removed(layer, at)
        return keep, _narrow(added, width), _narrow(path, width)


def _narrow(table: Tensor | None, width: int) -> Tensor | None:
    return None if table is None else table[..., :width]


def grouped(x: Tensor, y: Tensor) -> Tensor:
    """x [head, a, b] @ y [kv_head, b, c] -> [head, a, c]: heads of queries share heads of keys in groups."""
    return (x.unflatten(0, (len(y), -1)) @ y[:, None]).flatten(0, 1)


def gathered(x: Tensor, y: Tensor, kv: int) -> Tensor:
    """Sum over the group of x^T @ y: x [head, a, b], y [head, a, c] -> [kv_head, b, c]."""
    return (x.transpose(1, 2) @ y).unflatten(0, (kv, -1)).sum(1)


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp [head, row] and softmax over keys; a row without any key has -inf, and zeros."""
    lse = scores.logsumexp(-1)
    return lse, (scores - lse.masked_fill(lse == NEG, 0.0)[..., None]).exp_()


def _back(softmaxes: Sequence[tuple[float, Tensor]], worth: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the metric at the scores, and the pattern that was read."""
    slopes = [w * p * (worth - (p * worth).sum(-1, keepdim=True)) for w, p in softmaxes]
    return cast(Tensor, sum(slopes)), cast(Tensor, sum(w * p for w, p in softmaxes))


def _seen(layer: int, rows: slice, scores: Tensor, worth: Tensor, path: Tensor | None) -> Seen:
    lse, p = softmax(scores)
    left = None if path is None else (softmax(scores.masked_fill(path, NEG))[1] * worth).sum(-1)
    return Seen(layer, rows, scores, lse, p, worth, p * worth, path, left)


class _Tapped(torch.autograd.Function):
    """q [head, pos, d_head], k and v [kv_head, pos, d_head] -> z [head, pos, d_head]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, site: _Site) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(q.dtype, torch.float32)
        z = torch.empty_like(q)
        for rows in site.blocks(len(q)):
            keys = slice(0, site.width(rows))
            scores, path = site.scores(q[:, rows].to(wide), k[:, keys].to(wide), rows)
            read = sum(weight * p for weight, p in site.softmaxes(scores, path))
            z[:, rows] = grouped(cast(Tensor, read), v[:, keys].to(wide)).to(z.dtype)
        ctx.save_for_backward(q, k, v)
        ctx.site = site
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        site: _Site = ctx.site
        wide = torch.promote_types(g.dtype, torch.float32)
        q, k, v = (t.to(wide) for t in ctx.saved_tensors)
        g = g.to(wide)
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        for rows in site.blocks(len(q)):
            keys = slice(0, site.width(rows))
            scores, path = site.scores(q[:, rows], k[:, keys], rows)
            worth = grouped(g[:, rows], v[:, keys].transpose(1, 2))
            if site.seat.listener is not None:
                site.seat.listener(_seen(site.parts.index, rows, scores, worth, path))
            ds, p = _back(site.softmaxes(scores, path), worth)
            ds *= site.scale
            dq[:, rows] = grouped(ds, k[:, keys])
            dk[:, keys] += gathered(ds, q[:, rows], len(k))
            dv[:, keys] += gathered(p, g[:, rows], len(k))
        kind = ctx.saved_tensors[0].dtype
        return dq.to(kind), dk.to(kind), dv.to(kind), None


def _tapped(q: Tensor, k: Tensor, v: Tensor, site: _Site) -> Tensor:
    return _Tapped.apply(q, k, v, site)  # type: ignore[no-any-return]
