"""AnswerPanel: the probability of every option, in the run as it is and in the edited one, and what has changed.

panel = AnswerPanel(base, edited)      Results with the axis option (and item or seed, where runs were repeated)
panel.update(edited)                   after every Apply
panel.pin("no cross-frame")            keep the edited run under a name; compare any two
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go

from lab.errors import UsageError
from lab.result import Result
from lab.view.averages import mean_all
from lab.view.live import LiveView
from lab.view.plotly_out import to_plotly
from lab.view.selection import Selection
from lab.view.specs import AVERAGED, FigureSpec, figure_spec, text

BASE, EDITED = "base", "edited"
MAX_PINS = 6


class AnswerPanel(LiveView):
    """P(option) of two runs side by side, the difference above the bars, error bars where runs were repeated.

    base, edited   Results with the axis option; item and seed axes are averaged
    runs           name -> Result: base, edited and whatever was pinned
    Raises UsageError for other axes, or runs over different options.
    """

    css = "vl-answers"
    follows = ("run",)

    def __init__(
        self, base: Result, edited: Result | None = None, *, selection: Selection | None = None, theme: str = "auto"
    ) -> None:  # fmt: skip
        super().__init__(selection, theme)
        self.options = _options(base)
        self.runs: dict[str, Result] = {BASE: base}
        self.left = self.control("left", W.Dropdown(options=[BASE], value=BASE, description="Compare"))
        self.right = self.control("right", W.Dropdown(options=[BASE], value=BASE, description="with"))
        for css, widget in (("vl-left", self.left), ("vl-right", self.right)):
            widget.add_class(css)
        self.name = W.Text(placeholder="name of the run", layout=W.Layout(width="160px"))
        self.pin_button = W.Button(description="Pin", tooltip="keep the edited run under this name")
        self.name.add_class("vl-pin-name")
        self.pin_button.add_class("vl-pin")
        self.pin_button.on_click(lambda _: self.guarded(lambda: self.pin(self.name.value)))
        self.selection.observe(self._run_selected, "run")
        if edited is not None:
            self.update(edited)

    # ---- runs -----------------------------------------------------------------------------------------------------

    def update(self, edited: Result) -> None:
        """Show another edited run, against what was compared with it."""
        fresh = EDITED not in self.runs
        self._add(EDITED, edited)
        if fresh:
            self.right.value = EDITED
        self.refresh()

    def pin(self, name: str) -> None:
        """Keep the edited run (the base, if there is none) under a name. Raises UsageError for a name in use."""
        name = name.strip() or f"run {len(self.runs)}"
        if name in self.runs:
            raise UsageError(f"there is a run {name!r} already; give another name")
        if len(self.runs) >= MAX_PINS + 2:
            raise UsageError(
                f"{MAX_PINS} runs are pinned; unpin({next(n for n in self.runs if n not in (BASE, EDITED))!r}) first"
            )
        self._add(name, self.runs.get(EDITED, self.runs[BASE]))
        self.name.value = ""
        self.selection.set(run=name)

    def unpin(self, name: str) -> None:
        """Forget a pinned run. Raises UsageError for one that is not pinned."""
        if name in (BASE, EDITED) or name not in self.runs:
            raise UsageError(f"no pinned run {name!r}; pinned: {', '.join(list(self.runs)[2:]) or 'none'}")
        del self.runs[name]
        for side in (self.left, self.right):
            if side.value == name:
                side.value = BASE
        if self.selection.run == name:
            self.selection.set(run=None)
        self._name_runs()

    # ---- what is shown --------------------------------------------------------------------------------------------

    def result(self) -> Result:
        """Both runs and their difference, axes (run, option); intervals where a run was repeated."""
        a, b = (mean_all(self.runs[s.value]) for s in (self.left, self.right))
        parts = [a, b, self.difference()]
        names = [self.left.value, _other(self.right.value, self.left.value), "difference"]
        bounded = any(p.low is not None for p in parts)
        low, high = (np.stack([_bound(p, n) for p in parts]) if bounded else None for n in ("low", "high"))
        axes, coords = ("run", "option"), {"run": names, "option": self.options}
        recipe = {"left": a.recipe, "right": b.recipe} if a.recipe or b.recipe else {}
        return Result(
            np.stack([p.values.astype(float) for p in parts]), axes, coords, b.unit, recipe, "Probability of the options",
            low=low, high=high, baseline=0.0, notes={"n": b.notes.get("n", {})},
        )  # fmt: skip

    def difference(self) -> Result:
        """Right minus left, axis option. Runs over the same items or seeds are paired: the interval is of the difference."""
        a, b = (self.runs[s.value] for s in (self.left, self.right))
        if a.axes != b.axes or a.coords != b.coords:
            a, b = mean_all(a), mean_all(b)
        return mean_all(
            replace(b, values=b.values.astype(float) - a.values.astype(float), low=None, high=None, name="difference")
        )  # fmt: skip

    def spec(self) -> FigureSpec:
        """Bars of the two runs."""
        both = self.result()
        shown = both.select(run=both.coords["run"][:2])
        left, right = shown.coords["run"]
        title = f"P(option): {left} and {right}; numbers: {right} - {left}"
        spec = figure_spec(shown, kind="bars", title=title, limits=(0.0, self._top(shown)))
        return replace(spec, caption=f"{self._changes()} {spec.caption}".strip(), reading="")

    def picture(self) -> go.Figure:
        """The bars, with the difference above them."""
        spec, figure = self.spec(), None
        figure = to_plotly(spec)
        for i, change in enumerate(self.difference().values.tolist()):
            height = max(float(np.nanmax(spec.values[:, i])), 0.0 if spec.high is None else float(np.nanmax(spec.high[:, i])))  # fmt: skip
            figure.add_annotation(x=i, y=height, text=_signed(change), showarrow=False, yanchor="bottom", font={"size": 13})  # fmt: skip
        return figure

    def clicked(self, trace: int, point: Any) -> None:
        """Select the run whose bar was clicked."""
        self.selection.set(run=(self.left, self.right)[trace].value)

    def extras(self) -> list[W.Widget]:
        """The name to pin under, and the button."""
        return [self.name, self.pin_button]

    def settings(self) -> dict[str, Any]:
        """Which two runs are compared."""
        return {"left": self.left.value, "right": self.right.value}

    def _changes(self) -> str:
        change = self.difference()
        words = [
            f"{o} {_signed(v)}" + _interval(change, i)
            for i, (o, v) in enumerate(zip(self.options, change.values.tolist(), strict=True))
        ]
        return f"{self.right.value} - {self.left.value}: {', '.join(words)}."

    def _top(self, shown: Result) -> float:
        highest = [float(np.nanmax(a)) for a in (shown.values, shown.high) if a is not None]
        return max(1.0, *highest) * 1.08

    def _add(self, name: str, run: Result) -> None:
        if _options(run) != self.options:
            raise UsageError(f"run {name!r} has the options {_options(run)}, the base has {self.options}")
        self.runs[name] = run
        self._name_runs()

    def _name_runs(self) -> None:
        for side in (self.left, self.right):
            if list(side.options) != list(self.runs):
                kept = side.value
                side.options = list(self.runs)
                side.value = kept if kept in self.runs else BASE

    def _run_selected(self, change: Any) -> None:
        if change["new"] in self.runs and change["new"] != self.left.value:
            self.guarded(lambda: setattr(self.right, "value", change["new"]))


def _options(run: Result) -> list[Any]:
    others = [a for a in run.axes if a not in (*AVERAGED, "option")]
    if "option" not in run.axes or others:
        raise UsageError(
            f"an answer has the axis option (and item or seed), this has {run.axes}; select one of each first"
        )
    return run.coords["option"]


def _bound(part: Result, name: str) -> Any:
    given = getattr(part, name)
    return np.full(part.shape, np.nan) if given is None else given


def _other(name: str, taken: str) -> str:
    return name if name != taken else f"{name} (again)"


def _signed(change: float) -> str:
    return f"{change:+.3f}".replace("-", "−") if abs(change) >= 0.0005 else "±0"


def _interval(change: Result, i: int) -> str:
    if change.low is None or change.high is None:
        return ""
    return f" [{text(change.low[i])}, {text(change.high[i])}]"
