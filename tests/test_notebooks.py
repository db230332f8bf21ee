"""Notebooks: each .ipynb is its .py, without outputs or widget state. (That they run, in time, is for `.ci/run` to see.)"""

import ast
import json

import nbformat
import pytest

from notebooks.__main__ import budget, chosen, notebook_of, sources, stderr_of, text_of

NAMES = [
    "00_first_look", "10_information_flow", "20_prune_edges", "30_mod_and_token_drop", "40_lens_and_patching",
    "50_bring_your_own_model", "60_streaming",
]  # fmt: skip
each = pytest.mark.parametrize("source", sources(), ids=lambda p: p.stem)


def test_the_seven_notebooks_are_there():
    folder = sources()[0].parent
    assert [p.stem for p in sources()] == sorted(p.stem for p in folder.glob("*.ipynb")) == NAMES


@each
def test_notebook_equals_its_source(source):
    """After a change: python notebooks write"""
    assert source.with_suffix(".ipynb").read_text(encoding="utf-8") == text_of(source)


@each
def test_no_outputs_and_no_widget_state(source):
    notebook = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert set(notebook["metadata"]) == {"kernelspec", "lab"} and nbformat.validate(notebook) is None
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert code and all(c["outputs"] == [] and c["execution_count"] is None for c in code)
    assert not any(c["metadata"] for c in notebook["cells"])


@each
def test_shape(source):
    """At most 15 cells, words before code, a budget of at most a minute; the first code says what numbers depend on."""
    notebook = notebook_of(source)
    kinds = [c.cell_type for c in notebook.cells]
    assert len(kinds) <= 15 and kinds[0] == kinds[-1] == "markdown" and 0 < budget(notebook) <= 60
    first = ast.parse(next(c.source for c in notebook.cells if c.cell_type == "code")).body
    assert ast.unparse(first[-1]) == "lab.about()"
    assert all(isinstance(node, ast.Import | ast.ImportFrom) for node in first[:-1])


def test_writing_twice_gives_the_same_bytes_and_cells_keep_their_ids():
    one, two = (text_of(sources()[0]) for _ in range(2))
    assert one == two
    ids = [c.id for c in notebook_of(sources()[0]).cells]
    assert ids == [f"cell-{i:02d}" for i in range(len(ids))]


def test_what_cells_write_to_stderr_is_seen():
    cell = nbformat.v4.new_code_cell(
        "", outputs=[nbformat.v4.new_output("stream", name=n, text=n) for n in ("stdout", "stderr")]
    )
    assert stderr_of(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell("x")])) == "stderr"


def test_an_unknown_name_is_refused_with_the_known_ones():
    assert [s.stem for s in chosen(["20", "60"])] == ["20_prune_edges", "60_streaming"]
    with pytest.raises(SystemExit, match="no notebook begins with 99; there are 00_first_look"):
        chosen(["99"])
