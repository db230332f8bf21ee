"""What our own anywidgets share: their scripts and style, colour tables, pictures as JPEG, and the tie to a selection."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import anywidget
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from traitlets import HasTraits, Unicode

from lab.view.palette import anchors, rgb, rgba_scale
from lab.view.selection import Selection
from lab.view.view import asset

STEPS = 255  # colours of a scale; the scripts count from 0
LONGEST = 448  # pixels of the longer side of a frame that is sent to the browser


class Canvas(anywidget.AnyWidget):
    """Base of our widgets: one style sheet, and a sentence for readers of the screen."""

    _css = asset("widgets.css")
    title = Unicode("").tag(sync=True)
    unit = Unicode("").tag(sync=True)


def script(name: str) -> str:
    """A widget's script after what all scripts share."""
    return asset("common.js") + asset(name)


def colours(diverging: bool, *, on_picture: bool = False) -> bytes:
    """The scale as rgba bytes [STEPS, 4], from its lower to its upper limit; see-through at rest on a picture."""
    if on_picture:
        table = np.array(rgba_scale(diverging)) * 255
    else:
        table = np.array([(*rgb(c), 255) for c in anchors(diverging)], float)
    at, known = np.linspace(0, len(table) - 1, STEPS), np.arange(len(table))
    return (
        np.stack([np.interp(at, known, table[:, c]) for c in range(4)], 1).round().astype(np.uint8).tobytes()
    )


def jpegs(frames: NDArray[np.uint8], longest: int = LONGEST) -> list[bytes]:
    """Frames uint8 [frame, height, width, 3] as one JPEG each, shrunk so that the longer side is at most `longest`."""
    return [_jpeg(f, longest) for f in frames]


def _jpeg(frame: NDArray[np.uint8], longest: int) -> bytes:
    image, out = Image.fromarray(np.ascontiguousarray(frame), "RGB"), io.BytesIO()
    image.thumbnail((longest, longest))
    # small simulated frames: chroma at full size keeps the edges of their few pixels
    image.save(out, "JPEG", quality=90, subsampling=0 if max(image.size) <= 128 else 2)
    return out.getvalue()


def floats(values: Any) -> bytes:
    """Values as little-endian float32; what is not finite becomes nan, which the scripts draw as missing."""
    array = np.asarray(values, float)
    return np.where(np.isfinite(array), array, np.nan).astype("<f4").tobytes()


def ints(values: Any) -> bytes:
    """Whole numbers as little-endian int32."""
    return np.asarray(values).astype("<i4").tobytes()


def extent(values: Any, middle: float = 0.0) -> tuple[tuple[float, float], bool]:
    """(limits, diverging) of a colour scale: centred on the middle where a value lies below it."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    if not known.size:
        return (middle, middle + 1.0), False
    if float(known.min()) < middle:
        half = float(np.abs(known - middle).max())
        return (middle - half, middle + half), True
    top = float(known.max())
    return (middle, top if top > middle else middle + 1.0), False


def tie(widget: HasTraits, selection: Selection, names: Sequence[str]) -> None:
    """Keep the traits of a widget and of the selection that have these names equal, the selection's first."""
    for name in names:
        setattr(widget, name, _plain(getattr(selection, name)))
    widget.observe(lambda c: selection.set(**{c["name"]: _plain(c["new"])}), list(names))
    selection.observe(lambda c: setattr(widget, c["name"], _plain(c["new"])), list(names))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
