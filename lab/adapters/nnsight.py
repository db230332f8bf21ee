"""nnsight on a wrapped model. `nnsight` is imported inside the functions: importing it puts `.save` on every object."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lab.errors import UsageError
from lab.model.videollm import VideoLLM


@contextmanager
def tracing(model: VideoLLM) -> Iterator[Any]:
    """The model as an `nnsight.NNsight`, held alone: traces are module state and not safe beside other runs.

    with tracing(model) as n, torch.no_grad():
        with n.trace(ready, look=[7]):
            pattern = n.blocks[7].attn.hook_pattern.output.save()

    Every HookPoint is a module of the trace; `.output` reads and replaces it, in the order of the forward pass. Scores
    and pattern exist in the layers named in `look` (nnsight leaves no torch hook that would show the interest). The
    body of a trace starts on its own line; nnsight reads its source. Trace in the thread that opened this.
    Raises UsageError if nnsight is not installed.
    """
    with model.alone():
        yield nnsight_of(model)


def nnsight_of(model: VideoLLM) -> Any:
    """`NNsight(model)`, for callers who hold `model.alone()` by themselves. Raises UsageError without nnsight."""
    try:
        from nnsight import NNsight
    except ImportError as e:
        raise UsageError(f"nnsight cannot be imported ({e}); pip install 'nnsight>=0.8.1,<0.9'") from None
    return NNsight(model)
