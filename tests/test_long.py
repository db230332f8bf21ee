"""Long prompts: no object of positions x positions, stores that put aside what does not fit, memory that runs out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lab.bench import scaling
from lab.edges import fast, presets, shelf
from lab.edges.closure import closure_of
from lab.edges.cutrows import PolicyCut, policy_cuts, rows_of
from lab.edges.fast import run_cut
from lab.edges.pathrows import path_rows
from lab.edges.pathways import cut_mask
from lab.edges.policy import Policy
from lab.edges.store import Store
from lab.edges.sweeping import sweep
from lab.errors import RunError, TooBig, UsageError
from lab.model.zoo import wrap
from lab.slots import Plan
from tests import edgecases, families

LONG = 4096
DATA = Path(scaling.__file__).parent / "data" / "scaling_cpu.json"
PATHWAYS = ("cross-frame", "video->text", "text->last", "frame:1->frame:3", "none")


def policy_of(*cuts: dict[str, Any]) -> Policy:
    return Policy.from_dict({"format": "edge-policy/1", "cuts": list(cuts)})


def long_ready(model: Any) -> Any:
    """200 frames of 9 tokens, then words up to `LONG` positions."""
    x = families.inputs("llava_next_video", frames=200)
    more = torch.randint(families.WORDS, families.VOCAB, (1, LONG - x["input_ids"].shape[1]))
    x["input_ids"] = torch.cat([x["input_ids"], more], 1)
    x["attention_mask"] = torch.ones_like(x["input_ids"])
    return model.prepare_inputs(**x)


# ---- cuts by rows are the dense ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pathway", [*PATHWAYS, "frame:0+frame:2->text+last", "all->last"])
def test_a_pathway_by_rows_is_its_mask(pathway, wrapped):
    """Row by row, and some rows out of order."""
    tokens = (
        wrapped("llava_next_video").prepare_inputs(**families.inputs("llava_next_video", frames=4)).tokens
    )
    n, cut = len(tokens), path_rows(tokens, pathway)
    square = cut_mask(tokens, pathway)
    for i in range(0, n, 7):
        assert torch.equal(cut.rows(torch.tensor([i]))[0, 0], square[i])
    assert torch.equal(rows_of(square, torch.tensor([5, 2])), rows_of(cut, torch.tensor([5, 2])))
    assert cut.any() == bool(square.any()) and not bool(square.triu(1).any())


CUTS = (
    {"layers": "1-3", "q": "text", "k": "video"},
    {"layers": "2,5", "heads": [0, 3], "q": "video", "k": "video", "where": "frame(q) > frame(k)"},
    {"layers": "4", "q": "generated", "k": "frame:1"},
    {"layers": "5", "q": "*", "k": "*", "where": "pos(q) - pos(k) > 4"},
)


def test_a_policy_by_rows_is_its_masks(wrapped):
    model = wrapped("internvl")
    tokens = model.prepare_inputs(**families.inputs("internvl")).tokens
    for cuts in (CUTS, CUTS[:1], CUTS[2:3], ({"q": "last", "k": "*"},)):
        policy = policy_of(*cuts)
        masks, lazy = policy.masks(tokens, 5, 4), policy_cuts(policy.bind(tokens, 5, 4))
        assert set(masks) == set(lazy)
        at = torch.tensor(random.Random(0).sample(range(len(tokens)), 9))
        for layer, mask in masks.items():
            assert torch.equal(lazy[layer].rows(at), rows_of(mask, at)) and lazy[layer].n_pos == len(tokens)
    same = policy_cuts(policy_of(CUTS[0]).bind(tokens, 5, 4))
    assert len(set(map(id, same.values()))) == 1 and all(isinstance(c, PolicyCut) for c in same.values())


def test_generated_rows_of_a_map_follow_the_policy(wrapped):
    """A map that holds generated tokens already: they lose what `last` loses, and never each other."""
    tokens = wrapped("internvl").prepare_inputs(**families.inputs("internvl")).tokens
    grown = tokens.generated([21, 22])
    policy = policy_of({"layers": "2", "q": "last", "k": "video"})
    mask, lazy = policy.masks(grown, 5)[1], policy_cuts(policy.bind(grown, 5, 4))[1]
    every = torch.arange(len(grown))
    assert torch.equal(lazy.rows(every)[0], mask) and bool(mask[-1].any()) and not bool(mask[:, -2:].any())


# ---- nothing as large as positions x positions ---------------------------------------------------------------------------


def test_a_sweep_over_a_long_prompt_makes_no_square(wrapped):
    """Store, closure, masks and attention of a whole sweep: nothing of a quarter of L x L elements comes to be."""
    model = wrapped("llava_next_video")
    ready = long_ready(model)
    with edgecases.Largest() as largest:
        found = sweep(model, ready, PATHWAYS[:2], window=2, style="top_down", show_progress=False)
    assert LONG * 64 <= largest.numel < LONG * LONG / 4
    assert found.notes["fallbacks"] == [] and (abs(found.values[0]).max(1) > 1e-3).all()


def test_a_policy_that_is_no_rectangle_makes_no_square(wrapped):
    """By distance, in single heads, in every row. (That the numbers are right is seen on short prompts.)"""
    model = wrapped("llava_next_video")
    ready = long_ready(model)
    policy = policy_of(
        {"layers": "2-3", "heads": [1, 2], "q": "*", "k": "*", "where": "pos(q) - pos(k) > 700"},
        {"layers": "4", "q": "text", "k": "video", "where": "row(k) > 0 or frame(k) < 30"},
    )
    with torch.no_grad():
        with edgecases.Largest() as largest:
            got = model(ready, policy=policy, executor="fast")
        assert largest.numel < LONG * LONG / 4
        assert (got - model(ready)).abs().max() > 1e-3


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_preset_runs_fast_without_falling_back(name, wrapped):
    model = wrapped(name)
    ready, n = model.prepare_inputs(**families.inputs(name)), model.cfg.n_layers
    made = [presets.paper(p, "strict", n) for p in presets.FLOWS]
    made += [
        presets.video_exit(2, n),
        presets.frame_local(3, n),
        presets.random_pairs(0.2),
        presets.nothing(),
    ]
    made += [presets.layer_permuted(made[0], n), presets.composition_matched(made[0], n)]
    for policy in made:
        store = Store.of(model, ready)
        bound = policy.bind(ready.tokens, n, model.cfg.n_heads)
        got = run_cut(model, store, [policy_cuts(bound)])[0]
        with torch.no_grad():
            slow, quick = (model(ready, policy=policy, executor=e) for e in ("reference", "fast"))
        assert store.work.fallbacks == 0 and (quick - slow[:1]).abs().max() <= 1e-5
        assert (got - slow[0]).abs().max() <= 1e-5


# ---- the store is larger than its room ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_what_is_put_aside_gives_the_same_numbers(name, share, wrapped):
    """Bit for bit: a store is the same wherever it lies."""
    model = wrapped(name)
    ready = model.prepare_inputs(**families.inputs(name))
    dice = random.Random(2)
    cuts = [edgecases.random_cuts(dice, ready.tokens, 5, 4) for _ in range(8)]
    whole = Store.of(model, ready, budget=1 << 30)
    size = sum(t.nbytes for held in (whole.resid, whole.keys, whole.values) for t in held)
    small = Store.of(model, ready, budget=int(share * size))
    assert whole.aside == 0 and size * (1 - share) <= small.aside <= size
    assert torch.equal(run_cut(model, small, cuts), run_cut(model, whole, cuts))
    assert small.put_aside() == (share > 0) and not small.put_aside() and small.aside == size
    assert torch.equal(run_cut(model, small, cuts), run_cut(model, whole, cuts))


def test_streams_go_before_keys_and_values(wrapped):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    whole = Store.of(model, ready)
    kv = sum(t.nbytes for held in (whole.keys, whole.values) for t in held)
    store = Store.of(model, ready, budget=kv)
    assert store.keys.aside == store.values.aside == 0 < store.resid.aside == store.aside


def test_a_file_of_a_shelf_goes_with_it_and_a_full_disk_is_told(monkeypatch):
    held = shelf.Shelf(0)
    held.put(torch.arange(6.0))
    folder = held._folder
    assert folder is not None and len(list(folder.iterdir())) == 1
    assert torch.equal(held[0], torch.arange(6.0)) and torch.equal(
        held.rows(0, torch.tensor([4])), torch.tensor([4.0])
    )
    half = torch.arange(5).to(torch.bfloat16)
    held.put(half[1:])
    assert torch.equal(held[1], half[1:]) and held.aside == 24 + 8
    del held
    assert not folder.exists()
    monkeypatch.setattr(shelf.shutil, "disk_usage", lambda where: type("U", (), {"free": 3}))
    with pytest.raises(TooBig, match="24 bytes does not fit .* 3 free"):
        shelf.Shelf(0).put(torch.arange(6.0))


@pytest.mark.parametrize("budget", [-1, 1.5, True, "1GB"])
def test_a_budget_is_a_number_of_bytes(budget, wrapped):
    model = wrapped("internvl")
    with pytest.raises(UsageError, match="number of bytes"):
        Store.of(model, model.prepare_inputs(**families.inputs("internvl")), budget=budget)


# ---- memory runs out ----------------------------------------------------------------------------------------------------


def crowded(monkeypatch, most: int, store_may_stay: bool = True) -> list[int]:
    """A batch of more than `most` rows at its widest finds no memory; nor does anything while the store is in the way."""
    run, tried = fast._run, []

    def tight(model, store, jobs, at, out):
        tried.append(len(jobs))
        if sum(job.most for job in jobs) > most or not (store_may_stay or store.aside):
            raise torch.OutOfMemoryError("no room")
        run(model, store, jobs, at, out)

    monkeypatch.setattr(fast, "_run", tight)
    return tried


def test_batches_are_halved_and_nothing_is_run_twice_that_fitted(wrapped, monkeypatch):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    n, cuts = ready.n_pos, [{i: path_rows(ready.tokens, "video->text")} for i in range(5)]
    plain = run_cut(model, Store.of(model, ready), cuts)
    widest = max(len(closure_of(c, n, 5, [n - 1]).rows(layer)) for c in cuts for layer in range(5))
    tried = crowded(monkeypatch, 2 * widest)
    store = Store.of(model, ready)
    assert (run_cut(model, store, cuts) - plain).abs().max() <= 1e-5
    assert tried[0] > 2 and tried[1] == tried[0] // 2 and store.aside == 0


def test_at_one_run_the_store_makes_room_and_then_it_is_said(wrapped, monkeypatch):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    cuts = [{1: path_rows(ready.tokens, "video->last")}, {0: path_rows(ready.tokens, "video->last")}]
    plain = run_cut(model, Store.of(model, ready), cuts)
    with monkeypatch.context() as m:
        crowded(m, 10_000, store_may_stay=False)
        store = Store.of(model, ready)
        assert (run_cut(model, store, cuts) - plain).abs().max() <= 1e-5 and store.aside > 0
    crowded(monkeypatch, 0)
    with pytest.raises(RunError, match="one cut run of 1 rows beside .* does not fit in memory"):
        run_cut(model, Store.of(model, ready), cuts)


def test_a_clean_run_for_which_memory_runs_out_is_made_again_aside(wrapped, monkeypatch):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    put, failed = shelf.Shelf.put, []

    def tight(self, tensor):
        if self.room and len(self) == 3 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no room")
        put(self, tensor)

    whole = Store.of(model, ready)
    monkeypatch.setattr(shelf.Shelf, "put", tight)
    store = Store.of(model, ready)
    assert failed and store.aside > 0 and torch.equal(store.resid[-1], whole.resid[-1])
    assert store.work.row_layers == whole.work.row_layers


def test_other_errors_stay_what_they_are(wrapped, monkeypatch):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))

    def broken(*args, **kw):
        raise RuntimeError("something else")

    monkeypatch.setattr(fast, "_run", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run_cut(model, Store.of(model, ready), [{1: path_rows(ready.tokens, "video->last")}])
    monkeypatch.setattr(shelf.Shelf, "put", broken)
    with pytest.raises(RuntimeError, match="something else"):
        Store.of(model, ready)


# ---- the same rows, uncut -----------------------------------------------------------------------------------------------


def test_uncut_runs_differ_from_the_clean_one_by_rounding_alone():
    """They run what the cut ones run, row for row; in double precision they are the clean run."""
    model = wrap(edgecases.exact(families.build("qwen3_vl")))
    ready = model.prepare_inputs(**edgecases.inputs("qwen3_vl", torch.float64))
    dice = random.Random(8)
    cuts = [edgecases.random_cuts(dice, ready.tokens, 5, 4) for _ in range(10)]
    stores = [Store.of(model, ready) for _ in range(2)]
    cut, uncut = fast.run_cut(model, stores[0], cuts), fast.run_uncut(model, stores[1], cuts)
    clean = stores[0].clean(model)
    assert (uncut - clean).abs().max() <= 1e-12 < 1e-3 < (cut - clean).abs().max()
    assert stores[0].work.row_layers == stores[1].work.row_layers > ready.n_pos * 5
    for wrong, store in (([], stores[0]), (cuts, Store.of(model, detoured(model, ready)))):
        with pytest.raises(UsageError, match="no rows to run"):
            fast.run_uncut(model, store, wrong)


def detoured(model: Any, ready: Any) -> Any:
    """The prompt with a detour that does nothing: cut runs of it take the reference path."""
    again = model.prepare_inputs(**ready.inputs)
    again.plan = Plan(detours=(lambda layer, step, resid, side: step(resid, side),))
    return again


# ---- what it costs --------------------------------------------------------------------------------------------------------


def test_the_committed_growth_says_that_longer_prompts_gain_more():
    """Of the bench's numbers: exact, no fallback, and the ratio to naive grows with positions, layers and knock-outs."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    assert set(data["pieces"]) == set(scaling.PIECES)
    for rows in data["pieces"].values():
        ratios = [r["ratio"] for r in rows]
        assert ratios == sorted(ratios) and ratios[-1] > 1.5 * ratios[0] > 1.5
        assert all(r["max_difference"] <= 1e-5 and r["fallbacks"] == 0 for r in rows)
    cut = {k: v for k, v in data["others"]["difference_to_ours"].items() if "clean" not in k}
    assert {"TransformerLens", "nnsight", "eager with a mask"} <= set(cut) and max(cut.values()) <= 1e-4
    assert data["others"]["difference_to_ours"]["clean, sdpa"] > 1e-2
