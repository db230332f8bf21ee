"""The patching probe: planted circuits light up exactly, nulls stay dark, interrupted grids go on."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import pytest

from lab.edges.policy import Policy
from lab.errors import LabWarning, UsageError
from lab.model.zoo import load
from lab.runs import Cancel, Cancelled
from lab.sim.planted import planted_model, questions
from lab.sim.tasks import draw_items
from probes import patching as probe
from probes.patching import PatchingRecipe, attribution_patching, patching, path_patching
from tests.families import FAMILIES, inputs
from tests.test_patch import model_of, two

quiet = functools.partial(patching, show_progress=False)


@functools.cache
def planted(variant: Any = "plain") -> Any:
    return planted_model(variant)


ITEMS = questions(2, seed=4)


@pytest.mark.parametrize("executor", ["fast", "reference"])
def test_the_grid_lights_exactly_the_planted_cells(executor: str) -> None:
    """The stream: video before layers 1 and 2, options before 3, last before 4; heads: the one head of layers 1-3."""
    roles = quiet(planted(), ITEMS, by="role", executor=executor)
    lit = {(r["layer"], r["role"]) for r in roles.tidy() if abs(r["value"]) > 1e-3}
    assert lit == {(1, "frame"), (2, "frame"), (3, "option"), (4, "last")}
    whole = [roles.select(layer=layer, role=role).values for layer, role in lit]
    assert np.abs(np.array(whole) - 1).max() <= 1e-4, "and each carries all of it"
    heads = quiet(planted(), ITEMS, by="head", site="z", executor=executor)
    assert {(r["layer"], r["head"]) for r in heads.tidy() if abs(r["value"]) > 1e-3} == {
        (1, 0),
        (2, 0),
        (3, 0),
    }


def test_relays_of_the_other_variants() -> None:
    leak = quiet(planted("leak"), ITEMS[0], by=["option", "template", "last"])
    assert leak.values.shape == (1, 4, 3)
    assert np.abs(leak.values[0] - [[0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]]).max() <= 1e-3
    decoy = quiet(planted("decoy"), ITEMS[0], by="head", site="z", role="last")
    assert decoy.values[0, 2, 0] > 0.99 and abs(decoy.values[0, 2, 2]) <= 1e-5, (
        "the decoy's head carries nothing"
    )


def test_into_the_clean_run_and_flips() -> None:
    into = quiet(planted(), ITEMS, by="role", into="clean", metric="flip")
    assert into.select(layer=3, role="option").values.tolist() == [1.0, 1.0] and into.values.sum() == 2 * 4
    prob = quiet(planted(), ITEMS[0], by="role", metric="probability").select(layer=4, role="last").values
    assert prob[0] > 0.9
    diff = quiet(planted(), ITEMS[0], by="role", metric="logit_diff").select(layer=1, role="question").values
    notes = quiet(planted(), ITEMS[0]).notes["worlds"][ITEMS[0].id]
    assert (
        abs(diff[0] - notes["score"]["corrupted"]) <= 1e-3
        and notes["answers"]["clean"] != notes["answers"]["corrupted"]
    )


def test_a_policy_that_cuts_the_circuit_leaves_nothing_to_restore() -> None:
    cut = Policy.from_dict({"format": "edge-policy/1", "cuts": [{"layers": "3", "q": "last", "k": "video"}]})
    same = quiet(planted(), ITEMS[0], policy=cut)
    assert (
        np.abs(same.values - quiet(planted(), ITEMS[0]).values).max() <= 1e-5
        and same.notes["fallbacks"] == []
    )
    cut = Policy.from_dict(
        {"format": "edge-policy/1", "cuts": [{"layers": "2", "heads": [0], "q": "option", "k": "video"}]}
    )
    gone = quiet(planted(), ITEMS[0], policy=cut, metric="probability")
    assert np.ptp(gone.values) <= 1e-4
    with planted().pruned(cut):
        assert np.array_equal(quiet(planted(), ITEMS[0], metric="probability").values, gone.values)


def test_paths() -> None:
    found = path_patching(
        planted(), ITEMS[0], ["video->option", "option->last", "video->last"], show_progress=False
    )
    assert found.axes == ("item", "path", "layer")
    assert np.abs(found.values[0] - [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).max() <= 1e-4
    where = path_patching(planted(), ITEMS[0], ["option->last"], via="k", head=0, show_progress=False).values[
        0, 0
    ]
    assert where[2] > 0.1 and np.abs(where[[0, 1, 3]]).max() <= 1e-5
    for bad, said in ((["video"], "'sender->receiver'"), (["video->lst"], "no role 'lst'"), ([], "no paths")):
        with pytest.raises(UsageError, match=said):
            path_patching(planted(), ITEMS[0], bad, show_progress=False)


def test_attribution_patching_says_how_wrong_it_is() -> None:
    found = attribution_patching(planted(), ITEMS, by="role", show_progress=False)
    error = found.notes["against_exact"]
    exact = quiet(planted(), ITEMS, by="role")
    assert (
        abs(error["max_abs"] - np.abs(found.values - exact.values).max()) <= 1e-4 and error["max_abs"] > 0.1
    )
    assert abs(error["pearson"] - np.corrcoef(found.values.ravel(), exact.values.ravel())[0, 1]) <= 1e-4
    lit = {(r["layer"], r["role"]) for r in found.tidy() if abs(r["value"]) > 1e-3}
    assert lit == {(1, "frame"), (2, "frame"), (3, "option"), (4, "last")}
    with pytest.raises(UsageError, match="no gradient"):
        attribution_patching(planted(), ITEMS, metric="flip", show_progress=False)


def test_more_steps_estimate_better_where_one_end_is_flat() -> None:
    """The planted heads are near one-hot: at one end their gradient says little of the way to the other."""
    how = {"by": "role", "metric": "logit_diff", "show_progress": False}
    one, many = (attribution_patching(planted(), ITEMS, steps=n, **how) for n in (1, 16))
    errors = [r.notes["against_exact"] for r in (one, many)]
    assert errors[1]["mean_abs"] < 0.8 * errors[0]["mean_abs"] and many.notes["steps"] == 16
    assert errors[1]["pearson"] > errors[0]["pearson"]
    with pytest.raises(UsageError, match="at least 1, got 0"):
        attribution_patching(planted(), ITEMS, steps=0, show_progress=False)
    with pytest.raises(UsageError, match="path='layers'; use one of inputs, activations"):
        attribution_patching(planted(), ITEMS, path="layers", show_progress=False)  # pyright: ignore[reportArgumentType]


@functools.cache
def on_tiny(by: str, steps: int, path: Any = "inputs") -> Any:
    """Two questions between twins, and what was warned of."""
    items = draw_items("action_antonym", 2, 11)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = attribution_patching(
            load("tiny", device="cpu"), items, by=by, metric="logit_diff", steps=steps, path=path, into="clean",
            show_progress=False,
        )  # fmt: skip
    return found, [str(w.message) for w in said if issubclass(w.category, LabWarning)]


def test_between_twins_one_step_is_no_guide_and_says_so() -> None:
    """Finite differences of tiny bend within a tenth of the patch; along activations the roles come out nearly right."""
    found, said = on_tiny("role", 1)
    assert found.notes["against_exact"]["pearson"] < 0.5 and found.notes["passes"] == 1
    assert len(said) == 1 and "correlate only" in said[0] and "path='activations'" in said[0]
    some, none = on_tiny("role", 8)
    assert some.notes["against_exact"]["pearson"] > 0.75 and some.notes["passes"] == 8 and not none
    along, none = on_tiny("role", 8, "activations")
    error = along.notes["against_exact"]
    assert (
        error["pearson"] > 0.9 and 0.85 < error["slope"] < 1.15 and along.notes["passes"] == 64 and not none
    )
    assert error["mean_abs"] < 0.8 * some.notes["against_exact"]["mean_abs"]


def test_other_worlds_than_twins() -> None:
    for against in ("reversed", "blank", "noise", "mean"):
        found = quiet(planted(), ITEMS[0], by=["video"], against=against)
        assert found.notes["against"] == against and abs(found.values[0, 0, 0] - 1) <= 1e-4, against
    given = quiet(planted(), ITEMS[0], against=ITEMS[0].twin)
    assert np.array_equal(given.values, quiet(planted(), ITEMS[0]).values)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    model, x = model_of(name), inputs(name)
    grid = quiet(model, x, metric="logit_diff")
    assert (
        grid.axes == ("item", "layer", "frame")
        and np.isfinite(grid.values).all()
        and np.ptp(grid.values) > 1e-4
    )
    assert grid.notes["against"] == "reversed" and grid.notes["fallbacks"] == []
    slow = quiet(model, x, metric="logit_diff", executor="reference", against=two(name)["corrupted"])
    if not name.startswith("qwen") and name != "video_llama_3":  # their patches reverse by tubelet
        assert np.abs(slow.values - grid.values).max() <= 1e-4
    path = path_patching(model, x, ["video->last"], metric="logit_diff", show_progress=False)
    assert np.ptp(path.values) > 1e-6
    found = attribution_patching(model, x, metric="logit_diff", exact=False, show_progress=False)
    assert np.isfinite(found.values).all() and "against_exact" not in found.notes


def test_where_both_worlds_score_alike_there_is_no_share() -> None:
    with pytest.warns(LabWarning, match="the same answer, and 0 nats apart"):
        alike = quiet(planted(), ITEMS, by="role", against=ITEMS)
    assert np.isnan(alike.values).all() and all(
        "no share" in w["nan"] for w in alike.notes["worlds"].values()
    )
    with pytest.warns(LabWarning, match="no share"):
        some = quiet(planted(), ITEMS, by="role", against=[ITEMS[0], ITEMS[1].twin])
    assert np.isnan(some.values[0]).all() and np.isfinite(some.values[1]).all()
    assert "nan" not in some.notes["worlds"][ITEMS[1].id]
    assert np.array_equal(some.mean("item").values, some.values[1]), "the mean is over those that have one"
    diff = quiet(planted(), ITEMS, by="role", against=ITEMS, metric="logit_diff")
    assert np.ptp(diff.values, (1, 2)).max() <= 1e-5, "a difference there always is"


def test_an_interrupted_grid_goes_on(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = PatchingRecipe(
        items={"sim": "moving_direction", "n": 3, "seed": 1}, by="role", site="resid_post"
    )  # type: ignore[arg-type]
    whole = patching(
        planted(), questions(3, seed=1), by="role", site="resid_post", show_progress=False, recipe=recipe
    )
    cancel, record = Cancel(), probe.Run.record

    def and_stop(self: Any, key: str, *args: Any) -> None:
        cancel.set()
        record(self, key, *args)

    again = functools.partial(
        patching,
        planted(),
        questions(3, seed=1),
        by="role",
        site="resid_post",
        show_progress=False,
        recipe=recipe,
        out=tmp_path,
    )
    with monkeypatch.context() as m, pytest.raises(Cancelled):
        m.setattr(probe.Run, "record", and_stop)
        again(cancel=cancel)
    done: list[str] = []
    with monkeypatch.context() as m:
        m.setattr(probe.Run, "record", lambda self, key, *a: (done.append(key), record(self, key, *a))[1])
        found = again()
    assert len(done) == 2 and np.array_equal(found.values, whole.values) and found.notes == whole.notes
    assert found.recipe == recipe.plain()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"by": "frames"}, "by='frames'; use one of frame, role, head"),
        ({"by": []}, "name at least one segment"),
        ({"by": "head"}, "has no heads; use site='z'"),
        ({"site": "resid"}, "no site 'resid'"),
        ({"metric": "p"}, "metric='p'; use one of recovered"),
        ({"into": "twin"}, "patch into 'corrupted'"),
        ({"window": 0}, "at least 1 layer"),
        ({"against": "other"}, "against='other'; use one of twin"),
        ({"against": [1, 2]}, "2 worlds to compare with for 1 items"),
        ({"role": "wideo"}, "no role 'wideo'"),
        ({"out": "x"}, "a journal needs a recipe"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(how: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        quiet(planted(), ITEMS[0], **how)


def test_no_items_are_refused() -> None:
    with pytest.raises(UsageError, match="no items given"):
        quiet(planted(), [])
