"""Hooks: what may be hooked, whether an edit did anything, and what is saved for an ActivationCache."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from lab.errors import LabWarning, RunError, UsageError
from lab.model.run import changed, watched, written


def hooked(model: Any) -> bool:
    """Whether anybody holds a torch hook on any of the model's points."""
    return any(watched(p) for p in model.hook_dict.values())


def check_name(model: Any, name: Any) -> None:
    if isinstance(name, str) and name not in model.hook_dict:
        near = difflib.get_close_matches(name, list(model.hook_dict), n=3)
        without = [
            p.index for p in model.parts if p.attn is None and name.startswith(f"blocks.{p.index}.attn.")
        ]
        why = "".join(f" (layer {i + 1} has no softmax attention, only mixer.hook_out)" for i in without)
        raise UsageError(f"no hook point {name!r}{why}; closest: {', '.join(near) or 'none'}")


def check_pairs(hooks: Any) -> None:
    """Raises UsageError if the hooks are not (name, function) pairs."""
    pairs = hooks if isinstance(hooks, Sequence) and not isinstance(hooks, str) else [hooks]
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 or not callable(pair[1]):
            raise UsageError(f"hooks are pairs like [('blocks.0.hook_resid_post', fn)], got {pair!r}")


def checked_edges(edges: Any) -> dict[int, Any]:
    """Edge rules by layer. Raises UsageError if they are not a mapping from layers to functions."""
    edges = {} if edges is None else edges
    if not isinstance(edges, Mapping) or not all(
        isinstance(k, Integral) and callable(f) for k, f in edges.items()
    ):
        raise UsageError(
            "edges map a layer to a function of (q positions, k positions): {3: lambda q, k: ...}, "
            f"got {type(edges).__name__} {str(edges)[:60]}"
        )
    return dict(edges)


def check_layers(model: Any, layers: Sequence[int]) -> None:
    for layer in layers:
        if not 0 <= layer < model.cfg.n_layers:
            raise UsageError(
                f"no layer {layer + 1} (blocks.{layer}): the model has layers 1..{model.cfg.n_layers}"
            )
        if model.parts[layer].attn is None:
            raise RunError(f"layer {layer + 1} (blocks.{layer}) has no softmax attention, so no edges here")


def checkpointing(model: Any) -> bool:
    return model.hf.training and any(getattr(p.layer, "gradient_checkpointing", False) for p in model.parts)


def check_training(model: Any) -> None:
    if not checkpointing(model) or not torch.is_grad_enabled():
        return
    func: Any = getattr(model.parts[0].layer, "_gradient_checkpointing_func", None)
    if getattr(func, "keywords", {}).get("use_reentrant", True):
        raise RunError(
            "reentrant gradient checkpointing gives wrong gradients here; enable it with "
            "hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )


def check_reply(name: Any, value: Tensor, new: Any) -> None:
    """Raises UsageError for a hook's reply that cannot stand in for the value."""
    if not isinstance(new, Tensor):
        raise UsageError(
            f"the hook on {name} returned {type(new).__name__}; return a tensor, or None to only look"
        )
    fits = new.ndim <= value.ndim and all(
        a in (1, b) for a, b in zip(reversed(new.shape), reversed(value.shape), strict=False)
    )
    if not fits:
        raise UsageError(
            f"the hook on {name} returned shape {tuple(new.shape)} for a value of {tuple(value.shape)}"
        )


class Watch:
    """A user's hook, and what it did."""

    def __init__(self, name: Any, fn: Callable[..., Any]) -> None:
        self.name, self.fn = name, fn
        self.fired, self.replied, self.effect = 0, 0, 0

    def __call__(self, value: Tensor, hook: Any) -> Any:
        self.fired += 1
        version = written(value)
        new = self.fn(value, hook=hook)
        if new is None:
            return None
        check_reply(hook.name, value, new)
        self.replied += 1
        unknown = new is value and value.is_inference()  # writes into inference tensors are not counted
        self.effect += int(unknown or written(value) != version or changed(value, new))
        return new

    def warn(self) -> None:
        name = self.name if isinstance(self.name, str) else "<filter>"
        if not self.fired:
            warnings.warn(
                f"the hook on {name} never fired: this run did not pass there", LabWarning, stacklevel=3
            )
        elif self.replied and not self.effect:
            warnings.warn(
                f"the hook on {name} fired {self.fired} times and changed nothing", LabWarning, stacklevel=3
            )


class Saver:
    """Stores what passes, detached. It copies where other hooks are on: one may edit the same tensor in place at a
    later point (resid_post of a layer and resid_pre of the next are one tensor)."""

    def __init__(self, store: dict[str, Tensor], device: Any, squeeze: bool, copy: bool) -> None:
        self.store, self.device, self.squeeze, self.copy = store, device, squeeze, copy

    def __call__(self, value: Tensor, hook: Any) -> None:
        kept = value.detach().to(value.device if self.device is None else self.device, copy=self.copy)
        self.store[hook.name] = kept[0] if self.squeeze else kept
