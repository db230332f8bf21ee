"""Edits: one world's values at a site replaced, by another world's (`take`), by noise, or by a mean.

Layers are 0-based numbers as in hook names, or a 1-based text as in policy files ("3-5"). Rows are named by segment
(see `lab.edges.segments`), frame, or position; heads by number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.ranges import parse_layers
from lab.edges.segments import roles_here, segment
from lab.errors import ConfigError, UsageError
from lab.patch.sites import MAPS, check_site

# (own values of the world [pos, ...], rows [row], the source world's values [row, ...] or None) -> [row, ...]
Values = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Edit:
    """In world `into`, at `site` of some layers: the rows named get the values that `values` makes.

    source     the world whose values are taken; None for noise and means
    layers     0-based; None: every layer that has the site
    role, frame, positions   which rows: a segment, frames of it, or positions outright
    heads      None: all (or the site has none)
    """

    into: str
    site: str
    values: Values
    source: str | None = None
    layers: tuple[int, ...] | None = None
    role: str = "*"
    frame: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def rows(self, tokens: TokenMap, item: VideoQA | None = None) -> Tensor:
        """Positions that are edited, ascending. Raises UsageError if the prompt has none of them."""
        n = len(tokens)
        if self.positions is not None:
            outside = [p for p in self.positions if not 0 <= p < n]
            if outside:
                raise UsageError(f"position {outside[0]}: the prompt has positions 0..{n - 1}")
            return torch.tensor(sorted(set(self.positions)), dtype=torch.long)
        found = segment(tokens, self.role, item)
        if self.frame is not None:
            found = found[torch.isin(tokens.frame[found], torch.tensor(self.frame))]
        if not len(found):
            raise UsageError(
                f"no token of {self.role!r} lies in frame {list(self.frame or ())}; the prompt has frames "
                f"0..{int(tokens.frame.max())} and {', '.join(roles_here(tokens))}"
            )
        return found


def take(
    way: str, *, site: str = "resid_pre", layers: Any = None, role: str = "*", frame: Any = None, head: Any = None,
    positions: Any = None,
) -> Edit:  # fmt: skip
    """take("clean -> corrupted", ...): the corrupted world goes on with the clean world's values.

    At "embed", "resid_pre" and "resid_post" the rows bring along what DeepStack (Qwen3-VL) will still add to them: all
    rows taken at any layer make the other world exactly.
    Raises UsageError if `way` does not name two different worlds, or for an unknown site or layer text.
    """
    source, arrow, into = (part.strip() for part in str(way).partition("->"))
    if not arrow or not source or not into or source == into:
        raise UsageError(f"take() goes from one world to another, as in 'clean -> corrupted'; got {way!r}")
    return _edit(into, source, taken, site, layers, role, frame, head, positions)


def noise(
    into: str, *, sd: float = 3.0, seed: int = 0, site: str = "resid_pre", layers: Any = None, role: str = "*",
    frame: Any = None, head: Any = None, positions: Any = None,
) -> Edit:  # fmt: skip
    """Gaussian noise added: `sd` times the standard deviation of the site's values over the world's positions.

    (Causal tracing, arXiv 2202.05262, corrupts embeddings with 3 of them.)
    """
    if not sd > 0:
        raise UsageError(f"noise needs sd above 0, got {sd!r}")
    return _edit(into, None, _Noise(float(sd), int(seed)), site, layers, role, frame, head, positions)


def mean(
    into: str, *, of: Tensor | None = None, site: str = "resid_pre", layers: Any = None, role: str = "*",
    frame: Any = None, head: Any = None, positions: Any = None,
) -> Edit:  # fmt: skip
    """Mean ablation: every row gets the mean over the rows replaced, or `of`: a mean over a data set, [..., d]."""
    return _edit(into, None, _Mean(of), site, layers, role, frame, head, positions)


# ---- where values come from -----------------------------------------------------------------------------------------


def taken(own: Tensor, rows: Tensor, theirs: Tensor | None) -> Tensor:
    """The source world's values."""
    assert theirs is not None
    return theirs


@dataclass(frozen=True)
class _Noise:
    sd: float
    seed: int

    def __call__(self, own: Tensor, rows: Tensor, theirs: Tensor | None) -> Tensor:
        here = own[rows]
        dice = torch.Generator().manual_seed(self.seed)  # on the CPU: the same noise on every device
        drawn = torch.randn(here.shape, generator=dice, dtype=torch.float32)
        return here + (self.sd * own.float().std() * drawn.to(here.device)).to(here.dtype)


@dataclass(frozen=True, eq=False)
class _Mean:
    of: Tensor | None

    def __call__(self, own: Tensor, rows: Tensor, theirs: Tensor | None) -> Tensor:
        here = own[rows]
        made = here.mean(0, keepdim=True) if self.of is None else self.of.to(here)
        try:
            return made.expand_as(here)
        except RuntimeError:
            raise UsageError(
                f"the mean given has shape {tuple(made.shape)}, the site's rows {tuple(here.shape[1:])}"
            ) from None


# ---- reading what was asked -----------------------------------------------------------------------------------------


def _edit(
    into: str, source: str | None, values: Values, site: str, layers: Any, role: str, frame: Any, head: Any, positions: Any
) -> Edit:  # fmt: skip
    if check_site(site) in MAPS and source is None:
        raise UsageError(
            f"noise and means at {site!r} would not be attention; use 'z', or cut edges with a policy"
        )
    return Edit(
        into, site, values, source, _layers(layers), role, _numbers(frame, "frame"), _numbers(positions, "positions"),
        _numbers(head, "head"),
    )  # fmt: skip


def _layers(given: Any) -> tuple[int, ...] | None:
    if not isinstance(given, str):
        return _numbers(given, "layers")
    if given == "all":
        return None
    try:
        return parse_layers(given)
    except ConfigError as e:
        raise UsageError(str(e)) from None


def _numbers(given: Any, what: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    if isinstance(given, Tensor):
        given = given.tolist()
    some: Sequence[Any] = (
        [given] if not isinstance(given, Iterable) or isinstance(given, str) else list(given)
    )
    if not some or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in some):
        raise UsageError(f"{what} must be a whole number or several, got {given!r}")
    if min(some) < 0:
        raise UsageError(f"{what} counts from 0, got {min(some)}")
    return tuple(int(n) for n in some)
