"""Runs: a folder that can be interrupted and continued. Journal, lock, ledger of costs, progress, cancel. Torch-free.

Work is a list of keyed pieces (one item, one sweep ...). Every finished piece is one line of `journal.jsonl`, on disk
before `record` returns; after a crash, a kill or Ctrl-C the same command goes on with the pieces that are missing:

    with Run("out/trace", recipe) as run:
        for key in progress(run.todo(keys), desc="items", cancel=run.cancel):
            run.record(key, measure(key))
        results = run.results()
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from lab.errors import ConfigError, LabError, RunError
from lab.recipe import Recipe, dump, from_plain
from lab.result import plain, restore, storable
from lab.yamlfile import parse_yaml, read_text

try:  # Windows has no flock; there the lock file only tells people, it does not keep a second process out
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")


class Cancelled(LabError):
    """Somebody asked this run to stop. What was recorded stays; the same command goes on from there."""

    exit_code = 130  # as after Ctrl-C


class Cancel:
    """A flag that any thread may set and the work looks at between pieces."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Asks the work to stop at its next check."""
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether somebody asked."""
        return self._event.is_set()

    def check(self) -> None:
        """Raises Cancelled if somebody asked."""
        if self.is_set:
            raise Cancelled(
                "stopped on request; everything recorded so far is kept, run the same command to go on"
            )


@dataclass(frozen=True)
class Ledger:
    """What a measurement cost. Ledgers add.

    forwards     work done, in full decoder forwards of one prompt (parts of a forward count as fractions)
    naive        forwards the same numbers would cost with one full forward per intervention
    tower_calls  runs of the vision tower
    """

    forwards: float = 0.0
    naive: float = 0.0
    tower_calls: int = 0

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(
            self.forwards + other.forwards, self.naive + other.naive, self.tower_calls + other.tower_calls
        )

    def plain(self) -> dict[str, Any]:
        """The three numbers as a dict; `Ledger(**d)` is the way back."""
        return asdict(self)

    def __str__(self) -> str:
        saved = (
            f" ({self.naive / self.forwards:.1f}x fewer)"
            if self.forwards and self.naive > self.forwards
            else ""
        )
        tower = f"{self.tower_calls} tower call{'' if self.tower_calls == 1 else 's'}"
        return f"{self.forwards:.1f} forward-equivalents in place of {self.naive:.1f}{saved}, {tower}"


class Journal:
    """An append-only file of JSON lines. Each line is on disk before `append` returns.

    A last line without its end (the machine died while it was written) is dropped when the journal is opened; a
    damaged line anywhere else is a ConfigError with its number.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.records, whole = _read_lines(self.path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, whole)
        self._size = whole

    def append(self, record: dict[str, Any]) -> None:
        """Adds one record (plain data). Raises RunError if it cannot be written; then nothing of it stays."""
        line = (
            json.dumps(storable(plain(record, "record")), ensure_ascii=False, allow_nan=False).encode()
            + b"\n"
        )
        try:
            # one write for one line: Ctrl-C falls before or after it, never in between
            if os.write(self._file, line) != len(line):
                raise OSError(28, "the disk is full")
            os.fsync(self._file)
        except OSError as e:
            os.ftruncate(self._file, self._size)
            raise RunError(
                f"cannot write {self.path}: {e.strerror}; {len(self.records)} records are safe"
            ) from None
        self._size += len(line)
        self.records.append(record)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


class Run:
    """One run folder, belonging to one recipe: `journal.jsonl`, `recipe.yaml`, and whatever the caller writes.

    Raises ConfigError if the folder belongs to another recipe, RunError if another process is writing to it.
    """

    def __init__(self, out_dir: str | Path, recipe: Recipe, *, cancel: Cancel | None = None) -> None:
        self.folder = Path(out_dir)
        self.recipe = recipe
        self.cancel = cancel or Cancel()
        self.ledger = Ledger()
        self._done: dict[str, Any] = {}
        self._journal: Journal | None = None
        self._lock = -1

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder / ".lock")
        except OSError as e:
            raise RunError(f"cannot use {self.folder} as a run folder: {e.strerror}") from None
        try:
            self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock >= 0:
            os.close(self._lock)  # closing is unlocking; a killed process does it too
            self._lock = -1

    def _open(self) -> None:
        _check_owner(self.folder, _owner_by_yaml(self.folder / "recipe.yaml"), self.recipe.id)
        if not (self.folder / "recipe.yaml").exists():
            dump(self.recipe, self.folder / "recipe.yaml")
        journal = Journal(self.folder / "journal.jsonl")
        self._journal = journal
        if not journal.records:
            journal.append({"recipe": self.recipe.id})
        _check_owner(self.folder, journal.records[0].get("recipe"), self.recipe.id)
        for record in journal.records[1:]:
            self._done[record["key"]] = record["payload"]
            self.ledger += Ledger(**record["spent"])

    def done(self, key: str) -> bool:
        """Whether this piece is recorded."""
        return key in self._done

    def todo(self, keys: Iterable[str]) -> list[str]:
        """The keys that are not recorded yet, in the given order."""
        return [k for k in keys if k not in self._done]

    def record(self, key: str, payload: Any, spent: Ledger | None = None) -> None:
        """Stores one finished piece (plain data; arrays become lists) and what it cost, then checks for cancel.

        Raises RunError if the key is recorded already or the run is not open.
        """
        if self._journal is None:
            raise RunError(f"the run in {self.folder} is not open; use `with Run(...) as run:`")
        if not isinstance(key, str):
            raise RunError(f"a key must be text, got {key!r}")
        if key in self._done:
            raise RunError(
                f"{key!r} is recorded already ({len(self._done)} records); ask run.done(key) first"
            )
        spent = spent or Ledger()
        payload = plain(payload, f"payload of {key!r}")
        self._journal.append({"key": key, "payload": payload, "spent": spent.plain()})
        self._done[key] = payload
        self.ledger += spent
        self.cancel.check()

    def results(self) -> dict[str, Any]:
        """Everything recorded, in the order it was recorded."""
        return dict(self._done)


def progress(
    pieces: Iterable[T],
    *,
    desc: str = "",
    total: int | None = None,
    show: bool | None = True,
    cancel: Cancel | None = None,
) -> Iterator[T]:
    """Yields the pieces with a bar on stderr (a widget in notebooks), checking `cancel` before each.

    show  True: if stderr is a terminal or a notebook; False: never
    """
    from tqdm.auto import tqdm  # here: it costs a tenth of a second and probes for notebooks

    total = len(pieces) if total is None and isinstance(pieces, Sequence) else total
    # disable=None is tqdm's word for "not when the output goes to a file"
    for piece in tqdm(pieces, desc=desc, total=total, disable=None if show else True):
        if cancel is not None:
            cancel.check()
        yield piece


def unique(keys: Sequence[Hashable], what: str = "key") -> None:
    """Raises ConfigError if a key stands twice, naming it."""
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise ConfigError(f"the {what} {key!r} stands twice among {len(keys)}; each must be its own")


def _read_lines(path: Path) -> tuple[list[Any], int]:
    """All records, and the length in bytes of the part of the file that is whole."""
    if not path.exists():
        return [], 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    records: list[Any] = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = restore(json.loads(line))
        except ValueError:
            raise ConfigError(
                f"{path} line {number} is damaged; remove that line or use another folder"
            ) from None
        if not isinstance(record, dict) or not (
            {"key", "payload", "spent"} <= set(record) or "recipe" in record
        ):
            raise ConfigError(f"{path} line {number} is not a record of a run; use another folder")
        records.append(record)
    return records, whole


def _owner_by_yaml(path: Path) -> str | None:
    if not path.exists():
        return None
    return from_plain(parse_yaml(read_text(path), str(path)), str(path)).id


def _check_owner(folder: Path, owner: str | None, mine: str) -> None:
    if owner is not None and owner != mine:
        raise ConfigError(
            f"{folder} belongs to recipe {owner}, this is recipe {mine}; use another folder or empty it"
        )


def _locked(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(file, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(file)
            raise RunError(
                f"process {holder} is writing to {path.parent}; wait for it or use another folder"
            ) from None
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    return file
