"""Hooks: what may be hooked, whether an edit did anything, and what is saved for an ActivationCache."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lab.errors import LabWarning, RunError, UsageError
from lab.model.run import changed, watched


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


class Watch:
    """A user's hook, and what it did."""

    def __init__(self, name: Any, fn: Callable[..., Any]) -> None:
        self.name, self.fn = name, fn
        self.fired, self.replied, self.effect = 0, 0, 0

    def __call__(self, value: Tensor, hook: Any) -> Any:
        self.fired += 1
        version = _version(value)
        new = self.fn(value, hook=hook)
        if new is None:
            return None
        self.replied += 1
        self.effect += int(_version(value) != version or changed(value, new))
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


def _version(value: Tensor) -> int:
    """How often the tensor was written in place; inference tensors do not count."""
    return 0 if value.is_inference() else value._version
