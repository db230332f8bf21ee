"""The views on plotly's figure widget, in a real JupyterLab: a person's click or key moves state and pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.browser.driver import Notebook

pytestmark = pytest.mark.browser

SET_UP = """
import json
import numpy as np
from lab.result import Result
from lab.view.answers import AnswerPanel
from lab.view.compare import compare
from lab.view.flow import Flow
from lab.view.head_grid import HeadGrid
from lab.view.heat_map import HeatMap
from lab.view.selection import Selection
from lab.view.timeline import Timeline

rng = np.random.default_rng(0)
names = ["system", "frame:0", "frame:1", "frame:2", "question", "option:0", "option:1", "last"]
share = rng.dirichlet([0.3] * 8, (6, 4, 8)) * np.tril(np.ones((8, 8)))
coords = {"layer": range(1, 7), "head": range(4), "query": names, "key": names}
mass = Result(share, ("layer", "head", "query", "key"), coords, "share of attention", {"window": 3}, "attention mass",
              notes={"n_rows": dict.fromkeys(names, 4)})
options = ["A left", "B right", "C up"]
def answer(seed):
    p = np.random.default_rng(seed).dirichlet([1] * 3, 6)
    return Result(p, ("seed", "option"), {"seed": range(6), "option": options}, "probability", {}, "answer")
stream = Result(rng.dirichlet([0.8] * 3, 12), ("frame", "option"), {"frame": range(12), "option": options}, "probability",
                {}, "stream", notes={"kept": [16, 9, 3, *[16] * 9], "of": [16] * 12})
"""
VIEWS = {
    "heat": "HeatMap(mass, x='key', selection=Selection())",
    "heads": "HeadGrid(mass, selection=Selection())",
    "answers": "AnswerPanel(answer(1), answer(2), selection=Selection())",
    "flow": "Flow(mass, selection=Selection())",
    "timeline": "Timeline(stream, selection=Selection())",
    "compare": "compare(mass.select(query='last').mean('head', n_boot=9), Result(**{**vars(mass), 'values': mass.values[::-1], 'recipe': {'window': 5}}).select(query='last').mean('head', n_boot=9))",
}


@pytest.fixture(scope="module")
def shown(opened) -> Iterator[Notebook]:
    """All six views in one notebook, each with a selection of its own."""
    cells = [SET_UP, *(f"{name}_view = {make}\n{name}_view.widget()" for name, make in VIEWS.items())]
    notebook = opened("views", cells)
    notebook.run_all()
    for name in VIEWS:
        notebook.until_drawn(f".vl-{name}", "gd._fullData.length > 0")
    yield notebook
    notebook.assert_clean()


def moved(notebook: Notebook, root: str, act, until: str) -> None:
    """Do something; wait until the kernel says so; the picture must be another."""
    before = notebook.pixels(root)
    act()
    notebook.until(until)
    notebook.until_changed(root, before)


def test_a_click_on_a_cell_selects_it(shown):
    moved(
        shown,
        ".vl-heat .js-plotly-plot",
        lambda: shown.click_point(".vl-heat", 2, 3),
        "heat_view.selection.layer == 4",
    )
    assert shown.kernel("heat_view.selection.to_dict()") == {
        "frame": 1,
        "layer": 4,
        "pair": ["system", "frame:1"],
    }
    assert shown.drawn(".vl-heat", "gd.layout.shapes.at(-1).y0") == 2.5


def test_a_slice_is_chosen_and_drawn(shown):
    def choose() -> None:
        shown.find(".vl-heat select").select_option("last")

    moved(shown, ".vl-heat .js-plotly-plot", choose, "heat_view.slices['query'].value == 'last'")
    wanted = json.loads(json.dumps(shown.kernel("heat_view.result().values.tolist()")))
    shown.until_drawn(".vl-heat", f"Math.abs(gd._fullData[0].z[0][1] - {wanted[0][1]}) < 1e-9")


def test_the_arrow_keys_are_the_pickers(shown):
    """JupyterLab has arrows of its own, which would move on to the next cell."""
    shown.find(".vl-heat .vl-pick-layer select").focus()
    active = shown.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.activeCellIndex")
    before = shown.kernel("heat_view.pickers['layer'].value")
    shown.page.keyboard.press("ArrowDown")
    shown.until(f"heat_view.pickers['layer'].value != {before} and heat_view.selection.layer is not None")
    assert (
        shown.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.activeCellIndex") == active
    )


def test_a_click_adds_a_head_and_takes_it_out(shown):
    figure = ".vl-heads .js-plotly-plot"
    moved(shown, figure, lambda: shown.click_point(".vl-heads", 2, 4), "heads_view.heads == ((5, 2),)")
    moved(shown, figure, lambda: shown.click_point(".vl-heads", 0, 0), "heads_view.heads == ((5, 2), (1, 0))")
    moved(shown, figure, lambda: shown.click_point(".vl-heads", 2, 4), "heads_view.heads == ((1, 0),)")
    moved(shown, figure, lambda: shown.find(".vl-clear-heads").click(), "heads_view.heads == ()")


def test_runs_are_pinned_and_compared(shown):
    shown.find(".vl-pin-name input").fill("first try")
    shown.find(".vl-pin").click()
    shown.until("'first try' in answers_view.runs")
    shown.run("answers_view.update(answer(3))")
    figure = ".vl-answers .js-plotly-plot"
    moved(
        shown,
        figure,
        lambda: shown.find(".vl-left select").select_option("edited"),
        "answers_view.left.value == 'edited'",
    )
    assert shown.kernel("answers_view.right.value") == "first try"
    wanted = shown.kernel("answers_view.result().values.tolist()")
    shown.until_drawn(".vl-answers", f"Math.abs(gd._fullData[1].y[0] - {wanted[1][0]}) < 1e-9")


LINK_AT = "gd.querySelector('.sankey-link').getAttribute('d')"


def test_a_link_is_selected_and_the_threshold_thins_out(shown):
    n = shown.drawn(".vl-flow", "gd.calcdata[0][0]._links.length")
    handle = shown.find(".vl-threshold .noUi-handle")
    handle.focus()

    def thin() -> None:
        for _ in range(25):
            shown.page.keyboard.press("ArrowRight")

    moved(shown, ".vl-flow .js-plotly-plot", thin, "flow_view.threshold.value > 0.25")
    shown.until_drawn(".vl-flow", f"gd._fullData[0].link.value.length < {n}")
    # links that thin out fade, and the others glide to their places: a click meanwhile misses them
    shown.until_drawn(
        ".vl-flow", "gd.querySelectorAll('.sankey-link').length === gd._fullData[0].link.value.length"
    )
    shown.until_drawn(".vl-flow", f"(at => at === gd._at || void (gd._at = at))({LINK_AT})")
    shown.find(".vl-flow .sankey-link").click(force=True)
    shown.until("flow_view.selection.pair is not None")


def test_scrubbing_sets_the_frame(shown):
    handle = shown.find(".vl-timeline .vl-scrub .noUi-handle")
    handle.focus()

    def scrub() -> None:
        for _ in range(3):
            shown.page.keyboard.press("ArrowRight")

    moved(shown, ".vl-timeline .js-plotly-plot", scrub, "timeline_view.selection.frame == 3")
    shown.until_drawn(".vl-timeline", "gd.layout.shapes.at(-1).x0 === 3")
    shown.click_point(".vl-timeline", 7, shown.kernel("float(timeline_view.result().values[0, 7])"))
    shown.until("timeline_view.selection.frame == 7")


def test_the_comparison_is_swapped_and_linked(shown):
    figure = ".vl-compare .js-plotly-plot"
    first = shown.drawn(".vl-compare", "gd._fullData[2].z[0][0]")
    moved(shown, figure, lambda: shown.find(".vl-swap").click(), "compare_view.swapped.value")
    shown.until_drawn(".vl-compare", f"Math.abs(gd._fullData[2].z[0][0] + {first}) < 1e-9")
    moved(shown, figure, lambda: shown.click_point(".vl-compare", 1, 2), "compare_view.selection.layer == 3")
    assert shown.drawn(".vl-compare", "gd.layout.shapes.length") == 3
    assert "window" in shown.find(".vl-compare .vl-diff").inner_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_is_readable_in_both_themes(shown, theme):
    shown.theme(theme)
    for name in VIEWS:
        shown.shot(f"{name}_{theme}", f".vl-{name}")
        text = shown.page.locator(f".vl-{name} .gtitle").first
        assert contrast(text) > 4.5
    shown.theme("light")


def contrast(text) -> float:
    """Contrast of a text with the paper behind the notebook (WCAG)."""
    ink, paper = text.evaluate(
        """(e) => { const panel = document.querySelector('.jp-Notebook');
                    return [getComputedStyle(e).fill, getComputedStyle(panel).backgroundColor]; }"""
    )
    light, dark = sorted((luminance(c) for c in (ink, paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [float(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
