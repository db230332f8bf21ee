"""The segments of a prompt that edges are scored between: disjoint, named as cuts name them.

"strict"  every position: roles, frames and options one by one (frame:0, option:1); they partition the prompt
"paper"   the released segments (Map the Flow); what belongs to none of them is no segment here
names     any disjoint segments of `lab.edges.segments`, e.g. ("before-video", "video", "after-video", "last")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.segments import NUMBERED, Segmentation, members, roles_here
from lab.errors import ConfigError, UsageError

Grid = str | Sequence[str]
PAPER_NAMES = ("frame", "separator", "stem", "option", "last")


def check_grid(grid: Grid) -> None:
    """Raises UsageError for what names no segments."""
    if isinstance(grid, str):
        if grid not in ("strict", "paper"):
            raise UsageError(f"segmentation={grid!r}; use 'strict', 'paper', or a list of segment names")
        return
    if not isinstance(grid, list | tuple) or not len(grid) or not all(isinstance(name, str) for name in grid):
        raise UsageError(f"segmentation must be 'strict', 'paper' or names of segments, got {grid!r}")
    if len(set(grid)) < len(grid):
        raise UsageError(f"a segment is named twice in {list(grid)}")


def rule_of(grid: Grid) -> Segmentation:
    """Which segmentation a cut between these segments must be written in."""
    return "paper" if grid == "paper" else "strict"


def segments_of(tokens: TokenMap, grid: Grid, item: VideoQA | None = None) -> dict[str, Tensor]:
    """name -> positions, ascending, of every segment this prompt has, in the order of their first positions.

    Raises UsageError for unknown names, segments that overlap, or a prompt that has none of them.
    """
    check_grid(grid)
    try:
        found = {n: members(tokens, n, item, rule_of(grid)) for n in _names(tokens, grid)}
    except ConfigError as e:
        raise UsageError(str(e)) from None
    at = {name: hit.nonzero().squeeze(1) for name, hit in found.items() if bool(hit.any())}
    if not at:
        raise UsageError(f"this prompt has none of {list(found)}; it has: {', '.join(roles_here(tokens))}")
    _check_disjoint(at, len(tokens))
    return dict(sorted(at.items(), key=lambda pair: int(pair[1][0])))


def _names(tokens: TokenMap, grid: Grid) -> list[str]:
    if not isinstance(grid, str):
        return list(grid)
    roles = [r for r in roles_here(tokens) if r not in ("pad", "generated")]
    return [name for role in (roles if grid == "strict" else PAPER_NAMES) for name in _numbered(tokens, role)]


def _numbered(tokens: TokenMap, role: str) -> list[str]:
    """frame:0, frame:1, ... for roles that are counted; the role itself for the others."""
    if role not in NUMBERED:
        return [role]
    column = (tokens.frame if role == "frame" else tokens.option)[members(tokens, role)]
    if bool((column < 0).any()):
        return [role]  # a prompt whose frames or options nobody counted
    return [f"{role}:{int(i)}" for i in column.unique()]


def _check_disjoint(at: dict[str, Tensor], n: int) -> None:
    owner = torch.full((n,), -1)
    names = list(at)
    for i, positions in enumerate(at.values()):
        taken = owner[positions]
        if bool((taken >= 0).any()):
            other = names[int(taken[taken >= 0][0])]
            raise UsageError(
                f"segments {other!r} and {names[i]!r} share positions; scores need disjoint ones"
            )
        owner[positions] = i


def kind_of(name: str) -> str:
    """A segment's name without its number: frame:3 -> frame."""
    role, colon, _ = name.partition(":")
    return role if colon and role in NUMBERED else name


def merged(orders: Iterable[Sequence[str]]) -> list[str]:
    """All names of several prompts, in an order that keeps each prompt's own as far as they agree."""
    out: list[str] = []
    for names in orders:
        for i, name in enumerate(names):
            if name not in out:
                after = next((out.index(later) for later in names[i + 1 :] if later in out), len(out))
                out.insert(after, name)
    return out
