"""The same checkpoint as a TransformerLens TransformerBridge, where the bridge can do what its hook names promise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from lab.errors import ModelError
from lab.model.videollm import VideoLLM


def bridge(model: VideoLLM) -> Any:
    """A TransformerBridge on a deep copy of the checkpoint (a bridge replaces modules in place), its decoder under eager
    attention; the vision tower keeps its kernel.

    Raises ModelError for families TransformerLens has no adapter for, and for those whose bridge keeps transformers'
    own attention: there `hook_attn_scores` fires after the softmax and edits of it change nothing.
    """
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    hf: Any = copy.deepcopy(model.hf)
    hf.set_attn_implementation({"text_config": "eager"})
    kind = type(hf).__name__
    with _no_processor_needed():
        try:
            made = build_bridge_from_module(hf, kind, hf_config=hf.config)
        except ValueError as e:
            raise ModelError(f"TransformerLens cannot bridge {kind} ({e}); {_INSTEAD}") from None
    _check_can_cut(made, kind)
    return made


_INSTEAD = "use the wrapped model itself: run_with_cache and run_with_hooks take the same hook names"


def _check_can_cut(made: Any, kind: str) -> None:
    from transformer_lens.model_bridge.generalized_components import PositionEmbeddingsAttentionBridge

    attention = [getattr(block, "attn", None) for block in made.blocks]
    native = [i for i, a in enumerate(attention) if not isinstance(a, PositionEmbeddingsAttentionBridge)]
    if native:
        raise ModelError(
            f"the bridge of {kind} keeps transformers' own attention in layers {[i + 1 for i in native]}: its "
            f"hook_attn_scores fires after the softmax and editing it changes nothing; {_INSTEAD}"
        )


@contextmanager
def _no_processor_needed() -> Iterator[None]:
    """Some adapters insist on torchvision for an image processor; no processor is made here."""
    from transformer_lens.factories import architecture_adapter_factory as factory

    kinds = cast("set[Any]", set(factory.SUPPORTED_ARCHITECTURES.values()))
    asked = {
        kind: kind.__dict__["required_libraries"] for kind in kinds if "required_libraries" in kind.__dict__
    }
    try:
        for kind in asked:
            kind.required_libraries = []
        yield
    finally:
        for kind, libraries in asked.items():
            kind.required_libraries = libraries
