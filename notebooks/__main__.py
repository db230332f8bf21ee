"""Notebooks are percent `.py` files; the `.ipynb` beside each is written from it, and holds no outputs.

    python notebooks write              all .ipynb, from their .py
    python notebooks run [00 20 ...]    execute (all), each within the seconds its header allows; outputs into out/notebooks/

The header's `lab: budget_seconds` is the notebook's own limit, wall clock, on a CPU.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
OUT = FOLDER.parent / "out" / "notebooks"
HANGS = 600  # seconds after which a cell is interrupted


def sources() -> list[Path]:
    """The percent files, in the order they are read."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def notebook_of(source: Path) -> nbformat.NotebookNode:
    """The notebook a percent file stands for: no outputs, and the same cell ids every time."""
    notebook = jupytext.read(source)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02d}"
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    keep = ("kernelspec", "lab")
    notebook.metadata = nbformat.NotebookNode({k: notebook.metadata[k] for k in keep})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def text_of(source: Path) -> str:
    """The bytes of the .ipynb, as text."""
    return nbformat.writes(notebook_of(source)) + "\n"


def write() -> None:
    """Every .ipynb from its source."""
    for source in sources():
        source.with_suffix(".ipynb").write_text(text_of(source), encoding="utf-8")


def budget(notebook: nbformat.NotebookNode) -> float:
    """Seconds the notebook may take."""
    return float(notebook.metadata["lab"]["budget_seconds"])


def run(source: Path) -> tuple[float, float]:
    """Execute a notebook as JupyterLab would: seconds it took, and of them the kernel computed.

    Raises what a cell raises, RuntimeError for anything written to stderr, and TimeoutError beyond the budget.
    """
    notebook = notebook_of(source)
    limit = budget(notebook)
    client = NotebookClient(
        notebook, timeout=HANGS, kernel_name="python3", store_widget_state=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )  # fmt: skip
    began, computed = time.monotonic(), _kernels()
    try:
        client.execute()
    finally:
        spent, computed = time.monotonic() - began, _kernels() - computed
        OUT.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, OUT / f"{source.stem}.ipynb")
    noise = stderr_of(notebook)
    if noise:
        raise RuntimeError(f"{source.stem} writes to stderr: {noise[:500]}")
    if spent > limit:
        raise TimeoutError(
            f"{source.stem} took {spent:.1f} s ({computed:.1f} s computing), its budget is {limit:.0f} s"
        )
    return spent, computed


def _kernels() -> float:
    """Seconds that the kernels ended so far have computed, over all threads."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime


def stderr_of(notebook: nbformat.NotebookNode) -> str:
    """What the cells wrote to stderr: warnings a reader would see in red."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "".join(o["text"] for o in outputs if o.get("name") == "stderr")


def chosen(names: Sequence[str]) -> list[Path]:
    """The sources whose names begin so; all where none is named."""
    found = [s for s in sources() if not names or s.name.startswith(tuple(names))]
    if not found:
        sys.exit(
            f"no notebook begins with {', '.join(names)}; there are {', '.join(s.stem for s in sources())}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python notebooks", description="Write and run the notebooks.")
    parser.add_argument("what", choices=("write", "run"))
    parser.add_argument("names", nargs="*", help="beginnings of names; none: all")
    args = parser.parse_args()
    if args.what == "write":
        return write()
    for source in chosen(args.names):
        spent, computed = run(source)
        allowed = budget(notebook_of(source))
        print(f"{source.stem:<28} {spent:5.1f} s of {allowed:.0f} s ({computed:.1f} s computing)", flush=True)


if __name__ == "__main__":
    main()
