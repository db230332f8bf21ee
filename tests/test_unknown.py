"""Families nobody wrote a file for: any decoder of residual layers wraps and equals transformers; others are refused."""

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lab.errors import ModelError
from lab.model.zoo import wrap
from probes.knockout import knockout

TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            vocab_size=256, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
TOWER = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=24,
    patch_size=4,
)
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
MODELS = {
    "qwen2_vl": dict(
        text_config={**TEXT, **MROPE}, image_token_id=3, video_token_id=4,
        vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=4, patch_size=4),
    ),
    # norms after attention and MLP, inside the residual branch
    "glm4v": dict(
        text_config={**TEXT, "rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
        image_token_id=3, video_token_id=4,
        vision_config=dict(depth=2, hidden_size=32, num_heads=4, patch_size=4, out_hidden_size=64, intermediate_size=48, image_size=24),
    ),
    # one sliding window in every layer, no layer_types
    "llava": dict(
        text_config={**TEXT, "model_type": "mistral", "sliding_window": 6}, image_token_index=3,
        vision_config={**TOWER, "model_type": "clip_vision_model"},
    ),
    # attention and MLP side by side, sliding and full layers mixed
    "aya_vision": dict(
        text_config={**TEXT, "model_type": "cohere2", "sliding_window": 8}, image_token_index=3,
        vision_config={**TOWER, "model_type": "siglip_vision_model"},
    ),
}  # fmt: skip


def made(name, config):
    torch.manual_seed(0)
    hf = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name](**config)).eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.1)
    return hf


def prompt(n=40):
    ids = torch.arange(20, 20 + n)[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", MODELS)
def test_other_decoders_equal_transformers(name):
    hf, x = made(name, MODELS[name]), prompt()
    model = wrap(hf)
    ready = model.prepare_inputs(**x)
    with torch.no_grad():
        assert torch.equal(model(ready, read="all"), hf(**x).logits)
        theirs = hf.generate(**x, max_new_tokens=12, do_sample=False)[:, 40:]
        _, cache = model.run_with_cache(ready)
    assert torch.equal(model.generate(ready, max_new_tokens=12).ids, theirs)
    for i in range(4):
        pre, post = cache["resid_pre", i], cache["resid_post", i]
        assert torch.allclose(pre + cache["attn_out", i] + cache["mlp_out", i], post, atol=1e-5)
    assert (knockout(model, ready, ["text->last"], window=2, show_progress=False).values != 0).any()


def test_a_window_holds_under_cuts():
    """An all-true cut takes the masked path; it must keep the sliding window of the model."""
    model = wrap(made("llava", MODELS["llava"]))
    ready = model.prepare_inputs(**prompt())
    with torch.no_grad():
        asked = []

        def everything(q, k):
            asked.append(len(k))
            return torch.ones(len(q), len(k), dtype=torch.bool)

        assert torch.allclose(
            model(ready, edges=dict.fromkeys(range(4), everything)), model(ready), atol=1e-6
        )
        assert asked == [ready.n_pos] * 4, "the cut must have been asked, or this test shows nothing"


def test_decoders_with_masks_of_their_own_are_refused():
    config = dict(text_config={**TEXT, "sliding_window": 16}, mm_tokens_per_image=4, image_token_index=3,
                  vision_config={**TOWER, "model_type": "siglip_vision_model"})  # fmt: skip
    with pytest.raises(ModelError, match="masks of its own"):
        wrap(made("gemma3", config))
