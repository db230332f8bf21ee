"""Items: from files, simulators and recipes; errors name file and line."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest

from lab.carriers import VideoQA
from lab.errors import ConfigError, LabError, UsageError
from lab.items import dump_items, item_of, load_items, spec_of
from lab.recipe import ItemFile, SimSpec


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(b"first")
    (tmp_path / "clips" / "b.mp4").write_bytes(b"second")
    return tmp_path


def lines(folder: Path, *rows: str) -> Path:
    path = folder / "set.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


A = '{"video": "clips/a.mp4", "question": "Where?", "options": ["left", "right"], "answer": 1}'


def test_jsonl_yaml_and_dicts_give_the_same_items(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl = load_items(lines(folder, A, "", A))
    assert [i.id for i in jsonl] == ["set:1", "set:3"]
    assert jsonl[0].video == str(folder.resolve() / "clips" / "a.mp4") and jsonl[0].letter == "B"
    row = '{video: clips/a.mp4, question: "Where?", options: [left, right], answer: 1, id: x}'
    (folder / "set.yaml").write_text(f"- {row}\n")
    (folder / "items.yml").write_text(f"items:\n- {row}\n")
    (folder / "one.json").write_text(f'[{A[:-1]}, "id": "x"}}]')
    expected = VideoQA(jsonl[0].video, "Where?", ("left", "right"), 1, "x")
    for source in ("set.yaml", "items.yml", "one.json"):
        assert load_items(folder / source) == [expected]
        assert load_items(source, base=folder.resolve()) == [expected]
    monkeypatch.chdir(folder)
    data = {
        "video": "clips/a.mp4",
        "question": "Where?",
        "options": ["left", "right"],
        "answer": 1,
        "id": "x",
    }
    assert load_items(data) == load_items([data]) == [expected]
    assert load_items([expected]) == [expected]


@pytest.mark.parametrize(
    ("given", "index"),
    [("right", 1), ("B", 1), ("A", 0), (1, 1), (None, None)],
)
def test_an_answer_is_an_index_a_text_or_a_letter(folder: Path, given: object, index: object) -> None:
    row = {"video": "clips/a.mp4", "question": "q", "options": ["left", "right"], "answer": given}
    assert load_items(row, base=folder)[0].answer == index


def test_a_text_goes_before_a_letter(folder: Path) -> None:
    row = {"video": "clips/a.mp4", "question": "q", "options": ["B", "A"], "answer": "A"}
    assert load_items(row, base=folder)[0].answer == 1
    assert load_items({"video": "clips/a.mp4", "question": "q", "answer": "A"}, base=folder)[0].answer == "A"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: an item is a mapping"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"question": "q"}', "line 2: video is missing"),
        ('{"video": "clips/a.mp4"}', "line 2: question is missing"),
        ('{"video": "clips/c.mp4", "question": "q"}', "line 2: no video 'clips/c.mp4' (looked for "),
        ('{"video": "https://x.org/a.mp4", "question": "q"}', "is an address; the lab reads files only"),
        ('{"video": 3, "question": "q"}', "line 2: video must be the path of a file, got 3"),
        ('{"video": "a\\u0000b", "question": "q"}', "line 2: no video"),
        (f'{{"video": "{"a" * 5000}", "question": "q"}}', "line 2: no video"),
        ('{"video": "clips/a.mp4", "question": 7}', "line 2: question must be text"),
        ('{"video": "clips/a.mp4", "question": "q", "option": ["a"]}', "no field 'option'; closest: options"),
        ('{"video": "clips/a.mp4", "question": "q", "options": "ab"}', "options must be a list"),
        ('{"video": "clips/a.mp4", "question": "q", "options": [1]}', "options must be a sequence of texts"),
        ('{"video": "clips/a.mp4", "question": "q", "options": ["a", "a"]}', "options must differ"),
        ('{"video": "clips/a.mp4", "question": "q", "options": ["a", "b"], "answer": 2}', "answer 2 but there are 2"),
        ('{"video": "clips/a.mp4", "question": "q", "options": ["a", "b"], "answer": "c"}', "answer 'c' is none of the 2"),
        ('{"video": "clips/a.mp4", "question": "q", "options": ["a", "b"], "answer": true}', "answer must be an index"),
        ('{"video": "clips/a.mp4", "question": "q", "id": 3}', "id must be text, got 3"),
        ('{"video": {"path": "clips/a.mp4", "sha256": "00"}, "question": "q"}', "the recipe was made with 00..."),
        ('{"video": {"path": "clips/a.mp4", "fps": "x"}, "question": "q"}', "line 2: video.fps: Input should be a valid number"),
        ('{"video": "clips/a.mp4", "question": "q", "id": "same"}\n{"video": "clips/a.mp4", "question": "q", "id": "same"}', "'same' stands twice"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(folder: Path, row: str, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        load_items(lines(folder, A, row))
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("none.jsonl", ConfigError),
        ("clips/a.mp4", ConfigError),
        (3, UsageError),
        ([], ConfigError),
        ({}, ConfigError),
    ],
)
def test_sources_that_are_none(folder: Path, source: object, error: type[LabError]) -> None:
    with pytest.raises(error):
        load_items(source, base=folder)


def test_an_empty_file_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="holds no items"):
        load_items(lines(folder, "", ""))


def test_items_go_out_and_come_back(folder: Path) -> None:
    items = [
        VideoQA(folder / "clips" / "a.mp4", "Where?", ("no", "12:30"), 0, "a", "task"),
        VideoQA(folder / "clips" / "b.mp4", "Was war los? \u00e9", answer="nichts", id="b"),
    ]
    for name in ("out.jsonl", "out.yaml"):
        path = dump_items(items, folder / name)
        assert "clips/a.mp4" in path.read_text() and str(folder) not in path.read_text()
        assert load_items(path.resolve()) == [
            VideoQA(str(path.resolve().parent / "clips" / v), i.question, i.options, i.answer, i.id, i.task)
            for v, i in zip(("a.mp4", "b.mp4"), items, strict=True)
        ]
    with pytest.raises(UsageError, match="end its name"):
        dump_items(items, folder / "out.txt")
    with pytest.raises(UsageError, match="is a ndarray, not a file"):
        dump_items([VideoQA(np.zeros((1, 8, 8, 3), np.uint8), "q")], folder / "out.yaml")


def test_a_recipe_remembers_which_video_it_was(folder: Path) -> None:
    item = VideoQA(str(folder / "clips" / "a.mp4"), "q", ("a", "b"), 1, "x", "t")
    spec = spec_of(item, n_frames=4)
    assert item_of(spec) == item and spec.video.sampling() == {"n_frames": 4}
    assert load_items([spec]) == load_items([spec.model_dump(mode="json")]) == [item]
    (folder / "clips" / "a.mp4").write_bytes(b"changed")
    for load in (item_of, lambda s: load_items([s])):
        with pytest.raises(ConfigError, match=r"has sha256 .*the recipe was made with"):
            load(spec)


def test_an_item_file_of_a_recipe_is_checked(folder: Path) -> None:
    lines(folder, A)
    assert len(load_items(ItemFile(file="set.jsonl"), base=folder)) == 1
    with pytest.raises(ConfigError, match="has sha256"):
        load_items(ItemFile(file="set.jsonl", sha256="00"), base=folder)


def test_a_simulator_is_found_by_its_first_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def items(n: int, seed: int) -> list[VideoQA]:
        return [VideoQA(np.full((1, 2, 2, 3), seed, np.uint8), f"q{i}") for i in range(n)]

    module = types.ModuleType("lab.sim.blinking")
    module.items = items  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lab.sim.blinking", module)
    for spec in ({"sim": "blinking_light", "n": 3, "seed": 5}, SimSpec(sim="blinking", n=3, seed=5)):
        made = load_items(spec)
        assert [i.question for i in made] == ["q0", "q1", "q2"] and made[0].video[0, 0, 0, 0] == 5
        assert len({i.id for i in made}) == 3


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"sim": "movin"}, "no simulator 'movin'"),
        ({"sim": "../x"}, "no simulator '../x'"),
        ({"sim": "os.path"}, "no simulator 'os.path'"),
        ({"sim": ""}, "no simulator ''"),
        ({"sim": "moving", "n": "8"}, "n: Input should be a valid integer"),
        ({"sim": "moving", "n": 0}, "n: Input should be greater than or equal to 1"),
        ({"sim": "moving", "sed": 1}, "sed: there is no such field; closest: seed"),
    ],
)
def test_simulator_specs_are_checked(spec: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        load_items(spec)
    assert said in str(e.value)
