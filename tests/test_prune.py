"""`vlab prune`, `vlab eval`, and the recipe of a pruning: files that are there, mean what they say, and run again."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lab.bench import models
from lab.bench.materialise import measure
from lab.bench.prune import calibration, holdout
from lab.cli.main import main
from lab.edges import presets
from lab.edges.policy import Policy
from lab.edges.searching import search
from lab.errors import UsageError
from lab.recipe import load as load_recipe
from lab.result import Result
from lab.sim.planted import planted_model, questions
from lab.view.specs import figure_spec
from probes.prune import PruneRecipe, liveness, proven, prune, unit_map

SIM = '{"sim": "moving_direction", "n": 2, "seed": 1}'
HELD = '{"sim": "moving_direction", "n": 1, "seed": 2}'


@pytest.fixture(scope="module")
def planted():
    model = planted_model("plain")
    return model, [model.prepare(q) for q in questions(3, 0)]


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    policy = folder / "p.yaml"
    code = main([
        "prune", "--items", SIM, "--holdout", HELD, "-b", "exit", "--flips", "0.8", "--kl", "0.5", "--forwards", "3",
        "--finer", "distance", "-o", str(policy),
    ])  # fmt: skip
    return code, policy


def test_prune_writes_what_it_found(cli):
    code, policy = cli
    assert code == 0
    made = Policy.load(policy)
    assert made.cuts and made.evidence.acc_full is not None and made.calibration.n == 2
    folder = policy.with_suffix("")
    names = {p.name for p in folder.iterdir()}
    assert names == {"recipe.yaml", "trail.npz", "evaluation.npz", "units.png", "live.png", "curve.png"}
    trail = Result.load(folder / "trail.npz")
    assert trail.notes["forwards_per_item"] < 5 and Policy.from_dict(trail.notes["policy"]).id == made.id


def test_the_recipe_finds_the_same_again(cli):
    _, policy = cli
    recipe = load_recipe(policy.with_suffix("") / "recipe.yaml")
    assert isinstance(recipe, PruneRecipe)
    again = recipe.model_copy(update={"holdout": None}).prune(progress=False)
    before = Result.load(policy.with_suffix("") / "trail.npz")
    np.testing.assert_array_equal(again.trail.values, before.values)
    assert again.policy.id == Policy.load(policy).id


def test_eval_tells_the_table(cli, capsys):
    capsys.readouterr()
    assert main(["eval", str(cli[1]), "--items", HELD, "-b", "none", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["evaluation"]
    assert [r["policy"] for r in rows] == ["full", "policy", "no-video"]
    assert main(["eval", "frame-local/2", "--items", HELD, "-b", "none"]) == 0
    assert "one point of the full model's accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["prune", "--items", "nowhere.jsonl"], 2),
        (["prune", "--items", SIM, "-o", "policy.txt"], 2),
        (["prune", "--items", SIM, "--finer", "pixel", "-o", "x.yaml"], 2),
        (["prune", "--items", SIM, "--flips", "-1", "-o", "x.yaml"], 2),
        (["prune", "--items", SIM, "--kl", "nan", "-o", "x.yaml"], 2),
        (["eval", "no-such-policy", "--items", SIM], 2),
        (["eval", "nothing", "--items", SIM, "-b", "magic"], 2),
        (["eval", "nothing", "--items", SIM, "-b", "none", "-o", ""], 2),
    ],
)
def test_what_cannot_be_done_is_one_line(args, code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == code
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("vlab: ") and "Traceback" not in "".join(said)


def test_pictures_of_a_policy(planted):
    model, readies = planted
    policy = presets.video_exit(2, 4)
    units, live = unit_map(policy, model, readies[0]), liveness(policy, model, readies[0])
    assert units.select(pathway="video->last").values.tolist() == [1, 1, 0, 0]
    assert units.select(pathway="option->last").values.tolist() == [1, 1, 1, 1]
    assert live.select(role="video").values.tolist() == [
        1,
        0,
        0,
        0,
    ]  # what layer 2 makes of them nobody reads
    assert (
        live.select(role="question").values.tolist() == [1, 1, 1, 0] and live.select(role="last").values.all()
    )
    assert figure_spec(units).kind == figure_spec(live, kind="heat").kind == "heat"


def test_calibrating_on_what_is_held_out_is_refused(planted):
    model, _ = planted
    with pytest.raises(UsageError, match="both for calibration and held out"):
        prune(model, questions(2, 0), questions(3, 0))


def test_evidence_is_written_into_the_policy(planted):
    model, readies = planted
    found = prune(
        model,
        readies[:2],
        questions(2, 9),
        budget={"flips": 0.8},
        finer=(),
        baselines="none",
        show_progress=False,
    )
    told = found.policy.evidence
    assert (told.acc_full, told.acc_policy, told.flips) == (1.0, 1.0, 0.0)
    assert told.holdout is not None and told.holdout.startswith("2 items, ")
    assert found.evaluation is not None and proven(found.policy, found.evaluation).evidence == told
    bare = search(model, readies[:2], budget={"flips": 0.8}, finer=(), show_progress=False)
    assert bare.policy.id == found.policy.id


def test_the_benches_items_are_disjoint():
    taken = calibration(["moving_direction"], 4, 0)
    held = holdout(["moving_direction"], 6, taken)
    assert len(taken) == 4 and len(held) == 6
    assert [i.id for i in holdout(["moving_direction"], 6, held[:2])] == [i.id for i in held[2:]]


def test_the_materialise_bench_measures_what_it_predicts():
    shape = models.Shape(
        d=32, mlp=64, layers=3, heads=2, kv_heads=1, tower_d=16, tower_mlp=16, side=32, patch=4
    )
    found = measure(shape, 2, 1, "cpu")
    for name in ("exit at two thirds", "exit, frames on their own"):
        row = found[name]
        assert row["same_token"] and row["max_difference"] < 1e-4
        assert row["kv"]["measured"] == row["kv"]["predicted"] < row["kv"]["full"]
