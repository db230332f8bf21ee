"""What a command hands back, and how it reaches the terminal: results on stdout, all else on stderr. Torch-free."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import LabWarning, UsageError


@dataclass(frozen=True)
class Reply:
    """The outcome of a command: `data` for `--json` (plain data), `text` for people. `code` is the exit code."""

    data: Any
    text: str
    code: int = 0


def answer_with(work: Callable[[], Reply], as_json: bool) -> int:
    """Runs a command's work, prints its reply and returns its exit code.

    What libraries print meanwhile goes to stderr, so that stdout holds the result and nothing else.
    """
    with redirect_stdout(sys.stderr), one_line_warnings():
        reply = work()
    print(as_text(reply.data) if as_json else reply.text, flush=True)
    return reply.code


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Our own warnings as one line on stderr; those of libraries are for developers and stay silent."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **kw: Any) -> None:
        if issubclass(category, LabWarning):
            print(f"vlab: note: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", LabWarning)
        warnings.showwarning = show
        yield


def as_text(data: Any) -> str:
    """One JSON document. JSON has no nan and no infinity: they become null."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, dict):
        return {str(k): _finite(v) for k, v in data.items()}
    return [_finite(v) for v in data] if isinstance(data, list | tuple) else data


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain text table: columns two spaces apart, numbers to the right, texts to the left."""
    cells = [[_cell(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(head), *cells]) for i in range(len(head))]
    right = [bool(rows) and all(isinstance(r[i], int | float | None) for r in rows) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(head)), line(["-" * w for w in widths]), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def gigabytes(n: float) -> str:
    """Bytes as text, in units of 1000."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} bytes"


def folder_for(out: str) -> Path:
    """The folder that `--out` names, made if it is not there. Raises UsageError."""
    if not out.strip():
        raise UsageError("--out is empty; name a folder")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as e:
        raise UsageError(f"--out {out[:200]}: cannot be made: {getattr(e, 'strerror', None) or e}") from None
    return folder
