"""Finds the parts of a transformers VideoLLM: its language model, decoder layers, attention, projections, head.

Only names that all supported versions share are touched; everything else is left to transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lab.errors import ModelError
from lab.model.run import LayerParts


@dataclass
class ModelConfig:
    """Sizes under TransformerLens's names, as its ActivationCache and our mechanisms expect them."""

    model_name: str
    model_type: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    dtype: torch.dtype
    device: torch.device
    attn_only: bool = False
    normalization_type: str = "RMS"
    final_rms: bool = True
    positional_embedding_type: str = "rotary"
    n_deepstack: int = 0


def language_model(hf: nn.Module) -> nn.Module:
    """The decoder stack: the module with `layers`, `norm` and an embedding. Raises ModelError if there is none."""
    inner: Any = getattr(hf, "model", hf)
    for name in ("language_model", "text_model"):
        found = getattr(inner, name, None)
        found = getattr(found, "model", found) if not hasattr(found, "layers") else found
        if found is not None and hasattr(found, "layers"):
            return found
    raise ModelError(
        f"{type(hf).__name__} has no language model we can find (looked for model.language_model and "
        "model.text_model with a list of layers); the lab wraps VideoLLMs of transformers"
    )


def text_config(lm: nn.Module) -> Any:
    """Config of the decoder."""
    config: Any = lm.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def layer_parts(lm: nn.Module) -> tuple[LayerParts, ...]:
    """The modules of every decoder layer. Raises ModelError for layer kinds whose masks we do not know."""
    config = text_config(lm)
    layers = cast(nn.ModuleList, lm.layers)
    # without layer_types (Mistral) a window, where there is one, holds for all layers
    usual = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    kinds = list(getattr(config, "layer_types", None) or [usual] * len(layers))
    return tuple(_parts(layer, i, kinds[i], config) for i, layer in enumerate(layers))


def _parts(layer: nn.Module, index: int, kind: str, config: Any) -> LayerParts:
    attn: Any = getattr(layer, "self_attn", None)
    if attn is not None and kind not in ("full_attention", "sliding_attention"):
        raise ModelError(f"layer {index + 1} (blocks.{index}) uses {kind}, whose mask the lab does not know")
    mixer = None if attn is not None else _mixer(layer)
    window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
    q, k = (_first(attn, f"{x}_norm", f"{x}_proj") for x in "qk")
    n_heads, d_head = config.num_attention_heads, head_size(config)
    if q is not None and not _shaped(attn, n_heads, d_head):
        q = k = None
    after_attn, after_mlp = _sandwich(layer)
    return LayerParts(
        layer=layer, index=index, attn=attn, mixer=mixer, mixed=after_attn or attn or mixer,
        mlp=after_mlp or _first(layer, "mlp", "feed_forward", "block_sparse_moe"),
        q=q, k=k, o=_first(attn, "o_proj", "out_proj"), n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads, d_head=d_head,
        window=window, causal=bool(getattr(attn, "is_causal", True)),
    )  # fmt: skip


def _sandwich(layer: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Norms that follow attention and MLP inside the residual branch (GLM-4, Gemma), or (None, None)."""
    mlp = _first(layer, "post_mlp_layernorm", "post_feedforward_layernorm")
    attn = _first(layer, "post_self_attn_layernorm", "post_attention_layernorm") if mlp is not None else None
    return attn, mlp


def _first(module: nn.Module | None, *names: str) -> nn.Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((m for m in found if isinstance(m, nn.Module)), None)


def _shaped(attn: Any, n_heads: int, d_head: int) -> bool:
    """Whether pre-RoPE queries can be read as heads: a per-head norm, or a projection of just n_heads * d_head."""
    norm = getattr(attn, "q_norm", None)
    if norm is not None:
        return getattr(norm, "weight", torch.empty(0)).shape[-1:] == (d_head,)
    return attn.q_proj.weight.shape[0] == n_heads * d_head


def _mixer(layer: nn.Module) -> nn.Module | None:
    """The sequence mixer of a layer without softmax attention (linear attention, state-space model)."""
    return _first(layer, "linear_attn", "mamba", "mixer", "conv", "temporal_block")


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def device_of(hf: nn.Module) -> torch.device:
    """Where inputs belong: the embedding's device, or where accelerate runs it if its weights are offloaded."""
    embedding = cast(Any, hf).get_input_embeddings()
    at: torch.device = embedding.weight.device
    place = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return at if at.type != "meta" or place is None else torch.device(place)


def head(hf: nn.Module) -> nn.Module:
    """The unembedding. Raises ModelError if the model has none."""
    found = cast(Any, hf).get_output_embeddings()
    if found is None:
        raise ModelError(
            f"{type(hf).__name__} has no output embeddings; wrap the ...ForConditionalGeneration class"
        )
    return found


def model_config(hf: nn.Module, lm: nn.Module) -> ModelConfig:
    """Sizes of a wrapped model."""
    c = text_config(lm)
    weight: Any = cast(Any, hf).get_input_embeddings().weight
    norm_is_rms = not isinstance(cast(Any, lm).norm, nn.LayerNorm)
    whole: Any = hf.config
    deep = getattr(getattr(whole, "vision_config", None), "deepstack_visual_indexes", None) or ()
    return ModelConfig(
        model_name=str(getattr(whole, "_name_or_path", "") or whole.model_type), model_type=whole.model_type,
        n_layers=len(cast(Any, lm).layers), n_heads=c.num_attention_heads,
        n_key_value_heads=getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        d_model=c.hidden_size, d_head=head_size(c), d_mlp=getattr(c, "intermediate_size", 0) or 0,
        d_vocab=cast(Any, head(hf)).weight.shape[0], n_ctx=getattr(c, "max_position_embeddings", 0) or 0,
        dtype=weight.dtype, device=device_of(hf), normalization_type="RMS" if norm_is_rms else "LN",
        final_rms=norm_is_rms, n_deepstack=len(deep),
    )  # fmt: skip
