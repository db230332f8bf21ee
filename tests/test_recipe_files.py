"""Recipe files of earlier versions, which load for ever, and the JSON Schema of today's.

tests/recipes/v1   files as earlier commits wrote them, with the ids they had (ids.json); never change one, only add
tests/recipes/v0   a made-up older version, to hold the migrations to their word
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import lab.recipe as recipes
from lab.cli import main as cli
from lab.cli.schemas import every_kind, named
from lab.errors import ConfigError, UsageError
from lab.recipe import SCHEMA_VERSION, Recipe, dump, json_schema, known_kinds, load, loads, resolve
from lab.yamlfile import parse_yaml

ROOT = Path(__file__).resolve().parents[1]
OLD = sorted((ROOT / "tests/recipes/v1").glob("*.yaml"))
IDS = json.loads((ROOT / "tests/recipes/v1/ids.json").read_text())
COMMITTED = ROOT / f"schemas/recipe.v{SCHEMA_VERSION}.json"


@pytest.mark.parametrize("file", OLD, ids=lambda p: p.stem)
def test_old_files_load_for_ever(file: Path) -> None:
    recipe, said = load(file), parse_yaml(file.read_text(), file.name)
    plain = recipe.plain()
    assert {
        k: plain[k] for k in said
    } == said  # nothing is lost or read otherwise; fields that came later are added
    assert recipe.id == IDS[file.name]
    assert loads(dump(recipe)) == recipe


def test_every_old_file_has_its_id() -> None:
    assert sorted(IDS) == [p.name for p in OLD] and len(OLD) >= 8


def test_a_file_of_an_older_version_is_brought_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through every version in between; the file itself says which one it is."""

    def from_0(data: dict[str, Any]) -> dict[str, Any]:
        names = {"width": "window", "questions": "items"}
        return {names.get(k, k): v for k, v in data.items()}

    old = ROOT / "tests/recipes/v0/knockout.yaml"
    with pytest.raises(ConfigError, match="0 cannot be brought to 1; write it anew"):
        load(old)
    monkeypatch.setitem(recipes.MIGRATIONS, 0, from_0)
    found = load(old)
    new = "kind: probes.knockout.KnockoutRecipe\nitems: {sim: moving_direction, n: 4}\nwindow: 5"
    assert found == loads(new) and found.schema_version == SCHEMA_VERSION


def test_a_field_that_came_later_keeps_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in OLD:
        recipe = load(file)
        for name in recipe.added:
            assert type(recipe).model_fields[name].default == getattr(recipe, name)
            other = recipe.override({name: [{"mechanism": "vidkv.VidKV"}] if name == "mechanisms" else {"format": "edge-policy/1"}})  # fmt: skip
            assert other.id != recipe.id


# ---- schemas --------------------------------------------------------------------------------------------------------


def test_the_committed_schema_is_up_to_date() -> None:
    said = "run: vlab schema --out " + str(COMMITTED.relative_to(ROOT))
    assert json.loads(COMMITTED.read_text()) == every_kind(), said


def kinds() -> list[type[Recipe]]:
    return [resolve(k) for k in known_kinds()]


@pytest.mark.parametrize("file", [*OLD, ROOT / "tests/recipes/v1/knockout.yaml"], ids=lambda p: p.stem)
def test_files_fit_the_schema(file: Path) -> None:
    whole = jsonschema.Draft202012Validator(json.loads(COMMITTED.read_text()))
    data = parse_yaml(file.read_text(), file.name)
    one = jsonschema.Draft202012Validator(json_schema(resolve(data["kind"])))
    for checker in (whole, one):
        checker.check_schema(checker.schema)
        for fits in (data, {**data, "base": ".."}, {**data, "items": "sim:moving_direction:4"}):
            assert checker.is_valid(fits)
        for wrong in ({**data, "windw": 3}, {**data, "items": {"simm": "x"}}, {**data, "kind": "os.system"}, {**data, "n_frames": "8"}):  # fmt: skip
            assert not checker.is_valid(wrong)


def test_every_kind_is_in_the_schema() -> None:
    whole = every_kind()
    assert [ref["$ref"].removeprefix("#/$defs/") for ref in whole["oneOf"]] == known_kinds()
    for name, part in whole["$defs"].items():
        refs = {v for k, v in walked(part) if k == "$ref"}
        assert all(r.removeprefix("#/$defs/") in whole["$defs"] for r in refs), name


def walked(part: Any) -> list[tuple[str, Any]]:
    """All keys and values of nested data."""
    if isinstance(part, list):
        return [pair for p in part for pair in walked(p)]
    return [pair for k, v in part.items() for pair in [(k, v), *walked(v)]] if isinstance(part, dict) else []


def test_vlab_schema(capsys: Any, tmp_path: Path) -> None:
    assert cli.main(["schema", "knockout"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema(resolve("probes.knockout.KnockoutRecipe"))
    file = tmp_path / "all.json"
    assert cli.main(["schema", "--out", str(file)]) == 0
    assert file.read_bytes() == COMMITTED.read_bytes() and str(file) in capsys.readouterr().out
    assert cli.main(["schema", "knokout"]) == 2
    assert "closest: Knockout" in capsys.readouterr().err


def test_a_kind_is_named_shortly() -> None:
    for name in ("probes.lens.LensRecipe", "LensRecipe", "Lens", "lens"):
        assert named(name) == "probes.lens.LensRecipe"
    with pytest.raises(UsageError, match="no recipe kind"):
        named("os.system")
