"""Explorer: the linked views of one model and one item on one screen. See `explore`.

The model runs in a worker thread (`lab.app.worker`), callbacks only change state and ask it for work; they are right
whichever thread calls them. What goes wrong stands as one red line in the app.
"""

from __future__ import annotations

import re
import threading
import traceback
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ipywidgets import VBox
from numpy.typing import NDArray

from lab.app import experiment
from lab.app.answers_panel import Column, answers_html
from lab.app.screen import FRAMES, LENS, NEEDED, NOTHING, OVERLAYS, SEGMENT, TOKEN, Panels, laid_out
from lab.app.segments import blocked_of
from lab.app.session import Answered, Session
from lab.app.worker import Job, Worker
from lab.edges import presets
from lab.edges.policy import Policy
from lab.errors import LabError, UsageError
from lab.result import Result
from lab.view.edge_editor import EdgeEditor
from lab.view.frame_strip import FrameStrip, empty
from lab.view.layer_map import DepthMap, LayerMap
from lab.view.lens_table import LensTable
from lab.view.selection import Selection

LANES = ("apply", "look", "paint", "flow", "trace")


class Explorer:
    """One model and one item.

    selection, strip, editor, lens, depth, flow, trace   what is chosen, and the views
    clean, edited, pinned                                answers: `Answered`
    traced                                               the last trace of all pathways, as far as it came
    """

    def __init__(
        self, model: Any, item: Any, *, n_frames: int = 8, folder: str | Path = "experiments"
    ) -> None:
        self.session = Session(model, item, n_frames=n_frames)
        self._lock = threading.RLock()
        self.panels = Panels(self._act, str(Path(folder) / f"{_slug(self.session.item)}.yaml"))
        self.worker = Worker(LANES, failed=self._fail, changed=self._busy)
        self.selection = Selection(frame=0, layer=self.session.n_layers)
        self.clean = self.session.answer(Policy(cuts=()), "clean")
        self.edited, self.pinned, self.traced = (
            self.clean,
            list[Answered](),
            _nothing(self.session, "pathway"),
        )
        self.overlay, self.source, self._patch = NOTHING, SEGMENT, None
        self._views()
        self.selection.observe(lambda _: self._guard(self.look), "token")
        self.selection.observe(lambda _: self._guard(self._paint), "layer")
        self.flow.widget().observe(lambda _: self._guard(self._chose_reader), "column")
        self._show_answers()

    def _views(self) -> None:
        s, chosen = self.session, self.selection
        self.strip = FrameStrip(
            empty(s.positions.shape), s.pictures, positions=s.positions, seconds=s.seconds, selection=chosen
        )
        self.editor = EdgeEditor(
            s.names, s.pairs, n_layers=s.n_layers, n_heads=s.n_heads, labels=s.labels, more=self._presets(), on_apply=self.apply, selection=chosen,
        )  # fmt: skip
        self.lens = LensTable(s.lens(None), selection=chosen)
        self.depth = DepthMap(s.needed(Policy(cuts=())), selection=chosen)
        self.flow = LayerMap(_nothing(s, "reader"), selection=chosen)
        self.trace = LayerMap(self.traced, selection=chosen)

    def _presets(self) -> dict[str, NDArray[np.bool_]]:
        """The paper's policies at this depth, and an early exit; those that the grid cannot show are left out."""
        n = self.session.n_layers
        made = {f"Map the Flow, {name}": presets.paper(name, "released", n) for name in ("7b", "13b")}
        made[f"video exits after layer {n // 2}"] = presets.video_exit(n // 2, n)
        out: dict[str, NDArray[np.bool_]] = {}
        for name, policy in made.items():
            try:
                out[name] = self.cells(policy)
            except LabError:
                continue
        return out

    # ---- what a person does -------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """What the editor cuts now."""
        return Policy.from_dict(self.editor.policy(), "the editor")

    def cells(self, policy: Policy) -> NDArray[np.bool_]:
        """A policy on the editor's grid. Raises ConfigError for what whole segments cannot say."""
        s = self.session
        return blocked_of(policy, s.tokens, s.names, s.n_layers, s.n_heads, s.item)

    def apply(self) -> None:
        """Answer under what the editor cuts; the newest Apply wins."""
        self.worker.submit("apply", self._applied(self.policy, self.editor.grid.removed))

    def undo(self) -> None:
        """Take the editor's last step back."""
        self.editor.undo()

    def redo(self) -> None:
        """Take it again."""
        self.editor.redo()

    def look(self) -> None:
        """Show the lens and (where runs are quick) the flow of the chosen token."""
        token = self.selection.token
        self.worker.submit("look", self._looked(token))
        if token is not None and self.session.light:
            self.worker.submit("flow", self._flowed(token))

    def _paint(self) -> None:
        self.worker.submit("paint", self._painted())

    def follow_flow(self) -> None:
        """Trace where the chosen token's information goes: exact knock-outs."""
        if self.selection.token is None:
            raise UsageError("no token is chosen; click on a patch of the video first")
        self.worker.submit("flow", self._flowed(self.selection.token))

    def trace_all(self) -> None:
        """Trace the paper's pathways in a window round every layer. `traced` keeps what is computed, also after Stop."""
        self.worker.submit("trace", self._traced())

    def stop(self) -> None:
        """End all work after the piece that runs; what was computed stays."""
        self.worker.stop()
        self._say("stopped; what was computed is kept")

    def pin(self, name: str = "") -> None:
        """Keep the edited answer as a column to compare with."""
        pinned = replace(self.edited, name=name or f"run {len(self.pinned) + 1}")
        self.pinned.append(pinned)
        self.selection.set(run=pinned.name)
        self._show_answers()

    def unpin(self) -> None:
        """Let the pinned runs go."""
        self.pinned.clear()
        self.selection.set(run=None)
        self._show_answers()

    def show(self, overlay: str) -> None:
        """Paint something on the frames: one of `lab.app.screen.OVERLAYS`."""
        if overlay not in OVERLAYS:
            raise UsageError(f"no overlay {overlay!r}; there are: {', '.join(OVERLAYS)}")
        self.overlay = overlay
        self.panels.overlay.chosen = {"overlay": overlay}
        self._paint()

    def cut_from(self, source: str) -> None:
        """Whether a flow cuts the chosen token's whole segment or the token alone."""
        if source not in (SEGMENT, TOKEN):
            raise UsageError(f"cut {source!r}: use {SEGMENT!r} or {TOKEN!r}")
        self.source = source
        self.panels.source.chosen = {"source": source}

    def save(self, path: str | Path | None = None) -> Path:
        """Write the experiment: model, item, cuts and what the screen shows. `vlab run` carries it out."""
        target = Path(self.panels.file.path if path is None else path)
        view = {"layers": list(self.editor.grid.layers), "heads": list(self.editor.grid.heads)}
        view |= {"selection": self.selection.to_dict(), "overlay": self.overlay, "source": self.source}
        said = experiment.save(target, self.session.model, self.session.ready, self.policy, view)
        self.panels.file.path = str(target)
        self._say(said)
        return target

    def open(self, path: str | Path | None = None) -> None:
        """Take an experiment or policy file back: cuts, brush and selection as they were saved; then answer.

        Raises ConfigError for other files, and for policies that cut parts of segments; then nothing has changed.
        """
        source = Path(self.panels.file.path if path is None else path)
        policy, view, ids = experiment.load(source)
        cells, chosen = self.cells(policy), Selection.from_dict(view.get("selection", {}))
        self.editor.brush(view.get("layers", (1, self.session.n_layers)), view.get("heads", ()))
        self.editor.put(cells)
        self.cut_from(view.get("source", SEGMENT))
        if view:
            self.selection.clear()
            self.selection.set(**chosen.to_dict())
            self.show(view.get("overlay", NOTHING))
        self.panels.file.path = str(source)
        mine = getattr(self.session.item, "id", "")
        self._say(
            f"opened {source}" + (f"; it was about {', '.join(ids)}" if ids and mine not in ids else "")
        )
        self.apply()

    def wait(self, seconds: float = 60.0) -> bool:
        """Wait until the worker has nothing to do; False if it still has."""
        return self.worker.wait(seconds)

    def close(self) -> None:
        """End the worker's thread."""
        self.worker.close()

    # ---- jobs: pieces of work in the worker's thread --------------------------------------------------------------------

    def _applied(self, policy: Policy, removed: int) -> Job:
        self.editor.widget().set_trait("busy", True)
        try:
            self.edited = self.session.answer(policy, "edited", removed)
            self.clean = self.session.answer(Policy(cuts=()), "clean")  # the model may have changed meanwhile
            self._clear_error()
            self._show_answers()
        finally:
            self.editor.widget().set_trait("busy", False)
        yield
        self.depth.show(self.session.needed(policy))
        if self.overlay == NEEDED:
            self.strip.show(self._needed_here())

    def _looked(self, token: int | None) -> Job:
        if token is not None and self.session.is_video(token):
            self._patch = token
        self.lens.show(self.session.lens(self._patch))
        yield

    def _painted(self) -> Job:
        if self.overlay == LENS:
            self.strip.show(self.session.lens_on_video(self.selection.layer or self.session.n_layers))
        elif self.overlay == NEEDED:
            self.strip.show(self._needed_here())
        elif self.overlay == FRAMES:
            yield from self._framed()
        else:
            self.strip.show(empty(self.session.positions.shape))

    def _needed_here(self) -> Result:
        layer = self.selection.layer or self.session.n_layers
        part = self.depth.at(layer).values
        return self.session.on_frames(part, "1: layer must compute it", f"tokens layer {layer} must compute")

    def _framed(self) -> Job:
        s = self.session
        for found in s.traced(
            s.frames_out(),
            "effect of each frame: nobody after it reads it (exact knock-out in all layers; below 0: the answer loses)",
            whole=True,
        ):
            self.strip.show(s.on_frames(s.by_frame(found.values[0]), found.unit, found.name))
            yield

    def _flowed(self, token: int) -> Job:
        s, alone = self.session, self.source == TOKEN
        what = f"{s.label(token)} alone" if alone else s.labels[s.names.index(s.segment_of(token))]
        name = f"{what} not read by each segment, in {s.window} layers round each (exact knock-out of the clean run; below 0: the answer loses)"
        yield from self._filling(self.flow, s.traced(s.from_token(token, alone=alone), name))

    def _traced(self) -> Job:
        s = self.session
        name = f"All pathways, each cut in {s.window} layers round each (exact knock-out of the clean run; below 0: the answer loses)"
        for self.traced in s.traced(s.usual(), name):
            self.trace.show(self.traced)
            self.panels.top.progress = self.traced.notes["done"]
            yield

    def _filling(self, view: LayerMap, parts: Generator[Result, None, None]) -> Job:
        for part in parts:
            view.show(part)
            yield

    # ---- what the screen says ---------------------------------------------------------------------------------------------

    def _show_answers(self) -> None:
        s, item = self.session, self.session.item
        runs = [
            Column(name, a.p, f"{a.removed:,} cut")
            for name, a in [
                ("clean", self.clean),
                ("edited", self.edited),
                *((a.name, a) for a in self.pinned),
            ]
        ]
        right = item.answer if item is not None and isinstance(item.answer, int) else None
        self.panels.answers.value = answers_html(s.choices.names, s.choices.unit, runs, right)

    def _chose_reader(self) -> None:
        """A column of the flow map was chosen: so is its pair in the editor."""
        s, token, reader = self.session, self.selection.token, self.flow.widget().column  # type: ignore[attr-defined]
        if token is not None and reader in s.labels:
            self.selection.set(pair=(s.names[s.labels.index(reader)], s.segment_of(token)))

    def _say(self, words: str) -> None:
        self.panels.top.state = words

    def _clear_error(self) -> None:
        self.panels.top.error = self.panels.top.details = ""

    def _busy(self, lanes: tuple[str, ...]) -> None:
        top = self.panels.top
        with top.hold_sync():
            top.disabled = [] if lanes else ["stop"]
            if "trace" not in lanes:
                top.progress = -1.0
            if lanes:
                top.state = f"working: {', '.join(lanes)}"
            elif top.state.startswith("working"):
                top.state = "ready"

    def _fail(self, e: BaseException) -> None:
        """One red line; what a programmer wants to see folds out below it."""
        words = str(e) if isinstance(e, LabError) else f"{type(e).__name__}: {e}"
        top = self.panels.top
        with top.hold_sync():
            top.error = " ".join(words.split())
            top.details = "".join(traceback.format_exception(e))[-4000:]

    def _guard(self, work: Callable[[], Any]) -> None:
        """Run a callback, from whatever thread; what it raises is shown."""
        with self._lock:
            try:
                self._clear_error()
                work()
            except Exception as e:  # every error of a callback would vanish in a log
                self._fail(e)

    def _act(self, name: str, arguments: dict[str, Any]) -> None:
        path, value = arguments.get("path") or None, str(arguments.get("value", ""))
        actions: dict[str, Callable[[], Any]] = {
            "trace": self.trace_all, "stop": self.stop, "flow": self.follow_flow, "pin": self.pin, "unpin": self.unpin,
            "overlay": lambda: self.show(value), "source": lambda: self.cut_from(value),
            "save": lambda: self.save(path), "open": lambda: self.open(path),
        }  # fmt: skip
        if name in actions:
            self._guard(actions[name])

    # ---- the screen -------------------------------------------------------------------------------------------------------

    def widget(self) -> VBox:
        """The whole screen; always the same one."""
        if not hasattr(self, "_screen"):
            v = (self.strip, self.editor, self.lens, self.depth, self.flow, self.trace)
            self._screen = laid_out(self.session.item, self.panels, *(view.widget() for view in v))
        return self._screen

    def __repr__(self) -> str:
        item, grid = self.session.item, self.editor.grid
        about = repr(item.question) if item is not None else "a prompt of your own"
        return f"<Explorer of {about}: {grid.removed:,} of {grid.total:,} edges cut>"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.widget()._repr_mimebundle_(**kwargs)


def explore(model: Any, item: Any, *, n_frames: int = 8, folder: str | Path = "experiments") -> Explorer:
    """Explore one item on one screen: scrub, pick a patch, read its lens and where it goes, cut edges, Apply.

    model     what `lab.load` gives
    item      a VideoQA or a Ready with one video
    n_frames  frames sampled where the item is not prepared yet
    folder    where Save puts experiments
    Raises UsageError for several worlds, or a prompt without video tokens.
    """
    return Explorer(model, item, n_frames=n_frames, folder=folder)


def _slug(item: Any) -> str:
    return (
        re.sub(r"[^\w-]+", "-", str(getattr(item, "id", "") or "experiment"))[:60].strip("-") or "experiment"
    )


def _nothing(session: Session, axis: str) -> Result:
    """A map before anything is traced."""
    layers = list(range(1, session.n_layers + 1))
    names = {"pathway": list(session.usual()), "reader": list(session.labels)}[axis]
    values = np.full((len(layers), len(names)), np.nan)
    title = {
        "pathway": "Not traced yet: press Trace all pathways",
        "reader": "Choose a patch to see which segments its information reaches",
    }[axis]
    return Result(
        values, ("layer", axis), {"layer": layers, axis: names}, session.effect_unit, {}, title, baseline=0.0
    )
