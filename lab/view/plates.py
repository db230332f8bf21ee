"""Plates: several figures as one picture for a paper, in the width of a column or of a page. Torch-free; draws nothing.

    Plate("Title", ((a, b), (c,)), caption="What is shown; n = 20.", width=FULL, heights=(1.6, 2.0))

Panels are lettered in reading order. What a reader must know to read the numbers is the caption, which stands beside
the picture (in the manifest, on the page), not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lab.errors import UsageError
from lab.view.specs import FigureSpec

COLUMN, FULL = 3.3, 6.9  # inches: one column, both columns of a paper


@dataclass(frozen=True, eq=False)
class Plate:
    """Rows of figures.

    title    a few words, for pages and lists
    caption  one paragraph: what is shown, over how many items, what the bands are
    width    inches; heights: of every row
    shares   how wide the figures of a row are, relative to each other; one tuple a row, () for equal ones
    legend   "below" each row once (its first figure's curves), or "inside" every figure
    letters  whether figures are lettered (a), (b), ...
    """

    title: str
    rows: tuple[tuple[FigureSpec, ...], ...]
    caption: str
    width: float = COLUMN
    heights: tuple[float, ...] = ()
    shares: tuple[tuple[float, ...], ...] = ()
    legend: str = "below"
    letters: bool = True
    alt: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if not self.rows or not all(self.rows):
            raise UsageError(
                f"a plate needs at least one figure in each row, got {[len(r) for r in self.rows]}"
            )
        heights = self.heights or (1.9,) * len(self.rows)
        if len(heights) != len(self.rows):
            raise UsageError(f"{len(heights)} heights for {len(self.rows)} rows; give one each")
        object.__setattr__(self, "heights", tuple(heights))

    @property
    def figures(self) -> list[FigureSpec]:
        """All figures in reading order."""
        return [f for row in self.rows for f in row]

    @property
    def across(self) -> tuple[int, ...]:
        """Figures in each row."""
        return tuple(len(r) for r in self.rows)


def one_scale(specs: Sequence[FigureSpec], *, room: float = 0.05) -> tuple[FigureSpec, ...]:
    """Line figures with one scale of values, so that their heights can be compared."""
    ends = [a for s in specs for a in (s.values, s.low, s.high) if a is not None]
    ends += [np.array([s.reference]) for s in specs if s.reference is not None]
    known = np.concatenate([a[np.isfinite(a)].ravel() for a in ends])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    more = room * (high - low) or 1.0
    return tuple(replace(s, limits=(low - more, high + more)) for s in specs)
