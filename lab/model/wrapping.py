"""Wrapping: the torch hooks and the attention function that stand round a checkpoint, placed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from lab.model.anatomy import text_config
from lab.model.attention import register
from lab.model.families.base import Family
from lab.model.run import LayerParts, at_door, attn_out, enter_attention, into, leave_layer, pre_rope, through
from lab.model.tower import place_tower_hooks


def place_hooks(hf: nn.Module, lm: nn.Module, family: Family, parts: Sequence[LayerParts]) -> None:
    """Module-level hooks, placed once; they do nothing without a current run, and serve any further wrapper too.

    prepend=True: transformers installs its own output-capturing hooks lazily; ours must come before them, or
    edits of tower layers that are read from captured states (LLaVA's vision_feature_layer) change nothing.
    """
    if getattr(hf, "_lab_hooked", False):
        return
    lm.register_forward_pre_hook(at_door, with_kwargs=True, prepend=True)
    for layer in family.tower_layers(hf):
        layer.register_forward_pre_hook(into, with_kwargs=True, prepend=True)
        layer.register_forward_hook(through, prepend=True)
        place_tower_hooks(layer)
    connector = family.connector(hf)
    if connector is not None:
        connector.register_forward_hook(through, prepend=True)
    for part in parts:
        _place_on_layer(part)
    cast(Any, hf)._lab_hooked = True


def _place_on_layer(part: LayerParts) -> None:
    mixing = part.attn or part.mixer
    if mixing is not None:
        mixing.register_forward_pre_hook(enter_attention, with_kwargs=True, prepend=True)
    if part.mixed is not None:
        part.mixed.register_forward_hook(attn_out, prepend=True)
    for projection in (m for m in (part.q, part.k) if m is not None):
        projection.register_forward_hook(pre_rope, prepend=True)
    if part.mlp is not None:
        part.mlp.register_forward_hook(through, prepend=True)
        part.mlp.register_forward_hook(leave_layer, always_call=True)


def use_our_attention(hf: nn.Module, lm: nn.Module) -> str:
    """Put the lab's attention function round the kernels of decoder and tower; returns the name of the decoder's."""
    kernel = str(text_config(lm)._attn_implementation).removeprefix("lab_")
    whole: Any = hf.config
    parts = [s for s in whole.sub_configs if getattr(whole, s, None) is not None]
    theirs = {s: getattr(whole, s)._attn_implementation for s in parts}
    ours = {s: None if k is None else register(k) for s, k in theirs.items()}
    cast(Any, hf).set_attn_implementation({**ours, "text_config": register(kernel)})
    return kernel


def make_known(hf: nn.Module) -> None:
    """Register the functions that a model from another process names."""
    whole: Any = hf.config
    for config in (whole, *(getattr(whole, s, None) for s in whole.sub_configs)):
        register(str(getattr(config, "_attn_implementation", None) or "sdpa"))
