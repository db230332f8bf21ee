"""Evidence: answers are the model's own under each policy, differences are paired, baselines are all there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lab.edges import presets
from lab.edges.curves import areas, curve_of, envelope
from lab.edges.cuts import Cut
from lab.edges.evidence import evaluate, kept_video, overlap, video_key
from lab.edges.layouts import plain_map
from lab.edges.policy import Policy
from lab.edges.rivals import FULL, MINE, NO_VIDEO, SHUFFLED
from lab.edges.unit_mass import mass_of, most_attended
from lab.edges.units import Unit
from lab.errors import UsageError
from lab.sim.planted import planted_model, questions
from lab.view.specs import figure_spec

CIRCUIT = (  # what the planted model needs, as the only edges kept
    Cut(layers="1", heads=[0], q="video", k="video"), Cut(layers="1", heads=[1], q="option", k="option"),
    Cut(layers="2", heads=[0], q="option", k="video"), Cut(layers="3", heads=[0], q="last", k="option"),
)  # fmt: skip


@pytest.fixture(scope="module")
def decoy():
    return planted_model("decoy")


@pytest.fixture(scope="module")
def needed():
    return Policy(default="cut", cuts=CIRCUIT)


@pytest.fixture(scope="module")
def told(decoy, needed):
    return evaluate(decoy, needed, questions(4, 3), show_progress=False)


def value(told, policy, measure, task="all"):
    return float(told.select(policy=policy, task=task, measure=measure).values)


def test_every_baseline_is_in_the_table(told):
    names = set(told.coords["policy"])
    papers = {f"{flow}/{style}" for flow in presets.FLOWS for style in presets.STYLES}
    exits = {f"video-exit/{i}" for i in (1, 2, 3)} | {f"frame-local/{k}" for k in (1, 2, 3, 4)}
    assert (
        papers | exits | {FULL, MINE, NO_VIDEO, SHUFFLED, "random-pairs", "random-pairs/7b", "attention-mass"}
        <= names
    )
    assert {"7b/strict layer-permuted", "layer-permuted", "composition-matched"} <= names


def test_the_needed_edges_keep_the_answers_and_mass_is_fooled(told):
    assert (
        value(told, MINE, "flips") == 0
        and value(told, MINE, "kl") < 1e-9
        and value(told, MINE, "kept") < 0.05
    )
    assert value(told, "attention-mass", "kept") <= value(told, MINE, "kept")
    assert value(told, "attention-mass", "kl") > 0.5 > value(told, MINE, "kl")
    assert value(told, NO_VIDEO, "kept_video") == 0 and value(told, NO_VIDEO, "kl") > 0.5
    assert value(told, SHUFFLED, "kl") > 0.1


def test_no_difference_is_bounded_not_certain(told):
    assert (
        value(told, MINE, "drop") == 0 and 0.3 < value(told, MINE, "drop_bound") < 0.7
    )  # of at most four videos
    row = told.select(
        policy=FULL, task="all", measure=["drop", "drop_bound", "flips", "flips_bound", "kl", "kl_bound"]
    )
    assert not row.values.any()


def test_excess_is_over_the_best_exit(told, decoy, needed):
    ready = decoy.prepare(questions(1, 3)[0])
    best = presets.named(told.notes["best_exit"], 4)
    more = needed.count(ready.tokens, 4, 4).kept_video / 4 - best.count(ready.tokens, 4, 4).kept_video / 4
    assert told.notes["best_exit"] == "video-exit/2" and value(
        told, MINE, "excess_over_exit"
    ) == pytest.approx(more)


def test_choices_are_the_models_own_under_the_policy(decoy):
    items = questions(3, 8)
    policy = presets.frame_local(4, 4)
    told = evaluate(decoy, policy, items, "none", show_progress=False)
    own = [decoy.answer(i, policy=policy).index for i in items]
    assert told.notes["answers"][MINE] == own
    assert value(told, MINE, "accuracy") == np.mean([a == i.answer for a, i in zip(own, items, strict=True)])


def test_cutting_nothing_changes_nothing(decoy):
    told = evaluate(decoy, presets.nothing(), questions(2, 1), "none", show_progress=False)
    assert not told.select(policy=MINE, task="all", measure=["drop", "flips", "kl", "margin"]).values.any()
    assert value(told, MINE, "kept") == 1


def test_it_goes_on_where_it_stopped(decoy, needed, tmp_path):
    items = questions(3, 5)
    first = evaluate(decoy, needed, items, "none", out=tmp_path, show_progress=False)
    calls = decoy.tower_calls
    again = evaluate(decoy, needed, items, "none", out=tmp_path, show_progress=False)
    assert np.array_equal(first.values, again.values, equal_nan=True) and decoy.tower_calls == calls


def test_tasks_have_rows_of_their_own(decoy, needed):
    from dataclasses import replace

    items = [replace(q, task=t) for q, t in zip(questions(3, 2), "aab", strict=True)]
    told = evaluate(decoy, needed, items, {"exit": presets.video_exit(1, 4)}, show_progress=False)
    assert told.coords["task"] == ["all", "a", "b"]
    each = [value(told, "exit", "accuracy", t) for t in ("all", "a", "b")]
    assert each[0] == pytest.approx((2 * each[1] + each[2]) / 3)


def test_the_same_video_is_one_group():
    a, b = questions(2, 0)
    assert video_key(a) == video_key(questions(1, 0)[0]) != video_key(b)
    assert video_key(a) != video_key(a.twin)


def test_mass_is_a_share_of_attention(decoy):
    ready = decoy.prepare(questions(1, 0)[0])
    units = [
        Unit(2, "last", k, heads=(2,))
        for k in ("video", "template", "separator", "question", "option", "instruction", "last")
    ]
    mass = mass_of(decoy, [ready], units)
    assert sum(mass.values()) == pytest.approx(1, abs=1e-5)
    assert mass[units[0]] > 0.99  # the decoy
    assert most_attended(decoy, [ready], 1.0).cuts == ()


def test_kept_video_by_hand():
    tokens = plain_map(system=1, frames=2, per_frame=1, question=1, template=1)  # s f f q l
    cut = torch.zeros(5, 5, dtype=torch.bool)
    cut[2, 1] = cut[3, 0] = (
        True  # one of the 2 + 3 + 2 + 2 edges that touch a video token, and one that does not
    )
    touching = 9
    assert kept_video({0: cut}, tokens, 2) == pytest.approx(1 - 1 / (2 * touching))
    assert kept_video(
        {0: cut.expand(4, 5, 5) & (torch.arange(4) < 2)[:, None, None]}, tokens, 2
    ) == pytest.approx(1 - 0.5 / 18)


def test_overlap_by_hand():
    tokens = plain_map(system=1, frames=1, per_frame=1, question=0, template=1)  # s f l: 6 edges
    a = Policy(cuts=(Cut(q="last", k="system"),))
    b = Policy(cuts=(Cut(q="last", k="video"),))
    values = overlap({"a": a, "b": b, "a2": a}, tokens, 1, 1).values
    assert values.tolist() == [
        [1, pytest.approx(4 / 6), 1],
        [pytest.approx(4 / 6), 1, pytest.approx(4 / 6)],
        [1, pytest.approx(4 / 6), 1],
    ]
    with pytest.raises(UsageError, match="at least 2"):
        overlap({"a": a}, tokens, 1, 1)


def test_envelope_and_areas_by_hand():
    assert envelope([0.1, 0.5, 0.3], [0.4, 0.8, 0.9], [0.05, 0.2, 0.4, 1.0])[1:] == [0.4, 0.9, 0.9]
    found = areas(
        ["full", "exit", "search", "search"], np.array([1, 0.0, 0.5, 0.25]), np.array([1.0, 0.25, 1.0, 0.25])
    )
    assert found["none"] == 0.25 and found["curves"]["search"]["cpr"] == pytest.approx(0.5, abs=0.01)
    assert found["curves"]["exit"]["cmd"] == pytest.approx(1.0, abs=0.01)


def test_the_curve_draws(told):
    curve = curve_of(told)
    assert figure_spec(curve).kind == "lines" and "search" in curve.coords["policy"]


@pytest.mark.parametrize(
    ("kw", "says"),
    [
        ({"baselines": "magic"}, "no baselines 'magic'"),
        ({"baselines": {"full": presets.nothing()}}, "stands twice"),
    ],
)
def test_refusals(decoy, needed, kw, says):
    with pytest.raises(UsageError, match=says):
        evaluate(decoy, needed, questions(1, 0), show_progress=False, **kw)


def test_items_without_answers_are_refused(decoy, needed):
    from dataclasses import replace

    bare = replace(questions(1, 0)[0], answer=None)
    with pytest.raises(UsageError, match="right one"):
        evaluate(decoy, needed, [bare], "none", show_progress=False)
    with pytest.raises(UsageError, match="nothing to do"):
        evaluate(decoy, needed, [], "none", show_progress=False)
