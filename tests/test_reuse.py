"""Several questions about one video: one tower call, the shared beginning run once, the numbers of separate runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lab.carriers import VideoQA
from lab.edges import sweeping
from lab.edges.reuse import Videos, continued, families
from lab.edges.store import Store
from lab.edges.sweeping import sweep
from lab.errors import UsageError
from lab.model.continuing import beginning_of, shared_start, with_response
from lab.model.zoo import wrap
from lab.runs import Cancel, Cancelled
from tests import families as made
from tests.families import FAMILIES, inputs

WAYS = ["cross-frame", "video->question", "video->last", "last->last"]
ASKED = ("which way does it go ?", "which way ?", "how many ?")
QUIET = {"show_progress": False, "n_frames": 4, "window": 2}


@pytest.fixture(scope="module")
def asking():
    held = {}

    def get(name):
        if name not in held:
            held[name] = wrap(made.build(name), made.tokenizer(name), preprocessor=made.preprocessor(name))
        return held[name]

    return get


def clip(seed):
    return np.random.default_rng(seed).integers(0, 255, (4, 24, 24, 3), dtype=np.uint8)


def questions(seed, **kw):
    return [
        VideoQA(clip(seed), q, **{"options": ("left", "right"), "id": f"{seed}/{i}", **kw})
        for i, q in enumerate(ASKED)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_about_one_video_equal_separate_runs(name, asking):
    """In every family, several videos taking turns, letters and texts."""
    model = asking(name)
    mixed = [q for pair in zip(questions(1), questions(2), strict=True) for q in pair]
    together = sweep(model, mixed, WAYS, metrics=["argmax", "margin"], **QUIET)
    apart = [sweep(model, q, WAYS, metrics=["argmax", "margin"], **QUIET) for q in mixed]
    assert together.coords["item"] == [q.id for q in mixed]
    p = np.array(list(together.notes["p_clean"].values()))[:, None, None]
    difference = np.abs(together.values - np.concatenate([a.values for a in apart], 1))
    assert (difference[0] / 100 * p).max() <= 1e-5 and difference[1].max() <= 1e-4
    assert np.abs(together.values).max() > 1 and together.notes["fallbacks"] == []
    spent, alone = together.ledger, [a.ledger for a in apart]
    assert spent["tower_calls"] == 2 and sum(a["tower_calls"] for a in alone) == 6
    saved = 0.0
    for seed in (1, 2):
        prompts = [model.prepare(q, 4) for q in questions(seed)]
        start = min(shared_start(prompts[0], other) for other in prompts[1:])
        saved += sum(start / r.n_pos for r in prompts[1:])  # the first one pays for it
    assert spent["forwards"] == pytest.approx(sum(a["forwards"] for a in alone) - saved) and saved > 1
    assert spent["naive"] == sum(a["naive"] for a in alone)


def test_texts_and_the_reference_share_the_tower_too(asking):
    model = asking("qwen3_vl")
    items = questions(3)
    fast, slow = (
        sweep(model, items, ["video->response"], target="left", executor=e, **QUIET)
        for e in ("fast", "reference")
    )
    assert np.abs(fast.values - slow.values).max() <= 1e-2 and np.abs(slow.values).max() > 1
    assert fast.ledger["tower_calls"] == slow.ledger["tower_calls"] == 1


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_the_door_that_is_lent_is_the_prompts_own_bit_for_bit(name, asking):
    model = asking(name)
    a, b = (model.prepare(q, 4) for q in questions(4)[:2])
    n = shared_start(a, b)
    video = a.tokens.where(kind="video")
    assert int(video[-1]) < n < min(a.n_pos, b.n_pos)
    own = model.see(model.prepare(questions(4)[1], 4))
    videos = Videos(model, [a, b])
    videos.look(0)
    model.see(a)
    calls = model.tower_calls
    videos.look(1)
    lent = model.see(b)
    assert model.tower_calls == calls and torch.equal(lent.embeds, own.embeds)
    assert torch.equal(lent.rope.expand_as(own.rope), own.rope) and len(lent.deep) == len(own.deep)
    assert all(torch.equal(x, y) for x, y in zip(lent.deep, own.deep, strict=True))
    ids = tuple(range(20, 24))
    longer = with_response(model, b, ids, [""] * 4)
    fresh = replace(longer, memo={})
    assert torch.allclose(
        model(longer, read="all"), model(fresh, read="all"), atol=1e-5
    )  # transformers' own positions


def test_a_continued_store_is_the_whole_one(asking):
    model = asking("qwen2_5_vl")
    a, b = (model.prepare(q, 4) for q in questions(5)[:2])
    n = shared_start(a, b)
    whole, short = Store.of(model, b), Store.of(model, beginning_of(model, a, n))
    grown = continued(model, short, b)
    assert short.n_pos == n and grown.work.row_layers == (b.n_pos - n) * 5
    for mine, theirs in ((grown.resid, whole.resid), (grown.keys, whole.keys), (grown.values, whole.values)):
        assert len(mine) == len(theirs) and all(
            torch.allclose(x, y, atol=2e-5) for x, y in zip(mine, theirs, strict=True)
        )


def test_other_pixels_other_prompts_and_padding_share_nothing(asking):
    model = asking("internvl")
    same, other = model.prepare(questions(6)[0], 4), model.prepare(questions(7)[0], 4)
    system = model.prepare(questions(6)[1], 4, system="be brief")
    assert shared_start(same, other) == 0 and shared_start(same, system) == 0
    padded = model.prepare_inputs(**inputs("internvl"))
    padded.inputs["attention_mask"] = padded.inputs["attention_mask"].clone()
    padded.inputs["attention_mask"][0, 0] = 0
    assert shared_start(padded, padded) == 0
    assert [f.members for f in families([same, other, same, system])] == [[0, 2], [1], [3]]
    with pytest.raises(UsageError, match="padding"):
        with_response(model, padded, (21,), ("",))


def test_the_same_prompt_twice_is_computed_from_all_but_its_last_row(asking):
    model = asking("internvl")
    ready = [model.prepare(questions(8)[0], 4) for _ in range(2)]
    assert shared_start(*ready) == ready[0].n_pos - 1
    found = sweep(model, ready, WAYS, **QUIET)
    assert np.array_equal(found.values[0], found.values[1]) and found.ledger["tower_calls"] == 1


def test_what_is_shared_does_not_depend_on_what_was_run_before(asking, tmp_path, monkeypatch):
    """Stopped between two questions about one video, and gone on: the same numbers, bit for bit."""
    model = asking("llava_next_video")
    items = questions(9)
    whole = sweep(model, items, WAYS, **QUIET)
    cancel, record = Cancel(), sweeping.Run.record

    def once(self, *args):
        cancel.set()
        record(self, *args)

    with monkeypatch.context() as m, pytest.raises(Cancelled):
        m.setattr(sweeping.Run, "record", once)
        sweep(model, items, WAYS, out=tmp_path, cancel=cancel, **QUIET)
    again = sweep(model, items, WAYS, out=tmp_path, **QUIET)
    assert np.array_equal(again.values, whole.values) and again.notes["p_clean"] == whole.notes["p_clean"]
    assert (
        again.ledger["forwards"] > whole.ledger["forwards"]
    )  # the shared beginning was run a second time, and counts
