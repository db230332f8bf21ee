"""What a sweep is asked: the pathways, windows, heads and frames it cuts, and the metrics it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

from lab.edges.fast import ROWS
from lab.edges.grid import FramePairs, Heads
from lab.edges.metrics import OF_TARGET, Metric, check_metrics
from lab.edges.pathways import name_of
from lab.edges.targets import Targets
from lab.edges.windows import WINDOW, Style, styled
from lab.errors import UsageError

Executor = Literal["fast", "reference"]


@dataclass(frozen=True)
class Sweep:
    """What is cut and measured.

    pathways  "cross-frame", or "keys->queries" for any pair of segments, or one's own (see `lab.edges.pathways`)
    window    number of layers
    style     "center": round the layer, clipped at the ends (the paper's rule: end points cut fewer layers); "shift":
              moved inside instead; "inverse": all layers but the centred window; "top_down": from the layer on;
              "bottom_up": up to the layer; "triangle": from every layer to every later one
    metrics   see `lab.edges.metrics`
    executor  "fast" or "reference": the same numbers up to rounding
    n_rows    about how many rows the fast executor runs together; halved when memory runs out
    heads     "each", or numbers (0-based): heads that are cut one at a time; None: all together
    frame_pairs  "each", or (key frame, query frame): pairs that are cut one at a time; None: all together
    target    the text whose probability is followed, or one for each item; None: the right answer
    per_token a value for every token of the target
    """

    pathways: tuple[str, ...]
    window: int = WINDOW
    style: Style = "center"
    metrics: tuple[Metric, ...] = ("argmax",)
    executor: Executor = "fast"
    n_rows: int = ROWS
    heads: Heads = None
    frame_pairs: FramePairs = None
    target: Targets = None
    per_token: bool = False

    def __post_init__(self) -> None:
        for name, unit in (("window", "layer"), ("n_rows", "row")):
            number = getattr(self, name)
            if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
                raise UsageError(f"{name} must be at least 1 {unit}, a whole number, got {number!r}")
        for name, allowed in (("style", Style), ("executor", Executor)):
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(f"{name}={getattr(self, name)!r}; use one of {', '.join(get_args(allowed))}")
        check_metrics(self.metrics, self.per_token)

    @property
    def names(self) -> list[str]:
        """What the pathways are called."""
        return [name_of(p) for p in self.pathways]

    @property
    def follows_target(self) -> bool:
        """Whether a target's probability is measured."""
        return any(m in OF_TARGET for m in self.metrics)

    def layers(self, centre: int, n_layers: int) -> list[int]:
        """Layers (0-based) cut for the point `centre`; not for a triangle."""
        return styled(self.style, centre, self.window, n_layers)


def chosen_metrics(
    metric: Metric | None, metrics: Sequence[Metric] | None, target: Targets
) -> tuple[Metric, ...]:
    """The metrics asked. Raises UsageError if both arguments are given."""
    if metric is not None and metrics is not None:
        raise UsageError(f"metric={metric!r} and metrics={metrics!r} are given; choose one")
    if metrics is not None:
        return (metrics,) if isinstance(metrics, str) else tuple(metrics)  # type: ignore[return-value]
    return (metric or ("argmax" if target is None else "target"),)
