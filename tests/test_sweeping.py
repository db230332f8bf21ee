"""Sweeps: both executors give the same curves, every style cuts the layers it says, journals resume, memory is halved."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.bench import models
from lab.bench import sweep as bench
from lab.carriers import VideoQA
from lab.edges import sweeping
from lab.edges.dense import run_dense
from lab.edges.pathways import cut_mask
from lab.edges.policy import Policy
from lab.edges.sweeping import Sweep, layers_of, sweep
from lab.errors import ConfigError, LabWarning, RunError, UsageError
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.mechanisms.mixture_of_depths import MixtureOfDepths
from lab.mechanisms.vidkv import VidKV
from lab.model.zoo import wrap
from lab.runs import Cancel, Cancelled
from lab.slots import Plan, plan_of
from probes.knockout import knockout
from tests import families
from tests.edgecases import attention_only_in
from tests.families import FAMILIES, inputs

PATHWAYS = ("cross-frame", "video->text", "video->last", "text->last", "last->last", "frame:1->text")


def ready_of(model, name, **kw):
    return model.prepare_inputs(**inputs(name, **kw))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_executors_give_the_same_curves(name, wrapped):
    model = wrapped(name)
    items = [ready_of(model, name), ready_of(model, name, seed=4)]
    fast, slow = (
        sweep(model, items, PATHWAYS, window=3, executor=e, show_progress=False)
        for e in ("fast", "reference")
    )
    assert fast.axes == slow.axes and fast.coords == slow.coords and fast.unit == slow.unit
    p = np.array(list(slow.notes["p_clean"].values()))[:, None, None]
    assert np.abs((fast.values - slow.values) / 100 * p).max() <= 1e-5  # in probability
    assert np.abs(slow.values).max() > 1.0 and fast.notes["fallbacks"] == []
    points = len(items) * (1 + len(PATHWAYS) * model.cfg.n_layers)
    assert slow.notes["ledger"]["forwards"] == slow.notes["ledger"]["naive"] == points
    assert fast.notes["ledger"]["naive"] == points and fast.notes["ledger"]["forwards"] < points / 2


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_the_old_probe_takes_either(name, wrapped):
    model = wrapped(name)
    ready = ready_of(model, name)
    fast, slow = (
        knockout(model, ready, window=2, executor=e, show_progress=False) for e in ("fast", "reference")
    )
    assert np.abs(fast.values - slow.values).max() <= 1e-2 and fast.coords == slow.coords  # percent
    assert set(slow.notes) == set(fast.notes) and slow.notes["executor"] == "reference"


def test_one_tower_call_for_all_points(wrapped):
    model = wrapped("internvl")
    ready = ready_of(model, "internvl", seed=11)
    result = sweep(model, ready, ["video->last"], show_progress=False)
    assert result.notes["ledger"]["tower_calls"] == 1


@pytest.mark.parametrize(
    ("style", "window", "centre", "layers"),
    [
        ("center", 3, 0, [0, 1]), ("center", 3, 4, [3, 4]), ("center", 4, 2, [0, 1, 2, 3]),
        ("shift", 3, 0, [0, 1, 2]), ("shift", 3, 4, [2, 3, 4]), ("shift", 9, 2, [0, 1, 2, 3, 4]), ("shift", 3, 2, [1, 2, 3]),
        ("inverse", 3, 0, [2, 3, 4]), ("inverse", 3, 2, [0, 4]), ("inverse", 9, 2, []),
        ("top_down", 3, 3, [3, 4]), ("bottom_up", 3, 1, [0, 1]),
    ],
)  # fmt: skip
def test_every_style_cuts_the_layers_it_says(style, window, centre, layers):
    assert Sweep(("video->last",), window, style).layers(centre, 5) == layers


@pytest.mark.parametrize("style", ["shift", "inverse", "top_down", "bottom_up"])
def test_styles_by_hand(style, wrapped):
    model = wrapped("video_llama_3")
    ready = ready_of(model, "video_llama_3")
    found = sweep(model, ready, ["video->text"], window=3, style=style, show_progress=False)
    cut, what = cut_mask(ready.tokens, "video->text"), Sweep(("video->text",), 3, style)
    clean = run_dense(model, ready, {})[0, -1].softmax(-1)
    token = int(clean.argmax())
    for centre in range(5):
        p = run_dense(model, ready, dict.fromkeys(what.layers(centre, 5), cut))[0, -1].softmax(-1)[token]
        expected = float((p - clean[token]) * 100 / clean[token])
        assert abs(found.values[0, 0, centre] - expected) <= 1e-2
    assert found.notes["style"] == style


def test_the_papers_window_is_clipped():
    assert list(layers_of(0, 9, 32)) == [0, 1, 2, 3, 4] and list(layers_of(31, 9, 32)) == [27, 28, 29, 30, 31]


@pytest.mark.parametrize("executor", ["fast", "reference"])
def test_an_interrupted_sweep_goes_on_where_it_stopped(executor, wrapped, tmp_path, monkeypatch):
    """The second run computes only what is missing, and both together give what one run gives, bit for bit."""
    model = wrapped("internvl")
    items = [ready_of(model, "internvl", seed=s) for s in range(3)]
    keywords = {"window": 2, "executor": executor, "show_progress": False}
    whole = sweep(model, items, ["video->last", "text->last"], **keywords)
    cancel = Cancel()
    record, asked = sweeping.Run.record, []

    def and_stop(self, key, *args):
        asked.append(key)
        if key == stop:
            cancel.set()
        record(self, key, *args)

    pieces = [f"item:{n}" for n in (1, 2, 3)]
    if executor == "reference":
        pieces = [f"{p}|{way}" for p in pieces for way in ("video->last", "text->last")]
    stop = pieces[1 if executor == "fast" else 2]
    with monkeypatch.context() as m, pytest.raises(Cancelled):
        m.setattr(sweeping.Run, "record", and_stop)
        sweep(model, items, ["video->last", "text->last"], out=tmp_path, cancel=cancel, **keywords)
    assert asked == pieces[: pieces.index(stop) + 1]
    again = sweep(model, items, ["video->last", "text->last"], out=tmp_path, **keywords)
    assert np.array_equal(again.values, whole.values)
    assert again.notes["p_clean"] == whole.notes["p_clean"] and again.notes["token"] == whole.notes["token"]
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()[1:]]
    assert [r["key"] for r in lines] == pieces
    repeated = 0 if executor == "fast" else 1  # the clean run of the item that was half done
    assert again.ledger["forwards"] == pytest.approx(whole.ledger["forwards"] + repeated)
    assert sum(r["spent"]["forwards"] for r in lines) == pytest.approx(again.ledger["forwards"])


@pytest.mark.parametrize("executor", ["fast", "reference"])
def test_a_finished_journal_is_read_without_running_anything(executor, wrapped, tmp_path, monkeypatch):
    model = wrapped("internvl")
    keywords = {"window": 2, "executor": executor, "show_progress": False, "out": tmp_path}
    first = sweep(model, ready_of(model, "internvl"), ["video->last", "text->last"], **keywords)

    def refused(*args, **kw):
        raise AssertionError("an item was run twice")

    for engine in ("_Fast", "_Reference"):
        monkeypatch.setattr(sweeping, engine, refused)
    again = sweep(model, ready_of(model, "internvl"), ["video->last", "text->last"], **keywords)
    assert np.array_equal(again.values, first.values) and again.notes == first.notes


def test_a_folder_belongs_to_one_sweep(wrapped, tmp_path):
    model = wrapped("internvl")
    sweep(model, ready_of(model, "internvl"), ["video->last"], out=tmp_path, show_progress=False)
    with pytest.raises(Exception, match="belongs to recipe"):
        sweep(model, ready_of(model, "internvl", seed=1), ["video->last"], out=tmp_path, show_progress=False)
    with pytest.raises(UsageError, match="same items"):
        sweeping.journal_of(model, [ready_of(model, "internvl")], Sweep(("none",))).run()


def test_less_is_run_together_when_memory_runs_out(wrapped, monkeypatch):
    model = wrapped("internvl")
    ready = ready_of(model, "internvl")
    plain = sweep(model, ready, ["video->last"], window=2, show_progress=False)
    tried, run = [], sweeping.run_cut

    def tight(model, store, cuts, n_rows, **kw):
        tried.append(n_rows)
        if n_rows > smallest[0]:
            raise torch.OutOfMemoryError("no room")
        return run(model, store, cuts, n_rows=n_rows, **kw)

    smallest = [600]
    monkeypatch.setattr(sweeping, "run_cut", tight)
    halved = sweep(model, ready, ["video->last"], window=2, show_progress=False)
    assert tried == [4096, 2048, 1024, 512] and np.abs(halved.values - plain.values).max() <= 1e-3
    smallest[0] = 0
    with pytest.raises(RunError, match="does not fit in memory"):
        sweep(model, ready, ["video->last"], show_progress=False)


def test_other_errors_are_not_mistaken_for_memory(wrapped, monkeypatch):
    model = wrapped("internvl")

    def broken(*args, **kw):
        raise RuntimeError("something else")

    monkeypatch.setattr(sweeping, "run_cut", broken)
    with pytest.raises(RuntimeError, match="something else"):
        sweep(model, ready_of(model, "internvl"), ["video->last"], show_progress=False)


def test_cuts_without_effect_warn_and_nothing_is_zero(wrapped):
    model = wrapped("internvl")
    ready = ready_of(model, "internvl")
    with pytest.warns(LabWarning, match="'last->video' changed nothing"):
        result = sweep(model, ready, ["last->video", "none"], show_progress=False)
    assert (result.values == 0.0).all() and result.notes["ledger"]["forwards"] == 1.0


def test_a_planted_route_is_found_by_the_fast_executor(wrapped):
    """All attention is switched off but in one layer; only that layer may show."""
    model = wrapped("llava_onevision")
    ready = ready_of(model, "llava_onevision")
    with attention_only_in(model, 2), pytest.warns(LabWarning, match="cross-frame.*changed nothing"):
        result = sweep(model, ready, ["video->last", "cross-frame"], window=1, show_progress=False)
    flow = np.abs(result.select(pathway="video->last").values[0])
    assert flow[2] > 1.0 and np.delete(flow, 2).max() < 1e-3


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"window": 0}, "at least 1"), ({"window": 1.5}, "whole number, got 1.5"), ({"window": "3"}, "got '3'"),
        ({"n_rows": 0}, "n_rows must be at least 1"), ({"heads": 0}, "list of whole numbers is needed, got 0"),
        ({"frame_pairs": 3}, "pairs \\(key frame, query frame\\)"), ({"frame_pairs": (0, 1)}, "use 'each', or pairs"),
        ({"style": "middle"}, "style='middle'"), ({"metric": "best"}, "metric='best'"),
        ({"executor": "quick"}, "use one of fast, reference"), ({"metric": "answer"}, "needs items with options"),
        ({"pathways": []}, "nothing to do"), ({"pathways": ["vidoe->last"]}, "closest: video"),
    ],
)  # fmt: skip
def test_bad_settings_say_what_is_wrong(keywords, message, wrapped):
    model = wrapped("internvl")
    with pytest.raises(UsageError, match=message):
        sweep(
            model,
            ready_of(model, "internvl"),
            **{"pathways": ["video->last"], "show_progress": False, **keywords},
        )


def test_a_sweep_inside_pruned_is_refused(wrapped):
    """Whether its curves were meant against the pruned or the whole model, nobody can tell."""
    model = wrapped("internvl")
    policy = Policy.from_dict(
        {"format": "edge-policy/1", "cuts": [{"layers": "1", "q": "last", "k": "video"}]}
    )
    with model.pruned(policy), pytest.raises(UsageError, match="sweep outside"):
        sweep(model, ready_of(model, "internvl"), ["video->last"], show_progress=False)


@pytest.mark.parametrize("change", ["mechanism", "its setting", "weights", "hooks"])
def test_a_journal_belongs_to_what_was_run(change, wrapped, tmp_path):
    """Other mechanisms, weights or hooks would give other numbers: the journal's are not handed out for them."""
    model = wrapped("internvl") if change != "weights" else wrap(families.build("internvl"))
    plan, other = Plan(), plan_of([MixtureOfDepths(keep=0.4, seed=3)], model.sizes)
    if change == "its setting":
        plan, other = plan_of([VidKV.EXAMPLE], model.sizes), plan_of([VidKV.NEUTRAL], model.sizes)

    def swept(plan):
        ready = ready_of(model, "internvl")
        ready.plan = plan
        return sweep(model, ready, ["video->last"], window=1, out=tmp_path, show_progress=False)

    first = swept(plan)
    assert np.array_equal(swept(plan).values, first.values)
    if change == "hooks":
        double = [("blocks.1.hook_resid_post", lambda x, hook: x * 2)]
        with model.hooks(double), pytest.raises(UsageError, match="hooks are open"):
            swept(plan)
        return
    if change == "weights":
        with torch.no_grad():
            next(model.hf.parameters()).mul_(1.01)
    with pytest.raises(ConfigError, match="belongs to recipe"):
        swept(plan if change == "weights" else other)


@pytest.mark.parametrize("executor", ["fast", "reference"])
def test_tower_calls_that_a_map_takes_are_counted(executor, wrapped_text):
    """What a stage leaves of a video is known after the tower has run, before anything is cut."""
    model = wrapped_text("llava_onevision")
    video = np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), dtype=np.uint8)
    ready = model.prepare(VideoQA(video, "which ?"), 4, mechanisms=[DifferentialTokenDrop(ratio=0.5)])
    before = model.tower_calls
    found = sweep(
        model, ready, ["video->last", "text->last"], window=2, executor=executor, show_progress=False
    )
    assert found.ledger["tower_calls"] == model.tower_calls - before == 1


def test_hybrid_decoders_say_that_they_fall_back(wrapped):
    model = wrapped("qwen3_5")
    result = sweep(model, ready_of(model, "qwen3_5"), ["video->last"], window=1, show_progress=False)
    assert result.notes["fallbacks"] == ["layer 1 (blocks.0) has no softmax attention"]
    assert result.notes["no_edges"] == [1, 3] and np.abs(result.values).max() > 0


# ---- the bench --------------------------------------------------------------------------------------------------------


def test_the_bench_reads_the_papers_layout_and_measures_what_it_says():
    shape = models.Shape(d=32, mlp=48, layers=3, heads=4, kv_heads=2, side=16, patch=4)
    found = bench.measure(shape, 2, bench.PATHWAYS, n_naive=4, n_rows=512)
    assert found["positions"] == 51 + 2 * 4 + 1 + 63 and found["points"] == 10 * 3
    assert found["max_difference"] <= 1e-5 < found["mean_change"] and found["fallbacks"] == 0
    assert found["ledger"]["naive"] == 31 and 1 < found["ledger"]["forwards"] < 31


def test_the_committed_numbers_meet_their_targets():
    path = Path(bench.__file__).parent / "data" / "sweep_cpu.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    assert set(cases) == set(bench.CASES)
    for name, case in cases.items():
        assert case["target_ratio"] == bench.CASES[name][3] <= case["ratio"], name
        assert case["max_difference"] <= 1e-5 and case["fallbacks"] == 0
        assert case["one"]["from nothing / clean"] <= 1.10 and case["one"]["stored / clean"] <= 1 / 15
