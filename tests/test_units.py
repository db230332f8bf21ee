"""Units partition the edges of any prompt; what they cut is what the policy made of them cuts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from lab.edges.layouts import plain_map
from lab.edges.policy import Policy
from lab.edges.units import GRAINS, Grid, Unit, cuts_of, disjoint, segments_of, split, units_of, wholes
from lab.errors import UsageError

LAYERS, HEADS = 3, 4
MAPS = {
    "plain": plain_map(system=3, frames=7, per_frame=2, question=12, template=4, stem=4, options=3),
    "timestamps": plain_map(system=0, frames=3, per_frame=3, question=5, template=1, separators=2),
    "no video": plain_map(system=2, frames=0, per_frame=0, question=6, template=2, stem=2, options=2),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("roles", ["all", "portable"])
@pytest.mark.parametrize("grain", ["pair", "distance"])
def test_units_partition_the_edges(name, roles, grain):
    tokens = MAPS[name]
    grid = Grid(tokens, LAYERS, HEADS)
    units = [u for u in units_of([tokens], LAYERS, roles, grain) if u.layer == 1]
    count = sum(grid.mask(u.edges).int() for u in units)
    assert torch.equal(count, torch.ones(len(tokens), len(tokens), dtype=torch.int32).tril())


@pytest.mark.parametrize("grain", GRAINS)
def test_parts_partition_the_unit(grain):
    tokens = MAPS["plain"]
    grid = Grid(tokens, LAYERS, HEADS)
    for unit in units_of([tokens], 1):
        parts = split(unit, grain, n_heads=HEADS, n_options=3)
        whole = grid.cuts([unit]).get(0)
        cut = torch.zeros(HEADS, len(tokens), len(tokens), dtype=torch.int32)
        for p in parts:
            assert unit in wholes(p)
            for mask in grid.cuts([p]).values():
                cut += mask.int()
        expected = torch.zeros_like(cut) if whole is None else whole.int().expand(HEADS, -1, -1)
        assert torch.equal(cut, expected), unit
        assert grid.size(unit) == pytest.approx(sum(grid.size(p) for p in parts))


@pytest.mark.parametrize("seed", range(6))
def test_the_policy_cuts_what_the_units_cut(seed):
    rng, tokens = random.Random(seed), MAPS["plain"]
    grid = Grid(tokens, LAYERS, HEADS)
    units = list[Unit]()
    for u in units_of([tokens], LAYERS):
        grain = rng.choice(GRAINS)
        units += [p for p in split(u, grain, n_heads=HEADS, n_options=3) if rng.random() < 0.6]
    masks = Policy(cuts=cuts_of(units)).masks(tokens, LAYERS, HEADS)
    ours = grid.cuts(units)
    assert masks.keys() == ours.keys()
    for layer, mask in ours.items():
        assert torch.equal(*torch.broadcast_tensors(masks[layer], mask)), layer


def test_cuts_are_few_and_joined():
    tokens = MAPS["plain"]
    units = units_of([tokens], LAYERS, grain="distance")
    video = [u for u in units if u.q == u.k == "video"]
    (cut,) = cuts_of(video)
    assert (cut.layers, cut.q, cut.k, cut.where, cut.heads) == ("1-3", "video", "video", None, "all")
    far = [u for u in video if "== 0" not in u.where and "== frame" not in u.where and "== 1" not in u.where]
    (cut,) = cuts_of(far)
    assert cut.where == "frame(q) - frame(k) >= 2"
    heads = [replace(video[0], heads=(h,)) for h in (2, 0)]
    (cut,) = cuts_of(heads)
    assert cut.heads == (0, 2)


def test_parts_of_a_whole_that_is_there_do_not_count():
    whole = Unit(0, "option", "option")
    part = Unit(0, "option:1", "option:0", heads=(2,))
    assert disjoint([whole, part]) == [whole]
    assert disjoint([replace(part, heads=()), part]) == [replace(part, heads=())]


def test_masks_asked_for_again_are_the_same_objects():
    grid = Grid(MAPS["plain"], LAYERS, HEADS)
    units = units_of([MAPS["plain"]], LAYERS)[:4]
    assert grid.cuts(units)[0] is grid.cuts(units)[0]


def test_portable_segments_and_unknown_ones():
    assert segments_of(MAPS["plain"], "portable") == ("text", "video", "last")
    with pytest.raises(UsageError, match="'all' or 'portable'"):
        segments_of(MAPS["plain"], "some")
