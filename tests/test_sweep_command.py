"""`vlab sweep` over benchmark files and simulated tasks, its options, and the panel it draws; clips of videos."""

import json

import numpy as np
import pytest

from lab.benchmark_rows import MVBENCH, as_item_rows, is_benchmark
from lab.carriers import VideoQA
from lab.cli import main as cli
from lab.cli.sources import source_of
from lab.cli.sweeps import _heads, _pairs
from lab.errors import ConfigError, UsageError
from lab.items import dump_items, item_of, load_items, spec_of
from lab.recipe import ItemFile
from lab.result import Result
from lab.video import probe, read
from lab.view.facets import facets, panel
from lab.view.panel_out import save_panel
from probes.pathways import PANEL
from tests import clips, families

ROW = {"video": "a.mp4", "question": "What came first?", "candidates": ["up", "down"], "answer": "down"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder as TVBench lays it out, with one task of two questions about one video."""
    root = tmp_path_factory.mktemp("tvbench")
    for name in ("json", "video/action_sequence"):
        (root / name).mkdir(parents=True)
    clips.make(root / "video/action_sequence/a.mp4", "libx264", 12)
    rows = [
        ROW,
        {**ROW, "question": "And then?", "start": 0.1, "end": 0.3, "accurate_start": None, "question_id": 7},
    ]
    (root / "json/action_sequence.json").write_text(json.dumps(rows))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    families.build("llava_onevision").save_pretrained(folder)
    families.tokenizer("llava_onevision").save_pretrained(folder)
    sizes = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    does = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes | does))
    return str(folder)


# ---- benchmark files --------------------------------------------------------------------------------------------------


def test_tvbench_rows_become_items(bench):
    items = load_items(bench / "json/action_sequence.json", videos=bench / "video")
    assert [i.id for i in items] == ["action_sequence:1", "action_sequence:2"]
    assert {i.task for i in items} == {"action_sequence"} and items[0].options == ("up", "down")
    assert items[0].answer == 1 and items[0].video == str(bench / "video/action_sequence/a.mp4")
    assert items[0].clip is None and items[1].clip == (0.1, 0.3)
    spec = ItemFile(file=str(bench / "json/action_sequence.json"), videos=str(bench / "video"))
    assert load_items(spec) == items


def test_mvbench_videos_lie_by_their_source(tmp_path):
    for task, place in (("moving_count", MVBENCH["moving_count"]), ("my_own_task", ".")):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "v.mp4").touch()
        rows = as_item_rows([{**ROW, "video": "v.mp4"}], tmp_path / f"{task}.json", tmp_path)
        assert rows[0]["video"] == str(tmp_path / place / "v.mp4") and rows[0]["task"] == task
    assert (
        len(MVBENCH) == 20
        and is_benchmark([ROW])
        and not is_benchmark([{"video": "a"}])
        and not is_benchmark([])
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "video": "b.mp4"}, "row 1: no video 'b.mp4' .looked for .*action_sequence/b.mp4.*--video-root"),
        ({**ROW, "answr": 1}, "no key 'answr'.*closest: answer"), ({"candidates": []}, "video, question, answer missing"),
        ({**ROW, "answer": "left"}, "'left' is none of the 2 candidates"), ({**ROW, "candidates": "ab"}, "list of texts"),
        ({**ROW, "video": 3}, "name of a file"), ({**ROW, "start": 3, "end": 1}, "start < end"), ({**ROW, "start": "a", "end": 1}, "in seconds"),
    ],
)  # fmt: skip
def test_bad_benchmark_rows_say_what_is_wrong(row, message, bench, tmp_path):
    file = tmp_path / "action_sequence.json"
    file.write_text(json.dumps([row]))
    with pytest.raises(ConfigError, match=message):
        load_items(file, videos=bench / "video")
    with pytest.raises(ConfigError, match="no folder"):
        load_items(file, videos=bench / "nowhere")


def test_a_clip_is_sampled_written_and_read_again(bench, tmp_path):
    video = bench / "video/action_sequence/a.mp4"
    info, clip = probe(video), (0.1, 0.3)
    frames = read(video, n_frames=3, clip=clip)
    times = frames.seconds.tolist()
    assert len(times) == 3 and all(0.1 - 1e-3 <= t <= 0.3 + 1e-3 for t in times) and times == sorted(times)
    inside = [t for t in read(video, fps=info.fps, clip=clip).seconds.tolist()]
    assert inside[0] == times[0] and inside[-1] == times[-1] and len(inside) >= 3
    with pytest.raises(UsageError, match="no frame is shown from 90 to 91 s"):
        read(video, clip=(90, 91))
    with pytest.raises(UsageError, match="when frames are shown"):
        read(np.zeros((4, 8, 8, 3), np.uint8), clip=clip)
    item = VideoQA(str(video), "?", clip=clip)
    assert load_items(dump_items([item], tmp_path / "items.yaml"))[0].clip == clip
    assert load_items(dump_items([item], tmp_path / "items.jsonl"))[0].clip == clip
    assert item_of(spec_of(item)).clip == clip and VideoQA("v", "?").clip is None


# ---- the command --------------------------------------------------------------------------------------------------------


def test_a_sweep_over_tvbench_with_everything(bench, model, tmp_path, capsys):
    """Two questions on one video, several metrics, heads; result, pictures, recipe; then the recipe again."""
    args = [
        "sweep",
        "--items",
        str(bench / "json/action_sequence.json"),
        "--video-root",
        str(bench / "video"),
        "-m",
        model,
    ]
    args += [
        "-n",
        "4",
        "-w",
        "2",
        "-p",
        "video->last",
        "--metric",
        "argmax",
        "--metric",
        "kl",
        "--heads",
        "0,3",
        "--json",
    ]
    assert cli.main([*args, "--out", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    result = Result.load(tmp_path / "result.npz")
    assert result.axes == ("metric", "item", "pathway", "head", "layer") and result.shape == (2, 2, 1, 2, 5)
    assert (
        said["correct"]["action_sequence"][1:] == [2, 2] and said["ledger"]["tower_calls"] == 2
    )  # a clip, and all of it
    assert (tmp_path / "flow.png").stat().st_size > 5000 and (tmp_path / "report.html").exists()
    assert cli.main(["run", str(tmp_path / "recipe.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_difference"] <= 1e-3


def test_the_panel_by_one_command(model, tmp_path, capsys):
    args = [
        "sweep",
        "--items",
        "sim:moving_direction,scene_transition:2:1",
        "--split",
        "all",
        "--panel",
        "-m",
        model,
        "--out",
        str(tmp_path),
    ]
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    result = Result.load(tmp_path / "result.npz")
    assert (
        result.coords["pathway"] == [p for g in PANEL.values() for p in g]
        and len(result.coords["pathway"]) == 11
    )
    assert set(result.notes["task"].values()) == {"moving_direction", "scene_transition"}
    assert "video->true-option" in said and "answered right" in said and "tower calls" in said
    page = (tmp_path / "panel.html").read_text()
    assert (
        "scene transition" in page
        and "default-src 'none'" in page
        and (tmp_path / "panel.png").stat().st_size > 20_000
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--items", "sim:moving_direction:x"], "not sim:TASKS:N:SEED"), (["--items", "sim:movng_direction"], "closest: moving_direction"),
        (["--items", "sim:moving_direction:0"], "n"), (["--items", "sim:temporal:1", "--video-root", "."], "leave it out"),
        (["--items", "sim:temporal:1", "--panel", "-p", "video->last"], "eleven curves"), (["--items", "sim:temporal:1", "--split", "right"], "correct, wrong or all"),
        (["--items", "sim:temporal:1", "--heads", "a"], "--heads 'a'"), (["--items", "sim:temporal:1", "--frame-pairs", "3"], "KEY-QUERY"),
        (["--items", "sim:temporal:1", "--metric", "best"], "argmax"), (["--items", "sim:temporal:1", "--style", "round"], "triangle"),
        (["--items", "nothing.json", "--video-root", "."], "no such file"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(args, message, model, tmp_path, capsys):
    assert cli.main(["sweep", "-m", model, "--out", str(tmp_path), *args]) in (2, 3)
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1] and "Traceback" not in error


def test_words_of_the_command_line():
    assert _heads("0, 3") == (0, 3) and _heads("each") == "each" and _heads(None) is None
    assert _pairs("0-3,1-3") == ((0, 3), (1, 3)) and _pairs("each") == "each"
    five = source_of("sim:temporal:3:9", None)
    assert five.sim.count(",") == 4 and (five.n, five.seed) == (3, 9)
    assert [i.task for i in load_items(five)][::3] == five.sim.split(",")


# ---- what is drawn ------------------------------------------------------------------------------------------------------


def by_task(**notes):
    values = np.arange(2 * 3 * 4, dtype=float).reshape(2, 3, 4) - 12
    ways = ["cross-frame", "video->last", "last->last"]
    return Result(
        values, ("task", "pathway", "layer"), {"task": ["a_b", "c"], "pathway": ways, "layer": [1, 2, 3, 4]}, "%", {},
        name="x", notes=notes, low=values - 1, high=values + 1, baseline=0.0,
    )  # fmt: skip


def test_a_panel_has_a_row_for_each_group_and_one_scale_for_a_row(tmp_path):
    made = panel(by_task(n={"item": {"a_b": 3, "c": 1}}, window=3, split="correct"), PANEL)
    assert made.shape == (2, 2) and made.columns == ("a b (n = 3)", "c (n = 1)")
    first, second = made.cells[1]
    assert first.series == ("video->last", "last->last") and first.limits == second.limits
    assert first.limits[0] < -9 and first.limits[1] > 11 and "answered right" in made.caption
    for suffix in (".png", ".svg", ".html"):
        again = [save_panel(made, tmp_path / f"{i}{suffix}").read_bytes() for i in range(2)]
        assert len(again[0]) > 1000 and (suffix == ".html" or again[0] == again[1])
    with pytest.raises(UsageError, match="end its name"):
        save_panel(made, tmp_path / "panel.gif")
    with pytest.raises(UsageError, match="none of the pathways"):
        panel(by_task(), {"none": ["x->y"]})
    with pytest.raises(UsageError, match="needs the axes"):
        panel(by_task().select(task="c"), PANEL)


def test_facets_leave_what_a_figure_can_show():
    shape = {"metric": ["argmax", "kl"], "item": ["i", "j"], "pathway": ["p", "q"], "key_frame": [0, 1], "query_frame": [1, 2], "layer": [1, 2, 3]}  # fmt: skip
    notes = {"units": {"metric": {"argmax": "%", "kl": "nats"}}}
    r = Result(np.zeros([len(c) for c in shape.values()]), tuple(shape), shape, "mixed", {}, notes=notes)
    parts = facets(r)
    assert len(parts) == 12 and {p.axes for p in parts} == {("key_frame", "query_frame")}
    assert {p.unit for p in parts} == {"%", "nats"}
    assert [p.axes for p in facets(r.select(key_frame=0, query_frame=1, metric="kl"))] == [
        ("pathway", "layer")
    ]
