"""Figures: made from a recipe, drawn again without torch to the same bytes, verified, and red when a number is changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from figures import fig_09_cost, fig_10_scaling, fig_12_house, making, manifest, verifying
from figures.gallery import gallery
from figures.running import Job, run_all
from figures.shelf import Entry, find, shelf
from lab.cli.main import main as vlab
from lab.errors import ConfigError, RunError, UsageError
from lab.recipe import FigureRecipe, from_plain, load
from lab.result import Result
from lab.view.matplotlib_out import SUFFIXES, numbered
from lab.view.plate_out import PAPER, plate_bytes, plate_matplotlib
from lab.view.plates import COLUMN, FULL, Plate, one_scale
from lab.view.specs import FigureSpec, figure_spec
from tests.other_model import checkpoint
from tests.test_torchfree import CODE

TWELVE = [
    "information_flow", "effective_pathways", "answer_by_layer", "words_on_video", "attention_cut", "mixture_of_depths",
    "token_drop", "kv_quantisation", "cost", "scaling", "patching_twins", "house",
]  # fmt: skip
ENTRY = find("answer_by_layer")
FEW = {"items.n": 2, "items.sim": "moving_direction"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A figure of two questions, made in this process; do not write into it."""
    folder = tmp_path_factory.mktemp("figures") / "few"
    assert making.make(ENTRY, making.recipe_of(ENTRY, FEW), folder) == "computed"
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "few"))


# ---- the shelf ------------------------------------------------------------------------------------------------------


def test_the_set_is_there_in_its_order():
    names = [e.name for e in shelf()]
    assert names[:12] == TWELVE and [e.number for e in shelf()] == list(range(1, len(names) + 1))


@pytest.mark.parametrize("entry", shelf(), ids=lambda e: e.name)
def test_every_figure_has_a_recipe_that_says_how_it_repeats(entry):
    recipe = entry.recipe()
    assert callable(entry.module.compute) and callable(entry.module.draw) and len(entry.title) < 160
    assert from_plain(recipe.plain()) == recipe and recipe.model.name == "tiny"
    assert (recipe.determinism == "measured") == hasattr(entry.module, "check")
    assert recipe.override({"model": "/elsewhere"}).model.name == "/elsewhere"


def test_figures_are_found_by_name_and_number():
    assert find("9") == find("09") == find("cost") == find("fig_09_cost.py") == find("09_cost")
    with pytest.raises(UsageError, match="closest: cost"):
        find("costs")


# ---- making ---------------------------------------------------------------------------------------------------------


def test_a_folder_says_where_its_numbers_come_from(made):
    told = manifest.read(made / "manifest.json")
    assert set(told["outputs"]) == {p.name for p in made.iterdir()} - {"manifest.json", "computed.json"}
    assert {f"figure{s}" for s in (*SUFFIXES, ".html")} | {"data_1.npz", "data_2.npz", "recipe.yaml"} <= set(
        told["outputs"]
    )
    for key in (
        "git",
        "versions",
        "device_name",
        "dtype",
        "seeds",
        "wall_seconds",
        "peak_bytes",
        "argv",
        "date",
        "threads",
    ):
        assert told[key] not in (None, "", {}), key
    assert len(told["items"]["items"]["sha256"]) == 64 and told["items"]["items"]["n"] == 2
    assert len(told["model"]["weights"]) == 12 and told["seeds"] == {"items.seed": 301}
    assert "n = 2" in told["caption"] and told["width_inches"] == FULL and told["determinism"] == "exact"
    assert (
        from_plain(told["recipe"]).id == told["recipe_id"] == load(made / "recipe.yaml").id
    )  # the round trip


def test_only_what_is_missing_is_made(copy, monkeypatch):
    recipe = making.recipe_of(ENTRY, FEW)
    assert making.make(ENTRY, recipe, copy) == "kept"
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    (copy / "manifest.json").unlink()
    (copy / "figure.svg").unlink()
    monkeypatch.setattr(making, "compute", lambda *a: pytest.fail("the data are there"))
    assert making.make(ENTRY, recipe, copy) == "drawn"
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert not making.is_whole(ENTRY, making.recipe_of(ENTRY, {**FEW, "items.seed": 9}), copy)
    (copy / "data_1.npz").write_bytes(b"half")
    assert not making.is_whole(ENTRY, recipe, copy) and not making.has_data(ENTRY, recipe, copy)


SCRIPT = "N = {n}\nM = 5\ndef compute(recipe):\n    return _half(recipe)\ndef _half(r):\n    return r * N  # {word}\ndef draw(r):\n    return {drawn} + M\n"


def test_a_new_drawing_needs_no_new_measurement(tmp_path):
    def entry(name: str, **words: object) -> Entry:
        (tmp_path / f"fig_01_{name}.py").write_text(SCRIPT.format(**{"n": 1, "word": "", "drawn": 1} | words))
        return Entry(1, name, tmp_path / f"fig_01_{name}.py")

    first = entry("a").measuring()
    assert entry("b", drawn=2).measuring() == first == entry("c", word="a remark").measuring()
    assert entry("d", n=2).measuring() != first


def test_other_values_go_to_a_folder_of_their_own():
    base, few = ENTRY.recipe(), making.recipe_of(ENTRY, FEW)
    assert making.folder_of(ENTRY, base, Path("o")) == Path("o/answer_by_layer")
    assert making.folder_of(ENTRY, few, Path("o")) == Path(f"o/answer_by_layer-{few.id}")


def test_drawing_needs_no_torch_and_gives_the_same_bytes(copy):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    for name in ("figure.svg", "figure.pdf", "figure.png", "figure.html", "manifest.json"):
        (copy / name).unlink()
    scripts = [f"figures.{e.script.stem}" for e in shelf()]
    again = f"from figures.making import main\nassert main(['answer_by_layer', {str(copy)!r}, '--from-data']) == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", f"{CODE}\n{again}", *scripts], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-600:]
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_a_worker_that_fails_says_why_and_stops_nobody(tmp_path, copy):
    jobs = [Job(ENTRY, tmp_path / "bad", ("--set=items.n=none",)), Job(ENTRY, copy, ("--from-data",))]
    bad, good = run_all(jobs, 2)
    assert bad.code == ConfigError.exit_code and bad.error.startswith("recipe with the changes: items.sim.n")
    assert good.said == "drawn" and not (copy / "log.txt").exists()


# ---- verifying ------------------------------------------------------------------------------------------------------


def test_untouched_is_green(made):
    assert verifying.saved(ENTRY, made) == [] and verifying.repeated(ENTRY, made, made) == []


def _one_percent(folder: Path, *, hide: bool) -> None:
    """Changes one number by 1 %; `hide`: its hash in the manifest too."""
    old = Result.load(folder / "data_1.npz")
    values = old.values.copy()
    values[0, 0, -1] *= 1.01
    replace(old, values=values).save(folder / "data_1.npz")
    if hide:
        for name in ("manifest.json", "computed.json"):
            told = manifest.read(folder / name)
            for files in ("data", "outputs"):
                if files in told:
                    told[files]["data_1.npz"] = manifest.sha256_of(folder / "data_1.npz")
            manifest.write(folder / name, told)


def test_one_percent_is_red(copy, made):
    _one_percent(copy, hide=False)
    assert verifying.saved(ENTRY, copy) == ["data_1.npz is missing or its bytes have changed"]


def test_one_percent_is_red_though_the_hash_was_changed_with_it(copy, made):
    _one_percent(copy, hide=True)
    (wrong,) = verifying.repeated(ENTRY, copy, made)
    assert "other bytes" in wrong and "largest difference" in wrong
    assert any("other bytes" in w for w in verifying.saved(ENTRY, copy))


@pytest.mark.parametrize(("bound", "green"), [(1.0, True), (1e-6, False)])
def test_a_tolerance_is_a_bound(copy, made, bound, green):
    told = manifest.read(copy / "computed.json")
    manifest.write(copy / "computed.json", {**told, "determinism": "tolerance", "tolerance": bound})
    _one_percent(copy, hide=True)
    assert (verifying.repeated(ENTRY, copy, made) == []) == green


def test_what_was_made_elsewhere_is_compared_by_numbers(copy, made):
    told = manifest.read(copy / "computed.json")
    manifest.write(copy / "computed.json", {**told, "device_name": "another"})
    assert verifying.repeated(ENTRY, copy, made) == []
    _one_percent(copy, hide=True)
    assert "more than 0.001" in verifying.repeated(ENTRY, copy, made)[0]


def test_the_command_is_red_and_green(tmp_path, made, capsys, monkeypatch):
    monkeypatch.setattr(making, "folder_of", lambda entry, recipe, out: out / entry.name)
    shutil.copytree(made, tmp_path / ENTRY.name)
    assert vlab(["figures", "verify", ENTRY.name, "--quick", "--out", str(tmp_path)]) == 0
    assert "1 of 1 figures are green" in capsys.readouterr().out
    _one_percent(tmp_path / ENTRY.name, hide=False)
    assert vlab(["figures", "verify", ENTRY.name, "--quick", "--out", str(tmp_path)]) == 1
    assert vlab(["figures", "verify", "cost", "--quick", "--out", str(tmp_path)]) == 1
    assert "make the figure first" in capsys.readouterr().out
    assert vlab(["figures", "run", "nowhere"]) == 2 and "no figure 'nowhere'" in capsys.readouterr().err


def _times(ours: float, naive: float) -> list[Result]:
    tools = {"tool": ["ours, fast", "ours, reference", "naive"]}
    notes = {
        "points": 2,
        "positions": 9,
        "layers": 3,
        "left_out": {},
        "device_name": "x",
        "threads": 1,
        "date": "today",
    }
    seconds = Result(
        np.array([[ours], [1.0], [naive]]),
        ("tool", "round"),
        {**tools, "round": [1]},
        "seconds",
        {},
        notes=notes,
    )
    return [seconds, Result(np.zeros(3), ("tool",), tools, "difference", {}, notes=notes)]


def test_measured_figures_are_held_to_their_order():
    good = _times(0.1, 1.0)
    assert fig_09_cost.check(good) == [] and "less than 2.0" in fig_09_cost.check(_times(0.9, 1.0))[0]
    assert "not seconds" in fig_09_cost.check([replace(good[0], unit="hours"), good[1]])[0]
    assert "differ by 1" in fig_09_cost.check([good[0], replace(good[1], values=np.ones(3))])[0]
    assert "today" in fig_09_cost.draw(good).caption and "x, 1 thread" in fig_09_cost.draw(good).caption
    rows = [{"positions": 3, "layers": 2, "points": 1, "max_difference": 0.0, "fallbacks": 0}] * 2
    grown = Result(
        np.array([[1.0, 4.0], [1.0, 1.0]]),
        ("way", "layers"),
        {"way": ["naive", "fast"], "layers": [1, 2]},
        "seconds",
        {},
        "Deeper",
        {"rows": rows},
    )
    assert fig_10_scaling.check([grown]) == []
    assert "less than 1.5" in fig_10_scaling.check([replace(grown, values=grown.values[::-1])])[0]


# ---- the house ------------------------------------------------------------------------------------------------------


def test_floors_by_hand():
    assert fig_12_house.floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 2, "b": 1, "c": 0}
    with pytest.raises(RunError, match="imports itself by way of"):
        fig_12_house.floors({"a": {"b"}, "b": {"a"}})


def test_the_house_is_read_from_the_code(tmp_path):
    found = fig_12_house.modules()
    assert {"lab.model.videollm", "probes.lens", "figures.fig_12_house"} <= set(found)
    used = set(fig_12_house.imported(found["probes.lens"], found))
    assert (
        "probes.asking" in used and "lab.result" in used and not any(u.startswith("lab.view") for u in used)
    )
    file = tmp_path / "a.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lab.result\ndef f():\n    from lab.edges import fast\n"
    )
    assert list(fig_12_house.imported(file, found)) == ["lab.edges.fast"]
    assert fig_12_house.room("lab.edges.fast") == "lab.edges" and fig_12_house.room("probes.lens") == "probes"


# ---- plates ---------------------------------------------------------------------------------------------------------


def _curves() -> FigureSpec:
    values = np.array([[1.0, 2.0, 4.0], [2.0, 1.0, 0.5]])
    coords = {"pathway": ["a", "b"], "layer": [1, 2, 3]}
    return figure_spec(
        Result(values, ("pathway", "layer"), coords, "seconds", {}, "t", low=values - 0.1, high=values + 0.1)
    )


def test_a_plate_has_its_width_and_no_small_print(tmp_path):
    bars = figure_spec(
        Result(np.array([1.0, 30.0]), ("tool",), {"tool": ["x", "y"]}, "s", {}, "bars"), kind="barh"
    )
    plate = Plate("t", ((_curves(), replace(bars, log="x")),), "c", width=COLUMN, heights=(1.6,))
    fig = plate_matplotlib(plate)
    assert fig.get_figwidth() == COLUMN and fig.get_figheight() == 1.6
    fig.canvas.draw()
    sizes = [
        t.get_fontsize()
        for t in fig.findobj(match=lambda o: hasattr(o, "get_fontsize"))
        if t.get_visible() and t.get_text()
    ]
    assert sizes and min(sizes) >= 5.8 and PAPER["font.size"] == 7
    ticks = [t.get_text() for t in fig.axes[1].get_xticklabels() if t.get_text()]
    assert ticks and not any("$" in t for t in ticks)  # of a logarithmic axis
    for suffix in SUFFIXES:
        assert plate_bytes(plate, suffix) == plate_bytes(plate, suffix)
    assert plate_bytes(plate, ".svg", about="recipe 1") != plate_bytes(plate, ".svg", about="recipe 2")


def test_plates_refuse_what_does_not_fit():
    with pytest.raises(UsageError, match="at least one figure"):
        Plate("t", ((),), "c")
    with pytest.raises(UsageError, match="2 heights for 1 rows"):
        Plate("t", ((_curves(),),), "c", heights=(1.0, 2.0))
    with pytest.raises(UsageError, match="no picture format"):
        plate_bytes(Plate("t", ((_curves(),),), "c"), ".gif")


def test_one_scale_holds_all_bands():
    one, two = one_scale([_curves(), replace(_curves(), values=np.full((2, 3), 9.0))])
    assert one.limits == two.limits and one.limits[0] < 0 and one.limits[1] > 9  # the reference is 0


def test_a_graph_needs_a_place_for_every_node():
    links = Result(
        np.array([[0, 2], [0, 0]]),
        ("room", "imported"),
        {"room": ["a", "b"], "imported": ["a", "b"]},
        "modules",
        {},
        notes={"places": [[0.5, 0.9], [0.5, 0.1]]},
    )
    spec = figure_spec(links, kind="graph")
    assert spec.series == ("a", "b") and "1 links" in spec.alt
    assert plate_bytes(Plate("t", ((spec,),), "c"), ".svg").count(b">a<") == 1
    with pytest.raises(UsageError, match="a place for each node"):
        figure_spec(replace(links, notes={}), kind="graph")


# ---- pages and other models -----------------------------------------------------------------------------------------


def test_the_gallery_shows_everything_and_asks_nobody(made):
    page = gallery([ENTRY], [made], made.parent / "index.html").read_text(encoding="utf-8")
    told = manifest.read(made / "manifest.json")
    for words in (
        told["caption"][-60:],
        told["recipe_id"],
        "def compute(",
        "items:",
        "data_1.npz",
        f"{made.name}/figure.pdf",
    ):
        assert words in page, words
    assert 'src="http' not in page and "<script" not in page and "default-src 'none'" in page
    assert "https://" not in (made / "figure.html").read_text(encoding="utf-8").split("</style>")[0]


def test_a_recipe_runs_on_another_model(tmp_path, capsys):
    """All of them: python -m tests.other_model."""
    model = checkpoint(tmp_path / "qwen")
    command = [
        "run",
        str(ENTRY.recipe_file),
        "--set",
        f"model={model}",
        "--set",
        "items.n=1",
        "--out",
        str(tmp_path / "out"),
    ]
    assert vlab(command) == 0
    found = Result.load(tmp_path / "out" / "result.npz")
    assert found.recipe["model"]["name"] == str(model) and found.shape == (5, 2, 5)
    assert (
        json.loads((tmp_path / "out" / "run.json").read_text())["recipe"]
        == load(tmp_path / "out" / "recipe.yaml").id
    )
    assert (
        isinstance(load(tmp_path / "out" / "recipe.yaml"), FigureRecipe)
        and os.path.getsize(tmp_path / "out" / "flow.png") > 1000
    )


def test_names_of_clip_paths_do_not_hang_on_the_last_bit_of_a_coordinate():
    one = b'<g clip-path="url(#p9fb36d1277)"/><g clip-path="url(#p0ce0342847)"/><clipPath id="p9fb36d1277">'
    other = one.replace(b"p9fb36d1277", b"p0ff1278298")
    assert numbered(one) == numbered(other) and numbered(one).count(b"clip1") == 2
    assert b"clip2" in numbered(one) and numbered(one.replace(b"p0ce0342847", b"p9fb36d1277")) != numbered(
        one
    )
