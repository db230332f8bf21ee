"""Attention over packed rows: rows of many cut worlds stand in one sequence and share one stored clean run.

A row of world w at position p reads the stored keys of rows that are not being run in w, and the new keys of those
that are. Both parts come with their log-sum-exp and are merged exactly. Worlds that run the same rows under the same
mask form a group and are served by one kernel call; no object of positions x positions is made. Where keys are few, the
stored ones are copied before every world's own instead, and there is nothing to merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lab.edges.cutrows import LayerCut, heads_of, rows_of
from lab.errors import RunError
from lab.model.run import Call

NEG = float("-inf")
MASK_CELLS = 1 << 20  # query rows are taken in blocks of at most so many mask cells (head x query x key)
SCORE_CELLS = 1 << 26  # written-out scores, batch x head x query x key
JOINED = 512  # keys up to which it is quicker to put stored and new ones into one sequence
JOINED_SHARE = 8  # and up to how many times the new ones: every world gets a copy of the stored ones
JOINED_ROWS = 32  # query rows taken together there: each block skips the keys after its last row
_CPU_KERNEL: Callable[..., Any] | None = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None
)


J = TypeVar("J", bound="Rows")


class Rows(Protocol):
    """Work that runs rows of a stored run: its first layer, and the most rows it has in a layer."""

    @property
    def start(self) -> int: ...

    @property
    def most(self) -> int: ...


def batches(jobs: Sequence[J], n_rows: int) -> Iterator[list[J]]:
    """Jobs of about `n_rows` rows together, those that begin together side by side."""
    batch: list[J] = []
    held = 0
    for job in sorted(jobs, key=lambda j: (j.start, j.most)):
        if batch and held + job.most > n_rows:
            yield batch
            batch, held = [], 0
        batch.append(job)
        held += job.most
    if batch:
        yield batch


@dataclass(frozen=True)
class Group:
    """Worlds of one layer that run the same rows under the same cut. Their rows stand one after another in the pack.

    first   where the group begins in the pack
    worlds  how many worlds
    rows    source positions of one world's rows, ascending [rows]
    cut     the layer's cut for all of them (see `lab.edges.cutrows`), or None
    other   another stored run, and how many of the first stored rows are its instead of the clean run's; or None
    """

    first: int
    worlds: int
    rows: Tensor
    cut: LayerCut | None
    other: tuple[str, int] | None = None

    @cached_property
    def stop(self) -> int:
        return self.first + self.worlds * len(self.rows)

    @cached_property
    def unbroken(self) -> bool:
        """Whether a world's rows stand side by side and none of their edges is cut."""
        return self.cut is None and int(self.rows[-1] - self.rows[0]) == len(self.rows) - 1

    @cached_property
    def joins(self) -> bool:
        """Whether a world's stored keys are put before its new ones."""
        keys = int(self.rows[-1]) + 1
        return self.unbroken and keys <= min(JOINED, JOINED_SHARE * len(self.rows))


@dataclass
class Packed:
    """The attention of a pack: `Run.attend`. `groups` are those of the layer being run.

    keys, values  the clean run's, [kv_head, pos, d_head] per layer
    others        keys and values of other stored runs, for groups that name one
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    others: Mapping[str, tuple[Sequence[Tensor], Sequence[Tensor]]] = field(default_factory=dict)
    groups: Sequence[Group] = ()
    parts: dict[Any, _Part] = field(default_factory=dict)

    def __call__(self, call: Call, query: Tensor, key: Tensor, value: Tensor, kw: dict[str, Any]) -> Tensor:
        """z [1, pack, head, d_head] of queries [1, head, pack, d_head] and new keys [1, kv_head, pack, d_head]."""
        for name in ("softcap", "s_aux", "position_bias"):
            if kw.get(name) is not None:
                raise RunError(f"packed rows know no {name}; use executor='reference'")
        layer, scaling = call.parts.index, kw.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        z = torch.empty_like(query[0].transpose(0, 1))
        clean = self.keys[layer], self.values[layer]  # fetched once, should they lie elsewhere
        for group in self.groups:
            stored_k, stored_v = self.stored(group, layer, clean)
            here = slice(group.first, group.stop)
            q, k, v = (
                t[0, :, here].unflatten(1, (group.worlds, len(group.rows))) for t in (query, key, value)
            )
            out = self._group(group, q, k, v, stored_k, stored_v, scale)
            z[here] = out.permute(1, 2, 0, 3).flatten(0, 1)
        return z[None]

    def stored(self, group: Group, layer: int, clean: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Stored keys and values that a group reads, [kv_head, pos, d_head]."""
        if group.other is None:
            return clean
        name, rows = group.other
        k, v = (
            torch.cat([theirs[layer][:, :rows], own[:, rows:]], 1)
            for theirs, own in zip(self.others[name], clean, strict=True)
        )
        return k, v

    def _group(
        self, group: Group, q: Tensor, k: Tensor, v: Tensor, stored_k: Tensor, stored_v: Tensor, scale: float
    ) -> Tensor:
        """q [head, world, rows, d_head], k and v [kv_head, world, rows, d_head] -> [head, world, rows, d_head]."""
        heads, worlds, n, d = q.shape
        kv = k.shape[0]
        first = int(group.rows[0])
        if group.joins:
            return self.joined(q, k, v, stored_k[:, :first], stored_v[:, :first], scale)
        q = q.reshape(kv, heads // kv, worlds, n, d)
        if group.unbroken:
            return self._unbroken(first, q, k, v, stored_k, stored_v, scale).reshape(heads, worlds, n, d)
        out = torch.empty_like(q)
        # where heads differ, every world has a mask for each of its heads
        masks = 1 if heads_of(group.cut) == 1 else heads * worlds
        size = max(1, MASK_CELLS // (stored_k.shape[1] * masks))
        for start in range(0, n, size):
            block = slice(start, min(start + size, n))
            out[..., block, :] = self._block(group, block, q[..., block, :], k, v, stored_k, stored_v, scale)
        return out.reshape(heads, worlds, n, d)

    def _unbroken(
        self, first: int, q: Tensor, k: Tensor, v: Tensor, stored_k: Tensor, stored_v: Tensor, scale: float
    ) -> Tensor:
        """Rows side by side and not cut: they read one another causally, and all that is stored before them."""
        kv, g, worlds = q.shape[:3]
        own, own_lse = causal(q.transpose(1, 2).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale)
        own = own.unflatten(0, (kv, worlds)).transpose(1, 2)
        if not first:
            return own
        old_k, old_v = (t[:, None, :first] for t in (stored_k, stored_v))
        old, old_lse = attention(q.flatten(1, 2), old_k, old_v, None, scale)
        own_lse = own_lse.unflatten(0, (kv, worlds)).transpose(1, 2)
        return merge(own, own_lse, old.unflatten(1, (g, worlds)), old_lse.unflatten(1, (g, worlds)))

    @staticmethod
    def joined(q: Tensor, k: Tensor, v: Tensor, before_k: Tensor, before_v: Tensor, scale: float) -> Tensor:
        """The same without merging: what is stored before the rows stands, in every world, before its own keys.

        q [head, world, rows, d_head]: the last of the rows of k, v [kv_head, world, rows, d_head]
        """
        worlds = q.shape[1]
        keys, values = (
            torch.cat([old[None].expand(worlds, -1, -1, -1), new.transpose(0, 1)], 2)
            for old, new in ((before_k, k), (before_v, v))
        )
        return last_rows(q.transpose(0, 1), keys, values, scale).transpose(0, 1)

    def _block(
        self, group: Group, block: slice, q: Tensor, k: Tensor, v: Tensor, stored_k: Tensor, stored_v: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """One block of query rows: q [kv_head, group, world, rows, d_head]."""
        part = self._part(group, block, stored_k.shape[1], q.device)
        kv, g, worlds = q.shape[:3]
        new_k, new_v = (t[:, :, : block.stop].flatten(0, 1)[:, None] for t in (k, v))  # (kv world) 1 rows
        own, own_lse = attention(
            q.transpose(1, 2).flatten(0, 1), new_k, new_v, _heads(part.own, kv, g, worlds), scale
        )
        own = own.unflatten(0, (kv, worlds)).transpose(1, 2)
        own_lse = own_lse.unflatten(0, (kv, worlds)).transpose(1, 2)
        if not len(part.stored):
            return own.masked_fill((own_lse == NEG)[..., None], 0.0)
        old_k, old_v = (_rows(t, part.stored)[:, None] for t in (stored_k, stored_v))
        mask = _stored_heads(part.kept, kv, g, worlds)
        old, old_lse = attention(q.flatten(1, 2), old_k, old_v, mask, scale)
        return merge(own, own_lse, old.unflatten(1, (g, worlds)), old_lse.unflatten(1, (g, worlds)))

    def _part(self, group: Group, block: slice, n_pos: int, device: torch.device) -> _Part:
        cut = None if group.cut is None else id(group.cut)
        key = (group.rows.numpy().tobytes(), block.start, cut, device)
        if key not in self.parts:
            self.parts[key] = _part(group, block, n_pos, device)
        return self.parts[key]


@dataclass(frozen=True)
class _Part:
    """What one block of rows of a group may read.

    stored  positions read from the clean run; kept [head | 1, rows, stored], None if all of them are read by all rows
    own     [head | 1, rows, new rows up to the block's end]
    """

    stored: Tensor
    kept: Tensor | None
    own: Tensor | None


def _part(group: Group, block: slice, n_pos: int, device: torch.device) -> _Part:
    every = group.rows.to(device)
    rows, new = every[block], every[: block.stop]
    keep = (torch.arange(n_pos, device=device)[None, :] <= rows[:, None])[None]
    keep = keep if group.cut is None else keep & ~rows_of(group.cut, rows)
    stored = keep.any(0).any(0)
    stored[every] = False
    at = stored.nonzero().squeeze(1)
    return _Part(at, _unless_all(keep[..., at]), _unless_all(keep[..., new]))


def _unless_all(keep: Tensor) -> Tensor | None:
    return None if bool(keep.all()) else keep


def _rows(stored: Tensor, at: Tensor) -> Tensor:
    """Rows of [kv_head, pos, d_head]; a view where they lie side by side."""
    first, last = int(at[0]), int(at[-1])
    return stored[:, first : last + 1] if last - first + 1 == len(at) else stored[:, at]


def _heads(keep: Tensor | None, kv: int, g: int, worlds: int) -> Tensor | None:
    """[head | 1, q, k] as the own part has its heads: [kv_head world | 1, group | 1, q, k]."""
    if keep is None or len(keep) == 1:
        return keep if keep is None else keep[None]
    return keep.unflatten(0, (kv, g)).repeat_interleave(worlds, 0)


def _stored_heads(keep: Tensor | None, kv: int, g: int, worlds: int) -> Tensor | None:
    """[head | 1, q, k] as the stored part has its heads: [kv_head | 1, group world | 1, q, k]."""
    if keep is None or len(keep) == 1:
        return keep if keep is None else keep[None]
    return keep.unflatten(0, (kv, g)).repeat_interleave(worlds, 1)


# ---- one part, and how two are put together -------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """z and log-sum-exp of the scores. A row that may read nothing gives z = 0 and -inf.

    q [batch, head, rows, d_head]; k, v [batch, 1, keys, d_head]; keep [batch | 1, head | 1, rows, keys] or None
    """
    heads, n = q.shape[1:3]
    shared = keep is None or (n == 1 and keep.shape[1] == 1)
    if shared:  # one key set for all: heads become rows, which makes one large product
        folded = None if keep is None else keep.expand(-1, -1, heads, -1)
        z, lse = _one_head(q.reshape(len(q), 1, heads * n, -1), k, v, folded, scale)
        return z.reshape(*q.shape), lse.reshape(*q.shape[:3])
    return _one_head(q, k.expand(-1, heads, -1, -1), v.expand(-1, heads, -1, -1), keep, scale)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """z and log-sum-exp where every row reads itself and the rows before it.

    q [batch, head, rows, d_head]; k, v [batch, rows, d_head]
    """
    heads, n = q.shape[1:3]
    k, v = (t[:, None].expand(-1, heads, -1, -1) for t in (k, v))
    kernel = _kernel_for(q)
    if kernel is not None:
        return kernel(q, k, v, 0.0, True, scale=scale)
    size = max(1, SCORE_CELLS // (len(q) * heads * n))
    done: list[tuple[Tensor, Tensor]] = []
    for at in range(0, n, size):
        stop = min(at + size, n)
        seen = torch.ones(stop - at, stop, dtype=torch.bool, device=q.device).tril(at)[None, None]
        done.append(_softmax(q[:, :, at:stop], k[:, :, :stop], v[:, :, :stop], seen, scale))
    return torch.cat([z for z, _ in done], 2), torch.cat([lse for _, lse in done], 2)


def last_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """z where the rows are the last of those whose keys are given, and each reads the keys up to its own.

    q [batch, head, rows, d_head]; k, v [batch, kv_head, keys, d_head]
    """
    heads, n, kv = q.shape[1], q.shape[2], k.shape[1]
    if n == 1:  # reads everything: heads of one key become rows
        return sdpa(q.reshape(len(q), kv, heads // kv, -1), k, v, scale=scale).reshape(q.shape)
    on_cpu = q.device.type == "cpu"
    if not on_cpu:  # kernels that take a mask ask for every head's keys
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
    size = min(n, JOINED_ROWS) if on_cpu else n
    mask = _ending_triangle(size, k.shape[2], q.dtype, q.device)
    done: list[Tensor] = []
    for at in range(0, n, size):
        stop = min(at + size, n)
        keys, values = (t[:, :, : t.shape[2] - n + stop] for t in (k, v))
        masked = mask[at - stop :, -keys.shape[2] :]
        z = sdpa(q[:, :, at:stop], keys, values, attn_mask=masked, scale=scale, enable_gqa=on_cpu)
        done.append(z.transpose(1, 2))  # lies as [batch, rows, head, d_head]
    return torch.cat(done, 1).transpose(1, 2)


@lru_cache(maxsize=16)
def _ending_triangle(rows: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to scores of the last rows over all keys. Its lower right corner serves fewer of both."""
    unread = torch.ones(rows, keys, dtype=torch.bool, device=device).triu(keys - rows + 1)
    return torch.zeros(rows, keys, dtype=dtype, device=device).masked_fill(unread, NEG)


def _kernel_for(q: Tensor) -> Callable[..., Any] | None:
    return None if q.device.type != "cpu" or q.dtype == torch.float16 else _CPU_KERNEL


def _one_head(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    kernel = _kernel_for(q)
    if kernel is None:
        return _explicit(q, k, v, keep, scale)
    mask = None
    if keep is not None:
        mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill_(~keep, NEG)
    z, lse = kernel(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    if keep is None:
        return z, lse
    dead = ~keep.any(-1)
    return z.masked_fill(dead[..., None], 0.0), lse.masked_fill(dead, NEG)


def _explicit(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Written out, in at least fp32, for devices whose kernels do not say their log-sum-exp; in blocks of rows."""
    size = max(1, SCORE_CELLS // (q.shape[0] * q.shape[1] * k.shape[2]))
    masks = [None] * -(-q.shape[2] // size) if keep is None else keep.split(size, 2)
    done = [_softmax(rows, k, v, mask, scale) for rows, mask in zip(q.split(size, 2), masks, strict=True)]
    return torch.cat([z for z, _ in done], 2), torch.cat([lse for _, lse in done], 2)


def _softmax(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(2, 3)).to(wide) * scale
    scores = scores if keep is None else scores.masked_fill(~keep, NEG)
    lse = scores.logsumexp(-1)
    pattern = (scores - lse.masked_fill(lse == NEG, 0.0)[..., None]).exp()
    return pattern.to(v.dtype) @ v, lse


def merge(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> Tensor:
    """Attention over two disjoint sets of keys from the attention over each (z [.., rows, d], lse [.., rows])."""
    share = torch.sigmoid(b_lse - a_lse).nan_to_num_(0.0)[..., None]  # nan: no keys in either, z = 0 in both
    return torch.lerp(a.to(share.dtype), b.to(share.dtype), share).to(a.dtype)
