"""Our loop is transformers' own forward: logits equal, every family, from disk, fp32 and bf16, padded or not."""

import pytest
import torch

from lab.model.zoo import load
from tests.families import FAMILIES, UNKNOWN, inputs

BATCHES = {"one": {}, "two": {"worlds": 2}, "left-padded": {"worlds": 2, "pad": 3}}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", FAMILIES + UNKNOWN)
def test_logits_equal_transformers(name, batch, plain, wrapped):
    x = inputs(name, **BATCHES[batch])
    with torch.no_grad():
        theirs = plain(name)(**x).logits
        ours = wrapped(name)(wrapped(name).prepare_inputs(**x), read="all")
    assert theirs.abs().max() > 0.1, "random weights must give logits that can differ"
    assert torch.equal(ours, theirs), f"largest difference {(ours - theirs).abs().max():.3e}"


@pytest.mark.parametrize("batch", ["one", "left-padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_logits_equal_transformers(name, batch, plain, saved):
    x = inputs(name, **BATCHES[batch])
    x = {k: v.bfloat16() if v.is_floating_point() else v for k, v in x.items()}
    model = load(saved(name), device="cpu", dtype="bfloat16")
    with torch.no_grad():
        theirs = plain(name, dtype=torch.bfloat16)(**x).logits
        ours = model(model.prepare_inputs(**x), read="all")
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_eager_checkpoint_stays_eager(name, plain, saved):
    model = load(saved(name), device="cpu", attn_implementation="eager")
    x = inputs(name, worlds=2, pad=2)
    with torch.no_grad():
        theirs = plain(name, attn_implementation="eager")(**x).logits
        ours = model(model.prepare_inputs(**x), read="all")
    # padded query rows differ by design (ours are zero, theirs uniform); everything a real token sees is equal
    real = x["attention_mask"].bool()
    assert (ours - theirs)[real].abs().max() <= 1e-5


@pytest.mark.parametrize("name", FAMILIES + UNKNOWN)
def test_the_wrapped_model_stays_usable(name, plain, wrapped):
    x = inputs(name, worlds=2, pad=3)
    with torch.no_grad():
        assert torch.equal(wrapped(name).hf(**x).logits, plain(name)(**x).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_read_last_and_positions(name, wrapped):
    model, x = wrapped(name), inputs(name)
    with torch.no_grad():
        ready = model.prepare_inputs(**x)
        everything = model(ready, read="all")
        assert model(ready).shape == (1, 1, everything.shape[-1])
        assert torch.allclose(model(ready)[:, 0], everything[:, -1], atol=1e-6)
        assert torch.allclose(model(ready, read=[2, -1]), everything[:, [2, -1]], atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_right_padding_reads_the_last_real_token(name, wrapped):
    model, x = wrapped(name), inputs(name)
    n = x["input_ids"].shape[1]
    with torch.no_grad():
        clean = model(model.prepare_inputs(**x))
        padded = dict(x)
        for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if key in x:
                padded[key] = torch.cat([x[key], torch.zeros_like(x[key][:, :3])], 1)
        ready = model.prepare_inputs(**padded)
        assert ready.tokens.where(role="pad").tolist() == [n, n + 1, n + 2]
        assert torch.allclose(model(ready), clean, atol=1e-5)


def test_the_tower_runs_once_per_ready(wrapped):
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**inputs("llava_onevision"))
    before = model.tower_calls
    with torch.no_grad():
        first = model(ready)
        assert torch.equal(model(ready), first)
        assert model.tower_calls == before + 1
        weight = model.hf.model.multi_modal_projector.linear_1.weight
        kept = weight.detach().clone()
        weight.mul_(1.5)
        assert not torch.equal(model(ready), first), "changed weights must not be answered from memory"
        weight.copy_(kept)
        assert torch.equal(model(ready), first)


def test_gradients_reach_the_pixels(wrapped):
    model, x = wrapped("qwen2_5_vl"), inputs("qwen2_5_vl")
    model(model.prepare_inputs(**x))
    pixels = x["pixel_values_videos"].clone().requires_grad_()
    logits = model(model.prepare_inputs(**{**x, "pixel_values_videos": pixels}))
    logits.max().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0


def test_frozen_weights_need_no_second_look(wrapped):
    """In a notebook nobody writes no_grad: weights that are frozen give no graph, so the tower need not run again."""
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**inputs("llava_onevision"))
    first, calls = model(ready), model.tower_calls
    assert torch.equal(model(ready), first) and model.tower_calls == calls
    model.hf.model.multi_modal_projector.requires_grad_(True)
    try:
        model(ready).sum().backward()
        assert model.hf.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    finally:
        model.hf.requires_grad_(False)
        model.hf.zero_grad(set_to_none=True)
