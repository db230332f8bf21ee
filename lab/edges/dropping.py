"""Drop one layer's gradient, as GradDrop does (AtP*, arXiv 2403.00745): undoes the cancellation of direct and indirect paths.

The stream's own gradient passes a dropped layer by; what would come through its attention and MLP is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Dropped:
    """Which layer (0-based) is dropped in the backward pass being run; None: none is."""

    layer: int | None = None


@contextmanager
def droppable(model: Any, wanted: bool) -> Iterator[Dropped]:
    """A forward made inside can be run backward with one layer dropped after another. Holds the model alone."""
    state = Dropped()
    if not wanted:
        yield state
        return
    with model.hooks(fwd_hooks=[hook for part in model.parts for hook in _hooks(part, state)]):
        yield state


def _hooks(part: Any, state: Dropped) -> list[Any]:
    def listen(value: Tensor, hook: Any) -> None:
        if value.requires_grad:
            value.register_hook(lambda g: g * 0 if state.layer == part.index else None)

    block = f"blocks.{part.index}"
    out = f"{block}.hook_attn_out" if part.attn is not None else f"{block}.mixer.hook_out"
    return [(out, listen), *([(f"{block}.hook_mlp_out", listen)] if part.mlp is not None else [])]
