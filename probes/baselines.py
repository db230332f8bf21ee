"""Baselines of an attribution: what a question's video is compared with, prepared and at the decoder's door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab.adapters.captum import Forward, arrived, refuse_zero
from lab.errors import UsageError
from lab.model.ready import Ready
from lab.patch.alike import same_tokens
from lab.patch.doors import unlike
from lab.slots import plan_of
from probes import against as corrupting


def made_ready(model: Any, item: Any, n_frames: int, mechanisms: Sequence[Any]) -> Ready:
    if isinstance(item, Ready | dict):
        ready = item if isinstance(item, Ready) else model.prepare_inputs(**item)
        ready = replace(ready, plan=ready.plan + plan_of(mechanisms, model.sizes))
    else:
        ready = model.prepare(item, n_frames, mechanisms=mechanisms)
    if ready.n_worlds != 1:
        raise UsageError(
            f"attribution takes one world at a time, got {ready.n_worlds}; prepare them one by one"
        )
    return ready


def baselines_of(
    model: Any,
    ready: Sequence[Ready],
    against: Any,
    items: Sequence[Any],
    n_frames: int,
    mechanisms: Sequence[Any],
) -> list[Any]:
    """The other world of every item, prepared; for "mean" the mean video embedding, [d_model]."""
    if isinstance(against, list | tuple) and len(against) != len(ready):
        raise UsageError(f"{len(against)} baselines for {len(ready)} items; give one each")
    if against == "noise":
        raise UsageError("noise is no baseline; use 'twin', 'reversed', 'blank' or 'mean'")
    if against == "zero":
        refuse_zero(model, torch.zeros(1))
        return [torch.zeros(model.cfg.d_model, device=model.device, dtype=model.dtype)] * len(ready)
    if against == "mean":
        return [_mean_embedding(model, ready)] * len(ready)
    each = against if isinstance(against, list | tuple) else [against] * len(ready)
    found = [
        corrupting.corrupted(model, r, a, n_frames, mechanisms) for r, a in zip(ready, each, strict=True)
    ]
    made = [f if isinstance(f, Ready | Tensor) else made_ready(model, f, n_frames, mechanisms) for f in found]
    return [
        m if isinstance(m, Tensor) else same_tokens(model, {"question": r, "baseline": m})["baseline"]
        for r, m in zip(ready, made, strict=True)
    ]


@torch.no_grad()
def _mean_embedding(model: Any, ready: Sequence[Ready]) -> Tensor:
    rows = []
    for r in ready:
        door, maps = arrived(model, r)
        rows.append(door.embeds[0, maps[0].where(role="video").to(door.embeds.device)])
    return torch.cat(rows).mean(0)


def base_door(model: Any, ready: Ready, other: Any, forward: Forward) -> Any:
    """The baseline at the door: the other world's, or the question's with its video tokens all one vector."""
    if isinstance(other, Tensor):
        rows = forward.maps[0].where(role="video").to(forward.embeds.device)
        embeds = forward.embeds.clone()
        embeds[:, rows] = other.to(embeds)
        refuse_zero(model, other)
        return replace(forward.door, embeds=embeds)
    door, maps = arrived(model, other)
    if door.embeds.shape == forward.embeds.shape:
        why = unlike({"the question": forward.maps[0], "the baseline": maps[0]})
        if why:
            raise UsageError(why)
    else:
        raise UsageError(
            f"the baseline has {len(maps[0])} positions and the question {len(forward.maps[0])}; attributions need one for "
            "one: the same number of frames and equally long texts"
        )
    return replace(forward.door, embeds=door.embeds, deep=door.deep)
