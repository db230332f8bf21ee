"""`with model.pruned(policy)`: which policy holds where. A run takes it when it is called, or raises; never runs unpruned.

The policy lies in a ContextVar of the model, so that a thread has its own. A new thread starts with an empty context:
a run there, while any `pruned` is open on the model, raises, since nobody can tell what was meant.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.errors import LabWarning, RunError, UsageError
from lab.model.run import Edges
from lab.slots import ModelSizes

NEG = float("-inf")


class EdgePolicy(Protocol):
    """What the model asks of a policy."""

    def edges(self, tokens: Any, sizes: ModelSizes, item: VideoQA | None = None) -> Mapping[int, Edges]: ...


class Pruning:
    """The policies open on one model."""

    def __init__(self) -> None:
        self._policy: ContextVar[Any] = ContextVar("lab_pruned", default=None)
        self._guard = threading.Lock()
        self._open = 0

    @contextmanager
    def using(self, policy: EdgePolicy) -> Iterator[None]:
        """Hold a policy for the runs made inside, in this context. The innermost counts."""
        check_policy(policy)
        with self._guard:
            self._open += 1
        token = self._policy.set(policy)
        try:
            yield
        finally:
            self._policy.reset(token)
            with self._guard:
                self._open -= 1

    def chosen(self, given: Any) -> Any:
        """The policy of a run: the one it was given, else the innermost open one, else None.

        Raises RunError in a thread that did not get the open policy; UsageError for what is no policy.
        """
        if given is not None:
            return check_policy(given)
        held = self._policy.get()
        if held is None and self._open:
            raise RunError(
                "`model.pruned(policy)` is open elsewhere, and this thread does not have its policy: start the thread "
                "with contextvars.copy_context().run, pass policy= to the run, or pass a policy without cuts for a clean run"
            )
        return held


def check_policy(policy: Any) -> Any:
    """Raises UsageError for what is no policy."""
    if not callable(getattr(policy, "edges", None)):
        raise UsageError(
            f"a policy has a method edges(tokens, sizes), got {type(policy).__name__}; use lab.edges.Policy.load(path)"
        )
    return policy


@dataclass(frozen=True)
class Reach:
    """What of a model a policy's edges need: sizes, and which layers (0-based) have softmax attention."""

    sizes: ModelSizes
    softmax: frozenset[int]


def pruned_edges(
    policy: EdgePolicy,
    maps: tuple[TokenMap, ...],
    reach: Reach,
    item: VideoQA | None,
    own: Mapping[int, Edges],
) -> dict[int, Edges]:
    """A policy's edges for these worlds, together with a run's own.

    Layers without softmax attention have no edges: they are skipped with a LabWarning that names them.
    Raises UsageError if no other layer is left.
    """
    first, *more = maps
    made = dict(policy.edges(maps if more else first, reach.sizes, item))
    skipped = sorted(set(made) - reach.softmax)
    if skipped:
        text = f"layers {', '.join(str(i + 1) for i in skipped)} have no softmax attention, so the policy cuts no edges there"
        if len(skipped) == len(made):
            raise UsageError(f"{text}, nor anywhere else: it has no effect on this model")
        warnings.warn(text, LabWarning, stacklevel=4)
    out = {layer: e for layer, e in made.items() if layer in reach.softmax}
    return out | {layer: _both(e, out[layer]) if layer in out else e for layer, e in own.items()}


def _both(a: Edges, b: Edges) -> Edges:
    def edges(q: Tensor, k: Tensor) -> Tensor:
        x, y = _wide(a(q, k)), _wide(b(q, k))
        if x.dtype == y.dtype:
            return x & y if x.dtype.is_floating_point is False else x + y
        keep, bias = (x, y) if not x.dtype.is_floating_point else (y, x)
        return bias.masked_fill(~keep, NEG)

    return edges


def _wide(x: Tensor) -> Tensor:
    """[world | 1, head | 1, q, k]"""
    return x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))


def refuse_with(executor: str, policy: Any, **asked: Any) -> None:
    """Raises UsageError for what only the reference executor can do, or if there is no policy to execute."""
    if not callable(getattr(policy, "executor", None)):
        raise UsageError(f"executor={executor!r} needs a policy= that offers it, such as lab.edges.Policy")
    extra = [name for name, value in asked.items() if value not in (None, (), {}, [])]
    if extra:
        raise UsageError(
            f"executor={executor!r} cannot be combined with {', '.join(extra)}; use executor='reference'"
        )
