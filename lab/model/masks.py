"""Which keys a query may read, from source positions: causality, padding, sliding windows, cuts.

Built per layer from the positions of the rows that are really there, never from `arange`: cached layers may be ragged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lab.model.run import Call


def needs_mask(call: Call, n_q: int, k_order: Tensor) -> bool:
    """False where the kernel's own causal mode says the same as the mask would."""
    if call.run.pad is not None or call.parts.index in call.run.absent or not call.parts.causal:
        return True
    if call.parts.window is not None and int(k_order[-1] - k_order[0]) >= call.parts.window:
        return True
    return n_q > 1 and k_order is not call.side.order


def base_keep(call: Call, k_order: Tensor, device: torch.device) -> Tensor:
    """Bool [world | 1, 1, q, k]: what the model itself lets each query read. Shared by layers of the same kind."""
    held = call.run.masks.get(call.parts.window)
    if held is not None and held[0] is call.side.order and held[1] is k_order:
        keep = held[2].to(device)
    else:
        keep = _lawful(call, call.side.order.to(device), k_order.to(device))
        call.run.masks[call.parts.window] = (call.side.order, k_order, keep)
    return _without_absent(call, keep, call.side.order.to(device), k_order.to(device))


def keep_rows(call: Call, q: Tensor, k: Tensor) -> Tensor:
    """The same for any rows, from their source positions: for whoever makes a mask a few rows at a time."""
    return _without_absent(call, _lawful(call, q, k), q, k)


def _without_absent(call: Call, keep: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Keys of rows that took no part in this layer are read by nobody, in the worlds where that is so.

    An absent row may read itself, so that no row is empty: its result is dropped.
    """
    absent = call.run.absent.get(call.parts.index)
    if absent is None:
        return keep
    here = absent.to(k.device)[:, k.clamp(max=absent.shape[1] - 1)] & (k < absent.shape[1])
    itself = q.to(k.device)[:, None] == k[None, :]
    return keep & (~here[:, None, None, :] | itself)


def _lawful(call: Call, q: Tensor, k: Tensor) -> Tensor:
    """Causality, window and padding."""
    distance = q[:, None] - k[None, :]
    keep = distance >= 0 if call.parts.causal else torch.ones_like(distance, dtype=torch.bool)
    if call.parts.window is not None:
        keep = keep & (distance < call.parts.window)
    keep = keep[None, None]
    if call.run.pad is not None:
        keep = keep & call.run.pad.to(q.device)[:, k][:, None, None, :]
    return keep
