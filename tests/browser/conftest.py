"""One JupyterLab and one browser for all tests of this folder; every test file opens notebooks of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page

from tests.browser.driver import Notebook, browser_page, write_notebook
from tests.browser.server import Server, jupyterlab


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """JupyterLab on an empty folder."""
    with jupyterlab(tmp_path_factory.mktemp("notebooks")) as running:
        yield running


@pytest.fixture(scope="session")
def page() -> Iterator[Page]:
    """The browser's window."""
    with browser_page() as window:
        yield window


@pytest.fixture(scope="module")
def opened(server: Server, page: Page) -> Callable[[str | Path, list[str] | Path], Notebook]:
    """opened(name, cells or a notebook's path) -> the notebook, open, its kernel waiting."""

    def make(name: str | Path, what: list[str] | Path) -> Notebook:
        path = server.root / f"{name}.ipynb"
        path.write_bytes(what.read_bytes()) if isinstance(what, Path) else write_notebook(path, what)
        notebook = Notebook(page)
        notebook.listen()
        notebook.open(server, path.name)
        return notebook

    return make
