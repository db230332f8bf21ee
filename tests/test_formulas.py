"""The closed forms of edge effects against the softmax written out and against autograd, at any mass."""

from __future__ import annotations

import pytest
import torch

from lab.edges.formulas import NEG, RowStats, gate, knockout, read, shares, subset
from lab.edges.tallies import Parts
from lab.edges.tapping import Seen, softmax

PARTS = [torch.tensor([0, 1, 5]), torch.tensor([2]), torch.tensor([3, 4, 6, 7])]
N = 8


def rows(seed, spread=1.0, heads=2, dtype=torch.float64):
    """Random scores [head, row, key] of a causal prompt, and what each key is worth."""
    g = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(heads, N, N, generator=g, dtype=dtype)
    scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), NEG)
    return scores, torch.randn(heads, N, N, generator=g, dtype=dtype)


def seen(scores, worth, path=None):
    lse, pattern = softmax(scores)
    return Seen(0, slice(0, scores.shape[1]), scores, lse, pattern, worth, pattern * worth, path, None)


def stats(scores, worth):
    found = Parts(PARTS, N).stats(seen(scores, worth))
    return RowStats(found.lse[..., :-1], found.mean[..., :-1])


def value(scores, worth):
    """<g, o> of every row; a row without keys outputs zero."""
    return (shares(scores) * worth).sum(-1)


def without(scores, positions):
    return scores.index_fill(-1, positions, NEG)


@pytest.mark.parametrize("spread", [1.0, 30.0, 2000.0])
@pytest.mark.parametrize("seed", range(3))
def test_knockout_is_the_renormalised_softmax_without_the_part(seed, spread):
    scores, worth = rows(seed, spread)
    found = knockout(stats(scores, worth))
    for i, part in enumerate(PARTS):
        exact = value(without(scores, part), worth) - value(scores, worth)
        assert (found[..., i] - exact).abs().max() <= 1e-12


@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_no_digits_are_lost_in_single_precision(spread):
    """A part with nearly all, or next to nothing, of the attention."""
    scores, worth = rows(7, spread)
    wide, narrow = knockout(stats(scores, worth)), knockout(stats(scores.float(), worth.float()))
    assert ((narrow - wide).abs() <= 2e-5 * wide.abs() + 1e-12).float().mean() > 0.95
    assert (narrow - wide).abs().max() <= 1e-4


@pytest.mark.parametrize("gone", [[0], [1, 2], [0, 2], [0, 1, 2], []])
def test_any_subset_against_brute_force(gone):
    scores, worth = rows(3, 4.0)
    removed = torch.tensor([i in gone for i in range(3)])
    at = torch.cat([PARTS[i] for i in gone]) if gone else torch.tensor([], dtype=torch.long)
    exact = value(without(scores, at), worth) - value(scores, worth)
    assert (subset(stats(scores, worth), removed) - exact).abs().max() <= 1e-12


def test_the_subset_formula_of_the_notes():
    """(m_R C - c_R) / (1 - m_R), where nothing is near 0 or 1."""
    scores, worth = rows(5, 0.5)
    found = stats(scores, worth)
    removed = torch.tensor([True, False, True])
    m, c = found.mass[..., removed].sum(-1), found.contribution[..., removed].sum(-1)
    some = m < 0.99
    told = (m * found.total[..., 0] - c) / (1 - m)
    assert some.sum() > 5 and (subset(found, removed) - told)[some].abs().max() <= 1e-12


def test_gates_are_autograds_gradients():
    """An additive gate (a bias on a part's scores) and a gate on what is read, at no bias and gate 1."""
    scores, worth = rows(11)
    bias = torch.zeros(2, N, 3, dtype=torch.float64, requires_grad=True)
    through = torch.ones(2, N, 3, dtype=torch.float64, requires_grad=True)
    part = Parts(PARTS, N).of
    pattern = shares(scores + bias[..., part])
    (pattern * through[..., part] * worth).sum().backward()
    found = stats(scores, worth)
    assert (gate(found) + bias.grad).abs().max() <= 1e-12
    assert (read(found) + through.grad).abs().max() <= 1e-12


def test_rows_without_keys_change_nothing_and_rows_left_empty_lose_all():
    scores, worth = rows(2)
    scores[:, 3] = NEG
    scores[:, 4] = NEG
    scores[:, 4, 2] = 0.0  # reads part 1 alone
    found = stats(scores, worth)
    assert not knockout(found)[:, 3].any() and not found.mass[:, 3].any()
    assert torch.allclose(knockout(found)[:, 4, 1], -worth[:, 4, 2])
    assert not knockout(found)[:, 4, [0, 2]].any()


def test_masses_add_up_to_one():
    found = stats(*rows(4, 300.0))
    assert torch.allclose(found.mass.sum(-1), torch.ones(2, N, dtype=torch.float64))
    assert torch.allclose(found.total[..., 0], value(*rows(4, 300.0)))
