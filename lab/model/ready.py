"""Ready: a question laid out for one model, before any weight is touched. The state at the decoder's door is kept here."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from lab.carriers import Frames, TokenMap, VideoGrid, VideoQA
from lab.errors import UsageError
from lab.result import Result
from lab.slots import Plan

PLACE = ("frame", "row", "col")


@dataclass
class Ready:
    """Inputs of one run.

    inputs   the model's own keyword arguments (input_ids [world, pos], pixel_values_videos, ...)
    maps     one TokenMap per world
    grids    one VideoGrid per world
    item, frames, prompt   what was prepared; None and "" for inputs that came from a processor
    plan     what the mechanisms given to `prepare` asked for
    sampling how the frames were chosen: {n_frames | fps | index: ...}
    system   the system prompt asked for; None: the family's own
    """

    inputs: dict[str, Any]
    maps: tuple[TokenMap, ...]
    grids: tuple[VideoGrid, ...] = ()
    item: VideoQA | None = None
    frames: Frames | None = None
    prompt: str = ""
    plan: Plan = field(default_factory=Plan)
    sampling: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # state at the door

    @property
    def n_worlds(self) -> int:
        return len(self.maps)

    @property
    def n_pos(self) -> int:
        ids: Tensor = self.inputs["input_ids"]
        return int(ids.shape[1])

    @property
    def tokens(self) -> TokenMap:
        """The token map. Worlds of different layout have one each: raises UsageError and names `maps`."""
        first = self.maps[0]
        if any(not _same(first, m) for m in self.maps[1:]):
            raise UsageError(
                f"{len(self.maps)} worlds of different layout; use ready.maps[w] for the map of world w"
            )
        return first

    def painted(
        self,
        values: Any,
        *,
        name: str,
        unit: str,
        tokens: TokenMap | None = None,
        baseline: float | None = None,
    ) -> Result:
        """One number for every position, laid on the frames: a Result (frame, row, col) that `show` draws over them.

        tokens  the map the values belong to, where a mechanism has dropped or merged tokens (`model.maps(ready)`); None:
                the prompt's own. Places of which nothing is left are nan
        Raises UsageError for several worlds, and for values that do not fit the map.
        """
        if self.n_worlds != 1:
            raise UsageError(f"{self.n_worlds} worlds have a grid each; paint one prompt at a time")
        grid = self.grids[0]
        painted = (self.tokens if tokens is None else tokens).painted(torch.as_tensor(values), grid).numpy()
        coords: dict[str, list[Any]] = {a: list(range(n)) for a, n in zip(PLACE, painted.shape, strict=True)}
        times = [float(grid.seconds[grid.frame == f].mean()) for f in coords["frame"]]
        notes = {"seconds": [t if isfinite(t) else None for t in times]}
        return Result(painted, PLACE, coords, unit, {}, name, notes=notes, baseline=baseline)


def _same(a: TokenMap, b: TokenMap) -> bool:
    """Same roles in the same places (ids and times may differ)."""
    return len(a) == len(b) and bool((a.role == b.role).all()) and bool((a.frame == b.frame).all())
