"""Search returns what was planted; its journal, budgets, scopes and warm start do what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lab.edges.budget import Asked, Budget
from lab.edges.found import ladder, unit_of
from lab.edges.knapsack import culprit
from lab.edges.pathways import cut_mask
from lab.edges.policy import Policy
from lab.edges.searcher import MEASURES, Searcher
from lab.edges.searching import search
from lab.edges.trials import Reader, Trials
from lab.edges.units import Unit, split, units_of
from lab.edges.warm import predicted
from lab.errors import ConfigError, UsageError
from lab.result import Result
from lab.runs import Cancel
from lab.sim.planted import TRUTH, planted_model, questions

N = 4
LOOSE = {"flips": 0.6}  # four items without a flip show no more than that
QUICK = {"budget": {"flips": 0.8}, "finer": (), "show_progress": False}  # of two items, whole pairs only


@pytest.fixture(scope="module")
def planted():
    made = {}

    def get(variant):
        if variant not in made:
            model = planted_model(variant)
            drawn = questions(20, 0)
            # one for each right letter: with fewer, some of what is planted would not matter
            chosen = [next(q for q in drawn if q.answer == i) for i in range(N)]
            made[variant] = model, [model.prepare(q) for q in chosen]
        return made[variant]

    return get


@pytest.fixture(scope="module")
def found(planted):
    made = {}

    def get(variant):
        if variant not in made:
            model, readies = planted(variant)
            finer = ("option", "head") if variant == "plain" else ("option",)
            made[variant] = search(model, readies, budget=LOOSE, finer=finer, show_progress=False)
        return made[variant]

    return get


def share_cut(policy, ready, edge):
    """Share of an edge's pairs that the policy cuts in the edge's heads; None if the prompt has none of them."""
    pair = cut_mask(ready.tokens, edge.pathway)
    if not pair.any():
        return None
    mask = policy.masks(ready.tokens, 4, 4).get(edge.layer, torch.zeros_like(pair))
    heads = mask if mask.ndim == 3 else mask[None].expand(4, -1, -1)
    return float(heads[list(edge.heads)][:, pair].float().mean())


@pytest.mark.parametrize("variant", TRUTH)
def test_exactly_the_planted_set_is_kept(planted, found, variant):
    (_, readies), (policy, trail), truth = planted(variant), found(variant), TRUTH[variant]
    assert all(share_cut(policy, readies[0], e) == 0 for e in truth.matters)
    assert all(share_cut(policy, readies[0], e) in (1, None) for e in truth.irrelevant())
    assert all(share_cut(policy, readies[0], e) == 1 for e in truth.decoys)
    routes = [[share_cut(policy, readies[0], e) for e in route] for route in truth.redundant]
    assert sorted(routes) == ([[0, 0], [1, 1]] if truth.redundant else [])
    assert variant != "plain" or all(len(unit_of(row).heads) == 1 for row in trail.notes["kept"])
    assert trail.notes["complete"] and trail.notes["forwards_per_item"] < 20


def test_the_template_leak_is_seen(planted, found):
    kept = {unit_of(row).edges for row in found("leak").trail.notes["kept"]}
    assert ("last", "template", "") in kept and not any(k[:2] == ("last", "option") for k in kept)


def test_effects_are_those_of_the_model_itself(planted, found):
    model, readies = planted("plain")
    policy, trail = found("plain")
    read = Reader(model)
    for i, ready in enumerate(readies):
        clean = read(model(ready)[0, -1], ready.item)
        cut = read(model(ready, policy=policy)[0, -1], ready.item)
        assert clean.kl(cut) == pytest.approx(trail.notes["effect"]["kl"][i], abs=1e-6)
        assert clean.choice == cut.choice


def test_early_given_up_trials_would_have_failed(planted):
    """The limit can only be passed further: a trial given up is one that fails in full."""
    model, readies = planted("plain")
    trials = Trials(model, readies)
    bad = [u for u in units_of([readies[0].tokens], 4) if (u.layer, u.q, u.k) == (2, "last", "option")]
    part = trials.effect(bad, lambda e: np.nansum(e.kl) > 0.02 * N)
    whole = trials.effect(bad)
    assert not part.whole and whole.mean_kl > 0.02
    seen = part.seen
    np.testing.assert_allclose(part.kl[seen], whole.kl[seen], atol=1e-9)


def test_the_trail_ends_at_the_policy(planted, found):
    (_, readies), (policy, trail) = planted("plain"), found("plain")
    assert trail.axes == ("step", "measure") and trail.coords["measure"] == list(MEASURES)
    kept = policy.count(readies[0].tokens, 4, 4).kept_fraction
    assert trail.values[-1][MEASURES.index("kept")] == pytest.approx(kept, abs=1e-6)
    assert policy.count_.kept_paper == pytest.approx(kept, abs=1e-4)
    shares = [p.count(readies[0].tokens, 4, 4).kept_fraction for p in ladder(policy, trail)]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.01
    assert Policy.from_dict(policy.to_dict()).id == policy.id


def test_interrupted_and_continued_it_is_the_same_search(planted, tmp_path):
    model, readies = planted("redundant")
    once = search(model, readies[:2], **QUICK)
    cancel, seen = Cancel(), []
    real = Trials.effect

    def counting(self, *a, **kw):
        seen.append(1)
        if len(seen) == 15:
            cancel.set()
        return real(self, *a, **kw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trials, "effect", counting)
        half = search(model, readies[:2], out=tmp_path, cancel=cancel, **QUICK)
        assert not half.trail.notes["complete"] and half.trail.notes["stopped"] == "interrupted"
        assert all(model.answer(r).index == model.answer(r, policy=half.policy).index for r in readies[:2])
        whole = search(model, readies[:2], out=tmp_path, **QUICK)
    assert len(seen) == len(whole.trail.coords["step"])  # nothing was measured twice
    assert whole.policy.id == once.policy.id and whole.trail.notes["cut"] == once.trail.notes["cut"]
    # clean runs were made twice, so the forwards differ; nothing else does
    np.testing.assert_array_equal(whole.trail.values[:, :-1], once.trail.values[:, :-1])


@pytest.mark.parametrize("method", ["acdc", "greedy", "knapsack"])
def test_forwards_are_a_limit_never_passed(planted, method):
    model, readies = planted("plain")
    most = 7.0 if method == "knapsack" else 2.5  # scores alone take four
    budget = {"flips": 0.8, "forwards": most}
    policy, trail = search(model, readies[:2], budget=budget, method=method, show_progress=False)
    assert trail.notes["stopped"] == "forwards spent" and 1 < trail.notes["forwards_per_item"] <= most
    assert all(model.answer(r).index == model.answer(r, policy=policy).index for r in readies[:2])


def test_a_boundless_budget_cuts_what_matters_too(planted):
    model, readies = planted("plain")
    policy, _ = search(model, readies[:2], budget={"flips": 1, "kl": 1e9}, finer=(), show_progress=False)
    assert share_cut(policy, readies[0], TRUTH["plain"].matters[0]) == 1


def test_contiguous_layers(planted):
    model, readies = planted("decoy")
    policy, trail = search(model, readies[:2], layers="contiguous", **QUICK)
    kept: dict[tuple[str, str, str], list[int]] = {}
    for u in (unit_of(row) for row in trail.notes["kept"]):
        kept.setdefault(u.edges, []).append(u.layer)
    assert kept and all(
        sorted(layers) == list(range(min(layers), max(layers) + 1)) for layers in kept.values()
    )
    assert all(share_cut(policy, readies[0], e) == 0 for e in TRUTH["decoy"].matters)


def test_greedy_keeps_the_answers_too(planted):
    model, readies = planted("plain")
    policy, _ = search(model, readies[:2], method="greedy", **QUICK)
    assert all(share_cut(policy, readies[0], e) == 0 for e in TRUTH["plain"].matters)
    assert policy.count(readies[0].tokens, 4, 4).kept_fraction < 0.2


@pytest.mark.parametrize(("variant", "forwards"), [("plain", 80), ("redundant", 80), ("leak", 1e4)])
def test_units_of_all_layers_keep_what_was_planted(planted, variant, forwards):
    """Ordered by scores, or, where forwards allow, by exact effects: the set that is found layer by layer too."""
    (model, readies), truth = planted(variant), TRUTH[variant]
    budget, finer = LOOSE | {"forwards": forwards}, ("head",) if variant == "plain" else ()
    policy, trail = search(model, readies, budget=budget, method="knapsack", finer=finer, show_progress=False)
    assert all(share_cut(policy, readies[0], e) == 0 for e in truth.matters)
    idle = [e for e in truth.irrelevant() if not ({"option"} >= set(map(_base, e.pathway.split("->"))))]
    assert all(share_cut(policy, readies[0], e) in (1, None) for e in idle)
    routes = [[share_cut(policy, readies[0], e) for e in route] for route in truth.redundant]
    assert sorted(routes) == ([[0, 0], [1, 1]] if truth.redundant else [])
    assert trail.notes["complete"] and bool(trail.notes["relinearised"]) == (forwards == 80)


def _base(name):
    return name.partition(":")[0]


def test_single_units_on_some_samples_are_what_they_are_alone(planted):
    model, readies = planted("plain")
    trials, cut = Trials(model, readies), frozenset({Unit(3, "last", "option")})
    units = [Unit(1, "option", "video", "", (0,)), Unit(0, "video", "video"), Unit(3, "last", "video")]
    samples = trials.unsure(3)
    margins = [trials.clean(i).margin(trials.clean(i).choice) for i in range(N)]
    assert [margins[i] for i in samples] == sorted(margins)[:3]
    found = trials.alone(units, cut, samples)
    for unit, kl in zip(units, found, strict=True):
        assert trials.effect(cut | {unit}).kl[samples].mean() == pytest.approx(kl, abs=1e-9)
    assert found[0] > 0.02 and found[2] < 1e-6


def test_the_culprit_of_a_run_is_found_wherever_it_stands(planted):
    model, readies = planted("plain")
    search = Searcher(Trials(model, readies), Asked(Budget(flips=0.6)), None, None, None)
    needed = Unit(1, "option", "video")
    idle = [u for u in units_of([readies[0].tokens], 4) if u.layer == 3][:9]
    for at in (0, 4, 9):
        run = [*idle[:at], needed, *idle[at:]]
        assert not search.attempt("run", [(u,) for u in run])
        assert culprit(search, run) == needed
    assert search.attempt("idle", [(u,) for u in idle])


def test_portable_policies_name_what_any_prompt_has(planted):
    model, readies = planted("plain")
    policy, _ = search(model, readies[:2], roles="portable", **QUICK)
    names = {n for c in policy.cuts for side in (c.q, c.k) for n in side.split("+")}
    assert names <= {"text", "video", "separator", "last"} and policy.layout.template_sha is None
    assert all(model.answer(r).index == model.answer(r, policy=policy).index for r in readies[:2])


def test_scopes(planted):
    model, readies = planted("plain")
    found = search(model, readies[:2], scope="sample", budget={"flips": 0.5}, finer=(), show_progress=False)
    assert list(found) == [r.item.id for r in readies[:2]]
    assert all(f.trail.notes["caution"] for f in found.values())
    by_task = search(model, readies[:1], scope="task", budget={"flips": 0.99}, finer=(), show_progress=False)
    assert list(by_task) == ["planted"]


# ---- scores -------------------------------------------------------------------------------------------------------------


CHECKED = {"validation": {"overall": 1.0}}  # as `validate_scores` would leave them


def hand_made(readies, edges, *, items=None):
    """Scores that call these (layer, head, query, key) cells important and all others harmless."""
    names = ["template", "frame", "separator", "question", "option", "instruction", "last"]
    values = np.zeros((len(readies), 4, 4, len(names), len(names)))
    for layer, head, q, k in edges:
        values[:, layer, head, names.index(q), names.index(k)] = -5.0
    coords = {
        "item": items or [r.item.id for r in readies],
        "layer": [1, 2, 3, 4],
        "head": [0, 1, 2, 3],
        "query": names,
        "key": names,
    }
    return Result(
        values, ("item", "layer", "head", "query", "key"), coords, "logit margin", {}, notes=CHECKED
    )


CIRCUIT = [
    (0, 0, "frame", "frame"),
    (0, 1, "option", "option"),
    (1, 0, "option", "frame"),
    (2, 0, "last", "option"),
]


def test_scores_order_the_search_and_save_trials(planted):
    model, readies = planted("plain")
    cold = search(model, readies[:2], **QUICK)
    warm = search(model, readies[:2], scores=hand_made(readies[:2], CIRCUIT), **QUICK)
    assert warm.policy.id == cold.policy.id
    assert len(warm.trail.coords["step"]) < len(cold.trail.coords["step"])


def test_wrong_scores_cost_trials_not_answers(planted):
    model, readies = planted("plain")
    wrong = hand_made(readies[:2], [(3, h, "last", "frame") for h in range(4)])
    policy, _ = search(model, readies[:2], scores=wrong, **QUICK)
    assert all(share_cut(policy, readies[0], e) == 0 for e in TRUTH["plain"].matters)


def test_scores_made_anew_under_what_is_cut(planted):
    """Scores that say nothing are replaced after the first layer by real ones; the policy is the same, the cost is told."""
    model, readies = planted("plain")
    blank = hand_made(readies[:2], [])
    once = search(model, readies[:2], scores=blank, **QUICK)
    anew = search(model, readies[:2], scores=blank, relinearise=1, **QUICK)
    assert anew.policy.id == once.policy.id and once.trail.notes["relinearised"] == 0
    assert anew.trail.notes["relinearised"] == 3
    assert anew.trail.notes["forwards_per_item"] - once.trail.notes["forwards_per_item"] > 3
    for bad, said in (({"relinearise": -1}, "counts layers"), ({"relinearise": 1}, "goes with scores=")):
        with pytest.raises(UsageError, match=said):
            search(model, readies[:2], show_progress=False, **bad)


def test_unvalidated_scores_are_refused(planted):
    model, readies = planted("plain")
    unchecked = replace(hand_made(readies, CIRCUIT), notes={})
    with pytest.raises(UsageError, match="not validated"):
        search(model, readies, scores=unchecked, show_progress=False)


def test_scores_of_other_items_or_shapes_are_refused(planted):
    _, readies = planted("plain")
    with pytest.raises(UsageError, match="other items"):
        predicted(hand_made(readies, CIRCUIT, items=[f"x{i}" for i in range(N)]), readies)
    with pytest.raises(UsageError, match="axes"):
        predicted(Result(np.zeros(2), ("layer",), {"layer": [1, 2]}, "", {}), readies)


def test_scores_of_single_frames_tell_distances_apart(planted):
    _, readies = planted("plain")
    names = [f"frame:{f}" for f in range(8)]
    values = np.zeros((1, 1, 1, 8, 8))
    values[0, 0, 0, 5, 3], values[0, 0, 0, 7, 0], values[0, 0, 0, 6, 6] = -1, -2, -4
    coords = {"item": [readies[0].item.id], "layer": [1], "head": [0], "query": names, "key": names}
    guess = predicted(
        Result(values, ("item", "layer", "head", "query", "key"), coords, "", {}, notes=CHECKED), readies
    )
    parts = split(Unit(0, "video", "video"), "distance", n_heads=4, n_options=4)
    assert [guess.loss(p) for p in parts] == [4, 0, 1, 0, 2] and guess.loss(Unit(0, "video", "video")) == 7


def test_knapsack_takes_the_heaviest_that_fit(planted):
    _, readies = planted("plain")
    guess = predicted(hand_made(readies, CIRCUIT), readies)
    units = [u for u in units_of([readies[0].tokens], 4) if u.layer == 1]
    chosen = guess.knapsack(units, lambda u: 1.0)
    assert {u.edges for u in set(units) - chosen} == {("option", "video", "")}
    assert guess.loss(next(u for u in units if u.edges == ("option", "video", ""))) == 5.0


# ---- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kw", "says"),
    [
        ({"budget": {"flips": 0}}, "above 0"),
        ({"budget": {"kl": float("nan")}}, "above 0"),
        ({"budget": {"loss": 1}}, "no budget field 'loss'"),
        ({"method": "magic"}, "acdc, greedy"),
        ({"method": "knapsack", "layers": "contiguous"}, "use method='acdc'"),
        ({"finer": ("pixel",)}, "option, distance, head"),
        ({"worth": 2}, "share of all edges"),
        ({"scope": "world"}, "global, task, sample"),
        ({"layers": "some"}, "free, contiguous"),
    ],
)
def test_what_makes_no_sense_is_refused(planted, kw, says):
    model, readies = planted("plain")
    with pytest.raises(UsageError, match=says):
        search(model, readies[:1], show_progress=False, **kw)


def test_no_items_and_an_open_policy_are_refused(planted):
    model, readies = planted("plain")
    with pytest.raises(UsageError, match="nothing to do"):
        search(model, [])
    with model.pruned(Policy(cuts=())), pytest.raises(UsageError, match="outside of it"):
        search(model, readies[:1])


def test_a_journal_belongs_to_one_search(planted, tmp_path):
    model, readies = planted("plain")
    search(model, readies[:1], budget={"flips": 0.99}, finer=(), out=tmp_path, show_progress=False)
    with pytest.raises(ConfigError, match="belongs to"):
        search(model, readies[:1], budget={"flips": 0.98}, finer=(), out=tmp_path, show_progress=False)


def test_stores_that_do_not_fit_are_made_again(planted):
    model, readies = planted("plain")
    unit = units_of([readies[0].tokens], 4)[:1]
    roomy, tight = Trials(model, readies[:3]), Trials(model, readies[:3], memory=1)
    for trials in (roomy, tight):
        trials.effect(unit)
    one, two = roomy.effect(unit), tight.effect(unit)
    np.testing.assert_array_equal(one.kl, two.kl)
    assert tight.spent.forwards > roomy.spent.forwards + 1.9


def test_budget_defaults_are_the_published_ones():
    assert (Budget().kl, Budget().flips, Budget().forwards) == (0.02, 0.03, 80.0)


def test_another_process_finds_its_way_in_the_journal(planted, tmp_path, monkeypatch):
    """Sets have another order where hashes differ, as they do in every process; a finished journal answers all the same."""
    model, readies = planted("plain")
    how = {"budget": {"flips": 0.9}, "finer": (), "out": tmp_path, "show_progress": False}
    one = search(model, readies[:3], **how)
    lines = len((tmp_path / "journal.jsonl").read_text().splitlines())
    monkeypatch.setattr(Unit, "__hash__", lambda u: hash(repr(u)[::-1]))
    again = search(model, readies[:3], **how)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == lines
    assert again.policy == one.policy and np.array_equal(again.trail.values, one.trail.values)
