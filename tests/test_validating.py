"""Validation: the exact side is exact, good scores pass, bad ones are found out, and nothing unvalidated is taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lab.carriers import VideoQA
from lab.edges import validating
from lab.edges.agreeing import agreement, pearson, ranks, recall, same_sign, slope, spearman
from lab.edges.cells import GRAINS, Cell, Sample, cut_of, drawn, every_sample
from lab.edges.cuts import Cut
from lab.edges.dense import run_dense
from lab.edges.pairs import segments_of
from lab.edges.policy import Policy
from lab.edges.scoring import scores
from lab.edges.validating import check_validated, validate_scores
from lab.errors import UsageError
from lab.model.zoo import wrap
from lab.recipe import SimSpec, dump, from_plain, load
from lab.result import Result
from lab.sim.planted import planted_model, questions
from lab.sim.tasks import draw_items
from probes.scores import ScoresRecipe, edge_scores, unit_map
from tests import edgecases, families

QUIET = {"show_progress": False}
FEW = {"n": 24, "subsets": 4, "windows": 2, **QUIET}


@pytest.fixture(scope="module")
def planted():
    made = {}

    def get(variant):
        if variant not in made:
            model = planted_model(variant)
            ready = [model.prepare(q) for q in questions(3, seed=4)]
            made[variant] = model, ready, scores(model, ready, **QUIET)
        return made[variant]

    return get


@pytest.fixture(scope="module")
def small():
    """An fp64 model of two prompts, and their scores."""
    model = wrap(edgecases.exact(families.build("internvl")))
    ready = [model.prepare_inputs(**edgecases.inputs("internvl", torch.float64, seed=s)) for s in (0, 5)]
    return model, ready, scores(model, ready, **QUIET)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_agreement_by_hand():
    a, b = np.array([1.0, 2.0, 2.0, 5.0]), np.array([2.0, 4.0, 5.0, 1.0])
    assert ranks(a).tolist() == [0.0, 1.5, 1.5, 3.0]
    assert spearman(a, b) == pytest.approx(np.corrcoef([0, 1.5, 1.5, 3], [1, 2, 3, 0])[0, 1])
    assert (
        pearson(a, a) == pytest.approx(1.0)
        and pearson(a, np.ones(4)) is None
        and pearson(a[:2], b[:2]) is None
    )
    assert slope(a, 3 * a) == pytest.approx(3.0) and slope(0 * a, a) is None
    assert same_sign(np.array([1.0, -1.0, 1.0]), np.array([2.0, 2.0, 1e-9]), 0.1) == 0.5
    assert same_sign(a, 0 * a, 0.1) is None
    exact, predicted = np.array([9.0, -8.0, 1, 1, 1, 1]), np.array([0.0, 5, 4, 3, 2, 1])
    assert (
        recall(predicted, exact, 1) == 0.0 and recall(predicted, exact, 2) == 0.5 and recall(a, b, 0) is None
    )
    found = agreement(np.array([1.0, np.nan, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 4.0]), 0.0)
    assert found["n"] == 3 and found["pearson"] == pytest.approx(1.0) and found["same_sign"] == 1.0


def test_cells_are_the_edges_they_name(small):
    model, ready, found = small
    at = segments_of(ready[0].tokens, "strict")
    n = ready[0].n_pos
    cuts = cut_of([Cell(1, None, "last", "frame:0"), Cell(3, 2, "frame:1", "frame:1")], at, n, 4)
    assert set(cuts) == {1, 3} and cuts[1].shape == (n, n) and cuts[3].shape == (4, n, n)
    assert cuts[1].nonzero()[:, 0].unique().tolist() == [n - 1] and int(cuts[1].sum()) == len(at["frame:0"])
    inside = len(at["frame:1"])
    assert cuts[3].sum((1, 2)).tolist() == [0, 0, inside * (inside + 1) // 2, 0]
    kinds = {s.pair: s for s in every_sample(found, "whole kind") if s.layer == 0}
    frames = kinds["frame->frame"]
    assert len(frames.cells) == 6 and all(c.pair == "frame->frame" for c in frames.cells)
    told = sum(
        found.values[:, 0, :, found.coords["query"].index(c.query), found.coords["key"].index(c.key)].sum(1)
        for c in frames.cells
    )
    assert np.allclose(frames.predicted(found), told) and frames.size == pytest.approx(np.abs(told).mean())


def test_samples_come_from_every_stratum(small):
    _, _, found = small
    dice = np.random.default_rng(0)
    every = every_sample(found, "single head")
    some = drawn(every, 60, 5, dice)
    assert len(set(some)) == 60 and len({s.pair for s in some}) == len({s.pair for s in every})
    assert {s.layer * 3 // 5 for s in some} == {0, 1, 2}
    deciles = np.searchsorted(
        np.quantile([s.size for s in every], np.arange(0.1, 1, 0.1)), [s.size for s in some]
    )
    assert set(deciles.tolist()) == set(range(10))
    assert len(drawn(every, 10**6, 5, dice)) == len(every)


# ---- the report -----------------------------------------------------------------------------------------------------


def test_exact_effects_are_those_of_full_forwards(small, monkeypatch):
    """Every set that was cut, cut again the obvious way."""
    model, ready, found = small
    seen, measured = [], validating._measured

    def spied(model, case, asked, *rest):
        seen.append((case, asked, measured(model, case, asked, *rest)))
        return seen[-1][2]

    monkeypatch.setattr(validating, "_measured", spied)
    report = validate_scores(model, ready, found, **FEW).notes["validation"]
    assert report["n_cells"] == 24 and report["n_items"] == 2 and set(report["grains"]) == set(GRAINS)
    for case, asked, exact in seen:
        at, n = case.world.segments, case.world.ready.n_pos
        clean = run_dense(model, case.world.ready, {})[0, -1]
        a, b = clean.topk(2).indices.tolist()
        for cells, change in zip(asked.single, exact.single, strict=True):
            logits = run_dense(model, case.world.ready, cut_of(cells, at, n, 4))[0, -1]
            assert float(logits[a] - logits[b]) - float(clean[a] - clean[b]) == pytest.approx(
                change, abs=1e-10
            )
    assert report["ledger"]["forwards"] < report["ledger"]["naive"] and report["overall"]["spearman"] > 0.5


def test_a_planted_circuit_validates(planted):
    model, ready, found = planted("plain")
    validated = validate_scores(model, ready, found, **FEW)
    report = validated.notes["validation"]
    assert report["recall_at_2k"] == 1.0 and report["measurable"]["pearson"] > 0.9
    assert report["grains"]["single head"]["pearson"] > 0.9 and report["overall"]["same_sign"] == 1.0
    assert report["additivity"]["windows"] == 2 and report["negligible"]["subsets"] == 4
    assert np.array_equal(validated.values, found.values) and "validation" not in found.notes
    assert all(w["spearman"] < 0.8 and w["why"] for w in report["weak"])
    check_validated(validated)
    check_validated(validated, alone=True)


def test_scores_that_mean_nothing_are_found_out(planted):
    """The same table, its cells exchanged."""
    model, ready, found = planted("plain")
    dice = np.random.default_rng(1)
    size = found.values[0].size
    mixed = found.values.reshape(len(ready), -1)[:, dice.permutation(size)].reshape(found.shape)
    report = validate_scores(model, ready, replace(found, values=mixed), **{**FEW, "n": 60}).notes[
        "validation"
    ]
    assert abs(report["overall"]["pearson"] or 0.0) < 0.3 and report["negligible"]["largest"] > 1.0
    with pytest.raises(UsageError, match="90% are needed"):
        check_validated(
            replace(found, notes={**found.notes, "validation": {**report, "recall_at_2k": 0.5}}), alone=True
        )


def test_redundancy_is_what_the_subsets_find(planted):
    """Both relays score 0 one by one; random subsets of what scores nothing cut both of them now and then."""
    model, ready, found = planted("redundant")
    report = validate_scores(model, ready, found, n=3, subsets=12, windows=0, **QUIET).notes["validation"]
    assert report["negligible"]["largest"] > 5.0 and report["negligible"]["flips"] > 0
    assert report["negligible"]["flips"] < report["negligible"]["flips_below"] <= 1.0
    assert (
        report["negligible"]["unseen"] == pytest.approx(1 - 0.05 ** (1 / 12))
        and report["additivity"]["windows"] == 0
    )


def test_under_a_policy_the_rest_is_cut_on_top(small):
    model, ready, _ = small
    policy = Policy(cuts=[Cut(layers="1-2", q="last", k="video")])
    found = scores(model, ready, policy=policy, **QUIET)
    report = validate_scores(model, ready, found, **FEW).notes["validation"]
    assert report["overall"]["spearman"] > 0.5
    with pytest.raises(UsageError, match="clean metric is"):
        validate_scores(model, ready, replace(found, notes={**found.notes, "policy": None}), **FEW)


def test_what_cannot_be_validated_says_so(small, planted):
    model, ready, found = small
    other = model.prepare_inputs(**edgecases.inputs("internvl", torch.float64, seed=9))
    with pytest.raises(UsageError, match="score these again"):
        validate_scores(model, [other], found, **FEW)
    _, strangers, _ = planted("plain")
    with pytest.raises(UsageError, match="none of the 2 items"):
        validate_scores(planted("plain")[0], strangers[:1], found, **FEW)
    with pytest.raises(UsageError, match="expected the scores of lab.edges.scores"):
        validate_scores(model, ready, found.mean("item"), **FEW)
    with pytest.raises(UsageError, match="at least 2 cells"):
        validate_scores(model, ready, found, n=0, **QUIET)
    with pytest.raises(UsageError, match="nothing to hold against"):
        validate_scores(model, ready, replace(found, values=0 * found.values), **FEW)
    with pytest.raises(UsageError, match="give the same one as metric="):
        validate_scores(model, ready, replace(found, notes={**found.notes, "metric": "function"}), **FEW)
    with pytest.raises(UsageError, match="not validated"):
        check_validated(found)
    with pytest.raises(UsageError, match="not validated"):
        check_validated(replace(found, notes={"validation": "yes"}))


def test_the_report_is_stored_beside_the_scores(small, tmp_path):
    model, ready, found = small
    validated = validate_scores(model, ready, found, **FEW)
    again = Result.load(validated.save(tmp_path / "scores.npz"))
    assert again.same(validated)
    check_validated(again)
    assert validate_scores(model, ready, found, **FEW).same(validated), "the same seed draws the same cells"


# ---- the probe ------------------------------------------------------------------------------------------------------


def test_the_unit_map_adds_up_heads_frames_and_options(planted):
    _, _, found = planted("plain")
    kinds, every = unit_map(found), unit_map(found, by="segment")
    assert kinds.axes == ("item", "pair", "layer") and "last->option" in kinds.notes["left_out"]
    whole = np.nansum(found.values, (2, 3, 4))
    assert np.allclose(kinds.values.sum(1), whole) and np.allclose(every.values.sum(1), whole)
    one = found.select(query="last", key="option:2").values.sum(2)
    assert np.allclose(every.select(pair="option:2->last").values, one)
    options = found.select(query="last", key=[f"option:{i}" for i in range(4)]).values.sum((2, 3))
    assert np.allclose(kinds.select(pair="option->last").values, options)
    for wrong, said in [({"by": "head"}, "use 'kind'"), ({"result": kinds}, "expected the scores")]:
        with pytest.raises(UsageError, match=said):
            unit_map(**{"result": found, **wrong})


def test_the_recipe_gives_the_same_scores(tmp_path):
    model, recipe = (
        planted_model("plain"),
        ScoresRecipe(items=SimSpec(sim="moving_direction", n=2, seed=1), cells=6),
    )
    dump(recipe, tmp_path / "scores.yaml")
    (found,) = load(tmp_path / "scores.yaml").run(progress=False, model=model)
    asked = draw_items("moving_direction", 2, 1)
    direct = edge_scores(model, asked, cells=6, **QUIET)
    assert (
        np.array_equal(found.values, direct.values) and found.recipe == recipe.plain() and not direct.recipe
    )
    check_validated(found)
    with pytest.raises(UsageError, match="not validated"):
        check_validated(edge_scores(model, asked[:1], cells=0, **QUIET))


def test_items_that_can_be_named_again_give_a_recipe(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(folder / f"{i}.png")
    model = planted_model("plain")
    model.spec = {"name": "tiny"}
    item = VideoQA(str(folder), "Which way?", ("left", "right"), 0)
    found = edge_scores(model, model.prepare(item, 3), cells=0, **QUIET)
    recipe = from_plain(found.recipe)
    assert isinstance(recipe, ScoresRecipe) and recipe.items[0].video.n_frames == 3 and recipe.cells == 0
    (again,) = recipe.run(progress=False, model=model)
    assert again.same(found) and found.coords["key"].count("frame:2") == 1


def test_samples_of_nothing_are_nan(small):
    _, _, found = small
    gone = replace(found, values=np.full_like(found.values, np.nan))
    assert np.isnan(Sample((Cell(0, None, "last", "frame:0"),), "all heads", 0.0).predicted(gone)).all()
