"""ActivationCache on wrapped models: what it keeps, that its sums are right, and what it refuses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache

import lab.model.activations
from lab.errors import RunError, TooBig, UsageError
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap
from tests.families import FAMILIES, LAYERS, UNKNOWN, build, inputs

ALL = (*FAMILIES, *UNKNOWN)
SOFTMAX = tuple(n for n in ALL if n != "qwen3_5")  # every decoder layer has softmax attention
HEADS, WIDTH, TOL = 4, 64, 1e-4


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def model_of(name: str) -> VideoLLM:
    return wrap(build(name))


@functools.cache
def cached(name: str) -> tuple[Tensor, Any]:
    """Logits of all positions and the default cache of two worlds, the second left-padded."""
    with torch.no_grad():
        return model_of(name).run_with_cache(inputs(name, worlds=2, pad=3), read="all")


def away(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# ---- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_default_cache_holds_everything_but_scores_and_pattern(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(name)
    logits, cache = model.run_with_cache(inputs(name), read="all")
    assert isinstance(cache, ActivationCache)
    lazy = {n for n in model.hook_dict if n.endswith(("hook_attn_scores", "hook_pattern"))}
    assert set(cache) == set(model.hook_dict) - lazy and lazy
    assert capsys.readouterr().err == ""
    assert away(model.unembed(cache["ln_final.hook_normalized"]), logits) == 0.0
    assert away(model(inputs(name), read="all"), logits) == 0.0
    for layer in range(LAYERS - 1 - model.cfg.n_deepstack):
        at = model.cfg.n_deepstack + layer
        assert away(cache["resid_post", at], cache["resid_pre", at + 1]) == 0.0


def test_asking_for_maps_prints_their_bytes_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ready = model_of("internvl"), model_of("internvl").prepare_inputs(**inputs("internvl"))
    printed: list[str] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **kw: (printed.append(capsys.readouterr().err), forward(*a, **kw))[1]
    )
    _, cache = model.run_with_cache(ready, names_filter=lambda n: n.endswith("hook_pattern"))
    n = ready.n_pos
    assert printed == [
        f"{LAYERS} attention maps of {n} x {n}: {LAYERS * HEADS * n * n * 4 / 2**20:,.1f} MiB\n"
    ]
    assert len([name for name in cache if name.startswith("blocks.")]) == LAYERS
    assert away(cache["pattern", 2].sum(-1), torch.ones(1, HEADS, n)) <= 1e-6
    assert float(cache["pattern", 2].triu(1).abs().max()) == 0.0


def test_too_big_names_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ready = model_of("internvl"), model_of("internvl").prepare_inputs(**inputs("internvl"))
    one = HEADS * ready.n_pos**2 * 4
    every = [n for n in model.hook_dict if n.endswith("hook_attn_scores")]
    monkeypatch.setattr(lab.model.activations, "free_bytes", lambda device: 4 * LAYERS * one - 1)
    with pytest.raises(TooBig, match=f"{LAYERS * one:,} bytes.*{4 * LAYERS * one - 1:,} bytes free"):
        model.run_with_cache(ready, names_filter=every)
    assert len(model.run_with_cache(ready, names_filter=every[:4])[1]) == 4
    # hooks hold one layer's scores and pattern at a time
    monkeypatch.setattr(lab.model.activations, "free_bytes", lambda device: 4 * 2 * one - 1)
    with pytest.raises(TooBig, match=f"{2 * one:,} bytes"):
        model.run_with_hooks(ready, fwd_hooks=[(every[0], lambda value, hook: None)])
    assert len(model.run_with_cache(ready)[1]) > 0  # the default asks for no map


def test_names_filter_kinds() -> None:
    model, ready = model_of("internvl"), model_of("internvl").prepare_inputs(**inputs("internvl"))
    names = ["blocks.1.hook_resid_post", "blocks.3.attn.hook_z"]
    for names_filter, want in ((names[0], names[:1]), (names, names), (lambda n: n in names, names)):
        assert list(model.run_with_cache(ready, names_filter=names_filter)[1]) == want
    with pytest.raises(UsageError, match=r"blocks\.9\.hook_resid_post.*closest.*blocks\.\d\.hook_resid_post"):
        model.run_with_cache(ready, names_filter=["blocks.1.hook_resid_post", "blocks.9.hook_resid_post"])


def test_device_and_batch_dimension() -> None:
    model, name = model_of("internvl"), "blocks.1.hook_resid_post"
    one, two = inputs("internvl"), inputs("internvl", worlds=2)
    _, cache = model.run_with_cache(one, names_filter=name)
    _, moved = model.run_with_cache(one, names_filter=name, device="meta")
    assert moved[name].device.type == "meta" and cache[name].device.type == "cpu"
    _, flat = model.run_with_cache(one, remove_batch_dim=True)
    assert away(flat[name], cache[name][0]) == 0.0 and not flat.has_batch_dim
    assert away(flat.accumulated_resid()[2], cache[name][0]) == 0.0
    assert away(cache.remove_batch_dim()[name], flat[name]) == 0.0
    with pytest.raises(UsageError, match="one world, this input has 2"):
        model.run_with_cache(two, remove_batch_dim=True)


def test_edits_made_in_the_same_run_are_in_the_cache() -> None:
    model, x, name = model_of("internvl"), inputs("internvl"), "blocks.2.hook_resid_post"
    _, clean = model.run_with_cache(x)
    for edit in (lambda value, hook: value + 1.0, lambda value, hook: value.add_(1.0)):
        _, cache = model.run_with_cache(x, fwd_hooks=[(name, edit)])
        assert away(cache[name], clean[name] + 1.0) == 0.0
        assert away(cache["resid_pre", 3], clean[name] + 1.0) == 0.0
    later = ("blocks.3.hook_resid_pre", lambda value, hook: value.zero_())
    _, cache = model.run_with_cache(x, fwd_hooks=[later])
    assert away(cache[name], clean[name]) == 0.0  # resid_post 2 and resid_pre 3 are one tensor in the run


# ---- the sums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_accumulated_resid_ends_in_the_logits(name: str) -> None:
    model = model_of(name)
    logits, cache = cached(name)
    stack, labels = cache.accumulated_resid(return_labels=True)
    assert labels == [*(f"{i}_pre" for i in range(LAYERS)), "final_post"]
    assert away(stack[2], cache["resid_pre", 2]) == 0.0
    assert away(model.unembed(model.ln_final(stack[-1])), logits) == 0.0
    mids, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels[1] == "0_mid" and away(mids[1], cache["resid_mid", 0]) == 0.0
    scaled = cache.accumulated_resid(apply_ln=True)
    assert away(model.unembed(scaled[-1]), logits) <= TOL


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("layer", [None, -1, LAYERS, 3, 2, 1])
def test_decompose_resid_sums_to_the_stream(name: str, layer: int | None) -> None:
    _, cache = cached(name)
    parts, labels = cache.decompose_resid(layer, return_labels=True)
    n = LAYERS if layer in (None, -1) else layer
    want = cache["resid_post", LAYERS - 1] if n == LAYERS else cache["resid_pre", n]
    assert away(parts.sum(0), want) <= TOL
    assert len(labels) == len(parts) == 1 + 2 * n + min(model_of(name).cfg.n_deepstack, n)
    mid = cache.decompose_resid(2, mlp_input=True)
    assert away(mid.sum(0), cache["resid_mid", 2]) <= TOL
    row = cache.decompose_resid(layer, pos_slice=-1)
    assert away(row.sum(0), want[:, -1]) <= TOL


def test_deepstack_components_are_named() -> None:
    _, cache = cached("qwen3_vl")
    parts, labels = cache.decompose_resid(return_labels=True)
    assert labels[-3:] == ["0_deepstack", "1_deepstack", "2_deepstack"]
    assert all(float(p.abs().max()) > 1e-2 for p in parts[-3:])
    assert cache.decompose_resid(mode="mlp", incl_embeds=False).shape[0] == LAYERS


@pytest.mark.parametrize("name", SOFTMAX)
def test_logit_attrs_sum_to_the_logit(name: str) -> None:
    model = model_of(name)
    logits, cache = cached(name)
    parts = cache.decompose_resid()
    assert away(cache.logit_attrs(parts, 30).sum(0), logits[..., 30]) <= TOL
    pair = cache.logit_attrs(parts, torch.tensor([30, 31]), torch.tensor([40, 41]))
    want = torch.stack([logits[0, :, 30] - logits[0, :, 40], logits[1, :, 31] - logits[1, :, 41]])
    assert away(pair.sum(0), want) <= TOL
    last = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), 30, pos_slice=-1)
    assert away(last.sum(0), logits[:, -1, 30]) <= TOL
    heads = cache.stack_head_results(incl_remainder=True)
    assert len(heads) == LAYERS * model.cfg.n_heads + 1
    assert away(cache.logit_attrs(heads, 30).sum(0), logits[..., 30]) <= TOL


@pytest.mark.parametrize("name", SOFTMAX)
def test_apply_ln_to_stack_divides_by_the_final_scale(name: str) -> None:
    model = model_of(name)
    _, cache = cached(name)
    parts = cache.decompose_resid()
    scaled = cache.apply_ln_to_stack(parts, layer=-1)
    gained = scaled.sum(0) * model.ln_final.weight
    assert away(gained, cache["ln_final.hook_normalized"]) <= TOL
    assert away(cache.decompose_resid(apply_ln=True), scaled) == 0.0


@pytest.mark.parametrize("name", SOFTMAX)
def test_heads_sum_to_attn_out(name: str) -> None:
    model = model_of(name)
    _, cache = cached(name)
    heads, labels = cache.stack_head_results(return_labels=True)
    assert heads.shape[0] == LAYERS * HEADS == len(labels) and labels[5] == "L1H1"
    for layer, parts in enumerate(model.parts):
        bias = getattr(parts.o, "bias", None)
        total = heads[layer * HEADS : (layer + 1) * HEADS].sum(0) + (0.0 if bias is None else bias)
        assert away(total, cache["attn_out", layer]) <= TOL


# ---- what is refused, and what to use -------------------------------------------------------------------------------


def test_refusals_name_what_to_use() -> None:
    _, cache = cached("internvl")
    for method in (cache.get_neuron_results, cache.stack_neuron_results, cache.get_full_resid_decomposition):
        with pytest.raises(RunError, match=r"use decompose_resid\(mode='mlp'\)"):
            method()
    with pytest.raises(RunError, match=r"final norm only \(layer=-1\), not at layer 2"):
        cache.apply_ln_to_stack(cache.decompose_resid(2), layer=2)
    with pytest.raises(RunError, match=r"final norm only \(layer=-1\), not at layer 2"):
        cache.decompose_resid(2, apply_ln=True)
    with pytest.raises(RunError, match="final norm only"):
        cache.accumulated_resid(2, apply_ln=True)
    small = model_of("internvl").run_with_cache(
        inputs("internvl"), names_filter=lambda n: n.endswith("_out")
    )[1]
    with pytest.raises(RunError, match=r"ln_final\.hook_scale.*names_filter"):
        small.apply_ln_to_stack(small.decompose_resid(), layer=-1)
    none = model_of("internvl").run_with_cache(
        inputs("internvl"), names_filter=lambda n: n.endswith("resid_pre")
    )[1]
    with pytest.raises(RunError, match=r"no 'embed\.hook_out'.*incl_embeds=False"):
        none.decompose_resid()


def test_layers_without_softmax_attention_are_refused() -> None:
    _, cache = cached("qwen3_5")
    for method in (cache.decompose_resid, cache.stack_head_results):
        with pytest.raises(
            RunError, match=r"layers \[1, 3\] have no softmax attention: use accumulated_resid"
        ):
            method()
    mixed = cache["blocks.0.mixer.hook_out"] + cache["resid_pre", 0]
    assert away(mixed, cache["resid_mid", 0]) == 0.0
