"""Which rows of the final stream are read: the last real one, all, or positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lab.errors import ModelError, UsageError
from lab.side import Side

Read = str | int | Sequence[int] | Tensor


def rows(x: Tensor, side: Side, read: Read) -> Tensor:
    """Rows of [world, pos, d_model] named by `read`."""
    n = x.shape[1]
    if isinstance(read, str):
        if read == "all":
            return x
        if read != "last":
            raise UsageError(f"read={read!r}; use 'last', 'all', or positions")
        return x[:, -1:] if side.pad is None else _last_real(x, side)
    index = _index(read, n).to(x.device)
    if len(index) and not (-n <= int(index.min()) and int(index.max()) < n):
        raise UsageError(f"read positions {index.tolist()} but the sequence has {n}; use 0..{n - 1}")
    return x[:, index]


def _index(read: Any, n: int) -> Tensor:
    """Positions as a tensor. Raises UsageError for what is none: a mask would be read as positions 0 and 1."""
    if isinstance(read, slice):
        return torch.arange(n)[read]
    try:
        index = torch.as_tensor(read).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        index = torch.zeros(1)
    if index.numel() and (index.dtype == torch.bool or index.is_floating_point()):
        raise UsageError(f"read={read!r} names no positions; use 'last', 'all', or whole numbers")
    return index.long()


def _last_real(x: Tensor, side: Side) -> Tensor:
    """The last unpadded row of every world (padding may be on either side)."""
    assert side.pad is not None
    here = side.pad.to(x.device)[:, side.order.to(x.device)]
    at = torch.arange(here.shape[1], device=x.device).masked_fill(~here, -1).amax(1)
    if bool((at < 0).any()):
        raise ModelError("a world has no unpadded position among the rows read")
    return x.gather(1, at[:, None, None].expand(-1, 1, x.shape[2]))
