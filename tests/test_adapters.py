"""TransformerLens's bridge, nnsight and captum see the same tensors as the lab's own hooks, and cut the same edges."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.adapters.captum import Forward, layer_integrated_gradients
from lab.adapters.nnsight import tracing
from lab.adapters.transformer_lens import bridge
from lab.errors import ModelError, UsageError
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap
from tests.families import FAMILIES, LAYERS, UNKNOWN, build, inputs

ALL = (*FAMILIES, *UNKNOWN)
HEADS, LAYER, TOL = 4, 3, 1e-5
SCORES = f"blocks.{LAYER}.attn.hook_attn_scores"
MASKED = -1e30  # TransformerLens writes finfo.min where the lab writes -inf


@functools.cache
def model_of(name: str) -> VideoLLM:
    return wrap(build(name))


def away(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def cut(value: Tensor, hook: Any = None) -> Tensor:
    """The last row of head 1 loses every second key of 6..17."""
    value = value.clone()
    value[:, 1, -1, 6:18:2] = float("-inf")
    return value


def cut_edges(q: Tensor, k: Tensor) -> Tensor:
    keep = torch.ones(HEADS, len(q), len(k), dtype=torch.bool)
    keep[1, -1, 6:18:2] = False
    return keep


# ---- TransformerLens ------------------------------------------------------------------------------------------------

KINDS = (
    *(f"attn.hook_{n}" for n in ("q", "k", "rot_q", "rot_k", "v", "z", "attn_scores", "pattern")),
    *(f"hook_{n}" for n in ("attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post")),
)


@functools.cache
def bridged() -> Any:
    return bridge(model_of("llava_onevision"))


@torch.no_grad()
def through_bridge(x: dict[str, Tensor], **kwargs: Any) -> Any:
    x = dict(x)
    ids = x.pop("input_ids")
    return bridged().run_with_cache(ids, output_attentions=False, **x, **kwargs)


def test_values_equal_the_bridge() -> None:
    model, x = model_of("llava_onevision"), inputs("llava_onevision", worlds=2)
    names = [f"blocks.{layer}.{kind}" for layer in range(LAYERS) for kind in KINDS]
    with torch.no_grad():
        logits, ours = model.run_with_cache(x, names_filter=names, read="all")
        theirs_logits, theirs = through_bridge(x, names_filter=lambda n: n in names)
    assert away(logits, theirs_logits) == 0.0
    for name in names:
        a, b = ours[name], theirs[name]
        if name.endswith("scores"):
            masked = b < MASKED
            assert bool((masked == (a == float("-inf"))).all()) and bool(masked.any())
            a, b = a.masked_fill(masked, 0.0), b.masked_fill(masked, 0.0)
        assert away(a, b) == 0.0, name


def test_cut_equals_the_bridge() -> None:
    model, x = model_of("llava_onevision"), inputs("llava_onevision")
    rest = {k: v for k, v in x.items() if k != "input_ids"}
    with torch.no_grad():
        clean = model(x, read="all")
        ours = model.run_with_hooks(x, fwd_hooks=[(SCORES, cut)], read="all")
        theirs = bridged().run_with_hooks(
            x["input_ids"], fwd_hooks=[(SCORES, cut)], output_attentions=False, **rest
        )
    assert away(ours, theirs) <= TOL < 1e-3 < away(ours, clean)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "llava_onevision"])
def test_bridges_that_cannot_cut_are_refused(name: str) -> None:
    from transformer_lens.factories import architecture_adapter_factory as factory

    needs = {kind: tuple(kind.required_libraries) for kind in factory.SUPPORTED_ARCHITECTURES.values()}
    reason = "keeps transformers' own attention in layers" if name.startswith("qwen") else "cannot bridge"
    with pytest.raises(ModelError, match=f"{reason}.*run_with_hooks"):
        bridge(model_of(name))
    assert {kind: tuple(kind.required_libraries) for kind in needs} == needs
    with torch.no_grad():
        x = inputs(name)
        assert away(model_of(name)(x, read="all"), model_of(name).hf(**x).logits) == 0.0


# ---- nnsight --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_nnsight_reads_and_edits_the_same_tensors(name: str) -> None:
    model = wrap(build(name))
    ready = model.prepare_inputs(**inputs(name))
    names = [
        f"blocks.{LAYER}.{k}"
        for k in ("hook_resid_pre", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z")
    ]
    add = lambda value, hook: value + 0.5  # noqa: E731
    with torch.no_grad():
        clean, cache = model.run_with_cache(ready, names_filter=names, read="all")
        added = model.run_with_hooks(ready, fwd_hooks=[(names[0], add)], read="all")
        hooked = model.run_with_hooks(ready, fwd_hooks=[(SCORES, cut)], read="all")
        cut_clean = model(ready, edges={LAYER: cut_edges}, read="all")
    vision = [("vision.1.hook_resid_post", lambda value, hook: value * 0.0)]
    with torch.no_grad():
        blind = model.run_with_hooks(ready, fwd_hooks=vision, read="all")

    with torch.no_grad(), tracing(model) as n:
        with n.trace(ready, look=[LAYER], read="all"):
            resid = n.blocks[LAYER].hook_resid_pre.output.save()
            scores = n.blocks[LAYER].attn.hook_attn_scores.output.save()
            pattern = n.blocks[LAYER].attn.hook_pattern.output.save()
            z = n.blocks[LAYER].attn.hook_z.output.save()
            logits = n.output.save()
        with n.trace(ready, read="all"):
            n.blocks[LAYER].hook_resid_pre.output = n.blocks[LAYER].hook_resid_pre.output + 0.5
            n_added = n.output.save()
        with n.trace(ready, look=[LAYER], read="all"):
            value = n.blocks[LAYER].attn.hook_attn_scores.output.clone()
            value[:, 1, -1, 6:18:2] = float("-inf")
            n.blocks[LAYER].attn.hook_attn_scores.output = value
            n_hooked = n.output.save()
        with n.trace(ready, edges={LAYER: cut_edges}, read="all"):
            n_cut = n.output.save()
        with n.trace(ready, read="all"):
            n.vision[1].hook_resid_post.output[:] = 0.0
            n_blind = n.output.save()
        with n.trace(ready):
            n.embed.hook_out.output[:] = 0.0
        with n.trace(ready, read="all"):
            n_q = n.blocks[LAYER].attn.hook_q.output.save()
            n_mid = n.blocks[LAYER].hook_resid_mid.output.save()
        with n.trace(ready, read="all"):
            n.blocks[LAYER].hook_resid_mid.output[:] = 0.0
            n_zero = n.output.save()

    more = [f"blocks.{LAYER}.attn.hook_q", f"blocks.{LAYER}.hook_resid_mid"]
    zero = [(more[1], lambda value, hook: value * 0.0)]
    with torch.no_grad():
        _, others = model.run_with_cache(ready, names_filter=more)
        zeroed = model.run_with_hooks(ready, fwd_hooks=zero, read="all")
    assert bool(torch.equal(n_q, others[more[0]])) and bool(torch.equal(n_mid, others[more[1]]))
    assert away(n_zero, zeroed) <= TOL < away(zeroed, clean)

    for read, point in zip((resid, scores, pattern, z), names, strict=True):
        assert bool(torch.equal(read, cache[point])), point
    assert away(logits, clean) <= TOL  # layer LAYER ran through explicit scores here
    assert away(n_added, added) == 0.0 and away(added, clean) > 1e-2
    assert away(n_hooked, hooked) == 0.0 and away(hooked, clean) > 1e-3
    assert away(n_cut, cut_clean) == 0.0 and away(cut_clean, hooked) <= TOL
    assert away(n_blind, blind) == 0.0 and away(blind, clean) > 1e-3
    with torch.no_grad():  # nothing of the traces is left
        assert away(model(ready, read="all"), clean) <= TOL
        assert away(model.run_with_hooks(ready, fwd_hooks=[(names[0], add)], read="all"), added) == 0.0


# ---- captum ---------------------------------------------------------------------------------------------------------

POINTS = ("embed.hook_out", "blocks.0.hook_resid_pre", f"blocks.{LAYER}.hook_resid_pre")


def answers(model: VideoLLM, x: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(x)[:, -1].argmax(-1)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("baseline", ["twin", "mean"])
@pytest.mark.parametrize("point", POINTS)
def test_integrated_gradients_are_complete(name: str, baseline: str, point: str) -> None:
    model, x = model_of(name), inputs(name, worlds=2, pad=3)
    pixels = "pixel_values" if "pixel_values" in x else "pixel_values_videos"
    twin = {**x, pixels: x[pixels].flip(0)}
    base: Any = twin if baseline == "twin" else "mean"
    got = layer_integrated_gradients(
        model, x, point, baseline=base, target=answers(model, x), n_steps=24, internal_batch_size=32
    )
    assert got.values.shape == (*x["input_ids"].shape, 64)
    assert float(got.total.abs().min()) > 0.05
    assert float(got.error.max()) <= 0.01, got


def test_forward_is_the_model_in_any_order_and_number_of_rows() -> None:
    for name in FAMILIES:
        model, x = model_of(name), inputs(name, worlds=2, pad=3)
        with torch.no_grad():
            want = model(x)[:, -1]
            forward = Forward(model, x)
            for rows in ([0, 1], [1, 0], [0, 0, 1], [1], [1, 1, 0, 1, 0]):
                assert away(forward(forward.embeds[rows], torch.tensor(rows)), want[rows]) <= TOL
            cut_ = model(x, edges={LAYER: cut_edges})[:, -1]
            assert away(Forward(model, x, {LAYER: cut_edges})(forward.embeds), cut_) == 0.0
        with pytest.raises(UsageError, match=r"3 rows for 2 worlds.*forward\.world"):
            forward(forward.embeds[[0, 0, 1]])


def test_zero_and_ill_fitting_baselines_are_refused() -> None:
    model, x = model_of("qwen2_5_vl"), inputs("qwen2_5_vl")
    ask = functools.partial(layer_integrated_gradients, model, x, "embed.hook_out", target=30)
    with pytest.raises(UsageError, match="zero baseline breaks integrated gradients under RMSNorm.*twin"):
        ask(baseline=torch.zeros(1))
    with pytest.raises(UsageError, match="use a twin question, 'mean', or a tensor"):
        ask(baseline="zero")
    with pytest.raises(
        UsageError, match=r"baseline is \(1, 30, 64\) at the door, the question \(1, 24, 64\)"
    ):
        ask(baseline=inputs("qwen2_5_vl", frames=5))
    with pytest.raises(UsageError, match=r"closest: .*embed\.hook_out"):
        layer_integrated_gradients(model, x, "embed.hookout", baseline="mean", target=30)


def test_captum_works_on_hook_points_directly() -> None:
    from captum.attr import LayerGradientXActivation, LayerIntegratedGradients

    model, x = model_of("llava_onevision"), inputs("llava_onevision")
    rest = {k: v for k, v in x.items() if k != "pixel_values_videos"}
    pixels, other = x["pixel_values_videos"], x["pixel_values_videos"].flip(1)
    layer, target = model.blocks[LAYER].hook_resid_pre, int(answers(model, x))

    def forward(value: Tensor) -> Tensor:
        return model({**rest, "pixel_values_videos": value})[:, -1]

    with model.alone():
        got = LayerGradientXActivation(forward, layer).attribute(pixels, target=target)
        ig = LayerIntegratedGradients(forward, layer).attribute(
            pixels, other, target=target, n_steps=24, internal_batch_size=1
        )
    kept: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        value.retain_grad()
        kept.append(value)

    with model.hooks(fwd_hooks=[(f"blocks.{LAYER}.hook_resid_pre", keep)]):
        forward(pixels)[0, target].backward()
    model.hf.zero_grad()
    got = got.detach()
    assert away(got, kept[0] * kept[0].grad) <= TOL and float(got.abs().max()) > 1e-3
    with torch.no_grad():
        total = float(forward(pixels)[0, target] - forward(other)[0, target])
    assert abs(float(ig.sum()) - total) <= 0.01 * abs(total)
    assert not any(p._forward_hooks or p._forward_pre_hooks for p in model.hook_dict.values())


def test_captum_reaches_lazy_points() -> None:
    from captum.attr import LayerActivation

    model, x = model_of("internvl"), inputs("internvl")
    forward = Forward(model, x)
    with torch.no_grad():
        got = LayerActivation(forward, model.blocks[LAYER].attn.hook_pattern).attribute(
            forward.embeds, additional_forward_args=(forward.world,)
        )
        _, cache = model.run_with_cache(x, names_filter=f"blocks.{LAYER}.attn.hook_pattern")
    assert away(got, cache["pattern", LAYER]) == 0.0


@pytest.mark.parametrize("name", ["nnsight", "captum", "transformer_lens"])
def test_adapters_import_their_library_inside_functions(name: str) -> None:
    path = Path(__file__).parents[1] / "lab" / "adapters" / f"{name}.py"
    tree = ast.parse(path.read_text())
    inside = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    found = [
        n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and str(n.module).split(".")[0] == name
    ]
    assert found and all(n in inside for n in found)


def test_attribution_needs_no_trainable_weights() -> None:
    model, x = wrap(build("qwen3_vl")), inputs("qwen3_vl")
    ask = functools.partial(layer_integrated_gradients, model, x, baseline="mean", target=30, n_steps=8)
    points = ("embed.hook_out", f"blocks.{LAYER}.hook_resid_post")
    want = [ask(point).values for point in points]
    model.hf.requires_grad_(False)  # as lab.load leaves them
    for point, values in zip(points, want, strict=True):
        assert away(ask(point).values, values) <= TOL and float(values.abs().max()) > 1e-4
    assert all(p.grad is None for p in model.hf.parameters())
