"""What the benches share: how memory and time are measured, and what is written beside the numbers."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

PACKAGES = ("torch", "transformers", "transformer-lens", "accelerate", "numpy")


def peak_bytes(work: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes that tensors held at once during `work()`, beyond what was held before it.

    On a GPU the caching allocator's own counter. On a CPU the sum of every allocation and release that the profiler
    records: exact tensor bytes, with nothing of the process around them (no fragmentation, no library buffers).
    What `work` returns is kept until the measuring ends, so results that stay count.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = work()
        torch.cuda.synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = work()
    del kept
    return _peak(profile)


def counted_flops(work: Callable[[], Any]) -> int:
    """FLOPs torch counts during `work` (attention over all pairs, masked or not, whichever kernel ran).

    Without our entry torch counts nothing for the kernel that attention takes on a CPU.
    """
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={cpu: _attention_flops}) as counter:
        work()
    return counter.get_total_flops()


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kw: Any) -> int:
    """torch hands over shapes in place of tensors."""
    return sdpa_flop_count(q, k, v)


def _peak(profile: Any) -> int:
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        top = max(top, held)
    return top


def paired(
    works: Mapping[str, Callable[[], Any]],
    *,
    pairs: int,
    warm: int = 2,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each work, `pairs` times, all works within every round and in alternating order.

    Rounds make ratios of neighbours: what the machine does meanwhile falls on both. Process time (CPU seconds of
    this process) is deaf to other processes; on a GPU give a clock that waits for the device.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(-warm, pairs):
        for name in list(works)[:: 1 if round_ % 2 else -1]:
            start = clock()
            works[name]()
            taken = clock() - start
            if round_ >= 0:
                seconds[name].append(taken)
    return seconds


def median_ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """Median over rounds of the ratio between two works of the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def setting(device: torch.device | str = "cpu") -> dict[str, Any]:
    """When, where and with what a number was measured."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    kind = torch.device(device)
    named = torch.cuda.get_device_name(kind) if kind.type == "cuda" else _processor()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": str(kind),
        "device_name": named,
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write(path: str | Path | None, content: Mapping[str, Any]) -> None:
    """The result as json: to `path`, or to standard output."""
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    if path is None:
        sys.stdout.write(text)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")
