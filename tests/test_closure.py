"""Closures: rows said to be clean are clean bit for bit, rows said not to matter do not, and nothing is left out by hand."""

import random

import pytest
import torch

from lab.edges.closure import closure_of, touched_rows
from lab.edges.dense import dense_edges
from lab.errors import UsageError
from lab.model.zoo import wrap
from tests import edgecases, families

N = 12


def rows(*at: int) -> torch.Tensor:
    out = torch.zeros(N, dtype=torch.bool)
    out[list(at)] = True
    return out


def cut(q: list[int], k: list[int]) -> torch.Tensor:
    return edgecases.rectangle(torch.tensor(q), torch.tensor(k), N)


def test_a_cut_of_the_last_row_changes_that_row_alone():
    found = closure_of({1: cut([11], [2, 3])}, N, 4, [11])
    assert [int(d.sum()) for d in found.dirty] == [0, 0, 1, 1, 1]
    assert found.start == 1 and [found.rows(layer).tolist() for layer in range(4)] == [[], [11], [11], [11]]
    assert found.row_layers == 3 and found.reaches


def test_later_rows_become_dirty_one_layer_after_the_cut():
    found = closure_of({0: cut([5, 7], [1])}, N, 3, [11])
    assert torch.equal(found.dirty[1], rows(5, 7))
    assert torch.equal(found.dirty[2], rows(*range(5, 12)))
    assert found.rows(0).tolist() == [5, 7] and found.rows(1).tolist() == list(range(5, 12))
    # at the last layer every dirty row is still read by the last one
    assert found.rows(2).tolist() == list(range(5, 12))


def test_rows_that_nobody_reads_any_more_are_left_out():
    """The last row reads rows 0-3 alone from layer 1 on, all others were cut at layer 0."""
    last_reads_little = cut([11], list(range(4, 12)))
    found = closure_of({0: cut([5], [1]), 1: last_reads_little, 2: last_reads_little}, N, 3, [11])
    assert not found.live[1][4:11].any() and found.live[0].all()
    assert found.rows(0).tolist() == [] and found.rows(1).tolist() == [11]


def test_a_cut_that_cannot_reach_the_row_read_computes_nothing():
    never = closure_of({2: cut([5], [1])}, N, 3, [11])  # in the last layer only row 11 is read
    assert not never.reaches and never.start == 3 and never.row_layers == 0
    backwards = closure_of({0: cut([2], [9])}, N, 3, [11])  # an edge that never was
    assert not backwards.reaches and not touched_rows(cut([2], [9])).any()
    assert not closure_of({}, N, 3, [11]).reaches


def test_an_edge_cut_in_some_heads_only_still_carries():
    some = torch.stack([cut([11], list(range(11))), torch.zeros(N, N, dtype=torch.bool)])
    found = closure_of({0: cut([5], [1]), 1: some}, N, 2, [11])
    assert found.live[1].all() and found.rows(0).tolist() == [5]
    every = closure_of({0: cut([5], [1]), 1: torch.stack([some[0], some[0]])}, N, 2, [11])
    assert found.reaches and every.rows(0).tolist() == []


@pytest.mark.parametrize(
    ("layer", "mask", "message"),
    [
        (3, torch.zeros(N, N, dtype=torch.bool), "no layer 4"),
        (0, torch.zeros(N, N), "torch.float32"),
        (0, torch.zeros(N, N + 1, dtype=torch.bool), r"\(12, 13\)"),
        (0, torch.zeros(N, dtype=torch.bool), "True where an edge is removed"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(layer, mask, message):
    with pytest.raises(UsageError, match=message):
        closure_of({layer: mask}, N, 3, [11])


def _streams(model, ready, cuts):
    """The stream at every layer and the end, [layer + 1, pos, d_model], by dense masks in every layer."""
    n = ready.n_pos
    nothing = torch.zeros(n, n, dtype=torch.bool)
    edges = {i: dense_edges(cuts.get(i, nothing)) for i in range(model.cfg.n_layers)}
    names = [f"blocks.{i}.hook_resid_pre" for i in range(model.cfg.n_layers)]
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(ready, names_filter=[*names, last], edges=edges)
    return torch.stack([cache[name][0] for name in [*names, last]])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_rows_outside_the_closure_equal_the_clean_run_bit_for_bit(name):
    """In fp64, by the dense masks. And the closure is no wider than a cut row's reach."""
    model = wrap(edgecases.exact(families.build(name)))
    ready = model.prepare_inputs(**edgecases.inputs(name, torch.float64))
    dice, n_layers = random.Random(3), model.cfg.n_layers
    clean = _streams(model, ready, {})
    kept = changed = 0
    for _ in range(15):
        cuts = edgecases.random_cuts(dice, ready.tokens, n_layers, model.cfg.n_heads)
        found = closure_of(cuts, ready.n_pos, n_layers, [ready.n_pos - 1])
        same = (_streams(model, ready, cuts) == clean).all(-1)
        dirty = torch.stack(found.dirty)
        assert same[~dirty].all()
        kept += int((~dirty).sum())
        changed += int((~same).sum())
    assert kept > 0 and changed > 0


def test_dead_rows_may_hold_anything(wrapped):
    """Noise on every row that is not live, at every layer, leaves the read logits as they were."""
    model = wrapped("qwen3_vl")
    ready = model.prepare_inputs(**families.inputs("qwen3_vl"))
    n, dice = ready.n_pos, random.Random(5)
    # the last row stops reading video from layer 3 on: those rows die
    video = ready.tokens.where(role="video")
    stop = edgecases.rectangle(torch.arange(n), video, n)
    found = closure_of({3: stop, 4: stop}, n, model.cfg.n_layers, [n - 1])
    assert not found.live[3][video].any() and found.live[2].all()
    edges = {layer: dense_edges(stop) for layer in (3, 4)}

    def noise(resid, hook):
        dead = ~found.live[int(hook.name.split(".")[1])]
        return torch.where(dead[None, :, None], resid + dice.random(), resid)

    hooks = [(f"blocks.{i}.hook_resid_pre", noise) for i in range(3, model.cfg.n_layers)]
    with torch.no_grad():
        plain = model(ready, edges=edges)
        noisy = model.run_with_hooks(ready, fwd_hooks=hooks, edges=edges)
    assert (plain - noisy).abs().max() <= 1e-6
