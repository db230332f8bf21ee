"""Views on live plotly figures, without a browser: a control or a click moves state, picture and selection."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from lab.errors import ConfigError, UsageError
from lab.result import Result
from lab.view.answers import AnswerPanel
from lab.view.choices import chosen, index_of, pair_of
from lab.view.compare import compare
from lab.view.flow import Flow
from lab.view.flow_links import Link, grouped, links, merged, pair_table
from lab.view.flow_out import bars_of
from lab.view.head_grid import HeadGrid
from lab.view.heat_map import HeatMap
from lab.view.heat_view import HERE, mean_all
from lab.view.live_figure import LiveFigure, PlotlySource
from lab.view.selection import Selection
from lab.view.timeline import Timeline, first_stable

NAMES = ["system", "frame:0", "frame:1", "question", "last"]
OPTIONS = ["A left", "B right", "C up"]


def mass(n_layers: int = 6, **changes) -> Result:
    rng = np.random.default_rng(0)
    values = rng.dirichlet([0.4] * 5, (n_layers, 4, 5))
    coords = {"layer": range(1, n_layers + 1), "head": range(4), "query": NAMES, "key": NAMES}
    notes = {"n_rows": {"system": 2, "frame:0": 4, "frame:1": 4, "question": 3, "last": 1}}
    fields = {"values": values, "axes": ("layer", "head", "query", "key"), "coords": coords, "unit": "share of attention",
              "recipe": {"window": 3}, "name": "mass", "notes": notes}  # fmt: skip
    return Result(**{**fields, **changes})


def knockout() -> Result:
    values = np.array([[-30.0, -5.0, 0.0, 2.0], [-1.0, -40.0, -3.0, 0.0], [0.0, 0.0, -8.0, -50.0]])
    coords = {"pathway": ["cross-frame", "video->question", "question->last"], "layer": [1, 2, 3, 4]}
    return Result(values, ("pathway", "layer"), coords, "% change in probability", {"kind": "k"}, "knock-out", baseline=0.0)  # fmt: skip


def answer(seed: int, repeated: int = 6) -> Result:
    p = np.random.default_rng(seed).dirichlet([1] * 3, repeated)
    return Result(p, ("seed", "option"), {"seed": range(repeated), "option": OPTIONS}, "probability", {}, "answer")  # fmt: skip


def stream() -> Result:
    p = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.4, 0.3, 0.3], [0.6, 0.2, 0.2], [0.9, 0.05, 0.05]])
    notes = {"kept": [16, 9, 16, 4, 16], "of": [16] * 5, "skipped": [2], "triggered": [3]}
    return Result(p, ("frame", "option"), {"frame": range(5), "option": OPTIONS}, "probability", {}, "stream", notes=notes)  # fmt: skip


VIEWS = {
    "vl-heat": lambda: HeatMap(mass(), x="key"),
    "vl-heads": lambda: HeadGrid(mass()),
    "vl-answers": lambda: AnswerPanel(answer(1), answer(2)),
    "vl-flow": lambda: Flow(mass()),
    "vl-timeline": lambda: Timeline(stream()),
    "vl-compare": lambda: compare(knockout(), replace(knockout(), values=knockout().values / 2)),
}


def live(view) -> LiveFigure:
    return next(w for w in view.widget().children if isinstance(w, LiveFigure))


def drawing(view) -> dict:
    return json.loads(live(view).drawing)


def click(view, trace: int, point) -> None:
    """As live.js reports a click."""
    live(view)._handle_custom_msg({"do": "click", "trace": trace, "point": point}, [])


# ---- what every view offers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("css", VIEWS)
def test_every_view_has_a_widget_a_twin_and_exports(css, tmp_path):
    view = VIEWS[css]()
    widget = view.widget()
    assert css in widget._dom_classes and view.widget() is widget
    assert live(view).alt and view.figure().data
    for suffix in (".png", ".svg", ".pdf", ".html", ".csv", ".parquet", ".yaml"):
        assert view.export(tmp_path / f"x{suffix}").stat().st_size > 40
    assert view.export(tmp_path / "y.svg").read_bytes() == (tmp_path / "x.svg").read_bytes()
    table = pd.read_csv(tmp_path / "x.csv")
    assert len(table) == view.result().values.size
    pd.testing.assert_frame_equal(table, pd.read_parquet(tmp_path / "x.parquet"), check_dtype=False)


@pytest.mark.parametrize("css", VIEWS)
def test_a_config_brings_a_view_back(css):
    view, other = VIEWS[css](), VIEWS[css]()
    view.widget()
    for control in view.controls.values():
        if hasattr(control, "options"):
            last = control.options[-1]
            control.value = last[1] if isinstance(last, tuple) else last
        elif isinstance(control.value, bool):
            control.value = not control.value
        else:
            control.value = control.min
    view.selection.set(layer=2, frame=1)
    other.restore(view.config())
    assert other.settings() == view.settings() and other.selection.to_dict() == view.selection.to_dict()
    with pytest.raises(ConfigError, match="no_such"):
        other._set({"no_such": 1})
    with pytest.raises(ConfigError, match="not one of"):
        Timeline(stream()).restore(HeatMap(knockout()).config())


@pytest.mark.parametrize("css", VIEWS)
def test_titles_name_the_quantity_and_limits_are_drawn(css):
    drawn = VIEWS[css]().figure().to_dict()
    title = drawn["layout"]["title"]["text"]
    assert any(word in title for word in ("share", "probability", "P("))
    heat = [t for t in drawn["data"] if t["type"] == "heatmap"]
    assert all("zmin" in t and "zmax" in t for t in heat)


def test_plotly_goes_to_the_page_once_and_a_figure_is_small():
    a, b = live(HeatMap(knockout())), live(Flow(mass()))
    assert (
        a.library is b.library and isinstance(a.library, PlotlySource) and len(a.library.source) > 1_000_000
    )
    assert len(str(a._esm)) < 10_000 and len(a.drawing) < 30_000
    assert "sendChartToCloud" in json.loads(a.config)["modeBarButtonsToRemove"]


def test_themes():
    assert json.loads(live(HeatMap(knockout(), theme="dark")).drawing)["layout"]["paper_bgcolor"] == "#16191d"
    assert json.loads(live(HeatMap(knockout())).drawing)["layout"]["paper_bgcolor"] == "rgba(0,0,0,0)"
    with pytest.raises(UsageError, match="sepia"):
        HeatMap(knockout(), theme="sepia")


def test_errors_of_the_export_line_are_shown(tmp_path):
    view = HeatMap(knockout())
    line = view.widget().children[-1]
    line.children[0].value = str(tmp_path / "x.bmp")
    line.children[1].click()
    assert "vl-wrong" in view.message and "bmp" in view.message
    line.children[0].value = str(tmp_path / "x.csv")
    line.children[1].click()
    assert (tmp_path / "x.csv").exists() and "wrote" in line.children[2].value


# ---- coordinates and the selection ----------------------------------------------------------------------------------


def test_what_a_place_chooses():
    assert chosen({"layer": 3, "frame": 1}) == {"layer": 3, "frame": 1}
    assert chosen({"layer": 3, "key": "frame:2", "query": "last"}) == {
        "layer": 3, "frame": 2, "pair": ("last", "frame:2"),
    }  # fmt: skip
    assert chosen({"pathway": "frame:1->last"}) == {"pair": ("last", "frame:1"), "frame": 1}
    assert chosen({"pathway": "cross-frame", "option": "A"}) == {}
    assert pair_of("video → question where frame(q) > 2") == ("question", "video")
    s = Selection(layer=2, pair=("last", "video"))
    assert index_of("layer", [1, 2, 3], s) == 1 and index_of("head", [0, 1], s) is None
    assert index_of("pathway", ["cross-frame", "video->last"], s) == 1
    assert index_of("query", ["video", "last"], s) == 1


# ---- heat map -------------------------------------------------------------------------------------------------------


def test_a_click_on_a_cell_selects_and_outlines_it():
    view = HeatMap(mass(), x="key")
    live(view)
    click(view, 0, [2, 2])
    assert view.selection.to_dict() == {"layer": 3, "frame": 1, "pair": ["system", "frame:1"]}
    (shape,) = json.loads(live(view).shapes)
    assert (shape["x0"], shape["y0"]) == (1.5, 1.5)
    view.selection.set(layer=5)
    assert json.loads(live(view).shapes)[0]["y0"] == 3.5
    assert view.pickers["layer"].value == 4  # the picker follows, and leads
    view.pickers["layer"].value = 0
    assert view.selection.layer == 1


def test_a_slice_is_redrawn_and_pinned_limits_stay():
    view = HeatMap(mass(), x="key")
    before = drawing(view)["data"][0]
    view.slices["query"].value = "last"
    after = drawing(view)["data"][0]
    assert after["z"] != before["z"] and (after["zmin"], after["zmax"]) == (before["zmin"], before["zmax"])
    assert view.result().same(mean_all(mass(), ("head",)).select(query="last"))
    view.controls["colours"].value = HERE
    assert drawing(view)["data"][0]["zmax"] == pytest.approx(view.result().values.max())


def test_the_selection_moves_the_slice():
    view = HeatMap(mass(), x="key")
    live(view)
    view.selection.set(pair=("question", "frame:0"))
    assert view.slices["query"].value == "question"


def test_differences_get_a_scale_centred_on_zero():
    trace = HeatMap(knockout()).figure().data[0]
    assert trace.zmin == -trace.zmax == -50.0


def test_results_a_heat_map_cannot_show():
    with pytest.raises(UsageError, match="layers"):
        HeatMap(answer(1))
    wide = Result(np.zeros((2, 300)), ("layer", "pos"), {"layer": [1, 2], "pos": range(300)}, "u", {})
    with pytest.raises(UsageError, match="300"):
        HeatMap(wide)


def test_means_of_large_results_do_without_a_bootstrap():
    big = Result(np.ones((3, 200, 200)), ("item", "layer", "frame"), {"item": "abc", "layer": range(1, 201), "frame": range(200)}, "u", {})  # fmt: skip
    small = big.select(layer=[1], frame=[0])
    assert mean_all(big).low is None and mean_all(small).low is not None
    assert (mean_all(big).values == 1).all() and mean_all(big).notes["n"] == {"item": 3}


# ---- head grid ------------------------------------------------------------------------------------------------------


def test_a_click_adds_a_head_and_another_takes_it_out():
    view, told = HeadGrid(mass()), []
    live(view)
    view.on_heads(told.append)
    click(view, 0, [4, 2])
    click(view, 0, [0, 0])
    assert view.heads == ((5, 2), (1, 0)) and told == [((5, 2),), ((5, 2), (1, 0))]
    assert "layer 5 head 2" in view.message and len(json.loads(live(view).shapes)) == 3
    click(view, 0, [4, 2])
    assert view.heads == ((1, 0),)
    view._clear.click()
    assert view.heads == () and "Chosen: none" in view.message
    with pytest.raises(UsageError, match="head 9"):
        view.choose([(1, 9)])


def test_the_pair_of_a_head_grid_is_the_selections():
    view = HeadGrid(mass())
    live(view)
    view.slices["key"].value = "frame:1"
    assert view.selection.pair == ("system", "frame:1")
    view.selection.set(pair=("last", "question"))
    assert view.result().values.tolist() == mass().select(query="last", key="question").values.tolist()


# ---- answers --------------------------------------------------------------------------------------------------------


def test_the_difference_of_paired_runs_has_its_own_interval():
    a, b = answer(1), answer(2)
    view = AnswerPanel(a, b)
    change = view.difference()
    assert np.allclose(change.values, (b.values - a.values).mean(0))
    assert (change.low < change.values).all() and (change.values < change.high).all()
    assert view.result().coords["run"] == ["base", "edited", "difference"]
    once = AnswerPanel(answer(1, 1), answer(2, 1))
    assert once.difference().low is None and once.figure().data[0].error_y.array is None


def test_update_pin_and_compare():
    view = AnswerPanel(answer(1))
    live(view)
    view.update(answer(2))
    assert view.settings() == {"left": "base", "right": "edited"}
    before = drawing(view)["data"][1]["y"]
    view.name.value = "first"
    view.pin_button.click()
    view.update(answer(3))
    assert view.selection.run == "first" and view.right.value == "first"
    assert drawing(view)["data"][1]["y"] == before
    view.left.value = "edited"
    assert view.difference().values == pytest.approx((answer(2).values - answer(3).values).mean(0))
    view.name.value = "first"
    view.pin_button.click()
    assert "vl-wrong" in view.message and "first" in view.message
    view.unpin("first")
    assert list(view.runs) == ["base", "edited"] and view.selection.run is None


def test_other_options_are_refused():
    other = replace(answer(1), coords={"seed": range(6), "option": ["x", "y", "z"]})
    with pytest.raises(UsageError, match="options"):
        AnswerPanel(answer(1), other)
    with pytest.raises(UsageError, match="option"):
        AnswerPanel(knockout())


# ---- flow -----------------------------------------------------------------------------------------------------------


def test_shares_merge_as_means_over_rows_and_sums_over_keys():
    table = pair_table(mass())
    joined = merged(table, frames=True, options=True)
    assert joined.coords["query"] == ["system", "frame", "question", "last"]
    assert np.allclose(joined.values.sum(-1), 1.0)  # every row still gives all of its attention
    q = NAMES.index("question")
    assert joined.values[:, 2, 1] == pytest.approx(table.values[:, q, 1] + table.values[:, q, 2])


def test_pathways_are_taken_apart_and_grouped():
    table = grouped(pair_table(knockout()), 2)
    assert table.coords["layers"] == ["1-2", "3-4"]
    found = links(table, threshold=0.0, within=True)
    assert Link(0, "question", "video", -20.5) in found and Link(0, "frame", "frame", -17.5) in found
    strong = links(table, threshold=0.8, within=False)
    assert [x.value for x in strong] == [-29.0]
    with pytest.raises(UsageError, match="axes"):
        pair_table(answer(1))


def test_threshold_and_groups_redraw_the_flow():
    view = Flow(mass())
    n = len(drawing(view)["data"][0]["link"]["value"])
    view.threshold.value = 0.6
    thin = drawing(view)["data"][0]["link"]["value"]
    assert 0 < len(thin) < n and min(thin) >= 0.6 * max(thin)
    view.threshold.value = 0.0
    view.groups.value = 1
    assert len(drawing(view)["data"][0]["link"]["value"]) == len(view.drawing().links) <= 12


def test_a_click_on_a_link_selects_its_pair():
    view = Flow(mass())
    live(view)
    link = view.drawing().links[3]
    live(view)._handle_custom_msg({"do": "click", "trace": 0, "point": 3}, [])
    assert view.selection.pair == (link.query, link.key)
    colours = drawing(view)["data"][0]["link"]["color"]
    assert colours[3].endswith("0.85)") and len(set(colours)) > 1
    before = view.selection.to_dict()
    live(view)._handle_custom_msg({"do": "click", "trace": 0, "point": 0, "part": "node"}, [])
    assert view.selection.to_dict() == before


def test_ribbons_fit_their_bars():
    drawing_ = Flow(mass()).drawing()
    bars = bars_of(drawing_)
    for (g, name), (top, bottom) in bars.items():
        into = sum(abs(x.value) for x in drawing_.links if (x.group + 1, x.query) == (g, name))
        out = sum(abs(x.value) for x in drawing_.links if (x.group, x.key) == (g, name))
        assert bottom - top == pytest.approx(max(into, out))


# ---- timeline -------------------------------------------------------------------------------------------------------


def test_the_first_stable_answer():
    assert first_stable(stream().values.T) == 2
    assert first_stable(np.array([[0.9, 0.9], [0.1, 0.1]])) == 0
    assert first_stable(np.array([[0.9, np.nan, 0.9], [0.1, np.nan, 0.1]])) == 2
    assert first_stable(np.full((2, 3), np.nan)) is None


def test_scrubbing_sets_the_frame_and_is_set_by_it():
    view = Timeline(stream())
    live(view)
    view.scrub.value = 3
    assert view.selection.frame == 3 and json.loads(live(view).shapes)[0]["x0"] == 3
    view.selection.set(frame=1)
    assert view.scrub.value == 1
    click(view, 0, 4)
    assert view.selection.frame == 4
    texts = [a["text"] for a in drawing(view)["layout"]["annotations"]]
    assert sum(t == "▼" for t in texts) == 3 and any("stable" in t for t in texts)
    assert "19 of 80" in view.message


def test_one_curve_of_a_session_is_a_timeline():
    silent = Result(np.array([0.9, np.nan, 0.2]), ("frame",), {"frame": [0, 1, 2]}, "probability of silence", {}, "stream",
                    notes={"triggered": [2], "kept": [4, 4, 4], "of": [4, 4, 4]})  # fmt: skip
    view = Timeline(silent)
    assert view.stable() is None and len(view.figure().layout.annotations) == 1
    with pytest.raises(UsageError, match="timeline"):
        Timeline(knockout())


# ---- comparison -----------------------------------------------------------------------------------------------------


def test_a_minus_b_on_one_scale_and_the_swap():
    a, b = knockout(), replace(knockout(), values=knockout().values / 2, recipe={"kind": "k", "window": 5})
    view = compare(a, b, names=("full", "half"))
    specs = view.specs()
    assert {s.limits for s in specs} == {(-50.0, 50.0)}
    assert (specs[2].values == a.values - b.values).all()
    assert view.differences() == [("window", "(not there)", 5)]
    before = drawing(view)["data"][-1]["y"]
    view.swapped.value = True
    assert view.result().coords["run"] == ["half", "full", "half - full"]
    assert drawing(view)["data"][-1]["y"] != before
    view.scale.value = view.scale.options[1]
    assert view.specs()[2].limits == (-25.0, 25.0) and view.specs()[0].limits == (-50.0, 50.0)


def test_heat_maps_are_compared_with_linked_cells():
    part = mean_all(mass(), ("head",)).select(query="last")
    view = compare(part, replace(part, values=part.values[::-1]))
    live(view)
    click(view, 2, [1, 2])
    assert view.selection.layer == 2 and view.selection.frame == 1
    assert [s["xref"] for s in json.loads(live(view).shapes)] == ["x", "x2", "x3"]


def test_views_are_compared_by_what_they_show():
    a, b = HeatMap(knockout()), HeatMap(replace(knockout(), values=knockout().values * 0))
    view = compare(a, b)
    assert view.selection is a.selection and (view.difference().values == knockout().values.T).all()


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (lambda: replace(knockout(), unit="logits"), "unit|logits"),
        (lambda: knockout().select(layer=[1, 2]), "along layer"),
        (lambda: mass(), "axes|same"),
    ],
)
def test_what_does_not_fit_is_not_compared(other, why):
    with pytest.raises(UsageError, match=why):
        compare(knockout(), other())
