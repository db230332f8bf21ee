"""Linear probes: planted truth is found, shuffled labels are chance, and videos never stand on both sides of a fold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lab.carriers import VideoQA
from lab.edges.policy import Policy
from lab.errors import UsageError
from lab.recipe import from_plain
from lab.sim.planted import planted_model, questions
from lab.sim.tasks import draw_items
from lab.slots import Plan
from probes import linear as module
from probes.fitting import Span, logistic, ridge
from probes.folds import folds_of, groups_of_items
from probes.labels import LABELS, labels_of
from probes.linear import linear
from tests.families import FAMILIES, inputs
from tests.test_slots import Filling, Shorten

QUIET: dict[str, Any] = {"show_progress": False, "shuffles": 2}


@pytest.fixture(scope="module")
def planted() -> Any:
    return planted_model(), questions(15, 0)


# ---- planted truth --------------------------------------------------------------------------------------------------


def test_direction_is_read_where_it_is_planted_and_nowhere_else(planted: Any) -> None:
    """What follows the video knows the direction from layer 2 on ("place now minus mean place"), `last` the letter from 3 on."""
    model, items = planted
    way = linear(model, items, "direction", roles=("option", "last"), folds=3, twins=True, **QUIET)
    true, random, selectivity = way.values
    assert (true[:, 1:] > 0.9).all() and (true[:, 0] < 0.5).all()
    assert (abs(random - 0.25) < 0.15).all() and np.allclose(selectivity, true - random)
    assert (way.low[0] <= true).all() and (true <= way.high[0]).all()
    letter = linear(model, items, "letter", roles="last", folds=3, twins=True, **QUIET).values[0, 0]
    assert (letter[2:] > 0.9).all() and (letter[:2] < 0.6).all()


def test_the_control_is_at_chance_whatever_can_be_read() -> None:
    x = torch.randn(400, 30, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    job = module._Job(
        list(range(400)), y, [y[torch.randperm(400, generator=torch.Generator().manual_seed(s))] for s in range(8)], ["a", "b"],
        "logistic", torch.arange(400) % 5, torch.arange(400), 0.5, 0,
    )  # fmt: skip
    (true, random, gap), low, high = job.probe(list(x[:, None]))
    assert true > 0.9 and abs(random - 0.5) < 0.05 and gap == true - random
    assert low[0] < true < high[0] and low[2] > 0.3


# ---- what is fitted -------------------------------------------------------------------------------------------------


def test_ridge_is_the_closed_form_and_finds_the_line() -> None:
    g = torch.Generator().manual_seed(0)
    x, new = (torch.randn(n, 200, generator=g, dtype=torch.double) for n in (60, 20))
    weight = torch.zeros(200, 2, dtype=torch.double)
    weight[:3] = torch.tensor([[3.0, 0], [0, 2], [1, 1]])
    span = Span.of(x)
    said = ridge(span, x @ weight, new)
    z = ((x - x.mean(0)) / x.std(0, unbiased=False)).double()
    fits = []
    for penalty in module.ridge.__globals__["PENALTIES"]:
        lam = penalty * float((span.s**2).mean())
        y = (x @ weight).double()
        w = torch.linalg.solve(z.T @ z + lam * torch.eye(200, dtype=torch.double), z.T @ (y - y.mean(0)))
        fits.append(((new - x.mean(0)) / x.std(0, unbiased=False)).double() @ w + y.mean(0))
    assert min(float((said - f).abs().max()) for f in fits) < 1e-8
    wide = torch.randn(400, 10, generator=g, dtype=torch.double)
    exact = ridge(Span.of(wide), wide @ weight[:10], new[:, :10])
    assert float((exact - (new[:, :10] @ weight[:10]).double()).abs().max()) < 0.02


def test_logistic_separates_and_ignores_what_does_not_vary() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(90, 50, generator=g)
    x[:, 7] = 3.0
    y = x[:, :3].argmax(1)
    p = logistic(Span.of(x), y, 3, x)
    assert (
        p.shape == (90, 3)
        and torch.allclose(p.sum(1), torch.ones(90).double())
        and (p.argmax(1) == y).double().mean() > 0.95
    )
    assert bool(
        logistic(Span.of(torch.ones(6, 4)), torch.tensor([0, 1] * 3), 2, torch.ones(2, 4)).isfinite().all()
    )


# ---- who stands with whom -------------------------------------------------------------------------------------------


def test_twins_and_questions_about_one_video_are_one_group(tmp_path: Any) -> None:
    a, b, c = questions(30, 3)[:3]
    again = VideoQA(a.video.copy(), "What colour is it?", ("red", "blue"), 0)
    items = [a, b, a.twin, again, None, c, None]
    groups = groups_of_items(items)
    assert groups[0] == groups[2] == groups[3] and groups[4] != groups[6]
    # a chain: x is the twin of a video that y shows
    x = replace(b, twin=None)
    y = VideoQA(np.zeros((2, 8, 8, 3), np.uint8), "?", twin=x)
    z = VideoQA(np.ones((2, 8, 8, 3), np.uint8), "?", twin=y)
    assert len(set(groups_of_items([x, z, y]))) == 1
    files = [tmp_path / n for n in ("a.bin", "b.bin", "c.bin")]
    for f, text in zip(files, ("1", "1", "2"), strict=True):
        f.write_text(text)
    same = groups_of_items([VideoQA(f, "?") for f in files])
    assert same[0] == same[1] != same[2]


def test_folds_keep_groups_whole_and_are_even() -> None:
    groups = [g for g in range(23) for _ in range(3)]
    folds = folds_of(groups, 5, 0)
    assert all(len({f for f, h in zip(folds, groups, strict=True) if h == g}) == 1 for g in groups)
    sizes = np.bincount(folds)
    assert (
        len(sizes) == 5
        and sizes.max() - sizes.min() <= 3
        and folds == folds_of(groups, 5, 0) != folds_of(groups, 5, 1)
    )
    with pytest.raises(UsageError, match="5 folds need as many videos.*there are 2"):
        folds_of([0, 0, 1], 5, 0)


# ---- on every family, under policies and mechanisms -----------------------------------------------------------------


def last_rows(model: Any, ready: Any, policy: Any) -> torch.Tensor:
    """The streams of the role "last" as the probe keeps them, [layer, 1, d_model]."""
    who = module.asked(model, ready, n_frames=8, policy=policy, mechanisms=(), twins=False)
    what = module._What("answer", ("last",), "resid_post", None, "auto", 2, 1, 0)
    return module._Streams(who, what, range(5), None)._run(who.cases[0])["last"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_probed(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = [model.prepare_inputs(**inputs(name, seed=s)) for s in range(4)]
    labels = ["a", "b", "a", "b"]
    policy = Policy.from_dict(
        {"format": "edge-policy/1", "cuts": [{"layers": "1-5", "q": "*", "k": "video"}]}
    )
    clean = linear(model, ready, labels, roles=("frame:1", "frames"), layers=[1, 5], folds=2, **QUIET)
    assert clean.shape == (3, 2, 2) and np.isfinite(clean.values).all() and clean.notes["videos"] == 4
    assert clean.notes["samples"]["frames"] == 4 * ready[0].tokens.n_frames
    streams = [last_rows(model, ready[0], p) for p in (None, policy)]
    with torch.no_grad():
        _, cache = model.run_with_cache(ready[0], names_filter="blocks.3.hook_resid_post")
        _, cut = model.run_with_cache(ready[0], names_filter="blocks.3.hook_resid_post", policy=policy)
    assert torch.equal(streams[0][3, 0], cache["blocks.3.hook_resid_post"][0, -1])
    assert torch.equal(streams[1][3, 0], cut["blocks.3.hook_resid_post"][0, -1]) and not torch.equal(
        streams[0], streams[1]
    )


def test_a_role_whose_tokens_are_dropped_is_missing(wrapped: Any) -> None:
    model = wrapped("llava_onevision")
    ready = [model.prepare_inputs(**inputs("llava_onevision", seed=s)) for s in range(4)]
    kept = torch.tensor([i for i, r in enumerate(ready[0].tokens.roles()) if r != "frame"])
    drop = Filling(Plan(detours=(Shorten(2, kept),)))
    found = linear(
        model, ready, [1.0, 2.0, 3.0, 5.0], roles=("video", "last"), folds=2, mechanisms=[drop], **QUIET
    )
    assert found.unit == "held-out R2"
    assert (
        np.isfinite(found.values[:, 0, :2]).all()
        and np.isnan(found.values[:, 0, 2:]).all()
        and np.isfinite(found.values[:, 1]).all()
    )


# ---- streams kept in files ------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(planted: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = planted
    how: dict[str, Any] = {"roles": ("option",), "folds": 2, "layers": [2, 3], "out": tmp_path, **QUIET}
    ran: list[str] = []
    run = module._Streams._run

    def counted(self: Any, case: Any) -> Any:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(case.key)
        return run(self, case)

    monkeypatch.setattr(module._Streams, "_run", counted)
    with pytest.raises(KeyboardInterrupt):
        linear(model, items[:6], "direction", **how)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:50])  # and one is damaged
    monkeypatch.setattr(module._Streams, "_run", run)
    there = linear(model, items[:6], "direction", **how)
    assert there.ledger["forwards"] == 4
    assert linear(model, items[:6], "direction", **how).ledger["forwards"] == 0
    fresh = linear(model, items[:6], "direction", **{**how, "out": None})
    assert (there.values == fresh.values).all()
    linear(model, items[:6], "direction", **{**how, "layers": [1]})
    assert len(list(tmp_path.glob("*.safetensors"))) == 12  # other layers are other files


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_labels_say_the_ground_truth() -> None:
    item = draw_items("moving_direction", 1, 0)[0]
    assert labels_of("direction", [item]) == [item.options[item.answer]] == labels_of("answer", [item])
    assert labels_of("letter", [item]) == [item.letter] and labels_of("colour", [item])[0] in item.question
    assert (
        labels_of("position", [item])[0] == list(item.state.track) and labels_of("time", [item])[0][2] == 0.25
    )
    staged = draw_items("action_sequence", 1, 0)[0]
    later = labels_of("next event", [staged])[0]
    events = sorted(staged.state.events, key=lambda e: e.start)
    assert len(later) == 8 and later[-1] == "none"
    assert all(v == "none" or v in {e.verb for e in events if e.start > f / 8} for f, v in enumerate(later))
    count = draw_items("object_count", 1, 0)[0]
    assert labels_of("count", [count]) == [count.options[count.answer]]
    assert set(LABELS) >= {"direction", "position", "count", "colour", "time", "next event"}


def test_a_label_per_frame_goes_to_its_frame(planted: Any) -> None:
    model, items = planted
    found = linear(model, items[:8], "position", roles=("frames", "frame:2"), folds=2, layers=[1, 3], **QUIET)
    assert found.notes["samples"] == {"frames": 64, "frame:2": 8} and found.notes["probe"] == "ridge"
    with pytest.raises(UsageError, match="one value a frame; role 'last' has no frame"):
        linear(model, items[:8], "position", roles="last", folds=2, **QUIET)


@pytest.mark.parametrize(
    ("label", "more", "why"),
    [
        ("directoin", {}, "closest: direction"), ([1.0], {}, "one value for each of 6 items"), (["a"] * 6, {}, "nothing to tell apart"),
        ([1.0] * 6, {}, "nothing to tell apart"), ([1.0, float("nan"), 2, 3, 4, 5], {}, "1 of 6 label values are nan"),
        (["a", 1.0, "b", "a", "b", "a"], {}, "texts, or numbers"), ("direction", {"folds": 99}, "99 folds need"),
        ("direction", {"roles": ()}, "0 roles"), ("direction", {"kind": "svm"}, "kind='svm'"), ([1.0, 2, 3, 4, 5, 6], {"kind": "logistic"}, "needs texts"),
        ("next event", {}, "no events"), ("direction", {"roles": "vidoe"}, "closest: video"), ("direction", {"site": "q"}, "no site 'q'"),
    ],
)  # fmt: skip
def test_what_cannot_be_probed_is_named(label: Any, more: dict[str, Any], why: str, planted: Any) -> None:
    model, items = planted
    with pytest.raises(UsageError, match=why):
        linear(model, items[:6], label, **{"folds": 2, "layers": [1], **QUIET, **more})


def test_a_recipe_gives_the_same_numbers() -> None:
    recipe = from_plain(
        {"kind": "probes.linear.LinearRecipe", "items": {"sim": "moving_direction", "n": 3, "seed": 2}, "label": "direction", "roles": ["option"],
         "layers": [5], "folds": 2, "shuffles": 2, "twins": True}
    )  # fmt: skip
    from lab.model.zoo import load

    (found,) = recipe.run(progress=False)
    model = load("tiny", device="cpu", dtype="float32")
    again = linear(
        model,
        draw_items("moving_direction", 3, 2),
        "direction",
        roles="option",
        layers=[5],
        folds=2,
        twins=True,
        **QUIET,
    )
    assert (found.values == again.values).all() and found.notes["samples"] == {"option": 6}
