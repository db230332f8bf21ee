"""Public benchmarks from folders in the layout they are published in: small synthetic folders, nothing downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lab.benchmarks.folders import LAYOUTS
from lab.cli.sources import source_of
from lab.errors import ConfigError, UsageError
from lab.items import load_items
from lab.recipe import BenchmarkSpec
from lab.video import read
from tests import clips


def touched(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def said(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


@pytest.fixture
def tvbench(tmp_path: Path) -> Path:
    root = tmp_path / "TVBench"
    row = {"video": "a.mp4", "question": "Which way?", "candidates": ["up", "down"], "answer": "down"}
    said(root / "json/moving_direction.json", [row, {**row, "answer": "up"}, {**row, "question": "And now?"}])
    said(root / "json/action_sequence.json", [{**row, "video": "b.mp4", "start": 1.5, "end": 4.0}])
    touched(root / "video/moving_direction/a.mp4", root / "video/action_sequence/b.mp4")
    return root


@pytest.fixture
def mvbench(tmp_path: Path) -> Path:
    """A task of videos, one with seconds, and the one whose videos are folders of frames, 3 a second."""
    root = tmp_path / "MVBench"
    row = {"question": "What?", "candidates": ["x", "y", "z"], "answer": "z"}
    said(root / "json/moving_count.json", [{**row, "video": "video_1.mp4"}])
    said(root / "json/action_prediction.json", [{**row, "video": "ABC.mp4", "start": 0, "end": 2}])
    said(root / "json/episodic_reasoning.json", [{**row, "video": "friends_1", "start": 1.0, "end": 2.34, "fps": 3, "subtitle": "s"}])  # fmt: skip
    touched(root / "video/clevrer/video_validation/video_1.mp4", root / "video/star/Charades_v1_480/ABC.mp4")
    frames = root / "video/tvqa/frames_fps3_hq/friends_1"
    frames.mkdir(parents=True)
    for i in range(1, 11):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(frames / f"{i:05d}.png")
    return root


@pytest.fixture
def tomato(tmp_path: Path) -> Path:
    root = tmp_path / "TOMATO"
    row = {"question": "How many?", "options": ["2", "1", "3"], "answer": 2, "key": "0209-03", "demonstration_type": "human",
           "video_source_url": "", "motion_type": "count", "variation": {"zoom": 1}, "note": ""}  # fmt: skip
    said(
        root / "data/count.json",
        {"0": row, "7": {**row, "key": "0000-00", "demonstration_type": "simulated"}},
    )
    said(root / "data/shape&trend.json", {"0": {**row, "demonstration_type": "object"}})
    for name in ("human/0209-03", "simulated/0000-00", "object/0209-03"):
        touched(root / f"videos/{name}.mp4")
    return root


@pytest.fixture
def tempcompass(tmp_path: Path) -> Path:
    root = tmp_path / "TempCompass"
    choice = {"question": "What is it?\nA. left to right\nB. right to left", "answer": "B. right to left"}
    said(root / "questions/multi-choice.json", {"10": {"direction": [choice, choice]}, "10_reverse": {"direction": [{**choice, "answer": "A. left to right"}], "order": [choice]}})  # fmt: skip
    said(root / "questions/yes_no.json", {"10": {"action": [{"question": "Is it?", "answer": "no"}]}})
    match = "Which caption fits?\nCaption A: It falls.\nCaption B: It rises."
    said(root / "questions/caption_matching.json", {"10": {"action": [{"question": match, "answer": "Caption B: It rises."}, {"question": match.replace("Caption A", "Option 1").replace("Caption B", "Option 2"), "answer": "Option 1: It falls."}]}})  # fmt: skip
    said(root / "questions/captioning.json", {"10": {"action": [{"question": "Say it.\nInformation A: {}", "answer": "A. falling"}]}})  # fmt: skip
    touched(root / "videos/10.mp4", root / "videos/10_reverse.mp4")
    return root


def test_tvbench(tvbench: Path) -> None:
    items = load_items({"benchmark": "tvbench", "folder": str(tvbench)})
    assert [i.id for i in items] == ["action_sequence:1", *(f"moving_direction:{n}" for n in (1, 2, 3))]
    first, way = items[0], items[1]
    assert first.clip == (1.5, 4.0) and first.video == str(tvbench / "video/action_sequence/b.mp4")
    assert (way.options, way.answer, way.letter, way.task) == (("up", "down"), 1, "B", "moving_direction")
    few = load_items(
        BenchmarkSpec(benchmark="tvbench", folder="TVBench", task="moving_direction", n=2),
        base=tvbench.parent,
    )
    assert few == items[1:3]
    assert load_items(f"tvbench:{tvbench}:moving_direction:2") == few


def test_mvbench_has_videos_by_source_and_folders_of_frames(mvbench: Path) -> None:
    by_task = {i.task: i for i in load_items({"benchmark": "mvbench", "folder": str(mvbench)})}
    assert by_task["moving_count"].video == str(mvbench / "video/clevrer/video_validation/video_1.mp4")
    assert by_task["action_prediction"].clip == (0.0, 2.0) and by_task["moving_count"].letter == "C"
    episode = by_task["episodic_reasoning"]
    assert episode.clip is None and [Path(v).stem for v in episode.video] == [f"{i:05d}" for i in range(3, 8)]
    assert read(episode.video, n_frames=5).pixels[:, 0, 0, 0].tolist() == [3, 4, 5, 6, 7]


def test_tomato(tomato: Path) -> None:
    items = load_items({"benchmark": "tomato", "folder": str(tomato)})
    assert [i.id for i in items] == ["count:0", "count:7", "shape&trend:0"] and items[0].answer == 2
    assert items[1].video == str(tomato / "videos/simulated/0000-00.mp4") and items[0].letter == "C"
    assert [i.id for i in load_items(f"tomato:{tomato}:shape&trend")] == ["shape&trend:0"]


def test_tempcompass_has_its_options_in_the_text(tempcompass: Path) -> None:
    items = {i.id: i for i in load_items({"benchmark": "tempcompass", "folder": str(tempcompass)})}
    choice = items["multi-choice:10:direction:1"]
    assert (choice.question, choice.options, choice.answer) == ("What is it?", ("left to right", "right to left"), 1)  # fmt: skip
    assert (
        items["multi-choice:10_reverse:direction:1"].answer == 0 and choice.task == "multi-choice/direction"
    )
    assert items["yes_no:10:action:1"].options == ("yes", "no") and items["yes_no:10:action:1"].answer == 1
    caption, option = (items[f"caption_matching:10:action:{n}"] for n in (1, 2))
    assert caption.options == option.options == ("It falls.", "It rises.") and (caption.answer, option.answer) == (1, 0)  # fmt: skip
    assert caption.question == "Which caption fits?"
    free = items["captioning:10:action:1"]
    assert free.options == () and free.answer == "falling" and "Information A" in free.question
    of = {"benchmark": "tempcompass", "folder": str(tempcompass)}
    assert [i.task for i in load_items({**of, "task": "multi-choice/order,yes_no"})] == ["multi-choice/order", "yes_no/action"]  # fmt: skip
    assert len(load_items({**of, "task": "multi-choice", "n": 1})) == 2  # one of each aspect


BAD: list[tuple[str, str, Any, str]] = [
    ("tvbench", "json/moving_direction.json", [{"video": "c.mp4", "question": "q", "candidates": ["a"], "answer": "a"}], "row 1: no video 'c.mp4' (looked for"),
    ("tvbench", "json/moving_direction.json", {"0": 1}, "expected a list of rows"),
    ("tvbench", "json/moving_direction.json", "[", "not JSON"),
    ("mvbench", "json/episodic_reasoning.json", [{"video": "friends_1", "question": "q", "candidates": ["a"], "answer": "a", "start": 40, "end": 50}], "no frame from 40 to 50 s"),
    ("tomato", "data/count.json", {"0": {"question": "q"}}, "count:0: options must be there, a list"),
    ("tomato", "data/count.json", {"0": {"question": "q", "options": ["a"], "answer": 0, "key": "../x", "demonstration_type": "human"}}, "is not the name of a video"),
    ("tomato", "data/count.json", {"0": {"question": "q", "options": ["a"], "answer": 3, "key": "0209-03", "demonstration_type": "human"}}, "tomato count:0: answer 3 but there are 1 options"),
    ("tomato", "data/count.json", {"0": {"question": "q", "options": ["a"], "answer": 0, "key": "9", "demonstration_type": "human"}}, "1 of 2 videos are not there, the first"),
    ("tomato", "data/count.json", {"0": {"question": "q", "options": ["a"], "answer": 0, "key": "9", "demonstration_type": "robot"}}, "'robot'; known: human, object, simulated"),
    ("tempcompass", "questions/multi-choice.json", {"10": {"order": [{"question": "q", "answer": "A. x"}]}}, "no options such as 'A. left'"),
    ("tempcompass", "questions/multi-choice.json", {"10": {"order": [{"question": "q\nA. x\nB. y", "answer": "C. z"}]}}, "the answer 'C.' is none of"),
    ("tempcompass", "questions/yes_no.json", {"10": {"order": [{"question": "q", "answer": "maybe"}]}}, "the answer 'maybe' is none of"),
    ("tempcompass", "questions/yes_no.json", {"../../etc/passwd": {"order": []}}, "expected a video's id"),
    ("tempcompass", "questions/yes_no.json", {"10": {"order": "no"}}, "expected a list of questions"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "content", "words"), BAD)
def test_what_is_wrong_is_named(
    name: str, file: str, content: Any, words: str, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(name)
    (root / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as e:
        load_items({"benchmark": name, "folder": str(root)})
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"folder": "nowhere"}, "no folder"),
        ({"folder": "a\0b"}, "no folder"),
        ({"folder": "."}, "no question files"),
        ({"folder": "TVBench", "task": "moving_directio"}, "closest: moving_direction"),
        ({"folder": "TVBench", "sha256": "00"}, "the recipe was made with 00"),
        ({"folder": "TVBench", "n": 0}, "greater than or equal to 1"),
        ({"folder": "TVBench", "tasks": "x"}, "tasks: there is no such field; closest: task"),
    ],
)
def test_specs_that_name_nothing(tvbench: Path, spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        load_items({"benchmark": "tvbench", **spec}, base=tvbench.parent)
    assert words in str(e.value)


def test_an_aspect_that_is_not_there(tempcompass: Path) -> None:
    with pytest.raises(ConfigError, match="closest: yes_no/action"):
        load_items(f"tempcompass:{tempcompass}:yes_no/actoin")


def test_the_command_line_pins_the_questions(tvbench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tvbench.parent)
    spec = source_of("tvbench:TVBench:moving_direction:1")
    assert spec.folder == str(tvbench) and spec.sha256 and load_items(spec)[0].id == "moving_direction:1"
    said(tvbench / "json/moving_direction.json", [])
    with pytest.raises(ConfigError, match="the recipe was made with"):
        load_items(spec)
    for wrong, words in (
        ("tvbench:nowhere", "no such folder"),
        ("tvbench:TVBench:a:b:c", "not tvbench:FOLDER:TASKS:N"),
        ("tvbench:TVBench:dance", "no file"),
        ('{"benchmark": "tvbnch", "folder": "."}', "Input should be 'tvbench'"),
        ("tvbench:", "not tvbench:FOLDER"),
    ):
        with pytest.raises(UsageError, match=words):
            source_of(wrong)
    with pytest.raises(UsageError, match="the folder holds them; leave it out"):
        source_of("tvbench:TVBench", ".")


def test_a_recipe_over_a_benchmark_runs(tmp_path: Path) -> None:
    """From folder to numbers: one question of a TOMATO folder, on the bundled model."""
    from lab.model.zoo import load
    from probes.knockout import KnockoutRecipe

    row = {"question": "Which way does it move?", "options": ["left", "right", "up"], "answer": 1, "key": "1", "demonstration_type": "object"}  # fmt: skip
    said(tmp_path / "data/direction.json", {"0": row})
    (tmp_path / "videos/object").mkdir(parents=True)
    clips.make(tmp_path / "videos/object/1.mp4", "libx264", 12)
    recipe = KnockoutRecipe(items=BenchmarkSpec(benchmark="tomato", folder="."), pathways=("video->last",), window=3)  # fmt: skip
    found = recipe.at(tmp_path).run(progress=False, model=load("tiny", device="cpu"))[0]
    assert found.coords["item"] == ["direction:0"] and np.isfinite(found.values).all()


def test_every_benchmark_a_recipe_may_name_has_a_layout() -> None:
    from typing import get_args

    from lab.recipe import Benchmark

    assert set(get_args(Benchmark)) == set(LAYOUTS)
