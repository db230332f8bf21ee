"""A notebook in a real JupyterLab in chromium, driven as a person would; nothing here sleeps."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Locator, Page, sync_playwright

from tests.browser.server import REPOSITORY, Server

SHOTS = REPOSITORY / "out" / "browser"
LIMIT = 60_000  # ms that anything may take
NO_CHROMIUM = (
    "the browser tests need chromium, which is not installed and could not be: "
    "apt-get install --no-install-recommends chromium fonts-dejavu-core, or set CHROMIUM to a Chrome or Chromium"
)
ARGUMENTS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--font-render-hinting=none"]
IDLE = """() => { const w = window.jupyterapp?.shell?.currentWidget;
                  return w?.sessionContext?.session?.kernel?.status === 'idle'; }"""
BAD_OUTPUT = (
    "[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']"
)
# Runs code in the notebook's kernel and gives what it printed; an error comes back as its traceback's last line.
EXECUTE = """async (code) => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const future = kernel.requestExecute({code, store_history: false, stop_on_error: false});
    let out = "", error = null;
    future.onIOPub = (m) => {
        if (m.header.msg_type === 'stream') out += m.content.text;
        if (m.header.msg_type === 'error') error = m.content.ename + ': ' + m.content.evalue;
    };
    await future.done;
    return {out, error}; }"""


# Where a point of a plotly figure lies on the page.
PLACE = """([selector, x, y]) => {
    const gd = document.querySelector(selector), box = gd.getBoundingClientRect(), layout = gd._fullLayout;
    return [box.x + layout.xaxis._offset + layout.xaxis.c2p(x), box.y + layout.yaxis._offset + layout.yaxis.c2p(y)]; }"""


@dataclass
class Notebook:
    """One open notebook. `page_errors`, `console` and `outside` fill while the page lives."""

    page: Page
    page_errors: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def listen(self) -> None:
        """Note what goes wrong in the page, and every request that would leave this machine."""
        self.page.on("pageerror", lambda e: self.page_errors.append(str(e)[:500]))
        self.page.on("console", lambda m: self.console.append(m.text[:300]) if m.type == "error" else None)
        self.page.on("request", lambda r: self.outside.append(r.url[:200]) if leaves(r.url) else None)

    def open(self, server: Server, name: str) -> None:
        """Load the page of a notebook and wait for its kernel."""
        self.page.goto(server.url(name), wait_until="domcontentloaded")
        self.page.wait_for_selector("#jupyterlab-splash", state="detached")
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Notebook-cell")
        self.page.wait_for_function(IDLE)

    def run_all(self) -> None:
        """Run every cell; ends when the last one has."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_function(IDLE)
        assert self.bad_outputs() == []

    def theme(self, name: str) -> None:
        """Switch to "light" or "dark"."""
        light = name == "light"
        change = f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {name.title()}'}})"
        self.page.evaluate(change)
        self.page.wait_for_selector(f"body[data-jp-theme-light='{str(light).lower()}']", state="attached")

    def kernel(self, expression: str) -> Any:
        """The value of a Python expression in the kernel, through JSON."""
        reply = self.page.evaluate(EXECUTE, f"import json; print(json.dumps({expression}))")
        assert reply["error"] is None, f"{expression}: {reply['error']}"
        return json.loads(reply["out"])

    def run(self, code: str) -> None:
        """Python statements in the kernel."""
        reply = self.page.evaluate(EXECUTE, code)
        assert reply["error"] is None, f"{code}: {reply['error']}"

    def until(self, expression: str, most: int = 200) -> None:
        """Ask the kernel until the expression is true; each answer is the pause before the next question."""
        for _ in range(most):
            if self.kernel(f"bool({expression})"):
                return
        raise AssertionError(f"still not true in the kernel: {expression}")

    def find(self, selector: str) -> Locator:
        """One element, scrolled into view (below the fold nothing gets the mouse)."""
        found = self.page.locator(selector).first
        found.scroll_into_view_if_needed()
        return found

    def click_point(self, root: str, x: float, y: float) -> None:
        """Click where (x, y) lies in the plotly figure below `root`."""
        selector = f"{root} .js-plotly-plot"
        self.find(selector)
        left, top = self.page.evaluate(PLACE, [selector, x, y])
        self.page.mouse.move(left - 3, top - 3)
        self.page.mouse.click(left, top)

    def drawn(self, root: str, what: str) -> Any:
        """A JavaScript expression of the plotly figure's element `gd` below `root`."""
        return self.page.evaluate(f"(s) => {{ const gd = document.querySelector(s); return {what}; }}", f"{root} .js-plotly-plot")  # fmt: skip

    def until_drawn(self, root: str, what: str) -> None:
        """Wait until a JavaScript expression of `gd` is true."""
        test = f"(s) => {{ const gd = document.querySelector(s); return gd && gd._fullLayout && ({what}); }}"
        self.page.wait_for_function(test, arg=f"{root} .js-plotly-plot")

    def pixels(self, selector: str) -> bytes:
        """What an element looks like, as PNG bytes."""
        return self.find(selector).screenshot(animations="disabled")

    def until_changed(self, selector: str, before: bytes, most: int = 60) -> None:
        """Wait until an element looks other than in `before`; each look is the pause before the next."""
        for _ in range(most):
            if self.pixels(selector) != before:
                return
        raise AssertionError(f"{selector} looks as before")

    def shot(self, name: str, selector: str | None = None) -> Path:
        """A picture for people, out/browser/NAME.png."""
        path = SHOTS / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if selector is None:
            self.page.screenshot(path=path)
            return path
        size = self.page.viewport_size or {"width": 1400, "height": 1100}
        tall = int(self.find(selector).evaluate("(e) => e.getBoundingClientRect().height")) + 400
        self.page.set_viewport_size({"width": size["width"], "height": max(size["height"], tall)})
        self.find(selector).screenshot(path=path, animations="disabled")
        self.page.set_viewport_size(size)  # type: ignore[arg-type]
        return path

    def bad_outputs(self) -> list[str]:
        """Errors and stderr shown below cells."""
        return self.page.locator(BAD_OUTPUT).all_inner_texts()

    def assert_clean(self) -> None:
        """No page error, nothing on stderr, no request that left 127.0.0.1."""
        assert self.page_errors == []
        assert self.bad_outputs() == []
        assert self.outside == []


def leaves(url: str) -> bool:
    """Whether a request goes to another machine."""
    return url.startswith(("http", "ws")) and "://127.0.0.1:" not in url


def chromium() -> str:
    """The browser's program. A missing one fails the test: it must never look like a pass."""
    for name in (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"):
        if name and (found := shutil.which(name)):
            return found
    pytest.fail(NO_CHROMIUM, pytrace=False)


@contextlib.contextmanager
def browser_page(width: int = 1400, height: int = 1100) -> Iterator[Page]:
    """A fresh window."""
    program = chromium()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, headless=True, args=ARGUMENTS)
        page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        page.set_default_timeout(LIMIT)
        try:
            yield page
        finally:
            browser.close()


def write_notebook(path: Path, cells: list[str]) -> Path:
    """A notebook of code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return path
