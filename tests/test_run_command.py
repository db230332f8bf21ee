"""`vlab run`: other values, dry runs, results used again or not, interrupted runs, and recipes that come back the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lab.recipe as recipes
from lab.cli import keeping
from lab.cli import main as cli
from lab.cli.rerunning import Changes
from lab.edges import sweeping
from lab.model.zoo import DATA
from lab.overriding import changed, setting
from lab.recipe import ItemFile, SimSpec, dump, from_plain, load, loads
from lab.result import Result
from probes.knockout import KnockoutRecipe
from tests import clips, families

WAY = ("video->last",)


def vlab(capsys: Any, *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(args)
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return code, out.out, out.err


def answered(capsys: Any, *args: str) -> dict[str, Any]:
    """The JSON a command prints; it must succeed."""
    code, out, err = vlab(capsys, *args, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(here: Path) -> Path:
    dump(
        KnockoutRecipe(items=SimSpec(sim="moving_direction", n=2), n_frames=4, pathways=WAY, window=3),
        "r.yaml",
    )
    return Path("r.yaml")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every sweep that is really run."""
    done: list[int] = []
    from probes import knockout

    run = knockout.run_sweep
    monkeypatch.setattr(knockout, "run_sweep", lambda *a, **k: (done.append(1), run(*a, **k))[1])
    return done


# ---- other values ---------------------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_recipe_and_writes_nothing(capsys: Any, recipe: Path) -> None:
    code, out, _ = vlab(capsys, "run", str(recipe), "--set", "items.n=1", "--set", "pathways.0=video->question", "--device", "cpu", "--dry-run")  # fmt: skip
    shown = loads(out)
    assert code == 0 and shown.id in out and shown.items.n == 1 and shown.model.device == "cpu"  # type: ignore[attr-defined]
    assert shown == load(recipe).override({"items.n": 1, "pathways": ["video->question"], "model.device": "cpu"})  # fmt: skip
    assert list(recipe.parent.iterdir()) == [recipe]
    data = answered(capsys, "run", str(recipe), "--dry-run")
    assert data["recipe"] == load(recipe).id and from_plain(data["fields"]) == load(recipe) and not data["reused"]  # fmt: skip


def test_short_ways_go_over_set(recipe: Path) -> None:
    given = Changes(
        ("model.name=other", "items.n=3"), model="tiny", items="sim:object_count:1:5", device="cpu"
    )
    made = given.applied(load(recipe))
    assert made == load(recipe).override(
        {"model": "tiny", "items": {"sim": "object_count", "n": 1, "seed": 5}, "model.device": "cpu"}
    )
    assert Changes().applied(load(recipe)) == load(recipe)


def test_another_model_drops_the_old_ones_hashes(recipe: Path) -> None:
    pinned = load(recipe).override({"model": {"name": "tiny", "weights": "abc", "dtype": "bfloat16", "revision": "v1"}})  # fmt: skip
    for key in ("model", "model.name"):
        model = pinned.override({key: "tiny-image"}).model  # type: ignore[attr-defined]
        assert (model.name, model.weights, model.revision, model.dtype) == (
            "tiny-image",
            None,
            None,
            "bfloat16",
        )
    again = pinned.override({"model": "tiny-image", "model.weights": "def"})
    assert again.model.weights == "def"  # type: ignore[attr-defined]
    filed = pinned.override({"items": ItemFile(file="a.jsonl", sha256="00")})
    assert filed.override({"items.file": "b.jsonl"}).items.sha256 is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=3", 3), ("a=0.5", 0.5), ("a=true", True), ("a=null", None), ("a=", None), ("a=x->y", "x->y"), ("a=[1, b]", [1, "b"]),
     ("a={b: 1}", {"b": 1}), ("a='3'", "3"), ("a=b=c", "b=c"), ("a=sim:x:2", "sim:x:2")],
)  # fmt: skip
def test_a_setting_is_read_as_yaml(text: str, value: Any) -> None:
    assert setting(text) == ("a", value)


def test_settings_leave_the_data_alone() -> None:
    data = {"a": [{"b": 1}], "c": None}
    assert changed(data, {"a.0.b": 2, "c.d": 3, "e": {"f": 4}}) == {
        "a": [{"b": 2}],
        "c": {"d": 3},
        "e": {"f": 4},
    }
    assert data == {"a": [{"b": 1}], "c": None}


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--set", "windo=3"], 3, "windo: there is no such field; closest: window"),
        (["--set", "modle.name=x"], 3, "modle: there is no such field; closest: model"),
        (["--set", "window=x"], 3, "window: Input should be a valid integer (got 'x')"),
        (["--set", "window"], 2, "write key=value"), (["--set", "=3"], 2, "write key=value"),
        (["--set", "pathways.7=x"], 2, "'7' is no place in a list of 1; use 0..0"),
        (["--set", "pathways.-1=x"], 2, "no place in a list"), (["--set", "window.x=1"], 2, "window is 3; it has no parts"),
        (["--set", "a..b=1"], 2, "is not a key"), (["--set", "x" + ".x" * 40 + "=1"], 2, "is not a key"),
        (["--set", "window=!!python/object:os.system"], 3, "the tag"), (["--set", "window=[*a]"], 3, "anchors and aliases"),
        (["--set", "kind=probes.lens.LensRecipe"], 3, "there is no such field"), (["--set", "schema_version=2"], 3, "reads up to 1"),
        (["--set", "window=" + "9" * 5000], 3, "not readable as YAML"), (["--set", "items.n=0"], 3, "greater than or equal to 1"),
        (["--model", "no/such/folder"], 6, "no checkpoint at"), (["--items", "none.jsonl"], 2, "no such file"),
        (["--items", "sim:movng_direction"], 2, "closest: moving"), (["--device", "toaster"], 2, "toaster"), (["--out", ""], 2, "--out is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(capsys: Any, recipe: Path, args: list[str], code: int, said: str) -> None:
    got, out, err = vlab(capsys, "run", str(recipe), *args)
    assert (got, out) == (code, "") and said in err and err.startswith("vlab: ")


def test_another_model_and_other_items_without_an_edit(
    capsys: Any, recipe: Path, tmp_path_factory: Any
) -> None:
    """A random Qwen2.5-VL folder in place of the bundled model, with nothing else said."""
    folder = tmp_path_factory.mktemp("qwen")
    families.build("qwen2_5_vl").save_pretrained(folder)
    families.tokenizer("qwen2_5_vl").save_pretrained(folder)
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64, "max_pixels": 1024,
             "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    found = answered(capsys, "run", str(recipe), "--set", f"model={folder}", "--set", "items=sim:moving_direction:1:3")  # fmt: skip
    saved = Result.load(Path("out") / found["recipe"] / "result.npz")
    assert saved.shape == (1, 1, families.LAYERS) and saved.recipe["model"]["name"] == str(folder)


# ---- results used again ---------------------------------------------------------------------------------------------


def test_results_are_used_again_while_nothing_changes(capsys: Any, recipe: Path, runs: list[int]) -> None:
    first = answered(capsys, "run", str(recipe))
    folder = Path("out") / load(recipe).id
    assert first["recipe"] == folder.name and {Path(f).name for f in first["files"]} == {"result.npz", "flow.png", "report.html", "recipe.yaml"}  # fmt: skip
    second = answered(capsys, "run", str(recipe))
    assert (first["reused"], second["reused"], len(runs)) == (False, True, 1)
    assert second["results"] == first["results"] and second["files"] == first["files"]
    assert answered(capsys, "run", str(recipe), "--dry-run")["reused"]
    third = answered(capsys, "run", str(recipe), "--fresh")
    assert len(runs) == 2 and third["results"] == first["results"]
    (folder / "flow.png").write_bytes(b"other")
    code, out, _ = vlab(capsys, "run", str(recipe))
    assert code == 0 and "computed anew: flow.png is not as it was written" in out and len(runs) == 3


def test_the_recipe_comes_back_the_same(capsys: Any, recipe: Path) -> None:
    """Recipe -> run -> what it leaves -> recipe: one id, in files, results and run.json; and the same numbers."""
    answered(capsys, "run", str(recipe), "--out", "kept")
    asked, said = load(recipe), json.loads(Path("kept/run.json").read_text())
    assert load("kept/recipe.yaml").id == from_plain(Result.load("kept/result.npz").recipe).id == said["recipe"] == asked.id  # fmt: skip
    assert said["with"]["model tiny"] and said["with"]["code"] == keeping.code_hash() and said["seconds"] > 0
    data = answered(capsys, "run", "kept/recipe.yaml")
    assert data["max_difference"] == 0 and not Path("out").exists()


def test_a_folder_holds_one_recipe(capsys: Any, recipe: Path) -> None:
    answered(capsys, "run", str(recipe), "--out", "kept")
    code, out, err = vlab(capsys, "run", str(recipe), "--set", "window=1", "--out", "kept")
    other = load(recipe).override({"window": 1}).id
    assert (code, out) == (2, "") and load(recipe).id in err and other in err
    assert load("kept/recipe.yaml") == load(recipe)


def test_other_weights_under_the_same_name_are_noticed(capsys: Any, recipe: Path, runs: list[int]) -> None:
    shutil.copytree(DATA / "tiny", "mine")
    args = ["run", str(recipe), "--model", "./mine"]
    answered(capsys, *args)
    weights = next(Path("mine").glob("*.safetensors"))
    weights.write_bytes(
        weights.read_bytes() + b" "
    )  # safetensors minds trailing bytes; the hash is looked at first
    assert not answered(capsys, *args, "--dry-run")["reused"] and len(runs) == 1
    assert "model ./mine was" in vlab(capsys, *args, "--dry-run")[1]


def test_other_items_under_the_same_name_are_noticed(capsys: Any, here: Path) -> None:
    """And relative paths hold from wherever the recipe is written to."""
    clips.make(here / "a.mp4", "libx264", 12)
    row = {"video": "a.mp4", "question": "Which way?", "options": ["left", "right"], "answer": 1}
    (here / "items.jsonl").write_text(json.dumps(row) + "\n")
    dump(
        KnockoutRecipe(items=ItemFile(file="items.jsonl"), n_frames=4, pathways=WAY, window=3),
        here / "r.yaml",
    )
    answered(capsys, "run", "r.yaml", "--out", "deep/er")
    text = Path("deep/er/recipe.yaml").read_text()
    assert "base: ../.." in text and load("deep/er/recipe.yaml") == load("r.yaml")
    assert answered(capsys, "run", "deep/er/recipe.yaml")["max_difference"] == 0
    (here / "items.jsonl").write_text(json.dumps({**row, "question": "Where to?"}) + "\n")
    assert "items items.jsonl was" in vlab(capsys, "run", "r.yaml", "--out", "deep/er", "--dry-run")[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "run.json is damaged"), ("[]", "run.json is damaged"), ('{"format": "x"}', "run.json is damaged"),
     ("[" * 100_000, "run.json is damaged"), ("\xff", "run.json")],
)  # fmt: skip
def test_a_damaged_note_is_named(capsys: Any, recipe: Path, text: str, said: str) -> None:
    Path("kept").mkdir()
    Path("kept/run.json").write_bytes(text.encode("latin-1"))
    code, out, err = vlab(capsys, "run", str(recipe), "--out", "kept")
    assert (code, out) == (3, "") and said in err


def test_a_note_cannot_name_files_outside_its_folder(capsys: Any, recipe: Path) -> None:
    answered(capsys, "run", str(recipe), "--out", "kept")
    said = json.loads(Path("kept/run.json").read_text())
    Path("outside.npz").write_bytes(b"x")
    digest = recipes.sha256_of("outside.npz")
    Path("kept/run.json").write_text(json.dumps({**said, "files": {"../outside.npz": digest}, "results": ["../outside.npz"]}))  # fmt: skip
    assert "../outside.npz is gone" in vlab(capsys, "run", str(recipe), "--out", "kept", "--dry-run")[1]


def test_an_interrupted_run_goes_on(capsys: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its second pathway, without --out: the same command measures only what is missing."""
    measure, cuts = sweeping.run_dense, []

    def once(model: Any, ready: Any, cut: Any) -> Any:
        cuts.extend([1] * bool(cut))
        if len(cuts) == 12:
            raise KeyboardInterrupt
        return measure(model, ready, cut)

    monkeypatch.setattr(sweeping, "run_dense", once)
    args = ["run", str(recipe), "--set", "pathways=[video->last, last->last]", "--set", "items.n=1"]
    assert vlab(capsys, *args)[0] == 130
    folder = next(Path("out").iterdir())
    assert (folder / f"journal-{folder.name}" / "journal.jsonl").exists() and not (
        folder / "run.json"
    ).exists()
    cuts.clear()
    cuts.extend([1] * 100)
    answered(capsys, *args)
    assert len(cuts) - 100 == 8  # the second pathway alone: one run for each of 8 layers
    assert not list(folder.glob("journal-*")) and (folder / "run.json").exists()


def test_results_beside_are_compared_unless_the_recipe_was_changed(capsys: Any, recipe: Path) -> None:
    answered(capsys, "run", str(recipe), "--out", "kept")
    saved = Result.load("kept/result.npz")
    replace(saved, values=saved.values + 0.5).save("kept/result.npz")
    code, out, _ = vlab(capsys, "run", "kept/recipe.yaml")
    assert code == 1 and "NOT the numbers" in out
    data = answered(capsys, "run", "kept/recipe.yaml", "--set", "window=1")
    assert data["max_difference"] is None and Path(data["files"][0]).parent == Path("out") / data["recipe"]


# ---- commands that have no test of their own ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["patch", "--by", "role", "--metric", "logit_diff"],
        ["attribute", "--method", "ablation", "--players", "frames"],
        ["eval", "frame-local/2", "-b", "none"],
    ],
    ids=lambda a: a[0],
)
def test_a_command_leaves_a_recipe_that_repeats_it(capsys: Any, here: Path, args: list[str]) -> None:
    made = answered(capsys, *args, "--items", "sim:moving_direction:2:4", "-n", "4", "-o", "made")
    assert all(Path(f).stat().st_size > 100 for f in made["files"]) and Path("made/run.json").exists()
    again = answered(capsys, "run", "made/recipe.yaml", "--out", "again")
    assert again["recipe"] == made["recipe"]
    name = "evaluation.npz" if args[0] == "eval" else "result.npz"
    first, second = Result.load(Path("made") / name), Result.load("again/result.npz")
    assert np.array_equal(first.values, second.values, equal_nan=True) and first.recipe == second.recipe
    assert Path("again/policy.yaml").exists() == (args[0] == "eval")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["patch", "--into", "sideways"], "sideways"), (["patch", "--by", "colour"], "by"), (["patch", "--window", "0"], "window"),
        (["patch", "--items", "nothing.jsonl"], "no such file"), (["attribute", "--at", "z"], "needs a --layer"),
        (["attribute", "--layer", "3"], "goes with --at"), (["attribute", "--method", "guess"], "method"),
        (["eval", "frame-local/2", "--items", "tvbench:nowhere"], "no such folder"),
    ],
)  # fmt: skip
def test_probes_that_cannot_be(capsys: Any, here: Path, args: list[str], said: str) -> None:
    items = [] if "--items" in args else ["--items", "sim:moving_direction:1"]
    code, out, err = vlab(capsys, *args, *items)
    assert code == 2 and out == "" and said in err.splitlines()[-1]
