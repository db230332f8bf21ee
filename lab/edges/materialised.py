"""Materialise: a policy as real savings. Rows that nobody reads any more leave the stream, and attention runs in blocks.

1 a row's state matters in a layer if a row that matters later, or a generated token, still reads it there (liveness,
exact on positions)   2 before each layer the other rows are dropped: no attention, no MLP, their keys and values are
never written   3 the rows left attend in blocks, each only to the keys its rows keep: a frame that reads itself and the
system prompt multiplies no other keys. The answers are those of the masked policy, up to the kernel's rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lab.edges.binding import Bound
from lab.edges.closure import read_by
from lab.edges.policy import Policy
from lab.errors import UsageError
from lab.model.answering import Answer, answer
from lab.model.cache import KVCache
from lab.model.ready import Ready
from lab.model.run import Call
from lab.side import Side
from lab.slots import ModelSizes, Plan, Step
from lab.spans import ROLES

LARGEST = 512  # rows of one block of attention


def live_rows(policy: Policy, model: Any, ready: Ready) -> list[Bool[Tensor, " pos"]]:
    """For every layer, the prompt rows whose keys and values must be there: read by a row that matters, or to be.

    Generated tokens count as readers, by the policy's rule for them. Raises UsageError for several worlds.
    """
    if ready.n_worlds != 1:
        raise UsageError(f"a policy is materialised for one prompt at a time, got {ready.n_worlds} worlds")
    c = model.cfg
    bound = policy.bind(ready.maps[0], c.n_layers, c.n_heads, ready.item)
    wanted = torch.zeros(bound.n, dtype=torch.bool)
    wanted[-1] = True  # the answer is read there
    out: list[Tensor] = []
    for layer in reversed(range(c.n_layers)):
        wanted = wanted | _read_by_rows(bound, layer, wanted) | _read_by_generated(bound, layer)
        out.insert(0, wanted)
    return out


def _read_by_rows(bound: Bound, layer: int, rows: Tensor) -> Tensor:
    removed = bound.removed(layer)
    if removed is None:
        return rows.flip(0).cumsum(0).flip(0) > 0  # an uncut row reads all rows up to itself
    return read_by(removed, rows.nonzero().squeeze(1))


def _read_by_generated(bound: Bound, layer: int) -> Tensor:
    removed = bound.generated(layer)[0]
    return bound.real if removed is None else bound.real & ~removed.all(0)


@dataclass
class Rows:
    """A Detour: drops dead prompt rows before each layer, and has the others attend in blocks. For one prompt.

    kept  [layer][pos] rows that stay; edges: 0-based layer -> which edges a policy keeps
    """

    kept: Sequence[Tensor]
    block: Blocks

    def plan(self, cfg: ModelSizes) -> Plan:
        """A mechanism's plan: this detour."""
        return Plan(detours=(self,))

    def __call__(self, layer: int, step: Step, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
        side.run.attend = self.block
        order = side.order.cpu()
        n = len(self.kept[layer])
        stays = (order >= n) | self.kept[layer][order.clamp(max=n - 1)]
        if not bool(stays.all()):
            at = stays.nonzero().squeeze(1)
            resid, side = resid[:, at.to(resid.device)], side.only(at)
        return step(resid, side)


@dataclass
class Blocks:
    """Attention of a run, block by block: rows that stand together and keep the same keys but for causality."""

    n: int  # positions of the prompt
    cuts: dict[int, Tensor]  # 0-based layer -> [head | 1, n + 1, n] removed, last row: generated tokens
    made: dict[tuple[int, int, int], list[_Block]] = field(default_factory=dict)

    def __call__(self, call: Call, query: Tensor, key: Tensor, value: Tensor, kw: dict[str, Any]) -> Tensor:
        """z [1, pos, head, d_head] of queries [1, head, pos, d_head]; keys and values [1, kv_head, k, d_head]."""
        for name in ("softcap", "s_aux", "position_bias"):
            if kw.get(name) is not None:
                raise UsageError(f"materialise knows no attention with {name}; run the policy by its masks")
        q_order = call.side.order.cpu()
        k_order = q_order if call.k_order is None else call.k_order.cpu()
        scale = kw.get("scaling")
        out = torch.empty_like(query)
        for b in self._blocks(call.parts.index, q_order, k_order):
            rows, keys = b.rows, b.keys.to(key.device)
            z = _attend(query[:, :, rows], key[:, :, keys], value[:, :, keys], b, scale)
            out[:, :, rows] = z
        return out.transpose(1, 2)

    def _blocks(self, layer: int, q: Tensor, k: Tensor) -> list[_Block]:
        # rows and keys of a layer are the same in every run of this prompt, until tokens are generated
        name = (layer, len(q), len(k))
        if len(q) == 1:
            return _blocks(self._removed(layer, q, k), q, k)
        if name not in self.made:
            self.made[name] = _blocks(self._removed(layer, q, k), q, k)
        return self.made[name]

    def _removed(self, layer: int, q: Tensor, k: Tensor) -> Tensor | None:
        """[head | 1, q, k] for these rows and keys."""
        cut = self.cuts.get(layer)
        if cut is None:
            return None
        found = cut[:, q.clamp(max=self.n)][..., k.clamp(max=self.n - 1)]
        return found & (k < self.n)


@dataclass(frozen=True)
class _Block:
    """rows: places of queries, side by side; keys: places they read; mask [head | 1, rows, keys] or None: all of them."""

    rows: slice
    keys: Tensor
    mask: Tensor | None
    causal: bool  # no mask but causality: the kernel's own mode


def _blocks(removed: Tensor | None, q: Tensor, k: Tensor) -> list[_Block]:
    causal = k[None, :] <= q[:, None]
    if removed is None:
        same = len(q) == len(k)
        return [
            _Block(
                slice(0, len(q)),
                torch.arange(len(k)),
                None if same or len(q) == 1 else causal[None],
                same and len(q) > 1,
            )
        ]
    keep = causal[None] & ~removed
    return [
        _block(keep, rows) for rows in _runs(removed.any(0) if len(removed) == 1 else removed.all(0), causal)
    ]


def _runs(removed: Tensor, causal: Tensor) -> list[slice]:
    """Where the set of removed keys changes: among keys both rows could read, the two rows of a block agree."""
    both = causal[:-1] & causal[1:]
    change = ((removed[1:] != removed[:-1]) & both).any(1)
    starts = [0, *(change.nonzero().squeeze(1) + 1).tolist()]
    ends = [*starts[1:], len(removed)]
    return [
        slice(i, min(i + LARGEST, b)) for a, b in zip(starts, ends, strict=True) for i in range(a, b, LARGEST)
    ]


def _block(keep: Tensor, rows: slice) -> _Block:
    mine = keep[:, rows]
    keys = mine.any(0).any(0).nonzero().squeeze(1)
    mask = mine[..., keys]
    return _Block(rows, keys, None if bool(mask.all()) else mask, False)


def _attend(query: Tensor, key: Tensor, value: Tensor, b: _Block, scale: float | None) -> Tensor:
    """SDPA of one block; rows without keys give 0."""
    if not key.shape[2]:
        return torch.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    if b.mask is None:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=b.causal, scale=scale)
    mask = b.mask[None].to(query.device)
    dead = ~mask.any(-1, keepdim=True)
    some = bool(dead.any())
    z = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask | dead if some else mask, scale=scale
    )
    return z.masked_fill(dead, 0.0) if some else z


# ---- the handle -----------------------------------------------------------------------------------------------------


@dataclass
class Materialised:
    """A model whose runs save what a policy cuts. Calls, `generate` and `answer` as of the model; one prompt at a time.

    Made by `model.materialise(policy)`. The model itself is as before.
    """

    model: Any
    policy: Policy

    def rows(self, ready: Ready) -> Rows:
        """The detour for one prompt; kept on the prompt."""
        name = f"materialised {self.policy.id}"
        if ready.memo.get(name) is None:
            if ready.plan.detours or ready.plan.stages or ready.plan.layout is not None:
                raise UsageError(
                    "materialise takes prompts as they were laid out, without mechanisms that move tokens"
                )
            ready.memo[name] = Rows(live_rows(self.policy, self.model, ready), self._blocks(ready))
        return ready.memo[name]

    def _blocks(self, ready: Ready) -> Blocks:
        c = self.model.cfg
        bound = self.policy.bind(ready.maps[0], c.n_layers, c.n_heads, ready.item)
        if bool((bound.prompt.role == ROLES.index("pad")).any()):
            raise UsageError("materialise takes prompts without padding; prepare them one by one")
        made: dict[Any, Tensor | None] = {}
        for layer in range(c.n_layers):
            if bound.key(layer) not in made:  # layers that cut the same share one mask
                made[bound.key(layer)] = _stacked(bound.removed(layer), bound.generated(layer)[0], bound.n)
        cuts = {layer: made[bound.key(layer)] for layer in range(c.n_layers)}
        return Blocks(bound.n, {layer: cut for layer, cut in cuts.items() if cut is not None})

    def __call__(self, ready: Any, **kwargs: Any) -> Tensor:
        """Logits at the last position, [world, 1, d_vocab]."""
        ready = self.model._ready(ready)
        return self.model(ready, mechanisms=[self.rows(ready)], policy=_Nothing(), **kwargs)

    def generate(self, ready: Any, **kwargs: Any) -> Any:
        """As `model.generate`."""
        ready = self.model._ready(ready)
        return self.model.generate(ready, mechanisms=[self.rows(ready)], policy=_Nothing(), **kwargs)

    def answer(self, ready: Any, **kwargs: Any) -> Answer:
        """As `model.answer`."""
        ready = self.model._ready(ready)
        kwargs.setdefault("target", None)
        return answer(self.model, ready, mechanisms=[self.rows(ready)], policy=_Nothing(), **kwargs)

    def kv_bytes(self, ready: Ready) -> dict[str, int]:
        """Bytes of keys and values after the prompt: `predicted` under the policy, `full` without it."""
        c = self.model.cfg
        row = 2 * c.n_key_value_heads * c.d_head * torch.finfo(self.model.dtype).bits // 8
        kept = sum(int(k.sum()) for k in self.rows(ready).kept)
        return {"predicted": kept * row, "full": ready.n_pos * c.n_layers * row}

    def kv_measured(self, ready: Ready) -> int:
        """Bytes that a prefill really leaves in the cache."""
        cache = _Counted()
        plan = Plan(detours=(self.rows(ready),), cache=lambda: cache)
        self.model(ready, mechanisms=[_Given(plan)], policy=_Nothing())
        return cache.nbytes()


class _Counted(KVCache):
    """The default cache, made where it can be asked afterwards."""


@dataclass(frozen=True)
class _Given:
    """A plan as a mechanism."""

    made: Plan

    def plan(self, cfg: ModelSizes) -> Plan:
        return self.made


class _Nothing:
    """The policy that cuts nothing: the cuts are in the rows and blocks."""

    def edges(self, tokens: Any, sizes: ModelSizes, item: Any = None) -> dict[int, Any]:
        return {}


def _stacked(removed: Tensor | None, row: Tensor | None, n: int) -> Tensor | None:
    """[head | 1, n + 1, n]: the prompt's rows, then the one generated tokens follow. None if nothing is removed."""
    if removed is None and row is None:
        return None
    heads = max(1 if t is None else len(t) for t in (removed, row))
    top = torch.zeros(heads, n, n, dtype=torch.bool) if removed is None else removed.expand(heads, -1, -1)
    end = torch.zeros(heads, 1, n, dtype=torch.bool) if row is None else row[:, None].expand(heads, -1, -1)
    return torch.cat([top, end], 1)


def materialise(model: Any, policy: Policy) -> Materialised:
    """See `VideoLLM.materialise`. Raises UsageError for gates, and for layers whose attention is not plain."""
    if any(c.gate is not None for c in policy.cuts):
        raise UsageError("gates add to scores and save nothing; materialise takes policies of hard cuts")
    for part in model.parts:
        where = f"layer {part.index + 1} (blocks.{part.index})"
        if part.attn is None or not part.causal or part.window is not None:
            raise UsageError(f"{where} has no plain causal attention; materialise knows no other")
        if getattr(part.attn, "sinks", None) is not None:
            raise UsageError(f"{where} has attention sinks; materialise knows no such attention")
    return Materialised(model, policy)
