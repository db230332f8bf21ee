"""transformers collects hidden states with forward hooks that it puts on lazily; some towers are read from them.

Those hooks are local functions (not to be pickled), and which outputs a class can record is noted only when a model of
that class is built, so not in a process that unpickles one. Both are put right when a wrapped model is pickled.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers.utils import output_capturing


def take_off(hf: nn.Module) -> None:
    """Remove the capturing hooks; transformers' next call puts them on again."""
    for module in hf.modules():
        hooks = module._forward_hooks
        for key in [k for k, f in hooks.items() if getattr(f, "__module__", "") == output_capturing.__name__]:
            del hooks[key]
        if "_output_capturing_hooks_installed" in module.__dict__:
            cast(Any, module)._output_capturing_hooks_installed = False


def make_known(hf: nn.Module) -> None:
    """Note what each of the model's classes can record, as building the model would have done."""
    known = cast("dict[str, Any] | None", getattr(output_capturing, "_CAN_RECORD_REGISTRY", None))
    for module in hf.modules():
        records = getattr(module, "_can_record_outputs", None)
        if known is not None and records is not None:
            dict.setdefault(known, str(type(module)), records)
