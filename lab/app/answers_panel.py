"""Answers panel: every choice's probability clean, edited and in pinned runs, as a small table. Torch-free."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from lab.view.specs import text


@dataclass(frozen=True)
class Column:
    """One run: its name, the probability of every choice, and what stands below its name."""

    name: str
    p: tuple[float, ...]
    note: str = ""


def answers_html(choices: Sequence[str], unit: str, runs: Sequence[Column], right: int | None) -> str:
    """The table of runs: the clean one, the edited one, pinned ones. A bar shows the probability; the choice that a run
    makes is bold; ✓ marks the right one."""
    head = "".join(
        f"<th scope='col'>{_safe(r.name)}<br><span class='vl-note'>{_safe(r.note)}</span></th>" for r in runs
    )
    rows = "".join(_row(i, name, runs, right) for i, name in enumerate(choices))
    return (
        f"<table><thead><tr><th scope='col'>{_safe(unit)}</th>{head}<th scope='col'>edited − clean</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _row(i: int, name: str, runs: Sequence[Column], right: int | None) -> str:
    cells = "".join(_cell(r, i, 1 + (n == 1)) for n, r in enumerate(runs))
    change = 100 * (runs[1].p[i] - runs[0].p[i])
    mark = " ✓" if i == right else ""
    return f"<tr><th scope='row'>{_safe(name)}{mark}</th>{cells}<td>{change:+.2f} points</td></tr>"


def _cell(run: Column, i: int, kind: int) -> str:
    chosen = " class='vl-said-it'" if run.p[i] == max(run.p) else ""
    bar = f"<span class='vl-tick vl-tick{kind}' style='width:{36 * run.p[i]:.1f}px'></span>"
    return f"<td{chosen} data-p='{run.p[i]!r}'>{bar} {text(run.p[i])}</td>"


def _safe(words: str) -> str:
    return html.escape(words, quote=True)
