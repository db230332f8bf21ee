"""Five questions about where an answer about motion comes from, each put to another probe; and whether the answers agree.

    readable    where is the direction linearly readable?                   `probes.linear`
    flipped     where does taking the twin's values flip the answer?        `probes.patching`
    spoken      what does the lens read on video tokens?                    `probes.lens`
    valued      which frames is the answer worth?                           `probes.attribution`
    cut         which edges does the answer hang on?                        `probes.knockout`

Each gives Parts: a Result, what it says in a sentence, and the layers and frames it points at. `verdict` compares them.
Items need options, twins and a ground truth: those of `lab.sim`'s moving_direction. Draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.errors import UsageError
from lab.result import Result
from probes.attribution import attribute
from probes.knockout import knockout
from probes.lens import lens
from probes.linear import linear
from probes.patching import patching

Array = NDArray[np.float64]
NEARLY = 0.9  # of the most that is reached: from there on something counts as there
HALF = 0.5  # of the items
SPOKEN = 0.1  # a word less probable than this is not read
MOSTLY = 0.75  # of the items: the lens must prefer the right word to the twin's in so many


@dataclass(frozen=True)
class Part:
    """One probe's answer.

    asks      the question's name: "readable", "flipped", "spoken", "valued", "cut"; title: over its picture
    layers    1-based (first, last) between which it places what it found; () if it names none
    frames    the two frames it picks, ascending; () if it names none
    """

    asks: str
    title: str
    result: Result
    sentence: str
    layers: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()


def all_parts(model: Any, items: Sequence[Any], more: Sequence[Any], *, show: bool = True) -> list[Part]:
    """The five questions. `more`: further items, on which linear probes are fitted (they need more than the others)."""
    if not items or any(not i.options or i.twin is None for i in (*items, *more)):
        raise UsageError("this needs items with options and twins: those of lab.sim's moving_direction")
    return [
        *readable(model, more, show=show), *flipped(model, items, show=show), *spoken(model, items, show=show),
        *valued(model, items, show=show), *cut(model, items, show=show),
    ]  # fmt: skip


# ---- the five -------------------------------------------------------------------------------------------------------


def readable(model: Any, items: Sequence[Any], *, show: bool = True) -> list[Part]:
    """Where a linear probe reads the direction: in the mean over video tokens, and at the last position."""
    found = linear(model, items, "direction", roles=("video", "last"), twins=True, show_progress=show)
    true, chance = found.select(labels="true"), float(found.notes["chance"])
    video, last = (true.select(role=r).values for r in ("video", "last"))
    since = {"the video's tokens": _reached(video, chance), "the last position": _reached(last, chance)}
    said = ", and ".join(
        f"in {name} from layer {layer} on ({values[layer - 1]:.0%})" if layer else f"in {name} nowhere"
        for (name, layer), values in zip(since.items(), (video, last), strict=True)
    )
    control = float(found.select(labels="random").values.max())
    first, then = since.values()
    return [
        Part(
            "readable", "Linear probes for the direction", true,
            f"Direction is linearly readable {said}; always saying the commonest gives {chance:.0%}, shuffled labels at most "
            f"{control:.0%}.",
            layers=(first, then) if first and then else (),
        )
    ]  # fmt: skip


def flipped(model: Any, items: Sequence[Any], *, show: bool = True) -> list[Part]:
    """Where taking the twin's values flips the answer: by role, and by frame."""
    roles = patching(model, items, by="role", into="clean", metric="flip", show_progress=show)
    frames = patching(model, items, by="frame", into="clean", metric="recovered", show_progress=show)
    rate = roles.mean("item")
    video, last = (rate.select(role=r).values for r in ("frame", "last"))
    until = max((i + 1 for i, v in enumerate(video) if v >= HALF), default=0)
    n = len(last)
    since = min((i + 1 for i, v in enumerate(last) if v >= HALF), default=n + 1)
    said = (
        f"Taking the twin's video tokens flips the answer in up to {video.max():.0%} of the items"
        + (f", in half or more up to layer {until}" if until else "")
        + (
            f"; taking the last position alone does so from layer {since} on." if since <= n
            else f"; the last position alone flips {last.max():.0%} at most (layer {int(last.argmax()) + 1}), in no layer half."
        )
    )  # fmt: skip
    each = frames.mean("item").values[0]
    best = _two(each)
    more = f"Of single frames, {best[0]} and {best[1]} carry most where they enter the decoder ({each[best[0]]:.0%} and {each[best[1]]:.0%} of the way)."
    return [
        Part(
            "flipped",
            "The twin's values in the stream, by role",
            roles,
            said,
            layers=(until, min(since, n)) if until else (),
        ),
        Part("flipped", "The twin's values in the stream, by frame", frames, more, frames=best),
    ]


def spoken(model: Any, items: Sequence[Any], *, show: bool = True) -> list[Part]:
    """How probable the lens finds the right direction's word on video tokens, and the twin's."""
    words = sorted({i.options[a] for i in items for a in (i.answer, i.twin.answer)})
    found = lens(model, items, "video", words=words, show_progress=show)
    place = {w: n for n, w in enumerate(words)}
    p = found.values[..., 0]  # [item, word, layer]
    right = np.stack([p[i, place[item.options[item.answer]]] for i, item in enumerate(items)])
    wrong = np.stack([p[i, place[item.twin.options[item.twin.answer]]] for i, item in enumerate(items)])
    above, mean = (right > wrong).mean(0), right.mean(0)
    best, top = int(above.argmax()), float(mean.max())
    heard = top >= SPOKEN and bool(above[best] >= MOSTLY)
    said = (
        f"On video tokens the lens finds the right direction's word more probable than the twin's in {above[best]:.0%} of the items "
        f"at best (layer {best + 1}; {HALF:.0%} is chance), with a probability of {top:.1%} at most: "
        + ("it reads the answer there." if heard else "what is there is not in the words of the answer.")
    )
    shown = replace(
        found, values=np.stack([right, wrong], 1), axes=("item", "word", "layer"), notes={"ledger": found.notes["ledger"]},
        coords={"item": found.coords["item"], "word": ["the right word", "the twin's word"], "layer": found.coords["layer"]},
    )  # fmt: skip
    layers = (best + 1, best + 1) if heard else ()
    return [Part("spoken", "Logit lens on video tokens", shown, said, layers=layers)]


def valued(model: Any, items: Sequence[Any], *, show: bool = True) -> list[Part]:
    """What each frame is worth (exact Shapley values against the twin)."""
    found = attribute(model, items, method="shapley", show_progress=show)
    worth = found.mean("item").values
    best, total = _two(worth), max(float(worth.sum()), 1e-9)
    said = (
        f"Attribution picks frames {best[0]} and {best[1]} ({worth[best[0]] / total:.0%} and {worth[best[1]] / total:.0%} of the "
        f"answer's lead over the twin's); the first and the last together are worth {(worth[0] + worth[-1]) / total:.0%}."
    )
    return [Part("valued", "What each frame is worth", found, said, frames=best)]


def cut(model: Any, items: Sequence[Any], *, window: int = 3, show: bool = True) -> list[Part]:
    """Which pathways the answer hangs on, and round which layers."""
    found = knockout(model, items, window=window, executor="fast", show_progress=show)
    curves = found.mean("item")
    falls: dict[str, Array] = {n: curves.select(pathway=n).values for n in curves.coords["pathway"]}
    ranked = sorted(falls, key=lambda n: float(falls[n].min()))[:3]
    where = {n: int(falls[n].argmin()) + 1 for n in ranked}
    said = ", then ".join(f"{n} round layer {where[n]} ({falls[n].min():.0f} %)" for n in ranked)
    named = [where[n] for n in ranked if falls[n].min() <= HALF * falls[ranked[0]].min()]
    return [
        Part(
            "cut",
            f"Edges knocked out, {window} layers at a time",
            found,
            f"Knock-out (windows of {window} layers) picks {said}.",
            layers=(min(named), max(named)),
        )
    ]


# ---- whether they agree ---------------------------------------------------------------------------------------------


def verdict(parts: Sequence[Part]) -> list[str]:
    """Comparisons in plain words, each beginning with "Yes" or "No", for those probes that named something."""
    layers = {p.asks: p.layers for p in parts if p.layers}
    frames = {p.asks: p.frames for p in parts if p.frames}
    said: list[str] = []
    if {"readable", "flipped"} <= set(layers):
        said += _path(layers["readable"], layers["flipped"])
    if {"cut", "flipped"} <= set(layers):
        said.append(_overlap("the edges that knock-out picks", layers["cut"], layers["flipped"]))
    spoke = any(p.asks == "spoken" for p in parts)
    if spoke and "readable" in layers:
        said.append(_heard("spoken" in layers, layers["readable"][0]))
    if {"flipped", "valued"} <= set(frames):
        said.append(_frames(frames["flipped"], frames["valued"]))
    return said


def _path(readable: tuple[int, ...], flipped: tuple[int, ...]) -> list[str]:
    """Linear probes against patching: in the video first, at the last position afterwards."""
    # probes read what leaves a layer, patches replace what enters it
    video, last = readable[0] < flipped[0], flipped[0] <= readable[1] + 1
    return [
        f"{_yes(video)}: direction is readable in the video (from layer {readable[0]}) {'before' if video else 'only after'} the "
        f"video stops deciding the answer (layer {flipped[0]}).",
        f"{_yes(last)}: it is readable at the last position (from layer {readable[1]}) {'where or after' if last else 'while'} the "
        f"video {'stops' if last else 'still goes on'} deciding.",
    ]  # fmt: skip


def _overlap(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> str:
    low, high = min(b), max(b)
    meets = a[0] <= high and a[-1] >= low
    return (
        f"{_yes(meets)}: {name} (round layers {a[0]} to {a[-1]}) lie {'within' if meets else 'outside'} the layers {low} to {high} in "
        "which patching sees the answer leave the video."
    )


def _heard(spoke: bool, since: int) -> str:
    if spoke:
        return f"Yes: the lens too reads the direction on video tokens, where probes read it from layer {since} on."
    return (
        f"No: the lens does not read the direction on video tokens, where linear probes read it from layer {since} on: it is there in "
        "a form that the head does not speak."
    )


def _frames(patched: tuple[int, ...], worth: tuple[int, ...]) -> str:
    same = set(patched) & set(worth)
    if len(same) == len(worth):
        return f"Yes: patching and attribution pick the same frames, {worth[0]} and {worth[1]}."
    shared = f"share frame {min(same)}" if same else "share none"
    return f"No: patching picks frames {patched[0]} and {patched[1]}, attribution {worth[0]} and {worth[1]}; they {shared}."


def _yes(agrees: bool) -> str:
    return "Yes" if agrees else "No"


def _reached(values: Array, chance: float) -> int:
    """The first layer (1-based) with nearly all that is reached above chance; 0 where nothing is."""
    gain = values - chance
    top = float(np.nanmax(gain))
    return 0 if top < 0.1 else int(np.argmax(gain >= NEARLY * top)) + 1


def _two(values: Array) -> tuple[int, int]:
    """The two largest, ascending."""
    first, second = sorted(np.argsort(-np.nan_to_num(values), kind="stable")[:2].tolist())
    return first, second


def named(part: Part) -> Result:
    """The part's Result under the part's title."""
    return replace(part.result, name=part.title)
