"""Flow: a Sankey of what passes between segments of the prompt, layer group by layer group.

Flow(segment_mass(model, ready).result())          shares of attention
Flow(knockout(model, items))                       what cutting each pathway changes: orange below 0, purple above
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ipywidgets as W

from lab.result import Result
from lab.view.flow_links import first_layer, grouped, links, merged, order_of, pair_table
from lab.view.flow_out import FlowPicture, caption_of, flow_matplotlib, flow_plotly
from lab.view.live import LiveView
from lab.view.pictures import write_picture
from lab.view.plotly_out import Figure
from lab.view.selection import Selection
from lab.view.specs import text

GROUPS = 4
MOST_GROUPS = 8
THRESHOLD = 0.05


class Flow(LiveView):
    """Segments x layer groups. A click on a link selects its pair of segments.

    result     axes (layer, query, key) or (layer, pathway), items, seeds and heads averaged
    groups     layer groups, 1 to 8
    threshold  links weaker than this share of the strongest are left out
    Raises UsageError for a result that says nothing about pairs of segments.
    """

    css = "vl-flow"
    follows = ("pair",)

    def __init__(
        self, result: Result, *, groups: int = GROUPS, threshold: float = THRESHOLD, selection: Selection | None = None,
        theme: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(selection, theme)
        self.whole = pair_table(result)
        n = len(self.whole.coords["layer"])
        self.groups = self.control("groups", W.IntSlider(min(groups, n), min=1, max=min(MOST_GROUPS, n), description="Layer groups"))  # fmt: skip
        self.threshold = self.control(
            "threshold", W.FloatSlider(threshold, min=0.0, max=1.0, step=0.01, description="Threshold", continuous_update=False)
        )  # fmt: skip
        self.within = self.control("within", W.Checkbox(False, description="within a segment", indent=False))
        self.frames = self.control("each_frame", W.Checkbox(False, description="each frame", indent=False))
        if not _has_frames(self.whole) or "pathway" in result.axes:
            self.frames.value = (
                True  # effects of cutting frames one by one do not add up to that of cutting all
            )
            self.frames.layout.display = "none"
        for name, widget in self.controls.items():
            widget.add_class(f"vl-{name.replace('_', '-')}")

    def result(self) -> Result:
        """Means over layer groups, axes (layers, query, key), above the threshold or not."""
        each = bool(self.frames.value)
        table = self.whole if each else merged(self.whole, frames=True, options=True)
        return grouped(table, int(self.groups.value))

    def drawing(self) -> FlowPicture:
        """What both back ends draw."""
        table = self.result()
        within, threshold = bool(self.within.value), float(self.threshold.value)
        shown, every = links(table, threshold=threshold, within=within), links(table, threshold=0, within=within)  # fmt: skip
        sign = "; orange: below 0, purple: above" if any(x.value < 0 for x in shown) else ""
        return FlowPicture(
            tuple(shown), tuple(order_of(table, shown)), tuple(table.coords["layers"]),
            f"{table.name or 'Flow'}: {table.unit}{sign}", table.unit, caption_of(shown, len(every), threshold),
            self.selection.pair,
        )  # fmt: skip

    def picture(self) -> Figure:
        """The Sankey."""
        return flow_plotly(self.drawing())

    def alt(self) -> str:
        """Every link that is shown."""
        drawing = self.drawing()
        links = "; ".join(f"layers {drawing.columns[x.group]}: {x.key} to {x.query} {text(x.value)}" for x in drawing.links[:12])  # fmt: skip
        return f"Flow diagram: {drawing.title}. {drawing.caption} Strongest: {links}."

    def words(self) -> str:
        """How much is shown, and what is selected."""
        pair = self.selection.pair
        return self.drawing().caption + (f" Selected: {pair[1]} → {pair[0]}." if pair else "")

    def clicked(self, trace: int, point: Any) -> None:
        """A link selects its pair, the first layer of its group, and the frame that is read."""
        shown = self.drawing().links
        if not isinstance(point, int) or not 0 <= point < len(shown):
            return
        link = shown[point]
        role, _, number = link.key.partition(":")
        frame = {"frame": int(number)} if role == "frame" and number.isdecimal() else {}
        layer = first_layer(self.whole, int(self.groups.value), link.group)
        self.selection.set(pair=(link.query, link.key), layer=layer, **frame)

    def _save_picture(self, path: Path) -> Path:
        drawing = self.drawing()
        return write_picture(
            path, draw=lambda: flow_matplotlib(drawing), page=lambda: flow_plotly(drawing), title=drawing.title
        )  # fmt: skip


def _has_frames(table: Result) -> bool:
    return any(str(c).startswith("frame:") for c in table.coords["key"])
