"""The loop over the checkpoint's own layers. Knows no family and no mechanism: layers are black boxes, detours wrap them."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lab.carriers import TokenMap
from lab.errors import RunError
from lab.model.cache import LayerCache
from lab.model.door import Door
from lab.model.run import CURRENT, Call, LayerParts, Run
from lab.side import Side
from lab.slots import Detour, Step


class Decoder(Protocol):
    """What the loop needs of a wrapped model."""

    blocks: Any
    parts: tuple[LayerParts, ...]

    @property
    def rotary(self) -> nn.Module: ...

    mrope: bool


def decode(
    model: Decoder,
    door: Door,
    run: Run,
    *,
    start: int = 0,
    cache: LayerCache | None = None,
    detours: tuple[Detour, ...] = (),
    tokens: tuple[TokenMap, ...] = (),
) -> tuple[Tensor, Side]:
    """Run all layers over the rows at the door; returns the residual stream after the last layer and its side.

    start  source position of the first row (rows before it are in the cache)
    Raises RunError if a layer ran but its attention never reached the lab's attention function.
    """
    resid = door.embeds
    run.pad = door.pad
    order = torch.arange(start, start + resid.shape[1], device=resid.device)
    side = Side(tokens, order, door.rope, door.pad, door.deep, cache, run)
    for layer in range(len(model.parts)):
        block: Any = model.blocks[layer]
        resid = block.hook_resid_pre(resid)
        resid, side = _wrapped(model, layer, detours)(resid, side)
        resid = block.hook_resid_post(resid)
        if layer < len(side.deep):
            resid = resid + side.deep[layer].to(resid.device)
    all_reached(model, run)
    return resid, side


def _wrapped(model: Decoder, layer: int, detours: tuple[Detour, ...]) -> Step:
    step: Step = partial(one_layer, model, layer)
    for detour in reversed(detours):  # the first detour is the outermost
        step = partial(detour, layer, step)
    return step


def one_layer(model: Decoder, layer: int, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
    """The checkpoint's layer as a black box `step`, without the points round it and without DeepStack."""
    parts: LayerParts = model.parts[layer]
    run: Run = side.run
    run.entered.add(layer)
    if side.absent is not None:
        run.leave_out(layer, side.order, side.absent)
    call = Call(run, parts, model.blocks[layer], side, resid)
    embeddings, text = _rope(model, resid, side)
    token = CURRENT.set(call)
    try:
        out = parts.layer(
            resid,
            attention_mask=_mixer_mask(parts, side),
            position_embeddings=embeddings,
            position_ids=text,
            past_key_values=side.cache,
            use_cache=side.cache is not None,
            lab_call=call,
        )
    finally:
        CURRENT.reset(token)
    return (out[0] if isinstance(out, tuple) else out), side


def _rope(model: Decoder, resid: Tensor, side: Side) -> tuple[Any, Tensor | None]:
    """Position embeddings of these rows (computed once per set of rows) and the text positions layers are told."""
    rope, text = _rope_axes(model, side.rope)
    if not side.run.rope or side.run.rope[0][0] is not side.rope:
        side.run.rope[:] = [(side.rope, model.rotary(resid, rope))]
    return side.run.rope[0][1], text


def _rope_axes(model: Decoder, rope: Tensor) -> tuple[Tensor, Tensor | None]:
    if rope.ndim == 3 and rope.shape[0] == 4:  # text position first, then time, height, width
        return rope[1:], rope[0]
    if rope.ndim == 3:
        return rope, None
    return (rope[None].expand(3, -1, -1) if model.mrope else rope), rope


def _mixer_mask(parts: LayerParts, side: Side) -> Tensor | None:
    """Softmax layers get their mask in the attention function; recurrent mixers take the padding, at prefill only."""
    if parts.attn is not None or side.pad is None or len(side.order) == 1:
        return None
    return side.pad[:, side.order.to(side.pad.device)]


def all_reached(model: Decoder, run: Run) -> None:
    """Raises RunError if a layer ran whose attention never came to the lab's attention function."""
    expected = {i for i in run.entered if model.parts[i].attn is not None}
    missing = sorted(expected - run.reached)
    if missing:
        raise RunError(
            f"attention of layers {[i + 1 for i in missing]} (blocks {missing}) never reached the lab's attention "
            "function: something replaced this model's attention implementation after it was wrapped; wrap it again"
        )
