"""The command line: what reaches stdout and stderr, exit codes, and the round trip trace -> recipe -> run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lab.cli import main as cli
from lab.cli.output import as_text, table
from lab.cli.rerunning import difference
from lab.cli.tracing import path_from, sentence, window_for
from lab.errors import ConfigError
from lab.result import Result
from tests import clips, families

COMMANDS = (
    "demo", "ask", "trace", "sweep", "lens", "attention", "probe", "run", "schema", "tokens", "models", "doctor", "count", "policy",
)  # fmt: skip
ASK = ["Which way?", "-o", "left", "-o", "right"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny random checkpoint with tokenizer and preprocessor, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    families.build("llava_onevision").save_pretrained(folder)
    families.tokenizer("llava_onevision").save_pretrained(folder)
    sizes = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    does = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes | does))
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    return str(clips.make(tmp_path_factory.mktemp("video") / "a.mp4", "libx264", 12))


def vlab(capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line, run in this process."""
    capsys.readouterr()
    code = cli.main(args)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick_and_loads_no_torch(command: str) -> None:
    code = (
        "import sys, time; from lab.cli.main import main; "
        "rc = main(sys.argv[1:]); heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); "
        "print(rc, sorted(heavy), time.process_time() < 1, file=sys.stderr)"
    )
    args = [*([command] if command else []), "--help"]
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == "0 [] True"
    assert "Usage: vlab" in done.stdout
    assert command in done.stdout


def test_every_command_stands_in_the_help_with_the_exit_codes(capsys) -> None:
    code, out, _ = vlab(capsys, "--help")
    assert code == 0
    assert all(f"  {c}  " in out for c in COMMANDS)
    from lab import errors

    codes = {
        c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.LabError)
    }
    assert all(f"{n}  " in out for n in codes | {130})


def test_ask_with_options(capsys, model, video) -> None:
    code, out, err = vlab(
        capsys, "ask", video, *ASK, "--answer", "B", "-m", model, "-n", "2", "--device", "cpu", "--json"
    )
    assert code == 0, err
    data = json.loads(out)
    assert data["letter"] in ("A", "B") and data["frames"] == 2
    assert sum(data["option_probs"].values()) == pytest.approx(1)
    assert data["correct"] is (data["letter"] == "B")
    code, out, _ = vlab(capsys, "ask", video, *ASK, "-m", model, "-n", "2")
    assert code == 0 and out.startswith(f"({data['letter']})")


def test_ask_without_options_writes_text(capsys, model, video) -> None:
    code, out, err = vlab(
        capsys,
        "ask",
        video,
        "What?",
        "--answer",
        "a dog",
        "-m",
        model,
        "-n",
        "2",
        "--max-tokens",
        "3",
        "--json",
    )
    assert code == 0, err
    data = json.loads(out)
    assert isinstance(data["answer"], str) and len(data["answer"]) <= 3
    assert data["target"] == "a dog" and data["logprob"] < 0


def test_trace_then_run_gives_the_same_numbers(capsys, model, video, tmp_path) -> None:
    out_folder = tmp_path / "out"
    args = [
        "-m",
        model,
        "-n",
        "2",
        "-p",
        "video->last",
        "-p",
        "cross-frame",
        "-w",
        "1",
        "--out",
        str(out_folder),
    ]
    code, out, err = vlab(capsys, "trace", video, *ASK, *args)
    assert code == 0, err
    names = ("result.npz", "flow.png", "report.html", "recipe.yaml")
    assert all((out_folder / n).stat().st_size > 100 and str(out_folder / n) in out for n in names)
    saved = Result.load(out_folder / "result.npz")
    assert saved.coords["pathway"] == ["video->last", "cross-frame"] and saved.shape == (
        1,
        2,
        families.LAYERS,
    )
    assert "Which way?" in (out_folder / "report.html").read_text()

    code, out, err = vlab(capsys, "run", str(out_folder / "recipe.yaml"), "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["max_difference"] == 0
    assert np.array_equal(np.array(data["results"][0]["values"]), saved.values)


def test_run_says_when_the_numbers_are_others(capsys, model, video, tmp_path) -> None:
    code, _, err = vlab(
        capsys, "trace", video, *ASK, "-m", model, "-n", "2", "-p", "video->last", "--out", str(tmp_path)
    )
    assert code == 0, err
    saved = Result.load(tmp_path / "result.npz")
    from dataclasses import replace

    replace(saved, values=saved.values + 0.5).save(tmp_path / "result.npz")
    code, out, _ = vlab(capsys, "run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "again"))
    assert code == 1
    assert "NOT the numbers" in out and "0.5" in out
    assert (tmp_path / "again" / "result.npz").exists()


def test_tokens_lists_every_position_and_draws(capsys, model, video, tmp_path) -> None:
    picture = tmp_path / "map.png"
    code, out, err = vlab(
        capsys, "tokens", video, *ASK, "-m", model, "-n", "2", "--json", "--out", str(picture)
    )
    assert code == 0, err
    rows = json.loads(out)["positions"]
    assert [r["position"] for r in rows] == list(range(len(rows)))
    assert sum(r["role"] == "frame" for r in rows) == 2 * 9
    assert rows[-1]["role"] == "last"
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, out, _ = vlab(capsys, "tokens", video, *ASK, "-m", model, "-n", "2")
    assert "3 x 3 patches" in out and f"{len(rows)} positions: 18 frame" in out


def test_models_lists_checkpoints_of_every_family(capsys) -> None:
    code, out, _ = vlab(capsys, "models", "--json")
    assert code == 0
    entries = json.loads(out)
    assert set(families.FAMILIES) <= {e["family"] for e in entries}
    seven = next(e for e in entries if e["id"] == "Qwen/Qwen2.5-VL-7B-Instruct")
    assert seven["weights_gb"] == pytest.approx(16.6, abs=0.1)
    # 2 (k and v) x 28 layers x 4 heads x 128 x 2 bytes
    assert seven["kv_kb_per_position"] == pytest.approx(57.344, abs=0.01)


def test_doctor_predicts_memory(capsys, model) -> None:
    code, out, err = vlab(capsys, "doctor", model, "-n", "4", "--device", "cpu", "--json")
    memory = json.loads(out)["memory"]
    weights = 4 * sum(p.numel() for p in families.build("llava_onevision").parameters())
    assert memory["weights"] == pytest.approx(weights, rel=0.01)  # and some buffers
    assert memory["total"] > memory["weights"] + memory["kv"] and memory["positions"] > 4 * 9
    code, out, err = vlab(capsys, "doctor", model, "-n", "4")
    assert f"{memory['positions']} positions" in out and "weights" in out


def test_doctor_names_a_foreign_lab(capsys, tmp_path, monkeypatch) -> None:
    code, out, _ = vlab(capsys, "doctor", "--json")
    found = {f["what"]: f for f in json.loads(out)["findings"]}
    assert found["names"]["state"] == "ok" and found["video"]["state"] == "ok"
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = vlab(capsys, "doctor")
    assert code == 1
    assert str(tmp_path / "lab") in out


WRONG = [
    (["ask", "{gone}", "q"], 5, "no video at"),
    (["ask", "{text}", "q", "-m", "{model}"], 5, "notes.txt"),
    (["ask", "{empty}", "q", "-m", "{model}"], 5, "0 bytes"),
    (["ask", "{audio}", "q", "-m", "{model}"], 5, "audio"),
    (["ask", "{video}", "q", "-m", "{gone}"], 6, "no checkpoint at"),
    (["ask", "{video}", "q", "-m", "{folder}"], 6, "config.json"),
    (["ask", "{video}", " ", "-m", "{model}"], 2, "question is empty"),
    (["ask", "{video}", "q", "-m", "{model}", "-o", "a", "-o", "a"], 2, "must differ"),
    (
        ["ask", "{video}", "q", "-m", "{model}", "-o", "a", "-o", "b", "--answer", "c"],
        2,
        "none of the 2 options",
    ),
    (["ask", "{video}", "q", "-m", "{model}", "-n", "0"], 2, "at least 1"),
    (["ask", "{video}", "q", "-m", "{model}", "-n", "2", "--fps", "1"], 2, "choose one"),
    (["ask", "{video}", "q", "-m", "{model}", "--fps", "-1"], 2, "above 0"),
    (["ask", "{video}", "q", "-m", "{model}", "--device", "abacus"], 2, "abacus"),
    (["ask", "{video}", "q", "-m", "{model}", "--dtype", "int8"], 2, "int8"),
    (["ask", "{video}", "q", "-m", "{model}", "--max-tokens", "0"], 2, "at least 1"),
    (["ask", "{video}"], 2, "QUESTION"),
    (["ask", "{video}", "q", "--frames", "many"], 2, "--frames"),
    (["ask", "{video}", "q", "--colour", "red"], 2, "--colour"),
    (["asks"], 2, "asks"),
    (["doctor", "{gone}"], 6, "/no/such/place"),
    (["doctor", "{model}", "-n", "0"], 2, "at least 1"),
    (["trace", "{video}", "q", "-m", "{model}", "-p", "sideways", "--out", "{out}"], 2, "sideways"),
    (["trace", "{video}", "q", "-m", "{model}", "-p", "video->lost", "--out", "{out}"], 2, "closest: last"),
    (["trace", "{video}", "q", "-m", "{model}", "-w", "0", "--out", "{out}"], 2, "at least 1 layer"),
    (["trace", "{video}", "q", "-m", "{model}", "--out", "{text}"], 2, "notes.txt"),
    (["tokens", "{video}", "q", "-m", "{model}", "--out", "map.bmp"], 2, ".png"),
    (["run", "{gone}"], 3, "cannot read"),
    (["run", "{text}"], 3, "mapping"),
    (["run", "{recipe}"], 3, "wat"),
    (["run", "{foreign}"], 3, "os.system"),
]


@pytest.mark.parametrize(("args", "code", "says"), WRONG, ids=[" ".join(w[0][:1] + w[0][2:]) for w in WRONG])
def test_wrong_input_is_one_line_and_an_exit_code(capsys, model, video, tmp_path, args, code, says) -> None:
    files = {
        "text": ("notes.txt", "hello"), "empty": ("empty.mp4", ""), "foreign": ("f.yaml", "kind: os.system\n"),
        "recipe": ("r.yaml", "kind: probes.knockout.KnockoutRecipe\nitems: []\nwat: 1\n"),
    }  # fmt: skip
    names = {
        "gone": "/no/such/place",
        "model": model,
        "video": video,
        "out": str(tmp_path / "out"),
        "folder": str(tmp_path),
    }
    for key, (name, text) in files.items():
        (tmp_path / name).write_text(text)
        names[key] = str(tmp_path / name)
    names["audio"] = str(clips.audio_only(tmp_path / "audio.mp4"))
    got, out, err = vlab(capsys, *(a.format(**names) for a in args))
    assert (got, out) == (code, ""), err
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vlab: ") and says in lines[0]
    assert "Traceback" not in err


def test_an_unexpected_error_is_one_line_and_debug_shows_it(capsys, monkeypatch) -> None:
    from lab.cli import catalogue

    def broken() -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(catalogue, "list_models", broken)
    code, out, err = vlab(capsys, "models")
    assert (code, out) == (1, "")
    assert err == "vlab: unexpected ZeroDivisionError: by zero; add --debug to see where it happened\n"
    with pytest.raises(ZeroDivisionError):
        cli.main(["models", "--debug"])


def test_ctrl_c_is_130(capsys, monkeypatch) -> None:
    from lab.cli import catalogue

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "list_models", interrupted)
    assert vlab(capsys, "models") == (130, "", "vlab: interrupted\n")


def test_what_libraries_print_stays_off_stdout(capsys, monkeypatch) -> None:
    from lab.cli import catalogue
    from lab.cli.output import Reply

    def noisy() -> Reply:
        print("loading ...")
        return Reply({"x": float("nan")}, "done")

    monkeypatch.setattr(catalogue, "list_models", noisy)
    code, out, err = vlab(capsys, "models", "--json")
    assert (code, json.loads(out), err) == (0, {"x": None}, "loading ...\n")


def profile(values: list[list[float]]) -> Result:
    names = [f"p{i}" for i in range(len(values))]
    coords = {"item": ["a"], "pathway": names, "layer": list(range(1, len(values[0]) + 1))}
    return Result(np.array([values]), ("item", "pathway", "layer"), coords, "% change in probability", {})


def test_the_sentence_says_what_the_profile_shows() -> None:
    said = sentence(profile([[-10, -60, 0, 0], [1, 0, 0, 0], [0, 20, 0, 0]]), 3, 4)
    assert (
        said
        == "The answer depends most on p0: cut in layers 1-3, its probability falls by 60 %; cutting p1 changes next to nothing."
    )
    assert "less than 5 %" in sentence(profile([[-1, -2], [30, 0]]), 1, 2)


def test_difference_is_the_largest_and_refuses_other_axes() -> None:
    a, b = profile([[1, 2], [3, 4]]), profile([[1, 2], [3.25, 4]])
    assert difference(a, b) == 0.25
    assert difference(profile([[1, float("nan")]]), profile([[1, 2]])) == float("inf")
    with pytest.raises(ConfigError, match="another recipe"):
        difference(a, profile([[1, 2]]))


def test_small_helpers(tmp_path, monkeypatch) -> None:
    assert [window_for(n) for n in (1, 5, 8, 12, 28, 80)] == [1, 1, 3, 5, 9, 9]
    assert table(("a", "n"), [("x", 1), ("long", 20)]) == "a      n\n----  --\nx      1\nlong  20"
    assert json.loads(as_text({"a": [1.5, float("inf")]})) == {"a": [1.5, None]}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert path_from(Path("out"), "clip.mp4") == "../clip.mp4"
    assert path_from(Path("out"), "/elsewhere/clip.mp4") == "/elsewhere/clip.mp4"
    assert path_from(Path("/somewhere"), "/somewhere/clip.mp4") == "clip.mp4"


def test_sweep_over_items_and_again(model, video, tmp_path, capsys) -> None:
    """Fast and reference agree; the ledger says what was saved; the recipe gives the numbers again."""
    items = tmp_path / "items.yaml"
    row = "- {{id: {0}, video: {1}, question: 'Which way?', options: [left, right]}}\n"
    items.write_text("".join(row.format(i, video) for i in "ab"))
    common = ["sweep", "--items", str(items), "-m", model, "-n", "4", "-w", "2", "--json"]
    code, said, error = vlab(capsys, *common, "--out", str(tmp_path / "fast"))
    assert code == 0, error
    assert json.loads(said)["ledger"]["forwards"] < json.loads(said)["ledger"]["naive"]
    code, _, _ = vlab(capsys, *common, "--executor", "reference", "--out", str(tmp_path / "slow"))
    fast, slow = (Result.load(tmp_path / n / "result.npz") for n in ("fast", "slow"))
    assert code == 0 and difference(fast, slow) < 1e-3 and np.abs(slow.values).max() > 0.01
    assert fast.coords["item"] == ["a", "b"]
    code, said, _ = vlab(capsys, "run", str(tmp_path / "fast" / "recipe.yaml"), "--json")
    assert code == 0 and json.loads(said)["max_difference"] < 1e-3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--items", "nothing.yaml"], "no such file"),
        (["--items", "{sim"], "not a simulator task"),
        (["--items", '{"sim": "moving_direction", "n": "many"}'], "not a simulator task"),
        (["--items", '{"sim": "no_such_task"}'], "no simulator"),
        (["--items", '{"sim": "moving_direction"}', "--executor", "quick"], "use fast or reference"),
        (["--items", '{"sim": "moving_direction"}', "-w", "0"], "at least 1 layer"),
        (["--items", '{"sim": "moving_direction", "n": 0}'], "n"),
    ],
)
def test_sweeps_that_cannot_be(args, message, model, tmp_path, capsys) -> None:
    code, said, error = vlab(capsys, "sweep", "-m", model, "--out", str(tmp_path / "out"), *args)
    assert code in (2, 3) and said == "" and message in error.splitlines()[-1] and "Traceback" not in error
