"""The views that are our own widgets, without a browser: selection, edge editor, frame strip, lens table, maps, exports."""

from __future__ import annotations

import threading

import numpy as np
import pandas as pd
import pytest

from lab.errors import ConfigError, UsageError
from lab.result import Result
from lab.view.canvas import STEPS, colours, extent
from lab.view.edge_editor import EdgeEditor, cells_of
from lab.view.edge_grid import ALLOWED, BLOCKED, NO_EDGE, PARTLY, EdgeGrid, ranges
from lab.view.frame_strip import FrameStrip
from lab.view.layer_map import DepthMap, LayerMap
from lab.view.lens_table import Lensed, LensTable
from lab.view.palette import rgb
from lab.view.selection import Selection
from lab.yamlfile import parse_yaml

NAMES = ("system", "frame:0", "frame:1", "question", "last")
SIZES = np.array([3, 4, 4, 5, 1])
PAIRS = np.tril(np.outer(SIZES, SIZES), -1) + np.diag(SIZES * (SIZES + 1) // 2)


def grid() -> EdgeGrid:
    return EdgeGrid(NAMES, PAIRS, 4, 2)


def editor(**more) -> EdgeEditor:
    return EdgeEditor(NAMES, PAIRS, n_layers=4, n_heads=2, **more)


def film(**more) -> FrameStrip:
    values = np.arange(24.0).reshape(4, 2, 3)
    result = Result(
        values,
        ("frame", "row", "col"),
        {"frame": [0, 1, 2, 3], "row": [0, 1], "col": [0, 1, 2]},
        "p",
        {},
        "x",
    )
    pictures = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3), dtype=np.uint8)
    return FrameStrip(result, pictures, positions=np.arange(24).reshape(4, 2, 3) + 7, **more)


# ---- selection ------------------------------------------------------------------------------------------------------


def test_a_selection_survives_dict_yaml_and_text() -> None:
    chosen = Selection(
        frame=3, patch=(1, 2), token=40, layer=5, head=0, pair=("last", "frame:0+after-video"), run="a b&c=1"
    )
    for again in (
        Selection.from_dict(chosen.to_dict()), Selection.from_yaml(chosen.yaml), Selection.from_text(chosen.text),
    ):  # fmt: skip
        assert again.to_dict() == chosen.to_dict()
    assert chosen.text.startswith("frame=3&patch=1,2&") and "frame:0%2Bafter%2Dvideo->last" in chosen.text
    assert Selection.from_text("").to_dict() == {} == Selection.from_yaml("").to_dict()


@pytest.mark.parametrize(
    "text",
    [
        "frame=x", "fram=3", "patch=1", "patch=1,2,3", "pair=a", "layer=0", "frame=1,2", "frame", "frame=1&frame=2", "frame=",
        "layer=99999999999999",
    ],
)  # fmt: skip
def test_a_text_that_is_no_selection_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="selection"):
        Selection.from_text(text)


def test_a_wrong_choice_changes_nothing_and_a_right_one_is_heard_once() -> None:
    chosen, heard = Selection(frame=1), []
    chosen.observe(lambda c: heard.append(c["name"]))
    with pytest.raises(ConfigError, match="closest: layer"):
        chosen.set(frame=2, layr=3)
    with pytest.raises(ConfigError, match="layer"):
        chosen.set(frame=2, layer=True)
    assert chosen.frame == 1 and heard == []
    chosen.set(frame=2, layer=3)
    assert sorted(heard) == ["frame", "layer"]


# ---- the edge grid --------------------------------------------------------------------------------------------------


def test_painting_goes_where_the_brush_is_and_nowhere_else() -> None:
    g = grid()
    g.brush((2, 3), [1])
    g.paint([(4, 1), (4, 2), (1, 2)])
    want = np.zeros((4, 2, 5, 5), bool)
    want[1:3, 1, 4, 1] = want[1:3, 1, 4, 2] = True  # (1, 2): a key after its query has no edge
    assert np.array_equal(g.blocked, want)
    assert g.removed == 2 * (4 + 4) and g.total == PAIRS.sum() * 8 == 17 * 18 // 2 * 8
    g.brush((1, 4), ())
    shown = g.shown()
    assert (shown[4, 1], shown[1, 2], shown[0, 0]) == (PARTLY, NO_EDGE, ALLOWED)
    g.paint([(4, 1)])  # toggled: partly blocked becomes blocked, blocked becomes allowed
    assert g.shown()[4, 1] == BLOCKED
    g.paint([(4, 1)])
    assert g.shown()[4, 1] == ALLOWED and g.blocked[1, 1, 4, 2]


def test_every_step_can_be_undone_and_taken_again() -> None:
    g, seen = grid(), []
    for step in (
        lambda: g.paint([(4, 1)]),
        lambda: g.preset("no cross-frame"),
        g.reset,
        lambda: g.paint([(3, 0)], "block"),
    ):
        seen.append(g.blocked.copy())
        step()
    last = g.blocked.copy()
    g.paint([(3, 0)], "block")  # changes nothing, so it is no step
    for before in reversed(seen):
        assert g.undo() and np.array_equal(g.blocked, before)
    assert not g.undo() and not g.can_undo
    while g.redo():
        pass
    assert np.array_equal(g.blocked, last)
    g.undo()
    g.paint([(2, 2)])
    assert not g.can_redo


def test_cuts_are_short_and_come_back_whole() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        e = editor()
        e.put(rng.random((4, 2, 5, 5)) < 0.3)
        assert np.array_equal(cells_of(e.grid, e.policy()), e.grid.blocked)
    e = editor()
    e.paint([(4, k) for k in (1, 2)], "block")
    assert e.policy()["cuts"] == [{"layers": "1-4", "q": "last", "k": "video"}]
    assert ranges([1, 2, 3, 9]) == "1-3,9"


def test_unions_as_segments_come_back_too() -> None:
    names = ("frame:0+frame:1", "frame:2+frame:3", "last")
    g = EdgeGrid(names, np.tril(np.ones((3, 3), int)), 2, 1)
    g.paint([(2, 0), (1, 0)], "block")
    e = EdgeEditor(names, g.pairs, n_layers=2, n_heads=1)
    assert np.array_equal(cells_of(e.grid, {"format": "edge-policy/1", "cuts": g.cuts()}), g.blocked)


@pytest.mark.parametrize(
    "wrong",
    [
        None, {"format": "x"}, {"format": "edge-policy/1", "cuts": [{"q": "last", "k": "frame:9"}]},
        {"format": "edge-policy/1", "cuts": [{"q": "last", "k": "video", "where": "frame(q) > 1"}]},
        {"format": "edge-policy/1", "cuts": [{"q": "last", "k": "video", "layers": "5"}]},
        {"format": "edge-policy/1", "cuts": [{"q": "last", "k": "video", "layers": "x"}]},
        {"format": "edge-policy/1", "cuts": [{"q": "last", "k": "video", "heads": [7]}]},
        {"format": "edge-policy/1", "cuts": [{"k": "video"}]},
    ],
)  # fmt: skip
def test_policies_that_the_grid_cannot_show_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match="policy"):
        cells_of(grid(), wrong)


def test_the_table_speaks_and_mistakes_stand_below_it() -> None:
    applied: list[int] = []
    e = editor(on_apply=lambda: applied.append(e.grid.removed))
    live = e.widget()

    def say(**message) -> None:
        live._handle_custom_msg(message, [])

    say(do="brush", layers=[1, 2], heads=[0])
    say(do="paint", cells=[[4, 1]], how="block")
    assert live.count == f"8 of {e.grid.total:,} edges removed (0.7 %)" and live.can_undo
    assert live.cells[4 * 5 + 1] == BLOCKED
    say(do="apply")
    assert applied == [8]
    for wrong in (
        {"do": "paint", "cells": [[9, 9]]}, {"do": "brush", "layers": [3, 2]}, {"do": "brush", "heads": [5]},
        {"do": "preset", "name": "?"}, {"do": "export"}, {"do": "paint"}, {},
    ):  # fmt: skip
        say(**wrong)
        assert live.error, wrong
    say(do="undo")
    assert live.error == "" and e.grid.removed == 0


def test_an_editor_painted_from_two_threads_keeps_every_step() -> None:
    e = editor()
    cells = [(q, k) for q in range(5) for k in range(q + 1)]
    halves = [cells[::2], cells[1::2]]

    def work(mine) -> None:
        for q, k in mine:
            e.widget()._handle_custom_msg({"do": "paint", "cells": [[q, k]], "how": "block"}, [])

    threads = [threading.Thread(target=work, args=(h,)) for h in halves]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert e.grid.removed == e.grid.total


# ---- strip, lens, maps ----------------------------------------------------------------------------------------------


def test_a_click_on_a_patch_chooses_its_token_and_back() -> None:
    strip = film()
    strip.widget().set_trait("frame", 2)
    strip.widget().set_trait("patch", (1, 0))
    assert strip.selection.token == 7 + 2 * 6 + 3
    strip.selection.token = 7 + 5
    assert (strip.widget().frame, strip.widget().patch) == (0, (1, 2))
    strip.selection.token = 3  # a token of the text: the frame stays
    assert strip.widget().frame == 0


def test_pinned_limits_stay_and_free_ones_follow() -> None:
    strip = film()
    r = strip.result()
    assert strip.widget().limits == (0.0, 23.0) and not strip.widget().diverging
    strip.show(Result(r.values - 12, r.axes, r.coords, "change", {}))
    assert strip.widget().limits == (-12.0, 12.0) and strip.widget().diverging
    strip.widget().pinned = True
    strip.show(Result(r.values * 5, r.axes, r.coords, "change", {}))
    assert strip.widget().limits == (-12.0, 12.0)
    shown = np.frombuffer(strip.widget().values, "<f4")
    assert np.array_equal(shown, (r.values * 5).ravel())


def test_what_is_not_finite_is_missing_not_coloured() -> None:
    strip = film()
    values = strip.result().values.copy()
    values[0, 0, 0], values[1, 1, 1] = np.inf, np.nan
    strip.show(Result(values, strip.result().axes, strip.result().coords, "p", {}))
    shown = np.frombuffer(strip.widget().values, "<f4")
    assert np.isnan(shown[[0, 10]]).all() and np.isfinite(shown).sum() == 22
    assert extent([np.nan, np.inf]) == ((0.0, 1.0), False)


def test_scales_are_cividis_and_a_zero_centred_puor() -> None:
    plain = np.frombuffer(colours(False), np.uint8).reshape(STEPS, 4)
    assert tuple(plain[0, :3]) == rgb("#00224e") and tuple(plain[-1, :3]) == rgb("#fee838")
    diverging = np.frombuffer(colours(True), np.uint8).reshape(STEPS, 4)
    assert tuple(diverging[STEPS // 2, :3]) == rgb("#f7f7f7")
    over = np.frombuffer(colours(True, on_picture=True), np.uint8).reshape(STEPS, 4)
    assert over[STEPS // 2, 3] < 20 < 150 < over[0, 3]  # at rest the picture is seen


def test_pictures_and_values_that_do_not_fit_are_refused() -> None:
    strip = film()
    r = strip.result()
    with pytest.raises(UsageError, match="5 pictures for 4"):
        FrameStrip(r, np.zeros((5, 8, 8, 3), np.uint8))
    with pytest.raises(UsageError, match="uint8"):
        FrameStrip(r, np.zeros((4, 8, 8, 3)))
    with pytest.raises(UsageError, match="shape"):
        FrameStrip(r, np.zeros((4, 8, 8, 3), np.uint8), positions=np.zeros((4, 2, 2)))
    with pytest.raises(UsageError, match="axes"):
        strip.show(Result(np.zeros((2, 2)), ("layer", "head"), {"layer": [1, 2], "head": [0, 1]}, "p", {}))
    assert (
        len(FrameStrip(r, np.zeros((8, 8, 8, 3), np.uint8)).widget().frames) == 4
    )  # tubelets: the first of each two


def lensed() -> Lensed:
    p = np.array([[[0.6, 0.3], [0.5, 0.4]], [[0.9, 0.05], [0.7, 0.2]]])
    words = [[["a", "b"], ["b", "a"]], [["A", "b"], ["A", "a"]]]
    coords = {"layer": [1, 2], "pos": [0, 1], "place": [1, 2]}
    notes = {"words": words, "mode": "normed", "where": {"position": [9, 12]}}
    best = Result(p, ("layer", "pos", "place"), coords, "probability", {}, "logit lens", notes)
    ranks = Result(
        np.array([[[3, 4], [1, 1]]]),
        ("word", "layer", "pos"),
        {"word": ["A"], "layer": [1, 2], "pos": [0, 1]},
        "rank",
        {},
    )
    return Lensed(best, ranks, ("patch", "last"))


def test_the_lens_table_shows_words_ranks_and_says_that_it_is_raw() -> None:
    table = LensTable(lensed())
    live = table.widget()
    assert live.texts == ["a", "b", "b", "a", "A", "b", "A", "a"] and live.tokens == [9, 12]
    assert live.mode.startswith("raw lens")
    assert table.spec().rows == (("2", "A", "A"), ("1", "a", "b"))  # the last layer on top
    table.follow("A")
    assert table.spec().rows == (("2", "1", "1"), ("1", "3", "4"))
    with pytest.raises(UsageError, match="no ranks of 'zz'"):
        table.follow("zz")
    live.layer, live.token = 2, 12
    assert (table.selection.layer, table.selection.token) == (2, 12)
    data = table.data()
    assert data.query("layer == 2 and token == 'last' and place == 1").word.tolist() == ["A"]
    with pytest.raises(UsageError, match="lens table"):
        LensTable(film().result())


def test_the_efficiency_map_folds_tokens_to_frames() -> None:
    values = np.ones((2, 3, 2, 2))
    values[1, 0] = 0
    values[1, 1, 0] = 0
    values[1, 2, 0, 0] = np.nan
    axes = ("layer", "frame", "row", "col")
    coords = {"layer": [1, 2], "frame": [0, 1, 2], "row": [0, 1], "col": [0, 1]}
    view = DepthMap(Result(values, axes, coords, "share computed", {}))
    assert view.result().values.tolist() == [[1, 1, 1], [0, 0.5, 1]]
    assert view.widget().limits == (0.0, 1.0) and view.widget().pinned
    view.widget().column = "frame 1"
    view.widget().layer = 2
    assert (view.selection.frame, view.selection.layer) == (1, 2)
    view.selection.set(frame=2, layer=1)
    assert (view.widget().column, view.widget().layer) == ("frame 2", 1)
    assert view.at(2).axes == ("frame", "row", "col")
    with pytest.raises(UsageError, match="axis layer"):
        LayerMap(film().result())


def views() -> list:
    return [
        film(),
        editor(),
        LensTable(lensed()),
        LayerMap(Result(np.eye(2), ("layer", "role"), {"layer": [1, 2], "role": ["a", "b"]}, "p", {})),
    ]


@pytest.mark.parametrize("view", views(), ids=lambda v: type(v).__name__)
def test_every_view_exports_figure_data_and_config(view, tmp_path) -> None:
    for name, magic in (("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.png", b"\x89PNG")):
        assert view.export(tmp_path / name).read_bytes().startswith(magic)
    table = pd.read_csv(view.export(tmp_path / "a.csv"))
    assert len(table) and "value" in table
    assert pd.read_parquet(view.export(tmp_path / "a.parquet")).shape == table.shape
    assert parse_yaml(view.export(tmp_path / "a.yaml").read_text(), "a")["view"].endswith(type(view).__name__)
    assert view.figure().data  # plotly, without a kernel
    with pytest.raises(UsageError, match=".parquet"):
        view.export(tmp_path / "a.xlsx")


@pytest.mark.parametrize("view", views(), ids=lambda v: type(v).__name__)
def test_every_view_comes_back_from_its_config(view) -> None:
    view.selection.set(frame=1, layer=2, pair=("last", "frame:0"))
    if isinstance(view, EdgeEditor):
        view.brush((2, 3), [1])
        view.paint([(4, 1)])
    config, before = view.config(), view.result().values.copy()
    view.selection.clear()
    if isinstance(view, EdgeEditor):
        view.reset()
    view.restore(config)
    assert view.config() == config and np.array_equal(view.result().values, before, equal_nan=True)
    for wrong in (
        "view: lab.view.x.Other",
        "- 1",
        f"view: x.{type(view).__name__}\nsettings: {{nothing: 1}}",
    ):
        with pytest.raises(ConfigError):
            view.restore(wrong)


def test_a_lens_picture_is_the_same_bytes_each_time_and_changes_with_the_word_followed(tmp_path) -> None:
    table = LensTable(lensed())
    first = [table.export(tmp_path / f"a{s}").read_bytes() for s in (".png", ".svg", ".pdf")]
    assert first == [table.export(tmp_path / f"b{s}").read_bytes() for s in (".png", ".svg", ".pdf")]
    table.follow("A")
    assert table.export(tmp_path / "a.png").read_bytes() != first[0]
