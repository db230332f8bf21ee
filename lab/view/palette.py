"""Colours, markers and dashes that both back ends share, all safe for colour-blind readers. Knows no data."""

from __future__ import annotations

from typing import NamedTuple


class Stroke(NamedTuple):
    """How one curve is drawn: colour, and the names of marker and dash in matplotlib and in plotly."""

    colour: str
    marker: str
    dash: str
    symbol: str
    plotly_dash: str


# Okabe and Ito's colours, without black and yellow, which vanish on dark or white paper. A marker and a dash go with
# each, so that curves stay apart in print without colour.
STROKES = (
    Stroke("#0072B2", "o", "-", "circle", "solid"),
    Stroke("#D55E00", "s", "--", "square", "dash"),
    Stroke("#009E73", "^", "-.", "triangle-up", "dashdot"),
    Stroke("#CC79A7", "D", ":", "diamond", "dot"),
    Stroke("#E69F00", "v", "-", "triangle-down", "longdash"),
    Stroke("#56B4E9", "P", "--", "cross", "longdashdot"),
    Stroke("#8C8C8C", "X", "-.", "x", "solid"),
)

# Anchors, evenly spaced: ColorBrewer's PuOr (minus = orange, plus = purple) and cividis.
DIVERGING = (
    "#7f3b08", "#b35806", "#e08214", "#fdb863", "#fee0b6", "#f7f7f7",
    "#d8daeb", "#b2abd2", "#8073ac", "#542788", "#2d004b",
)  # fmt: skip
SEQUENTIAL = (
    "#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
)  # fmt: skip


def stroke(i: int) -> Stroke:
    """The i-th curve's stroke; past the end they repeat."""
    return STROKES[i % len(STROKES)]


def anchors(diverging: bool) -> tuple[str, ...]:
    """The colours of a scale, from its lower to its upper limit."""
    return DIVERGING if diverging else SEQUENTIAL


def grey(diverging: bool) -> str:
    """Colour of values that are not finite: a grey that the scale itself does not contain."""
    return "#8c8c8c" if diverging else "#d9d9d9"


def rgb(colour: str) -> tuple[int, int, int]:
    """#rrggbb as three numbers 0..255."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def rgba_scale(diverging: bool) -> list[tuple[float, float, float, float]]:
    """The scale as rgba 0..1, see-through where the value says little, so that a picture below stays visible."""
    colours = DIVERGING[1:-1] if diverging else SEQUENTIAL  # the darkest ends would turn to mud on a picture
    last = len(colours) - 1
    out: list[tuple[float, float, float, float]] = []
    for i, colour in enumerate(colours):
        strength = abs(2 * i / last - 1) if diverging else i / last
        r, g, b = (c / 255 for c in rgb(colour))
        out.append((r, g, b, round(0.04 + 0.62 * strength, 3)))
    return out
