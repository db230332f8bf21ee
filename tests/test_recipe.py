"""Recipes: one identity on every machine, YAML in and out, hostile files refused in one line."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

import lab.recipe as recipes
from lab.errors import ConfigError, UsageError
from lab.recipe import (
    AnyRecipe,
    ItemFile,
    ItemSpec,
    ItemsSpec,
    ModelSpec,
    Recipe,
    SimSpec,
    VideoSpec,
    dump,
    from_plain,
    json_schema,
    load,
    loads,
    sha256_of,
)
from lab.result import Result
from lab.yamlfile import as_yaml, parse_yaml

KIND = "probes.example.ExampleRecipe"


class ExampleRecipe(Recipe):
    model: ModelSpec = ModelSpec()
    items: ItemsSpec = SimSpec(sim="moving_direction")
    window: int = 9
    strength: float = 1.0
    pathways: tuple[str, ...] = ("cross-frame", "video->question")
    inner: AnyRecipe | None = None

    def run(self, *, progress: bool = True) -> list[Result]:
        return [Result([self.window], ("x",), {"x": [0]}, "1", self.plain())]  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if a file probes/example.py defined ExampleRecipe."""
    module = types.ModuleType("probes.example")
    monkeypatch.setattr(ExampleRecipe, "__module__", "probes.example")
    module.ExampleRecipe = ExampleRecipe  # type: ignore[attr-defined]
    module.open_file = open  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probes.example", module)
    yield


def test_yaml_round_trip_keeps_the_id(tmp_path: Path) -> None:
    video = VideoSpec(path="clip.mp4", sha256="0" * 64, fps=1e-3)
    item = ItemSpec(video=video, question="no", options=("12:30", "yes", "~", "1e-3"), answer=1)
    r = ExampleRecipe(items=(item,), strength=1e-7, inner=ExampleRecipe(window=3))
    dump(r, tmp_path / "r.yaml")
    back = load(tmp_path / "r.yaml")
    assert back == r and back.id == r.id and hash(back) == hash(r)
    assert back.folder == tmp_path.resolve() and r.folder == Path.cwd()
    assert (
        isinstance(back, ExampleRecipe) and isinstance(back.inner, ExampleRecipe) and back.inner.window == 3
    )
    assert back.run()[0].values.tolist() == [9]


def test_the_id_is_the_same_in_another_process_and_order() -> None:
    r = ExampleRecipe(window=3)
    assert r.canonical().startswith('{"inner":null,"items":{"n":8,') and r.id == "d7a50b108fb8"
    shuffled = dict(reversed(list(r.plain().items())))
    assert from_plain(shuffled).id == r.id
    assert ExampleRecipe(window=4).id != r.id
    assert ExampleRecipe(strength=1).id == ExampleRecipe(strength=1.0).id


def test_a_recipe_is_frozen_and_names_its_class() -> None:
    r = ExampleRecipe()
    assert r.kind == KIND and r.schema_version == 1
    with pytest.raises(ValidationError):
        r.window = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match=r"kind is 'lab\.x\.Y'"):
        ExampleRecipe(kind="lab.x.Y")


def test_the_base_class_says_how_to_make_it_run() -> None:
    class Silent(Recipe):
        pass

    with pytest.raises(UsageError, match="give the class a method run"):
        Silent().run()


def test_a_recipe_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    class Here(Recipe):
        pass

    with pytest.raises(ConfigError):
        dump(Here(), tmp_path / "r.yaml")
    assert not (tmp_path / "r.yaml").exists()


GOOD = "kind: probes.example.ExampleRecipe\n"
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a recipe is a mapping of fields, got NoneType"),
        ("[1, 2]", "a recipe is a mapping of fields, got list"),
        ("just text", "a recipe is a mapping of fields, got str"),
        ("window: 3", "kind: is missing"),
        ("kind: [1]", "kind: is missing"),
        ("!!python/object/apply:os.system ['echo hi']", "line 1 the tag"),
        (GOOD + "model: !!python/name:os.system x", "line 2 the tag"),
        (GOOD + "window: !!int '3'", "line 2 the tag"),
        (BOMB, "anchors and aliases"),
        (GOOD + "model: &m {name: tiny}\ninner: *m", "line 2 anchors and aliases"),
        (GOOD + "window: 3\nwindow: 5", "line 3 the key 'window' stands twice"),
        (GOOD + "model: {name: a, name: b}", "the key 'name' stands twice"),
        (GOOD + "---\nwindow: 3", "but found another document"),
        (GOOD + "window: [", "line "),
        (GOOD + "? [a]\n: 1", "a key must be a text"),
        ("[" * 50_000, "nested too deep"),
        (GOOD + "#" * 1_000_001, "more than the 1000000 allowed"),
        ("a: \x00", "not readable as YAML"),
        (GOOD + "windw: 3", "windw: there is no such field; closest: window"),
        (GOOD + "model: {nam: tiny}", "model.nam: there is no such field; closest: name"),
        (GOOD + "window: nine", "window: Input should be a valid integer (got 'nine')"),
        (GOOD + "window: '9'", "window: Input should be a valid integer"),
        (GOOD + "window: true", "window: Input should be a valid integer"),
        (GOOD + "window: 9.5", "window: Input should be a valid integer"),
        (GOOD + "window: " + "9" * 5000, "not readable as YAML"),
        (GOOD + "strength: .nan", "strength: Input should be a finite number"),
        (GOOD + "strength: .inf", "strength: Input should be a finite number"),
        (GOOD + "pathways: cross-frame", "pathways: Input should be a valid array"),
        (GOOD + "pathways: [1]", "pathways.0: Input should be a valid string"),
        (GOOD + "model: {dtype: int4}", "model.dtype: Input should be 'auto', 'float32'"),
        (GOOD + "items: {sim: moving_direction, n: many}", "items.sim.n: Input should be a valid integer"),
        (GOOD + "items: {simm: moving_direction}", "items: Items are a list, or have sim:, or file:"),
        (GOOD + "items: [{video: {path: a, fps: 1.0, n_frames: 8}, question: q}]", "choose one of n_frames, fps, index"),
        (GOOD + "items: [{question: q}]", "items.list.0.video: is missing"),
        (GOOD + "schema_version: 2", "schema_version: is 2, this lab reads up to 1"),
        (GOOD + "schema_version: 0", "schema_version: 0 cannot be brought to 1"),
        (GOOD + "schema_version: one", "schema_version: must be a whole number"),
        (GOOD + "inner: {kind: probes.example.ExampleRecipe, windw: 1}", "inner: recipe: windw: there is no such field"),
        ("kind: os.system", "kind: 'os.system' is not a dotted path inside lab or probes"),
        ("kind: lab", "is not a dotted path"),
        ("kind: lab.recipe.Recipe", "is not a recipe"),
        ("kind: lab.errors.LabError", "is not a recipe"),
        ("kind: probes.example.open_file", "is not a recipe"),
        ("kind: probes.example.ExampleRecipe.run", "cannot be imported"),
        ("kind: probes.nothing.Recipe", "cannot be imported"),
        ("kind: probes..ExampleRecipe", "is not a dotted path"),
        ("kind: probes.__main__.x", "is not a dotted path"),
        ("kind: ../../etc/passwd", "is not a dotted path"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        loads(text, "r.yaml")
    assert said in str(e.value) and str(e.value).startswith("r.yaml") and "\n" not in str(e.value)


def test_an_unknown_kind_names_the_closest_one_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "knocked.py").write_text("class KnockedRecipe(Recipe):\n    pass\nraise SystemExit\n")
    monkeypatch.setattr(recipes, "_folders", lambda root: [tmp_path] if root == "probes" else [])
    assert recipes.known_kinds() == ["probes.knocked.KnockedRecipe"]  # found without running the file
    with pytest.raises(ConfigError, match=r"closest: probes\.knocked\.KnockedRecipe"):
        loads("kind: probes.knoked.KnockedRecipe")


def test_every_installed_kind_resolves() -> None:
    kinds = recipes.known_kinds()
    assert "probes.knockout.KnockoutRecipe" in kinds
    assert [recipes.dotted(recipes.resolve(kind)) for kind in kinds] == kinds


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p, "cannot read"),
        (lambda p: p / "none.yaml", "cannot read"),
        (lambda p: (p / "a.yaml", (p / "a.yaml").write_bytes(b"\xff\xfe\x00"))[0], "is not UTF-8"),
        (
            lambda p: (p / "a.yaml", (p / "a.yaml").write_bytes(b"x" * 1_000_001))[0],
            "1000001 bytes, more than the 1000000",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, make: object, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        load(make(tmp_path))  # type: ignore[operator]
    assert said in str(e.value)


def test_old_recipes_are_brought_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(data: dict[str, object]) -> dict[str, object]:
        return {("window" if k == "width" else k): v for k, v in data.items()}

    monkeypatch.setitem(recipes.MIGRATIONS, 0, rename)  # type: ignore[arg-type]
    r = loads(GOOD + "schema_version: 0\nwidth: 5")
    assert isinstance(r, ExampleRecipe) and r.window == 5 and r.schema_version == 1


def test_json_schema_fixes_the_kind_and_forbids_the_unknown() -> None:
    schema = json_schema(ExampleRecipe)
    assert schema["properties"]["kind"] == {"const": KIND, "type": "string"}
    assert schema["additionalProperties"] is False and "kind" in schema["required"]


def test_sampling_gives_only_what_was_asked() -> None:
    assert VideoSpec(path="a").sampling() == {}
    assert VideoSpec(path="a", index=(0, 4)).sampling() == {"index": (0, 4)}
    for wrong in ({"n_frames": 0}, {"fps": -1.0}, {"n_frames": 8, "index": (1,)}):
        with pytest.raises(ValidationError):
            VideoSpec(path="a", **wrong)  # type: ignore[arg-type]
    assert isinstance(ExampleRecipe(items=ItemFile(file="a.jsonl")).items, ItemFile)


def test_hash_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"one")
    first = sha256_of(tmp_path / "a")
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "2.png")
    assert sha256_of(tmp_path / "a") != first
    assert sha256_of(tmp_path / "a" / "2.png").startswith("7692c3ad")
    with pytest.raises(ConfigError, match="cannot read"):
        sha256_of(tmp_path / "none")


def test_yaml_reads_what_it_writes_and_other_readers_agree() -> None:
    import yaml

    data = {"no": "no", "t": "12:30", "d": "2026-11-20", "o": "010", "e": "1e-3", "f": 1e-5, "i": -3, "n": None,
            "b": True, "s": "", "m": "a\nb", "x": "0x10", "u": "1_0", "w": "\u00e9", "big": 1e300, "l": [[], {}]}  # fmt: skip
    text = as_yaml(data)
    assert parse_yaml(text, "x") == data
    numbers = {"f", "big"}  # YAML 1.1 takes 1e-05 for a text; everything else must agree
    assert {k: v for k, v in yaml.safe_load(text).items() if k not in numbers} == {
        k: v for k, v in data.items() if k not in numbers
    }
    assert parse_yaml("{a: 010, b: no, c: 12:30, d: 1e-3, e: 1_000}", "x") == {
        "a": "010", "b": "no", "c": "12:30", "d": 1e-3, "e": "1_000",
    }  # fmt: skip


def test_importing_recipes_reads_no_model() -> None:
    code = "import sys, lab.recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
