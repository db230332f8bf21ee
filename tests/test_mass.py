"""Segment mass: equal to sums over the eager pattern, in every family and under policies, without a square."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lab.edges import mass as mass_module
from lab.edges.mass import partition, segment_mass
from lab.edges.policy import Policy
from lab.edges.segments import members
from lab.errors import TooBig, UsageError
from lab.model.zoo import wrap
from lab.slots import Plan
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
    assert (found.mean[:, :, later[0], later[1]] == 0).all() and (found.mean[:, :, later[1], later[0]] > 0).all()


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
    for model, x in ((model, families.inputs("internvl")), (wrap(families.build("llava_onevision")), padded)):
        ready = model.prepare_inputs(**x)
        names = partition(ready.tokens)
        assert "pad" not in names
        assert (segment_mass(model, ready).mean - by_pattern(model, ready, names)[1]).abs().max() <= 1e-6


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
