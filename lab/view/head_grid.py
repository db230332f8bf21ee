"""HeadGrid: layers against heads for one pair of segments; a click adds a head to a list (for an edge policy, say)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import ipywidgets as W

from lab.errors import UsageError
from lab.result import Result
from lab.view.choices import SIDES
from lab.view.heat_view import HeatView, cell_outline
from lab.view.selection import Selection

Heads = tuple[tuple[int, int], ...]


class HeadGrid(HeatView):
    """Layer x head of a Result with the axes (layer, head) and, beside them, a pathway or (query, key).

    heads    (layer 1-based, head 0-based) that were clicked, in order; a second click takes one out
    Raises UsageError for a result without heads.
    """

    css = "vl-heads"

    def __init__(
        self, result: Result, *, limits: tuple[float, float] | None = None, diverging: bool | None = None,
        selection: Selection | None = None, theme: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(
            result, "layer", "head", averaged=(), limits=limits, diverging=diverging, selection=selection, theme=theme
        )  # fmt: skip
        self._heads: Heads = ()
        self._told: list[Callable[[Heads], None]] = []
        self._clear = W.Button(description="Clear heads")
        self._clear.add_class("vl-clear-heads")
        self._clear.on_click(lambda _: self.guarded(lambda: self.choose(())))
        self._add = W.Button(description="Add head", tooltip="the selected layer and head")
        self._add.add_class("vl-add-head")
        self._add.on_click(lambda _: self.guarded(self._add_selected))
        for side in SIDES:
            if side in self.slices:
                self.slices[side].observe(lambda _: self.guarded(self._tell_pair), "value")

    @property
    def heads(self) -> Heads:
        """The chosen heads."""
        return self._heads

    def on_heads(self, hear: Callable[[Heads], None]) -> None:
        """Call `hear` with all chosen heads whenever they change."""
        self._told.append(hear)

    def choose(self, heads: Iterable[tuple[int, int]]) -> None:
        """Choose these heads. Raises UsageError for one that the result does not have."""
        wanted = tuple(dict.fromkeys((int(layer), int(head)) for layer, head in heads))
        for layer, head in wanted:
            if layer not in self.whole.coords["layer"] or head not in self.whole.coords["head"]:
                raise UsageError(
                    f"no head {head} in layer {layer} among {self.whole.shape[:2]} (layer, head)"
                )
        self._heads = wanted
        self._outline()
        self._say(self.words())
        for hear in self._told:
            hear(self._heads)

    def clicked(self, trace: int, point: Any) -> None:
        """Select the head, and add it (or take it out)."""
        super().clicked(trace, point)
        at = self.place(int(point[0]), int(point[1]))
        self._toggle((at["layer"], at["head"]))

    def outlines(self) -> list[dict[str, Any]]:
        """The selected cell, and a dotted frame round every chosen head."""
        layers, heads = (self.whole.coords[a] for a in ("layer", "head"))
        cells = [
            cell_outline(layers.index(a), heads.index(b), len(layers), len(heads)) for a, b in self._heads
        ]
        return [
            *super().outlines(),
            *({**c, "line": {"color": "#0072b2", "width": 3, "dash": "dot"}} for c in cells),
        ]

    def settings(self) -> dict[str, Any]:
        """The controls, and the chosen heads."""
        return {**super().settings(), "heads": [list(h) for h in self._heads]}

    def _set(self, settings: Any) -> None:
        rest = dict(settings)
        heads = rest.pop("heads", None)
        super()._set(rest)
        if heads is not None:
            self.choose([(a, b) for a, b in heads])

    def extras(self) -> list[W.Widget]:
        """The pickers, and what a mouse would do."""
        return [*super().extras(), self._add, self._clear]

    def words(self) -> str:
        """The chosen heads stand in front."""
        chosen = ", ".join(f"layer {a} head {b}" for a, b in self._heads)
        return f"Chosen: {chosen or 'none'}. {super().words()}"

    def _add_selected(self) -> None:
        layer, head = self.selection.layer, self.selection.head
        if layer is None or head is None:
            raise UsageError("choose a layer and a head first")
        self._toggle((layer, head))

    def _toggle(self, head: tuple[int, int]) -> None:
        rest = [h for h in self._heads if h != head]
        self.choose(rest if len(rest) < len(self._heads) else [*rest, head])

    def _tell_pair(self) -> None:
        if not self.following and all(side in self.slices for side in SIDES):
            self.selection.set(pair=(self.slices["query"].value, self.slices["key"].value))
