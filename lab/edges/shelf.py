"""Shelves: where the tensors of a stored run lie. What the device has no room for is put aside and fetched when asked.

Aside is the host's memory for a run on a GPU, and a file that is mapped into memory for a run on the host itself.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from lab.errors import TooBig, UsageError
from lab.model.activations import free_bytes


class Shelf(Sequence[Tensor]):
    """One tensor per layer, in order. The first ones stay where they are made, as far as `room` bytes go.

    Asked for one, it gives it on the device where it was made. `aside` says how many bytes lie elsewhere.
    """

    def __init__(self, room: float) -> None:
        self.room = room
        self.aside = 0
        self._held: list[Tensor] = []
        self._device: list[torch.device] = []
        self._is_aside: list[bool] = []
        self._folder: Path | None = None

    @classmethod
    def holding(cls, tensors: Iterable[Tensor]) -> Shelf:
        """A shelf of tensors that all stay where they are."""
        shelf = cls(math.inf)
        for tensor in tensors:
            shelf.put(tensor)
        return shelf

    def put(self, tensor: Tensor) -> None:
        """Add the next layer's."""
        self._device.append(tensor.device)
        self._held.append(tensor)
        self._is_aside.append(False)
        if tensor.nbytes <= self.room:
            self.room -= tensor.nbytes
            return
        self.room = 0  # what follows goes aside too: the first layers stay
        self._move(len(self) - 1)

    def put_aside(self) -> None:
        """Put all that is still on the device aside."""
        self.room = 0
        for i in range(len(self)):
            if not self._is_aside[i]:
                self._move(i)

    def _move(self, i: int) -> None:
        tensor = self._held[i]
        self._held[i] = tensor.to("cpu") if tensor.device.type != "cpu" else self._mapped(tensor, i)
        self._is_aside[i] = True
        self.aside += tensor.nbytes

    def _mapped(self, tensor: Tensor, i: int) -> Tensor:
        """A copy in a file of this shelf's own folder, which goes when the shelf goes."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="lab-store-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        free = shutil.disk_usage(self._folder).free
        if tensor.nbytes > free:  # writing on into a full disk would kill the process
            raise TooBig(
                f"a stored layer of {tensor.nbytes:,} bytes does not fit on the disk of {self._folder}, which has "
                f"{free:,} free; use fewer frames, or set TMPDIR to a larger disk"
            )
        mapped = torch.from_file(
            str(self._folder / str(i)), shared=True, size=tensor.numel(), dtype=tensor.dtype
        )
        return mapped.view(tensor.shape).copy_(tensor)

    @overload
    def __getitem__(self, at: int) -> Tensor: ...
    @overload
    def __getitem__(self, at: slice) -> list[Tensor]: ...
    def __getitem__(self, at: int | slice) -> Tensor | list[Tensor]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return self._held[at].to(self._device[at])

    def rows(self, layer: int, at: Tensor) -> Tensor:
        """Rows [rows, ...] of a layer's tensor, on the layer's device; only they are moved."""
        held = self._held[layer]
        return held[at.to(held.device)].to(self._device[layer])

    def device(self, layer: int) -> torch.device:
        """Where a layer's tensor was made."""
        return self._device[layer]

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


def out_of_memory(e: BaseException) -> bool:
    """Whether it says that memory ran out, on a GPU or on the host."""
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(e)


def budget_of(budget: int | None, device: torch.device) -> int:
    """Bytes of the device that a stored run may take: as asked, or half of what is free (the rest is for the work).

    Raises UsageError for what is no number of bytes.
    """
    if budget is None:
        return free_bytes(device) // 2
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
        raise UsageError(f"a budget is a number of bytes, at least 0, or None; got {budget!r}")
    return budget
