"""HeatMap: layers against frames (or segments, pathways, heads, positions): where along the depth something happens.

HeatMap(knockout(model, items, ["frame:0->last", ...], window=3))
HeatMap(segment_mass(model, ready).result(), x="key")       # heads averaged; a control scrubs the query segment
"""

from __future__ import annotations

from lab.errors import UsageError
from lab.result import Result
from lab.view.heat_view import HeatView
from lab.view.selection import Selection

DEPTHS = ("layer", "window", "first", "last")
ACROSS = ("frame", "key_frame", "key frame", "key", "role", "segment", "pathway", "pair", "query", "head", "option", "pos", "k")  # fmt: skip


class HeatMap(HeatView):
    """Layer x frame or role. A click selects the layer and what the column stands for.

    x          the axis to the right; None: the first of frame, key, role, pathway, ... that the result has
    limits, diverging   as in `figure_spec`
    Heads are averaged unless they are `x`; every other axis gets a control (numbers: with Play).
    Raises UsageError for a result without layers or without anything to set against them.
    """

    css = "vl-heat"

    def __init__(
        self, result: Result, *, x: str | None = None, limits: tuple[float, float] | None = None,
        diverging: bool | None = None, selection: Selection | None = None, theme: str = "auto",
    ) -> None:  # fmt: skip
        depth = next((a for a in DEPTHS if a in result.axes), None)
        across = x or next((a for a in ACROSS if a in result.axes), None)
        if depth is None or across is None:
            raise UsageError(
                f"a heat map needs an axis of layers and one to set against it; the result has {result.axes}"
            )
        averaged = () if across == "head" else ("head",)
        super().__init__(
            result, depth, across, averaged=averaged, limits=limits, diverging=diverging, selection=selection,
            theme=theme,
        )  # fmt: skip
