"""Hostile config files through `vlab run`: exit code and first line of what it says. Never a traceback, never a hang.

A case is a file (text, bytes, or what makes something else of that name), the exit code, and a part of the line.
`{clip}` in a text is the path of a video that is there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.cli import main as cli
from tests import clips

LIMIT = 60  # seconds; a case takes a second or two
KIND = "kind: probes.knockout.KnockoutRecipe\n"
LENS = "kind: probes.lens.LensRecipe\nitems: sim:moving_direction:1\nn_frames: 2\n"
ITEMS = "items: sim:moving_direction:1\nn_frames: 2\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def stranger(path: Path) -> None:
    """A link out of the folder, to a file that is no recipe."""
    path.symlink_to("/etc/passwd")


def policy(cut: str) -> str:
    return LENS + f"policy: {{format: edge-policy/1, cuts: [{{q: last, k: video, {cut}}}]}}"


FILES: dict[str, tuple[str | bytes | Callable[[Path], Any], int, str]] = {
    # what is no YAML, or no recipe
    "empty": ("", 3, "a recipe is a mapping of fields, got NoneType"),
    "a list": ("[1, 2]", 3, "a mapping of fields, got list"),
    "a text": ("hello", 3, "a mapping of fields, got str"),
    "not YAML": (KIND + "window: [", 3, "line "),
    "two documents": (KIND + "---\n" + KIND, 3, "another document"),
    "NUL byte": (KIND + "window: \0", 3, "not readable as YAML"),
    "not UTF-8": (b"kind: \xff\xfe\xff", 3, "is not UTF-8 text (byte 6)"),
    "UTF-16": ("kind: x".encode("utf-16"), 3, "is not UTF-8"),
    "10 MB": (b"#" * 10_000_000, 3, "has 10000000 bytes, more than the 1000000 allowed"),
    "binary": (bytes(range(256)) * 40, 3, "is not UTF-8"),
    "a folder": (Path.mkdir, 3, "it is not a file"),
    "a pipe": (os.mkfifo, 3, "it is not a file"),
    "a link to nothing": (lambda p: p.symlink_to("gone.yaml"), 3, "No such file"),
    "a link to itself": (loop, 3, "cannot read"),
    "a link out of the folder": (stranger, 3, "a recipe is a mapping of fields"),
    # what YAML can do and a recipe may not
    "python tag": ("!!python/object/apply:os.system ['touch hacked']", 3, "the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed"),
    "python name": (KIND + "window: !!python/name:os.system x", 3, "line 2 the tag"),
    "own tag": (KIND + "window: !Window 3", 3, "line 2 the tag '!Window' is not allowed"),
    "harmless tag": (KIND + "window: !!int '3'", 3, "line 2 the tag"),
    "anchor bomb": (BOMB, 3, "line 1 anchors and aliases (& and *) are not allowed"),
    "alias": (KIND + "model: &m {name: tiny}\nitems: *m", 3, "line 2 anchors and aliases"),
    "endless alias": (KIND + "items: &i [*i]", 3, "anchors and aliases"),
    "merge key": (KIND + ITEMS + "<<: {window: 3}", 3, "<<: there is no such field"),
    "key twice": (KIND + "window: 3\nwindow: 5", 3, "line 3 the key 'window' stands twice"),
    "key twice, deep": (KIND + "items: {sim: a, sim: b}", 3, "the key 'sim' stands twice"),
    "key that is a list": (KIND + "? [a]\n: 1", 3, "a key must be a text"),
    "key that is a number": (KIND + ITEMS + "3: 4", 3, "3: there is no such field"),
    "50,000 brackets": ("[" * 50_000, 3, "nested too deep"),
    "3,000 mappings": (KIND + "items: " + "{a: " * 3000 + "1" + "}" * 3000, 3, "nested too deep"),
    "300 mappings": (LENS + "policy: " + "{a: " * 300 + "1" + "}" * 300, 3, "recursion limit"),
    "lone surrogate": (KIND + ITEMS + 'target: "\\ud800"', 3, "recipe: "),
    # numbers
    "5,000 digits": (KIND + "window: " + "9" * 5000, 3, "not readable as YAML"),
    "25 digits": (KIND + "items: {sim: moving_direction, n: 9999999999999999999999999}", 3, "items.sim.n: Input should be less than or equal to 100000"),
    "a million million items": (KIND + "items: sim:moving_direction:1000000000000", 3, "less than or equal to 100000"),
    "a thousand million frames": (KIND + "items: sim:moving_direction:1\nn_frames: 1000000000", 2, "n_frames=1,000,000,000 makes at least"),
    "no frames": (KIND + "items: sim:moving_direction:1\nn_frames: 0", 3, "n_frames: Input should be greater than or equal to 1"),
    "negative seed": (KIND + "items: {sim: moving_direction, seed: -1}", 3, "seed: Input should be greater than or equal to 0"),
    "infinity": (KIND + ITEMS + "window: 1e999", 3, "window: Input should be a valid integer (got inf)"),
    "not a number": ("kind: probes.prune.PruneRecipe\nitems: sim:moving_direction:1\nbudget: {kl: .nan}", 3, "budget.kl: Input should be a finite number"),
    "hexadecimal": (KIND + ITEMS + "window: 0x10", 3, "window: Input should be a valid integer (got '0x10')"),
    "yes": (KIND + ITEMS + "per_token: yes", 3, "per_token: Input should be a valid boolean"),
    "layers without end": (policy("layers: 1-999999999999"), 3, "is not 'all' or 1-based ranges"),
    "a layer that is not": (LENS + "layers: [999999999999]", 2, "the model has layers 1..8"),
    "a head that is not": (KIND + ITEMS + "heads: [1000000000000]", 2, "different heads out of 0-"),
    # names
    "another module": ("kind: os.system", 3, "kind: 'os.system' is not a dotted path inside lab or probes"),
    "builtins": ("kind: builtins.eval", 3, "is not a dotted path inside"),
    "a function of ours": ("kind: lab.cli.main.main", 3, "is not a recipe; closest: "),
    "a class of ours": ("kind: lab.errors.LabError", 3, "is not a recipe"),
    "a base": ("kind: lab.recipe.Recipe", 3, "is not a recipe"),
    "imported elsewhere": ("kind: probes.lens.ProbeRecipe", 3, "is not a recipe"),
    "a path as kind": ("kind: ../../etc/passwd", 3, "is not a dotted path"),
    "a megabyte of kind": ("kind: " + "a." * 400_000 + "b", 3, "is not a dotted path"),
    "escape codes": ('kind: "probes.\\e[2Jx"', 3, "'probes.\\x1b[2Jx' is not a dotted path"),
    "a newer version": (KIND + "schema_version: 99", 3, "is 99, this lab reads up to 1; update the lab"),
    "unknown field": (KIND + ITEMS + "windw: 3", 3, "windw: there is no such field; closest: window"),
    # paths
    "items out of the folder": (KIND + "items: {file: ../../../../../../../../etc/passwd}", 3, "cannot tell the format of"),
    "items without end": (KIND + "items: {file: /dev/zero}", 3, "it is not a file"),
    "items of a NUL": (KIND + 'items: {file: "a\\0b.jsonl"}', 3, "not a path"),
    "a benchmark out of the folder": (KIND + "items: tomato:../../../../../../../../etc", 3, "no question files"),
    "a simulator by path": (KIND + "items: {sim: ../../x}", 3, "no simulator '../../x'"),
    "a simulator by module": (KIND + "items: {sim: __main__}", 3, "no simulator '__main__'"),
    "a video without end": (KIND + "items: [{video: {path: /dev/zero}, question: q}]", 5, "not a regular file"),
    "a video from the net": (KIND + "items: [{video: {path: 'http://a.b/c.mp4'}, question: q}]", 3, "is an address"),
    "a model out of the folder": (KIND + ITEMS + "model: {name: ../../../../../../../etc}", 6, "not a transformers checkpoint"),
    "a model from the net": (KIND + ITEMS + "model: {name: 'http://a.b/c'}", 6, "no checkpoint at"),
    "a base out of reach": ("base: " + "../" * 3000 + "\n" + KIND + "items: {file: x.jsonl}", 3, "cannot read"),
    "a base that is none": ("base: [3]\n" + KIND + ITEMS, 3, "base: must be the name of a folder"),
    "a frame that is not": (KIND + "items: [{video: {path: '{clip}', index: [99999999999999999999]}, question: q}]", 2, "the video has 12 frames"),
    "1e300 frames a second": (KIND + "items: [{video: {path: '{clip}', fps: 1.0e+300}, question: q}]", 4, "take fewer frames"),
    "a clip past the end": (KIND + "items: [{video: {path: '{clip}'}, question: q, clip: [90, 91]}]", 2, "no frame is shown from 90 to 91 s"),
    # what looks like code
    "code in a policy": (policy("layers: 1-2, where: '__import__(\"os\").system(\"id\")'"), 3, "is not allowed here; use frame, pos, row"),
    "a power in a policy": (policy("layers: 1-2, where: 'frame(q) > 9**9**9'"), 3, "'9**9**9' is not allowed here"),
    "brackets in a policy": (policy("layers: 1-2, where: '" + "(" * 5000 + "'"), 3, "at most 300 characters"),
    "a mechanism by module": (LENS + "mechanisms: [{mechanism: os.system}]", 3, "no mechanism 'os'"),
    "a mechanism's field": (LENS + "mechanisms: [{mechanism: vidkv.VidKV, __class__: x}]", 3, "has no field '__class__'"),
    "100,000 pathways": (KIND + ITEMS + "pathways: [" + "video->last, " * 20_000 + "]", 2, "is asked 20000 times"),
    "a megabyte of a word": (LENS + "words: [" + "a" * 500_000 + "]", 2, "the model's vocabulary has no 'aaa"),
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.make(tmp_path_factory.mktemp("clips") / "a.mp4", "libx264", 12)


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"no answer after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", FILES)
def test_hostile_files(
    name: str, tmp_path: Path, clip: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is printed on stdout, nothing is written, and the one line on stderr says what is wrong."""
    content, code, said = FILES[name]
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "hostile.yaml"
    if callable(content):
        content(file)
    else:
        data = content.replace("{clip}", str(clip)).encode() if isinstance(content, str) else content
        file.write_bytes(data)
    capsys.readouterr()
    got = cli.main(["run", "hostile.yaml"])
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert got == code, err
    assert out == "" and lines[0].startswith("vlab: ") and said in lines[0] and len(lines) == 1
    assert len(lines[0]) < 2100 and lines[0].isprintable() and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.yaml"]


def test_there_are_enough_of_them() -> None:
    assert len(FILES) >= 20
