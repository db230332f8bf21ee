"""Lens table: the best words at every layer and token, as `probes.lens.words` finds them; follow one word's rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from traitlets import Bytes, Int, List, Unicode

from lab.errors import ConfigError, UsageError
from lab.result import Result
from lab.view.canvas import Canvas, colours, floats, ints, script, tie
from lab.view.lens_out import save_lens
from lab.view.matplotlib_out import SUFFIXES
from lab.view.selection import Selection
from lab.view.specs import FigureSpec, text
from lab.view.view import View


class LensWidget(Canvas):
    """The live table. p, texts: [layer, column, place]; ranks: [word, layer, column], 0 where not known."""

    _esm = script("lens.js")
    layers = List(Int()).tag(sync=True)
    columns = List(Unicode()).tag(sync=True)
    tokens = List(Int()).tag(sync=True)
    top = Int(1).tag(sync=True)
    texts = List(Unicode()).tag(sync=True)
    p = Bytes(b"").tag(sync=True)
    words = List(Unicode()).tag(sync=True)
    ranks = Bytes(b"").tag(sync=True)
    colours = Bytes(b"").tag(sync=True)
    mode = Unicode("").tag(sync=True)
    followed = Unicode("").tag(sync=True)
    layer = Int(None, allow_none=True).tag(sync=True)
    token = Int(None, allow_none=True).tag(sync=True)


@dataclass(frozen=True)
class Lensed:
    """What a lens found on some tokens.

    best     axes (layer, pos, place): probabilities of the best words; `notes["words"]` nested likewise,
             `notes["where"]["position"]` the tokens' prompt positions, `notes["mode"]` how the stream was read
    ranks    axes (word, layer, pos): ranks of words that can be followed, 1 the most probable; None: none can
    columns  what stands above every token; empty: its place in the prompt
    """

    best: Result
    ranks: Result | None = None
    columns: Sequence[str] = field(default_factory=tuple)


class LensTable(View):
    """Layers by tokens, with the best words of every cell. Takes a `Lensed`, or a Result of `probes.lens.words`."""

    def __init__(self, found: Lensed | Result, *, selection: Selection | None = None) -> None:
        super().__init__(selection)
        self._live = LensWidget(colours=colours(False))
        self.show(found)
        tie(self._live, self.selection, ("layer", "token"))

    def show(self, found: Lensed | Result) -> None:
        """Show what a lens found elsewhere. Raises UsageError for a Result that is no lens's, or of several items."""
        found = found if isinstance(found, Lensed) else Lensed(found)
        best = _one_item(found.best)
        self._found = Lensed(best, found.ranks, _columns(best, found.columns))
        live, ranks = self._live, found.ranks
        with live.hold_sync():
            live.title, live.unit, live.mode = best.name, best.unit, _mode(best)
            live.layers, live.top = list(best.coords["layer"]), len(best.coords["place"])
            live.columns, live.tokens = (
                list(self._found.columns),
                [int(p) for p in best.notes["where"]["position"]],
            )
            live.texts = [w for layer in best.notes["words"] for pos in layer for w in pos]
            live.p = floats(best.values)
            live.words = [] if ranks is None else [str(w) for w in ranks.coords["word"]]
            live.ranks = b"" if ranks is None else ints(np.nan_to_num(ranks.values))
            if live.followed not in live.words:
                live.followed = ""

    def follow(self, word: str) -> None:
        """Show the rank of a word everywhere; "" shows the best words. Raises UsageError for a word without ranks."""
        if word and word not in self._live.words:
            raise UsageError(f"no ranks of {word!r}; there are: {', '.join(self._live.words) or 'none'}")
        self._live.followed = word

    # ---- View -------------------------------------------------------------------------------------------------------

    def result(self) -> Result:
        """Probabilities of the best words, axes (layer, pos, place), the words in `notes["words"]`."""
        return self._found.best

    def spec(self) -> FigureSpec:
        """A table of the best word (or the followed word's rank) of every layer, the last one on top."""
        live, best = self._live, self._found.best
        cells = self._cells()
        rows = [(str(layer), *row) for layer, row in zip(live.layers, cells, strict=True)][::-1]
        said = f"Rank of {live.followed!r}." if live.followed else f"Best words; {best.unit}."
        return FigureSpec(
            "table", best.name, best.unit, columns=("layer", *live.columns), rows=tuple(rows),
            caption=f"{said} {live.mode}", alt=f"Table of {len(rows)} layers by {len(live.columns)} tokens. {said}",
        )  # fmt: skip

    def _cells(self) -> list[list[str]]:
        best, ranks, word = self._found.best, self._found.ranks, self._live.followed
        if ranks is not None and word:
            return [[text(int(r)) for r in row] for row in ranks.select(word=word).values]
        return [[pos[0] for pos in layer] for layer in best.notes["words"]]

    def _save_picture(self, path: Path) -> Path:
        if path.suffix.lower() not in SUFFIXES:
            return super()._save_picture(path)
        return save_lens(self.spec(), self._shares()[::-1], path)

    def _shares(self) -> list[list[float]]:
        """The colour of every cell: the best word's probability, or how near the followed word is to the first rank."""
        best, ranks, word = self._found.best, self._found.ranks, self._live.followed
        if ranks is not None and word:
            # as in lens.js: rank 1 is the top of the scale, beyond 1000 all are at its lower end
            return (1 - np.minimum(1, np.log10(np.maximum(ranks.select(word=word).values, 1)) / 3)).tolist()
        return best.values[:, :, 0].tolist()

    def data(self) -> pd.DataFrame:
        """One row for every layer, token and place: the word and its probability."""
        table = super().data()
        table["word"] = self._live.texts
        named = dict(zip(self._found.best.coords["pos"], self._live.columns, strict=True))
        table.insert(1, "token", [named[p] for p in table["pos"]])
        return table

    def settings(self) -> dict[str, Any]:
        """The word that is followed."""
        return {"followed": self._live.followed}

    def _set(self, settings: Mapping[str, Any]) -> None:
        if set(settings) - {"followed"}:
            raise ConfigError(
                f"a lens table has no settings {', '.join(sorted(set(settings) - {'followed'}))}"
            )
        self.follow(str(settings.get("followed", "")))

    def _make_widget(self) -> LensWidget:
        return self._live


def _one_item(best: Result) -> Result:
    if best.axes == ("item", "layer", "pos", "place") and best.shape[0] == 1:
        notes = {**best.notes, "words": best.notes["words"][0], "where": best.notes["where"][0]}
        values, coords = best.values[0], {a: best.coords[a] for a in best.axes[1:]}
        return Result(values, best.axes[1:], coords, best.unit, best.recipe, best.name, notes)
    if best.axes != ("layer", "pos", "place") or "words" not in best.notes:
        raise UsageError(
            f"a lens table needs what probes.lens.words gives for one item; this has the axes {best.axes}"
        )
    return best


def _columns(best: Result, given: Sequence[str]) -> tuple[str, ...]:
    if given and len(given) != best.shape[1]:
        raise UsageError(f"{len(given)} names for {best.shape[1]} tokens; give one each")
    return tuple(given) or tuple(f"pos {p}" for p in best.notes["where"]["position"])


def _mode(best: Result) -> str:
    """How the stream was read: what is not tuned is a raw lens, and says so."""
    mode = str(best.notes.get("mode", ""))
    if mode == "tuned":
        return "tuned lens"
    return "raw lens, not tuned: " + (
        "the model's own final norm and head at every layer" if mode == "normed" else mode
    )
