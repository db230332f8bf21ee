"""The first notebook in a real JupyterLab: runs clean, draws, asks nothing of any other machine."""

from __future__ import annotations

import pytest

from tests.browser.server import REPOSITORY

pytestmark = pytest.mark.browser


def test_the_first_notebook_runs_clean(opened):
    notebook = opened("first_look", REPOSITORY / "notebooks" / "00_first_look.ipynb")
    notebook.run_all()
    notebook.page.wait_for_selector(".jp-OutputArea .js-plotly-plot .main-svg")
    notebook.shot("first_look", ".js-plotly-plot")
    assert notebook.page.locator("[data-title*='Share']").count() == 0
    notebook.assert_clean()
