"""report(): one self-contained HTML page from a list of Results. Opens from disk, asks the network for nothing.

plotly.js stands in the page once. A Content-Security-Policy forbids every request, so even a future plotly release
could not make one. Figures follow the reader's light or dark setting; every picture has a text alternative, every
number is in a table and in a CSV link, and the recipe that made it all can be copied.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from lab.errors import UsageError
from lab.result import Result, write_bytes
from lab.view.plotly_out import CONFIG, picture_uri, to_plotly
from lab.view.specs import FigureSpec, figure_spec, text
from lab.yamlfile import as_yaml

MAX_ROWS = 200  # rows of a table in the page
MAX_WHOLE = 40  # rows of a table that is a figure, which is shown whole
MAX_CSV = 4_000_000  # bytes of a CSV link; larger tables stay in the saved Result
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"


@dataclass(frozen=True)
class Answer:
    """What the model answered, for the top of a page.

    probs   probability of each option (of the whole vocabulary, so they need not add up to 1)
    chosen  index of the model's option; truth: index of the right one, None if unknown
    said    the text of an open answer
    """

    question: str
    options: Sequence[str] = ()
    probs: Sequence[float] = ()
    chosen: int | None = None
    truth: int | None = None
    said: str = ""
    note: str = ""


def report(
    results: Result | FigureSpec | Sequence[Result | FigureSpec],
    path: str | Path,
    *,
    title: str,
    intro: str = "",
    answer: Answer | None = None,
    pictures: Mapping[str, Any] | None = None,
    frames: Any = None,
    across: Sequence[int] = (),
) -> Path:
    """Writes the page and returns its path.

    intro     paragraphs, separated by an empty line
    pictures  heading -> uint8 [frame, height, width, 3] or [height, width, 3]
    frames    the same pictures below every strip Result that has as many frames
    across    how many figures stand side by side in each line; what is left over stands one below the other
    Raises UsageError for pictures that are none, or a path that cannot be written.
    """
    given = [results] if isinstance(results, Result | FigureSpec) else list(results)
    parts = [_answer(answer), *(_pictures(name, p) for name, p in (pictures or {}).items())]
    parts += _in_lines([_figure(i, one, frames) for i, one in enumerate(given, 1)], across)
    recipes = [r.recipe for r in given if isinstance(r, Result) and r.recipe]
    unique = [r for i, r in enumerate(recipes) if r not in recipes[:i]]
    parts += [_recipe(i, r) for i, r in enumerate(unique, 1)]
    return write_bytes(path, _page(title, intro, "\n".join(p for p in parts if p)).encode())


def _page(title: str, intro: str, body: str) -> str:
    folder = files("lab.view")
    style, script = (folder.joinpath(n).read_text("utf-8") for n in ("page.css", "page.js"))
    words = "".join(f"<p>{_e(p)}</p>" for p in intro.split("\n\n") if p.strip())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_e(title)}</title>
<style>{style}</style>
<script>{get_plotlyjs()}</script>
</head><body>
<a class="skip" href="#main">Skip to the content</a>
<main id="main"><header><h1>{_e(title)}</h1>{words}</header>
{body}
</main>
<script type="application/json" id="plot-config">{_json(CONFIG)}</script>
<script>{script}</script>
</body></html>
"""


def _in_lines(figures: list[str], across: Sequence[int]) -> list[str]:
    out: list[str] = []
    for n in across:
        line, figures = figures[:n], figures[n:]
        out.append(
            f'<div class="line" style="--across:{n}">{"".join(line)}</div>' if n > 1 else "".join(line)
        )
    return out + figures


def _answer(a: Answer | None) -> str:
    if a is None:
        return ""
    probs = list(a.probs) or [float("nan")] * len(a.options)
    rows = "".join(_option(a, i, o, p) for i, (o, p) in enumerate(zip(a.options, probs, strict=True)))
    table = (
        f'<table class="options"><caption class="hidden">Answer options</caption>{_OPTION_HEAD}{rows}</table>'
    )
    said = f'<p class="said">{_e(a.said)}</p>' if a.said else ""
    note = f'<p class="note">{_e(a.note)}</p>' if a.note else ""
    return f"""<section aria-labelledby="answer"><h2 id="answer">The answer</h2>
<p class="question">{_e(a.question)}</p>{said}{_verdict(a)}{table if a.options else ""}{note}</section>"""


_OPTION_HEAD = (
    '<thead class="hidden"><tr><th scope="col">Option</th><th scope="col">Probability</th>'
    '<th scope="col">Value</th><th scope="col">Remark</th></tr></thead>'
)


def _option(a: Answer, i: int, option: str, p: float) -> str:
    known = bool(np.isfinite(p))
    width = 100 * min(max(p, 0.0), 1.0) if known else 0.0
    marks = [w for w, at in (("model's answer", a.chosen), ("right answer", a.truth)) if at == i]
    shown = f"{100 * p:.1f} %" if known else "unknown"
    chosen = ' class="chosen"' if a.chosen == i else ""
    return (
        f'<tr{chosen}><th scope="row"><span class="letter">{LETTERS[i % 26]}</span> {_e(option)}</th>'
        f'<td class="track"><div class="bar" style="width:{width:.2f}%"></div></td>'
        f'<td class="num">{shown}</td><td class="marks">{_e(" · ".join(marks))}</td></tr>'
    )


def _verdict(a: Answer) -> str:
    if a.chosen is None or not a.options:
        return ""
    said = f"The model answers <strong>({LETTERS[a.chosen % 26]}) {_e(a.options[a.chosen])}</strong>"
    if a.truth is None:
        return f"<p>{said}.</p>"
    right = (
        "which is right"
        if a.truth == a.chosen
        else f"but ({LETTERS[a.truth % 26]}) {_e(a.options[a.truth])} is right"
    )
    return f"<p>{said}, {right}.</p>"


def _pictures(name: str, pictures: Any) -> str:
    array = np.asarray(pictures)
    array = array[None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or not len(array):
        raise UsageError(
            f"picture {name!r} must be uint8 [frame, height, width, 3], got {array.dtype} {array.shape}"
        )
    shown = "".join(_thumb(name, f, i, len(array)) for i, f in enumerate(array))
    return f"""<section><h2>{_e(name)}</h2>
<div class="film" tabindex="0" role="group" aria-label="{_e(name)}">{shown}</div></section>"""


def _thumb(name: str, pixels: NDArray[np.uint8], i: int, n: int) -> str:
    """Numbered from 0, as frames are in token maps and on every axis; a single picture has no number."""
    alt = f"{name}, frame {i} of 0 to {n - 1}" if n > 1 else name
    caption = f"<figcaption>{i}</figcaption>" if n > 1 else ""
    return f'<figure><img src="{picture_uri(pixels)}" alt="{_e(alt)}">{caption}</figure>'


def _figure(i: int, one: Result | FigureSpec, frames: Any) -> str:
    spec = one if isinstance(one, FigureSpec) else _spec(one, frames)
    note = " ".join(w for w in (spec.reading, spec.caption) if w)
    link = _csv_link(one, i) if isinstance(one, Result) else ""
    chart = "" if spec.kind == "table" else _chart(i, spec)
    table = _table(spec)
    if spec.kind != "table":
        table = f"<details><summary>The numbers</summary>{table}{link}</details>"
        link = ""
    return f"""<section aria-labelledby="figure-{i}"><h2 id="figure-{i}">{_e(spec.title)}</h2>
{chart}<p class="note">{_e(note)}</p>{table}{link}</section>"""


def _spec(result: Result, frames: Any) -> FigureSpec:
    spec = figure_spec(result)
    if frames is not None and spec.kind == "strip" and len(frames) == len(spec.values):
        return figure_spec(result, frames=frames)
    return spec


def _chart(i: int, spec: FigureSpec) -> str:
    fig = to_plotly(spec)
    fig.update_layout(title=None, margin={"t": 34})  # the heading above says it
    layout: Any = fig.layout
    height = int(layout.height or 420)
    return (
        f'<div class="chart-scroll"><div class="chart {spec.kind}" id="chart-{i}" role="figure" '
        f'aria-label="{_e(spec.alt)}" style="height:{height}px"></div></div>'
        f'<script type="application/json" class="chart-data" data-for="chart-{i}">{_inline(str(fig.to_json()))}</script>'
        "<noscript><p>Charts need JavaScript; the numbers below do not.</p></noscript>"
    )


def _table(spec: FigureSpec) -> str:
    columns, rows = table_of(spec)
    head = "".join(f'<th scope="col">{_e(c)}</th>' for c in columns)
    body = "".join(_row(r) for r in rows[:MAX_ROWS])
    left = len(rows) - MAX_ROWS
    more = f'<p class="note">{left} more rows are in the CSV file.</p>' if left > 0 else ""
    caption = f"{spec.title}: {spec.unit}"
    whole = " whole" if spec.kind == "table" and len(rows) <= MAX_WHOLE else ""
    return f"""<div class="scroll{whole}" tabindex="0" role="region" aria-label="{_e(caption)}">
<table class="numbers"><caption>{_e(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"""


def table_of(spec: FigureSpec) -> tuple[list[str], list[list[str]]]:
    """The figure's numbers as headings and rows of text: one row per x, one column per curve or per cell of a row."""
    if spec.kind == "table":
        return list(spec.columns), [list(r) for r in spec.rows]
    write = _writer(spec.masked())
    if spec.kind == "graph":
        links = [[a, b, write(w)] for a, row in zip(spec.series, spec.values, strict=True) for b, w in zip(spec.series, row, strict=True) if w > 0]  # fmt: skip
        return ["From", "To", spec.unit], links
    if spec.kind == "strip":
        summaries = [[write(v) for v in _summary(f)] for f in spec.masked()]
        return ["Frame", "Mean", "Lowest", "Highest"], _labelled(spec.series, summaries)
    if spec.kind == "heat":
        columns = [f"{spec.y_label} \\ {spec.x_label}", *(text(c) for c in spec.x)]
        return columns, _labelled(spec.series, [[write(v) for v in row] for row in spec.values])
    cells = [[_with_interval(spec, i, j, write) for i in range(len(spec.series))] for j in range(len(spec.x))]
    return [spec.x_label, *spec.series], _labelled([text(x) for x in spec.x], cells)


def _labelled(names: Sequence[str], rows: Sequence[list[str]]) -> list[list[str]]:
    return [[name, *row] for name, row in zip(names, rows, strict=True)]


def _writer(values: NDArray[Any]) -> Callable[[Any], str]:
    """Writes every number of a table with as many decimals as give the largest three digits."""
    known = np.abs(values[np.isfinite(values)])
    largest = float(known.max()) if known.size else 0.0
    decimals = int(np.clip(2 - np.floor(np.log10(largest)), 0, 12)) if largest > 0 else 0

    def write(value: Any) -> str:
        shown = f"{float(value):.{decimals}f}"
        return shown.removeprefix("-") if float(shown) == 0 else shown

    return write


def _with_interval(spec: FigureSpec, i: int, j: int, write: Callable[[Any], str]) -> str:
    if spec.low is None or spec.high is None:
        return write(spec.values[i, j])
    return f"{write(spec.values[i, j])} [{write(spec.low[i, j])}, {write(spec.high[i, j])}]"


def _summary(values: NDArray[Any]) -> list[float]:
    known = values[np.isfinite(values)]
    return [float(f(known)) if known.size else float("nan") for f in (np.mean, np.min, np.max)]


def _row(cells: Sequence[str]) -> str:
    first, *others = cells
    return f'<tr><th scope="row">{_e(first)}</th>' + "".join(f"<td>{_e(c)}</td>" for c in others) + "</tr>"


def _csv_link(result: Result, i: int) -> str:
    data = result.csv().encode()
    if len(data) > MAX_CSV:
        return f'<p class="note">All {result.values.size} values are in the saved Result.</p>'
    uri = "data:text/csv;base64," + base64.b64encode(data).decode()
    return f'<p><a class="button" download="figure-{i}.csv" href="{uri}">Save all {result.values.size} values (CSV)</a></p>'


def _recipe(i: int, recipe: dict[str, Any]) -> str:
    more = f" {i}" if i > 1 else ""
    again = "<code>vlab run recipe.yaml</code> gives the same numbers." if "kind" in recipe else ""
    return f"""<section aria-labelledby="recipe-{i}"><h2 id="recipe-{i}">Recipe{more}</h2>
<p>{"Save this as <code>recipe.yaml</code>; " + again if again else "What made these numbers."}</p>
<div class="recipe"><button type="button" class="button copy" data-copy="yaml-{i}">Copy</button>
<span class="hidden" role="status" aria-live="polite"></span>
<pre id="yaml-{i}" tabindex="0">{_e(as_yaml(recipe))}</pre></div></section>"""


def _e(words: str) -> str:
    return html.escape(words, quote=True)


def _json(data: Any) -> str:
    return _inline(json.dumps(data))


def _inline(text_: str) -> str:
    # "</script>" or "<!--" inside a JSON block would end it
    return text_.replace("<", "\\u003c")
