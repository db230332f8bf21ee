"""LongVLM's merging: the acceptance checks A1-A6 of its spec, provenance through merging, and the prompt it leaves."""

import pytest
import torch

from lab.errors import RunError, UsageError
from lab.mechanisms.segment_merging import (
    EXAMPLE,
    NEUTRAL,
    RELEASED_STEPS,
    SegmentMerging,
    merge,
    steps_to,
)  # fmt: skip
from lab.model.layout import vision_of
from tests import families
from tests.shelf_models import blank, clip, model, question, vision


@pytest.fixture(scope="module")
def small():
    return model()


def features(frames=8, cells=16, d=32, seed=0):
    return torch.randn(frames, cells, d, generator=torch.Generator().manual_seed(seed))


def merged(n, steps, d=32, weighting="size", seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x, merge(x, steps, torch.ones(n), channel_groups=16, weighting=weighting)


def run(config, x):
    return config(blank(len(x)), vision(x, rows=4), "")


def test_a1_counts():
    assert steps_to(2560, 30) == (1280, 640, 320, 160, 80, 40, 10)
    assert len(merged(2560, steps_to(2560, 30))[1].of) == 30
    assert len(merged(2560, RELEASED_STEPS)[1].of) == 20
    assert len(merged(64, (1000,))[1].of) == 32 and len(merged(7, (1000,))[1].of) == 4
    for nothing in ((), (0,), (-3, 0)):
        found = merged(64, nothing)[1]
        assert torch.equal(found.group, torch.arange(64)) and torch.equal(found.share, torch.ones(64))
    assert steps_to(10, None) == () and steps_to(10, 10) == () and steps_to(10, 20) == ()


@pytest.mark.parametrize("keep", [1, 5, 8, 31])
def test_a2_sizes_and_means(keep):
    x = features()
    out = run(SegmentMerging(n_segments=2, keep=keep, n_global=0), x)
    assert len(out) == 2 * keep
    first = out.grid.source < 64
    for half, rows in ((x[:4], first), (x[4:], ~first)):
        size = out.grid.weight[rows]
        assert float(size.sum()) == 64
        assert torch.allclose(
            (out.x[rows] * size[:, None]).sum(0) / 64, half.flatten(0, 1).mean(0), atol=1e-5
        )


def test_a3_a_change_stays_in_its_segment():
    x = features()
    other = x.clone()
    other[6:] += torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    config = SegmentMerging(n_segments=2, keep=8, n_global=0)
    one, two = run(config, x).x, run(config, other).x
    assert torch.equal(one[:8], two[:8]) and not bool((one[8:] == two[8:]).all(1).any())
    alone = SegmentMerging(n_segments=1, keep=8, n_global=0)
    assert torch.equal(torch.cat([run(alone, x[:4]).x, run(alone, x[4:]).x]), one)


@pytest.mark.parametrize("weighting", ["size", "uniform"])
@pytest.mark.parametrize("compat", ["paper", "released"])
def test_a4_provenance_is_exact(weighting, compat):
    x = features()
    out = run(SegmentMerging(n_segments=2, keep=9, n_global=3, weighting=weighting, compat=compat), x)
    parts = out.grid.parts
    assert bool((parts >= 0).all()) and torch.allclose(parts.sum(1), torch.ones(len(out)), atol=1e-5)
    assert torch.allclose(parts @ x.flatten(0, 1), out.x, atol=1e-5)
    local = parts[out.grid.source >= 0]
    assert bool(((local > 0).sum(0) == 1).all())  # every original token is in exactly one local one
    assert bool((local.gather(1, out.grid.source[out.grid.source >= 0][:, None]) > 0).all())


def test_a5_equal_tokens_and_permuted_segments():
    same = features()[:1, :1].expand(8, 16, 32).contiguous()
    assert torch.allclose(
        run(SegmentMerging(n_segments=2, keep=5, n_global=0), same).x, same[0, :1].expand(10, 32), atol=1e-6
    )
    x, config = features(), SegmentMerging(n_segments=2, keep=8, n_global=0)
    swapped = torch.cat([x[4:], x[:4]])
    one, two = run(config, x).x, run(config, swapped).x
    assert torch.equal(torch.cat([one[8:], one[:8]]), two)


def test_a6_gradients_reach_the_values_alone():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = merge(x, steps_to(64, 5), torch.ones(64), channel_groups=16, weighting="size")
    found.apply(x).sum().backward()
    assert torch.allclose(x.grad, found.share[:, None].expand(64, 32), atol=1e-6)


def test_the_released_order_puts_the_unmerged_first_by_similarity():
    x, found = merged(40, (10,))
    assert found.of[10:].tolist() == list(range(1, 40, 2))
    metric = torch.nn.functional.normalize(x.unflatten(1, (16, -1)).mean(1), dim=-1)
    best = (metric[found.of[:10]] @ metric[1::2].T).amax(1)
    assert bool((best.diff() <= 0).all()) and not bool((found.of[:10].diff() > 0).all())
    _, halves = merged(40, (20, 10))
    assert bool((halves.of.diff() > 0).all())  # full halving keeps the order of the odd places


def test_neutral_is_vanilla_bit_for_bit(small):
    ready = small.prepare(question())
    assert torch.equal(small(ready, read="all", mechanisms=[NEUTRAL]), small(ready, read="all"))
    idle = SegmentMerging(keep=200, n_global=0)  # runs, and merges nothing
    assert idle.plan(small.sizes).stages
    assert torch.equal(small(ready, read="all", mechanisms=[idle]), small(ready, read="all"))


@pytest.mark.parametrize("place", ["first", "last", "each"])
def test_global_tokens(small, place):
    ready = small.prepare(question())
    config = SegmentMerging(n_segments=2, keep=8, n_global=3, place=place)
    out = small.run(ready, mechanisms=[config])
    tokens = out.maps[0]
    video = tokens.where(role="video")
    made = (tokens.source[video] < 0).nonzero().squeeze(1).tolist()
    assert made == {"first": [0, 1, 2], "last": [16, 17, 18], "each": [0, 9]}[place]
    assert bool((tokens.frame[video[made]] == -1).all()) and tokens.n_frames > 1
    with torch.no_grad():
        x = vision_of(ready, small.see(ready)).x[:128]
        door = small.arrive(ready, config.plan(small.sizes))[0]
    spans = torch.arange(128).tensor_split([48, 96]) if place != "each" else torch.arange(128).tensor_split(2)
    want = torch.stack([x[s].mean(0) for s in spans])
    assert torch.allclose(door.embeds[0, video[made]], want, atol=1e-5)
    assert torch.equal(door.rope[0], torch.arange(len(tokens)))


def test_the_map_follows_and_paints_back(small):
    ready = small.prepare(question())
    tokens = small.maps(ready, mechanisms=[EXAMPLE])[0]
    local = tokens.where(role="frame")[1:]
    values = torch.full((len(tokens),), torch.nan)
    values[local] = torch.arange(len(local)).float()
    shown = tokens.painted(values, ready.grids[0])
    assert shown.shape == (8, 4, 4) and not bool(shown.isnan().any())
    for p in local.tolist():  # a token's value lies on all its patches, and on the one it stands for
        f, r, c = (int(getattr(tokens, n)[p]) for n in ("frame", "row", "col"))
        assert float(shown[f, r, c]) == float(values[p])
        assert int((shown == values[p]).sum()) == int((tokens.parts[p] > 0).sum())
    with pytest.raises(UsageError, match="values for"):
        tokens.painted(values[1:], ready.grids[0])


def test_cuts_between_frames_hold_for_global_tokens(small):
    from lab.edges.pathways import cut_mask

    tokens = small.maps(small.prepare(question()), mechanisms=[EXAMPLE])[0]
    cut = cut_mask(tokens, "cross-frame")
    video = tokens.where(role="frame")
    made, local = video[0], video[1:]
    assert bool(cut[local, made].all()) and not bool(cut[made, made])
    f = tokens.frame[local]
    assert torch.equal(cut[local][:, local], f[:, None] > f[None, :])


def test_time_order_goes_with_text_between_frames_and_global_tokens_do_not(wrapped_text):
    m = wrapped_text("internvl")
    ready = m.prepare(question(4), n_frames=4)
    tokens = m.run(ready, mechanisms=[SegmentMerging(n_segments=2, keep=5, n_global=0)]).maps[0]
    assert len(tokens.where(role="frame")) == 10
    with pytest.raises(RunError, match="text between its frames"):
        m.run(ready, mechanisms=[EXAMPLE])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_keeps_a_partition(name, wrapped_text):
    m = wrapped_text(name)
    ready = m.prepare(question(4), n_frames=4)
    tokens = m.run(ready, mechanisms=[SegmentMerging(n_segments=2, keep=4, n_global=0)]).maps[0]
    video = tokens.where(role="frame")
    assert len(video) == 8 and len(tokens.source[video].unique()) == 8
    assert torch.allclose(tokens.parts[video].sum(0)[ready.grids[0].frame >= 0] > 0, torch.tensor(True))
    assert float(tokens.weight[video].sum()) == pytest.approx(float(ready.grids[0].weight.sum()))


def test_merged_deepstack_features_are_means_too(wrapped_text):
    m = wrapped_text("qwen3_vl")
    ready = m.prepare(question(4), n_frames=4)
    config = SegmentMerging(n_segments=2, keep=4, n_global=0)
    with torch.no_grad():
        before, door = m.see(ready), m.arrive(ready, config.plan(m.sizes))[0]
    tokens = m.maps(ready, mechanisms=[config])[0]
    video, had = tokens.where(kind="video"), ready.tokens.where(kind="video")
    for old, new in zip(before.deep, door.deep, strict=True):
        assert torch.allclose(new[0, video], tokens.parts[video] @ old[0, had], atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"keep": 0}, "from 1"),
        ({"n_segments": 0}, "from 1"),
        ({"place": "middle"}, "first, last, each"),
        ({"n_global": True}, "whole"),
    ],
)
def test_wrong_settings_are_named(wrong, says):
    with pytest.raises(UsageError, match=says):
        SegmentMerging(**wrong)


def test_channels_that_do_not_divide(small):
    with pytest.raises(UsageError, match="64 channels"):
        small.run(small.prepare(question()), mechanisms=[SegmentMerging(keep=4, channel_groups=24)])


def test_frames_make_segments():
    assert clip(3).pixels.shape[0] == 3  # fewer frames than segments: one each
    out = run(SegmentMerging(n_segments=10, keep=2, n_global=0), features(3))
    assert len(out) == 6 and out.grid.frame.tolist() == [0, 0, 1, 1, 2, 2]
