"""Links -> a plotly Sankey, or the same ribbons in matplotlib. Segments stand in one order in every column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve
from plotly import graph_objects as go

from lab.view.flow_links import Link
from lab.view.matplotlib_out import styled
from lab.view.palette import DIVERGING, rgb, stroke
from lab.view.plotly_out import Figure, _safe
from lab.view.specs import text, wrapped

MINUS, PLUS = DIVERGING[2], DIVERGING[8]  # orange, purple
GAP = 0.04  # between the bars of a column, in heights of the highest column
BAR = 0.03  # width of a bar, in columns


@dataclass(frozen=True)
class FlowPicture:
    """What is drawn.

    links     those shown; segments: their order from the top; columns: names of the layer groups
    picked    (query, key) drawn strongest, if any
    """

    links: tuple[Link, ...]
    segments: tuple[str, ...]
    columns: tuple[str, ...]
    title: str
    unit: str
    caption: str = ""
    picked: tuple[str, str] | None = None

    @property
    def signed(self) -> bool:
        """Whether any link is below 0."""
        return any(x.value < 0 for x in self.links)

    def colour(self, link: Link) -> str:
        """By sign where there are two, else by what is read."""
        if self.signed:
            return MINUS if link.value < 0 else PLUS
        return stroke(self.segments.index(link.key)).colour

    def strength(self, link: Link) -> float:
        """Opacity: the picked pair stands out."""
        if self.picked is None:
            return 0.45
        return 0.85 if (link.query, link.key) == self.picked else 0.15


def nodes(picture: FlowPicture) -> list[tuple[int, str]]:
    """(column, segment) of every bar: column g stands in front of layer group g."""
    ends = {n for x in picture.links for n in ((x.group, x.key), (x.group + 1, x.query))}
    return sorted(ends, key=lambda n: (n[0], picture.segments.index(n[1])))


def flow_plotly(picture: FlowPicture) -> Figure:
    """A Sankey diagram; the width of a link is its size."""
    bars, n = nodes(picture), len(picture.columns)
    at = {bar: i for i, bar in enumerate(bars)}
    height = max(1, len(picture.segments))
    fig = Figure(go.Sankey(
        arrangement="snap",
        node={
            "label": [_safe(s) for _, s in bars], "pad": 14, "thickness": 14, "line": {"width": 0},
            "color": [stroke(picture.segments.index(s)).colour for _, s in bars],
            # 0 and 1 themselves are taken for "not given"
            "x": [0.001 + 0.998 * g / n for g, _ in bars], "y": [0.02 + 0.9 * picture.segments.index(s) / height for _, s in bars],
            "hovertemplate": "%{label}<extra></extra>",
        },
        link={
            "source": [at[x.group, x.key] for x in picture.links], "target": [at[x.group + 1, x.query] for x in picture.links],
            "value": [abs(x.value) for x in picture.links], "color": [_rgba(picture.colour(x), picture.strength(x)) for x in picture.links],
            "customdata": [[_safe(f"{x.key} → {x.query}"), picture.columns[x.group], text(x.value)] for x in picture.links],
            "hovertemplate": f"%{{customdata[0]}}, layers %{{customdata[1]}}: <b>%{{customdata[2]}}</b> {_safe(picture.unit)}<extra></extra>",
        },
    ))  # fmt: skip
    for g, name in enumerate(picture.columns):
        fig.add_annotation(x=(g + 0.5) / n, y=1.06, xref="paper", yref="paper", text=f"layers {name}", showarrow=False, font={"size": 12})  # fmt: skip
    fig.update_layout(
        template="none", title={"text": _safe(picture.title), "x": 0, "xref": "paper", "font": {"size": 16}}, height=460,
        paper_bgcolor="rgba(0,0,0,0)", margin={"l": 10, "r": 10, "t": 78, "b": 20},
        font={"family": "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", "color": "#1d2126"},
    )  # fmt: skip
    return fig


def flow_matplotlib(picture: FlowPicture) -> Picture:
    """The same ribbons for paper."""
    with styled():
        fig = Picture(figsize=(8.5, 4.8), layout="constrained")
        FigureCanvasAgg(fig)
        ax = fig.add_subplot()
        ax.set_axis_off()
        ax.set_title(wrapped(picture.title, 90), loc="left")
        _ribbons(ax, picture)
        fig.supxlabel(wrapped(picture.caption, 120), fontsize=8, color="#555555", x=0.01, ha="left")
        return fig


def _ribbons(ax: Axes, picture: FlowPicture) -> None:
    bars = bars_of(picture)
    ends: dict[tuple[int, str, str], float] = {}
    highest = max((bottom for _, bottom in bars.values()), default=1.0)
    for (g, name), (top, bottom) in bars.items():
        ax.add_patch(Rectangle((g - BAR / 2, top), BAR, bottom - top, color=stroke(picture.segments.index(name)).colour))  # fmt: skip
        side = "right" if g == len(picture.columns) else "left"
        place = g - BAR if side == "right" else g + BAR
        ax.text(place, (top + bottom) / 2, name, fontsize=8, ha=side, va="center")
    for link in sorted(picture.links, key=lambda x: (x.group, picture.segments.index(x.query))):
        sides = [
            _taken(ends, (*bar, way), bars[bar][0], abs(link.value))
            for bar, way in (((link.group, link.key), "out"), ((link.group + 1, link.query), "in"))
        ]
        ax.add_patch(
            _ribbon(sides[0], sides[1], abs(link.value), picture.colour(link), picture.strength(link))
        )
    for g, name in enumerate(picture.columns):
        ax.text(g + 0.5, -0.03 * highest, f"layers {name}", fontsize=9, ha="center", va="bottom")
    ax.set(xlim=(-0.1, len(picture.columns) + 0.1), ylim=(highest * 1.02, -0.09 * highest))


def _taken(
    ends: dict[tuple[int, str, str], float], bar: tuple[int, str, str], top: float, width: float
) -> tuple[float, float]:
    """Where a ribbon meets a bar: below those that were drawn before it."""
    start = ends.get(bar, top)
    ends[bar] = start + width
    return bar[0], start


def bars_of(picture: FlowPicture) -> dict[tuple[int, str], tuple[float, float]]:
    """(column, segment) -> top and bottom of its bar: as high as what enters or leaves it, whichever is more."""
    tall: dict[tuple[int, str], float] = {}
    for bar in nodes(picture):
        out = sum(abs(x.value) for x in picture.links if (x.group, x.key) == bar)
        into = sum(abs(x.value) for x in picture.links if (x.group + 1, x.query) == bar)
        tall[bar] = max(out, into)
    columns = range(len(picture.columns) + 1)
    gap = GAP * max((sum(h for (g, _), h in tall.items() if g == c) for c in columns), default=0.0)
    places: dict[tuple[int, str], tuple[float, float]] = {}
    for c in columns:
        top = 0.0
        for bar in (b for b in tall if b[0] == c):
            places[bar] = (top, top + tall[bar])
            top += tall[bar] + gap
    return places


def _ribbon(
    start: tuple[float, float], end: tuple[float, float], width: float, colour: str, alpha: float
) -> PathPatch:
    (x0, y0), (x1, y1), middle = start, end, (start[0] + end[0]) / 2
    x0, x1 = x0 + BAR / 2, x1 - BAR / 2
    points = [
        (x0, y0), (middle, y0), (middle, y1), (x1, y1), (x1, y1 + width), (middle, y1 + width), (middle, y0 + width),
        (x0, y0 + width), (x0, y0),
    ]  # fmt: skip
    codes = [Curve.MOVETO, *[Curve.CURVE4] * 3, Curve.LINETO, *[Curve.CURVE4] * 3, Curve.CLOSEPOLY]
    return PathPatch(Curve(points, codes), facecolor=colour, alpha=alpha, edgecolor="none")


def _rgba(colour: str, alpha: float) -> str:
    r, g, b = rgb(colour)
    return f"rgba({r},{g},{b},{alpha})"


def caption_of(links: Sequence[Link], whole: int, threshold: float) -> str:
    """How many links are shown."""
    return f"{len(links)} of {whole} links: those of at least {threshold:.0%} of the strongest; widths are sizes."
