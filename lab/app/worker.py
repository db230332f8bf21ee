"""Worker: one thread that runs the newest job of every lane, a piece at a time, the more urgent lane first.

A job is an iterator: each step of it is a short piece of work. So a click is served between two pieces of a long sweep,
a newer job of a lane ends the older one, and Stop takes no longer than one piece. Knows no model and no widgets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress

Job = Generator[None, None, None]


class Worker:
    """One thread for jobs in lanes.

    lanes     names, the most urgent first
    failed    called in the thread with what a job raised; the job is over then
    changed   called in the thread when a lane begins or ends: with the lanes that have work
    """

    def __init__(
        self, lanes: Sequence[str], *, failed: Callable[[BaseException], None],
        changed: Callable[[tuple[str, ...]], None],
    ) -> None:  # fmt: skip
        self._lanes, self._failed, self._changed = tuple(lanes), failed, changed
        self._jobs: dict[str, Job] = {}
        self._now: str | None = None  # the lane whose piece runs
        self._told: tuple[str, ...] = ()
        self._cond = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, lane: str, job: Job) -> None:
        """Run this job; an older one of the lane is over. Returns at once."""
        with self._cond:
            self._closed = False
            self._jobs[lane] = job
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="explorer", daemon=True)
                self._thread.start()
            self._cond.notify_all()

    def stop(self, *lanes: str) -> None:
        """End the jobs of these lanes (all) after the piece that runs. Returns at once."""
        with self._cond:
            for lane in lanes or self._lanes:
                self._jobs.pop(lane, None)
            self._cond.notify_all()

    def wait(self, seconds: float = 60.0) -> bool:
        """Wait until there is no work; False if there still is."""
        with self._cond:
            return self._cond.wait_for(lambda: not self._jobs and self._now is None, seconds)

    @property
    def busy(self) -> tuple[str, ...]:
        """Lanes that have work."""
        with self._cond:
            return self._busy()

    def close(self) -> None:
        """End all jobs and the thread, and wait for it; another `submit` starts a new one."""
        with self._cond:
            self._closed = True
            self._jobs.clear()
            self._cond.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(10)

    def _busy(self) -> tuple[str, ...]:
        return tuple(lane for lane in self._lanes if lane in self._jobs or lane == self._now)

    def _run(self) -> None:
        while (found := self._next()) is not None:
            self._piece(*found)

    def _next(self) -> tuple[str, Job] | None:
        """The most urgent job, when there is one; None when the worker is closed."""
        with self._cond:
            self._now = None
            self._tell()
            self._cond.notify_all()
            self._cond.wait_for(lambda: bool(self._jobs) or self._closed)
            if self._closed:
                return None
            self._now = next(lane for lane in self._lanes if lane in self._jobs)
            self._tell()
            return self._now, self._jobs[self._now]

    def _tell(self) -> None:
        if self._busy() != self._told:
            self._told = self._busy()
            with suppress(Exception):
                self._changed(self._told)

    def _piece(self, lane: str, job: Job) -> None:
        """One step of a job; a job that is over, was stopped or replaced meanwhile, is let go."""
        over = True
        try:
            next(job)
            over = False
        except StopIteration:
            pass
        except BaseException as e:  # a thread has nobody above it: whatever is raised goes to the reader
            with suppress(Exception):
                self._failed(e)
        with self._cond:
            mine = self._jobs.get(lane) is job
            if mine and over:
                del self._jobs[lane]
        if not over and not mine:
            job.close()
