"""Random models for the benches: LLaVA-OneVisions of any width, with the tensors a processor would make for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

IMAGE, VIDEO, FIRST_WORD = 3, 4, 20


@dataclass(frozen=True)
class Shape:
    """Sizes of a random LLaVA-OneVision. Its tower cuts `side` x `side` pixels into patches of `patch`, pooled 2 x 2."""

    d: int = 256
    mlp: int = 704
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    vocab: int = 1024
    tower_d: int = 64
    tower_mlp: int = 256
    tower_layers: int = 2
    tower_heads: int = 4
    side: int = 112
    patch: int = 8

    @property
    def tokens_per_frame(self) -> int:
        return math.ceil(self.side // self.patch / 2) ** 2

    def frames_for(self, positions: int) -> int:
        """Frames whose tokens make about so many positions."""
        return max(1, round(positions / self.tokens_per_frame))


# LLaVA-OneVision 7B: Qwen2-7B and SigLIP so400m, 384 x 384 pixels, 196 tokens a frame
SEVEN_B = Shape(
    d=3584, mlp=18944, layers=28, heads=28, kv_heads=4, vocab=152064, tower_d=1152, tower_mlp=4304, tower_layers=26,
    tower_heads=16, side=384, patch=14,
)  # fmt: skip


def config(shape: Shape) -> Any:
    """transformers' config of the shape."""
    text = {
        "model_type": "qwen2", "hidden_size": shape.d, "intermediate_size": shape.mlp, "vocab_size": shape.vocab,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 131072, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    tower = {
        "model_type": "siglip_vision_model", "hidden_size": shape.tower_d, "intermediate_size": shape.tower_mlp,
        "num_hidden_layers": shape.tower_layers, "num_attention_heads": shape.tower_heads, "image_size": shape.side,
        "patch_size": shape.patch, "vision_use_head": False,
    }  # fmt: skip
    kind: Any = transformers.LlavaOnevisionConfig
    return kind(
        text_config=text, vision_config=tower, image_token_id=IMAGE, video_token_id=VIDEO, tie_word_embeddings=False,
        image_grid_pinpoints=[[shape.side, shape.side]], vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip


def build(
    shape: Shape,
    *,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    attn: str = "sdpa",
    seed: int = 0,
) -> Any:
    """A random model, frozen, in eval mode: made on the meta device and filled where it will run."""
    made = config(shape)
    made._attn_implementation = attn
    with torch.device("meta"):
        hf: Any = transformers.LlavaOnevisionForConditionalGeneration(made)
    hf = hf.to(dtype).to_empty(device=device).eval().requires_grad_(False)  # in its dtype from the start
    fill(hf, seed)
    return hf


def fill(hf: Any, seed: int = 0) -> None:
    """Random weights at the scale of a trained model's, gains about one; buffers as transformers computes them."""
    generator = torch.Generator(next(hf.parameters()).device).manual_seed(seed)
    for p in hf.parameters():
        p.normal_(0.0, p.shape[-1] ** -0.5 if p.ndim > 1 else 0.02, generator=generator)
        if p.ndim == 1:
            p.add_(1.0)
    for module in hf.modules():
        _refill(module)


def _refill(module: Any) -> None:
    """What `to_empty` left undefined: rope frequencies and position ids."""
    if hasattr(module, "inv_freq") and hasattr(module, "config"):
        fresh = type(module)(module.config)
        for name, value in fresh.named_buffers():
            # rope frequencies stay float32 whatever the weights are, as in a loaded checkpoint
            module.register_buffer(name, value.to(getattr(module, name).device), persistent=False)
    if "position_ids" in dict(module.named_buffers(recurse=False)):
        module.position_ids.copy_(torch.arange(module.position_ids.shape[-1])[None])


def inputs(
    shape: Shape,
    frames: int,
    *,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    text: int = 20,
    seed: int = 0,
) -> dict[str, Tensor]:
    """One video of random pixels and `text` random words round it, as a processor hands them over."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(FIRST_WORD, shape.vocab, (text,), generator=generator)
    video = torch.full((shape.tokens_per_frame * frames + 1,), VIDEO)
    ids = torch.cat([words[:3], video, words[3:]])[None].to(device)
    pixels = torch.randn(1, frames, 3, shape.side, shape.side, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": pixels.to(device, dtype),
    }
