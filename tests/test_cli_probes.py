"""`vlab lens`, `vlab attention`, `vlab probe`: what they write, that `vlab run` gives it again, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lab.cli import main as cli
from lab.cli.probing import _layers
from lab.errors import LabWarning, PromptError, UsageError
from lab.model.preparing import _check_context
from lab.result import Result

ITEMS = '{"sim": "moving_direction", "n": 2, "seed": 4}'


def vlab(capsys: Any, *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(args)
    out = capsys.readouterr()
    return code, out.out, out.err


def test_lens_writes_and_run_gives_it_again(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "lens"
    policy = tmp_path / "cut.yaml"
    policy.write_text("format: edge-policy/1\ncuts:\n- {layers: 1-8, q: option, k: video}\n")
    common = [
        "lens",
        "--items",
        ITEMS,
        "-t",
        "last",
        "-t",
        "option",
        "--layers",
        "2,7-8",
        "--policy",
        str(policy),
    ]
    code, said, _ = vlab(capsys, *common, "--paint", "8", "-o", str(folder), "--json")
    data = json.loads(said)
    assert code == 0 and {Path(f).name for f in data["files"]} == {
        "result.npz",
        "report.html",
        "flow.png",
        "recipe.yaml",
        "words.png",
    }
    assert all(Path(f).stat().st_size > 100 for f in data["files"])
    found = Result.load(folder / "result.npz")
    assert found.axes == ("item", "word", "layer", "role") and found.coords["layer"] == [2, 7, 8]
    code, said, _ = vlab(capsys, "run", str(folder / "recipe.yaml"), "--json")
    assert code == 0 and json.loads(said)["max_difference"] == 0


def test_attention_writes_both_results(tmp_path: Path, capsys: Any) -> None:
    items = '{"sim": "moving_direction", "n": 1}'
    code, said, _ = vlab(
        capsys, "attention", "--items", items, "-p", "video->last", "--layers", "6", "-o", str(tmp_path)
    )
    assert code == 0 and "result_2.npz" in said
    assert Result.load(tmp_path / "result_2.npz").unit == "% change in probability"


def test_probe_writes_and_keeps_no_streams(tmp_path: Path, capsys: Any) -> None:
    code, said, _ = vlab(
        capsys, "probe", "--items", '{"sim": "moving_direction", "n": 6}', "--label", "direction", "-r", "option", "--layers", "5",
        "--folds", "2", "-o", str(tmp_path),
    )  # fmt: skip
    assert code == 0 and "linear probe: direction" in said
    found = Result.load(tmp_path / "result.npz")
    assert found.shape == (3, 1, 1) and np.isfinite(found.values).all()
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["lens", "--items", ITEMS, "--by", "pixel"], "by: "), (["lens", "--items", ITEMS, "-t", "vidoe"], "closest: video"),
        (["lens", "--items", ITEMS, "--paint", "9"], "layers 1..8"), (["lens", "--items", ITEMS, "--layers", "a-b"], "--layers 'a-b'"),
        (["lens", "--items", "no/such.jsonl"], "no such file"), (["attention", "--items", ITEMS, "-p", "x"], "pathway 'x'"),
        (["probe", "--items", ITEMS, "--label", "q"], "no label 'q'"), (["probe", "--items", ITEMS, "--label", "direction"], "5 folds need"),
        (["lens", "--items", ITEMS, "--policy", "nope"], "nope"),
        (["lens", "--items", ITEMS, "--policy", "."], "policy .: a folder"),
        (["probe", "--items", ITEMS, "--seed", "-1"], "seed: "),
        (["patch", "--items", ITEMS, "--by", "role", "--role", "video"], "role='video' chooses the rows of by='frame'"),
        (["patch", "--items", ITEMS, "--policy", "nope"], "no preset 'nope'"),
        (["attribute", "--items", ITEMS, "--policy", "nope"], "no preset 'nope'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(args: list[str], why: str, tmp_path: Path, capsys: Any) -> None:
    code, said, error = vlab(capsys, *args, "-o", str(tmp_path / "out"))
    assert (
        code in (2, 3)
        and said == ""
        and why in error
        and error.startswith("vlab: ")
        and error.count("vlab:") == 1
    )


def test_layers_as_people_write_them() -> None:
    assert _layers("1-3,8", 8) == (1, 2, 3, 8) and _layers(None, 8) is None
    with pytest.raises(UsageError, match="give layers such as"):
        _layers("1-", 8)
    for said in ("0", "7-9", "5-3", "1-99999999999"):
        with pytest.raises(UsageError, match="is not in 1-8"):
            _layers(said, 8)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["lens", "-o", ""], "--out is empty"),
        (["lens", "--word", "zyzzyva"], "vocabulary has no 'zyzzyva'"),
        (["patch", "-o", ""], "--out is empty"),
        (["attribute", "--at", "z"], "--at z needs a --layer"),
        (["attribute", "--layer", "9"], "--layer 9 goes with --at resid_pre"),
    ],
)
def test_wrong_words_are_one_line(
    args: list[str], said: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = vlab(capsys, *args, "--items", ITEMS)
    assert code == 2 and said in err and "Traceback" not in err
    assert not list(tmp_path.rglob("result*"))


# ---- patch and attribute --------------------------------------------------------------------------------------------


def test_patch_writes_and_run_gives_it_again(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "patch"
    how = ["--items", ITEMS, "--by", "role", "--into", "clean", "--metric", "flip", "--window", "2"]
    code, said, _ = vlab(capsys, "patch", *how, "-o", str(folder), "--json")
    data = json.loads(said)
    assert code == 0 and {Path(f).name for f in data["files"]} >= {
        "result.npz",
        "report.html",
        "flow.png",
        "recipe.yaml",
    }
    found = Result.load(folder / "result.npz")
    assert (
        found.axes == ("item", "layer", "role") and found.shape[:2] == (2, 8) and found.notes["window"] == 2
    )
    assert set(np.unique(found.values)) <= {0.0, 1.0} and not list(folder.rglob("journal*"))
    assert data["ledger"]["forwards"] < data["ledger"]["naive"]
    code, said, _ = vlab(capsys, "run", str(folder / "recipe.yaml"), "--json")
    assert code == 0 and json.loads(said)["max_difference"] == 0


def test_patch_and_attribute_under_a_policy(tmp_path: Path, capsys: Any) -> None:
    """Frames that no later position may read are worth nothing."""
    policy = tmp_path / "blind.yaml"
    policy.write_text("format: edge-policy/1\ncuts:\n- {layers: all, q: after-video+last, k: video}\n")
    items = '{"sim": "moving_direction", "n": 1, "seed": 4}'
    how = ["--items", items, "--policy", str(policy)]
    code, _, err = vlab(capsys, "patch", *how, "--metric", "probability", "-o", str(tmp_path / "patch"))
    assert code == 0, err
    found = Result.load(tmp_path / "patch" / "result.npz")
    assert np.ptp(found.values) <= 1e-6 and found.recipe["policy"]["cuts"]
    code, _, err = vlab(
        capsys,
        "attribute",
        *how,
        "--method",
        "ablation",
        "--output",
        "logprob",
        "-o",
        str(tmp_path / "worth"),
    )
    assert code == 0, err
    assert np.abs(Result.load(tmp_path / "worth" / "result.npz").values).max() <= 1e-4


BLIND = "mixture_of_depths:keep=0,layers=all,selector=uniform,gate=none"  # no video token enters any layer


@pytest.mark.parametrize("command", ["patch", "attribute", "lens", "attention", "probe", "sweep"])
def test_every_probe_with_a_mechanism_on(command: str, tmp_path: Path, capsys: Any) -> None:
    """Where no video token enters a layer, none is worth anything; and what was on stands in the recipe."""
    items = '{"sim": "moving_direction", "n": 4, "seed": 4}'
    more = {
        "patch": ("--metric", "probability"), "attribute": ("--method", "ablation", "--output", "logprob"),
        "lens": ("-t", "last"), "attention": ("--no-causal",), "probe": ("--role", "last", "--folds", "2"),
        "sweep": ("-p", "video->last", "--metric", "answer"),
    }[command]  # fmt: skip
    code, _, err = vlab(
        capsys, command, "--items", items, "--mechanism", BLIND, *more, "-o", str(tmp_path / "on")
    )
    assert code == 0, err
    found = Result.load(tmp_path / "on" / "result.npz")
    assert found.recipe["mechanisms"][0]["keep"] == 0
    if command == "patch":
        assert np.ptp(found.values, axis=(1, 2)).max() <= 1e-6
    elif command in ("attribute", "sweep"):
        assert np.abs(found.values).max() <= 1e-4
    code, _, err = vlab(
        capsys, command, "--items", items, "--mechanism", "vidkw", "-o", str(tmp_path / "wrong")
    )
    assert code == 2 and "no mechanism 'vidkw'" in err and not (tmp_path / "wrong").exists()


def test_patch_at_heads_and_against_another_video(tmp_path: Path, capsys: Any) -> None:
    items = '{"sim": "object_count", "n": 1}'
    asked = ["--by", "head", "--site", "z", "--role", "last", "--against", "blank", "--metric", "logit_diff"]
    code, said, _ = vlab(capsys, "patch", "--items", items, *asked, "-o", str(tmp_path))
    found = Result.load(tmp_path / "result.npz")
    assert code == 0 and "forward-equivalents in place of" in said
    assert (
        found.axes == ("item", "layer", "head")
        and found.notes["against"] == "blank"
        and np.isfinite(found.values).all()
    )


def test_attribute_paints_the_first_item(tmp_path: Path, capsys: Any) -> None:
    code, _, _ = vlab(capsys, "attribute", "--items", ITEMS, "-o", str(tmp_path), "--json")
    found = Result.load(tmp_path / "result.npz")
    assert code == 0 and found.axes == ("item", "frame") and found.shape == (2, 8)
    worth = found.notes["items"]
    for key, values in zip(found.coords["item"], found.values, strict=True):
        assert values.sum() == pytest.approx(worth[key]["f"] - worth[key]["f_baseline"], abs=1e-3)
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    code, said, _ = vlab(capsys, "run", str(tmp_path / "recipe.yaml"), "--json")
    assert code == 0 and json.loads(said)["max_difference"] <= 1e-6


def test_attribute_by_gradients_at_a_layer(tmp_path: Path, capsys: Any) -> None:
    items = '{"sim": "moving_direction", "n": 1}'
    how = ["--method", "ig", "--at", "resid_pre", "--layer", "3", "--output", "logprob", "--against", "blank"]
    code, _, err = vlab(capsys, "attribute", "--items", items, *how, "-o", str(tmp_path))
    found = Result.load(tmp_path / "result.npz")
    assert code == 0, err
    assert found.axes == ("item", "frame", "row", "col") and found.notes["at"] == "resid_pre, layer 3"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["patch", "--by", "patch"], "by: "), (["patch", "--site", "rezid"], "no site 'rezid'"),
        (["patch", "--into", "twin"], "patch into 'corrupted'"),
        (["patch", "--role", "vidoe"], "closest: video"),
        (["patch", "--against", "nobody"], "against='nobody'"), (["patch", "--by", "head"], "has no heads"),
        (["attribute", "--method", "magic"], "method"), (["attribute", "--players", "pixels"], "players='pixels'"),
        (["attribute", "--at", "resid_pre", "--layer", "9", "--method", "ig"], "layers 1..8"),
        (["attribute", "--against", "noise"], "noise is no baseline"),
        (["lens", "--frames", "100000"], "at least 50,000 positions, the model was made for 1,024"),
    ],
)  # fmt: skip
def test_what_cannot_be_patched_is_one_line(args: list[str], why: str, tmp_path: Path, capsys: Any) -> None:
    code, said, error = vlab(capsys, *args, "--items", ITEMS, "-o", str(tmp_path / "out"))
    lines = [
        line for line in error.splitlines() if line.startswith("vlab: ") and not line.startswith("vlab: note")
    ]
    assert code in (2, 3) and said == "" and why in error and len(lines) == 1 and "Traceback" not in error
    assert not list(tmp_path.rglob("result*"))


class _Long:
    """A prompt of 400 positions, of which 10 are text."""

    def __len__(self) -> int:
        return 400

    def where(self, **which: Any) -> range:
        return range(390)


def test_a_prompt_far_beyond_the_context_is_refused() -> None:
    def model(n_ctx: int) -> Any:
        return SimpleNamespace(cfg=SimpleNamespace(n_ctx=n_ctx))

    with pytest.raises(PromptError, match="400 positions, more than 16 times the 24"):
        _check_context(model(24), _Long())  # type: ignore[arg-type]
    with pytest.warns(LabWarning, match="answers may mean nothing"):
        _check_context(model(25), _Long())  # type: ignore[arg-type]
