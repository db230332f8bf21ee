"""A sweep over 50 items that is killed (SIGKILL) at random points and goes on, again and again, until it is whole.

    python -m tests.killing --kills 40        fresh processes; prints what was run how often

`test_killed.py` does the same with a few kills of forked processes.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.edges import sweeping
from lab.model.zoo import wrap
from lab.result import Result
from tests import families

ITEMS, FAMILY = 50, "internvl"
WAYS = ("video->last", "cross-frame")


def sweep_into(folder: Path | None, model: Any = None) -> Result:
    """The sweep; with a folder it goes on from what is there. Every item that is begun is one line of `begun`."""
    model = wrap(families.build(FAMILY)) if model is None else model
    items = [model.prepare_inputs(**families.inputs(FAMILY, seed=s)) for s in range(ITEMS)]
    begin = sweeping._case

    def noted(model: Any, n: int, *args: Any) -> Any:
        with (folder / "begun").open("a") as file:
            file.write(f"{n}\n")
        return begin(model, n, *args)

    if folder is None:
        return sweeping.sweep(model, items, WAYS, window=1, show_progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    sweeping._case = noted
    try:
        return sweeping.sweep(model, items, WAYS, window=1, out=folder / "run", show_progress=False)
    finally:
        sweeping._case = begin


def records(folder: Path) -> int:
    """Items that are whole in the journal."""
    journal = folder / "run" / "journal.jsonl"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def kill_often(start: Callable[[], Any], folder: Path, kills: int, rng: random.Random) -> int:
    """Start the sweep and kill it, `kills` times or until it ends; each time some items further, at a random moment."""
    done = 0
    while done < kills:
        process = start()
        # each kill leaves items for those after it, however fast the machine is
        goal = min(
            records(folder) + rng.randrange(1, max(2, 2 * ITEMS // (kills + 1))),
            ITEMS * (done + 1) // (kills + 1),
        )
        while process.poll() is None and records(folder) < goal:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        if process.poll() is not None:
            return done
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        done += 1
    return done


class Forked:
    """A forked process with the words of subprocess.Popen."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.pid, self.status = os.fork(), None
        if self.pid == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status

    def wait(self) -> None:
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a sweep again and again.")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path, help="used by the script itself: sweep into this folder")
    given = parser.parse_args()
    if given.into:
        sweep_into(given.into)
        return
    folder = Path(tempfile.mkdtemp(prefix="killed-"))
    command = [sys.executable, "-m", "tests.killing", "--into", str(folder)]
    done = kill_often(lambda: subprocess.Popen(command), folder, given.kills, random.Random(given.seed))
    result, whole = sweep_into(folder), sweep_into(None)
    begun = (folder / "begun").read_text().split()
    print(
        f"{done} kills; {records(folder)} records for {ITEMS} items; {len(begun)} items begun (at most {ITEMS} + {done})"
    )
    print(
        f"ledger of all pieces {result.ledger}, of a run in one piece {whole.ledger}; same Result: {result.same(whole)}"
    )
    sys.exit(0 if result.same(whole) and len(begun) <= ITEMS + done else 1)


if __name__ == "__main__":
    main()
