"""`vlab figures`: list, run, verify, gallery. Every figure is made in a process of its own; no torch is imported here."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.cli.output import Reply, table
from lab.errors import UsageError

OUT = "out/figures"


def listed(out: str) -> Reply:
    """All figures: number, name, what repeats, and whether it is made."""
    from figures.making import folder_of, is_whole
    from figures.shelf import shelf

    rows: list[dict[str, Any]] = []
    for e in shelf():
        recipe = e.recipe()
        folder = folder_of(e, recipe, Path(out))
        made = is_whole(e, recipe, folder)
        rows.append({"number": e.number, "name": e.name, "determinism": recipe.determinism, "made": made, "title": e.title, "recipe": str(e.recipe_file), "folder": str(folder)})  # fmt: skip
    shown = [
        (r["number"], r["name"], r["determinism"], "made" if r["made"] else "-", r["title"]) for r in rows
    ]
    return Reply(rows, table(("no.", "name", "repeats", "state", "what"), shown))


def run(
    names: Sequence[str], out: str, changes: Sequence[str], jobs: int | None, *, redo: bool, from_data: bool
) -> Reply:
    """Makes the figures named (none: all); what is whole already is kept."""
    from figures.making import folder_of, recipe_of
    from figures.running import Job, run_all
    from lab.overriding import setting

    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: at least 1 is needed")
    entries, given = _chosen(names), dict(setting(c) for c in changes)
    options = tuple(f"--set={c}" for c in changes) + ("--redo",) * redo + ("--from-data",) * from_data
    todo = [Job(e, folder_of(e, recipe_of(e, given), Path(out)), options) for e in entries]
    made = run_all(todo, jobs, tell=_tell)
    failed = [o for o in made if o.code]
    rows: list[dict[str, Any]] = [
        {
            "name": o.job.entry.name,
            "folder": str(o.job.folder),
            "state": o.said,
            "seconds": round(o.seconds, 1),
            "error": o.error,
        }
        for o in made
    ]
    lines = [f"{r['folder']}: {r['state']}{': ' + r['error'] if r['error'] else ''}" for r in rows]
    if not failed and not names and not changes:
        lines.append(str(_gallery(Path(out))))
    return Reply(rows, "\n".join(lines), max((o.code if o.code > 0 else 1 for o in failed), default=0))


def verify(names: Sequence[str], out: str, jobs: int | None, quick: bool) -> Reply:
    """Checks the files of every figure, draws it again, and computes it again unless `quick`. Exit code 1 if anything is wrong."""
    from figures.making import folder_of
    from figures.running import Job, run_all
    from figures.verifying import repeated, saved

    entries = _chosen(names)
    folders = [folder_of(e, e.recipe(), Path(out)) for e in entries]
    wrong = {e.name: saved(e, f) for e, f in zip(entries, folders, strict=True)}
    if not quick:
        with tempfile.TemporaryDirectory(prefix="vlab-verify-") as root:
            again = [(e, f) for e, f in zip(entries, folders, strict=True) if (f / "computed.json").is_file()]
            todo = [Job(e, Path(root) / e.name, ("--data-only",)) for e, _ in again]
            for outcome, (e, f) in zip(run_all(todo, jobs, tell=_tell), again, strict=True):
                wrong[e.name] += (
                    [f"cannot be computed: {outcome.error}"]
                    if outcome.code
                    else repeated(e, f, outcome.job.folder)
                )
    return _verdict(wrong, quick)


def gallery(out: str) -> Reply:
    """The page of all figures that are made."""
    page = _gallery(Path(out))
    return Reply({"page": str(page)}, str(page))


def _gallery(out: Path) -> Path:
    from figures.gallery import gallery as written
    from figures.making import folder_of
    from figures.shelf import shelf
    from figures.verifying import whole

    made = [(e, f) for e in shelf() if whole(f := folder_of(e, e.recipe(), out))]
    if not made:
        raise UsageError(f"no figure is made in {out}; run `vlab figures run` first")
    return written([e for e, _ in made], [f for _, f in made], out / "index.html")


def _chosen(names: Sequence[str]) -> list[Any]:
    from figures.shelf import find, shelf

    return [find(n) for n in names] if names else shelf()


def _tell(outcome: Any) -> None:
    error = f": {outcome.error}" if outcome.error else ""
    print(
        f"{outcome.job.entry.name}: {outcome.said}, {outcome.seconds:.0f} s{error}",
        file=sys.stderr,
        flush=True,
    )


def _verdict(wrong: dict[str, list[str]], quick: bool) -> Reply:
    bad = {n: w for n, w in wrong.items() if w}
    lines = [
        f"{'RED  ' if w else 'green'}  {n}" + "".join(f"\n         {line}" for line in w)
        for n, w in wrong.items()
    ]
    how = "files and drawings" if quick else "files, drawings and a second run"
    lines.append(f"{len(wrong) - len(bad)} of {len(wrong)} figures are green ({how})")
    data = {n: {"green": not w, "wrong": w} for n, w in wrong.items()}
    return Reply(data, "\n".join(lines), int(bool(bad)))
