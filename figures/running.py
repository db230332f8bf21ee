"""Many figures at once, each in a process of its own, as many side by side as there are cores. Torch-free."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from figures.shelf import HERE, Entry

ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Job:
    """One figure to be made in a folder; options are those of `figures.making`."""

    entry: Entry
    folder: Path
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job: "kept", "drawn", "computed", or "failed" with the error in one line."""

    job: Job
    said: str
    seconds: float
    error: str = ""
    code: int = 0


def run_all(
    jobs: Sequence[Job], workers: int | None = None, tell: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """All outcomes, in the order of the jobs. One failure does not stop the others; Ctrl-C ends them all."""
    running: dict[int, tuple[subprocess.Popen[str], float]] = {}
    done: dict[int, Outcome] = {}
    waiting = list(range(len(jobs)))
    most = workers or max(1, _cores())
    try:
        while waiting or running:
            while waiting and len(running) < most:
                i = waiting.pop(0)
                running[i] = (_started(jobs[i]), time.monotonic())
            for i in _ended(running):
                process, start = running.pop(i)
                done[i] = _outcome(jobs[i], process, time.monotonic() - start)
                tell(done[i])
            time.sleep(0.05)
    finally:
        for process, _ in running.values():
            process.kill()
    return [done[i] for i in range(len(jobs))]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _started(job: Job) -> subprocess.Popen[str]:
    job.folder.mkdir(parents=True, exist_ok=True)
    log = (job.folder / "log.txt").open("w", encoding="utf-8")
    path = os.pathsep.join(p for p in (str(HERE.parent), os.environ.get("PYTHONPATH", "")) if p)
    command = [sys.executable, "-m", "figures.making", job.entry.name, str(job.folder), *job.options]
    with log:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **ENV, "PYTHONPATH": path},
        )


def _ended(running: dict[int, tuple[subprocess.Popen[str], float]]) -> Iterator[int]:
    yield from [i for i, (process, _) in running.items() if process.poll() is not None]


def _outcome(job: Job, process: subprocess.Popen[str], seconds: float) -> Outcome:
    assert process.stdout is not None
    with process.stdout as stream:
        said = stream.read().split()
    if process.returncode == 0:
        (job.folder / "log.txt").unlink(missing_ok=True)
        return Outcome(job, said[-1] if said else "computed", seconds)
    lines = [
        line.strip()
        for line in (job.folder / "log.txt").read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    return Outcome(
        job,
        "failed",
        seconds,
        lines[-1] if lines else f"ended with code {process.returncode}",
        process.returncode,
    )
