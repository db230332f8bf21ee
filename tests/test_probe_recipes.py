"""Recipes of all probes: their fields are their functions' arguments, they run, and what they made names them again."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import probes.recipes as recipes
from lab.errors import ConfigError
from lab.mechanisms import load as mechanism
from lab.mechanisms import plain
from lab.model.zoo import load
from lab.recipe import Recipe, SimSpec, dump, from_plain, known_kinds, loads, resolve
from probes.asking import ProbeRecipe
from probes.knockout import KnockoutRecipe
from probes.lens import LensRecipe, lens

TWO = SimSpec(sim="moving_direction", n=2)
FEW: dict[str, dict[str, Any]] = {
    "WordsRecipe": {"top": 2, "layers": (8,)},
    "VocabularyRecipe": {"lists": {"ways": ("left", "right")}, "layers": (8,)},
    "TunedLensRecipe": {"epochs": 1, "rows": 50, "rank": 1, "items": SimSpec(sim="moving_direction", n=4)},
    "HeadsRecipe": {"pathway": "video->last", "top": 1, "layers": (6,)},
    "EntropyRecipe": {"layers": (6,)},
    "FrameMapRecipe": {"layers": (6,), "causal": False},
    "RowsRecipe": {"layers": (6,)},
    "SinksRecipe": {"layers": (6,), "causal": False},
    "PathPatchingRecipe": {"paths": ("video->last",)},
    "AttributionPatchingRecipe": {"exact": False},
    "TowerLensRecipe": {"layers": (1,)},
    "TowerKnockoutRecipe": {"layers": (1,)},
}
OWN = [n for n, c in vars(recipes).items() if inspect.isclass(c) and c.__module__ == recipes.__name__ and n.endswith("Recipe")]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return load("tiny", device="cpu")


def made(name: str) -> Recipe:
    return getattr(recipes, name)(**{"items": TWO, "n_frames": 4, **FEW.get(name, {})})


@pytest.mark.parametrize("name", OWN)
def test_fields_are_the_functions_arguments(name: str) -> None:
    recipe = made(name)
    assert isinstance(recipe, recipes.Called)
    given = inspect.signature(recipe.probe()).parameters
    own = {n: f for n, f in type(recipe).model_fields.items() if n not in ProbeRecipe.model_fields}
    for field, info in own.items():
        assert field in given, f"{recipe.probe().__name__} has no argument {field}"
        if not info.is_required():
            default = given[field].default
            assert info.default == ((default,) if isinstance(info.default, tuple) and isinstance(default, str) else default)  # fmt: skip
    left = set(given) - set(own) - set(ProbeRecipe.model_fields) - {"item", "head", "tuned", "cancel", "show_progress"}  # fmt: skip
    assert not left, f"{name} does not hold {left}"


@pytest.mark.parametrize("name", OWN)
def test_recipe_to_run_to_recipe(name: str, model: Any) -> None:
    recipe = made(name)
    back = loads(dump(recipe))
    assert back == recipe and back.id == recipe.id
    results = back.run(progress=False, model=model)
    assert results and all(from_plain(r.recipe).id == recipe.id for r in results)
    assert all(np.isfinite(r.values).any() for r in results)


def test_every_probe_has_a_recipe() -> None:
    """A function of a probe that takes a model and items is called by the recipe of its name, or of its file."""
    from probes import attention, attribution, knockout, lens, linear, patching, scores, tuned_lens, vision

    called = {made(n).probe() for n in OWN}  # type: ignore[attr-defined]
    direct = {
        lens.lens, attention.attention, linear.linear, patching.patching, attribution.attribute, knockout.knockout,
        scores.edge_scores,
    }  # fmt: skip
    files = (attention, attribution, knockout, lens, linear, patching, scores, tuned_lens, vision)
    functions = {
        f for file in files for n, f in vars(file).items()
        if inspect.isfunction(f) and f.__module__ == file.__name__ and not n.startswith("_")
        and list(inspect.signature(f).parameters)[:2] in (["model", "items"], ["model", "item"])
    }  # fmt: skip
    assert functions <= called | direct and len(functions) > 15


def test_the_same_recipe_in_another_process(tmp_path: Any) -> None:
    """Canonical text, id, and the numbers themselves."""
    recipe = LensRecipe(items=TWO, n_frames=4, layers=(8,))
    dump(recipe, tmp_path / "r.yaml")
    code = (
        "import sys, json; from lab.recipe import load; r = load(sys.argv[1]); out = r.run(progress=False)[0];"
        "print(json.dumps([r.id, r.canonical(), out.recipe, out.values.ravel().tolist()]))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.yaml")], capture_output=True, text=True, timeout=120)  # fmt: skip
    name, canonical, plainly, values = json.loads(said.stdout.splitlines()[-1])
    assert (name, canonical) == (recipe.id, recipe.canonical()) and from_plain(plainly).id == recipe.id
    assert values == recipe.run(progress=False)[0].values.ravel().tolist()


def test_mechanisms_are_part_of_a_recipe(model: Any) -> None:
    """A lens under a mechanism: the function and the recipe it leaves give the same numbers, other than without."""
    drop = mechanism("differential_token_drop").DifferentialTokenDrop(ratio=0.5)
    bare = LensRecipe(items=TWO, n_frames=4, layers=(8,))
    recipe = bare.override({"mechanisms": [plain(drop)]})
    assert recipe.id != bare.id
    with_drop, without = (r.run(progress=False, model=model)[0] for r in (recipe, bare))
    direct = lens(model, recipe.questions(), n_frames=4, layers=[8], mechanisms=[drop], show_progress=False)
    assert (with_drop.values == direct.values).all() and (with_drop.values != without.values).any()
    curve = KnockoutRecipe(items=TWO, n_frames=4, window=3, pathways=("video->last",))
    dropped = curve.override({"mechanisms": [plain(drop)]}).run(progress=False, model=model)[0]
    assert (dropped.values != curve.run(progress=False, model=model)[0].values).any()


def test_a_result_under_a_mechanism_names_it(model: Any, tmp_path: Any) -> None:
    """What a function was given stands in its Result's recipe, where it can be named."""
    from lab.items import load_items
    from tests import clips

    clips.make(tmp_path / "a.mp4", "libx264", 12)
    items = load_items([{"video": str(tmp_path / "a.mp4"), "question": "Which way?", "options": ["left", "right"]}])  # fmt: skip
    drop = mechanism("differential_token_drop").DifferentialTokenDrop(ratio=0.5)
    found = lens(model, items, n_frames=4, layers=[8], mechanisms=[drop], show_progress=False)
    assert found.recipe["mechanisms"] == [plain(drop)]
    again = from_plain(found.recipe).run(progress=False, model=model)[0]
    assert (again.values == found.values).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{mechanism: differential_token_drp.X}", "no mechanism 'differential_token_drp'"),
        ("{mechanism: vidkv.Nothing}", "has no mechanism 'Nothing'"),
        ("{mechanism: differential_token_drop.DifferentialTokenDrop, ratoi: 1}", "closest: ratio"),
        ("{mechanism: os.system}", "no mechanism 'os'"),
        ("vidkv", "mechanisms.0: Input should be an object"),
    ],
)
def test_mechanisms_that_are_none(given: str, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        loads(f"kind: probes.lens.LensRecipe\nitems: sim:moving_direction:2\nmechanisms: [{given}]")
    assert said in str(e.value) and "\n" not in str(e.value)


def test_every_kind_can_be_written_down() -> None:
    """A minimal file of each kind: items, and what else has no default."""
    more = {"HeadsRecipe": {"pathway": "video->last"}, "EvaluationRecipe": {"policy": {}}}
    for kind in known_kinds():
        if kind.startswith("probes."):
            cls = resolve(kind)
            made = cls(items="sim:moving_direction:2", **more.get(cls.__name__, {}))  # type: ignore[arg-type]
            assert loads(dump(made)) == made and isinstance(made.items, SimSpec)  # type: ignore[attr-defined]
