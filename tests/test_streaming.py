"""LIVE's loop: the acceptance checks B1, B3, B6-B8 of its spec, streaming equals offline, and the Speak head (C1-C3)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lab.carriers import VideoQA
from lab.errors import ConfigError, RunError, UsageError
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.mechanisms.segment_merging import SegmentMerging
from lab.mechanisms.streaming import (
    EXAMPLE,
    NEUTRAL,
    Session,
    Speak,
    Streaming,
    decided,
    frame_ends,
    silence,
    silent_id,
)
from lab.mechanisms.thumbnail_and_sampling import ThumbnailAndSampling
from lab.model.cache import KVCache, LayerCache
from lab.slots import Plan
from tests import families
from tests.shelf_models import clip, model, question

QUIET = Streaming(decide="never", system="be brief", max_new_tokens=4)
LOUD = Streaming(theta=2.0, system="be brief", max_new_tokens=4)


@pytest.fixture(scope="module")
def small():
    return model()


def watched(session, frames=4, **kw):
    """Every normed row the session reads, in order."""
    seen = []
    with session.model.hooks([("ln_final.hook_normalized", lambda value, hook: seen.append(value.clone()))]):
        session.run(clip(frames), **kw)
        session.flush()
    return torch.cat(seen, 1)


def close(a, b):
    return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


# ---- B1: streaming equals offline -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("compat", ["paper", "released"])
def test_b1_pieces_equal_one_forward(name, compat, wrapped_text):
    m = wrapped_text(name)
    session = Session(m, Streaming(theta=2.0, compat=compat, system="S", max_new_tokens=3))
    seen = watched(session, 4, questions=[(0.6, "Who?")])
    assert session.replies and len(session.replies) >= 3
    with torch.no_grad():
        logits, heads = session.context.replay()
        assert close(m.unembed(seen), logits)
    assert len(session.context.tokens) == logits.shape[1] == sum(map(len, session.context.pieces))
    ends = torch.cat([mo.heads["frame_end"] for mo in session.log], 1)
    assert close(ends, heads["frame_end"])


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize("positions", ["preserve", "compact"])
def test_a_run_lays_out_what_a_session_watches(small, compat, positions):
    """Independent ways: one prompt rendered and tokenised as a string, all frames through the tower at once."""
    config = Streaming(decide="never", compat=compat, system="be brief", max_new_tokens=1)
    drop = DifferentialTokenDrop(threshold=0.9, positions=positions)
    item = question(6)
    for mechanisms in ([], [drop]):
        session = Session(small, config, mechanisms=mechanisms)
        session.run(clip(6))
        session.ask(item)
        reply = session.flush()[0]
        ready = small.prepare(item, n_frames=6)
        out = small.run(ready, mechanisms=[config, *mechanisms])
        assert close(out.logits[0, -1], reply.first)
        ends = torch.cat([mo.heads["frame_end"] for mo in session.log], 1)
        assert close(out.heads["frame_end"], ends) and len(out.maps[0]) == session.context.n
        mine, theirs = session.context.tokens, out.maps[0]
        assert mine.ids.tolist() == theirs.ids.tolist() and mine.frame.tolist() == theirs.frame.tolist()
        assert mine.roles()[:-1] == theirs.roles()[:-1] and theirs.roles()[-1] == "last"
    assert len(out.maps[0]) < small.prepare(item, n_frames=6).n_pos  # the drop did drop


def test_what_the_offline_comparison_can_see(small):
    """Another first frame, and the last row says something else: the check has teeth."""
    session = Session(small, QUIET)
    frames = clip(3)
    session.run(frames)
    good = session.context.replay()[0]
    first = session.context.pieces[1]
    session.context.pieces[1] = replace(first, embeds=first.embeds.flip(1))
    assert not close(session.context.replay()[0][:, -1], good[:, -1])


# ---- B3: the threshold --------------------------------------------------------------------------------------------


def test_b3_zero_is_argmax_and_two_always_speaks(small):
    g = torch.Generator().manual_seed(0)
    trace = torch.randn(40, 50, generator=g) * 2
    trace[::2, 3] += 6.0
    for row in trace:
        assert decided(row, 3, 0.0)[0] == (int(row.argmax()) != 3)
        assert decided(row, 3, 1.1)[0]
    counts = [sum(decided(row, 3, t)[0] for row in trace) for t in (0.0, 0.2, 0.5, 0.725, 0.9, 1.0, 1.1)]
    assert counts == sorted(counts) and counts[0] < counts[3] < counts[-1] == 40
    assert torch.allclose(silence(trace, 3), trace.softmax(-1)[:, 3])


def test_b3_in_a_session(small):
    assert [mo.triggered for mo in Session(small, LOUD).run(clip(4))] == [True] * 4
    quiet = Session(small, QUIET)
    assert not any(mo.triggered for mo in quiet.run(clip(4))) and quiet.replies == []
    config = Streaming(theta=0.0, max_new_tokens=2)
    session = Session(small, config)
    log = session.run(clip(4))
    with torch.no_grad():
        silent = silent_id(small, config)
        ends = torch.cat([mo.heads["frame_end"] for mo in log], 1)[0]
        assert [mo.triggered for mo in log] == (small.unembed(ends).argmax(-1) != silent).tolist()
        assert [mo.p_silent for mo in log] == pytest.approx(
            silence(small.unembed(ends), silent).tolist(), rel=1e-4
        )


# ---- B6: what the cache holds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "interval"),
    [
        (Streaming(decide="never", system="ab"), 0),
        (Streaming(decide="never", system="ab", compat="released"), 1),
        (Streaming(decide="never", system="ab", interval=None, compat="released"), 0),
    ],
    ids=["paper", "released, comma", "released, end of text"],
)
def test_b6_rows(small, config, interval):
    session = Session(small, config)
    n = [mo.rows[0] for mo in session.run(clip(5))]
    start = len("ab") + len("\n[")
    assert n == [start + (f + 1) * 16 + f * interval for f in range(5)]
    assert session.context.n == n[-1] and set(session.log[-1].rows) == {n[-1]}


# ---- B7: forgetting ---------------------------------------------------------------------------------------------------


def state_of(session):
    store = session.context.cache.store
    return [t for held in (store.k, store.v, store.order) for t in held.values()]


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_b7_a_forgotten_reply_was_never_said(small, compat):
    spoke = Session(small, Streaming(theta=2.0, forget_replies=True, max_new_tokens=5, compat=compat))
    quiet = Session(small, Streaming(decide="never", compat=compat))
    for session in (spoke, quiet):
        session.run(clip(4))
    assert len(spoke.replies) == 4 and all(r.ids for r in spoke.replies)
    assert all(torch.equal(a, b) for a, b in zip(state_of(spoke), state_of(quiet), strict=True))
    assert [mo.p_silent for mo in spoke.log] == [mo.p_silent for mo in quiet.log]
    kept = Session(small, Streaming(theta=2.0, max_new_tokens=5, compat=compat))
    kept.run(clip(4))
    assert kept.context.n > quiet.context.n


def test_b7_a_question_stays_when_its_reply_is_forgotten(small):
    session = Session(small, Streaming(decide="never", forget_replies=True, max_new_tokens=5))
    session.run(clip(2), questions=[(0.5, "Who?")])
    said = "".join(session.context.tokens.pieces)
    assert said.endswith("]\nUser: Who?\nAssistant:") and session.replies[0].ids
    session.see(clip(3).pixels[2].permute(1, 2, 0), 2.0)
    assert "".join(session.context.tokens.pieces).endswith("Assistant:</s>\n[")


def test_snapshots_restore_as_often_as_wanted(small):
    drop = DifferentialTokenDrop(threshold=0.9)
    session = Session(small, LOUD, mechanisms=[drop])
    frames = clip(6)
    session.run(frames, index=[0, 1])
    state, rows = session.snapshot(), session.context.n
    after = []
    for _ in range(2):
        session.restore(state)
        assert session.context.n == rows and len(session.log) == 2
        session.run(frames, index=[2, 3])
        after.append(
            (session.context.n, [mo.p_silent for mo in session.log], [r.ids for r in session.replies])
        )
    assert after[0] == after[1] and after[0][0] > rows


def test_caches_snapshot_restore_and_crop(small):
    ready = small.prepare(question())
    cache = small.new_cache()
    from lab.model.run import Run

    with torch.no_grad():
        door, _ = small.arrive(ready)
        small.prefill(door, Run(), cache)
        before, state = [t.clone() for t in cache.store.k.values()], cache.snapshot()
        small.prefill(door, Run(), cache)  # more rows
    assert cache.store.lengths()[0] == 2 * ready.n_pos
    cache.restore(state)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.store.k.values(), strict=True))
    cache.crop(10)
    assert cache.store.lengths() == [10] * 8
    assert all(torch.equal(a[:, :, :10], b) for a, b in zip(before, cache.store.k.values(), strict=True))


def test_a_ragged_cache_is_cropped_by_source_position():
    cache = KVCache()
    rows = torch.randn(1, 1, 4, 2)
    cache.update(0, rows, rows, torch.tensor([0, 1, 2, 3]))
    cache.update(1, rows[:, :, :2], rows[:, :, :2], torch.tensor([0, 3]))
    cache.crop(3)
    assert cache.lengths() == [3, 1] and torch.equal(cache.k[1], rows[:, :, :1])


class Odd:
    """A cache without snapshot and crop."""

    def __init__(self):
        self.inner = KVCache()

    def update(self, layer, k, v, order):
        return self.inner.update(layer, k, v, order)


def test_other_caches_are_copied_and_cannot_be_cropped(small):
    class Mechanism:
        def plan(self, cfg):
            return Plan(cache=Odd)

    spoke = Session(
        small, Streaming(theta=2.0, forget_replies=True, max_new_tokens=3), mechanisms=[Mechanism()]
    )
    quiet = Session(small, QUIET, mechanisms=[Mechanism()])
    spoke.run(clip(3))
    assert isinstance(spoke.context.cache, LayerCache) and spoke.rows == ()
    assert spoke.context.cache.store.inner.lengths()[0] == 2 + 3 * 16
    quiet.run(clip(3))
    with pytest.raises(RunError, match="Odd cannot forget"):
        spoke.context.cache.crop(3)


# ---- B8: questions ------------------------------------------------------------------------------------------------------


def test_b8_order_of_questions(small):
    """At 1 frame a second: before the frame if earlier, after the frame of the same time, never after a later one."""
    session = Session(small, Streaming(decide="never", fps=1.0, max_new_tokens=2))
    pixels = clip(5).pixels.permute(0, 2, 3, 1)
    session.ask("second", 2.0)
    session.ask("first", 0.5)
    session.ask("late", 9.0)
    for picture in pixels:
        session.see(picture)
    assert [[r.query for r in mo.replies] for mo in session.log] == [[], ["first"], ["second"], [], []]
    assert [mo.p_silent is None for mo in session.log] == [False, False, True, False, False]
    frames = session.context.tokens.frame
    text = "".join(session.context.tokens.pieces)
    assert text.index("first") < text.index("second") and "late" not in text
    at = session.context.tokens.pieces.index("f")
    assert int(frames[:at].max()) == 0  # before frame 1 (at 1.0 s)
    assert [r.query for r in session.flush()] == ["late"] and session.flush() == []


def test_a_question_before_any_frame(small):
    texts = {}
    for compat in ("paper", "released"):
        session = Session(small, Streaming(decide="never", system="S ", max_new_tokens=1, compat=compat))
        session.ask("Who?", 0.0)
        session.see(clip(1), 1.0)
        texts[compat] = "".join(session.context.tokens.pieces)
    assert texts["paper"].startswith("S \nUser: Who?\nAssistant:") and texts["paper"].count("[") == 1
    assert texts["released"].startswith("]\nUser: Who?\nAssistant:")


def test_a_capped_reply_and_a_question_right_after_a_reply(small):
    texts = {}
    for compat in ("paper", "released"):
        session = Session(small, Streaming(theta=2.0, max_new_tokens=2, compat=compat))
        session.see(clip(1), 0.0)
        assert session.replies[0].capped and len(session.replies[0].ids) == 2
        session.ask("Who?", 0.0)
        session.flush()
        texts[compat] = "".join(session.context.tokens.pieces)
    assert "</s>\nUser: Who?" in texts["paper"] and texts["paper"].count("]") == 1
    assert "</s>" not in texts["released"] and texts["released"].count("]\nUser: Who?") == 1
    glued = Session(small, Streaming(theta=2.0, max_new_tokens=2, compat="released"))
    glued.run(clip(2))
    assert "".join(glued.context.tokens.pieces).count("[") == 1
    proper = Session(small, Streaming(theta=2.0, max_new_tokens=2))
    proper.run(clip(2))
    assert "".join(proper.context.tokens.pieces).count("</s>\n[") == 1


# ---- heads ------------------------------------------------------------------------------------------------------------


def test_c1_neutral_reads_and_changes_nothing(small, tmp_path):
    ready = small.prepare(question())
    head = Speak(64)
    head.save(tmp_path / "speak.safetensors")
    for mech in (NEUTRAL, Streaming(layout="prompt", speak=str(tmp_path / "speak.safetensors"))):
        out = small.run(ready, read="all", mechanisms=[mech])
        assert torch.equal(out.logits, small(ready, read="all"))
    assert out.heads["frame_end"].shape == (1, 8, 64) and out.heads["speak"].tolist() == [[0.5] * 8]
    ends = frame_ends(ready.tokens)
    _, cache = small.run_with_cache(ready, names_filter="ln_final.hook_normalized")
    assert torch.allclose(small.ln_final(torch.zeros(1, 1, 64)), torch.zeros(1))
    assert torch.allclose(small.unembed(out.heads["frame_end"]), small(ready, read=ends.tolist()), atol=1e-5)


def test_c2_c3_speak_scores(small, tmp_path):
    """Causal, replies forgotten leave no trace, and the head decides where it is asked to."""
    head = Speak(64)
    head.weight.data[1] = torch.randn(64, generator=torch.Generator().manual_seed(0)) / 4
    path = str(tmp_path / "speak.safetensors")
    head.save(path)
    long, short, loud = (
        Session(small, Streaming(decide="head", theta=t, speak=path, forget_replies=True, max_new_tokens=3))
        for t in (2.0, 2.0, 0.0)
    )
    long.run(clip(6))
    short.run(clip(6), index=[0, 1, 2])
    loud.run(clip(6))
    score = lambda s: [float(mo.heads["speak"][0, -1]) for mo in s.log]  # noqa: E731
    assert score(long)[:3] == score(short) and score(long) == score(loud)
    assert [mo.triggered for mo in long.log] == [False] * 6 and [mo.triggered for mo in loud.log] == [
        True
    ] * 6
    middle = sorted(score(long))[3]
    split = Session(
        small, Streaming(decide="head", theta=middle, speak=path, forget_replies=True, max_new_tokens=3)
    )
    assert [mo.triggered for mo in split.run(clip(6))] == [s > middle for s in score(long)]
    assert 0 < sum(mo.triggered for mo in split.log) < 6


def test_speak_files_that_are_none(small, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    for path, says in ((tmp_path / "bad.safetensors", "no weights"), (tmp_path / "none", "no weights")):
        with pytest.raises(ConfigError, match=says):
            Session(small, Streaming(speak=str(path)))
    Speak(32).save(tmp_path / "narrow.safetensors")
    with pytest.raises(ConfigError, match=r"needs \(2, 64\)"):
        Session(small, Streaming(speak=str(tmp_path / "narrow.safetensors")))


# ---- with other mechanisms ------------------------------------------------------------------------------------------------


def test_a_token_drop_streams_as_offline(small):
    drop = DifferentialTokenDrop(threshold=0.9)
    session = Session(small, QUIET, mechanisms=[drop])
    log = session.run(clip(8))
    ready = small.prepare(question())
    source = small.maps(ready, mechanisms=[drop])[0].source
    kept = [int(((source >= 16 * f) & (source < 16 * f + 16)).sum()) for f in range(8)]
    assert [mo.kept for mo in log] == kept and sum(kept) < 100 and {mo.of for mo in log} == {16}


def test_a_frame_that_is_dropped_whole(small):
    """Where is the decision read? The last decision stands, or an interval token was fed; it is logged."""
    drop = DifferentialTokenDrop(threshold=0.5)
    for compat, where in (("paper", "previous"), ("released", "interval")):
        session = Session(small, Streaming(decide="never", compat=compat), mechanisms=[drop])
        log = session.run(clip(4, moving=False))
        assert [mo.read_at for mo in log] == ["frame", *[where] * 3] and [mo.kept for mo in log] == [
            16,
            0,
            0,
            0,
        ]
        assert all(mo.p_silent is not None for mo in log)
        assert session.context.next_rope == 2 + 4 * 16 + (3 if compat == "released" else 0)
    assert close(
        session.context.replay()[0][0, -1].softmax(-1)[silent_id(small, EXAMPLE)],
        torch.tensor(log[-1].p_silent),
    )


def test_a_scene_change_speaks(small):
    frames = clip(6, moving=False)
    pixels = frames.pixels.clone()
    pixels[3:] = clip(3, moving=False, seed=9).pixels
    drop = DifferentialTokenDrop(threshold=0.02, space="pixel")
    for forget in (False, True):
        config = Streaming(decide="scene", theta=0.6, max_new_tokens=2, forget_replies=forget)
        log = Session(small, config, mechanisms=[drop]).run(replace(frames, pixels=pixels))
        assert [mo.triggered for mo in log] == [False, False, False, True, False, False]


def test_edges_act_in_a_stream_as_offline(small):
    """A knock-out of everything before the last 16 rows, in every step as in one forward."""
    far = lambda q, k: (q[:, None] - k[None, :]) < 16  # noqa: E731
    edges = dict.fromkeys(range(2, 5), far)
    session = Session(small, QUIET, edges=edges)
    session.run(clip(4))
    free = Session(small, QUIET)
    free.run(clip(4))
    cut, plain = session.log[-1].p_silent, free.log[-1].p_silent
    silent = silent_id(small, QUIET)
    assert abs(cut - plain) > 1e-7
    assert float(session.context.replay()[0][0, -1].softmax(-1)[silent]) == pytest.approx(cut, rel=1e-4)
    assert float(free.context.replay()[0][0, -1].softmax(-1)[silent]) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("mech", "says"),
    [
        (SegmentMerging(n_segments=2, keep=4, n_global=0), "SegmentMerging needs the whole video"),
        (ThumbnailAndSampling(4, 8), "sampler slot"),
        (ThumbnailAndSampling(0, 8), "ThumbnailAndSampling needs the whole video"),
        (DifferentialTokenDrop(ratio=0.5), "whole video cannot be kept in a stream"),
        (EXAMPLE, "a session has its own layout"),
    ],
)
def test_what_cannot_stream_is_refused_by_name(small, mech, says):
    with pytest.raises(RunError, match=says):
        Session(small, QUIET, mechanisms=[mech])


def test_policies_are_refused_in_a_session_and_work_on_the_whole_stream(small):
    from lab.edges.policy import Policy

    policy = Policy.from_dict({"format": "edge-policy/1", "cuts": [{"layers": "all", "q": "frame", "k": "frame", "where": "frame(q) - frame(k) > 0"}]})  # fmt: skip
    with small.pruned(policy), pytest.raises(RunError, match="bound to a whole prompt"):
        Session(small, QUIET).see(clip(1))
    ready = small.prepare(question(4), n_frames=4)
    cut = small.run(ready, mechanisms=[QUIET], policy=policy).heads["frame_end"]
    alone = Session(small, QUIET)
    free = small.run(ready, mechanisms=[QUIET]).heads["frame_end"]
    assert torch.allclose(cut[:, 0], free[:, 0]) and not torch.allclose(cut[:, 1:], free[:, 1:], atol=1e-3)
    assert alone.log == []


# ---- wrong use ----------------------------------------------------------------------------------------------------------


def test_wrong_frames_and_settings(small):
    session = Session(small, QUIET)
    session.see(np.zeros((32, 32, 3), np.uint8), 3.0)
    with pytest.raises(UsageError, match="frames come in order"):
        session.see(clip(1), 2.0)
    with pytest.raises(UsageError, match="takes the 1 frames"):
        session.see(clip(2))
    for wrong, says in (
        ({"theta": -1}, "theta"), ({"theta": float("nan")}, "theta"), ({"decide": "loud"}, "silence, head"), ({"fps": 0}, "fps"),
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"open": ""}, "open, close"), ({"compat": "x"}, "paper, released"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=says):
            Streaming(**wrong)
    with pytest.raises(UsageError, match="Speak head"):
        Session(small, Streaming(decide="head"))
    with pytest.raises(UsageError, match="token drop"):
        Session(small, Streaming(decide="scene"))
    with pytest.raises(UsageError, match="is 2 tokens"):
        Session(small, Streaming(interval="ab"))
    session.reset()
    assert session.context.n == 0 and session.log == [] and session.see(clip(1), 0.0).frame == 0


def test_the_trace_is_a_result(small):
    session = Session(small, Streaming(theta=2.0, max_new_tokens=2))
    session.run(clip(3), questions=[(0.5, VideoQA(clip(1), "Where?", ("left", "right"), answer=0))])
    r = session.result()
    assert r.axes == ("frame",) and np.isnan(r.values).tolist() == [False, True, False]
    assert r.notes["triggered"] == [0, 2] and r.notes["replies"][1]["query"] == "Where?"
    assert "(A) left\n(B) right" in "".join(session.context.tokens.pieces)
    assert {"question", "option", "template", "frame", "generated"} <= set(session.context.tokens.roles())
