"""The architecture of `tiny`, its first weights, and the folder it is saved to."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from lab.learn import vocabulary
from lab.learn.tiny_data import PIXELS


def config() -> Any:
    """LLaVA-OneVision: SigLIP-style tower (2 layers), Qwen2 decoder (8 layers, 4 heads on 2 key/value heads)."""
    from transformers import LlavaOnevisionConfig

    ids = vocabulary.token_ids()
    tower = {
        "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": PIXELS, "patch_size": 4, "vision_use_head": False,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": len(ids), "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "rope_theta": 10000.0, "initializer_range": 0.05, "tie_word_embeddings": False, "use_sliding_window": False,
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<pad>"],
    }  # fmt: skip
    return LlavaOnevisionConfig(
        vision_config=tower, text_config=text, image_token_index=ids["<image>"], video_token_index=ids["<video>"],
        vision_feature_layer=-1, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[PIXELS, PIXELS]], tie_word_embeddings=False,
    )  # fmt: skip


def start(hf: Any) -> None:
    """Initial weights that let small differences between patches through.

    With the default ones the background's brightness, the same in every patch, is ten times larger than what tells
    patches apart, and the direction stays at chance for hundreds of steps.
    """
    tower, projector = hf.model.vision_tower, hf.model.multi_modal_projector
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.normal_(0, 0.5)
        for linear in (projector.linear_1, projector.linear_2):
            linear.weight.normal_(0, 1.4 * linear.weight.shape[1] ** -0.5)
        for layer in tower.encoder.layers:
            layer.self_attn.out_proj.weight.mul_(0.3)
            layer.mlp.fc2.weight.mul_(0.5)


def write(hf: Any, folder: str | Path) -> Path:
    """Save everything a transformers checkpoint has: weights, configs, tokenizer, preprocessor files.

    Weights are stored in half precision, to half the package's size; the config still says float32, so whoever loads
    it gets float32 numbers that half precision can hold.
    """
    out = vocabulary.save(folder)
    deepcopy(hf).half().save_pretrained(out)
    written = json.loads((out / "config.json").read_text())
    _json(out / "config.json", _in_float32(written))
    shared = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "rescale_factor": 1 / 255,
        "size": {"height": PIXELS, "width": PIXELS},
    }  # fmt: skip
    image = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": [[PIXELS, PIXELS]],
    }
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor", "do_sample_frames": False}
    both = {
        "processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "video_token": "<video>",
        "num_image_tokens": 64, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
    }  # fmt: skip
    _json(out / "preprocessor_config.json", {**shared, **image})
    _json(out / "video_preprocessor_config.json", {**shared, **video})
    _json(out / "processor_config.json", both)
    return out


def _in_float32(config: Any) -> Any:
    """The parsed config with every `dtype` in it set to float32."""
    if not isinstance(config, dict):
        return config
    return {k: "float32" if k == "dtype" else _in_float32(v) for k, v in config.items()}


def _json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
