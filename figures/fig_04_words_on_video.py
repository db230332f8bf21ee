"""Words on video: what the logit lens reads on video tokens, by layer, and written on the frames they come from.

Above: the best word on every token of one video, at a layer in the middle and at the last one. Below: how often words of
three lists are among the best, and the probability of the right answer's word, by frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from figures.base import BANDS, PictureRecipe, about, noted, pictures
from lab.result import Result
from lab.view.plates import FULL, Plate
from lab.view.specs import FigureSpec, figure_spec, text
from lab.view.words import shown

LONG = 7  # letters


class WordsOnVideoRecipe(PictureRecipe):
    """top: best words that count for the lists; lists: name -> words (none: short lists of space, time and objects)."""

    top: int = Field(default=5, ge=1)
    lists: dict[str, tuple[str, ...]] | None = None


def compute(recipe: WordsOnVideoRecipe, *, progress: bool = True) -> list[Result]:
    """Words on the frames at two layers, the frames, shares of the lists (item, list, layer), p of the answer (item, frame, layer)."""
    from probes.lens import lens, painted, vocabulary, words

    model, items = recipe.loaded()
    n, layers = recipe.n_frames, model.cfg.n_layers
    ready = model.prepare(items[0], n)
    best = words(model, [ready], top=1, n_frames=n, show_progress=progress)
    grids = [painted(best, layer=at) for at in (max(1, layers // 2), layers)]
    lists = None if recipe.lists is None else _known(model, recipe.lists)
    shares = vocabulary(model, items, lists, top=recipe.top, n_frames=n, show_progress=progress)
    answer = lens(model, items, "video", words="right", by="frame", n_frames=n, show_progress=progress)
    asked = {
        "question": items[0].question,
        "options": list(items[0].options),
        "answer": items[0].options[items[0].answer],
    }
    film = pictures(ready.frames.pixels.cpu(), grids[0].shape[0])
    return [
        *(noted(g, **asked) for g in grids),
        film,
        noted(shares, **about(items)),
        noted(answer, **about(items)),
    ]


def _known(model: Any, lists: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """The lists of which the model's vocabulary has a word as one token. Raises UsageError if it has of none."""
    from lab.errors import UsageError
    from probes.wordlists import groups_of

    found: dict[str, list[str]] = {}
    for name, listed in lists.items():
        with suppress(UsageError):  # another model may cut all words of a list into pieces
            groups_of(model.need_tokenizer(), model.cfg.d_vocab, {name: list(listed)})
            found[name] = list(listed)
    if not found:
        raise UsageError(
            f"the vocabulary has no word of the lists {', '.join(lists)} as one token; give other lists"
        )
    return found


def draw(results: Sequence[Result]) -> Plate:
    """Two rows of frames with words, then the two curves."""
    early, late, film, shares, answer = results
    strips = [_strip(r, film) for r in (early, late)]
    n = len(shares.coords["item"])
    tall_ = strips[0].values.shape[1] / strips[0].values.shape[2]
    height = 0.42 + tall_ * 6.5 / 4
    lists = figure_spec(shares, kind="lines", title="Words of each list among the best", caption="")
    return Plate(
        "Words the lens reads on video tokens", ((strips[0],), (strips[1],), (replace(lists, x_label="Layer", y_label=_cap(shares.unit)), _answer(answer))),
        f"Best word of the normed logit lens on every video token of one video at layers {early.notes['selected']['layer']} and "
        f"{late.notes['selected']['layer']} (fainter: less probable; question: {early.notes['question']} Right answer: {early.notes['answer']}). "
        f"Below: share of the best words that belong to each list, and probability of the right option's letter on each frame's tokens; "
        f"mean over n = {n} questions. {BANDS} A lens reads tokens that were never trained to speak: it shows likeness, not use.",
        width=FULL, heights=(height, height, 1.9), shares=((), (), (1.2, 1.0)),
    )  # fmt: skip


def _strip(grid: Result, film: Result) -> FigureSpec:
    spec = figure_spec(
        grid,
        frames=film.values,
        limits=(0.0, 1.0),
        title=f"Layer {grid.notes['selected']['layer']}",
        caption="",
    )
    said = tuple(tuple(tuple(_short(w) for w in row) for row in frame) for frame in grid.notes["words"])
    some = [i for i in np.linspace(0, len(said) - 1, min(4, len(said))).round().astype(int).tolist()]
    assert spec.frames is not None
    return replace(
        spec, words=tuple(said[i] for i in some), values=spec.values[some], frames=spec.frames[some],
        series=tuple(spec.series[i] for i in some), across=4,
    )  # fmt: skip


def _short(word: str) -> str:
    """A word as it fits on a quarter of a small frame; special tokens without their brackets."""
    word = shown(word.strip("<|>"))
    return word if len(word) <= LONG else f"{word[: LONG - 1]}\u2026"


def _answer(answer: Result) -> FigureSpec:
    mean = answer.mean("item").select(word=answer.coords["word"][0])
    turned = replace(
        mean, values=np.asarray(mean.values).T, axes=("frame", "layer"), low=None, high=None,
        coords={"frame": [text(f) for f in mean.coords["frame"]], "layer": mean.coords["layer"]},
    )  # fmt: skip
    return figure_spec(turned, kind="heat", title="Right letter, by frame", caption="")


def _cap(unit: str) -> str:
    return unit[:1].upper() + unit[1:]
