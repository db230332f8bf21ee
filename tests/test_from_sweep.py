"""effective(): curves become a policy. On planted circuits it keeps what is written, and finds its limit."""

import numpy as np
import pytest

from lab.edges.from_sweep import effective
from lab.edges.sweeping import sweep
from lab.errors import UsageError
from lab.result import Result
from lab.sim.planted import planted_model, questions

PATHS = ("cross-frame", "video->option", "option->last", "video->last", "question->last")


@pytest.fixture(scope="module")
def asked():
    return questions(4, seed=0)


@pytest.mark.filterwarnings("ignore::lab.errors.LabWarning")
def test_keeps_the_planted_edges_and_the_answers(asked):
    model = planted_model("plain")
    found = sweep(model, asked, PATHS, window=1, show_progress=False)
    policy = effective(found)
    assert {c.reason: c.layers for c in policy.cuts} == {
        "cross-frame": "2-4", "video->option": "1,3-4", "option->last": "1-2,4", "video->last": "1-4", "question->last": "1-4",
    }  # fmt: skip
    for item in asked:
        clean, cut = (model.answer(item, policy=p).option_probs for p in (None, policy))
        np.testing.assert_allclose(clean, cut, atol=1e-5)


@pytest.mark.filterwarnings("ignore::lab.errors.LabWarning")
def test_pathways_that_stand_in_for_each_other_are_both_cut(asked):
    """The limit its docstring states: alone, neither of two redundant routes costs anything."""
    model = planted_model("redundant")
    found = sweep(model, asked, ["option->instruction", "option->template"], window=1, show_progress=False)
    policy = effective(found)
    assert [c.layers for c in policy.cuts] == ["1-4", "1-4"]
    assert sum(bool(model.answer(i, policy=policy).correct) for i in asked) < len(asked)


def curves(values, names=("video->last where frame(k) == 1", "last->last")):
    return Result(
        np.array(values), ("pathway", "layer"), {"pathway": list(names), "layer": [1, 2, 3]}, "% change", {}
    )


def test_predicates_are_kept_and_missing_numbers_count_as_not_needed():
    policy = effective(curves([[-5.0, -4.9, np.nan], [-9.0, -9.0, -9.0]]), at_least=5)
    assert [(c.layers, c.q, c.k, c.where) for c in policy.cuts] == [("2-3", "last", "video", "frame(k) == 1")]


def test_refusals():
    with pytest.raises(UsageError, match="at_least must be above 0"):
        effective(curves([[0, 0, 0], [0, 0, 0]]), at_least=0)
    with pytest.raises(UsageError, match="sweep without names of your own"):
        effective(curves([[0, 0, 0], [0, 0, 0]], ("mine", "last->last")))
    with pytest.raises(UsageError, match="expected a sweep"):
        effective(Result(np.zeros(3), "layer", {"layer": [1, 2, 3]}, "%", {}))
