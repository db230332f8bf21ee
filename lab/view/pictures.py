"""Pictures that are no single FigureSpec, written to files: the same bytes each time, and no network in a page."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.figure import Figure as Picture

from lab.errors import UsageError
from lab.result import write_bytes
from lab.view.matplotlib_out import SUFFIXES, styled
from lab.view.pages import POLICY

# no dates in the files
METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None, "ModDate": None},
}


def write_picture(
    path: str | Path, *, draw: Callable[[], Picture], page: Callable[[], go.Figure], title: str
) -> Path:
    """Writes .png, .svg or .pdf (what `draw` makes with matplotlib) or .html (what `page` makes with plotly)."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".html":
        rule = f'<head><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{html.escape(title)}</title>'
        text = page().to_html(include_plotlyjs=True)
        return write_bytes(path, text.replace("<head>", rule, 1).encode())
    if suffix not in SUFFIXES:
        raise UsageError(f"cannot tell the format of {path}; end its name in {', '.join(SUFFIXES)} or .html")
    out = io.BytesIO()
    with styled():
        draw().savefig(out, format=suffix[1:], dpi=130, metadata=METADATA[suffix])
    return write_bytes(path, out.getvalue())
