"""Differential Token Drop: the acceptance checks D1-D11 of its spec, on features, on pixels and on models of six families."""

import math

import pytest
import torch

from lab.carriers import Frames
from lab.edges.policy import Policy
from lab.errors import LabWarning, RunError, UsageError
from lab.mechanisms.differential_token_drop import (
    EXAMPLE,
    NEUTRAL,
    DifferentialTokenDrop,
    Drop,
    scene_changes,
)
from lab.spans import ROLES
from tests import families
from tests.shelf_models import blank, clip, model, question, vision

DTD = DifferentialTokenDrop


@pytest.fixture(scope="module")
def small():
    return model()


def noise(frames=6, cells=8, d=64, seed=0):
    return torch.randn(frames, cells, d, generator=torch.Generator().manual_seed(seed))


def mixed(frames=6, cells=8, d=16, seed=0):
    """Features whose cosine to the frame before is spread over 0..1."""
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(cells, d, generator=g)]
    for _ in range(frames - 1):
        blend = torch.rand(cells, 1, generator=g)
        x.append(blend * x[-1] + (1 - blend) * torch.randn(cells, d, generator=g))
    return torch.stack(x)


def keep(config, x, frames=None):
    return config.decide(frames or blank(len(x)), vision(x)).keep.view(len(x), -1)


# ---- D1-D5: what is dropped -------------------------------------------------------------------------------------


def test_d1_neutral_is_vanilla_bit_for_bit(small):
    ready = small.prepare(question())
    with torch.no_grad():
        assert torch.equal(
            small.run(ready, read="all", mechanisms=[NEUTRAL]).logits, small(ready, read="all")
        )
    assert NEUTRAL.plan(small.sizes).stages == ()


@pytest.mark.parametrize("space", ["feature", "pixel"])
@pytest.mark.parametrize("frames", [2, 8])
def test_d2_a_static_video_keeps_one_frame(small, frames, space):
    ready = small.prepare(question(frames, moving=False), n_frames=frames)
    drop = DTD(threshold=0.5 if space == "feature" else 0.01, space=space)
    tokens = small.maps(ready, mechanisms=[drop])[0]
    text = len(ready.tokens) - len(ready.tokens.where(role="frame"))
    assert len(tokens) == 16 + text and tokens.n_frames == 1


def test_d3_noise_is_kept():
    assert bool(keep(DTD(threshold=0.9), noise()).all())


@pytest.mark.parametrize("reference", ["previous", "kept"])
def test_d4_counts_and_monotone(reference):
    x = mixed()
    found = [keep(DTD(threshold=t, reference=reference), x) for t in (-0.2, 0.2, 0.5, 0.8)]
    if reference == "previous":
        cosine = torch.nn.functional.cosine_similarity(x[:-1], x[1:], dim=-1)
        for t, k in zip((-0.2, 0.2, 0.5, 0.8), found, strict=True):
            assert int(k.sum()) == 8 + int((cosine <= t).sum())
        for less, more in zip(found, found[1:], strict=False):
            assert bool((more | ~less).all())
    sizes = [int(k.sum()) for k in found]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] < x.shape[0] * x.shape[1]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.8, 1.0])
def test_d5_relative_mode_drops_exactly_its_share_of_every_frame(ratio):
    x = mixed(cells=10)
    k = keep(DTD(ratio=ratio, scope="frame"), x)
    assert (~k).sum(1).tolist() == [0] + [int(10 * ratio)] * 5
    cosine = torch.nn.functional.cosine_similarity(x[:-1], x[1:], dim=-1)
    for kept, c in zip(k[1:], cosine, strict=True):
        if 0 < ratio < 1:
            assert c[~kept].min() >= c[kept].max()


def test_a_ratio_over_the_video_drops_the_closest_of_all():
    x = mixed(cells=10)
    k = keep(DTD(ratio=0.5), x)
    cosine = torch.nn.functional.cosine_similarity(x[:-1], x[1:], dim=-1)
    assert int((~k).sum()) == 25 and cosine[~k[1:]].min() >= cosine[k[1:]].max()
    drop = DTD(ratio=0.5).decide(blank(6), vision(x))
    assert drop.ratio() == 0.5 and drop.ratio(over="all") == 25 / 60
    assert drop.curve().tolist() == pytest.approx((~k).float().mean(1).tolist())


# ---- D6: streams ------------------------------------------------------------------------------------------------


def streamed(config, x, sizes):
    stage, at, out = config.streamed(), 0, []
    for n in sizes:
        left = stage(blank(n), vision(x[at : at + n]), "")
        kept = torch.zeros(n * x.shape[1], dtype=torch.bool)
        kept[left.grid.source] = True
        out.append(kept.view(n, -1))
        at += n
    return torch.cat(out)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1]])
@pytest.mark.parametrize(
    "config",
    [
        DTD(threshold=0.5),
        DTD(threshold=0.5, reference="kept"),
        DTD(ratio=0.5, scope="frame"),
        DTD(threshold=0.5, every=2),
    ],
    ids=["previous", "kept", "share of a frame", "every second frame whole"],
)
def test_d6_a_stream_decides_as_offline(config, sizes):
    x = mixed()
    offline = keep(config, x)
    assert torch.equal(streamed(config, x, sizes), offline) and not bool(offline.all())


def test_d6_released_pieces_forget_the_one_before():
    x = mixed()
    k = streamed(DTD(threshold=0.5, compat="released"), x, [2, 3, 1])
    assert bool(k[[0, 2, 5]].all())
    assert not bool(streamed(DTD(threshold=0.5), x, [2, 3, 1])[[2, 5]].all())


def test_a_stream_can_be_reset_and_put_back():
    x = mixed()
    stage = DTD(threshold=0.5).streamed()
    stage(blank(2), vision(x[:2]), "")
    state = stage.state()
    one = stage(blank(1), vision(x[2:3]), "").grid.source
    stage.restore(state)
    assert torch.equal(stage(blank(1), vision(x[2:3]), "").grid.source, one) and len(one) < 8
    stage.reset()
    assert len(stage(blank(1), vision(x[2:3]), "")) == 8


@pytest.mark.parametrize("config", [DTD(ratio=0.5), DTD(threshold=0.5, memory=5)])
def test_what_needs_a_whole_video_is_refused_in_a_stream(config):
    with pytest.raises(RunError, match="stream"):
        config.streamed()


# ---- D7, D8: the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.FAMILIES)
def test_d7_d8_positions_and_the_masked_twin(name, wrapped_text):
    """Survivors have their rope ids, and the same stream at every layer as if the dropped keys were hidden."""
    m = wrapped_text(name)
    ready = m.prepare(question(6), n_frames=6)
    mech = DTD(ratio=0.5)
    points = [f"blocks.{i}.hook_resid_post" for i in range(m.cfg.n_layers)]
    points += [f"blocks.0.attn.hook_rot_{x}" for x in "qk"]
    scores = "blocks.0.attn.hook_attn_scores"
    with torch.no_grad():
        out, cache = m.run_with_cache(ready, names_filter=[*points, scores], mechanisms=[mech])
        tokens = m.maps(ready, mechanisms=[mech])[0]
        gone = torch.tensor(sorted(set(range(ready.n_pos)) - set(tokens.order.tolist())))
        hide = dict.fromkeys(
            range(m.cfg.n_layers), lambda q, k: ~torch.isin(k, gone)[None].expand(len(q), -1)
        )
        logits, twin = m.run_with_cache(ready, names_filter=points, edges=hide)
        _, vanilla = m.run_with_cache(ready, names_filter=[*points[-2:], scores])
        original, plan = m.arrive(ready)[0], mech.plan(m.sizes)
        door = m.arrive(ready, plan)[0]
    assert len(gone) > 4
    assert torch.equal(door.rope, original.rope[..., tokens.order])
    assert torch.equal(door.next_rope(), original.next_rope())
    for p in points:
        assert torch.allclose(cache[p], twin[p][:, tokens.order], atol=1e-5, rtol=1e-4), p
    for p in points[-2:]:  # in layer 1 also vanilla's own
        assert torch.allclose(cache[p], vanilla[p][:, tokens.order], atol=1e-5, rtol=1e-4), p
    both = vanilla[scores][:, :, tokens.order][..., tokens.order]  # q . k of every two survivors
    assert torch.allclose(cache[scores], both, atol=1e-5, rtol=1e-4)
    assert torch.allclose(out, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_closed_up_positions(name, wrapped_text):
    """compact: no position is skipped that was not skipped before; and nothing dropped means nothing moved."""
    m = wrapped_text(name)
    ready = m.prepare(question(6, moving=False), n_frames=6)
    with torch.no_grad():
        original = m.arrive(ready)[0].rope
        same = m.arrive(ready, DTD(ratio=0.0, positions="compact").plan(m.sizes))[0].rope
        door = m.arrive(ready, DTD(ratio=0.5, positions="compact").plan(m.sizes))[0]
    assert torch.equal(same, original)
    rope = door.rope if door.rope.ndim == 2 else door.rope[:, 0]
    had = original if original.ndim == 2 else original[:, 0]
    before = set(range(int(had.max()) + 1)) - set(had.unique().tolist())
    after = set(range(int(rope.max()) + 1)) - set(rope.unique().tolist())
    assert len(after) <= len(before)
    if original.ndim == 2:
        assert torch.equal(door.rope[0], torch.arange(door.rope.shape[1]))
        assert int(door.next_rope()) < int(m.arrive(ready)[0].next_rope())


def test_d7_generated_tokens_stand_where_they_would_have_stood(small):
    ready = small.prepare(question())
    mech = DTD(ratio=0.8)
    seen = []

    def look(value, hook):
        seen.append(value.shape[1])

    with small.hooks([("blocks.0.hook_resid_pre", look)]):
        ids = small.generate(ready, max_new_tokens=4, stop=[], mechanisms=[mech]).ids
    n = len(small.maps(ready, mechanisms=[mech])[0])
    assert seen == [n, 1, 1, 1] and n < ready.n_pos
    with torch.no_grad():  # one forward over the undropped prompt and the answer, dropped keys hidden
        door, plan = small.arrive(ready)[0], mech.plan(small.sizes)
        kept = small.arrive(ready, plan)[1][0].order
        more = door.then(small.hf.get_input_embeddings()(ids[:, :-1]))
        from lab.model.decoder import decode
        from lab.model.door import Door
        from lab.model.run import Run

        rows = torch.cat([kept, ready.n_pos + torch.arange(3)])
        whole = Door(
            torch.cat([door.embeds, more.embeds], 1)[:, rows],
            torch.cat([door.rope, more.rope], -1)[:, rows],
            None,
        )
        logits = small.read(*decode(small, whole, Run()), "all")
    assert logits[0, n - 1 :].argmax(-1).tolist() == ids[0].tolist()


# ---- D9-D11 -------------------------------------------------------------------------------------------------------


def test_d9_a_cosine_does_not_see_scale_and_pixels_do():
    x = mixed()
    louder = x.clone()
    louder[3] *= 4.0
    assert torch.equal(keep(DTD(threshold=0.5), x), keep(DTD(threshold=0.5), louder))
    still = clip(4, moving=False)
    bright = still.pixels.clone()
    bright[2] = (bright[2].float() * 2).clamp(max=255).to(torch.uint8)
    brighter = Frames(bright, still.seconds, still.index, 2.0, 2.0, "x")
    features = mixed(4, 16)
    pixel = DTD(threshold=0.02, space="pixel")
    assert int(keep(pixel, features, still).sum()) == 16
    assert bool(keep(pixel, features, brighter)[2:4].all())


def rotating(steps, degrees):
    """Every frame turns the feature by `degrees`."""
    angle = torch.arange(steps) * math.radians(degrees)
    return torch.stack([angle.cos(), angle.sin()], 1)[:, None, :].repeat(1, 3, 1)


def test_d10_a_slow_drift_is_never_seen_unless_the_reference_is_what_was_kept():
    degrees = math.degrees(math.acos(0.9))
    x = rotating(10, degrees)
    assert keep(DTD(threshold=0.5), x).any(1).tolist() == [True] + [False] * 9
    again = math.ceil(60 / degrees)
    assert again == 3
    assert keep(DTD(threshold=0.5, reference="kept"), x).any(1).nonzero().squeeze(1).tolist() == list(
        range(0, 10, again)
    )


def test_d11_text_is_never_dropped_and_keeps_its_roles(small):
    ready = small.prepare(question())
    tokens = small.maps(ready, mechanisms=[DTD(ratio=1.0)])[0]
    text = [
        (p, r) for p, r in zip(ready.tokens.order.tolist(), ready.tokens.roles(), strict=True) if r != "frame"
    ]
    left = [(p, r) for p, r in zip(tokens.order.tolist(), tokens.roles(), strict=True) if r != "frame"]
    assert left == text and tokens.n_frames == 1
    assert torch.equal(tokens.ids, ready.tokens.ids[tokens.order])


# ---- further settings -----------------------------------------------------------------------------------------------


def test_pixels_of_tubelets_paper_and_released():
    """Tubelets of two frames: the paper compares neighbours, the released code frames three apart."""
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    pixels[3] = 255  # the last frame of the second tubelet
    frames = Frames(pixels, torch.arange(4.0), torch.arange(4), 1.0, 4.0, "x")
    x = noise(2, 4)
    assert int(keep(DTD(threshold=0.1, space="pixel"), x, frames)[1].sum()) == 0
    assert int(keep(DTD(threshold=0.1, space="pixel", compat="released"), x, frames)[1].sum()) == 4


def test_frames_kept_whole_and_the_bank():
    x = torch.ones(7, 4, 8)
    assert keep(DTD(threshold=0.5, every=3), x).sum(1).tolist() == [4, 0, 0, 4, 0, 0, 4]
    assert keep(DTD(ratio=1.0, every=3), x).sum(1).tolist() == [4, 0, 0, 4, 0, 0, 4]
    assert keep(DTD(threshold=0.5, every=3, memory=6), x).sum(1).tolist() == [0, 0, 0, 2, 0, 0, 4]


def test_features_that_are_zero_or_not_numbers_are_kept():
    x = torch.ones(3, 4, 8)
    x[1, 0], x[2, 1] = 0.0, torch.nan
    k = keep(DTD(threshold=0.5), x)
    assert bool(k[1, 0]) and bool(k[2, 1]) and not bool(k[1, 2:].any())


def test_scene_changes_at_the_cut():
    curve = torch.tensor([0.0, 0.9, 0.95, 0.1, 0.9, 0.5, 0.9, 1.0])
    assert scene_changes(curve) == [3, 5] and scene_changes(curve, level=0.3) == [3]
    assert scene_changes(curve, compat="released") == [3]
    assert scene_changes(torch.zeros(1)) == []
    with pytest.raises(UsageError, match="one number a frame"):
        scene_changes(torch.zeros(2, 2))


@pytest.mark.parametrize("space", ["feature", "pixel"])
def test_the_trigger_finds_the_cut_of_simulated_scenes(space):
    """scene_transition: all frames look alike but for one change of the background."""
    from lab.model.layout import vision_of
    from lab.model.zoo import load
    from lab.sim.tasks import draw_items

    tiny = load("tiny", verify=False)
    config = DTD(ratio=0.8, space=space)
    for item in draw_items("scene_transition", 4, 0):
        ready = tiny.prepare(item)
        with torch.no_grad():
            door = tiny.see(ready)
        drop: Drop = config.decide(ready.frames, vision_of(ready, door))
        cut = next(i for i, p in enumerate(item.state.places) if p != item.state.places[0])
        assert scene_changes(drop.curve(), level=0.3) == [cut]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threshold": 2.0}, "from -1 to 1"), ({"threshold": float("nan")}, "from -1 to 1"), ({"ratio": -0.1}, "from 0 to 1"),
        ({"threshold": 0.5, "ratio": 0.5}, "give one"), ({"space": "pixels"}, "feature, pixel"),
        ({"every": 1.5}, "whole number"), ({"memory": -1}, "whole number"), ({"threshold": -0.5, "space": "pixel"}, "from 0"),
        ({"ratio": 0.5, "reference": "kept"}, "scope='frame'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(wrong, says):
    with pytest.raises(UsageError, match=says):
        DTD(**wrong)


def test_the_example_drops_something_and_roles_stay(small):
    ready = small.prepare(question())
    tokens = small.maps(ready, mechanisms=[EXAMPLE])[0]
    assert len(tokens) < ready.n_pos and tokens.roles()[-1] == "last"
    assert (
        set(tokens.role.tolist()) == set(ready.tokens.role.tolist())
        and ROLES.index("frame") in tokens.role.tolist()
    )


def test_counts_of_the_map_before_a_drop_are_warned_of(small):
    ready = small.prepare(question(), mechanisms=[DifferentialTokenDrop(ratio=0.5)])
    policy = Policy.from_dict(
        {"format": "edge-policy/1", "cuts": [{"layers": "all", "q": "last", "k": "video"}]}
    )
    with pytest.warns(LabWarning, match="before DifferentialTokenDrop"):
        before = policy.count(ready.tokens)
    read = small.maps(ready)[0]
    now = policy.count(read)
    assert read.ahead == () and now.n_pos == len(read) < before.n_pos
    assert policy.count(small.prepare(question()).tokens).n_pos == before.n_pos
