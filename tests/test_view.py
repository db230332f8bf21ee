"""Views: both back ends draw the same numbers, files are the same bytes, the page asks the network for nothing."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import plotly.io as pio
import pytest
from matplotlib.collections import QuadMesh

from lab.errors import UsageError
from lab.recipe import Recipe
from lab.result import Result
from lab.view.draw import (
    CONFIG,
    Answer,
    figure_spec,
    panel,
    report,
    save,
    share_limits,
    show,
    to_matplotlib,
    to_plotly,
)
from lab.view.matplotlib_out import image_bytes
from lab.view.pages import table_of
from lab.view.palette import DIVERGING, SEQUENTIAL, STROKES, grey, rgb, rgba_scale
from lab.view.plotly_out import BOTH_THEMES, Figure
from lab.view.specs import FigureSpec, mosaic

RNG = np.random.default_rng(0)
RECIPE = {
    "kind": "probes.knockout.KnockoutRecipe",
    "schema_version": 1,
    "question": "</script><b>no</b> & 12:30",
}


def curves(**changes: object) -> Result:
    fields: dict[str, object] = {
        "values": RNG.normal(-5, 3, (4, 2, 6)), "axes": ("item", "pathway", "layer"),
        "coords": {"item": list("abcd"), "pathway": ["video->question", "cross-frame"], "layer": range(1, 7)},
        "unit": "% change in probability", "recipe": RECIPE, "name": "Knock-out", "baseline": 0.0,
    }  # fmt: skip
    return Result(**{**fields, **changes})  # type: ignore[arg-type]


def heat(values: object = None) -> Result:
    given = RNG.normal(size=(5, 4)) if values is None else np.asarray(values)
    axes = {"layer": list(range(1, given.shape[0] + 1)), "frame": list(range(given.shape[1]))}
    return Result(given, ("layer", "frame"), axes, "logit difference", RECIPE, "Frames by layer")


def strip(n: int = 10) -> Result:
    values = RNG.normal(size=(n, 3, 2))
    values[1, 2, 0] = np.nan
    coords = {"frame": range(n), "row": range(3), "col": range(2)}
    return Result(
        values,
        ("frame", "row", "col"),
        coords,
        "drop",
        RECIPE,
        "Tokens",
        {"seconds": [0.5 * i for i in range(n)]},
    )  # type: ignore[arg-type]


def table() -> Result:
    return Result(
        np.arange(4.0).reshape(2, 1, 2), ("model", "task", "seeded"),
        {"model": ["tiny", "<b>"], "task": ["a"], "seeded": [1, 2]}, "accuracy", {}, "Scores",
    )  # fmt: skip


PICTURES = RNG.integers(0, 255, (10, 12, 16, 3)).astype(np.uint8)
ALL: dict[str, FigureSpec] = {
    "lines": figure_spec(curves()),
    "one line": figure_spec(curves().mean("item").select(pathway="cross-frame")),
    "heat": figure_spec(heat()),
    "strip": figure_spec(strip()),
    "strip over frames": figure_spec(strip(), frames=PICTURES),
    "table": figure_spec(table()),
}
NAMES = list(ALL)


def test_the_axes_choose_the_figure() -> None:
    assert {n: s.kind for n, s in ALL.items()} == {
        "lines": "lines", "one line": "lines", "heat": "heat", "strip": "strip", "strip over frames": "strip", "table": "table",
    }  # fmt: skip
    assert figure_spec(curves(), kind="heat").kind == "heat"
    text = Result([1.0, 2.0], ("role",), {"role": ["video", "text"]}, "mass", {})  # type: ignore[arg-type]
    assert figure_spec(text).kind == "table"
    many = Result(
        np.zeros((12, 3)),
        ("head", "layer"),
        {"head": [f"h{i}" for i in range(12)], "layer": [1, 2, 3]},
        "x",
        {},
    )
    assert figure_spec(many).kind == "heat"  # twelve curves would be a tangle


def test_lines_follow_the_paper() -> None:
    spec, mean = ALL["lines"], curves()
    assert (spec.x_label, spec.y_label) == ("Layer", "% change in probability")
    assert spec.x == (1, 2, 3, 4, 5, 6) and spec.reference == 0.0
    assert "Mean over 4 items" in spec.caption and "95 % bootstrap" in spec.caption
    assert spec.low is not None and mean.axes[0] == "item"


def plotly_numbers(spec: FigureSpec) -> list[np.ndarray]:
    fig = to_plotly(spec)
    if spec.kind == "lines":
        return [np.asarray(t.y, float) for t in fig.data if t.name is not None]
    return [np.asarray(fig.data[0].z, float)]


def matplotlib_numbers(spec: FigureSpec) -> list[np.ndarray]:
    ax = to_matplotlib(spec).axes[0]
    if spec.kind == "lines":
        return [
            np.asarray(line.get_ydata(), float) for line in ax.lines if not line.get_label().startswith("_")
        ]  # type: ignore[union-attr]
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    array = mesh.get_array()
    assert array is not None
    return [np.ma.filled(array.astype(float), np.nan)]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "table"])
def test_both_back_ends_carry_the_same_numbers(name: str) -> None:
    spec = ALL[name]
    expected = (
        [mosaic(spec).z]
        if spec.kind == "strip"
        else [spec.masked()]
        if spec.kind == "heat"
        else list(spec.masked())
    )
    for drawn in (plotly_numbers(spec), matplotlib_numbers(spec)):
        assert len(drawn) == len(expected)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(drawn, expected, strict=True))


@pytest.mark.parametrize("name", ["heat", "strip", "strip over frames"])
def test_both_back_ends_use_the_same_colour_limits(name: str) -> None:
    spec = ALL[name]
    trace = to_plotly(spec).data[0]
    mesh = next(c for c in to_matplotlib(spec).axes[0].collections if isinstance(c, QuadMesh))
    assert (trace.zmin, trace.zmax) == mesh.get_clim() == spec.limits


def test_the_bar_of_a_strip_over_frames_shows_the_colours_as_they_look_there() -> None:
    spec = ALL["strip over frames"]
    assert spec.frames is not None
    cells = to_plotly(spec).data[0]
    bar = next(t for t in to_plotly(spec).data if t.type == "scatter")
    assert not cells.showscale and bar.marker.showscale and (bar.marker.cmin, bar.marker.cmax) == spec.limits
    r, g, b, a = rgba_scale(spec.diverging)[-1]
    below = spec.frames.reshape(-1, 3).mean(0)
    want = [round(255 * c * a + u * (1 - a)) for c, u in zip((r, g, b), below, strict=True)]
    shown = [int(n) for n in bar.marker.colorscale[-1][1][4:-1].split(",")]
    assert np.abs(np.array(shown) - want).max() <= 1
    assert to_plotly(ALL["strip"]).data[0].showscale


def test_interval_bands_are_the_same_in_both() -> None:
    spec = ALL["one line"]
    assert spec.low is not None and spec.high is not None
    band = to_plotly(spec).data[0]
    y = [v for v in band.y if v is not None]
    assert y == [*spec.high[0].tolist(), *spec.low[0][::-1].tolist()]
    corners = to_matplotlib(spec).axes[0].collections[0].get_paths()[0].vertices
    assert set(np.round(y, 9)) <= set(np.round(corners[:, 1], 9))


def test_tables_are_the_same_in_both() -> None:
    spec = ALL["table"]
    cells = to_plotly(spec).data[0].cells.values
    drawn = next(iter(to_matplotlib(spec).axes[0].tables))
    texts = [[drawn[i + 1, j].get_text().get_text() for j in range(4)] for i in range(4)]
    assert texts == [list(r) for r in spec.rows]
    assert [c[0] for c in cells] == ["tiny", "a", "1", "0"] and cells[0][2] == "&lt;b&gt;"


def test_the_mosaic_puts_every_token_in_its_frame() -> None:
    spec = ALL["strip over frames"]
    m = mosaic(spec)
    for f, (x0, y0) in enumerate(m.corners):
        for row in range(3):
            for col in range(2):
                x, y = x0 + (col + 0.5) / 2, y0 + (row + 0.5) / 3 * m.size[1]
                cell = np.searchsorted(m.y, y) - 1, np.searchsorted(m.x, x) - 1
                assert np.array_equal(m.z[cell], spec.masked()[f, row, col], equal_nan=True)
                assert m.bad[cell] == np.isnan(spec.values[f, row, col])
    assert m.size == (1.0, 12 / 16) and len({y for _, y in m.corners}) == 2  # 10 frames: two lines of 8


def test_differences_get_a_zero_centred_scale_and_masses_do_not() -> None:
    assert figure_spec(heat([[-1.0, 3.0]])).limits == (-3.0, 3.0)
    mass = figure_spec(heat([[0.2, 0.6]]))
    assert mass.limits == (0.0, 0.6) and not mass.diverging
    assert figure_spec(heat([[0.0, 0.0]])).limits == (0.0, 1.0)
    assert figure_spec(heat([[np.nan, np.nan]])).limits == (0.0, 1.0)
    assert figure_spec(heat([[0.2, 0.6]]), diverging=True, limits=(-2, 2)).limits == (-2.0, 2.0)
    a, b = share_limits([figure_spec(heat([[-1.0, 3.0]])), figure_spec(heat([[0.2, 6.0]]))])
    assert a.limits == b.limits == (-6.0, 6.0) and b.diverging


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_grey_and_said(bad: float) -> None:
    spec = figure_spec(heat([[1.0, bad, 3.0]]))
    assert "1 of 3 values are not finite" in spec.caption and spec.limits == (0.0, 3.0)
    grey_trace = to_plotly(spec).data[1]
    assert grey_trace.colorscale[0][1] == grey(False) and np.isfinite(
        np.asarray(grey_trace.z, float)
    ).tolist() == [[False, True, False]]
    meshes = [c for c in to_matplotlib(spec).axes[0].collections if isinstance(c, QuadMesh)]
    assert len(meshes) == 2 and np.ma.getmaskarray(meshes[1].get_array()).tolist() == [[True, False, True]]
    assert "Infinity" not in to_plotly(spec).to_json() and "NaN" not in to_plotly(spec).to_json()
    assert grey(False) not in SEQUENTIAL and grey(True) not in DIVERGING


def test_a_gap_in_a_curve_stays_a_gap() -> None:
    values = np.array([1.0, np.nan, 3.0, 4.0])
    r = Result(values, ("layer",), {"layer": [1, 2, 3, 4]}, "x", {}, low=values - 1, high=values + 1)
    fig = to_plotly(figure_spec(r))
    assert fig.data[1].connectgaps is False and np.isnan(fig.data[1].y[1])
    assert [v for v in fig.data[0].x] == [1, 1, None, 3, 4, 4, 3, None]


def test_curves_differ_without_colour() -> None:
    assert len({(s.marker, s.dash) for s in STROKES}) == len({s.symbol for s in STROKES}) == len(STROKES)
    fig = to_plotly(ALL["lines"])
    named = [t for t in fig.data if t.name is not None]
    assert [t.name for t in named] == ["video-&gt;question", "cross-frame"]
    assert len({t.marker.symbol for t in named}) == len({t.line.dash for t in named}) == 2
    legend = to_matplotlib(ALL["lines"]).axes[0].get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == [
        "video->question",
        "cross-frame",
    ]


def test_scales_rise_in_lightness_or_fall_from_the_middle() -> None:
    def light(colour: str) -> float:
        r, g, b = rgb(colour)
        return 0.299 * r + 0.587 * g + 0.114 * b

    assert np.all(np.diff([light(c) for c in SEQUENTIAL]) > 0)  # readable in grey print
    steps = np.diff([light(c) for c in DIVERGING])
    assert np.all(steps[:5] > 0) and np.all(steps[5:] < 0)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
@pytest.mark.parametrize("name", ["lines", "strip over frames"])
def test_picture_files_are_the_same_bytes_under_any_style(name: str, suffix: str) -> None:
    first = image_bytes(ALL[name], suffix)
    with matplotlib.rc_context(
        {"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": "x", "savefig.dpi": 31}
    ):
        assert image_bytes(ALL[name], suffix) == first
        assert matplotlib.rcParams["font.size"] == 20  # and the user's style is left alone
    assert ALL[name].recipe_id.encode() in first or suffix == ".pdf"


def test_picture_files_are_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    saved = heat(np.arange(6.0).reshape(2, 3) - 2).save(tmp_path / "r.npz")
    code = (
        "import sys, hashlib; from lab.result import Result; from lab.view.draw import figure_spec;"
        "from lab.view.matplotlib_out import image_bytes; assert 'matplotlib.pyplot' not in sys.modules;"
        "s = figure_spec(Result.load(sys.argv[1]));"
        "print(*[hashlib.sha256(image_bytes(s, x)).hexdigest() for x in ('.png', '.svg', '.pdf')])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout.split()) == 3, runs[0].stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_saves_in_every_format(tmp_path: Path, name: str) -> None:
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".html": b"<!doctype html>"}
    for suffix, start in starts.items():
        assert save(ALL[name], tmp_path / f"f{suffix}").read_bytes().startswith(start)


def test_a_result_draws_from_its_file_as_from_memory(tmp_path: Path) -> None:
    r = curves()
    back = Result.load(r.save(tmp_path / "r.npz"))
    assert show(back).to_json() == show(r).to_json()
    assert save(back, tmp_path / "a.svg").read_bytes() == save(r, tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: save(ALL["heat"], p / "f.gif"), "cannot tell the format"),
        (lambda p: save(ALL["heat"], p / "f"), "cannot tell the format"),
        (lambda p: save(ALL["heat"], p / "f.png", title="x"), "title belong to figure_spec"),
        (lambda p: figure_spec(strip(), kind="lines"), "lines need one or two axes, the result has 3"),
        (lambda p: figure_spec(heat(), kind="strip"), "a strip needs the axes"),
        (lambda p: figure_spec(heat(), kind="pie"), "no figure kind 'pie'"),
        (lambda p: figure_spec(heat(), frames=PICTURES), "frames go with a strip"),
        (lambda p: figure_spec(strip(), frames=PICTURES[:3]), "3 pictures for 10 frames"),
        (lambda p: figure_spec(strip(), frames=PICTURES / 255), "frames must be uint8"),
        (lambda p: figure_spec(heat(), limits=(1, 1)), "colour limits must rise, got 1 to 1"),
        (
            lambda p: report([], p / "r.html", title="t", pictures={"x": np.zeros((2, 2))}),
            "picture 'x' must be uint8",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path: Path, call: object, said: str) -> None:
    with pytest.raises(UsageError) as e:
        call(tmp_path)  # type: ignore[operator]
    assert said in str(e.value)


# ---- the page -----------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Start tags of a page, and the text of its scripts, apart."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._in = "", ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    answer = Answer(
        "Which way? <i>", ["left", "right & up"], [0.9, 0.05], 0, 1, note="of the whole vocabulary"
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(
        [curves(), strip(), heat(), table()], path, title="Where the answer comes from <script>", intro="One.\n\nTwo.",
        answer=answer, pictures={"The frames": PICTURES}, frames=PICTURES,
    )  # fmt: skip
    return path.read_text("utf-8")


def test_the_page_holds_everything_and_plotly_once(page: str) -> None:
    assert page.count("plotly.js v") == 1 and len(page) < 6_500_000
    parsed = Page(page)
    for words in ("Where the answer comes from <script>", "Which way? <i>", "(A) left", "(B) right & up is right", "90.0 %",
                  "Mean over 4 items", "question: </script><b>no</b> & 12:30", "accuracy", "vlab run recipe.yaml"):  # fmt: skip
        assert words in parsed.text, words
    assert sum(t == "script" and a.get("class") == "chart-data" for t, a in parsed.tags) == 3
    for figure in re.findall(r'class="chart-data"[^>]*>(.*?)</script>', page, re.S):
        assert json.loads(figure, parse_constant=pytest.fail)["data"]


def test_the_page_asks_the_network_for_nothing(page: str) -> None:
    tags = Page(page).tags
    policy = next(a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert (
        policy is not None
        and policy.startswith("default-src 'none'")
        and "http" not in policy
        and "connect" not in policy
    )
    for tag, attributes in tags:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#")), (tag, name, value[:60])
        assert tag not in ("link", "iframe", "form", "object", "embed", "base")
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]


def test_no_upload_button_and_no_cdn_however_a_figure_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    fig, shown = to_plotly(ALL["heat"]), []
    assert "sendChartToCloud" in CONFIG["modeBarButtonsToRemove"] and CONFIG["displaylogo"] is False
    before = dict(CONFIG)
    for page in (fig.to_html(), fig._repr_html_()):
        assert '"modeBarButtonsToRemove": ["sendChartToCloud"' in page and "cdn.plot.ly/plotly" not in page
    assert before == CONFIG  # plotly takes entries out of the config it is given
    monkeypatch.setattr("plotly.io.show", lambda *args, **kwargs: shown.append(kwargs["config"]))
    monkeypatch.setattr("plotly.io.renderers.render_on_display", True)
    monkeypatch.setattr("plotly.io.renderers.default", "plotly_mimetype")
    fig._ipython_display_()
    fig.show()
    assert shown == [CONFIG, CONFIG]


def test_a_figure_names_the_recipe_that_made_it() -> None:
    recipe = known_recipe()
    spec = figure_spec(Result(1.0, (), {}, "x", recipe))  # type: ignore[arg-type]
    assert spec.recipe_id == recipe.id and figure_spec(table()).recipe_id == ""


def known_recipe() -> Recipe:
    class SomeRecipe(Recipe):
        strength: float = 1e-7
        name: str = "\u00e9"

    return SomeRecipe()


def test_the_page_can_be_read_without_seeing_or_a_mouse(page: str) -> None:
    tags = Page(page).tags
    assert all(a.get("alt") for t, a in tags if t == "img") and sum(t == "img" for t, _ in tags) == 10
    charts = [a for _, a in tags if (a.get("class") or "").startswith("chart ")]
    assert len(charts) == 3 and all(len(a.get("aria-label") or "") > 40 for a in charts)
    assert all(a.get("tabindex") == "0" for _, a in tags if a.get("class") in ("scroll", "film"))
    assert all(a.get("scope") for t, a in tags if t == "th")
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in tags if "aria-labelledby" in a} <= set(ids)
    assert any(t == "button" and a.get("type") == "button" for t, a in tags)
    assert "prefers-color-scheme: dark" in page


def test_frames_of_a_page_are_numbered_as_on_the_axes(tmp_path: Path) -> None:
    many, one = np.zeros((3, 4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)
    page = report([], tmp_path / "r.html", title="t", pictures={"clip": many, "still": one}).read_text(
        "utf-8"
    )
    assert re.findall(r"<figcaption>(\d+)</figcaption>", page) == ["0", "1", "2"]
    assert 'alt="clip, frame 2 of 0 to 2"' in page and 'alt="still"' in page


def test_the_csv_in_the_page_is_the_result(tmp_path: Path) -> None:
    import base64

    r = heat()
    page = report(r, tmp_path / "r.html", title="t").read_text("utf-8")
    link = re.search(r'href="data:text/csv;base64,([^"]+)"', page)
    assert link is not None and base64.b64decode(link[1]).decode() == r.csv()


def test_a_page_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    r = strip()
    a, b = (report(r, tmp_path / n, title="t", frames=PICTURES).read_bytes() for n in ("a.html", "b.html"))
    assert a == b


def test_tables_round_alike_and_never_write_minus_zero() -> None:
    columns, rows = table_of(figure_spec(heat([[-41.26, 0.001, -0.04], [np.nan, np.inf, 2.0]])))
    assert columns == ["Layer \\ Frame", "0", "1", "2"]
    assert rows == [["1", "-41.3", "0.0", "0.0"], ["2", "nan", "inf", "2.0"]]
    assert table_of(figure_spec(heat([[0.00123, 0.0]])))[1] == [["1", "0.00123", "0.00000"]]


def test_a_figure_in_a_notebook_reads_in_both_themes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Figure] = []
    monkeypatch.setattr(Figure, "show", lambda self: shown.append(self))
    monkeypatch.setattr(pio.renderers, "default", "json")  # a kernel has one; a test run has none
    figure = show(heat())
    figure._ipython_display_()
    assert shown[0].layout.font.color == BOTH_THEMES and figure.layout.font.color != BOTH_THEMES

    def contrast(background: float) -> float:
        parts = [int(BOTH_THEMES[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        return (max(light, background) + 0.05) / (min(light, background) + 0.05)

    assert contrast(1.0) > 4.2 and contrast(0.0056) > 4.2  # white; JupyterLab's dark #111111


def test_show_takes_a_panel() -> None:
    curves = Result(np.ones((1, 2, 3)), ("task", "pathway", "layer"), {"task": ["a"], "pathway": ["p", "q"], "layer": [1, 2, 3]}, "%", {})  # fmt: skip
    assert len(show(panel(curves, {"row": ["p", "q"]}, title="t")).data) >= 2
