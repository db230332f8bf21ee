"""Who a journal belongs to, by content: the weights that a model has now, and all that a prompt's mechanisms are set to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SAMPLE = 256  # numbers of every weight that are looked at
PLAIN = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)


def weights_id(model: Any) -> str:
    """16 digits for the weights as they are now: names, shapes and evenly spaced numbers of each.

    Training, merging, scaling or replacing a weight changes it; an edit of single numbers may not: it is no checksum.
    """
    seen = hashlib.sha256()
    for name, weight in model.hf.named_parameters():
        flat = weight.detach().reshape(-1)
        at = torch.linspace(0, max(0, len(flat) - 1), min(SAMPLE, len(flat)), device=flat.device).long()
        seen.update(f"{name}{tuple(weight.shape)}".encode())
        _tensor(seen, flat[at])
    return seen.hexdigest()[:16]


def content_id(value: Any) -> str:
    """16 digits for an object and all it holds: the same in every process, another one where any setting differs."""
    seen = hashlib.sha256()
    _told(seen, value, {})
    return seen.hexdigest()[:16]


def _told(seen: Any, value: Any, known: dict[int, tuple[int, Any]]) -> None:
    if isinstance(value, PLAIN):
        seen.update(f"{value!r};".encode())
        return
    if id(value) in known:  # the object is kept there: its id stays its own
        seen.update(f"again {known[id(value)][0]};".encode())
        return
    known[id(value)] = (len(known), value)
    seen.update(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
    if isinstance(value, Tensor):
        _tensor(seen, value)
    for part in _parts(value):
        _told(seen, part, known)
    seen.update(b")")


def _parts(value: Any) -> Iterable[Any]:
    """What an object is made of."""
    match value:
        case Tensor():
            return ()
        case nn.Module():
            return (value.training, *chain(*value.state_dict().items()))
        case Mapping():
            return chain(*value.items())
        case list() | tuple():
            return value
        case set() | frozenset():
            return sorted(map(repr, value))
        case FunctionType():
            cells = [c.cell_contents for c in value.__closure__ or ()]
            return (value.__module__, value.__qualname__, value.__defaults__, value.__kwdefaults__, *cells)
        case MethodType():
            return (value.__func__, value.__self__)
        case partial():
            return (value.func, value.args, value.keywords)
        case np.ndarray():
            return (str(value.dtype), value.shape, value.tobytes())
        case _:
            slots = [getattr(value, n, None) for n in getattr(type(value), "__slots__", ())]
            return (*slots, *chain(*getattr(value, "__dict__", {}).items()))


def _tensor(seen: Any, value: Tensor) -> None:
    seen.update(str((value.dtype, tuple(value.shape))).encode())
    seen.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
