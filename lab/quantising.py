"""Group quantisers with few bits: codes packed into bytes, a scale (and a zero) per group of neighbouring values.

Knows tensors only: the last axis is cut into groups of G. What is stored is what counts: `nbytes` is the sum of the
stored tensors. Formulas and their errors: VidKV (arXiv 2503.16257, sections 3 and 4) and its released code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from lab.errors import UsageError

Kind = Literal["q8", "q4", "q2", "q1", "ternary"]
Q1 = Literal["released01", "symmetric"]
TernaryScale = Literal["none", "absmean", "lsq"]
Fft = Literal["off", "full", "rfft"]
BITS: dict[str, int] = {"q8": 8, "q4": 4, "q2": 2, "q1": 1}
TRITS = 5  # ternary codes in a byte: 3**5 = 243


@dataclass(frozen=True)
class Coding:
    """How values are coded.

    group   neighbouring values that share a scale
    scale   dtype of scales and zeros
    q1      one bit: "released01" gives back {0, mean|x|} (the released code, and the paper's equation 5), "symmetric"
            {-mean|x|, mean|x|}
    gamma   ternary codes are 0 where |x| <= gamma * mean|x|
    ternary "none": codes stand for -1, 0, 1 themselves (released, the paper's); "absmean": times mean|x|; "lsq": times
            the mean |x| of the values that are not 0: the least error of all scales
    tight   store only what is needed: no constant zeros, no unused scales, ternary codes five in a byte. False: as the
            released code stores, two bits for a ternary code and scale and zero with everything
    """

    group: int
    scale: torch.dtype
    q1: Q1
    gamma: float
    ternary: TernaryScale
    tight: bool


@dataclass(frozen=True)
class Quantised:
    """Values as they are stored. `codes` are packed; scale and zero [..., n / G], None where none is stored."""

    kind: Kind
    coding: Coding
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: UInt8[Tensor, " byte"]
    scale: Tensor | None
    zero: Tensor | None

    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        held = (getattr(self, f.name) for f in fields(self))
        return sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))

    def values(self) -> Tensor:
        """What the codes stand for, in the original shape and dtype."""
        n = math.prod(self.shape)
        codes = unpack(self.codes, self.kind, n, tight=self.coding.tight).reshape(_grouped_shape(self))
        return _decode(self, codes).reshape(self.shape).to(self.dtype)


def quantise(x: Tensor, kind: Kind, coding: Coding) -> Quantised:
    """Raises UsageError if the last axis is not whole groups, or x holds values that are not finite."""
    if x.shape[-1] % coding.group:
        raise UsageError(f"{x.shape[-1]} values do not make whole groups of {coding.group}")
    grouped = x.detach().float().unflatten(-1, (-1, coding.group))
    if not bool(grouped.isfinite().all()):
        raise UsageError(
            "values to be quantised hold nan or infinity; the model's keys and values are broken"
        )
    codes, scale, zero = _encode(grouped, kind, coding)
    packed = pack(codes.flatten(), kind, tight=coding.tight)
    return Quantised(kind, coding, tuple(x.shape), x.dtype, packed, scale, zero)


def codes_of(q: Quantised) -> Tensor:
    """The integer codes, unpacked, in the original shape (ternary: -1, 0, 1)."""
    codes = unpack(q.codes, q.kind, math.prod(q.shape), tight=q.coding.tight).reshape(q.shape)
    return codes.int() - 1 if q.kind == "ternary" else codes.int()


def bits_per_value(kind: Kind, coding: Coding) -> float:
    """Bits a value takes as stored (ternary, tight: 8 / 5, up to the last byte)."""
    scale = torch.finfo(coding.scale).bits / coding.group
    match kind:
        case "ternary":
            if not coding.tight:
                return 2 + 2 * scale
            return 8 / TRITS + (0 if coding.ternary == "none" else scale)
        case "q1":
            return 1 + (1 if coding.tight else 2) * scale
        case _:
            return BITS[kind] + 2 * scale


# ---- the scalar quantisers ------------------------------------------------------------------------------------------


def _grouped_shape(q: Quantised) -> tuple[int, ...]:
    return (*q.shape[:-1], q.shape[-1] // q.coding.group, q.coding.group)


def _encode(x: Tensor, kind: Kind, coding: Coding) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes (whole numbers >= 0), scale, zero of x [..., G]. Codes are chosen with the rounded scale and zero."""
    absmean = x.abs().mean(-1)
    nothing = torch.zeros_like(absmean).to(coding.scale)
    if kind == "q1":
        return (x >= 0), _stored(absmean, coding), None if coding.tight else nothing
    if kind == "ternary":
        codes = x.sign() * (x.abs() > coding.gamma * absmean[..., None])
        scale = _ternary_scale(x, codes, absmean, coding)
        stored = None if coding.tight and coding.ternary == "none" else _stored(scale, coding)
        return codes + 1, stored, None if coding.tight else nothing
    top = 2 ** BITS[kind] - 1
    zero = _stored(x.amin(-1), coding)
    # a constant group has no range: any scale gives code 0, and 0 would give nan
    scale = _stored(((x.amax(-1) - zero.float()) / top).clamp(min=0), coding)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = ((x - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, top)
    return codes, scale, zero


def _stored(x: Tensor, coding: Coding) -> Tensor:
    limit = torch.finfo(coding.scale).max
    return x.clamp(-limit, limit).to(coding.scale)


def _ternary_scale(x: Tensor, codes: Tensor, absmean: Tensor, coding: Coding) -> Tensor:
    if coding.ternary != "lsq":
        return absmean  # "none" stores it, in the released layout, and does not use it
    chosen = codes.abs()
    return (x.abs() * chosen).sum(-1) / chosen.sum(-1).clamp(min=1)


def _decode(q: Quantised, codes: Tensor) -> Tensor:
    scale = 1.0 if q.scale is None else q.scale.float()[..., None]
    match q.kind:
        case "ternary":
            return (codes.float() - 1) * (1.0 if q.coding.ternary == "none" else scale)
        case "q1":
            signs = codes.float() if q.coding.q1 == "released01" else 2 * codes.float() - 1
            return signs * scale
        case _:
            assert q.zero is not None
            return codes.float() * scale + q.zero.float()[..., None]


# ---- packing ----------------------------------------------------------------------------------------------------------


def pack(codes: Int[Tensor, " n"], kind: Kind, *, tight: bool) -> UInt8[Tensor, " byte"]:
    """Whole numbers into bytes, the first in the lowest bits (trits: the first is the lowest digit to base 3)."""
    base, per = _digits(kind, tight)
    spare = -len(codes) % per
    digits = torch.cat([codes.long(), codes.new_zeros(spare).long()]).reshape(-1, per)
    return (digits * _powers(base, per, codes.device)).sum(1).to(torch.uint8)


def unpack(packed: UInt8[Tensor, " byte"], kind: Kind, n: int, *, tight: bool) -> Int[Tensor, " n"]:
    """The `n` numbers that `pack` packed."""
    base, per = _digits(kind, tight)
    return (packed.long()[:, None] // _powers(base, per, packed.device) % base).flatten()[:n]


def _digits(kind: Kind, tight: bool) -> tuple[int, int]:
    """(base, digits in a byte)"""
    if kind == "ternary":
        return (3, TRITS) if tight else (4, 4)
    return 2 ** BITS[kind], 8 // BITS[kind]


def _powers(base: int, per: int, device: torch.device) -> Tensor:
    return base ** torch.arange(per, device=device)


# ---- along channels: frequencies --------------------------------------------------------------------------------------


def to_frequencies(x: Tensor, fft: Fft) -> Tensor:
    """Real rows of the Fourier transform along axis -2 (channels): [..., channel, token] -> [..., row, token].

    "full": real and imaginary part of every frequency, 2 rows a channel (released). "rfft": a real signal needs only half
    of them: as many rows as channels, with nothing lost.
    """
    if fft == "off":
        return x
    if fft == "full":
        z = torch.fft.fft(x.float(), dim=-2)
        return torch.stack([z.real, z.imag], -2).flatten(-3, -2)
    z, n = torch.fft.rfft(x.float(), dim=-2), x.shape[-2]
    return torch.cat([z.real, z.imag[..., 1 : (n + 1) // 2, :]], -2)


def from_frequencies(rows: Tensor, fft: Fft, channels: int) -> Tensor:
    """Back to channels; of the full spectrum the real part is taken."""
    if fft == "off":
        return rows
    if fft == "full":
        z = rows.float().unflatten(-2, (channels, 2))
        return torch.fft.ifft(torch.complex(z[..., 0, :], z[..., 1, :]), dim=-2).real
    half = channels // 2 + 1
    real = rows[..., :half, :].float()
    imag = torch.zeros_like(real)
    imag[..., 1 : (channels + 1) // 2, :] = rows[..., half:, :]
    return torch.fft.irfft(torch.complex(real, imag), n=channels, dim=-2)
