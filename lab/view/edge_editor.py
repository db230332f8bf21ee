"""Edge editor: a table of segments by segments in which attention edges are blocked and allowed.

editor = EdgeEditor(names, pairs, n_layers=8, n_heads=4)
editor.paint([(3, 1)], "block")       # as a click on the cell does; Ctrl+Z takes it back
editor.policy()                       # plain data of a policy file
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from traitlets import Bool, Bytes, Int, List, Tuple, Unicode

from lab.errors import ConfigError, UsageError
from lab.result import Result
from lab.view.canvas import Canvas, script, tie
from lab.view.edge_grid import EdgeGrid, How, presets
from lab.view.selection import Selection
from lab.view.specs import FigureSpec, figure_spec
from lab.view.view import View

POLICY = "edge-policy/1"


class EdgesWidget(Canvas):
    """The live table. cells: one code for every (query, key), see `EdgeGrid.shown`."""

    _esm = script("edges.js")
    names = List(Unicode()).tag(sync=True)
    labels = List(Unicode()).tag(sync=True)
    cells = Bytes(b"").tag(sync=True)
    layers = Tuple(Int(), Int(), default_value=(1, 1)).tag(sync=True)
    heads = List(Int()).tag(sync=True)
    n_layers = Int(1).tag(sync=True)
    n_heads = Int(1).tag(sync=True)
    presets = List(Unicode()).tag(sync=True)
    count = Unicode("").tag(sync=True)
    error = Unicode("").tag(sync=True)
    can_undo = Bool(False).tag(sync=True)
    can_redo = Bool(False).tag(sync=True)
    busy = Bool(False).tag(sync=True)
    pair = Tuple(Unicode(), Unicode(), default_value=None, allow_none=True).tag(sync=True)


class EdgeEditor(View):
    """Which segment edges are cut.

    names, pairs, n_layers, n_heads   as in `EdgeGrid`
    labels     what the table says for every segment; None: its name
    more       name -> cuts, bool [layer, head, query, key]: presets beside those that go by segment names
    on_apply   called when Apply is pressed
    """

    def __init__(
        self, names: Sequence[str], pairs: Any, *, n_layers: int, n_heads: int, labels: Sequence[str] | None = None,
        more: Mapping[str, NDArray[np.bool_]] | None = None, on_apply: Callable[[], None] | None = None,
        selection: Selection | None = None,
    ) -> None:  # fmt: skip
        super().__init__(selection)
        self.grid = EdgeGrid(names, pairs, n_layers, n_heads)
        self.more, self.on_apply = dict(more or {}), on_apply
        self._lock = threading.RLock()  # messages may come on several threads (subshells)
        self._live = EdgesWidget(
            title="Which segments may read which", names=list(self.grid.names), labels=list(labels or self.grid.names), n_layers=n_layers, n_heads=n_heads,
            presets=[*presets(self.grid.names), *self.more],
        )  # fmt: skip
        tie(self._live, self.selection, ("pair",))
        self._live.on_msg(self._heard)
        self._tell()

    # ---- View -------------------------------------------------------------------------------------------------------

    def result(self) -> Result:
        """Share of heads in which each pair is cut, axes (layer, query, key); nan where the prompt has no such edges."""
        names = list(self.grid.names)
        share = np.where(self.grid.pairs > 0, self.grid.blocked.mean(1), np.nan)
        coords: dict[str, list[Any]] = {"layer": list(range(1, len(share) + 1)), "query": names, "key": names}
        notes = {"policy": self.policy(), "removed": self.grid.removed, "total": self.grid.total}
        return Result(share, ("layer", "query", "key"), coords, "share of heads in which the edge is cut", {}, "cut edges", notes, baseline=0.0)  # fmt: skip

    def spec(self) -> FigureSpec:
        """Mean of `result` over the brush's layers, as a heat map with limits 0 and 1."""
        first, last = self.grid.layers
        r = self.result().select(layer=list(range(first, last + 1)))
        coords = {a: r.coords[a] for a in ("query", "key")}
        part = Result(r.values.mean(0), ("query", "key"), coords, "share of layers and heads cut", {}, f"cut edges, layers {first}-{last}", baseline=0.0)  # fmt: skip
        return figure_spec(part, limits=(0.0, 1.0), caption=self._live.count)

    def data(self) -> pd.DataFrame:
        """One row for every layer and pair that has edges."""
        return super().data().dropna(ignore_index=True)

    def settings(self) -> dict[str, Any]:
        """The brush, and the cuts as plain data of a policy file."""
        return {"layers": list(self.grid.layers), "heads": list(self.grid.heads), "policy": self.policy()}

    def _set(self, settings: Mapping[str, Any]) -> None:
        wrong = sorted(set(settings) - {"layers", "heads", "policy"})
        if wrong:
            raise ConfigError(
                f"an edge editor has no settings {', '.join(wrong)}; it has layers, heads, policy"
            )
        if "policy" in settings:
            self.put(cells_of(self.grid, settings["policy"]))
        self.brush(settings.get("layers"), settings.get("heads"))

    def _make_widget(self) -> EdgesWidget:
        return self._live

    # ---- what it does -------------------------------------------------------------------------------------------------

    def policy(self) -> dict[str, Any]:
        """Plain data of the policy file that says what is cut now."""
        return {"format": POLICY, "cuts": self.grid.cuts()}

    def paint(self, cells: Iterable[Sequence[int]], how: How = "toggle") -> None:
        """Block or allow cells (query, key) under the brush; see `EdgeGrid.paint`."""
        self.grid.paint(cells, how)
        self._tell()

    def brush(self, layers: Any = None, heads: Any = None) -> None:
        """Set the brush; see `EdgeGrid.brush`."""
        self.grid.brush(layers, heads)
        self._tell()

    def put(self, blocked: NDArray[np.bool_]) -> None:
        """Replace all cuts; see `EdgeGrid.put`."""
        self.grid.put(blocked)
        self._tell()

    def preset(self, name: str) -> None:
        """Take a preset: those that go by names block their cells under the brush, the others replace all cuts."""
        if name in self.more:
            self.grid.put(self.more[name])
        else:
            self.grid.preset(name)
        self._tell()

    def undo(self) -> None:
        """Take the last step back."""
        self.grid.undo()
        self._tell()

    def redo(self) -> None:
        """Take the last undone step again."""
        self.grid.redo()
        self._tell()

    def reset(self) -> None:
        """Cut nothing."""
        self.grid.reset()
        self._tell()

    def apply(self) -> None:
        """What the button Apply does."""
        if self.on_apply is not None:
            self.on_apply()

    def _tell(self) -> None:
        """Show the grid as it is now."""
        grid, live = self.grid, self._live
        share = 100 * grid.removed / grid.total if grid.total else 0.0
        with live.hold_sync():
            live.cells, live.layers, live.heads = grid.shown().tobytes(), grid.layers, list(grid.heads)
            live.can_undo, live.can_redo, live.error = grid.can_undo, grid.can_redo, ""
            live.count = f"{grid.removed:,} of {grid.total:,} edges removed ({share:.1f} %)"

    def _heard(self, _widget: Any, message: Any, _buffers: Any) -> None:
        """A message of the table: {"do": name, ...its arguments}. What is wrong with it stands below the table."""
        arguments = dict(message) if isinstance(message, Mapping) else {}
        name = arguments.pop("do", None)
        with self._lock:
            try:
                if name not in ACTIONS:
                    raise ConfigError(f"the editor cannot {name!r}; it can {', '.join(ACTIONS)}")
                getattr(self, name)(**arguments)
            except Exception as e:  # an error of a callback would vanish in a log
                self._tell()
                self._live.error = " ".join(str(e).split())


ACTIONS = ("paint", "brush", "preset", "undo", "redo", "reset", "apply")


def cells_of(grid: EdgeGrid, policy: Any) -> NDArray[np.bool_]:
    """The cuts that `EdgeGrid.cuts` wrote, bool [layer, head, query, key].

    Raises ConfigError for a policy that says more than whole segments of this grid (`lab.app` opens those it can).
    """
    if not isinstance(policy, Mapping) or policy.get("format") != POLICY:
        raise ConfigError(f"policy: must be plain data with format: {POLICY}")
    blocked = np.zeros_like(grid.blocked)
    for i, cut in enumerate(policy.get("cuts", ())):
        try:
            if set(cut) - {"layers", "heads", "q", "k", "reason"}:
                raise UsageError(
                    f"the editor has whole segments, not {', '.join(set(cut) - {'layers', 'heads', 'q', 'k'})}"
                )
            blocked[_places(grid, cut)] = True
        except (UsageError, ValueError, TypeError, KeyError, IndexError) as e:
            raise ConfigError(f"policy.cuts.{i}: {e}") from None
    return blocked & (grid.pairs > 0)


def _places(grid: EdgeGrid, cut: Mapping[str, Any]) -> Any:
    n_layers, n_heads = grid.blocked.shape[:2]
    text, heads = str(cut.get("layers", "all")), cut.get("heads", "all")
    layers = list(range(n_layers)) if text == "all" else _layers(text)
    rows, columns = grid.positions(str(cut["q"])), grid.positions(str(cut["k"]))
    return np.ix_(layers, range(n_heads) if heads == "all" else heads, rows, columns)


def _layers(text: str) -> list[int]:
    """0-based layers of a text that `ranges` wrote."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first) - 1, int(last or first))
    return found
