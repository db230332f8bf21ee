"""LIVE's targets, loss and scores: the acceptance checks B2, B4, B5 of its spec; training lowers the loss."""

import math

import pytest
import torch

from lab.errors import UsageError
from lab.learn.live import (
    IGNORED,
    Say,
    Scripted,
    Targets,
    Turn,
    Watch,
    end_text,
    evaluate,
    live_loss,
    targets,
    time_diff,
    turn_of,
)
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.mechanisms.streaming import Session, Streaming, frame_ends, silent_id
from tests import families
from tests.shelf_models import clip, model, question

SCRIPT = (
    Watch(1, learn=0),
    Say("user", "tell"),
    Watch(4),
    Say("assistant", "up"),
    Watch(3),
    Say("assistant", "no"),
)


@pytest.fixture(scope="module")
def small():
    return model()


def laid_out(m, script=SCRIPT, config=None, mechanisms=(), **kw):
    config = config or Streaming()
    n = sum(p.frames for p in script if isinstance(p, Watch))
    ready = m.prepare(question(8), index=range(n))
    out = m.run(ready, read="all", mechanisms=[Scripted(script, config, end_text(m)), *mechanisms], **kw)
    return out, targets(out.maps[0], script, silent_id(m, config))


# ---- B2 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("interval", [",", None])
def test_b2_targets(small, compat, interval):
    config = Streaming(compat=compat, interval=interval, system="S")
    out, wanted = laid_out(small, config=config)
    tokens, (ids, labels) = out.maps[0], (out.maps[0].ids, wanted.labels)
    at = wanted.at_frame.nonzero().squeeze(1)
    assert torch.equal(
        at, frame_ends(tokens)[1:]
    )  # 4 + 3 frames; the first, before the user spoke, is not supervised
    said = small.tokenizer.decode
    silent = interval or "</s>"
    assert [said([i]) for i in labels[at].tolist()] == [silent] * 3 + ["]"] + [silent] * 2 + ["]"]
    assert wanted.turn[at].tolist() == [0, 0, 0, 0, 1, 1, 1]
    text = "".join(tokens.pieces)
    commas = 0 if compat == "paper" or interval is None else 3 + 2
    assert text.count(",") == commas and text.count("[") == text.count("]") == 3
    stream = ids[int(at[0]) : int(at[3]) + 1]
    assert families.EOS not in stream.tolist() and ids.tolist().count(families.EOS) == 2
    words = (labels != IGNORED) & ~wanted.at_frame
    assert "".join(said([i]) for i in labels[words].tolist()) == "\nAssistant: up</s>\nAssistant: no</s>"
    assert torch.equal(labels[words], ids[1:][words[:-1]])
    # user text, and all but the last token of a frame, predict nothing
    assert bool((labels[tokens.where(role="question")[:-1]] == IGNORED).all())
    assert int((labels[tokens.where(role="frame")] != IGNORED).sum()) == 7


def test_b2_learn_and_frames_that_nothing_follows(small):
    script = (Watch(4, learn=2), Say("assistant", "a"), Watch(3))
    _, wanted = laid_out(small, script)
    assert int(wanted.at_frame.sum()) == 2 + 2 and bool(
        (wanted.turn[wanted.at_frame] == torch.tensor([0, 0, 1, 1])).all()
    )
    _, cut = laid_out(small, (Watch(4), Say("user", "hey"), Say("assistant", "a")))
    assert int(cut.at_frame.sum()) == 3


def test_a_session_reads_what_was_trained(small):
    """The stream of a session that says just this has the ids of the training sample."""
    out, _ = laid_out(small, (Watch(3), Say("assistant", "")), Streaming(system="S"))
    session = Session(small, Streaming(decide="never", system="S", max_new_tokens=1))
    session.run(clip(3))
    n = session.context.n
    assert session.context.tokens.ids.tolist() == out.maps[0].ids[:n].tolist()
    assert torch.allclose(session.context.replay()[0][0], out.logits[0, :n], atol=1e-5, rtol=1e-4)


def test_d11_targets_follow_a_token_drop(small):
    drop = DifferentialTokenDrop(ratio=0.5)
    full, wanted = laid_out(small)
    out, fewer = laid_out(small, mechanisms=[drop])
    words = lambda w: w.labels[(w.labels != IGNORED) & ~w.at_frame].tolist()  # noqa: E731
    assert len(out.maps[0]) < len(full.maps[0]) and words(fewer) == words(wanted)
    left = out.maps[0].frame[fewer.at_frame].tolist()
    assert 0 < len(left) <= 7 and torch.equal(
        fewer.at_frame.nonzero().squeeze(1), frame_ends(out.maps[0])[-len(left) :]
    )


# ---- B4 -----------------------------------------------------------------------------------------------------------


def test_b4_the_weight_of_frames(small):
    out, wanted = laid_out(small)
    logits = out.logits[0].clone().requires_grad_(True)
    grads, losses = {}, {}
    for w in (0.0, 1.0, 2.0):
        losses[w] = live_loss(logits, wanted, w=w)
        grads[w] = torch.autograd.grad(losses[w], logits)[0]
    assert (
        float(grads[0.0][wanted.at_frame].abs().max()) == 0
        and float(grads[1.0][wanted.at_frame].abs().min()) > 0
    )
    assert torch.allclose(2 * grads[1.0][wanted.at_frame], grads[2.0][wanted.at_frame])
    assert torch.equal(grads[0.0][~wanted.at_frame], grads[2.0][~wanted.at_frame])  # the denominator stays
    labels = wanted.labels.masked_fill(wanted.at_frame, IGNORED)
    n, all_ = int((labels != IGNORED).sum()), int((wanted.labels != IGNORED).sum())
    language = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    assert torch.allclose(losses[0.0], language * n / all_)
    nothing = Targets(
        torch.full((3,), IGNORED), torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    )
    with pytest.raises(UsageError, match="no target"):
        live_loss(torch.zeros(3, 5), nothing)


def test_training_on_it_teaches_when_to_speak():
    """A few steps on one conversation: the loss falls, and the model speaks at the right frames."""
    m = model(layers=2)
    m.hf.requires_grad_(True)
    script = (Watch(3), Say("assistant", "up"), Watch(2), Say("assistant", "no"))
    optimiser = torch.optim.Adam(m.hf.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        out, wanted = laid_out(m, script)
        loss = live_loss(out.logits[0], wanted)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.1 < losses[0]
    m.hf.requires_grad_(False)
    session = Session(m, Streaming(max_new_tokens=8))
    log = session.run(clip(8), index=range(5))
    assert [mo.triggered for mo in log] == [False, False, True, False, True]
    assert [r.text for r in session.replies] == ["up", "no"] and not any(r.capped for r in session.replies)
    turns = evaluate(m, question(8), script, Streaming())
    assert [t.frame_diff for t in turns] == [0, 0] and [t.fluency for t in turns] == [1.0, 1.0]
    assert all(t.perplexity < 1.2 for t in turns)


# ---- B5 -----------------------------------------------------------------------------------------------------------


def test_b5_scores_by_hand():
    good = turn_of([False] * 4 + [True], [True] * 4, 0.0, None)
    assert (good.frame_diff, good.fluency, good.correctness, good.perplexity) == (0, 1.0, 1.0, 1.0)
    early = turn_of([False, False, True, False, True], [True] * 4, 0.0, None)
    assert early.frame_diff == 2 and early.fluency == pytest.approx(3 / 9)
    late = turn_of([False] * 5, [True] * 4, 0.0, [False, True, True])
    assert late.frame_diff == -2 and late.fluency == pytest.approx(4 / 9)
    never = turn_of([False] * 5, [True] * 4, 0.0, [False] * 3)
    assert never.frame_diff == -3 and never.fluency == pytest.approx(4 / 9)
    last = turn_of([False] * 5, [True, True, False, True], 0.0, None)
    assert last.frame_diff == 0 and last.fluency == pytest.approx(
        7 / 9
    )  # counts as begun in time, as released
    assert last.correctness == 0.5
    assert time_diff([good, early, late], 2.0) == pytest.approx(4 / 3 / 2) and time_diff([], 2.0) == 0.0
    assert Turn(5, 4, 4, 0, math.log(3.0)).perplexity == pytest.approx(3.0)


def test_b5_evaluate_looks_ahead(small):
    """theta 2: always too early by all frames; a model that never speaks is late by what it was shown."""
    eager = evaluate(small, question(8), SCRIPT, Streaming(theta=2.0))
    assert [t.frame_diff for t in eager] == [3, 2] and [t.n_frames for t in eager] == [4, 3]
    silent = model()
    bias = torch.zeros(families.VOCAB)
    bias[silent_id(silent, Streaming())] = 1e4
    silent.hf.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    never = evaluate(silent, question(8), SCRIPT, Streaming())
    assert [t.frame_diff for t in never] == [-3, 0]
    assert never[0].n_words == len("\nAssistant: up") + 1


def test_conversations_that_do_not_fit(small):
    ready = small.prepare(question(8), index=range(3))
    with pytest.raises(UsageError, match="watches 2 frames, the video has 3"):
        small.run(ready, mechanisms=[Scripted((Watch(2),), Streaming(), "</s>")])
