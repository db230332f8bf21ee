"""Notebooks: the .ipynb is its .py, without outputs or widget state. (That they run is for `.ci/run` to see.)"""

import json
from pathlib import Path

import jupytext
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))


def test_every_notebook_has_its_source():
    assert SOURCES and [p.stem for p in SOURCES] == sorted(p.stem for p in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_notebook_equals_its_source(source):
    """After a change: jupytext --to ipynb notebooks/NAME.py"""
    text = source.with_suffix(".ipynb").read_text()
    notebook, wanted = json.loads(text), jupytext.read(source)
    assert [("".join(c["source"]), c["cell_type"]) for c in notebook["cells"]] == [
        (c.source, c.cell_type) for c in wanted.cells
    ]
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in notebook["cells"])
    assert "widgets" not in notebook["metadata"] and len(wanted.cells) <= 15
