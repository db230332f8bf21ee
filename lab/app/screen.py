"""The explorer's screen: which widgets stand where. Makes them and lays them out; what they do is said elsewhere."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as W

from lab.carriers import LETTERS, VideoQA
from lab.view.controls import Controls

NOTHING, LENS, FRAMES, NEEDED = "nothing", "lens: p(answer)", "effect of each frame", "still needed here"
OVERLAYS = (NOTHING, LENS, FRAMES, NEEDED)
SEGMENT, TOKEN = "its segment", "this token alone"
Act = Callable[[str, dict[str, Any]], None]


class Panels:
    """The rows of controls, and the texts. act: called with the name of what was pressed, and its arguments."""

    def __init__(self, act: Act, path: str) -> None:
        self.top = Controls(
            "Work", [("trace", "Trace all pathways"), ("stop", "Stop")], act, disabled=["stop"], state="ready"
        )
        self.overlay = Controls(
            "What is painted on the frames", [], act, choices=[["overlay", "on the frames", list(OVERLAYS)]]
        )
        self.source = Controls(
            "Where the chosen token's information goes", [("flow", "Trace from here")], act,
            choices=[["source", "cut", [SEGMENT, TOKEN]]],
        )  # fmt: skip
        self.pins = Controls("Runs", [("pin", "Pin this run"), ("unpin", "Clear pins")], act)
        self.file = Controls(
            "Experiment file", [("save", "Save"), ("open", "Open")], act, with_path=True, path=path
        )
        self.answers = W.HTML()
        self.answers.add_class("vl-answers")


def laid_out(
    item: VideoQA | None,
    panels: Panels,
    strip: Any,
    editor: Any,
    lens: Any,
    depth: Any,
    flow: Any,
    trace: Any,
) -> W.VBox:
    """All of it, class vl-explorer."""
    right = _panel("Answer", [panels.answers, panels.pins, panels.file, depth], "1 1 380px")
    left = _panel("Edges: rows read, columns are read", [editor], "1 1 480px")
    reading = _panel("Lens", [lens], "1 1 480px")
    going = _panel("Where its information goes", [panels.source, flow], "1 1 380px")
    box = W.VBox(
        [
            W.HTML(_question(item)), panels.top, _panel("Video", [panels.overlay, strip], "1 1 auto"),
            _row([left, right]), _row([reading, going]), _panel("All pathways", [trace], "1 1 auto"),
        ]
    )  # fmt: skip
    box.add_class("vl-explorer")
    return box


def _row(children: Sequence[W.Widget]) -> W.HBox:
    return W.HBox(list(children), layout=W.Layout(flex_flow="row wrap", align_items="flex-start"))


def _panel(title: str, children: Sequence[W.Widget], flex: str) -> W.VBox:
    box = W.VBox(
        [W.HTML(f"<h3>{html.escape(title)}</h3>"), *children], layout=W.Layout(flex=flex, min_width="0")
    )
    box.add_class("vl-panel")
    return box


def _question(item: VideoQA | None) -> str:
    if item is None:
        return "<h3>A prompt of your own</h3>"
    options = " ".join(f"({a}) {html.escape(o)}" for a, o in zip(LETTERS, item.options, strict=False))
    return f"<h3>{html.escape(item.question)}</h3><span class='vl-note'>{options}</span>"
