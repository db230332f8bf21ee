"""What a search for a policy is asked: how much answers may change, what the search may cost, and how it goes about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from lab.edges.bounds import CONFIDENCE
from lab.edges.units import GRAINS, Grain, Roles
from lab.errors import UsageError

Method = Literal["acdc", "greedy", "knapsack"]
Layers = Literal["free", "contiguous"]
Scope = Literal["global", "task", "sample"]
FINER: tuple[Grain, ...] = ("option", "head")


@dataclass(frozen=True)
class Budget:
    """How much answers may change, and how much the search may cost.

    kl        mean KL divergence of the answer (options and everything else), nats, one-sided bound
    flips     share of changed choices, one-sided bound. With too few items to show so small a share (99 for 3 %), no
              flip at all is allowed, and the trail says what bound that is
    confidence  of both bounds
    forwards  forward-equivalents per calibration sample, clean runs included; the search stops with the best policy then
    """

    kl: float = 0.02
    flips: float = 0.03
    confidence: float = CONFIDENCE
    forwards: float = 80.0

    def __post_init__(self) -> None:
        for name, most in (("kl", np.inf), ("forwards", np.inf), ("flips", 1.0), ("confidence", 0.9999)):
            value: Any = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
                raise UsageError(
                    f"budget {name} must be above 0 and at most {most:g}, got {getattr(self, name)!r}"
                )

    @classmethod
    def of(cls, given: Budget | Mapping[str, float] | None) -> Budget:
        """A budget from one, from its fields, or the default. Raises UsageError for unknown fields."""
        if given is None or isinstance(given, Budget):
            return given or cls()
        if not isinstance(given, Mapping):
            raise UsageError(f"a budget is a Budget or a mapping of its fields, got {type(given).__name__}")
        unknown = set(given) - set(cls.__dataclass_fields__)
        if unknown:
            raise UsageError(
                f"no budget field {sorted(unknown)[0]!r}; there are: {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**given)


@dataclass(frozen=True)
class Asked:
    """How to search; see `search`."""

    budget: Budget
    method: Method = "acdc"
    roles: Roles = "all"
    finer: tuple[Grain, ...] = FINER
    layers: Layers = "free"
    worth: float = 0.0
    relinearise: int = 0

    def __post_init__(self) -> None:
        if type(self.relinearise) is not int or self.relinearise < 0:
            raise UsageError(f"relinearise counts layers, 0 for never, got {self.relinearise!r}")
        if not 0 <= self.worth <= 1:
            raise UsageError(f"worth is a share of all edges, 0 to 1, got {self.worth!r}")
        for name, allowed in (("method", Method), ("roles", Roles), ("layers", Layers)):
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(f"{name}={getattr(self, name)!r}; use one of {', '.join(get_args(allowed))}")
        if self.method == "knapsack" and self.layers == "contiguous":
            raise UsageError(
                "method='knapsack' cuts single units of any layer; use method='acdc' for layers='contiguous'"
            )
        for grain in self.finer:
            if grain not in GRAINS:
                raise UsageError(f"finer={grain!r}; use some of {', '.join(GRAINS[1:])}")
