"""Answers: letters, probabilities, free-form targets, prepared from real frames for every family."""

import math

import numpy as np
import pytest
import torch

from lab.carriers import VideoQA
from lab.errors import UsageError
from lab.model.zoo import wrap
from lab.spans import ROLES
from tests import families
from tests.families import FAMILIES

ITEM = dict(question="which way ?", options=("left", "right", "up"), answer=1)


@pytest.fixture(scope="module")
def asking():
    """name -> a wrapped tiny model with a tokenizer and preprocessor."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = wrap(
                families.build(name), families.tokenizer(name), preprocessor=families.preprocessor(name)
            )
        return made[name]

    return get


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).integers(0, 255, (8, 24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", FAMILIES)
def test_prepare_touches_no_weights_and_partitions(name, asking, video, monkeypatch):
    model = asking(name)
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("prepare ran a module"))
    ready = model.prepare(VideoQA(video, **ITEM), n_frames=4)
    tokens = ready.tokens
    assert set(tokens.roles()) <= set(ROLES) and len(tokens.roles()) == len(tokens) == ready.n_pos
    assert len(tokens.last) == 1 and int(tokens.last) == len(tokens) - 1
    assert [len(tokens.where(role="option", option=i)) > 0 for i in range(4)] == [True, True, True, False]
    assert len(tokens.where(role="question")) > 0 and len(tokens.where(kind="video")) == len(ready.grids[0])
    assert len(ready.frames) == 4 and "which way" in ready.prompt
    words = "".join(tokens.pieces[i] for i in tokens.where(role="option", option=1))
    assert "B" in words and "right" in words and "left" not in words


@pytest.mark.parametrize("name", FAMILIES)
def test_answer_is_the_softmax_at_the_last_position(name, asking, video):
    model = asking(name)
    item = VideoQA(video, **ITEM)
    ready = model.prepare(item, n_frames=4)
    got = model.answer(item, n_frames=4)
    with torch.no_grad():
        probs = model.hf(**ready.inputs).logits[0, -1].softmax(-1)
    ids = [model.tokenizer.convert_tokens_to_ids(letter) for letter in "ABC"]
    assert torch.allclose(got.probs, probs, atol=1e-6) and abs(float(got.probs.sum()) - 1) < 1e-5
    assert torch.allclose(got.letter_probs, probs[ids], atol=1e-6)
    assert abs(float(got.option_probs.sum()) - 1) < 1e-5
    assert (
        got.index == int(probs[ids].argmax())
        and got.letter == "ABC"[got.index]
        and got.text == item.options[got.index]
    )
    assert got.correct == (got.index == 1)
    assert got.by_option == pytest.approx(
        dict(zip(item.options, got.option_probs.tolist(), strict=True)), abs=1e-4
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_teacher_forced_target_equals_one_long_forward(name, asking, video):
    model = asking(name)
    ready = model.prepare(VideoQA(video, "which way ?"), n_frames=4)
    got = model.answer(ready, target="left right up")
    ids = model.tokenizer("left right up", add_special_tokens=False, return_tensors="pt")["input_ids"]
    longer = dict(ready.inputs)
    longer["input_ids"] = torch.cat([longer["input_ids"], ids], 1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    longer.update(model.family.extra_inputs(longer["input_ids"], model.hf.config))
    with torch.no_grad():
        logp = model.hf(**longer).logits[0].log_softmax(-1)
    n = ready.n_pos
    expected = [float(logp[n - 1 + i, t]) for i, t in enumerate(ids[0])]
    assert len(got.token_logprobs) == ids.shape[1] > 3 and np.allclose(
        got.token_logprobs, expected, atol=1e-4
    )
    assert math.isclose(got.logprob, sum(expected), abs_tol=1e-3) and got.letter is None
    assert isinstance(got.text, str) and got.text == str(model.generate(ready, max_new_tokens=20))


def test_an_open_question_scores_its_own_answer(asking, video):
    model = asking("internvl")
    assert model.answer(VideoQA(video, "which way ?", answer="left")).target == "left"


@pytest.mark.parametrize("name", FAMILIES)
def test_edges_and_knockouts_act_in_answers(name, asking, video):
    model = asking(name)
    ready = model.prepare(VideoQA(video, **ITEM), n_frames=4)
    n, seen = ready.n_pos, ready.tokens.where(role="video")
    keep = lambda q, k: ~((q == n - 1)[:, None] & torch.isin(k, seen)[None])  # noqa: E731
    cut = model.answer(ready, edges=dict.fromkeys(range(model.cfg.n_layers), keep))
    assert not torch.allclose(cut.probs, model.answer(ready).probs, atol=1e-6)


def test_what_cannot_be_answered_says_so(asking, video):
    model = asking("llava_onevision")
    bare = wrap(families.build("llava_onevision"))
    with pytest.raises(UsageError, match="without a tokenizer"):
        bare.answer(VideoQA(video, **ITEM))
    with pytest.raises(UsageError, match="expected a VideoQA"):
        model.answer("a question")
    with pytest.raises(UsageError, match="no tokens"):
        model.answer(VideoQA(video, "which way ?"), target="")
    with pytest.raises(UsageError, match="2 worlds"):
        model.answer(model.prepare_inputs(**families.inputs("llava_onevision", worlds=2)))
    with pytest.raises(UsageError, match="27 options"):
        VideoQA(video, "which way ?", options=tuple(f"w{i}" for i in range(27)))


def test_an_answer_may_be_named_by_text_or_letter():
    """An answer that names no option would never count as right, without a word."""
    assert VideoQA("v", "?", ("left", "right"), "right").answer == 1
    assert VideoQA("v", "?", ("left", "right"), "A").answer == 0
    assert VideoQA("v", "?", answer="left").answer == "left"
    with pytest.raises(UsageError, match="none of the 2 options"):
        VideoQA("v", "?", ("left", "right"), "up")


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_values_of_positions_painted_on_the_frames(name, asking, video):
    ready = asking(name).prepare(VideoQA(video, **ITEM), n_frames=4)
    assert np.array_equal(ready.frames.pictures, ready.frames.pixels.permute(0, 2, 3, 1).numpy())
    painted = ready.painted(range(len(ready.tokens)), name="positions", unit="position")
    assert painted.axes == ("frame", "row", "col") and len(painted.notes["seconds"]) == painted.shape[0]
    for f, r, c in np.ndindex(painted.shape):
        assert ready.tokens.where(frame=f, row=r, col=c).tolist() == [painted.values[f, r, c]]
    kept = ready.tokens.only(torch.arange(len(ready.tokens))[ready.tokens.frame != 1])
    less = ready.painted(torch.ones(len(kept)), name="kept", unit="1", tokens=kept)
    assert np.isnan(less.values[1]).all() and (np.delete(less.values, 1, 0) == 1).all()
    with pytest.raises(UsageError, match="values for"):
        ready.painted([1.0], name="", unit="")
