"""Runs: what is recorded survives a kill, a folder has one owner and one writer, stopping is clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lab.errors import ConfigError, RunError
from lab.recipe import Recipe
from lab.runs import Cancel, Cancelled, Journal, Ledger, Run, progress, unique


class WaitRecipe(Recipe):
    window: int = 9


# the same class as a module of its own, for other processes
MODULE = """
    import sys, types
    from lab.recipe import Recipe
    module = types.ModuleType("probes.waiting")
    class WaitRecipe(Recipe):
        window: int = 9
    WaitRecipe.__module__ = "probes.waiting"
    module.WaitRecipe = WaitRecipe
    sys.modules["probes.waiting"] = module
"""


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    module = types.ModuleType("probes.waiting")
    monkeypatch.setattr(WaitRecipe, "__module__", "probes.waiting")
    module.WaitRecipe = WaitRecipe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "probes.waiting", module)


def child(code: str, folder: Path) -> subprocess.Popen[str]:
    text = textwrap.dedent(MODULE) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", text, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background has Ctrl-C switched off; children would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    recipe = WaitRecipe()
    with Run(tmp_path, recipe) as run:
        run.record("a", {"p": np.float32(0.1), "curve": np.array([1.0, np.nan])}, Ledger(2, 10, 1))
    with Run(tmp_path, recipe) as run:
        assert run.done("a") and not run.done("b") and run.todo(["a", "b", "c"]) == ["b", "c"]
        run.record("b", [1, 2], Ledger(1, 5, 0))
        assert run.ledger == Ledger(3, 15, 1)
        assert list(run.results()) == ["a", "b"]
        assert run.results()["a"]["p"] == float(np.float32(0.1)) and np.isnan(run.results()["a"]["curve"][1])
    assert (
        (tmp_path / "recipe.yaml")
        .read_text()
        .startswith("schema_version: 1\nkind: probes.waiting.WaitRecipe")
    )


def test_kill_nine_loses_nothing_that_was_recorded(tmp_path: Path) -> None:
    work = """
        from lab.runs import Run, Ledger
        with Run(sys.argv[1], WaitRecipe()) as run:
            for i in range(10_000):
                run.record(str(i), {"square": i * i}, Ledger(1, 2, 0))
                print(i, flush=True)
    """
    process = child(work, tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "20":
            process.send_signal(signal.SIGKILL)
            break
    told = 20 + len([line for line in process.stdout.read().split() if line])
    assert process.wait(20) == -signal.SIGKILL
    with (tmp_path / "journal.jsonl").open("ab") as f:
        f.write(b'{"key": "half", "payl')  # what a power cut in mid-write leaves
    with Run(tmp_path, WaitRecipe()) as run:  # the dead process holds no lock
        done = run.results()
        assert len(done) > told >= 20 and not run.done("half")
        assert all(done[str(i)] == {"square": i * i} for i in range(len(done)))
        assert run.ledger == Ledger(len(done), 2 * len(done), 0)
        run.record("next", 1)
    with Run(tmp_path, WaitRecipe()) as run:
        assert run.done("next")


def test_a_folder_belongs_to_one_recipe(tmp_path: Path) -> None:
    a, b = WaitRecipe(), WaitRecipe(window=3)
    with Run(tmp_path, a):
        pass
    with (
        pytest.raises(ConfigError, match=f"belongs to recipe {a.id}, this is recipe {b.id}"),
        Run(tmp_path, b),
    ):
        pass
    (tmp_path / "journal.jsonl").unlink()  # recipe.yaml alone says it too, and is not overwritten
    with pytest.raises(ConfigError, match=a.id), Run(tmp_path, b):
        pass
    with Run(tmp_path, a) as run:  # a refused run has given its lock back
        run.record("x", 1)


def test_two_processes_cannot_write_one_folder(tmp_path: Path) -> None:
    hold = """
        from lab.runs import Run
        with Run(sys.argv[1], WaitRecipe()):
            print("open", flush=True)
            sys.stdin.read()
    """
    text = textwrap.dedent(MODULE) + textwrap.dedent(hold)
    process = subprocess.Popen(
        [sys.executable, "-c", text, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    with pytest.raises(RunError, match=f"process {process.pid} is writing"), Run(tmp_path, WaitRecipe()):
        pass
    process.communicate("")
    with Run(tmp_path, WaitRecipe()) as run:
        run.record("x", 1)


def test_the_same_key_twice_and_a_closed_run_are_refused(tmp_path: Path) -> None:
    with Run(tmp_path, WaitRecipe()) as run:
        run.record("a", 1)
        with pytest.raises(RunError, match="'a' is recorded already"):
            run.record("a", 2)
        with pytest.raises(RunError, match="must be text, got 3"):
            run.record(3, 2)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="not open"):
        run.record("b", 1)
    with Run(tmp_path, WaitRecipe()) as run:
        assert run.results() == {"a": 1}


def test_cancel_stops_after_the_piece_at_hand(tmp_path: Path) -> None:
    with pytest.raises(Cancelled) as e, Run(tmp_path, WaitRecipe()) as run:
        for i in progress(range(10), show=False, cancel=run.cancel):
            if i == 3:
                threading.Thread(target=run.cancel.set).start()
                while not run.cancel.is_set:
                    time.sleep(0.001)
            run.record(str(i), i)
    assert e.value.exit_code == 130
    with Run(tmp_path, WaitRecipe()) as run:
        assert list(run.results()) == ["0", "1", "2", "3"]


def test_cancel_is_seen_between_pieces_that_record_nothing() -> None:
    cancel = Cancel()
    seen = []
    with pytest.raises(Cancelled):
        for i in progress(iter(range(5)), show=False, cancel=cancel):
            seen.append(i)
            cancel.set()
    assert seen == [0]


def test_keyboard_interrupt_leaves_the_journal_whole(tmp_path: Path) -> None:
    work = """
        from lab.runs import Run
        with Run(sys.argv[1], WaitRecipe()) as run:
            for i in range(100_000):
                run.record(str(i), "x" * 2000)
                print(i, flush=True)
    """
    process = child(work, tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "10":
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in error
    assert (tmp_path / "journal.jsonl").read_bytes().endswith(b"\n")
    with Run(tmp_path, WaitRecipe()) as run:
        assert list(run.results()) == [str(i) for i in range(len(run.results()))] and len(run.results()) > 10


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    with Run(tmp_path, WaitRecipe()) as run:
        run.record("a", 1)
        run.record("b", 2)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([lines[0], lines[1][:-5], lines[2]]) + "\n")
    with pytest.raises(ConfigError, match="line 2 is damaged"), Run(tmp_path, WaitRecipe()):
        pass
    journal.write_text("[1]\n")
    with pytest.raises(ConfigError, match="line 1 is not a record"), Run(tmp_path, WaitRecipe()):
        pass


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"key": "a", "payload": 1, "spent": {}})
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
    with pytest.raises(RunError, match="disk is full; 1 records are safe"):
        journal.append({"key": "b", "payload": 2, "spent": {}})
    monkeypatch.undo()
    journal.append({"key": "c", "payload": 3, "spent": {}})
    journal.close()
    assert [r["key"] for r in Journal(tmp_path / "j.jsonl").records] == ["a", "c"]


def test_a_place_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot use"), Run(tmp_path / "file", WaitRecipe()):
        pass


def test_ledgers_add_and_speak() -> None:
    total = sum([Ledger(1.5, 20, 1), Ledger(0.5, 20, 0)], Ledger())
    assert total == Ledger(2.0, 40, 1) and Ledger(**total.plain()) == total
    assert str(total) == "2.0 forward-equivalents in place of 40.0 (20.0x fewer), 1 tower call"
    assert str(Ledger()) == "0.0 forward-equivalents in place of 0.0, 0 tower calls"


def test_progress_is_silent_on_stdout_and_in_files(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2, 3], desc="items")) == [1, 2, 3]
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""  # not a terminal


def test_keys_must_differ() -> None:
    unique(["a", "b"])
    with pytest.raises(ConfigError, match="item id 'a' stands twice among 3"):
        unique(["a", "b", "a"], "item id")


def test_a_recipe_that_cannot_be_read_back_starts_no_run(tmp_path: Path) -> None:
    class Local(Recipe):
        pass

    with pytest.raises(ConfigError), Run(tmp_path, Local()):
        pass
    assert not (tmp_path / "journal.jsonl").exists() and not (tmp_path / "recipe.yaml").exists()
