"""Presets and counting: the published shares, exact integers by an independent double loop, and baselines of equal count."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from lab.carriers import TokenMap
from lab.edges import counting, presets
from lab.edges.drawing import RandomPairs
from lab.edges.layouts import plain_map, read_layout
from lab.edges.policy import FORMAT, Policy
from lab.errors import UsageError
from tests.families import FAMILIES, inputs

# (name, layout) -> layers, pairs in all and kept as released, counted by the loop of `double_loop` below; percent; and
# live edges of the full model and kept. VideoLLaMA3: 7 timestamp tokens before each of 8 frames of 128, our choice.
COUNTED = {
    ("7b", "52,8x144,44,19"): (32, 25_704_896, 11_022_790, 42.9),
    ("13b", "52,8x144,44,19"): (40, 32_131_120, 11_718_160, 36.5),
    ("internvl-4b", "52,8x256,44,19"): (32, 74_891_712, 29_763_540, 39.7),
    ("videollama3", "52,8x7+128,44,19"): (28, 20_009_080, 12_138_752, 60.7),
}  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), COUNTED)
def test_the_papers_policies_keep_the_published_share(name, layout):
    layers, total, kept, percent = COUNTED[name, layout]
    found = presets.paper(name).count(read_layout(layout))
    assert (found.n_layers, found.total, found.kept) == (layers, total, kept)
    assert round(100 * found.kept_fraction, 1) == percent and sum(found.per_layer) == kept


# ---- an independent count: plain Python, one edge at a time ----------------------------------------------------------------


def released_keeps(name: str, layer: int, q: tuple[str, int], k: tuple[str, int]) -> bool:
    """Whether the released policy keeps an edge of a 1-based layer, written from the table of the paper's ranges."""
    cross, vq, ql, vv, qq = {
        "7b": ((6, 15), (6, 20), (16, 25), 21, 26), "13b": ((6, 15), (6, 20), (16, 30), 21, 31),
        "internvl-4b": ((6, 15), (6, 20), (11, 30), 21, 31), "videollama3": ((1, 15), (6, 20), (21, 28), 21, 99),
    }[name]  # fmt: skip
    video = {"frame", "separator"} if name == "videollama3" else {"frame"}
    question = {"question", "option"}
    (rq, fq), (rk, fk) = q, k
    if rq in video and rk in video:
        return layer < vv and (fq == fk or cross[0] <= layer <= cross[1])
    if rq in question and rk in video:
        return vq[0] <= layer <= vq[1]
    if rq in question and rk in question:
        return layer < qq
    if rq == "last" and (rk in video or rk == "last"):
        return False
    if rq == "last" and rk in question:
        return ql[0] <= layer <= ql[1]
    return True


def double_loop(tokens: TokenMap, n_layers: int, keeps: Any) -> dict[str, int]:
    """total, kept, live_total and kept_live, by walking every pair of every layer."""
    spots = list(zip(tokens.roles(), tokens.frame.tolist(), strict=True))
    n = len(spots)
    kept = [
        {(i, j) for i in range(n) for j in range(i + 1) if keeps(layer, i, j)} for layer in range(n_layers)
    ]

    def live(edges: list[set[tuple[int, int]]]) -> int:
        alive, total = {n - 1}, 0
        for layer in reversed(range(n_layers)):
            used = [(i, j) for i, j in edges[layer] if i in alive]
            total += len(used)
            alive |= {j for _, j in used}
        return total

    full = [{(i, j) for i in range(n) for j in range(i + 1)}] * n_layers
    sizes = {"total": sum(map(len, full)), "kept": sum(map(len, kept))}
    return {**sizes, "live_total": live(full), "kept_live": live(kept)}


def random_layout(rng: random.Random) -> TokenMap:
    question = rng.randrange(7)
    return plain_map(
        system=rng.randrange(4), frames=rng.randrange(1, 5), per_frame=rng.randrange(1, 4), question=question,
        stem=rng.randrange(question + 1), options=rng.randrange(1, 4), template=rng.randrange(1, 4), separators=rng.randrange(3),
    )  # fmt: skip


def test_the_counter_equals_a_double_loop_on_the_papers_policies():
    rng = random.Random(0)
    for _ in range(12):
        tokens = random_layout(rng)
        spots = list(zip(tokens.roles(), tokens.frame.tolist(), strict=True))
        name = rng.choice(list(presets.FLOWS))
        depth = presets.FLOWS[name].depth
        want = double_loop(tokens, depth, lambda la, i, j: released_keeps(name, la + 1, spots[i], spots[j]))  # noqa: B023
        found = presets.paper(name).count(tokens)
        assert {key: getattr(found, key) for key in want} == want, name


SEGMENTS = (
    "video",
    "question",
    "option",
    "last",
    "system",
    "template",
    "text",
    "*",
    "frame:1",
    "question+option",
    "separator",
)


def belongs(name: str, role: str, frame: int) -> bool:
    text = ("system", "question", "option", "template")
    groups = {"video": ("frame",), "text": text, "question+option": ("question", "option")}
    if name in ("*", "frame:1"):
        return name == "*" or (role == "frame" and frame == 1)
    return role in groups.get(name, (name,))


def test_the_counter_equals_a_double_loop_on_100_random_layouts():
    rng = random.Random(1)
    wheres = {
        None: lambda i, j, f, g: True, "frame(q) > frame(k)": lambda i, j, f, g: f >= 0 and g >= 0 and f > g,
        "pos(q) - pos(k) > 3": lambda i, j, f, g: i - j > 3, "frame(q) == frame(k) or pos(k) < 2": lambda i, j, f, g: (f >= 0 and f == g) or j < 2,
    }  # fmt: skip
    for _ in range(100):
        tokens, n_layers = random_layout(rng), rng.randrange(1, 6)
        spots = list(zip(tokens.roles(), tokens.frame.tolist(), strict=True))
        cuts = [
            (sorted(rng.sample(range(n_layers), rng.randrange(1, n_layers + 1))), *rng.choices(SEGMENTS, k=2), rng.choice(list(wheres)))
            for _ in range(rng.randrange(1, 4))
        ]  # fmt: skip

        def keeps(layer: int, i: int, j: int, cuts: Any = cuts, spots: Any = spots) -> bool:
            return not any(
                layer in layers and belongs(q, *spots[i]) and belongs(k, *spots[j])
                and wheres[where](i, j, spots[i][1], spots[j][1])
                for layers, q, k, where in cuts
            )  # fmt: skip

        policy = Policy.from_dict({"format": FORMAT, "cuts": [
            {"layers": ",".join(str(x + 1) for x in layers), "q": q, "k": k, **({"where": where} if where else {})}
            for layers, q, k, where in cuts
        ]})  # fmt: skip
        found = policy.count(tokens, n_layers)
        want = double_loop(tokens, n_layers, keeps)
        assert {key: getattr(found, key) for key in want} == want, policy


def test_counting_a_few_rows_at_a_time_says_the_same(monkeypatch):
    tokens = read_layout("9,4x5,6,4")
    policies = [presets.paper("7b"), presets.video_exit(9, 32), presets.random_pairs(0.3)]
    whole = [p.count(tokens, 32) for p in policies]
    monkeypatch.setattr(counting, "CELLS", 7 * 39)
    assert [p.count(tokens, 32) for p in policies] == whole


def test_single_heads_count_as_their_share():
    tokens = read_layout("2,2x3,4,2")
    cut = {"layers": "1", "q": "last", "k": "video"}
    one = Policy.from_dict({"format": FORMAT, "cuts": [{**cut, "heads": [1]}]}).count(tokens, 3, 4)
    every = Policy.from_dict({"format": FORMAT, "cuts": [cut]}).count(tokens, 3)
    assert one.total == 4 * every.total and one.total - one.kept == every.total - every.kept == 6
    assert Policy.from_dict({"format": FORMAT, "cuts": [cut], "model": {"layers": 3}}).count(tokens) == every
    with pytest.raises(UsageError, match="n_heads="):
        Policy.from_dict({"format": FORMAT, "cuts": [{**cut, "heads": [1]}]}).count(tokens, 3)


# ---- strict and released ------------------------------------------------------------------------------------------------


def test_released_policies_leak_and_strict_ones_exit():
    tokens = read_layout("52,8x144,44,19")
    for name in ("7b", "13b", "internvl-4b", "videollama3"):
        released, strict = presets.paper(name), presets.paper(name, "strict")
        assert released.leaks(tokens).after_video == 18 and not strict.leaks(tokens)
        loose, tight = released.count(tokens), strict.count(tokens)
        # the template reads video to the end, so that released video rows stay alive; strict ones die after layer 20
        assert loose.exit_layer == loose.n_layers - 1 and tight.exit_layer == 20
        assert tight.kept < loose.kept and tight.kept_live_fraction < loose.kept_live_fraction
        assert loose.excess_over_exit < 0 and tight.excess_over_exit < 0


def test_ranges_scale_with_the_depth():
    assert presets.scaled((6, 15), 32, 32) == (6, 15) and presets.scaled((6, 15), 32, 16) == (3, 8)
    assert presets.scaled((1, 20), 32, 8) == (1, 5) and presets.scaled((16, 25), 32, 64) == (32, 50)
    assert presets.scaled((6, 15), 32, 1) == (1, 1)
    tokens = read_layout("52,8x144,44,19")
    for n in (1, 2, 8, 12, 28, 36, 80):
        for name in presets.FLOWS:
            for style in presets.STYLES:
                policy = presets.paper(name, style, n)
                assert policy.model.layers == n and all(max(c.layers_of(n)) < n for c in policy.cuts)
    assert abs(presets.paper("7b", n_layers=64).count(tokens).kept_fraction - 0.429) < 0.03


# ---- baselines ------------------------------------------------------------------------------------------------------------


def test_one_parameter_competitors_reach_the_same_count():
    tokens = read_layout("52,8x144,44,19")
    assert round(presets.frame_local(26, 32).count(tokens).kept_fraction, 3) == 0.413
    exits = [presets.video_exit(x, 32).count(tokens) for x in range(0, 33)]
    assert (
        exits[32].kept == exits[32].total
        and min(exits, key=lambda c: abs(c.kept_fraction - 0.42)).exit_layer == 13
    )
    assert (
        all(c.exit_layer == min(x, 31) or x == 32 for x, c in enumerate(exits))
        and exits[13].excess_over_exit == 0
    )
    assert exits[20].excess_over(exits[13]) > 0


def test_shuffled_policies_keep_the_count():
    tokens = read_layout("9,4x5,6,4")
    policy = presets.paper("7b")
    want = policy.count(tokens)
    for make in (presets.layer_permuted, presets.composition_matched):
        one, same, other = make(policy, 32, 0), make(policy, 32, 0), make(policy, 32, 1)
        assert one == same and one.id != other.id != policy.id
        assert one.count(tokens).kept == want.kept and one.count(tokens).per_layer != want.per_layer
    permuted = presets.layer_permuted(policy, 32, 0).count(tokens).per_layer
    assert sorted(permuted) == sorted(want.per_layer)
    assert sorted(presets.composition_matched(policy, 32, 0).count(tokens).per_layer) != sorted(
        want.per_layer
    )


def test_random_pairs_cut_the_ratio_after_the_video_starts():
    tokens = read_layout("5,4x9,8,5")
    draw = presets.random_pairs("7b", seed=3)
    assert draw == RandomPairs(0.58, 3)
    masks, n = draw.masks(tokens, 4), len(tokens)
    wanted = round(0.58 * n * (n + 1) / 2)
    assert set(masks) == {0, 1, 2, 3} and all(int(m.sum()) == wanted for m in masks.values())
    assert not torch.equal(masks[0], masks[1]) and torch.equal(
        masks[0], RandomPairs(0.58, 3).masks(tokens, 4)[0]
    )
    assert not any(m.triu(1).any() or m[:5].any() or m[:, :5].any() for m in masks.values())
    assert bool(masks[0].diagonal().any()), "self edges can be drawn"
    assert draw.count(tokens, 4).kept == 4 * (n * (n + 1) // 2 - wanted)
    with pytest.raises(UsageError, match="smaller ratio"):
        RandomPairs(1.0).masks(tokens, 1)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_preset_runs_on_every_family(name, wrapped):
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name), roles=None)
    clean, n = model(ready, read="all"), model.cfg.n_layers
    policies = [presets.paper(p, s, n) for p in presets.FLOWS for s in presets.STYLES]
    policies += [presets.video_exit(2, n), presets.frame_local(2, n), RandomPairs(0.1)]
    policies += [f(policies[1], n, 0) for f in (presets.layer_permuted, presets.composition_matched)]
    for policy in policies:
        got = model(ready, policy=policy, read="all")
        assert torch.isfinite(got).all() and not torch.equal(got, clean), policy
    assert torch.equal(model(ready, policy=presets.nothing(), read="all"), clean)
    assert torch.equal(
        model(ready, policy=presets.video_exit(n, n).model_copy(update={"cuts": ()}), read="all"), clean
    )


def test_names_of_presets():
    assert presets.named("13b") == presets.paper("13b") and presets.named(
        "video-exit/3", 8
    ) == presets.video_exit(3, 8)
    assert presets.named("nothing").is_null and "7b/strict" in presets.known()
    for bad in ("8b", "7b/loose", "video-exit/x", "frame-local/9", "video-exit/" + "9" * 30):
        with pytest.raises(UsageError):
            presets.named(bad, 8)
    for bad in ("", "1,2,3", "1,2x3,4,0", "a,8x144,44,19", "1,99999x99999,1,1"):
        with pytest.raises(UsageError):
            read_layout(bad)
