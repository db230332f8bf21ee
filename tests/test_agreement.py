"""Five probes of one answer: on the planted model each says what is true, and the comparisons say so in words."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

from lab.errors import LabWarning, UsageError
from lab.result import Result
from lab.sim.planted import planted_model, questions
from probes.agreement import Part, all_parts, cut, flipped, readable, valued, verdict

NOTHING = Result(np.zeros(1), ("layer",), {"layer": [1]}, "nothing", {})


def part(asks: str, layers: tuple[int, ...] = (), frames: tuple[int, ...] = ()) -> Part:
    return Part(asks, "", NOTHING, "", layers, frames)


def test_the_parts_say_what_was_planted() -> None:
    """Video decides up to layer 2, the last position from layer 4; the edges that matter lie in layers 1 to 3."""
    model, items = planted_model("plain"), questions(4, seed=4)
    roles, frames = flipped(model, items, show=False)
    assert roles.layers == (2, 4) and roles.sentence.endswith("from layer 4 on.")
    worth = valued(model, items, show=False)[0]
    assert worth.frames == frames.frames and len(set(worth.frames)) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabWarning)  # some pathways carry nothing: that is what was planted
        edges = cut(model, items, window=1, show=False)[0]
    assert 1 <= edges.layers[0] <= edges.layers[1] <= 3 and "round layer 3" in edges.sentence
    read = readable(model, questions(24, seed=9), show=False)[0]
    assert read.layers[0] in (1, 2), "the mean of what the video tokens compared"
    said = verdict([roles, frames, worth, edges, read])
    assert sum(s.startswith("Yes") for s in said) >= 3 and not any("None" in s for s in said)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([part("readable", (1, 3)), part("flipped", (2, 3))], ["Yes: direction is readable in the video (from layer 1) before", "Yes: it is readable at the last"]),
        ([part("readable", (4, 1)), part("flipped", (3, 5))], ["No: direction is readable in the video (from layer 4) only after", "No: it is readable at the last"]),
        ([part("cut", (2, 3)), part("flipped", (3, 5))], ["Yes: the edges that knock-out picks (round layers 2 to 3) lie within"]),
        ([part("cut", (7, 8)), part("flipped", (3, 5))], ["No: the edges that knock-out picks (round layers 7 to 8) lie outside"]),
        ([part("flipped", (), (0, 7)), part("valued", (), (0, 7))], ["Yes: patching and attribution pick the same frames, 0 and 7."]),
        ([part("flipped", (), (0, 7)), part("valued", (), (3, 7))], ["No: patching picks frames 0 and 7, attribution 3 and 7; they share frame 7."]),
        ([part("flipped", (), (0, 7)), part("valued", (), (1, 2))], ["No: patching picks frames 0 and 7, attribution 1 and 2; they share none."]),
        ([part("readable", (1, 3)), part("spoken")], ["No: the lens does not read the direction"]),
        ([part("readable", (1, 3)), part("spoken", (4, 4))], ["Yes: the lens too reads the direction"]),
        ([part("cut", (2, 3))], []),
    ],
)  # fmt: skip
def test_comparisons_in_words(parts: list[Part], said: list[str]) -> None:
    found = verdict(parts)
    assert len(found) == len(said) and all(f.startswith(s) for f, s in zip(found, said, strict=True)), found


def test_items_without_a_twin_are_refused() -> None:
    item = replace(questions(1, seed=0)[0], twin=None)
    with pytest.raises(UsageError, match="options and twins"):
        all_parts(None, [item], [item])
