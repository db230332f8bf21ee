"""Segment mass: equal to sums over the eager pattern, in every family and under policies, without a square."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab.bench import mass as bench
from lab.bench import models
from lab.edges import mass as mass_module
from lab.edges import presets
from lab.edges.mass import partition, segment_mass
from lab.edges.policy import Policy
from lab.edges.segments import members
from lab.errors import TooBig, UsageError
from lab.mechanisms.mixture_of_depths import MixtureOfDepths
from lab.model.zoo import wrap
from lab.slots import Plan, plan_of
from tests import edgecases, families
from tests.test_long import LONG, long_ready

POLICIES = {
    "clean": None,
    "across frames": {"q": "video", "k": "video", "where": "frame(q) > frame(k)"},
    "some heads": {"layers": "2,4", "heads": [1, 3], "q": "*", "k": "*", "where": "pos(q) - pos(k) > 5"},
    "empty rows": {"layers": "3", "q": "text", "k": "*"},
    "a gate": {"layers": "1-4", "heads": [0, 2], "q": "last", "k": "video", "gate": -1.5},
}


def policy_named(name: str) -> Policy | None:
    cut = POLICIES[name]
    return None if cut is None else Policy.from_dict({"format": "edge-policy/1", "cuts": [cut]})


def by_pattern(model: Any, ready: Any, names: Any, policy: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows [layer, head, pos, segment], mean [layer, head, query, key]) from the patterns of an explicit run."""
    wanted = [f"blocks.{i}.attn.hook_pattern" for i, p in enumerate(model.parts) if p.attn is not None]
    with torch.no_grad():
        _, cache = model.run_with_cache(ready, names_filter=wanted, policy=policy)
    of = torch.stack([members(ready.tokens, n, ready.item) for n in names]).double()
    rows = torch.stack([cache[n][0].double() @ of.T for n in wanted])
    return rows, of @ rows / of.sum(1)[:, None]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_mass_is_the_sum_of_the_pattern(name, policy, wrapped):
    model, cut = wrapped(name), policy_named(policy)
    ready = model.prepare_inputs(**families.inputs(name))
    names = (*partition(ready.tokens), "video", "text+last", "*")
    found = segment_mass(model, ready, names, policy=cut, rows=True)
    rows, mean = by_pattern(model, ready, names, cut)
    assert found.rows is not None and (found.rows - rows).abs().max() <= 1e-6
    assert (found.mean - mean).abs().max() <= 1e-6
    parts = found.rows[..., : len(partition(ready.tokens))].sum(-1)  # a partition: every row is spent once
    whole = torch.ones(()) if policy != "empty rows" else parts.round()
    assert (parts - whole).abs().max() <= 1e-5
    if policy == "empty rows":
        text = members(ready.tokens, "text")
        assert (parts[2][:, text] == 0).all() and (parts[1] > 0.99).all()
    assert mean.std() > 0.02


def test_mass_in_pieces_and_more_segments_than_a_head_is_wide(wrapped, monkeypatch):
    """17 segments over heads of 16; a head and a row at a time, and all at once."""
    model = wrapped("qwen3_vl")
    ready = model.prepare_inputs(**families.inputs("qwen3_vl", frames=16))
    names = (*partition(ready.tokens), *(f"frame:{i}+last" for i in range(8)))
    assert len(names) > model.cfg.d_head
    cut = policy_named("some heads")
    for policy in (None, cut):
        rows, _ = by_pattern(model, ready, names, policy)
        for head_bytes, cells in ((1, 1), (1 << 30, 1 << 30)):
            monkeypatch.setattr(mass_module, "HEAD_BYTES", head_bytes)
            monkeypatch.setattr(mass_module, "CELLS", cells)
            found = segment_mass(model, ready, names, policy=policy, rows=True)
            assert (found.rows - rows).abs().max() <= 1e-6


def test_mass_is_a_result_with_names(wrapped):
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**families.inputs("llava_onevision"))
    found = segment_mass(model, ready)
    assert found.rows is None and found.names[1:4] == ("frame:0", "frame:1", "frame:2")
    result = found.result()
    assert result.axes == ("layer", "head", "query", "key") and result.coords["query"] == list(found.names)
    assert np.allclose(result.values.sum(-1), 1.0, atol=1e-5) and sum(found.n_rows) == ready.n_pos
    later = [found.names.index(n) for n in ("frame:1", "frame:2")]
    assert (found.mean[:, :, later[0], later[1]] == 0).all() and (
        found.mean[:, :, later[1], later[0]] > 0
    ).all()


def test_measuring_leaves_the_run_as_it_is(wrapped):
    """The policy of an open `pruned` counts; nothing stays behind; double precision stays double."""
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    clean = model(ready)
    plain = segment_mass(model, ready)
    with model.pruned(policy_named("across frames")):
        inside = segment_mass(model, ready)
    assert torch.equal(inside.sums, segment_mass(model, ready, policy=policy_named("across frames")).sums)
    assert not torch.equal(inside.sums, plain.sums)
    assert torch.equal(segment_mass(model, ready).sums, plain.sums) and torch.equal(model(ready), clean)
    exact = wrap(edgecases.exact(families.build("internvl")))
    ready = exact.prepare_inputs(**edgecases.inputs("internvl", torch.float64))
    rows, mean = by_pattern(exact, ready, partition(ready.tokens))
    assert (segment_mass(exact, ready).mean - mean).abs().max() <= 1e-6  # the pattern is softmaxed in fp32


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_in_the_layers_own_call_or_beside_it(name, wrapped, monkeypatch):
    """Both ways give the same numbers; hooks that edit the pattern act on the layers after it."""
    model = wrapped(name)
    ready = model.prepare_inputs(**families.inputs(name))
    for policy in (None, policy_named("some heads"), policy_named("empty rows")):
        one = segment_mass(model, ready, policy=policy, rows=True)
        with monkeypatch.context() as m:
            m.setattr(mass_module._Sink, "fits_beside", lambda self, model: False)
            other = segment_mass(model, ready, policy=policy, rows=True)
        assert (one.rows - other.rows).abs().max() <= 1e-6 and (one.mean - other.mean).abs().max() <= 1e-6
    plain = segment_mass(model, ready)
    with model.hooks([("blocks.1.attn.hook_pattern", lambda p, hook: p.flip(-1))]):
        edited = segment_mass(model, ready)
    assert (edited.mean[:2] - plain.mean[:2]).abs().max() <= 1e-6
    assert (edited.mean[2] - plain.mean[2]).abs().max() > 1e-3


def test_a_mechanism_that_looks_at_attention_chooses_the_same_rows(wrapped, monkeypatch):
    """Routing by what was attended works while mass is measured, in the layers' own call too."""
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    ready.plan = plan_of((MixtureOfDepths(keep=0.5, selector="attention"),), model.sizes)
    one = segment_mass(model, ready, rows=True).rows
    with monkeypatch.context() as m:
        m.setattr(mass_module._Sink, "fits_beside", lambda self, model: False)
        other = segment_mass(model, ready, rows=True).rows
    assert torch.isnan(other).any() and torch.equal(torch.isnan(one), torch.isnan(other))
    assert (one - other).nan_to_num().abs().max() <= 1e-6


def test_half_precision_is_summed_in_single(wrapped):
    model = wrap(families.build("llava_next_video").to(torch.bfloat16))
    ready = model.prepare_inputs(**edgecases.inputs("llava_next_video", torch.bfloat16))
    found = segment_mass(model, ready)
    assert (found.mean.sum(-1) - 1).abs().max() <= 1e-5


def test_hybrid_decoders_padding_and_sliding_windows():
    hybrid = wrap(families.build("qwen3_5"))
    ready = hybrid.prepare_inputs(**families.inputs("qwen3_5"))
    found, (_, mean) = segment_mass(hybrid, ready), by_pattern(hybrid, ready, partition(ready.tokens))
    softmax = [i for i, p in enumerate(hybrid.parts) if p.attn is not None]
    assert (found.mean[softmax] - mean).abs().max() <= 1e-6
    assert torch.isnan(found.mean[[0, 2]]).all()
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model = wrap(families.build("internvl", text_config=sliding))
    padded = {k: v[1:] for k, v in families.inputs("llava_onevision", worlds=2, pad=3).items()}
    for some, x in ((model, families.inputs("internvl")), (wrap(families.build("llava_onevision")), padded)):
        ready = some.prepare_inputs(**x)
        names = partition(ready.tokens)
        assert "pad" not in names
        assert (segment_mass(some, ready).mean - by_pattern(some, ready, names)[1]).abs().max() <= 1e-6


def test_a_detour_that_shortens_the_stream(wrapped):
    """Rows that left have no mass to give (nan) and get none."""
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    n = ready.n_pos

    def drop(layer, step, resid, side):
        if layer == 2:
            keep = torch.tensor([i for i in range(n) if i % 3])
            resid, side = resid[:, keep], side.only(keep)
        return step(resid, side)

    ready.plan = Plan(detours=(drop,))
    found = segment_mass(model, ready, ["video", "text+last"], rows=True)
    assert torch.isnan(found.rows[2, :, ::3]).all() and not torch.isnan(found.rows[1]).any()
    left = torch.tensor([i for i in range(n) if i % 3])
    assert (found.rows[3][:, left].sum(-1) <= 1 + 1e-5).all() and (found.rows[3][:, left].sum(-1) > 0.5).all()


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_rows_that_skip_a_layer_are_no_part_of_its_mean(name, wrapped):
    """Mixture of depths: the mean is over the rows that ran, as the pattern of each says; nan where none did."""
    model = wrapped(name)
    ready = model.prepare_inputs(**families.inputs(name))
    routed = MixtureOfDepths(keep=0.4, layers=(1,), gate="none", seed=3)
    exit_ = MixtureOfDepths.early_exit(3)
    ready.plan = plan_of([routed, exit_], model.sizes)
    names = partition(ready.tokens)
    found = segment_mass(model, ready, rows=True)
    with torch.no_grad():
        patterns = model.run_with_cache(ready, names_filter=lambda n: n.endswith("hook_pattern"))[1]
        keep = model.run(replace(ready, plan=plan_of([routed], model.sizes))).heads["mod.keep"][0, 0]
    of = torch.stack([members(ready.tokens, n) for n in names])
    video = members(ready.tokens, "video")
    for layer, ran in ((1, keep), (3, ~video), (4, ~video)):
        rows = patterns[f"blocks.{layer}.attn.hook_pattern"][0].double() @ of[:, ran].double().T
        assert found.n_ran[layer].tolist() == (of & ran).sum(1).tolist()
        assert (found.rows[layer][:, ran] - rows).abs().max() <= 1e-6
        for i, segment in enumerate(of[:, ran]):
            mean = found.mean[layer, :, i]
            assert torch.allclose(mean, rows[:, segment].mean(1), atol=1e-6, equal_nan=True)
    assert 0 < int(keep[video].sum()) < int(video.sum())
    assert torch.isnan(found.mean[3:, :, names.index("frame:0")]).all()
    assert (found.mean[:3].sum(-1) - 1).abs().max() <= 1e-5
    other = segment_mass(model, replace(ready, plan=Plan()))
    both = presets.attention_mass([found, other], share=1.0)  # what one run does not have, the other tells
    assert both.is_null and presets.attention_mass([found, other], 0).count(ready.tokens, 5).kept == 0


def test_no_square_comes_to_be(wrapped):
    model = wrapped("llava_next_video")
    ready = long_ready(model)
    names = ["video", "text", "last", "frame:7"]
    with edgecases.Largest() as largest:
        found = segment_mass(model, ready, names, rows=True)
    assert largest.numel < LONG * LONG / 4
    assert torch.allclose(found.rows[..., :3].sum(-1), torch.ones(()), atol=1e-5)


def test_what_cannot_be_measured_is_said(wrapped, monkeypatch):
    model = wrapped("internvl")
    one, two = (model.prepare_inputs(**families.inputs("internvl", worlds=w)) for w in (1, 2))
    with pytest.raises(UsageError, match="one world, got 2"):
        segment_mass(model, two)
    with pytest.raises(UsageError, match="closest: video"):
        segment_mass(model, one, ["vidoe"])
    with pytest.raises(UsageError, match="no token of 'option'"):
        segment_mass(model, one, ["option"])
    with pytest.raises(UsageError, match="no segments given"):
        segment_mass(model, one, [])
    monkeypatch.setattr(mass_module, "free_bytes", lambda device: 1000)
    with pytest.raises(TooBig, match="1,000 free"):
        segment_mass(model, one, rows=True)


# ---- the preset that is made of it ----------------------------------------------------------------------------------------


def biggest(mass: Any, k: int, by_head: bool) -> set[tuple[Any, ...]]:
    """The k segment edges with most mass, ranked by plain Python."""
    table = mass.mean if by_head else mass.mean.mean(1)
    cells = [(float(v), at) for at in np.ndindex(*table.shape) if (v := table[at]) > 0]
    return {at for _, at in sorted(cells, key=lambda c: -c[0])[:k]}


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("k", [0, 7, 40])
def test_the_preset_keeps_the_k_edges_that_are_read_most(k, by_head, wrapped):
    model = wrapped("qwen3_vl")
    ready, heads = model.prepare_inputs(**families.inputs("qwen3_vl", frames=4)), model.cfg.n_heads
    found = segment_mass(model, ready)
    policy = presets.attention_mass(found, k, by_head=by_head)
    top, bound = biggest(found, k, by_head), policy.bind(ready.tokens, 5, heads)
    of = [members(ready.tokens, n) for n in found.names]
    exists = bound.exists()
    for layer in range(5):
        removed = bound.removed(layer)
        removed = torch.zeros(1, *exists.shape, dtype=torch.bool) if removed is None else removed
        for head in range(heads):
            here = removed[head if len(removed) > 1 else 0]
            for q, a in enumerate(of):
                for key, b in enumerate(of):
                    edges = exists & a[:, None] & b[None, :]
                    kept = ((layer, head, q, key) if by_head else (layer, q, key)) in top
                    assert not bool(edges.any()) or bool((here[edges] == (not kept)).all())
    with torch.no_grad():
        slow, fast = (model(ready, policy=policy, executor=e) for e in ("reference", "fast"))
    assert (slow - fast).abs().max() <= 1e-5
    assert Policy.from_dict(policy.to_dict()) == policy


def test_the_preset_by_share_and_its_ends(wrapped):
    """All the mass: the null policy. A share: as few edges as carry it, no fewer."""
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    found, other = (
        segment_mass(model, ready),
        segment_mass(model, model.prepare_inputs(**families.inputs("internvl", seed=3))),
    )
    whole = presets.attention_mass(found, share=1.0)
    assert whole.is_null and int(whole.name.split("/")[1]) == len(biggest(found, 10**6, False))
    k = int(presets.attention_mass(found, share=0.6).name.split("/")[1])
    table = found.mean.mean(1)
    carried = [
        sum(float(table[at]) for at in biggest(found, n, False)) / float(table.sum()) for n in (k - 1, k)
    ]
    assert carried[0] < 0.6 <= carried[1]
    both = presets.attention_mass([found, other], 20)
    assert both.notes is not None and "2 runs" in both.notes and both != presets.attention_mass(found, 20)
    shares = [presets.attention_mass(found, n).count(ready.tokens, 5).kept_fraction for n in (0, 20, 60)]
    assert shares[0] == 0 < shares[1] < shares[2] < 1


def test_a_planted_reader_is_kept(wrapped):
    """Attention of one head is steered to frame 1 by the query's own weights: its edge ranks first."""
    model = wrap(families.build("llava_onevision"))
    ready = model.prepare_inputs(**families.inputs("llava_onevision"))
    frame = members(ready.tokens, "frame:1")

    def to_frame(scores, hook):
        scores[:, 2, -1, frame] += 40.0
        return scores

    with model.hooks([("blocks.3.attn.hook_attn_scores", to_frame)]), torch.no_grad():
        _, cache = model.run_with_cache(ready, names_filter="blocks.3.attn.hook_pattern")
    assert float(cache["blocks.3.attn.hook_pattern"][0, 2, -1, frame].sum()) > 0.999
    steer = Policy.from_dict({"format": "edge-policy/1", "cuts": [
        {"layers": "4", "heads": [2], "q": "last", "k": "frame:1", "gate": 40.0}]})  # fmt: skip
    found = segment_mass(model, ready, policy=steer)
    names = found.names
    at = (3, 2, names.index("last"), names.index("frame:1"))
    assert float(found.mean[at]) > 0.999
    rest = found.mean.clone()
    rest[at] = 0
    kept = presets.attention_mass(found, int((rest > float(found.mean[at])).sum()) + 1, by_head=True)
    cut = [c for c in kept.cuts if c.q == "last" and c.k == "frame:1" and 3 in c.layers_of(5)]
    assert all(c.heads != "all" and 2 not in c.heads for c in cut)


def test_a_preset_that_cannot_be_made_is_refused(wrapped):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    found, video = segment_mass(model, ready), segment_mass(model, ready, ["video", "text", "last"])
    for bad, message in (
        (lambda: presets.attention_mass([]), "at least one measured run"),
        (lambda: presets.attention_mass([found, video], 3), "different segments"),
        (lambda: presets.attention_mass(segment_mass(model, ready, ["video", "*"]), 3), "overlap"),
        (lambda: presets.attention_mass(found), "one of the two"),
        (lambda: presets.attention_mass(found, 3, share=0.5), "one of the two"),
        (lambda: presets.attention_mass(found, 10**6), "keep 0 to"),
        (lambda: presets.attention_mass(found, share=1.5), "0..1"),
        (lambda: presets.named("attention-mass/20", 5), r"presets.attention_mass\(...\)"),
    ):
        with pytest.raises(UsageError, match=message):
            bad()


# ---- what it costs --------------------------------------------------------------------------------------------------------


def test_the_mass_bench_measures_what_it_says():
    shape = models.Shape(d=32, mlp=48, layers=3, heads=4, kv_heads=2, side=16, patch=4)
    found = bench.measure(shape, positions=60, pairs=1, layers_timed=2)
    assert found["largest_difference"] <= 1e-6 and found["segments"] > 3 and found["ratio"] > 0
    assert bench.failures({**found, "ratio": 2.0, "ratio_under_a_policy": 1.0}) == ["ratio: 2, target 1.5"]
    rows = 3 * 4 * found["positions"] * found["segments"] * 4
    assert rows <= found["extra_bytes"] < 40 * rows


def test_the_committed_cost_of_mass_meets_its_targets():
    cases = json.loads((Path(bench.__file__).parent / "data" / "mass_cpu.json").read_text(encoding="utf-8"))[
        "cases"
    ]
    assert set(cases) == set(bench.SHAPES)
    assert all(bench.failures(c) == [] and c["positions"] >= 2000 for c in cases.values())
