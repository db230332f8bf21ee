"""VidKV: keys and values of a video prompt in 1.x bits (arXiv 2503.16257, v2; code of 2025-03-26).

1 keys are quantised per channel, in groups of 32 tokens: the channels with the widest range ("anomalous") with 2 bits, the
others with 1 bit after a Fourier transform along channels   2 values are quantised per channel to -1, 0, 1, but for the
tokens most like the text, which get 2 bits   3 the prompt itself is computed with exact keys and values, so the first
new token is always that of the unquantised model: whoever asks for one letter measures nothing   4 while decoding the
whole cache is given back to attention dequantised; new rows wait unquantised until there are 128.

The released code stores more than the paper counts: a Fourier transform doubles the rows, a ternary code takes 2 bits, and a
constant zero is kept with every group. "1.5 / 1.58 bits" take 3.5 and 3.0 bits a value there, more than its plain 2 bits
(3.0). compat="corrected" stores the same codes in what they need (about 2.25 and 2.1), with symmetric signs and fitted scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lab.errors import RunError, UsageError
from lab.quantising import (
    Q1,
    Coding,
    Fft,
    Kind,
    Quantised,
    TernaryScale,
    bits_per_value,
    from_frequencies,
    pack,
    quantise,
    to_frequencies,
    unpack,
)
from lab.settings import check_names, check_number, check_whole
from lab.side import Side
from lab.slots import ModelSizes, Plan, Step
from lab.spans import KINDS, ROLES

Axis = Literal["channel", "token"]
Hard = Literal["range", "variance", "outlier", "random", "head_range"]
Requant = Literal["released_all", "append_block"]
Protect = Literal["text", "norm", "random"]
Rows = Literal["all", "vision"]
Storage = Literal["released", "tight"]
Compat = Literal["paper", "released", "corrected"]

WHOLE: dict[float, Kind] = {8: "q8", 4: "q4", 2: "q2", 1: "q1", 1.58: "ternary"}
CONVENTIONS: dict[str, dict[str, Any]] = {
    "released": {
        "fft": "full", "q1": "released01", "ternary_scale": "none", "gamma": 0.5, "requant": "released_all",
        "storage": "released",
    },
    "paper": {
        "fft": "full", "q1": "released01", "ternary_scale": "none", "gamma": 0.7, "requant": "append_block",
        "storage": "released",
    },
    "corrected": {
        "fft": "rfft", "q1": "symmetric", "ternary_scale": "lsq", "gamma": 0.7, "requant": "append_block",
        "storage": "tight",
    },
}  # fmt: skip


@dataclass(frozen=True)
class VidKV:
    """VidKV, arXiv 2503.16257, sections 3.2 to 3.4.

    key_bits    16 (exact), 8, 4, 2, 1, or 1 + share of anomalous channels: 1.5 keeps half of the channels at 2 bits
    value_bits  16, 8, 4, 2, 1.58 (ternary) or 1
    group       neighbouring values that share a scale;   residual  unquantised rows that make the next block
    key_axis, value_axis  groups run along tokens, per "channel" (the paper's), or along channels, per "token" (KIVI's)
    hard        which channels are anomalous: widest "range" (over worlds, heads and tokens: one choice for all heads),
                "head_range" (each head's own), "variance", "outlier" (largest |x|), "random"
    stp, stp_by share of value rows kept at 2 bits, by likeness to the "text" (mean dot product of the embeddings at the
                decoder's door), "norm" or "random". Released: of the chosen the last 32 lose protection again (kept)
    exact_recent  the latest rows are never quantised;   rows  "vision": text is never quantised
    quantise_prefill_attention  True: the prompt too is read dequantised, so that single-token answers show the effect
    scale_bits  16 or 32, of scales and zeros
    compat      "released", "paper" (gamma 0.7, old blocks stay as they are; Fourier for 1.5 and 1.75 bits alone) or
                "corrected": sets those of the following that are None
    fft         transform of the 1-bit channels: "full", "rfft" (same, half the rows), "off"
    q1          "released01": 1 bit means 0 or mean|x|; "symmetric": minus or plus mean|x|
    ternary_scale, gamma  see `lab.quantising.Coding`
    requant     when rows wait no more: "released_all" quantises everything anew from what it read, "append_block" them
    storage     "released" (2 bits for a ternary code, constant zeros) or "tight"
    audit       also keep exact keys and values, to measure errors by (not counted in bytes)

    With chunk= (and in a stream) every piece reads those before it dequantised, so logits are not those of the whole
    prompt, whose rows read each other exactly; with chunk= a LabWarning says so.

    `model.run(...).heads`: "vidkv.bytes", "vidkv.bytes_exact", "vidkv.rows" [layer, (quantised, exact)]; with audit
    "vidkv.key_error" and "vidkv.value_error", relative, by layer.
    Raises UsageError for what makes no sense.
    """

    key_bits: float = 1.5
    value_bits: float = 1.58
    group: int = 32
    residual: int = 128
    key_axis: Axis = "channel"
    value_axis: Axis = "channel"
    hard: Hard = "range"
    stp: float = 0.0
    stp_by: Protect = "text"
    exact_recent: int = 0
    rows: Rows = "all"
    quantise_prefill_attention: bool = False
    scale_bits: Literal[16, 32] = 16
    compat: Compat = "released"
    fft: Fft | None = None
    q1: Q1 | None = None
    ternary_scale: TernaryScale | None = None
    gamma: float | None = None
    requant: Requant | None = None
    storage: Storage | None = None
    audit: bool = False
    seed: int = 0

    NEUTRAL: ClassVar[VidKV]
    EXAMPLE: ClassVar[VidKV]

    def __post_init__(self) -> None:
        _check_names(self)
        _check_numbers(self)
        mixed = 1 < self.key_bits < 2
        if not mixed and self.key_bits not in (16, 8, 4, 2, 1):
            raise UsageError(f"key_bits={self.key_bits}; use 16, 8, 4, 2, 1, or a number between 1 and 2")
        if self.value_bits not in (16, *WHOLE):
            raise UsageError(f"value_bits={self.value_bits}; use 16, 8, 4, 2, 1.58 or 1")
        if mixed and self.key_axis == "token":
            raise UsageError(f"key_bits={self.key_bits} parts channels from channels; use key_axis='channel'")
        if not 0 <= self.stp <= 1 or (self.stp and self.value_bits != 1.58):
            raise UsageError(
                f"stp={self.stp} with value_bits={self.value_bits}: a share in 0..1 of ternary values"
            )
        if self.group < 1 or self.group % 8 or self.residual < self.group:
            raise UsageError(
                f"need group in multiples of 8, and residual >= group; got {self.group}, {self.residual}"
            )

    def settled(self) -> VidKV:
        """The same with every convention written out."""
        asked = dict(CONVENTIONS[self.compat])
        if self.compat == "paper" and self.key_bits not in (1.5, 1.75):
            asked["fft"] = "off"
        return replace(self, **{k: v for k, v in asked.items() if getattr(self, k) is None})

    @property
    def coding(self) -> Coding:
        """How values are coded."""
        s = self.settled()
        assert s.q1 and s.ternary_scale and s.gamma is not None
        scale = torch.float16 if s.scale_bits == 16 else torch.float32
        return Coding(s.group, scale, s.q1, s.gamma, s.ternary_scale, s.storage == "tight")

    def n_hard(self, d_head: int) -> int:
        """Anomalous channels of a head."""
        return math.floor((self.key_bits - 1) * d_head + 1e-6) if 1 < self.key_bits < 2 else 0

    def bits(self, d_head: int) -> tuple[float, float]:
        """Bits a key and a value take as stored, scales and zeros included (index bytes and the last byte apart)."""
        s, c = self.settled(), self.coding
        rho = self.n_hard(d_head) / d_head
        one = bits_per_value("q1", c) * (2 if s.fft == "full" else 1)
        key = 16.0 if s.key_bits == 16 else rho * bits_per_value("q2", c) + (1 - rho) * one
        if s.key_bits in (2, 4, 8):
            key = bits_per_value(WHOLE[s.key_bits], c)
        value = 16.0 if s.value_bits == 16 else bits_per_value(WHOLE[s.value_bits], c)
        return key, (1 - s.stp) * value + s.stp * bits_per_value("q2", c) if s.stp else value

    def control(self, seed: int = 0) -> VidKV | None:
        """As many bits, given to random channels and rows; None where no channel and no row is chosen."""
        chooses = 1 < self.key_bits < 2 or self.stp > 0
        return replace(self, hard="random", stp_by="random", seed=seed) if chooses else None

    def kv_bytes(self, rows: int, cfg: ModelSizes, itemsize: int) -> float:
        """Bytes of keys and values that `rows` rows of a layer take by the formula, whole groups quantised (index bytes apart)."""
        quantised = rows - rows % self.group
        values = cfg.n_kv_heads * cfg.d_head
        wide = 2 * (rows - quantised) * itemsize
        sides = zip(self.bits(cfg.d_head), (self.key_bits, self.value_bits), strict=True)
        bits = sum(8 * itemsize if asked == 16 else taken for taken, asked in sides)
        return values * (wide + quantised * bits / 8)

    def plan(self, cfg: ModelSizes) -> Plan:
        """A cache; a Head that tells of it; where rows differ by kind, a Detour that tells the cache which is which."""
        for bits, axis in ((self.key_bits, self.key_axis), (self.value_bits, self.value_axis)):
            if bits != 16 and axis == "token" and cfg.d_head % self.group:
                raise UsageError(
                    f"groups of {self.group} along channels do not fit heads of {cfg.d_head}; use a group that divides it"
                )
        detours = (tell_rows,) if self.stp or self.rows == "vision" else ()
        return Plan(cache=partial(QuantisedCache, self.settled()), detours=detours, heads=(report,))


def _check_names(m: VidKV) -> None:
    named: dict[str, Any] = {
        "key_axis": Axis, "value_axis": Axis, "hard": Hard, "stp_by": Protect, "rows": Rows, "scale_bits": Literal[16, 32],
        "compat": Compat, "fft": Fft, "q1": Q1, "ternary_scale": TernaryScale, "requant": Requant, "storage": Storage,
    }  # fmt: skip
    free = [name for name in named if name in CONVENTIONS["paper"]]  # None: what `compat` says
    check_names(m, {name: allowed for name, allowed in named.items() if name not in free})
    check_names(m, {name: named[name] for name in free}, also=(None,))


def _check_numbers(m: VidKV) -> None:
    check_number("key_bits (16, 8, 4, 2, 1, or between 1 and 2)", m.key_bits, 1, 16)
    check_number("value_bits (16, 8, 4, 2, 1.58 or 1)", m.value_bits, 1, 16)
    for name in ("group", "residual", "exact_recent"):
        check_whole(name, getattr(m, name), 0)
    check_whole("seed", m.seed)
    if isinstance(m.stp, bool) or not isinstance(m.stp, int | float):
        raise UsageError(f"stp={m.stp!r} must be a share in 0..1")
    if m.gamma is not None and not (isinstance(m.gamma, int | float) and 0 <= m.gamma < math.inf):
        raise UsageError(f"gamma={m.gamma!r}; need a number of at least 0")


# ---- what is stored -----------------------------------------------------------------------------------------------------


def _flip(x: Tensor) -> Tensor:
    """[..., token, channel] <-> [..., channel, token]: the last axis is cut into groups."""
    return x.transpose(-1, -2)


@dataclass(frozen=True)
class Keys:
    """Quantised keys of a block. hard: which channels are anomalous, bool [channel] or [kv_head, channel]."""

    what: VidKV
    plain: Tensor | Quantised | None
    hard: Tensor | None = None
    wide: Quantised | None = None
    narrow: Quantised | None = None
    n_narrow: int = 0

    @staticmethod
    def of(x: Tensor, what: VidKV) -> Keys:
        """x [world, kv_head, token, channel]"""
        if what.key_bits == 16:
            return Keys(what, x)
        turned = _flip(x) if what.key_axis == "channel" else x
        if what.key_bits in (2, 4, 8) or (what.key_bits == 1 and what.key_axis == "token"):
            return Keys(what, quantise(turned, WHOLE[what.key_bits], what.coding))
        assert what.fft
        hard = anomalous(x, what)
        few, many = _channels(hard, x.shape[1])
        rows = to_frequencies(_take(turned, many), what.fft)
        wide = quantise(_take(turned, few), "q2", what.coding) if few.shape[1] else None
        return Keys(
            what, None, hard if few.shape[1] else None, wide, quantise(rows, "q1", what.coding), many.shape[1]
        )

    def values(self, kv_heads: int, channels: int) -> Tensor:
        """[world, kv_head, token, channel]"""
        if self.plain is not None:
            x = self.plain.values() if isinstance(self.plain, Quantised) else self.plain
            return _flip(x) if isinstance(self.plain, Quantised) and self.what.key_axis == "channel" else x
        assert self.narrow is not None and self.what.fft
        easy = from_frequencies(self.narrow.values(), self.what.fft, self.n_narrow).to(self.narrow.dtype)
        if self.wide is None:
            return _flip(easy)
        assert self.hard is not None
        few, many = _channels(self.hard, kv_heads)
        x = easy.new_zeros(*easy.shape[:2], channels, easy.shape[-1])
        _put(x, few, self.wide.values())
        _put(x, many, easy)
        return _flip(x)

    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(_bytes(t) for t in (self.plain, self.hard, self.wide, self.narrow))


@dataclass(frozen=True)
class Values:
    """Quantised values of a block. protected: bits that say which tokens have 2 bits, None if none was asked for."""

    what: VidKV
    plain: Tensor | Quantised | None
    wide: Quantised | None = None
    protected: Tensor | None = None
    n: int = 0

    @staticmethod
    def of(x: Tensor, protected: Tensor | None, what: VidKV) -> Values:
        """x [world, kv_head, token, channel]; protected bool [token]"""
        if what.value_bits == 16:
            return Values(what, x)
        turned = _flip(x) if what.value_axis == "channel" else x
        kind = WHOLE[what.value_bits]
        if protected is None:
            return Values(what, quantise(turned, kind, what.coding))
        axis = -1 if what.value_axis == "channel" else -2
        few, many = (m.nonzero().squeeze(1) for m in (protected, ~protected))
        bits = pack(protected.int(), "q1", tight=True)
        wide = quantise(turned.index_select(axis, few), "q2", what.coding) if len(few) else None
        rest = quantise(turned.index_select(axis, many), kind, what.coding) if len(many) else None
        return Values(what, rest, wide, bits, len(protected))

    def values(self) -> Tensor:
        """[world, kv_head, token, channel]"""
        if isinstance(self.plain, Tensor):
            return self.plain
        if self.protected is None:
            assert self.plain is not None
            return self._turned(self.plain)
        chosen = unpack(self.protected, "q1", self.n, tight=True).bool()
        parts = [
            (self._turned(h), at) for h, at in ((self.wide, chosen), (self.plain, ~chosen)) if h is not None
        ]
        x = parts[0][0].new_zeros(*parts[0][0].shape[:2], self.n, parts[0][0].shape[-1])
        for part, at in parts:
            x[:, :, at] = part
        return x

    def _turned(self, held: Quantised) -> Tensor:
        return _flip(held.values()) if self.what.value_axis == "channel" else held.values()

    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(_bytes(t) for t in (self.plain, self.wide, self.protected))


def _bytes(held: Tensor | Quantised | None) -> int:
    if held is None:
        return 0
    return held.nbytes() if isinstance(held, Quantised) else held.numel() * held.element_size()


def anomalous(x: Tensor, what: VidKV) -> Tensor:
    """bool [channel] or [kv_head, channel]: channels of x [world, kv_head, token, channel] that get 2 bits."""
    n = what.n_hard(x.shape[-1])
    match what.hard:
        case "range":
            score = x.amax((0, 1, 2)) - x.amin((0, 1, 2))
        case "head_range":
            score = x.amax((0, 2)) - x.amin((0, 2))
        case "variance":
            score = x.float().var((0, 1, 2), correction=0)
        case "outlier":
            score = x.abs().amax((0, 1, 2))
        case "random":
            score = torch.rand(x.shape[-1], generator=torch.Generator().manual_seed(what.seed)).to(x.device)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    return chosen.scatter(-1, score.argsort(dim=-1, descending=True, stable=True)[..., :n], True)


def _channels(hard: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Indices of anomalous and of normal channels, [kv_head, n] each."""
    rows = hard if hard.ndim == 2 else hard[None].expand(kv_heads, -1)
    order = (~rows).to(torch.uint8).argsort(dim=-1, stable=True)
    n = int(rows[0].sum())
    return order[:, :n], order[:, n:]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Channels of x [world, kv_head, channel, token], each head its own."""
    return x.gather(2, index[None, :, :, None].expand(len(x), -1, -1, x.shape[-1]))


def _put(x: Tensor, index: Tensor, part: Tensor) -> None:
    x.scatter_(2, index[None, :, :, None].expand(len(x), -1, -1, x.shape[-1]), part.to(x))


@dataclass(frozen=True)
class Block:
    """Rows that were quantised together; order: their source positions."""

    order: Tensor
    keys: Keys
    values: Values


@dataclass(frozen=True)
class Layer:
    """One layer: blocks, and rows that wait unquantised; k, v [world, kv_head, row, d_head]."""

    blocks: tuple[Block, ...]
    k: Tensor
    v: Tensor
    order: Tensor

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """All rows, dequantised, in their order."""
        heads, channels = self.k.shape[1], self.k.shape[3]
        k = torch.cat([*(b.keys.values(heads, channels) for b in self.blocks), self.k], 2)
        v = torch.cat([*(b.values.values() for b in self.blocks), self.v], 2)
        order = torch.cat([*(b.order for b in self.blocks), self.order])
        if bool((order.diff() > 0).all()):
            return k, v, order
        at = order.argsort()
        return k[:, :, at], v[:, :, at], order[at]

    def nbytes(self) -> int:
        """Bytes of keys and values as stored, with all that is needed to read them (source positions apart)."""
        return _bytes(self.k) + _bytes(self.v) + sum(b.keys.nbytes() + b.values.nbytes() for b in self.blocks)

    @property
    def n_quantised(self) -> int:
        """Rows that are quantised."""
        return sum(len(b.order) for b in self.blocks)


# ---- the cache ----------------------------------------------------------------------------------------------------------


class QuantisedCache:
    """The Cache slot. `layers` holds what is stored; layers may hold different rows."""

    def __init__(self, what: VidKV) -> None:
        self.what = what.settled()
        self.layers: dict[int, Layer] = {}
        self.exact: dict[int, tuple[Tensor, Tensor]] = {}
        self.vision: Tensor | None = None  # bool [source pos]
        self.worth: Tensor | None = None  # [source pos], -inf for what is never protected

    @property
    def in_pieces(self) -> str:
        """What a prompt that is read in pieces is to be warned of; "" where nothing is quantised."""
        if self.what.key_bits == 16 and self.what.value_bits == 16:
            return ""
        return (
            "VidKV reads a whole prompt with exact keys and values, but of a prompt in pieces (chunk=) every piece reads those "
            "before it dequantised: the logits are not those of the whole prompt; drop chunk= to measure"
        )

    def update(self, layer: int, k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store rows, and give back all of the layer. The first rows come back exact unless asked otherwise.

        Raises RunError where gradients are asked through quantised keys.
        """
        held = self.layers.get(layer)
        self._remember(layer, k, v)
        waiting = _joined(held, k, v, order)
        if held is None and not self.what.quantise_prefill_attention:
            self.layers[layer] = self._settled(waiting, first=True)
            return k, v, order
        if torch.is_grad_enabled() and k.requires_grad:
            raise RunError("quantised keys and values pass no gradient; run under torch.no_grad()")
        if held is None:
            self.layers[layer] = self._settled(waiting, first=True)
            return self.layers[layer].read()
        self.layers[layer] = self._settled(waiting, first=False)
        return waiting.read()

    def _remember(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self.what.audit:
            old = self.exact.get(layer)
            both = (k.detach(), v.detach())
            self.exact[layer] = (
                both if old is None else (torch.cat([old[0], k], 2), torch.cat([old[1], v], 2))
            )

    @torch.no_grad()
    def _settled(self, held: Layer, *, first: bool) -> Layer:
        """The layer with those waiting rows quantised whose time has come."""
        at = self._due(held, first)
        if not len(at):
            return held
        stay = torch.ones(len(held.order), dtype=torch.bool, device=at.device)
        stay[at] = False
        k, v, order = held.k[:, :, at], held.v[:, :, at], held.order[at]
        blocks = held.blocks
        if blocks and self.what.requant == "released_all":
            k, v, order = replace(held, k=k, v=v, order=order).read()
            blocks = ()
        block = Block(order, Keys.of(k, self.what), Values.of(v, self._protected(order), self.what))
        return Layer((*blocks, block), held.k[:, :, stay], held.v[:, :, stay], held.order[stay])

    def _due(self, held: Layer, first: bool) -> Tensor:
        """Which waiting rows are quantised now: whole groups, the oldest."""
        what, n = self.what, len(held.order)
        exact = what.key_bits == 16 and what.value_bits == 16
        free = torch.arange(0 if exact else max(0, n - what.exact_recent), device=held.order.device)
        if what.rows == "vision":
            free = free[self._is_vision(held.order[free])]
        waits = 0 if first else what.residual
        return free[: len(free) - len(free) % what.group] if len(free) >= waits else free[:0]

    def _is_vision(self, order: Tensor) -> Tensor:
        if self.vision is None:
            raise RunError(
                "rows='vision', but nobody said which rows are video: put VidKV last in `mechanisms`"
            )
        known = self.vision.to(order.device)
        return known[order.clamp(max=len(known) - 1)] & (order < len(known))

    def _protected(self, order: Tensor) -> Tensor | None:
        """bool [row]: value rows with 2 bits, whole groups of them."""
        if not self.what.stp:
            return None
        if self.worth is None:
            raise RunError("stp protects rows that nobody judged: put VidKV last in `mechanisms`")
        worth, g = self.worth.to(order.device), self.what.group
        if self.what.compat == "released":
            vision = worth.isfinite().nonzero().squeeze(1)
            n = int(self.what.stp * len(vision)) // g * g
            best = worth.argsort(descending=True, stable=True)[:n].sort().values
            chosen = torch.isin(order, best[:-g])  # sorted by place, and the last 32 cut off: as released
        else:
            here = torch.full_like(order, -math.inf, dtype=worth.dtype)
            inside = order < len(worth)
            here[inside] = worth[order[inside]]
            n = min(round(self.what.stp * len(order) / g), int(here.isfinite().sum()) // g) * g
            chosen = torch.zeros_like(order, dtype=torch.bool)
            chosen[here.argsort(descending=True, stable=True)[:n]] = True
        many = chosen.nonzero().squeeze(1)
        chosen[many[len(many) - len(many) % g :]] = False
        return chosen

    # ---- what it holds ------------------------------------------------------------------------------------------------

    def lengths(self) -> list[int]:
        """Rows held by each layer that holds any, by layer."""
        return [held.n_quantised + len(held.order) for _, held in sorted(self.layers.items())]

    def nbytes(self) -> int:
        """Bytes of keys and values as stored."""
        return sum(held.nbytes() for held in self.layers.values())

    def predicted(self, layer: int) -> int:
        """Bytes the formula gives for the rows a layer holds, from counts alone (spec: n * heads * d_head * bits / 8)."""
        held = self.layers[layer]
        worlds, heads, _, d = held.k.shape
        wide = held.k.element_size()
        total = 2 * len(held.order) * worlds * heads * d * wide
        return total + sum(
            _predicted(self.what, len(b.order), worlds, heads, d, wide, b) for b in held.blocks
        )

    def snapshot(self) -> Mapping[int, Layer]:
        """What is stored now; layers are never written in place, so this costs nothing."""
        return dict(self.layers)

    def restore(self, state: Mapping[int, Layer]) -> None:
        """Back to a snapshot. Rows kept by `audit` stay."""
        self.layers = dict(state)

    def crop(self, length: int) -> None:
        """Forget rows from source position `length` on. A block cut in two is given back to the waiting rows, as read."""
        for layer, held in self.layers.items():
            whole = tuple(b for b in held.blocks if int(b.order.max()) < length)
            rest = replace(held, blocks=tuple(b for b in held.blocks if int(b.order.max()) >= length))
            k, v, order = rest.read()
            stay = order < length
            self.layers[layer] = Layer(whole, k[:, :, stay], v[:, :, stay], order[stay])


def _joined(held: Layer | None, k: Tensor, v: Tensor, order: Tensor) -> Layer:
    if held is None:
        return Layer((), k, v, order)
    rows = (torch.cat([held.k, k], 2), torch.cat([held.v, v], 2), torch.cat([held.order, order]))
    return Layer(held.blocks, *rows)


def _predicted(what: VidKV, n: int, worlds: int, heads: int, d: int, wide: int, block: Block) -> int:
    """Bytes of a block of n rows: spec section 7.5, with the width of exact values where a side is not quantised."""
    each, hard = worlds * heads * n, what.n_hard(d)
    one = 2 if what.fft == "full" else 1

    def stored(kind: Kind, values: int) -> int:
        bits = bits_per_value(kind, what.coding) * values
        spare = -values % 5 / 5 * 8 if kind == "ternary" and what.coding.tight else 0
        return round((bits + spare) / 8)

    if what.key_bits == 16:
        key = each * d * wide
    elif what.key_bits in (2, 4, 8) or what.key_axis == "token":
        key = stored(WHOLE[what.key_bits], each * d)
    else:
        index = 0 if not hard else d * (heads if what.hard == "head_range" else 1)
        key = stored("q2", each * hard) + stored("q1", each * (d - hard) * one) + index
    if what.value_bits == 16:
        return key + each * d * wide
    bits = block.values.protected
    some = 0 if bits is None else int(unpack(bits, "q1", n, tight=True).sum())
    value = stored("q2", worlds * heads * some * d) + stored(
        WHOLE[what.value_bits], worlds * heads * (n - some) * d
    )
    return key + value + (0 if bits is None else n // 8)


# ---- what tells the cache which rows are which, and what reads it ---------------------------------------------------------


def tell_rows(layer: int, step: Step, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
    """A Detour that changes nothing: at the decoder's door it tells the cache which rows are video, and how like the text.

    Raises RunError for several worlds, and for prompts in pieces where rows are compared with the text.
    """
    store = getattr(side.cache, "store", None)
    if layer == 0 and isinstance(store, QuantisedCache) and side.tokens:
        if len(side.tokens) > 1:
            raise RunError(
                f"rows that differ by kind (stp, rows='vision') take one world, got {len(side.tokens)}"
            )
        _tell(store, resid[0].detach().float(), side)
    return step(resid, side)


def _tell(store: QuantisedCache, x: Tensor, side: Side) -> None:
    tokens = side.tokens[0]
    video = (tokens.role == ROLES.index("frame")).to(x.device)
    text = ((tokens.kind == KINDS.index("text")) & (tokens.role != ROLES.index("pad"))).to(x.device)
    n = int(side.order[-1]) + 1
    vision = torch.zeros(n, dtype=torch.bool, device=x.device)
    if store.vision is not None:
        vision[: len(store.vision)] = store.vision
    vision[side.order] = video
    if store.what.stp and bool(video.any()):
        if store.vision is not None:
            raise RunError(
                "stp compares video with the text of the whole prompt; run it whole (no chunk=, no stream)"
            )
        store.worth = torch.full((n,), -math.inf, device=x.device)
        store.worth[side.order[video]] = _worth(store.what, x, video, text)
    store.vision = vision


def _worth(what: VidKV, x: Tensor, video: Tensor, text: Tensor) -> Tensor:
    match what.stp_by:
        case "text":
            return x[video] @ x[text].mean(0)
        case "norm":
            return x[video].norm(dim=-1)
        case "random":
            return torch.rand(int(video.sum()), generator=torch.Generator().manual_seed(what.seed)).to(x)


def report(resid: Tensor, side: Side) -> dict[str, Tensor]:
    """The Head: bytes stored, bytes exact rows would take, rows quantised and waiting, errors if the cache keeps what was."""
    store = getattr(side.cache, "store", None)
    if not isinstance(store, QuantisedCache):
        return {}
    held = [store.layers[i] for i in sorted(store.layers)]
    counts = [[h.n_quantised, len(h.order)] for h in held]
    exact = [
        2 * sum(c) * h.k[:, :, :1].numel() * h.k.element_size() for c, h in zip(counts, held, strict=True)
    ]
    found = {
        "vidkv.bytes": torch.tensor([h.nbytes() for h in held]), "vidkv.bytes_exact": torch.tensor(exact),
        "vidkv.rows": torch.tensor(counts),
    }  # fmt: skip
    return found | _errors(store)


def _errors(store: QuantisedCache) -> dict[str, Tensor]:
    """|x - x^| / |x| of keys and values by layer."""
    if not store.what.audit:
        return {}
    pairs = [(store.layers[i].read(), store.exact[i]) for i in sorted(store.layers)]
    return {
        f"vidkv.{name}_error": torch.stack(
            [(read[at] - kept[at]).norm() / kept[at].norm() for read, kept in pairs]
        )
        for at, name in enumerate(("key", "value"))
    }


NEUTRAL = VidKV(key_bits=16, value_bits=16)
EXAMPLE = VidKV(compat="corrected", quantise_prefill_attention=True)
VidKV.NEUTRAL, VidKV.EXAMPLE = NEUTRAL, EXAMPLE
