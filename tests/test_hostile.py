"""Hostile input through the real command line: input, exit code, first line of the message; never a traceback.

A case is a command line with {names}; a name is made in a scratch folder when a case asks for it (see `THINGS`).
Below: the same errors at the API, odd input that must work, and runs that are killed or interrupted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import string
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lab.carriers import VideoQA
from lab.cli import main as cli
from lab.edges.scoring import scalars, scores
from lab.edges.searching import search
from lab.errors import LabError, PromptError, UsageError, VideoError
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.mechanisms.mixture_of_depths import MixtureOfDepths
from lab.model.zoo import load
from lab.recipe import dump
from lab.recipe import load as load_recipe
from lab.result import Result
from probes.knockout import knockout
from tests import clips, families

CODES = {int(line.split()[0]) for line in re.findall(r"\d+  \w+", cli.EPILOG)}
KNOCKOUT = "kind: probes.knockout.KnockoutRecipe\n"


# ---- things that cases name -----------------------------------------------------------------------------------------


def _model(path: Path) -> None:
    families.build("llava_onevision").save_pretrained(path)
    families.tokenizer("llava_onevision").save_pretrained(path)
    sizes = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(sizes))


def _clip(path: Path, n: int = 12) -> Path:
    return clips.make(path, "libx264", n, options=clips.X264, container={"movflags": "faststart"})


def _without_pictures(path: Path) -> None:
    """The header of a clip, and nothing of what it announces."""
    data = _clip(path).read_bytes()
    path.write_bytes(data[: clips.boxes(data)[b"mdat"][0] + 8])


def _lying(path: Path, box: bytes, at: int, value: int) -> None:
    """A clip whose tables claim `value` frames."""
    data = bytearray(_clip(path).read_bytes())
    start = data.index(box) + at
    data[start : start + 4] = struct.pack(">I", value)
    path.write_bytes(bytes(data))


def _png(path: Path, side: int) -> None:
    """A picture that claims side x side pixels and holds next to none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head, body = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), zlib.compress(b"\0" * 1000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def _nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[next(k for k in weights if "image_newline" in k)].view(-1)[0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _half(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def _foreign_weights(folder: Path) -> None:
    text = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = (folder / "config.json").read_text()
    families.build("llava_onevision", text_config=text).save_pretrained(folder)
    (folder / "config.json").write_text(config)


THINGS = {
    "model": _model, "video": _clip, "folder": Path.mkdir,
    "words": lambda p: (p.mkdir(), (p / "notes.txt").write_text("x")),
    "empty": Path.touch, "text": lambda p: p.write_text("hello " * 50), "playlist": lambda p: p.write_text("#EXTM3U\nhttp://a.b/c.ts\n"),
    "no_index": lambda p: clips.without_index(clips.make(p, "libx264", 12)), "no_pictures": _without_pictures,
    "noise": lambda p: clips.damage(clips.make(p, "libx264", 40), 0, 1), "audio": clips.audio_only, "no_frames": clips.no_frames,
    "many_frames": lambda p: _lying(p, b"stsz", 12, 10**9), "long_frames": lambda p: _lying(p, b"stts", 8, 10**9),
    "half_png": lambda p: _png(p, 100), "bomb_png": lambda p: _png(p, 40_000),
    "two_sizes": lambda p: (p.mkdir(), [_saved_picture(p / f"{i}.png", 8 + i) for i in range(2)]),
    "fifo": os.mkfifo, "nan_npy": lambda p: np.save(p, np.full((2, 8, 8, 3), np.nan, np.float32)),
    "bad_json": lambda p: _damaged(p, lambda f: (f / "config.json").write_text("{not json")),
    "gpt2": lambda p: _damaged(p, lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}')),
    "remote": lambda p: _damaged(p, lambda f: (f / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}')),
    "nan": lambda p: _damaged(p, _nan), "half": lambda p: _damaged(p, _half), "pickle": lambda p: _damaged(p, _pickle),
    "other": lambda p: _damaged(p, _foreign_weights),
    "bad_tokenizer": lambda p: _damaged(p, lambda f: (f / "tokenizer.json").write_text("{")),
    "bad_size": lambda p: _damaged(p, lambda f: (f / "preprocessor_config.json").write_text('{"size": {"height": -3, "width": 24}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')),
    "nested": lambda p: _damaged(p, lambda f: (f / "preprocessor_config.json").write_text("[" * 10**5)),
    "huge_size": lambda p: _damaged(p, lambda f: (f / "preprocessor_config.json").write_text('{"size": {"height": 1000000, "width": 1000000}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')),
}  # fmt: skip
SUFFIXES = {"half_png": ".png", "bomb_png": ".png", "nan_npy": ".npy", "fifo": ".mp4"}
FOLDERS = {"model", "folder", "words", "two_sizes", "bad_json", "gpt2", "remote", "nan", "half", "pickle", "other", "bad_tokenizer", "bad_size", "huge_size", "nested"}  # fmt: skip


def _saved_picture(path: Path, side: int) -> None:
    from PIL import Image

    Image.new("RGB", (side, side)).save(path)


def _damaged(path: Path, harm) -> None:
    harm(shutil.copytree(path.parent / "model", path))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """name -> path of a thing, made once."""
    root = tmp_path_factory.mktemp("hostile")
    _model(root / "model")

    def path(name: str) -> str:
        file = root / (name if name in FOLDERS else name + SUFFIXES.get(name, ".mp4"))
        if not file.exists():
            THINGS[name](file)
        return str(file)

    return path


def vlab(capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line, run in this process."""
    capsys.readouterr()
    code = cli.main(args)
    out = capsys.readouterr()
    return code, out.out, out.err


def filled(args, scratch, **more) -> list[str]:
    names = {field for a in args for _, field, _, _ in string.Formatter().parse(a) if field}
    made = {n: more[n] if n in more else scratch(n) for n in names}
    return [a.format(**made) for a in args]


def check(code: int, out: str, err: str, expected: int, says: str) -> None:
    """One line about what is wrong, from us, with a documented exit code, and nothing on stdout."""
    assert "Traceback" not in err, err
    assert code == expected and code in CODES, (code, err)
    lines = [line for line in err.splitlines() if not line.startswith("vlab: note: ")]
    assert len(lines) == 1 and lines[0].startswith("vlab: "), err
    assert re.search(says, lines[0]), f"{lines[0]!r} does not match {says!r}"
    assert lines[0].isprintable() and "unexpected" not in lines[0] and len(lines[0]) < 700
    assert out == ""


# ---- the list -------------------------------------------------------------------------------------------------------

Q = ("q", "-m", "{model}", "-n", "2", "--device", "cpu")


def ask(video: str, *more: str) -> tuple[str, ...]:
    return ("ask", video, *Q, *more)


def asked(question: str, *more: str) -> tuple[str, ...]:
    return ("ask", "{video}", question, *Q[1:], *more)


def model(name: str) -> tuple[str, ...]:
    return ("ask", "{video}", "q", "-m", name, "-n", "2", "--device", "cpu")


def trace(*more: str) -> tuple[str, ...]:
    return ("trace", "{video}", *Q, "-o", "a", "-o", "b", "--out", "{out}", *more)


OPTIONS = [w for i in range(27) for w in ("-o", f"x{i}")]
CASES = {
    # videos
    "no file": (ask("/no/such.mp4"), 5, "no video at /no/such.mp4; give a file"),
    "empty path": (ask(""), 5, "no video at an empty path"),
    "long path": (ask("x" * 5000), 5, "no video at xxx"),
    "zero byte in path": (ask("a\0b"), 5, r"no video at a\\x00b"),
    "escape in path": (ask("a\x1b[2Jb"), 5, r"no video at a\\x1b\[2Jb"),
    "address": (ask("http://example.com/a.mp4"), 5, "nothing is read over the network"),
    "file address": (ask("file:///etc/passwd"), 5, "nothing is read over the network"),
    "folder without images": (ask("{words}"), 5, r"a folder without images \(found notes.txt\)"),
    "two sizes": (ask("{two_sizes}"), 5, "image 1 is 9 x 9, image 0 is 8 x 8"),
    "empty file": (ask("{empty}"), 5, r"the file is empty \(0 bytes\)"),
    "text named mp4": (ask("{text}"), 5, "cannot be read as a video"),
    "playlist": (ask("{playlist}"), 5, "cannot be read as a video"),
    "mp4 without index": (ask("{no_index}"), 5, "without its index"),
    "mp4 without pictures": (ask("{no_pictures}"), 5, "no frame in it can be decoded"),
    "noise": (ask("{noise}"), 5, "no frame in it can be decoded"),
    "audio only": (ask("{audio}"), 5, "no pictures in it, only audio"),
    "zero frames": (ask("{no_frames}"), 5, "no frame in it can be decoded"),
    "claims 10^9 frames": (ask("{many_frames}"), 5, "cannot be read as a video"),
    "claims a frame of 10^9 ticks": (ask("{long_frames}"), 5, "cannot be read as a video"),
    "png cut short": (ask("{half_png}"), 5, "the image is damaged"),
    "png of 1.6 gigapixels": (ask("{bomb_png}"), 5, "cannot be read as an image .DecompressionBomb"),
    "fifo": (ask("{fifo}"), 5, "not a regular file"),
    "device": (ask("/dev/zero"), 5, "not a regular file"),
    "npy of nan": (ask("{nan_npy}"), 5, "cannot be read as a video"),
    # prompts
    "no question": (asked(""), 2, "the question is empty"),
    "white question": (asked(" \n\t"), 2, "the question is empty"),
    "100k characters": (asked("x" * 100_000), 7, r"the text has 100,0\d\d tokens, the model was made for 4,096"),
    "spells the placeholder": (asked("what is in <video> ?"), 7, "spells the model's video placeholder '<video>'"),
    "option spells it": (asked("q", "-o", "<video>", "-o", "b"), 7, "spells the model's video placeholder"),
    "equal options": (asked("q", "-o", "a", "-o", "a"), 2, "options must differ"),
    "27 options": (asked("q", *OPTIONS), 2, "27 options but only 26 letters"),
    "empty option": (asked("q", "-o", "a", "-o", ""), 2, "an option is empty"),
    "answer is no option": (asked("q", "-o", "a", "-o", "b", "--answer", "z"), 2, "--answer 'z' is none of the 2 options"),
    "empty target": (asked("q", "--answer", ""), 2, "the target '' has no tokens"),
    "long target": (asked("q", "--max-tokens", "1", "--answer", "x" * 9000), 2, "the target has 9,000 tokens"),
    "json, and an error": (asked("q", "-o", "a", "-o", "b", "--answer", "z", "--json"), 2, "--answer 'z'"),
    "question of other bytes": (asked("caf\udce9?"), 2, r"is not valid text \(character 3\)"),
    "option of other bytes": (asked("q", "-o", "\udcff"), 2, "is not valid text"),
    # frames
    "0 frames": (asked("q", "-n", "0"), 2, "--frames 0: at least 1"),
    "-1 frames": (asked("q", "-n", "-1"), 2, "--frames -1: at least 1"),
    "10^9 frames": (asked("q", "-n", "1000000000"), 2, r"n_frames=1,000,000,000 makes at least [\d,]+ positions, the model was made for 4,096; take fewer frames"),
    "half a frame": (asked("q", "-n", "0.5"), 2, "--frames"),
    "fps nan": (("ask", "{video}", "q", "-m", "{model}", "--fps", "nan"), 2, "fps nan"),
    "fps 0": (("ask", "{video}", "q", "-m", "{model}", "--fps", "0"), 2, "fps 0"),
    "fps -1": (("ask", "{video}", "q", "-m", "{model}", "--fps", "-1"), 2, "fps -1"),
    "fps inf": (("ask", "{video}", "q", "-m", "{model}", "--fps", "inf"), 2, "fps.*inf"),
    "fps 1e12": (("ask", "{video}", "q", "-m", "{model}", "--fps", "1e12"), 4, "bytes, a quarter of the free memory"),
    "fps 1e300": (("ask", "{video}", "q", "-m", "{model}", "--fps", "1e300"), 4, r"10\^300 frames of 64 x 48 need"),
    "frames and fps": (asked("q", "--fps", "2"), 2, "--frames 2 and --fps 2 are given; choose one"),
    "0 new tokens": (asked("q", "--max-tokens", "0"), 2, "--max-tokens 0: at least 1"),
    # models
    "no folder": (model("/no/such/model"), 6, "no checkpoint at '/no/such/model'"),
    "no name": (model(""), 6, "no checkpoint at ''"),
    "long name": (model("y" * 5000), 6, "no checkpoint at 'yyy"),
    "hub id, offline": (model("nobody/no-such-model"), 6, "nobody/no-such-model: transformers cannot load it"),
    "no config": (model("{folder}"), 6, "has no config.json"),
    "config is no json": (model("{bad_json}"), 6, "is not a valid JSON file"),
    "text model": (model("{gpt2}"), 6, "Unrecognized configuration class"),
    "remote code": (model("{remote}"), 6, "transformers cannot load it"),
    "nan weights": (model("{nan}"), 6, r"1 weights hold nan or infinite values \(first: model.image_newline\)"),
    "half the weights": (model("{half}"), 6, "cannot load it: Error while deserializing header"),
    "pickle only": (model("{pickle}"), 6, "no file named model.safetensors"),
    "weights of another config": (model("{other}"), 6, r"\d+ of the wrong shape .* belongs to another config"),
    "broken tokenizer": (model("{bad_tokenizer}"), 6, "its tokenizer cannot be loaded"),
    "negative size": (model("{bad_size}"), 3, "size must be positive whole numbers"),
    "size of 10^12 pixels": (model("{huge_size}"), 3, "at most 16,384 pixels a side"),
    "nested preprocessor json": (model("{nested}"), 3, "cannot be read as json"),
    # devices
    "no such device": (asked("q", "--device", "gpu"), 2, "device 'gpu' cannot be used here"),
    "a GPU that is not there": (asked("q", "--device", "cuda:99"), 2, "device 'cuda:99' cannot be used here"),
    "a device without numbers": (asked("q", "--device", "meta"), 2, "device 'meta' cannot be used here"),
    "int8": (asked("q", "--dtype", "int8"), 2, "dtype 'int8' is not one of float32"),
    # pathways, window, out
    "unknown role": (trace("-p", "vidoe->last"), 2, "no role 'vidoe'; closest: video"),
    "no arrow": (trace("-p", "video"), 2, "pathway 'video' is not 'keys->queries'"),
    "no queries": (trace("-p", "video->"), 2, "no role ''"),
    "two arrows": (trace("-p", "a->b->c"), 2, "no role"),
    "no such frame": (trace("-p", "frame:9->last"), 2, "this prompt has no token of 'frame:9'"),
    "frame 10^40": (trace("-p", f"frame:{10**40}->last"), 2, "only frame:N"),
    "truth unknown": (trace("-p", "true-option->last"), 2, "segment 'true-option' needs an item"),
    "one frame has no other": (trace("-n", "1", "-p", "cross-frame"), 2, "cross-frame needs at least 2 frames"),
    "window 0": (trace("-w", "0"), 2, "--window 0: at least 1"),
    "window -3": (trace("-w", "-3"), 2, "--window -3: at least 1"),
    "out is a file": (trace("--out", "{video}"), 2, "cannot be made: File exists"),
    "out below a file": (trace("--out", "{video}/x"), 2, "cannot be made: Not a directory"),
    "out cannot be made": (trace("--out", "/proc/no"), 2, "--out /proc/no: cannot be made"),
    "out is empty": (trace("--out", ""), 2, "--out is empty"),
    "demo into a file": (("demo", "--out", "{video}"), 2, "cannot be made: File exists"),
    # tokens, doctor, words
    "tokens to bmp": (("tokens", "{video}", *Q[:-2], "--out", "map.bmp"), 2, "end the name in .png"),
    "tokens below a file": (("tokens", "{video}", *Q[:-2], "--out", "{video}/x.png"), 2, "cannot write"),
    "doctor, no model": (("doctor", "/no/such"), 6, "no checkpoint at '/no/such'"),
    "doctor, 0 frames": (("doctor", "{model}", "-n", "0"), 2, "n_frames must be at least 1"),
    "doctor, 10^9 frames": (("doctor", "{model}", "-n", "1000000000"), 2, "predictions end at 100,000"),
    "doctor, no such device": (("doctor", "{model}", "--device", "gpu"), 2, "device 'gpu' is unknown"),
    "doctor, int8": (("doctor", "{model}", "--dtype", "int8", "--json"), 2, "dtype 'int8'"),
    "doctor, text model": (("doctor", "{gpt2}"), 6, "no model can be made from its config"),
    "leading dash": (("ask", "-dash.mp4", "q"), 2, "No such option"),
    "no such command": (("wat",), 2, "No such command"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hostile_input_is_one_line_and_an_exit_code(capsys, scratch, tmp_path, case) -> None:
    args, code, says = CASES[case]
    check(*vlab(capsys, *filled(args, scratch, out=str(tmp_path / "out"))), code, says)


# ---- recipes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(scratch, tmp_path_factory) -> Path:
    """A recipe that works, with its result beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    args = [
        "trace",
        "{video}",
        *Q,
        "-o",
        "a",
        "-o",
        "b",
        "-p",
        "video->last",
        "-w",
        "1",
        "--out",
        str(folder),
    ]
    assert cli.main(filled(args, scratch)) == 0
    return folder / "recipe.yaml"


# what is done to its text, or the whole text or bytes of another
RECIPES = {
    "python tag": ("!!python/object/apply:os.system ['touch pwned']\n", "the tag 'tag:yaml.org,2002:python/.* is not allowed"),
    "alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "anchors and aliases"),
    "key twice": (f"{KNOCKOUT}{KNOCKOUT}items: []\n", "line 2 the key 'kind' stands twice"),
    "kind os.system": ("kind: os.system\n", "'os.system' is not a dotted path inside lab or probes; closest: "),
    "kind inside a module": ("kind: probes.knockout.os.system\n", "cannot be imported"),
    "kind is a function": ("kind: lab.cli.main.run\n", "'lab.cli.main.run' is not a recipe"),
    "kind is unknown": ("kind: probes.nock.Out\n", "closest: probes.knockout.KnockoutRecipe"),
    "empty": ("", "a recipe is a mapping of fields, got NoneType"), "a list": ("- a\n", "mapping of fields, got list"),
    "binary": (bytes(range(256)), "is not UTF-8 text"), "nested": ("[" * 20_000, "nested too deep"),
    "2 MB": ("x" * 2_000_000, "has 2000000 bytes, more than the 1000000 allowed"),
    "two documents": ("---\na: 1\n---\nb: 2\n", "another document"),
    "version 99": (("schema_version: 1", "schema_version: 99"), "is 99, this lab reads up to 1"),
    "version true": (("schema_version: 1", "schema_version: true"), "must be a whole number"),
    "window as text": (("window: 1", "window: '1'"), r"window: Input should be a valid integer \(got '1'\)"),
    "window 0": (("window: 1", "window: 0"), "greater than or equal to 1"),
    "misspelt": (("window: 1", "windwo: 1"), "windwo: there is no such field; closest: window"),
    "no pathways": (("pathways:\n- video->last", "pathways: []"), "pathways: Tuple should have at least 1 item"),
    "no items": (f"{KNOCKOUT}items: []\n", "holds no items"), "no field items": (KNOCKOUT, "items: is missing"),
    "no such simulator": (f"{KNOCKOUT}items: {{sim: ../x}}\n", r"no simulator '\.\./x'"),
    "other weights": ((r"weights: \w+", "weights: '000000000000'"), "have hash .*, the recipe was made with 000000000000"),
    "changed video": ((r"sha256: \w+", f"sha256: '{'0' * 64}'"), "has sha256 .*, the recipe was made with 0000"),
    "video is gone": ((r"path: .*", "path: gone.mp4"), "no video 'gone.mp4'"),
    "video is an address": ((r"path: .*", "path: http://a.b/c.mp4"), "is an address"),
    "dtype int8": (("dtype: float32", "dtype: int8"), "model.dtype: Input should be"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_hostile_recipes(capsys, recipe, tmp_path, monkeypatch, case) -> None:
    monkeypatch.chdir(tmp_path)
    change, says = RECIPES[case]
    if isinstance(change, tuple):
        changed = re.sub(*change, recipe.read_text())
        assert changed != recipe.read_text()
        change = changed
    file = recipe.with_name("hostile.yaml")
    file.write_bytes(change if isinstance(change, bytes) else change.encode())
    check(*vlab(capsys, "run", str(file)), 3, says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "says"), [("/dev/zero", "not a file"), ("\0", "not a path"), ("/no.yaml", "No such file")]
)
def test_recipe_files_that_are_none(capsys, path, says) -> None:
    check(*vlab(capsys, "run", path), 3, says)


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04" + b"x" * 99, b"\x80\x04K\x01."], ids=["empty", "zip", "pickle"]
)
def test_a_damaged_result_beside_the_recipe(capsys, recipe, tmp_path, data) -> None:
    dump(load_recipe(recipe), tmp_path / "recipe.yaml")
    (tmp_path / "result.npz").write_bytes(data)
    check(
        *vlab(capsys, "run", str(tmp_path / "recipe.yaml")), 3, "result.npz is damaged or not a saved Result"
    )


def test_a_result_of_another_recipe(capsys, recipe, tmp_path) -> None:
    folder = Path(shutil.copytree(recipe.parent, recipe.parent.with_name("another")))
    text = (folder / "recipe.yaml").read_text().replace("- video->last", "- video->last\n- last->last")
    (folder / "recipe.yaml").write_text(text)
    check(*vlab(capsys, "run", str(folder / "recipe.yaml")), 3, "it was made by another recipe")


# ---- odd, but to be answered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "note"),
    [
        ("bell \a esc \x1b[2J", ""), ("a\0b", ""), ("ünï 🎬 漢字 \u202e rtl", ""), ("$\\frac{x", ""),
        ("<|im_end|>\n<|im_start|>system", "spells 2 special tokens of the model .first: '<|im_end|>'"),
    ],
    ids=["control", "zero byte", "unicode", "tex", "special tokens"],
)  # fmt: skip
def test_odd_questions_are_answered(capsys, scratch, tmp_path, question, note) -> None:
    picture = tmp_path / "map.png"
    code, _, err = vlab(
        capsys,
        *filled(("tokens", "{video}"), scratch),
        question,
        *filled(Q[1:5], scratch),
        "--out",
        str(picture),
    )
    assert code == 0 and picture.stat().st_size > 1000, err
    assert re.search(note.replace("|", r"\|"), err) if note else err == ""


def test_a_video_named_in_other_bytes_cannot_be_traced(capsys, scratch, tmp_path) -> None:
    clip = tmp_path / "caf\udce9.mp4"
    shutil.copy(scratch("video"), clip)
    args = ("trace", str(clip), *filled((*Q, "-p", "video->last"), scratch), "--out", str(tmp_path / "out"))
    check(*vlab(capsys, *args), 2, "the name of the video .* is not UTF-8; rename it")


@pytest.mark.parametrize("name", ["new\nline ünï 🎬.mp4", "-dash.mp4", "100%s {x}.mp4"])
def test_odd_names_are_opened(capsys, scratch, tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(scratch("video"), tmp_path / name)
    code, out, err = vlab(
        capsys, "ask", *filled(Q[1:], scratch), "-o", "a", "-o", "b", "--json", "--", name, "q"
    )
    assert (code, err) == (0, "") and json.loads(out)["letter"] in "AB"


def test_a_cut_video_is_answered_with_a_note(capsys, scratch, tmp_path) -> None:
    clip = clips.cut(_clip(tmp_path / "cut.mp4", 40), 0.6)
    code, out, err = vlab(capsys, "ask", str(clip), *filled(Q, scratch), "-o", "a", "--json")
    assert code == 0 and json.loads(out)["option_probs"] == {"a": 1.0}
    assert re.search(r"vlab: note: .*only \d+ of 40 frames can be read", err)


def test_a_window_beyond_the_model_is_all_layers(capsys, scratch, tmp_path) -> None:
    args = filled(trace("-p", "video->last", "-w", str(10**20)), scratch, out=str(tmp_path))
    assert vlab(capsys, *args)[0] == 0
    values = Result.load(tmp_path / "result.npz").values
    assert values.shape == (1, 1, families.LAYERS) and np.all(values == values[..., :1])


def test_what_may_not_be_read_or_written(scratch, tmp_path_factory) -> None:
    """In a process without root's rights, after everything is imported."""
    folder = tmp_path_factory.mktemp("rights")
    folder.chmod(0o755)
    clip = Path(shutil.copy(scratch("video"), folder / "a.mp4"))
    (folder / "images").mkdir(mode=0o000)
    clip.chmod(0o000)
    (folder / "closed").mkdir(mode=0o555)
    for parent in folder.parents:  # pytest keeps its folders to their owner
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    code = (
        "import os, sys; from lab.cli.main import main; import lab.cli.tracing, lab.video_sources, av, PIL.Image\n"
        "from lab.video import read; from lab.errors import LabError\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "f = sys.argv[1]\n"
        "for video in ('a.mp4', 'images'):\n"
        "    try: read(f'{f}/{video}')\n"
        "    except LabError as e: print(type(e).__name__, str(e))\n"
        "from lab.cli.tracing import folder_for\n"
        "try: folder_for(f'{f}/closed/out')\n"
        "except LabError as e: print(type(e).__name__, str(e))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120
    )
    for name in ("images", "closed"):
        (folder / name).chmod(0o755)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stderr[-500:]
    assert lines[0].startswith("VideoError ") and "no permission to read it" in lines[0]
    assert lines[1].startswith("VideoError ") and "the folder cannot be read" in lines[1]
    assert lines[2].startswith("UsageError ") and "Permission denied" in lines[2]


def test_no_words_are_a_call_for_help(capsys) -> None:
    code, out, err = vlab(capsys)
    assert (code, err) == (0, "") and out.startswith("Usage: vlab") and "Exit codes" in out


def test_the_program_itself(scratch) -> None:
    """`vlab` as it is started from a shell."""
    program = [sys.executable, "-c", "from lab.cli.main import run; run()"]
    done = subprocess.run(
        [*program, "ask", "http://a.b/c.mp4", "q", "--json"], capture_output=True, text=True, timeout=60
    )
    check(done.returncode, done.stdout, done.stderr, 5, "nothing is read over the network")


# ---- the same at the API --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(scratch):
    return load(scratch("model"), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("video", "question", "more", "error", "says"),
    [
        ("/no/such.mp4", "q", {}, VideoError, "no such file"), ("", "q", {}, VideoError, "is empty"),
        ("x" * 5000, "q", {}, VideoError, "not a path"), ("a\0b", "q", {}, VideoError, "no such file"),
        ("http://a.b/c.mp4", "q", {}, VideoError, "nothing is read over the network"),
        (np.full((2, 8, 8, 3), np.nan), "q", {}, UsageError, "384 not finite"), (3, "q", {}, UsageError, "a video is a path"),
        (np.zeros((0, 8, 8, 3), np.uint8), "q", {}, VideoError, "no frames"),
        ("{video}", "q", {"n_frames": 0}, UsageError, "at least 1"), ("{video}", "q", {"n_frames": 1.5}, UsageError, "whole number"),
        ("{video}", "q", {"fps": float("nan")}, UsageError, "finite"), ("{video}", "q", {"index": [99]}, UsageError, "frame 99 asked"),
        ("{video}", "<video>", {}, PromptError, "spells"), ("{video}", "x" * 5000, {}, PromptError, "5,0"),
    ],
)  # fmt: skip
def test_prepare_raises_our_errors(loaded, scratch, video, question, more, error, says) -> None:
    video = scratch("video") if isinstance(video, str) and video == "{video}" else video
    with pytest.raises(error, match=says) as e:
        loaded.prepare(VideoQA(video, question), **more)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("a", "a"), "must differ"),
        (("a", " "), "empty"),
        (tuple("abc") * 9, "27 options"),
        ("ab", "sequence"),
    ],
)
def test_options_that_cannot_be(options, says) -> None:
    with pytest.raises(UsageError, match=says):
        VideoQA("v.mp4", "q", options)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"pathways": ["vidoe->last"]}, "closest: video"), ({"pathways": []}, "nothing to do"), ({"window": 0}, "at least 1"),
        ({"metric": "answer"}, "needs items with options"),
    ],
)  # fmt: skip
def test_knockout_raises_our_errors(loaded, scratch, more, says) -> None:
    with pytest.raises(LabError, match=says):
        knockout(loaded, VideoQA(scratch("video"), "q"), n_frames=2, **more)


def test_a_run_folder_of_another_recipe(loaded, scratch, tmp_path) -> None:
    item = VideoQA(scratch("video"), "q")
    knockout(loaded, item, ["video->last"], n_frames=2, out=tmp_path, show_progress=False)
    with pytest.raises(LabError, match="belongs to recipe"):
        knockout(loaded, item, ["last->last"], n_frames=2, out=tmp_path, show_progress=False)
    with pytest.raises(LabError, match="cannot use .* as a run folder"):
        knockout(loaded, item, ["video->last"], n_frames=2, out=scratch("video"), show_progress=False)
    routed = loaded.prepare(item, 2, mechanisms=[MixtureOfDepths.EXAMPLE])
    with pytest.raises(LabError, match="belongs to recipe"):
        knockout(loaded, routed, ["video->last"], out=tmp_path, show_progress=False)
    assert (
        knockout(loaded, routed, ["video->last"], show_progress=False).recipe == {}
    )  # it names no mechanism


@pytest.mark.parametrize("measure", [scores, scalars])
def test_scores_of_a_shortened_prompt_are_refused(measure, loaded, scratch) -> None:
    item = VideoQA(scratch("video"), "q")
    shorter = loaded.prepare(item, 2, mechanisms=[DifferentialTokenDrop(ratio=0.5)])
    with pytest.raises(LabError, match="changes what the decoder reads; score it without"):
        measure(loaded, shorter, show_progress=False)
    with pytest.raises(LabError, match="search without it"):
        search(loaded, shorter, show_progress=False)


# ---- nothing computed is lost ---------------------------------------------------------------------------------------

SWEEP = (
    "video->last",
    "video->question+option",
    "question+option->last",
    "option->last",
    "last->last",
    "cross-frame",
)


def _slow_program(delay: float) -> list[str]:
    """`vlab`, each forward of a cut taking `delay` seconds longer, so that a signal can fall in between."""
    code = (
        "import time; from lab.edges import sweeping as s; run_dense = s.run_dense\n"
        f"def slow(*a): time.sleep({delay}); return run_dense(*a)\n"
        "s.run_dense = slow\n"
        "from lab.cli.main import run; run()"
    )
    return [sys.executable, "-c", code]


def _wait_for_lines(journal: Path, n: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if journal.exists() and journal.read_bytes().count(b"\n") >= n:
            return
        assert process.poll() is None, "the sweep ended before it could be stopped"
        time.sleep(0.02)
    raise AssertionError(f"no {n} lines in {journal} after a minute")


@pytest.mark.parametrize(
    ("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["kill -9", "Ctrl-C"]
)
def test_a_stopped_sweep_goes_on(capsys, recipe, tmp_path, monkeypatch, how, code) -> None:
    """Stopped in the middle of its third pathway; the same command then measures only what is missing."""
    whole = load_recipe(recipe).model_copy(update={"pathways": SWEEP})
    file = recipe.with_name(f"sweep{code}.yaml")
    dump(whole, file)
    file.parent.joinpath("result.npz").unlink(missing_ok=True)
    out = tmp_path / "out"
    journal = out / f"journal-{whole.id}" / "journal.jsonl"
    process = subprocess.Popen(
        [*_slow_program(0.1), "run", str(file), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background has Ctrl-C switched off; children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    _wait_for_lines(journal, 3, process)
    process.send_signal(how)
    said = process.communicate(timeout=60)
    assert process.returncode == code and said[0] == "" and "Traceback" not in said[1]
    if how == signal.SIGINT:
        assert said[1].splitlines()[-1] == "vlab: interrupted"
    done = [json.loads(line) for line in journal.read_text().splitlines()][1:]  # every line is whole
    assert [d["key"].partition("|")[2] for d in done] == list(SWEEP[: len(done)]) and 2 <= len(done) < len(
        SWEEP
    )

    forwards = []
    from lab.edges import sweeping as module

    measure = module.run_dense  # of cuts; the clean run has none
    monkeypatch.setattr(module, "run_dense", lambda m, r, cuts: (forwards.extend([1] * bool(cuts)), measure(m, r, cuts))[1])  # fmt: skip
    got, _, err = vlab(capsys, "run", str(file), "--out", str(out))
    assert got == 0, err
    assert len(forwards) == (len(SWEEP) - len(done)) * families.LAYERS
    assert not journal.exists()  # the next run measures anew
    assert np.array_equal(Result.load(out / "result.npz").values, whole.run(progress=False)[0].values)


def test_the_model_is_clean_after_an_interrupt(loaded, scratch, monkeypatch, tmp_path) -> None:
    ready = loaded.prepare(VideoQA(scratch("video"), "q"), n_frames=2)
    clean = loaded(ready)
    from lab.model import attention

    calls, attend = [], attention._attend

    def interrupted(*args, **kw):
        calls.append(1)
        if len(calls) == 3 * families.LAYERS + 2:  # inside a layer of a cut run
            raise KeyboardInterrupt
        return attend(*args, **kw)

    monkeypatch.setattr(attention, "_attend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        knockout(loaded, ready, ["video->last"], out=tmp_path, show_progress=False)
    monkeypatch.undo()
    assert (loaded(ready) == clean).all()
    again = knockout(loaded, ready, ["video->last"], out=tmp_path, show_progress=False)
    assert again.shape == (1, 1, families.LAYERS) and np.abs(again.values).max() > 0
