"""Mixture-of-Depths: the routed run against the brute-force twin (hide keys, copy residuals), and the paper's checks A1-A11."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.carriers import TokenMap, VideoGrid
from lab.errors import ConfigError, LabWarning, RunError, UsageError
from lab.mechanisms.mixture_of_depths import EXAMPLE, NEUTRAL, MixtureOfDepths, ShiftedCosine, oracle_scores
from lab.model.cache import KVCache
from lab.model.run import Run
from lab.model.videollm import VideoLLM
from lab.routing import Routers, groups_of, scrambled, stride, top
from lab.slots import ModelSizes, Plan
from lab.spans import Span
from tests.families import FAMILIES, LAYERS, VIDEO, inputs

ODD = (1, 3)
FREE = MixtureOfDepths(keep=0.4, gate="none", seed=3)
GATED = MixtureOfDepths(keep=0.4, gate="tanh1", seed=3)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def model(wrapped: Any) -> VideoLLM:
    return wrapped("llava_onevision")


def ready_of(model: VideoLLM, name: str = "llava_onevision", **kw: Any) -> Any:
    return model.prepare_inputs(**inputs(name, **kw))


def twin(model: VideoLLM, ready: Any, keep: Tensor, layers: Tensor, **how: Any) -> Tensor:
    """The oracle, without any detour: hide the keys that were not chosen, and copy the stream of rows not chosen.

    keep [layer, world, pos]; gates are not part of it.
    """
    edges: dict[int, Any] = {}
    hooks: list[Any] = []
    for i, layer in enumerate(layers.tolist()):
        kept, held = keep[i], []
        hooks.append((f"blocks.{layer}.hook_resid_pre", lambda v, hook, held=held: held.append(v)))
        hooks.append(
            (
                f"blocks.{layer}.hook_resid_post",
                lambda v, hook, k=kept, h=held: torch.where(k[..., None], v, h[-1]),
            )
        )
        own = torch.eye(
            kept.shape[1], dtype=torch.bool
        )  # rows not chosen keep their own key: nothing is empty
        edges[layer] = lambda q, k, kept=kept, own=own: kept[:, None, None, k] | own[q][:, k]
    return model.run_with_hooks(ready, fwd_hooks=hooks, edges=edges, read="all", **how)


def real(ready: Any) -> Tensor:
    return ready.inputs["attention_mask"].bool()


# ---- the oracle of the whole mechanism (A8) ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [{}, {"worlds": 2, "pad": 3}], ids=["one", "left-padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_routed_run_equals_brute_force(name: str, batch: dict[str, int], wrapped: Any) -> None:
    model = wrapped(name)
    ready = ready_of(model, name, **batch)
    out = model.run(ready, read="all", mechanisms=[FREE])
    keep = out.heads["mod.keep"]
    assert int((~keep).sum()) > 0 and out.heads["mod.layers"].tolist() == list(ODD)
    if batch:
        assert not torch.equal(keep[:, 0], keep[:, 1])  # worlds choose for themselves
    oracle = twin(model, ready, keep, out.heads["mod.layers"])
    assert (out.logits - oracle)[real(ready)].abs().max() < 1e-5
    assert (out.logits - model(ready, read="all"))[real(ready)].abs().max() > 1e-2


@pytest.mark.parametrize("selector", ["learned", "random", "uniform", "norm", "attention"])
@pytest.mark.parametrize("scope", ["frame", "sequence"])
def test_every_selector_equals_brute_force(selector: Any, scope: Any, model: VideoLLM) -> None:
    ready = ready_of(model)
    out = model.run(ready, read="all", mechanisms=[replace(FREE, selector=selector, scope=scope)])
    assert int((~out.heads["mod.keep"]).sum()) > 10
    assert (
        out.logits - twin(model, ready, out.heads["mod.keep"], out.heads["mod.layers"])
    ).abs().max() < 1e-5


def test_selectors_choose_differently(model: VideoLLM) -> None:
    ready = ready_of(model)
    kept = [
        model.run(ready, mechanisms=[replace(FREE, selector=s)]).heads["mod.keep"]
        for s in ("learned", "random", "uniform", "norm", "attention")
    ]
    assert len({k.flatten().numpy().tobytes() for k in kept}) == len(kept)
    assert len({int(k.sum()) for k in kept}) == 1  # the same budget


# ---- A1, A2: neutral ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_neutral_is_vanilla_bit_for_bit(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = ready_of(model, name, worlds=2, pad=3)
    clean, caches = model(ready, read="all"), [KVCache(), KVCache()]
    for mechanism in (NEUTRAL, replace(NEUTRAL, scope="sequence", layers="all")):
        out = model.run(ready, read="all", mechanisms=[mechanism])
        assert torch.equal(out.logits, clean) and bool(out.heads["mod.keep"].all())
    filled = [Plan(cache=lambda c=c: c) for c in caches]
    model.run(ready, mechanisms=[_Given(filled[0])])
    model.run(ready, mechanisms=[NEUTRAL, _Given(filled[1])])
    for layer in range(LAYERS):
        assert torch.equal(caches[0].k[layer], caches[1].k[layer])
        assert torch.equal(caches[0].v[layer], caches[1].v[layer])


class _Given:
    def __init__(self, plan: Plan) -> None:
        self.what = plan

    def plan(self, cfg: ModelSizes) -> Plan:
        return self.what


def test_neutral_has_vanilla_gradients(model: VideoLLM) -> None:
    def gradient(mechanisms: list[Any]) -> Tensor:
        with torch.enable_grad():
            door, maps = model.arrive(ready_of(model))
            embeds = door.embeds.clone().requires_grad_()
            plan = sum((m.plan(model.sizes) for m in mechanisms), Plan())
            resid, side = model.stream(replace(door, embeds=embeds), Run(), plan=plan, tokens=maps)
            return torch.autograd.grad(model.read(resid, side).logsumexp(-1).sum(), embeds)[0]

    assert torch.equal(gradient([]), gradient([NEUTRAL]))
    assert not torch.equal(gradient([]), gradient([FREE]))


@pytest.mark.parametrize("site", ["block_delta", "block_out", "mlp_only"])
def test_a_gate_of_one_changes_nothing(site: Any, model: VideoLLM) -> None:
    ready, clean = ready_of(model), model(ready_of(model), read="all")
    whole = MixtureOfDepths(keep=1.0, gate_site=site, scale_skipped=True)
    for gate, bias in (("raw", 1.0), ("tanh1", 0.0)):
        m = replace(whole, gate=gate, router_bias=True)
        routers = m.fresh_routers(model.sizes, start="zero")
        for offset in routers.offset.values():
            offset.fill_(bias)  # a constant feature: every score is 1 (raw), every gate 1 (tanh1)
        out = model.run(ready, read="all", mechanisms=[replace(m, routers=routers)])
        assert (out.logits - clean).abs().max() < 1e-5
        assert bool((out.heads["mod.gate"] == 1).all())
    half = model.run(ready, read="all", mechanisms=[replace(whole, gate="softmax", seed=1)])
    assert (half.logits - clean).abs().max() > 1e-2


# ---- A3: counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "least", "k"), [(0.2, 0, 2), (0.4, 0, 4), (0.0, 0, 0), (0.0, 1, 1), (1.0, 0, 9)]
)
def test_rows_cached(keep: float, least: int, k: int, model: VideoLLM) -> None:
    """9 tokens a frame, 3 frames, 11 rows of text and newline."""
    ready = ready_of(model)
    m = MixtureOfDepths(keep=keep, least=least)
    cache = KVCache()
    out = model.run(ready, mechanisms=[m, _Given(Plan(cache=lambda: cache))])
    text = ready.n_pos - 27
    assert cache.lengths() == [ready.n_pos, text + 3 * k, ready.n_pos, text + 3 * k, ready.n_pos]
    assert m.rows(ready.tokens, LAYERS) == cache.lengths()
    kept = out.heads["mod.keep"].sum(-1)[:, 0].tolist()
    assert kept == [text + 3 * k] * 2
    depth = out.heads["mod.depth"][0]
    assert (
        int(depth.sum()) == sum(cache.lengths())
        and int(depth[ready.tokens.where(role="text")].min()) == LAYERS
    )


def test_what_the_paper_counts() -> None:
    """600 frames of 10 tokens, r = 0.2 in half of the layers: 0.60 of the rows, so of linear FLOPs and of keys and values
    (1.67 times the context in the same memory), and 0.52 of the products of queries and keys."""
    from lab.prompt import lay_out
    from tests.families import tokenizer

    grid = VideoGrid.regular(600, 2, 5, seconds=None, weight=1.0)
    spans = [Span("frame", kind="video", rows=(0, 6000)), Span("last", "?")]
    _, tokens = lay_out(spans, grid, tokenizer("llava_onevision"), VIDEO)
    rows = torch.tensor(MixtureOfDepths(keep=0.2).rows(tokens, 32)).double()
    n = float(len(tokens))
    assert rows.unique().tolist() == [1201, 6001] and float(rows.sum()) / (32 * n) == pytest.approx(
        0.60, abs=1e-3
    )
    assert 32 * n / float(rows.sum()) == pytest.approx(1 / 0.6, abs=2e-3)
    assert float((rows**2).sum()) / (32 * n * n) == pytest.approx(0.52, abs=1e-3)


# ---- A4: skipping is the identity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True])
def test_skipped_rows_pass_by(scaled: bool, model: VideoLLM) -> None:
    ready = ready_of(model)
    out_of = model.run_with_cache(
        ready,
        names_filter=lambda n: "resid_p" in n and "blocks" in n,
        mechanisms=[replace(GATED, scale_skipped=scaled)],
    )[1]
    heads = model.run(ready, mechanisms=[replace(GATED, scale_skipped=scaled)]).heads
    for i, layer in enumerate(ODD):
        gone = ~heads["mod.keep"][i, 0]
        pre, post = out_of["resid_pre", layer][0, gone], out_of["resid_post", layer][0, gone]
        want = pre * heads["mod.gate"][i, 0, gone, None] if scaled else pre
        assert torch.equal(post, want) and int(gone.sum()) == 15
        assert not torch.equal(out_of["resid_pre", layer][0, ~gone], out_of["resid_post", layer][0, ~gone])


def test_gate_multiplies_where_it_says(model: VideoLLM) -> None:
    """One routed layer, everything kept: the three sites against the layer's own attn_out and mlp_out."""
    ready = ready_of(model)
    names = [f"blocks.1.{n}" for n in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post")]
    for site in ("block_delta", "block_out", "mlp_only"):
        m = MixtureOfDepths(keep=1.0, layers=(1,), gate="softmax", gate_site=site, seed=2)
        g = model.run(ready, mechanisms=[m]).heads["mod.gate"][0, 0, :, None]
        _, cache = model.run_with_cache(ready, names_filter=names, mechanisms=[m])
        pre, attn, mlp, post = (cache[n][0] for n in names)
        want = {
            "block_delta": pre + g * (attn + mlp),
            "block_out": g * (pre + attn + mlp),
            "mlp_only": pre + attn + mlp,
        }
        assert (
            post - want[site]
        ).abs().max() < 1e-5  # for mlp_only the point shows what was added, gate included
    _, clean = model.run_with_cache(ready, names_filter=names)
    assert (mlp - g * clean[names[2]][0]).abs().max() < 1e-5


# ---- A5: gradients of the routers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["block_delta", "block_out", "mlp_only"])
@pytest.mark.parametrize("gate", ["raw", "tanh1", "softmax", "none"])
def test_routers_learn_through_the_gate(gate: Any, site: Any, model: VideoLLM) -> None:
    ready = ready_of(model)
    for keep in (0.4, 0.0):
        m = MixtureOfDepths(keep=keep, gate=gate, gate_site=site)
        routers = m.fresh_routers(model.sizes, start="random")
        with torch.enable_grad():
            loss = model.run(ready, mechanisms=[replace(m, routers=routers)]).logits[0, -1].log_softmax(-1)[7]
        assert loss.requires_grad == (gate != "none")
        if gate != "none":
            loss.backward()
            assert all((float(p.grad.abs().max()) > 0) == (keep > 0) for p in routers.parameters())


def test_auxiliary_loss_of_gamma_mod(model: VideoLLM) -> None:
    m = MixtureOfDepths.gamma_mod((1, 2))
    routers = m.fresh_routers(model.sizes, start="random")
    with torch.enable_grad():
        heads = model.run(ready_of(model), mechanisms=[replace(m, routers=routers)]).heads
        heads["mod.aux"].backward()
    assert all(float(p.grad.abs().max()) > 0 for p in routers.parameters()) and float(heads["mod.aux"]) > 0


# ---- A6, A7: streaming equals offline, and the future does not leak ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("selector", ["learned", "random", "uniform", "norm", "attention"])
def test_pieces_equal_the_whole(name: str, selector: Any, wrapped: Any) -> None:
    """Frame by frame with per-layer caches (a piece ends between frames) = one forward."""
    model = wrapped(name)
    ready = ready_of(model, name, frames=6)
    m = replace(GATED, selector=selector)
    whole = model(ready, mechanisms=[m])
    assert (model(ready, mechanisms=[m], chunk=7) - whole).abs().max() < 1e-5
    text = [model.generate(ready, max_new_tokens=4, stop=[], mechanisms=[m], chunk=c).ids for c in (None, 7)]
    assert torch.equal(*text)


def test_sequence_scope_is_not_streaming(model: VideoLLM) -> None:
    m, differ = replace(GATED, scope="sequence"), []
    for seed in range(3):
        ready = ready_of(model, frames=6, seed=seed)
        with pytest.warns(LabWarning, match="runs in pieces"):
            pieces = model(ready, mechanisms=[m], chunk=9)
        differ.append(float((pieces - model(ready, mechanisms=[m])).abs().max()))
    assert max(differ) > 1e-3


@pytest.mark.parametrize("scope", ["frame", "sequence"])
@pytest.mark.parametrize("selector", ["learned", "norm", "attention", "random", "uniform"])
def test_the_future_leaks_only_in_sequence_scope(scope: Any, selector: Any, model: VideoLLM) -> None:
    """Change the last frame: what stands before it must not move, unless all frames compete."""
    m = replace(GATED, scope=scope, selector=selector, layers="all", first=1)
    names = [f"blocks.{i}.hook_resid_post" for i in range(LAYERS)]
    moved = 0.0
    for seed in range(3):
        x = inputs("llava_onevision", seed=seed)
        other = dict(x, pixel_values_videos=x["pixel_values_videos"].clone())
        other["pixel_values_videos"][:, -1] *= -3.0
        runs = [
            model.run_with_cache(model.prepare_inputs(**i), names_filter=names, mechanisms=[m])[1]
            for i in (x, other)
        ]
        tokens = model.prepare_inputs(**x).tokens
        before = tokens.where(frame=[0, 1])
        assert not torch.equal(
            runs[0][names[0]][:, tokens.where(frame=2)], runs[1][names[0]][:, tokens.where(frame=2)]
        )
        moved = max(moved, max(float((runs[0][n] - runs[1][n])[:, before].abs().max()) for n in names))
    by_content = selector in ("learned", "norm", "attention")
    assert moved > 1e-2 if scope == "sequence" and by_content else moved < 1e-5


# ---- A9: no bias by index ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["learned", "norm"])
def test_permuted_tokens_permute_the_choice(selector: Any, model: VideoLLM) -> None:
    ready = ready_of(model)
    door, maps = model.arrive(ready)
    first = ready.tokens.where(frame=1)
    order = first[torch.randperm(len(first), generator=torch.Generator().manual_seed(4))]
    moved = door.embeds.clone()
    moved[:, first] = door.embeds[:, order]
    plan = replace(FREE, selector=selector, layers=(0,), keep=0.4).plan(model.sizes)
    keep = []
    for embeds in (door.embeds, moved):
        resid, side = model.stream(replace(door, embeds=embeds), Run(), plan=plan, tokens=maps)
        keep.append(plan.heads[0](resid, side)["mod.keep"][0, 0])
    assert torch.equal(keep[1][first], keep[0][order]) and 0 < int(keep[0][first].sum()) < 9


@pytest.mark.parametrize("selector", ["learned", "norm"])
def test_tokens_permuted_with_their_positions_permute_the_choice_in_deep_layers(
    selector: Any, model: VideoLLM
) -> None:
    """Where the tokens of a frame do not read each other, only their place in the sequence is left, and must not count."""
    ready = ready_of(model)
    door, maps = model.arrive(ready)
    frame, first = ready.tokens.frame, ready.tokens.where(frame=1)

    def apart(q: Tensor, k: Tensor) -> Tensor:
        return (frame[q][:, None] != frame[k][None]) | (frame[q] < 0)[:, None] | (q[:, None] == k[None])

    order = first[torch.randperm(len(first), generator=torch.Generator().manual_seed(4))]
    embeds, rope = door.embeds.clone(), door.rope.clone()
    embeds[:, first], rope[..., first] = door.embeds[:, order], door.rope[..., order]
    plan = replace(FREE, selector=selector, layers=(1, 2, 3), keep=0.4).plan(model.sizes)
    keep = []
    for moved in (door, replace(door, embeds=embeds, rope=rope)):
        resid, side = model.stream(moved, Run(dict.fromkeys(range(LAYERS), apart)), plan=plan, tokens=maps)
        keep.append(plan.heads[0](resid, side)["mod.keep"][:, 0])
    assert torch.equal(keep[1][:, first], keep[0][:, order])
    assert not torch.equal(keep[1], keep[0]) and keep[0][:, first].sum(1).tolist() == [4, 4, 4]


# ---- A10: schedules -----------------------------------------------------------------------------------------------------------------


def test_early_exit_and_layer_skip(model: VideoLLM) -> None:
    ready = ready_of(model)
    video, text = ready.tokens.where(role="video"), ready.n_pos - 27
    out = model.run(ready, read="all", mechanisms=[MixtureOfDepths.early_exit(2)])
    assert bool(out.logits.isfinite().all())
    assert out.heads["mod.depth"][0, video].unique().tolist() == [2]
    assert MixtureOfDepths.early_exit(2).rows(ready.tokens, LAYERS) == [ready.n_pos] * 2 + [text] * 3
    blind = {i: lambda q, k: ~torch.isin(k, video)[None].expand(len(q), -1) for i in (2, 3, 4)}
    assert (out.logits[:, -1] - model(ready, edges=blind)[:, -1]).abs().max() < 1e-5
    skip = model.run(ready, mechanisms=[MixtureOfDepths.layer_skip()]).heads["mod.depth"][0]
    assert skip[video].unique().tolist() == [3] and MixtureOfDepths.layer_skip().ratios(5) == [
        None,
        0,
        None,
        0,
        None,
    ]
    same = MixtureOfDepths(keep=(None, None, 0.0, 0.0, 0.0), selector="uniform", gate="none")
    assert torch.equal(model(ready, read="all", mechanisms=[same]), out.logits)


def test_schedules_of_the_relatives() -> None:
    ratios = ShiftedCosine().ratios(32)
    assert ratios[:8] == [None] * 8 and ratios[-1] == 0.15 and None not in ratios[8:]
    assert all(a >= b for a, b in zip(ratios[8:], ratios[9:], strict=False)) and ratios[8] == pytest.approx(
        0.8446, abs=1e-3
    )
    assert MixtureOfDepths.p_mod(compat="paper").gate_site == "block_delta"
    assert MixtureOfDepths(layers="interleaved", first="half").ratios(8) == [None] * 5 + [0.2, None, 0.2]
    assert MixtureOfDepths(layers="all", first="half").ratios(4) == [None, None, 0.2, 0.2]
    assert MixtureOfDepths(parity="even").ratios(4) == [0.2, None, 0.2, None]


@pytest.mark.parametrize(
    "preset",
    [MixtureOfDepths.p_mod(), MixtureOfDepths.p_mod(compat="paper"), MixtureOfDepths.gamma_mod((1, 3)),
     MixtureOfDepths.gamma_mod((1, 3), compat="paper"), replace(MixtureOfDepths.gamma_mod((1, 3)), threshold=0.4)],
)  # fmt: skip
@pytest.mark.parametrize("batch", [{}, {"worlds": 2, "pad": 3}], ids=["one", "left-padded"])
def test_presets_run_and_generate(preset: MixtureOfDepths, batch: dict[str, int], model: VideoLLM) -> None:
    ready = ready_of(model, **batch)
    out = model.run(ready, mechanisms=[preset])
    assert bool(out.logits.isfinite().all()) and not torch.allclose(out.logits, model(ready), atol=1e-3)
    decoded_like_recomputed(model, ready, preset)


# ---- A11: decoding ------------------------------------------------------------------------------------------------------------------


def decoded_like_recomputed(model: VideoLLM, ready: Any, m: MixtureOfDepths, steps: int = 4) -> None:
    """Cached one-token steps choose what a full forward over prompt and generated ids chooses."""
    ids = model.generate(ready, max_new_tokens=steps, stop=[], mechanisms=[m]).ids
    for step in range(1, steps):
        x = dict(ready.inputs)
        x["input_ids"] = torch.cat([x["input_ids"], ids[:, :step]], 1)
        x["attention_mask"] = torch.cat([x["attention_mask"], torch.ones_like(ids[:, :step])], 1)
        if "mm_token_type_ids" in x:
            x["mm_token_type_ids"] = torch.cat(
                [x["mm_token_type_ids"], torch.zeros_like(ids[:, :step]).int()], 1
            )
        again = model(model.prepare_inputs(**x), mechanisms=[m])[:, -1]
        assert again.argmax(-1).tolist() == ids[:, step].tolist()


@pytest.mark.parametrize("batch", [{}, {"worlds": 2, "pad": 3}], ids=["one", "left-padded"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_decoding_equals_recomputing(name: str, batch: dict[str, int], wrapped: Any) -> None:
    model = wrapped(name)
    decoded_like_recomputed(model, ready_of(model, name, **batch), GATED)


def test_teacher_forced_steps_equal_one_forward(model: VideoLLM) -> None:
    from lab.model.answering import target_logits

    ready, ids = ready_of(model), torch.tensor([[30, 41, 52, 63]])
    stepped = target_logits(model, ready, ids, mechanisms=[GATED])
    x = dict(ready.inputs, input_ids=torch.cat([ready.inputs["input_ids"], ids], 1))
    x["attention_mask"] = torch.ones_like(x["input_ids"])
    full = model(model.prepare_inputs(**x), read="all", mechanisms=[GATED])[:, -5:-1]
    assert (stepped - full).abs().max() < 1e-5


# ---- with cuts, policies, hooks, sweeps -----------------------------------------------------------------------------------------------


def test_cuts_mean_the_same(model: VideoLLM) -> None:
    """A knock-out under MoD = the brute-force twin under the same knock-out."""
    ready = ready_of(model)
    last, video = ready.tokens.last, ready.tokens.where(role="video")

    def cut(q: Tensor, k: Tensor) -> Tensor:
        return ~(torch.isin(q, last)[:, None] & torch.isin(k, video)[None])

    edges = dict.fromkeys(range(LAYERS), cut)
    out = model.run(ready, read="all", mechanisms=[FREE], edges=edges)
    keep = out.heads["mod.keep"]

    def hidden(i: int) -> Any:
        own = torch.eye(ready.n_pos, dtype=torch.bool)
        return lambda q, k: cut(q, k) & (keep[i, 0, k] | own[q][:, k])

    both = edges | {layer: hidden(i) for i, layer in enumerate(ODD)}
    hooks: list[Any] = []
    for i, layer in enumerate(ODD):
        held: list[Tensor] = []
        hooks.append((f"blocks.{layer}.hook_resid_pre", lambda v, hook, h=held: h.append(v)))
        hooks.append(
            (
                f"blocks.{layer}.hook_resid_post",
                lambda v, hook, k=keep[i], h=held: torch.where(k[..., None], v, h[-1]),
            )
        )
    oracle = model.run_with_hooks(ready, fwd_hooks=hooks, edges=both, read="all")
    assert (out.logits - oracle).abs().max() < 1e-5
    assert not torch.allclose(out.logits[:, -1], model(ready, mechanisms=[FREE])[:, -1], atol=1e-4)


def test_policies_and_sweeps(model: VideoLLM) -> None:
    from lab.edges.policy import Policy
    from lab.edges.sweeping import sweep

    policy = Policy.from_dict(
        {"format": "edge-policy/1", "cuts": [{"layers": "1-5", "heads": "all", "q": "last", "k": "video"}]}
    )
    ready = replace(ready_of(model), plan=FREE.plan(model.sizes))
    plain = ready_of(model)
    with model.pruned(policy):
        cut = model(ready)
    assert torch.equal(cut, model(plain, mechanisms=[FREE], policy=policy))
    assert not torch.allclose(cut, model(ready), atol=1e-4)
    swept = {
        e: sweep(model, ready, ["video->last"], window=2, executor=e, show_progress=False)
        for e in ("fast", "reference")
    }
    assert torch.allclose(
        torch.tensor(swept["fast"].values), torch.tensor(swept["reference"].values), atol=1e-3
    )
    assert "detours" in swept["fast"].notes["fallbacks"][0]
    without = sweep(model, plain, ["video->last"], window=2, show_progress=False)
    assert not torch.allclose(torch.tensor(swept["fast"].values), torch.tensor(without.values), atol=1e-2)


def test_runs_are_apart_and_leave_nothing(model: VideoLLM) -> None:
    """One prepared question run twice, and plain runs after it: the mechanism keeps its memory in the run."""
    ready, clean = ready_of(model), model(ready_of(model))
    held = replace(ready, plan=replace(GATED, positions="compact").plan(model.sizes))
    first = model(held)
    model.generate(held, max_new_tokens=3, stop=[])
    assert torch.equal(model(held), first) and torch.equal(model(ready), clean)


def test_heads_follow_a_nested_routing(model: VideoLLM) -> None:
    ready = ready_of(model)
    out = model.run(
        ready,
        mechanisms=[
            replace(FREE, layers=(1,), keep=0.6),
            replace(FREE, layers=(1,), keep=0.5, selector="norm"),
        ],
    )
    cache = KVCache()
    model.run(
        ready,
        mechanisms=[
            replace(FREE, layers=(1,), keep=0.6),
            replace(FREE, layers=(1,), keep=0.5, selector="norm"),
            _Given(Plan(cache=lambda: cache)),
        ],
    )
    assert cache.lengths()[1] == ready.n_pos - 27 + 3 * 2  # 9 -> 5 -> round(2.5) = 2
    assert out.heads["mod.keep"].shape[-1] <= ready.n_pos


# ---- knobs ------------------------------------------------------------------------------------------------------------------------


def test_forced_tokens(model: VideoLLM) -> None:
    ready = ready_of(model)
    for name, at in (("force_keep_last", 8), ("force_keep_cls", 0)):
        m = MixtureOfDepths(keep=0.2, **{name: True})
        keep = model.run(ready, mechanisms=[m]).heads["mod.keep"][:, 0]
        for frame in range(3):
            rows = ready.tokens.where(frame=frame)
            assert bool(keep[:, rows[at]].all()) and keep[:, rows].sum(1).tolist() == [2, 2]


def test_compact_positions(model: VideoLLM) -> None:
    """Rope ids 0, 1, ... of the rows kept; with everything kept, nothing changes."""
    ready = ready_of(model)
    clean = model(ready)
    assert torch.equal(model(ready, mechanisms=[replace(NEUTRAL, positions="compact")]), clean)
    m = replace(FREE, positions="compact")
    assert not torch.allclose(model(ready, mechanisms=[m]), model(ready, mechanisms=[FREE]), atol=1e-4)
    decoded_like_recomputed(model, ready, m)


def test_compact_positions_need_one_axis(wrapped: Any) -> None:
    model = wrapped("qwen2_5_vl")
    with pytest.raises(RunError, match="1-D positions"):
        model(ready_of(model, "qwen2_5_vl"), mechanisms=[replace(FREE, positions="compact")])


def test_noise_only_while_training(model: VideoLLM) -> None:
    routers = FREE.fresh_routers(model.sizes, start="random")
    m = replace(FREE, routers=routers, train_noise=10.0)
    ready = ready_of(model)
    chosen = [model.run(ready, mechanisms=[m]).heads["mod.keep"] for _ in range(2) if routers.train()]
    assert not torch.equal(*chosen)
    routers.eval()
    chosen = [model.run(ready, mechanisms=[m]).heads["mod.keep"] for _ in range(2)]
    assert torch.equal(*chosen)


def test_ties_are_counted(model: VideoLLM) -> None:
    m = replace(GATED, routers=GATED.fresh_routers(model.sizes, start="zero"))
    heads = model.run(ready_of(model), mechanisms=[m]).heads
    assert int(heads["mod.ties"]) == 2 * 3 and bool((heads["mod.gate"] == 1).all())
    assert int(model.run(ready_of(model), mechanisms=[GATED]).heads["mod.ties"]) == 0


def test_oracle_scores_are_gradients(model: VideoLLM) -> None:
    """Against finite differences, and the oracle keeps the answer better than its own reverse."""
    ready = ready_of(model)
    scores = oracle_scores(model, ready)
    assert set(scores) == set(range(LAYERS)) and scores[2].shape == (ready.n_pos,)
    clean = model(ready)[0, -1].log_softmax(-1)
    token, row, eps = int(clean.argmax()), int(ready.tokens.where(role="video")[5]), 1e-2
    _, cache = model.run_with_cache(ready, names_filter=lambda n: n.startswith("blocks.2.hook_resid"))

    def nudge(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, row] += eps * (cache["resid_post", 2] - cache["resid_pre", 2])[:, row]
        return value

    moved = model.run_with_hooks(ready, fwd_hooks=[("blocks.2.hook_resid_post", nudge)])[0, -1].log_softmax(
        -1
    )
    slope = float(moved[token] - clean[token]) / eps
    assert abs(slope) == pytest.approx(float(scores[2][row]), rel=0.1)
    m = MixtureOfDepths(keep=0.4, selector="oracle", scores=scores, gate="none")
    out = model.run(ready, mechanisms=[m])
    for i, layer in enumerate(ODD):
        rows = ready.tokens.where(frame=0)
        kept = out.heads["mod.keep"][i, 0, rows]
        assert scores[layer][rows][kept].min() >= scores[layer][rows][~kept].max()


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"keep": 1.5}, "0..1"), ({"keep": float("nan")}, "0..1"), ({"keep": (0.5, -1.0)}, "0..1"),
        ({"selector": "best"}, "learned, random"), ({"gate": "sigmoid"}, "tanh1"), ({"layers": "some"}, "interleaved"),
        ({"compat": "released"}, "p_mod"), ({"routed": "prefix"}, "scope='sequence'"), ({"selector": "oracle"}, "oracle_scores"),
        ({"least": -1}, "whole number from 0"), ({"keep": None}, "0..1"), ({"keep": True}, "0..1"), ({"keep": "0.2"}, "0..1"), ({"layers": 5}, "0-based"), ({"layers": ("x",)}, "whole number"), ({"seed": 1.5}, "whole number"), ({"tanh_scale": "x"}, "must be a number"), ({"threshold": float("nan")}, "must be a number"), ({"first": "deep"}, "half"), ({"threshold": 0.5, "selector": "norm"}, "learned scores"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        MixtureOfDepths(**bad)


def test_what_does_not_fit_the_model_is_refused(model: VideoLLM) -> None:
    ready = ready_of(model)
    for m, says in (
        (replace(EXAMPLE, layers=(7,)), r"no layer 8 \(blocks.7\)"),
        (replace(EXAMPLE, keep=(0.5, 0.5)), "2 ratios, the model 5 layers"),
        (replace(EXAMPLE, selector="attention", layers="all"), "use first=1"),
        (replace(EXAMPLE, routers=Routers([1], 64)), r"no router for layer 4 \(blocks.3\)"),
        (replace(EXAMPLE, routers=Routers([1, 3], 32)), "width 32"),
        (replace(EXAMPLE, gate="softmax", routers=Routers([1, 3], 64)), "2 outputs"),
        (replace(EXAMPLE, selector="oracle", scores={1: torch.zeros(3)}), "one number for each"),
    ):
        with pytest.raises(UsageError, match=says):
            model(ready, mechanisms=[m])


def test_a_detour_inside_must_not_shorten(model: VideoLLM) -> None:
    def shorten(layer: int, step: Any, resid: Tensor, side: Any) -> Any:
        return step(resid[:, 1:], side.only(torch.arange(1, resid.shape[1])))

    with pytest.raises(RunError, match="must come before it"):
        model(ready_of(model), mechanisms=[FREE, _Given(Plan(detours=(shorten,)))])


# ---- routers and choosing, by hand -------------------------------------------------------------------------------------------------


def test_routers_are_saved_and_loaded(tmp_path: Any, model: VideoLLM) -> None:
    routers = Routers([1, 3], 64, outputs=1, bias=True, seed=9)
    routers.offset["3"].fill_(0.5)
    path = routers.save(tmp_path / "routers.safetensors")
    again = Routers.load(path)
    assert all(torch.equal(a, b) for a, b in zip(routers.parameters(), again.parameters(), strict=True))
    ready = ready_of(model)
    m = replace(GATED, router_bias=True)
    assert torch.equal(
        model(ready, mechanisms=[replace(m, routers=routers)]),
        model(ready, mechanisms=[replace(m, weights=str(path))]),
    )
    (tmp_path / "wrong.safetensors").write_text("no")
    for wrong in ("wrong.safetensors", "missing.safetensors"):
        with pytest.raises(ConfigError, match=wrong):
            Routers.load(tmp_path / wrong)


def test_top_by_hand() -> None:
    score = torch.tensor([1.0, 5.0, 3.0, 5.0, 9.0, 2.0, 2.0])
    group = torch.tensor([-1, 0, 0, 0, -1, 1, 1])
    keep, ties = top(score, group, lambda n: 1)
    assert keep.tolist() == [True, True, False, False, True, True, False] and ties == 2
    assert top(score, torch.full((7,), -1), lambda n: 0)[0].all()
    assert stride(torch.tensor([0] * 9), lambda n: 3).nonzero().flatten().tolist() == [1, 4, 7]
    ids = torch.tensor([4, 2, 900])
    assert torch.equal(scrambled(ids, 1, 2)[:2], scrambled(ids[:2], 1, 2))


def test_groups_of_a_prompt(model: VideoLLM) -> None:
    tokens: TokenMap = ready_of(model).tokens
    frame, whole, prefix = (
        groups_of(tokens, *a) for a in (("frame", "vision"), ("sequence", "vision"), ("sequence", "prefix"))
    )
    video = ready_of(model).inputs["input_ids"][0] == VIDEO
    assert frame[video].tolist() == [0] * 9 + [1] * 9 + [2] * 9 + [-1]  # the newline token is of no frame
    assert (whole >= 0).sum() == 27 and (prefix >= 0).sum() == 31 and bool((frame[~video] == -1).all())


def test_attention_choices_where_the_last_rows_are_left_out() -> None:
    """In a stream every piece ends with a frame, so the last row may be one that a layer does not run."""
    from lab.mechanisms.streaming import Session, Streaming
    from tests.shelf_models import clip
    from tests.shelf_models import model as small

    m = MixtureOfDepths(selector="attention", layers="all", first=1, keep=0.2)
    session = Session(small(layers=4), Streaming(decide="never"), mechanisms=[m])
    log = session.run(clip(4))
    whole, *routed = log[-1].rows
    assert routed == [whole - 4 * 16 + 4 * 3] * 3


def test_attention_choices_of_worlds_that_leave_out_different_rows(model: VideoLLM) -> None:
    """Keys that only another world's rows left behind are not counted: a batch chooses as its worlds do alone."""
    m = MixtureOfDepths(selector="attention", layers="all", first=1, keep=0.3)
    pair = inputs("llava_onevision", worlds=2)
    together = model.run(model.prepare_inputs(**pair), mechanisms=[m]).heads["mod.keep"]
    assert not torch.equal(together[:, 0], together[:, 1])
    for w in range(2):
        one = model.prepare_inputs(**{name: x[w : w + 1] for name, x in pair.items()})
        assert torch.equal(together[:, w], model.run(one, mechanisms=[m]).heads["mod.keep"][:, 0])
