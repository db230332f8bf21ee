"""Several prompts of one model as worlds of one batch: padded on the left at the decoder's door."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lab.model.door import Door


def joined(doors: Sequence[Door]) -> Door:
    """One door with all worlds, in order. Doors that hold several worlds already may be padded among themselves."""
    if len(doors) == 1:
        return doors[0]
    n = max(d.embeds.shape[1] for d in doors)
    embeds = torch.cat([_left(d.embeds, n, 1) for d in doors])
    ropes = [_left(_of_worlds(d.rope, d.embeds.shape[0]), n, -1) for d in doors]
    real = torch.cat([_left(_real(d), n, 1) for d in doors])
    deep = [
        torch.cat([_left(x, n, 1) for x in layer]) for layer in zip(*(d.deep for d in doors), strict=True)
    ]
    return Door(embeds, torch.cat(ropes, -2), None if bool(real.all()) else real, tuple(deep))


def offsets(door: Door) -> list[int]:
    """Where each world's first real position stands."""
    worlds = door.embeds.shape[0]
    return [0] * worlds if door.pad is None else door.pad.long().argmax(1).tolist()


def _left(x: Tensor, n: int, axis: int) -> Tensor:
    """Padded at the beginning of an axis to length n."""
    missing = n - x.shape[axis]
    after = 2 * (x.ndim - 1 - axis % x.ndim)
    return pad(x, (*(0,) * after, missing, 0)) if missing else x


def _of_worlds(rope: Tensor, worlds: int) -> Tensor:
    """[world, pos] or [axis, world, pos]: positions that all worlds shared are written out."""
    shape = list(rope.shape)
    shape[-2] = worlds
    return rope.expand(shape)


def _real(door: Door) -> Tensor:
    if door.pad is not None:
        return door.pad
    return torch.ones(door.embeds.shape[:2], dtype=torch.bool, device=door.embeds.device)
