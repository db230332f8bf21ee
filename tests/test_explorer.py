"""The explorer without a browser: state, linked views, apply, undo, save and reopen, Stop, the error line."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import lab
from lab.app.screen import FRAMES, LENS, NEEDED, NOTHING, TOKEN
from lab.app.segments import blocked_of
from lab.app.session import Session
from lab.app.worker import Worker
from lab.edges import presets
from lab.edges.cutrows import policy_cuts
from lab.edges.dense import run_dense
from lab.edges.pathrows import path_rows
from lab.edges.policy import Policy
from lab.errors import ConfigError, UsageError
from lab.model.hooking import hooked
from lab.recipe import load
from lab.sim.planted import planted_model, questions
from probes.answers import AnswersRecipe, answers
from probes.lens import lens, words

CLIPS = Path(lab.__file__).parent / "data/clips/items.yaml"
NO_VIDEO = {"format": "edge-policy/1", "cuts": [{"q": "last", "k": "video"}]}


@pytest.fixture(scope="module")
def model():
    return lab.load("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def item():
    return lab.load_items(CLIPS)[0]


@pytest.fixture(scope="module")
def session(model, item):
    return Session(model, item)


@pytest.fixture()
def ex(model, item, tmp_path):
    made = lab.explore(model, item, folder=tmp_path)
    yield made
    made.close()
    assert not hooked(model)


def say(widget, **message) -> None:
    """A message as the browser sends it."""
    widget._handle_custom_msg(message, [])


def p_of(model, ready, policy: Policy) -> list[float]:
    """Option probabilities by the reference executor: what Apply must show."""
    return model.answer(ready, policy=policy).option_probs.tolist()


# ---- answers --------------------------------------------------------------------------------------------------------


def test_apply_shows_the_answer_of_the_reference_executor(ex, model) -> None:
    say(ex.editor.widget(), do="preset", name="no video → last")
    say(ex.editor.widget(), do="brush", layers=[2, 5], heads=[1])
    say(ex.editor.widget(), do="paint", cells=[[3, 1], [4, 2]], how="block")
    say(ex.editor.widget(), do="apply")
    assert ex.wait()
    want = p_of(model, ex.session.ready, ex.policy)
    assert np.abs(np.array(ex.edited.p) - want).max() < 1e-6 < np.abs(np.array(ex.clean.p) - want).max()
    assert ex.edited.removed == ex.editor.grid.removed == _removed(ex)
    assert f"data-p='{ex.edited.p[0]!r}'" in ex.panels.answers.value
    ex.pin("before")
    ex.editor.reset()
    ex.apply()
    assert ex.wait()
    assert ex.edited.p == ex.clean.p and [a.name for a in ex.pinned] == ["before"] == [ex.selection.run]
    assert "before" in ex.panels.answers.value
    ex.unpin()
    assert "before" not in ex.panels.answers.value


def _removed(ex) -> int:
    """Edges that the policy removes, counted from its dense masks."""
    s = ex.session
    masks = ex.policy.masks(s.tokens, s.n_layers, s.n_heads, s.item)
    return sum(int(m.sum()) * (1 if m.ndim == 3 else s.n_heads) for m in masks.values())


def test_the_newest_apply_wins(ex, model) -> None:
    for _ in range(5):
        ex.editor.preset("no cross-frame")
        ex.apply()
        ex.editor.reset()
        ex.apply()
        ex.editor.preset("no video → last")
        ex.apply()
    assert ex.wait()
    want = p_of(model, ex.session.ready, Policy.from_dict(NO_VIDEO))
    assert np.abs(np.array(ex.edited.p) - want).max() < 1e-6 and not ex.editor.widget().busy


@pytest.mark.parametrize("executor", ["fast", "reference"])
def test_the_recipe_gives_what_the_model_answers(model, item, executor) -> None:
    policy = Policy.from_dict(NO_VIDEO)
    found = answers(model, item, policy=policy, executor=executor, show_progress=False)
    ready = model.prepare(item, 8)
    assert np.abs(found.values[0, 0] - model.answer(ready).option_probs.numpy()).max() < 1e-6
    assert np.abs(found.values[0, 1] - p_of(model, ready, policy)).max() < 1e-6
    null = answers(model, item, executor=executor, show_progress=False)
    assert np.array_equal(null.values[:, 0], null.values[:, 1])


def test_an_open_question_shows_the_likeliest_words(model, item) -> None:
    s = Session(model, lab.VideoQA(item.video, item.question))
    probs = s.clean.double().softmax(-1)
    assert not s.choices.options and s.choices.p(s.clean) == tuple(probs.topk(5).values.tolist())
    odds = torch.log(probs.max() / (1 - probs.max()))
    assert abs(s.choices.log_odds(s.clean, 0) - float(odds)) < 1e-6


# ---- save and reopen ------------------------------------------------------------------------------------------------


def test_a_saved_experiment_reopens_exactly_and_runs_to_the_same_numbers(ex, model, item, tmp_path) -> None:
    ex.editor.preset("Map the Flow, 7b")
    ex.editor.brush((2, 4), [0, 2])
    ex.editor.paint([(16, 10), (5, 5)])
    ex.selection.set(frame=3, patch=(1, 2), layer=5)
    ex.worker.stop("flow")
    ex.cut_from(TOKEN)
    ex.show(LENS)
    ex.apply()
    assert ex.wait()
    path = ex.save(tmp_path / "deep" / "mine.yaml")
    assert "vlab run" in ex.panels.top.state
    other = lab.explore(model, item, folder=tmp_path)
    say(other.panels.file, do="open", path=str(path))
    assert other.wait() and other.panels.top.error == ""
    mine, theirs = ex.editor.grid, other.editor.grid
    assert np.array_equal(mine.blocked, theirs.blocked) and (mine.layers, mine.heads) == (
        theirs.layers,
        theirs.heads,
    )
    assert other.selection.to_dict() == ex.selection.to_dict()
    assert (other.overlay, other.source) == (LENS, TOKEN) and other.edited.p == ex.edited.p
    recipe = load(path)
    assert isinstance(recipe, AnswersRecipe) and recipe.id == recipe.model_copy(update={"view": {}}).id
    result = recipe.run(progress=False)[0]  # loads the model anew, as `vlab run` does
    assert np.abs(result.values[0] - [ex.clean.p, ex.edited.p]).max() < 1e-6
    other.close()


def test_plain_policies_open_where_whole_segments_can_show_them(ex, tmp_path) -> None:
    Policy.from_dict(NO_VIDEO).save(tmp_path / "p.yaml")
    ex.open(tmp_path / "p.yaml")
    assert ex.wait() and ex.editor.policy()["cuts"] == [{"layers": "1-8", "q": "last", "k": "video"}]
    before = ex.editor.grid.blocked.copy()
    for cut in (
        {"q": "video", "k": "video", "where": "row(q) > row(k)"},
        {"q": "last", "k": "video", "gate": -1.0},
    ):
        Policy.from_dict({"format": "edge-policy/1", "cuts": [cut]}).save(tmp_path / "p.yaml")
        say(ex.panels.file, do="open", path=str(tmp_path / "p.yaml"))
        assert "the editor" in ex.panels.top.error and np.array_equal(before, ex.editor.grid.blocked)
    assert ex.panels.top.details.startswith("Traceback")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1", "mapping"),
        ("kind: probes.lens.LensRecipe\nitems: {sim: moving_direction}", "opens experiments"),
        ("a: [", "line"),
        (None, "cannot read"),
    ],
)
def test_files_that_are_no_experiment_leave_all_as_it_is(ex, tmp_path, text, says) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    ex.editor.preset("no video → last")
    before = ex.editor.grid.blocked.copy()
    say(ex.panels.file, do="open", path=str(path))
    assert says in ex.panels.top.error and np.array_equal(before, ex.editor.grid.blocked)
    say(ex.panels.file, do="save", path="x.txt")
    assert ".yaml" in ex.panels.top.error


def test_arrays_cannot_be_named_so_the_policy_alone_is_saved(model, item, tmp_path) -> None:
    video = np.zeros((8, 32, 32, 3), np.uint8)
    ex = lab.explore(model, lab.VideoQA(video, item.question, item.options), folder=tmp_path)
    ex.editor.preset("no video → last")
    ex.save()
    assert "policy alone" in ex.panels.top.state
    ex.editor.reset()
    ex.open()
    assert ex.editor.policy() == NO_VIDEO | {"cuts": [{"layers": "1-8", "q": "last", "k": "video"}]}
    ex.close()


# ---- what is looked at ----------------------------------------------------------------------------------------------


def test_a_click_on_a_patch_moves_lens_and_flow(ex) -> None:
    s = ex.session
    ex.strip.widget().set_trait("frame", 3)
    ex.strip.widget().set_trait("patch", (1, 2))
    assert ex.wait()
    token = int(s.positions[3, 1, 2])
    assert ex.selection.token == token and ex.lens.widget().tokens[0] == token
    flow = ex.flow.result()
    assert (
        "frame:3" in flow.name and not np.isnan(flow.values).any() and "frame:2" not in flow.coords["pathway"]
    )
    ex.flow.widget().column = "last"
    assert ex.selection.pair == ("last", "frame:3") == ex.editor.widget().pair


def test_the_numbers_of_a_flow_are_single_knock_outs(session, model) -> None:
    for alone in (True, False):
        every = session.from_token(56, alone=alone)
        paths = {n: every[n] for n in (next(iter(every)), "option:3", "last")}
        parts = list(session.traced(paths, "x"))
        values = parts[-1].values
        assert np.isnan(parts[0].values).any() and not np.isnan(values).any() and parts[-1].notes["done"] == 1
        for layer, name in ((1, next(iter(paths))), (5, "last"), (8, "option:3")):
            j = list(paths).index(name)
            cut = path_rows(session.tokens, paths[name], session.item)
            around = [i for i in (layer - 2, layer - 1, layer) if 0 <= i < 8]
            logits = run_dense(model, session.ready, dict.fromkeys(around, cut))[0, -1]
            assert abs(values[layer - 1, j] - session.effect(logits)) < 1e-4
    only = session.from_token(56, alone=True)["last"]
    cut = path_rows(session.tokens, only, session.item).rows(torch.arange(len(session.tokens)))[0]
    assert cut.nonzero().tolist() == [[len(session.tokens) - 1, 56]]


def test_a_flow_finds_the_planted_way_and_nothing_else() -> None:
    """Frames compare themselves in layer 1, options read frames in layer 2, `last` reads options in layer 3."""
    s = Session(planted_model(), questions(1, 0)[0])
    *_, out = s.traced(s.from_token(int(s.positions[0, 0, 0]), alone=False), "x")
    *_, into = s.traced(s.usual(), "x")
    frames = [n.startswith("frame:") for n in out.coords["pathway"]]
    options = [n.startswith("option:") for n in out.coords["pathway"]]
    size = np.abs(out.values)
    assert s.window == 1 and size[0, frames].max() > 0.1 and size[1, options].max() > 0.1
    size[0, frames] = size[1, options] = 0
    assert size.max() < 1e-3
    by_name = dict(zip(into.coords["pathway"], np.abs(into.values).T, strict=True))
    assert by_name["cross-frame"].argmax() == 0 and by_name["cross-frame"][1:].max() < 1e-3
    assert by_name["question+option->last"].argmax() == 2 and by_name["video->last"].max() < 1e-3


def test_the_lens_reads_what_the_probe_reads(session, model) -> None:
    at = int(session.positions[2, 0, 1])
    mine = session.lens(at, top=3)
    probe = words(model, session.ready, "frame:2", top=3, show_progress=False)
    j = probe.notes["where"][0]["position"].index(at)
    assert np.allclose(mine.best.values[:, 0], probe.values[0, :, j], atol=1e-6)
    assert [w[0] for w in mine.best.notes["words"]] == [w[j] for w in probe.notes["words"][0]]
    seen = lens(model, session.ready, "video", by="patch", show_progress=False)
    assert np.allclose(session.lens_on_video(4).values, seen.values[0, 0, 3], atol=1e-6)


def test_tokens_that_need_no_computing_are_those_the_answer_does_not_hang_on(session, model) -> None:
    """Zeroing the stream of rows that are not needed after a layer changes nothing; of those that are, it does."""
    policy = presets.video_exit(4, 8)
    needed = session.needed(policy)
    assert needed.values[:3].all() and not needed.values[4:].any()
    cuts = policy_cuts(session.bound(policy))
    clean = session.run([cuts])[0]
    video = session.positions.ravel()

    def wiped(layer: int) -> torch.Tensor:
        def wipe(value, hook):
            value = value.clone()
            value[:, video] = 0
            return value

        return model.run_with_hooks(
            session.ready, fwd_hooks=[(f"blocks.{layer - 1}.hook_resid_post", wipe)], policy=policy
        )[0, -1]

    assert torch.allclose(wiped(5), clean, atol=1e-4) and not torch.allclose(wiped(2), clean, atol=1e-2)


@pytest.mark.parametrize("overlay", [LENS, FRAMES, NEEDED, NOTHING])
def test_every_overlay_is_painted_or_taken_away(ex, overlay) -> None:
    say(ex.panels.overlay, do="overlay", value=overlay)
    assert ex.wait() and ex.panels.top.error == ""
    assert np.isfinite(ex.strip.result().values).all() == (overlay != NOTHING)
    say(ex.panels.overlay, do="overlay", value="?")
    assert "no overlay" in ex.panels.top.error


def test_many_frames_stand_in_groups_that_policies_can_name(model, item) -> None:
    with pytest.warns(lab.errors.LabWarning, match="positions"):
        s = Session(
            model, lab.VideoQA(np.zeros((70, 32, 32, 3), np.uint8), item.question, item.options), n_frames=70
        )
    frames = [n for n in s.names if n.startswith("frame:")]
    assert len(frames) == 24 and frames[0] == "frame:0+frame:1+frame:2" and s.labels[1] == "frames 0–2"
    assert int(s.marks.sum()) == len(s.tokens) and bool((s.marks.sum(0) == 1).all())
    n = len(s.tokens)
    assert s.pairs.sum() == n * (n + 1) // 2
    cells = blocked_of(Policy.from_dict(NO_VIDEO), s.tokens, s.names, 8, 4, s.item)
    assert int((cells.sum((0, 1)) > 0).sum()) == 24
    with pytest.raises(ConfigError, match="whole segments"):
        blocked_of(presets.frame_local(3, 8), s.tokens, s.names, 8, 4, s.item)


# ---- Stop, threads, errors --------------------------------------------------------------------------------------------


def test_stop_ends_a_long_trace_and_keeps_what_is_computed(ex, model) -> None:
    started, run = threading.Event(), ex.session.run

    def slow(cuts):
        started.set()
        time.sleep(0.05)
        return run(cuts)

    ex.session.run = slow
    say(ex.panels.top, do="trace")
    assert started.wait(10)
    while not np.isfinite(ex.traced.values).any():
        time.sleep(0.01)
    say(ex.panels.top, do="stop")
    assert ex.wait(1.0)
    left = np.isfinite(ex.traced.values)
    assert left.any() and not left.all() and "kept" in ex.panels.top.state
    ex.session.run = run
    *_, whole = ex.session.traced(ex.session.usual(), "x")
    assert np.allclose(ex.traced.values[left], whole.values[left], atol=1e-4)
    assert ex.session.answer(Policy(cuts=()), "again").p == ex.clean.p and not hooked(model)


def test_an_apply_does_not_wait_for_a_trace(ex) -> None:
    run, applied = ex.session.run, threading.Event()
    ex.session.run = lambda cuts: (time.sleep(0.05), run(cuts))[1]
    ex.trace_all()
    ex.editor.preset("no video → last")
    ex.editor.widget().observe(lambda c: c["new"] or applied.set(), "busy")
    ex.apply()
    assert applied.wait(10) and "trace" in ex.worker.busy
    ex.stop()
    assert ex.wait(2)


def test_callbacks_from_many_threads_leave_one_consistent_state(ex) -> None:
    acts = [
        lambda: say(ex.editor.widget(), do="preset", name="no video → last"), lambda: say(ex.editor.widget(), do="apply"),
        lambda: ex.selection.set(frame=1, patch=(0, 0)), lambda: say(ex.panels.overlay, do="overlay", value=LENS),
        lambda: say(ex.panels.pins, do="pin"), lambda: say(ex.panels.top, do="trace"),
    ]  # fmt: skip
    threads = [threading.Thread(target=a) for a in acts * 2]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    ex.apply()
    assert ex.wait() and ex.panels.top.error == ""
    want = ex.session.answer(Policy.from_dict(NO_VIDEO), "x").p
    assert np.allclose(ex.edited.p, want, atol=1e-6) and len(ex.pinned) == 2
    assert not np.isnan(ex.traced.values).any() and ex.selection.token == int(ex.session.positions[1, 0, 0])


def test_what_goes_wrong_in_the_worker_is_one_line_and_the_next_job_runs(ex) -> None:
    def broken(*_):
        raise ValueError("boom\nsecond line")

    answer, ex.session.answer = ex.session.answer, broken
    ex.apply()
    assert ex.wait() and ex.panels.top.error == "ValueError: boom second line"
    assert "broken" in ex.panels.top.details and not ex.editor.widget().busy
    ex.session.answer = answer
    ex.apply()
    assert ex.wait() and ex.panels.top.error == ""


def test_flow_without_a_token_says_what_to_do(ex) -> None:
    say(ex.panels.source, do="flow")
    assert "click on a patch" in ex.panels.top.error
    say(ex.panels.source, do="source", value="?")
    assert "use" in ex.panels.top.error
    say(ex.panels.top, do="no such thing")


def test_a_changed_model_is_run_anew(model, item) -> None:
    s = Session(model, item)
    before, p = s.store, s.answer(Policy(cuts=()), "x").p
    with model.hooks([("blocks.3.hook_resid_post", lambda value, hook: value * 0)]):
        hooked_p = s.answer(Policy(cuts=()), "hooked").p
        assert np.allclose(hooked_p, model.answer(s.ready).option_probs.tolist(), atol=1e-6)
    assert hooked_p != p and s.answer(Policy(cuts=()), "again").p == p and s.store is not before


@pytest.mark.parametrize("wrong", [None, 3, "x.mp4", []])
def test_what_cannot_be_explored_is_refused(model, wrong) -> None:
    with pytest.raises(UsageError, match="VideoQA"):
        lab.explore(model, wrong)


def test_what_cannot_be_run_from_a_store_says_why(model, item) -> None:
    from lab.mechanisms.mixture_of_depths import MixtureOfDepths

    with pytest.raises(UsageError, match="stored clean run, and here a mechanism takes detours"):
        lab.explore(model, model.prepare(item, 8, mechanisms=[MixtureOfDepths.layer_skip()]))


# ---- the worker -------------------------------------------------------------------------------------------------------


def test_the_urgent_lane_goes_first_and_the_newest_job_of_a_lane_wins() -> None:
    seen: list[str] = []
    failed: list[BaseException] = []
    gate = threading.Event()

    def job(name: str, n: int):
        for _ in range(n):
            gate.wait(10)
            seen.append(name)
            yield

    def bad():
        yield
        raise KeyError("x")

    worker = Worker(("a", "b"), failed=failed.append, changed=lambda lanes: None)
    worker.submit("b", job("b", 3))
    time.sleep(0.05)  # its first piece waits at the gate
    for name in ("a1", "a2"):
        worker.submit("a", job(name, 2))
    assert worker.busy == ("a", "b")
    gate.set()
    assert worker.wait(5)
    assert seen == ["b", "a2", "a2", "b", "b"]
    worker.submit("a", bad())
    assert worker.wait(5) and isinstance(failed[0], KeyError) and worker.busy == ()
    worker.submit("b", (None for _ in itertools.count()))
    worker.stop()
    assert worker.wait(5)
    worker.close()
    assert not worker._thread.is_alive()
    worker.submit("a", job("after", 1))
    assert worker.wait(5) and seen[-1] == "after"
    worker.close()
