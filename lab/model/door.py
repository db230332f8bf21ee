"""The front end by capture: run the checkpoint's own forward up to the door of its language model and take what arrives.

The same step for every family: embeddings with the video merged in, rope positions, padding, DeepStack additions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lab.errors import ModelError
from lab.model.run import CURRENT, AtDoor, Front


@dataclass(frozen=True)
class Door:
    """Everything that passes the language model's door.

    rope   rope positions as the checkpoint computed them: [1 | world, pos], or [3 | 4, world, pos] for M-RoPE
           (four rows: the text position first)
    pad    [world, pos] True where a real token stands; None if nothing is padded
    deep   DeepStack additions after layers 0..n-1, dense over positions
    """

    embeds: Float[Tensor, "world pos d_model"]
    rope: Int[Tensor, "..."]
    pad: Bool[Tensor, "world pos"] | None
    deep: tuple[Float[Tensor, "world pos d_model"], ...] = ()

    def rows(self, start: int, stop: int) -> Door:
        """A slice of positions (padding stays whole: it is indexed by source position)."""
        return replace(
            self,
            embeds=self.embeds[:, start:stop],
            rope=self.rope[..., start:stop],
            deep=tuple(d[:, start:stop] for d in self.deep),
        )

    def next_rope(self) -> Int[Tensor, "..."]:
        """Rope position of the next token of every world: one past the largest so far, over all M-RoPE axes.

        (transformers keeps this as module state, `rope_deltas`, which is not safe between runs.)
        """
        if self.rope.ndim == 2:
            real = (
                self.rope if self.pad is None else self.rope.expand(self.pad.shape).masked_fill(~self.pad, 0)
            )
            return real.amax(-1, keepdim=True) + 1
        axes, worlds = self.rope.shape[:2]
        top = self.rope.amax((0, 2)) + 1
        return top[None, :, None].expand(axes, worlds, 1)

    def then(self, embeds: Float[Tensor, "world new d_model"]) -> Door:
        """The door after which `embeds` alone follow: new text tokens, one position each."""
        n = embeds.shape[1]
        rope = self.next_rope() + torch.arange(n, device=self.rope.device)
        pad = self.pad
        if pad is not None:
            pad = torch.cat([pad, pad.new_ones(len(pad), n)], 1)
        return Door(embeds, rope, pad)


def capture(hf: nn.Module, front: Front, inputs: dict[str, Any]) -> Door:
    """Run `hf` to the door. Raises ModelError if its language model was never called."""
    token = CURRENT.set(front)
    try:
        hf(**inputs)
    except AtDoor:
        pass
    finally:
        CURRENT.reset(token)
    if front.arrived is None:
        raise ModelError(
            f"{type(hf).__name__} finished without calling its language model; it cannot be wrapped"
        )
    return _door(front.arrived)


def _door(arrived: dict[str, Any]) -> Door:
    embeds: Tensor = arrived["inputs_embeds"]
    rope = arrived.get("position_ids")
    if rope is None:
        rope = torch.arange(embeds.shape[1], device=embeds.device)[None]
    mask = arrived.get("attention_mask")
    if isinstance(mask, dict):
        raise ModelError(
            "this decoder brings masks of its own (e.g. bidirectional image blocks), which the lab does not know"
        )
    pad = None if mask is None or bool(mask.all()) else mask.bool()
    return Door(embeds, rope, pad, _deep(arrived, embeds))


def _deep(arrived: dict[str, Any], embeds: Tensor) -> tuple[Tensor, ...]:
    """DeepStack features come flat over worlds with a boolean mask; scatter them once to [world, pos, d_model]."""
    dense: list[Tensor] = []
    for flat in arrived.get("deepstack_visual_embeds") or ():
        full = torch.zeros_like(embeds)
        full[arrived["visual_pos_masks"].to(embeds.device)] = flat.to(embeds)
        dense.append(full)
    return tuple(dense)
