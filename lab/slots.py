"""The six slots a mechanism may fill, the Plan that sums what one run asks for, and Mechanism itself.

Slots: Stage, Layout, Detour, Cache, Head, and hooks. The core only ever sees these; it knows no mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from lab.carriers import Frames, VideoQA, VisionTokens
from lab.errors import UsageError
from lab.side import Side
from lab.spans import Span

Step = Callable[[Tensor, Side], tuple[Tensor, Side]]
Hook = tuple[
    str, Callable[..., Any]
]  # a TransformerLens (name, fn) pair; fn(value, hook=...) looks or returns a replacement


@runtime_checkable
class Sampler(Protocol):
    """Chooses which frames of the video the model gets."""

    def __call__(self, frames: Frames, query: str) -> Frames: ...


@runtime_checkable
class Stage(Protocol):
    """Frames, and vision so far -> vision tokens. An encoder is the Stage that is given None.

    A Stage that can work on a stream has `streamed()`, which gives a Stage that is called frame after frame and may
    remember (`reset`, `state`, `restore`); others need the whole video (see `lab.model.context`).
    """

    def __call__(self, frames: Frames, vision: VisionTokens | None, query: str) -> VisionTokens: ...


@runtime_checkable
class Layout(Protocol):
    """What the decoder will read, in order, each piece with its role."""

    def __call__(self, item: VideoQA, frames: Frames, vision: VisionTokens) -> list[Span]: ...


@runtime_checkable
class Detour(Protocol):
    """Wraps one layer: skips it, routes part of the stream through it, shortens the stream, adds an adapter's delta.

    `step` is the layer as a black box. A shortening Detour must wrap a routing one, not sit inside it: in a Plan the
    first detour is the outermost.
    """

    def __call__(self, layer: int, step: Step, resid: Tensor, side: Side) -> tuple[Tensor, Side]: ...


@runtime_checkable
class Cache(Protocol):
    """Stores keys and values as it likes; gives back what attention should see.

    k, v   new rows [world, kv_head, pos, d_head], k after RoPE; order: their source positions [pos]
    Returns all rows attention should read, and the source position of each. Layers may hold different rows (ragged).
    """

    def update(self, layer: int, k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


@runtime_checkable
class Head(Protocol):
    """Reads the final, normed stream [world, pos, d_model] (speak score, timestamps, event type ...)."""

    def __call__(self, resid: Tensor, side: Side) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class ModelSizes:
    """What a mechanism is told about the model. It is never handed the model."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_vocab: int


@dataclass(frozen=True)
class Plan:
    """All that one run asks for. Plans add; two encoders, layouts or caches are an error that names both."""

    sampler: Sampler | None = None
    encoder: Stage | None = None
    stages: tuple[Stage, ...] = ()
    layout: Layout | None = None
    hooks: tuple[Hook, ...] = ()
    detours: tuple[Detour, ...] = ()
    cache: Callable[[], Cache] | None = None
    heads: tuple[Head, ...] = ()

    def __add__(self, other: Plan) -> Plan:
        merged: dict[str, Any] = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, tuple):
                merged[f.name] = mine + theirs
                continue
            if mine is not None and theirs is not None:
                raise UsageError(
                    f"two mechanisms fill the {f.name} slot: {called(mine)} and {called(theirs)}; choose one"
                )
            merged[f.name] = mine if mine is not None else theirs
        return Plan(**merged)


@runtime_checkable
class Mechanism(Protocol):
    """One published mechanism: a frozen dataclass whose fields are its exported config.

    NEUTRAL  an instance under which the model is unchanged; EXAMPLE: one that does something.
    """

    NEUTRAL: ClassVar[Any]
    EXAMPLE: ClassVar[Any]

    def plan(self, cfg: ModelSizes) -> Plan: ...


def plan_of(mechanisms: Sequence[Mechanism], cfg: ModelSizes) -> Plan:
    """The sum of the mechanisms' plans, in the order given. Raises UsageError for what is no list of mechanisms."""
    if isinstance(mechanisms, str) or not isinstance(mechanisms, Iterable):
        raise UsageError(f"mechanisms takes a list, e.g. mechanisms=[...]; got {mechanisms!r:.80}")
    total = Plan()
    for mechanism in mechanisms:
        if isinstance(mechanism, type) or not callable(getattr(mechanism, "plan", None)):
            raise UsageError(
                f"{mechanism!r:.80} is no mechanism; give an instance, e.g. MixtureOfDepths(keep=0.2), or "
                "lab.mechanisms.load(name).EXAMPLE"
            )
        total = total + mechanism.plan(cfg)
    return total


def called(filling: Any) -> str:
    """What fills a slot, in short: the file it comes from, and its class or function ("vidkv.QuantisedCache")."""
    while isinstance(filling, partial):
        filling = filling.func
    named = filling if hasattr(filling, "__qualname__") else type(filling)
    return f"{named.__module__.rpartition('.')[2]}.{named.__qualname__}"
