"""The explorer in a real JupyterLab: scrub, pick, cut, Apply, undo, save, reopen, stop; what a person sees must move."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lab.result import Result
from tests.browser.driver import Notebook
from tests.browser.server import REPOSITORY

pytestmark = pytest.mark.browser

SET_UP = """
from pathlib import Path
import numpy as np
import lab
model = lab.load("tiny", device="cpu")
items = lab.load_items(Path(lab.__file__).parent / "data" / "clips" / "items.yaml")
app = lab.explore(model, items[0], folder="experiments")
"""
MAIN, GRID = ".vl-explorer .vl-strip-main", ".vl-explorer .vl-grid"


@pytest.fixture(scope="module")
def shown(opened) -> Iterator[Notebook]:
    """The explorer of `tiny` and its first item."""
    notebook = opened("explorer", [SET_UP, "app"])
    notebook.run_all()
    notebook.page.wait_for_function("() => document.querySelector('.vl-strip')?.dataset.paints > 0")
    notebook.page.wait_for_selector(f"{GRID} td.vl-c1")
    yield notebook
    notebook.assert_clean()


def moved(notebook: Notebook, selector: str, act: Callable[[], object], until: str) -> None:
    """Do something; wait until the kernel says so and no work is left; the picture must be another."""
    before = notebook.pixels(selector)
    act()
    notebook.until(until)
    notebook.until("app.wait(20)")
    notebook.until_changed(selector, before)


def cell(notebook: Notebook, query: str, key: str) -> tuple[float, float]:
    """The middle of a cell of the editor, on the page."""
    q, k = (notebook.kernel(f"app.session.names.index({name!r})") for name in (query, key))
    box = notebook.find(f"{GRID} td[data-q='{q}'][data-k='{k}']").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(notebook: Notebook, start: tuple[str, str], end: tuple[str, str]) -> None:
    """With the mouse, from cell to cell (query, key)."""
    cell(notebook, *start)  # in view, so that the places below are those on the screen
    (x0, y0), (x1, y1) = cell(notebook, *start), cell(notebook, *end)
    notebook.page.mouse.move(x0, y0)
    notebook.page.mouse.down()
    notebook.page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
    notebook.page.mouse.move(x1, y1)
    notebook.page.mouse.up()


def button(notebook: Notebook, name: str) -> None:
    notebook.page.locator(f".vl-explorer button[aria-label='{name}']").first.click()


def edited_answer(notebook: Notebook) -> list[float]:
    """The probabilities that stand in the table's column "edited"."""
    rows = notebook.page.locator(".vl-answers tbody tr td:nth-child(3)")
    return [float(v) for v in rows.evaluate_all("(tds) => tds.map((td) => td.dataset.p)")]


def reset(notebook: Notebook) -> None:
    notebook.run("app.editor.brush((1, app.session.n_layers), ()); app.editor.reset(); app.apply()")
    notebook.until("app.wait(20) and app.edited.removed == 0")


def test_the_slider_scrubs_the_video(shown):
    shown.find(".vl-strip .vl-frame").focus()
    moved(shown, MAIN, lambda: shown.page.keyboard.press("ArrowRight"), "app.selection.frame == 1")


def test_a_click_on_a_patch_shows_its_lens_and_where_it_goes(shown):
    flow = shown.pixels(".vl-layers canvas")

    def click() -> None:
        box, (rows, cols) = shown.find(MAIN).bounding_box(), shown.kernel("app.session.positions.shape[1:]")
        shown.page.mouse.click(box["x"] + box["width"] * 2.5 / cols, box["y"] + box["height"] * 1.5 / rows)

    moved(shown, MAIN, click, "app.selection.patch == (1, 2)")
    assert shown.kernel("app.selection.token == int(app.session.positions[app.selection.frame, 1, 2])")
    frame = shown.kernel("app.selection.frame")
    shown.page.wait_for_selector(f".vl-lens-table th:has-text('f{frame} r1 c2')")
    shown.until_changed(".vl-layers canvas", flow)


def test_what_is_painted_on_the_frames(shown):
    select = ".vl-explorer select[aria-label='on the frames']"
    for overlay in ("lens: p(answer)", "effect of each frame"):
        moved(
            shown, MAIN, lambda o=overlay: shown.find(select).select_option(o), f"app.overlay == {overlay!r}"
        )
    assert shown.kernel("bool(np.isfinite(app.strip.result().values).all())")
    moved(shown, MAIN, lambda: shown.find(select).select_option("nothing"), "app.overlay == 'nothing'")


def test_a_drag_cuts_apply_answers_and_undo_takes_it_back(shown):
    reset(shown)
    clean = edited_answer(shown)
    first, last = ("option:0", "frame:0"), ("option:3", "frame:7")
    moved(shown, GRID, lambda: drag(shown, first, last), "app.editor.grid.removed > 0")
    removed = shown.kernel("app.editor.grid.removed")
    assert f"{removed:,} of" in shown.page.locator(".vl-count").inner_text()
    assert edited_answer(shown) == clean  # the model is asked only on Apply
    moved(shown, ".vl-answers", lambda: button(shown, "Apply"), f"app.edited.removed == {removed}")
    told = edited_answer(shown)
    assert told == shown.kernel("app.edited.p") and told != clean
    with_dense_masks = "app.session.choices.p(model(app.session.ready, policy=app.policy)[0, -1])"
    assert np.allclose(told, shown.kernel(with_dense_masks), atol=1e-6)

    moved(shown, GRID, lambda: button(shown, "Undo"), "app.editor.grid.removed == 0")
    moved(shown, GRID, lambda: button(shown, "Redo"), f"app.editor.grid.removed == {removed}")
    shown.find(f"{GRID} td[tabindex='0']").focus()
    moved(shown, GRID, lambda: shown.page.keyboard.press("Control+z"), "app.editor.grid.removed == 0")
    moved(shown, ".vl-answers", lambda: button(shown, "Apply"), "app.edited.removed == 0")
    assert edited_answer(shown) == clean


def test_the_editor_by_keyboard_with_a_preset_layers_and_heads(shown):
    reset(shown)
    names = shown.kernel("app.session.names")
    x, y = cell(shown, "last", "frame:0")
    shown.page.mouse.click(x, y)  # blocks the cell
    shown.until("app.editor.grid.removed > 0")
    shown.page.keyboard.press("ArrowRight")
    moved(shown, GRID, lambda: shown.page.keyboard.press("Space"), "len(app.policy.cuts) == 1")
    assert shown.kernel("app.selection.pair") == ["last", names[names.index("frame:0") + 1]]
    reset(shown)
    shown.find("input[aria-label='Last layer of the brush']").fill("3")
    shown.page.keyboard.press("Enter")
    shown.until("app.editor.grid.layers == (1, 3)")
    shown.find(".vl-edges button[aria-label='Head 1']").click()
    shown.until("tuple(app.editor.grid.heads) == (1,)")
    preset = "no video → last"
    moved(
        shown, GRID, lambda: shown.find("select[aria-label='Preset']").select_option(preset),
        "app.editor.grid.blocked.any((2, 3)).sum() == 3 and app.editor.grid.blocked[:3, 1].any()",
    )  # fmt: skip
    reset(shown)


def test_lens_table_and_maps_choose_layer_token_and_frame(shown):
    shown.run("app.selection.set(layer=8, frame=0, token=None); app.wait(20)")
    table = ".vl-explorer .vl-lens-table"
    moved(
        shown,
        table,
        lambda: shown.find(f"{table} td[data-i='2'][data-j='1']").click(),
        "app.selection.layer == 3",
    )
    assert shown.kernel("app.selection.token in app.lens.result().notes['where']['position']")
    word = shown.kernel("app.lens.widget().words[0]")
    moved(
        shown, table, lambda: shown.find(".vl-lens select").select_option(word), f"app.lens.settings()['followed'] == {word!r}"
    )  # fmt: skip
    depth = ".vl-depth canvas.vl-map-canvas"
    shown.find(depth).focus()
    before = shown.kernel("app.selection.layer")
    moved(shown, depth, lambda: shown.page.keyboard.press("ArrowUp"), f"app.selection.layer == {before + 1}")
    moved(shown, depth, lambda: shown.page.keyboard.press("ArrowRight"), "app.selection.frame == 1")


def test_runs_are_pinned(shown):
    reset(shown)
    moved(shown, ".vl-answers", lambda: button(shown, "Pin this run"), "len(app.pinned) == 1")
    moved(shown, ".vl-answers", lambda: button(shown, "Clear pins"), "app.pinned == []")


def test_saved_reopened_and_run_in_a_fresh_process(shown, server):
    reset(shown)
    drag(shown, ("option:1", "frame:2"), ("last", "frame:5"))
    shown.until("app.editor.grid.removed > 0")
    button(shown, "Apply")
    shown.until("app.wait(20) and app.edited.removed > 0")
    told, clean = edited_answer(shown), shown.kernel("app.clean.p")
    shown.run("kept = app.editor.grid.blocked.copy(); chosen = app.selection.to_dict()")
    path = shown.find(".vl-path")
    path.fill("experiments/mine.yaml")
    path.press("Tab")
    button(shown, "Save")
    shown.page.wait_for_selector(".vl-state:has-text('saved')")
    reset(shown)
    shown.run("app.selection.clear()")
    moved(shown, GRID, lambda: button(shown, "Open"), "app.editor.grid.removed > 0")
    shown.until("app.wait(20) and app.edited.removed > 0")
    assert shown.kernel("bool((kept == app.editor.grid.blocked).all() and chosen == app.selection.to_dict())")
    assert edited_answer(shown) == told
    found = run_again(server.root / "experiments" / "mine.yaml", server.root)
    assert np.allclose(found, [clean, told], atol=1e-6, rtol=0)


def run_again(path: Path, folder: Path) -> np.ndarray:
    """[run, choice] of `vlab run` in a process of its own."""
    out = folder / "again"
    command = [sys.executable, "-m", "lab.cli.main", "run", str(path), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    (saved,) = out.rglob("*.npz")
    return Result.load(saved).values[0]


def test_stop_ends_a_long_trace_and_keeps_what_there_is(shown):
    """Thousands of knock-outs, each of another few edges: far more than are made before the button is pressed."""
    many = "{f'{f} {i}': f'frame:{f}->last where row(k) <= {i % 4}' for f in range(8) for i in range(400)}"
    shown.run(f"usual = app.session.usual; app.session.usual = lambda: {many}; hooks = lambda: sum(len(m._forward_hooks) for m in model.modules()); open_hooks = hooks()")  # fmt: skip
    button(shown, "Trace all pathways")
    shown.until("np.isfinite(app.traced.values).sum() > 0")
    button(shown, "Stop")
    shown.until("app.wait(20)")
    done = shown.kernel("int(np.isfinite(app.traced.values).sum())")
    assert 0 < done < shown.kernel("app.traced.values.size")
    shown.page.wait_for_selector(".vl-explorer button[aria-label='Stop']:disabled")
    assert shown.kernel("int(np.isfinite(app.traced.values).sum())") == done  # nothing runs on
    assert shown.kernel(
        "hooks() == open_hooks and app.session.answer(type(app.policy)(cuts=()), 'x').p == app.clean.p"
    )
    shown.run("app.session.usual = usual")


def test_all_pathways_are_traced(shown):
    canvas = ".vl-explorer .vl-panel:has(h3:text('All pathways')) canvas"
    moved(shown, canvas, lambda: button(shown, "Trace all pathways"), "np.isfinite(app.traced.values).all()")


def test_an_error_stands_in_the_app(shown):
    path = shown.find(".vl-path")
    path.fill("experiments/nowhere.yaml")
    path.press("Tab")
    button(shown, "Open")
    shown.page.wait_for_selector(".vl-error:has-text('nowhere.yaml')")
    reset(shown)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_screen_in_both_themes(shown, theme):
    shown.theme(theme)
    shown.shot(f"explorer_{theme}", ".vl-explorer")
    paper = shown.page.locator(".vl-explorer").evaluate("(e) => getComputedStyle(e).backgroundColor")
    assert (sum(int(c) for c in paper[4:-1].split(",")) > 600) == (theme == "light")
    shown.theme("light")
