"""Scores: what is measured of the logits of a patched run, between the answers of two worlds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lab.errors import UsageError
from lab.model.answering import letter_ids

Metric = Literal["recovered", "logit_diff", "probability", "flip"]
UNITS: dict[str, str] = {
    "recovered": "share of the way to the other world",
    "logit_diff": "logit difference, other world's answer - own",
    "probability": "p of the other world's answer",
    "flip": "share of items that flip",
}
NEAR = 0.5  # nats: of two worlds whose scores lie nearer, a share of the way between them can be of any size
BASELINES: dict[str, float | None] = {"recovered": 0.0, "logit_diff": None, "probability": None, "flip": 0.0}


@dataclass(frozen=True)
class Score:
    """The metric between a source world, whose values are taken, and the world they go into.

    theirs, own   token ids of the two worlds' answers; equal where both answer alike: then the score is log p(theirs)
    start, end    the score of the world as it is, and of the source world
    choices       token ids among which "flip" looks for the answer; None: all
    """

    metric: Metric
    theirs: int
    own: int
    start: float
    end: float
    choices: tuple[int, ...] | None = None

    @classmethod
    def between(
        cls, source: Tensor, into: Tensor, metric: Metric, tokens: tuple[int, int] | None, choices: Any
    ) -> Score:
        """From the logits [d_vocab] of both worlds; tokens: the answers where known, else what each world answers."""
        if metric not in get_args(Metric):
            raise UsageError(f"metric={metric!r}; use one of {', '.join(get_args(Metric))}")
        theirs, own = tokens or (int(source.argmax()), int(into.argmax()))
        raw = cls(metric, theirs, own, 0.0, 1.0, choices)
        return cls(metric, theirs, own, float(raw.raw(into)), float(raw.raw(source)), choices)

    def raw(self, logits: Float[Tensor, "*cell d_vocab"]) -> Float[Tensor, "*cell"]:
        """Logit difference between the two answers; log p of the source's where both answer alike."""
        logits = logits.float()
        if self.theirs == self.own:
            return logits.log_softmax(-1)[..., self.theirs]
        return logits[..., self.theirs] - logits[..., self.own]

    @property
    def lost(self) -> str:
        """Why the metric is nan everywhere; "" if it is not."""
        gap = abs(self.end - self.start)
        if self.metric != "recovered" or gap > NEAR:
            return ""
        alike = "give the same answer, and" if self.theirs == self.own else "score"
        return (
            f"the worlds {alike} {gap:.2g} nats apart: of so small a way there is no share; use another world or "
            "metric='logit_diff'"
        )

    def __call__(self, logits: Float[Tensor, "*cell d_vocab"]) -> Float[Tensor, "*cell"]:
        """The metric; differentiable but for "flip". nan where "recovered" has next to nothing to recover (`lost`)."""
        match self.metric:
            case "recovered":
                return (self.raw(logits) - self.start) / (torch.nan if self.lost else self.end - self.start)
            case "logit_diff":
                return self.raw(logits)
            case "probability":
                return logits.float().softmax(-1)[..., self.theirs]
            case "flip":
                return self._flip(logits)

    def _flip(self, logits: Tensor) -> Tensor:
        if self.choices is None:
            return (logits.argmax(-1) == self.theirs).float()
        some = torch.tensor(self.choices, device=logits.device)
        return (some[logits[..., some].argmax(-1)] == self.theirs).float()


def answers_of(model: Any, source: Any, into: Any) -> tuple[tuple[int, int] | None, tuple[int, ...] | None]:
    """(their, own) answer letters of two items with options and different right answers, and the letters; else None."""
    options = getattr(source, "options", ()) or ()
    if not options or model.tokenizer is None:
        return None, None
    letters = tuple(letter_ids(model.tokenizer, len(options)))
    first, second = (getattr(i, "answer", None) for i in (source, into))
    if not isinstance(first, int) or not isinstance(second, int) or first == second:
        return None, letters
    return (letters[first], letters[second]), letters
