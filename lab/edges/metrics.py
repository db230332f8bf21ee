"""Metrics of a sweep: what is read from the logits of a run, and how its change is given.

argmax    % change of p(the token that the clean run answers), over the whole vocabulary (the paper's)
answer    % change of p(the right answer): its letter, or all tokens of its text
target    % change of p(the target), all its tokens; the right answer where no target is given
logprob   change of the target's summed log-probability, nats
option_p  change of the clean choice's probability among the options' letters, percentage points
margin    change of the clean choice's logit minus the log-sum-exp of the other options' logits, nats
flip      1 if another option is chosen than in the clean run (without options: another token), else 0
kl        KL(clean || cut) over the options' letters, nats
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.errors import UsageError

Metric = Literal["argmax", "answer", "target", "logprob", "option_p", "margin", "flip", "kl"]
METRICS: tuple[Metric, ...] = get_args(Metric)
RELATIVE = ("argmax", "answer", "target")  # (p - clean) * 100 / clean
OF_OPTIONS = ("option_p", "margin", "kl")  # need letters; flip can do without
OF_TARGET = ("answer", "target", "logprob")
PER_TOKEN = ("target", "logprob")
UNITS: dict[str, str] = {
    **dict.fromkeys(RELATIVE, "% change in probability"), "logprob": "change in log-probability (nats)",
    "option_p": "change in p among the options (points)", "margin": "change in logit margin (nats)",
    "flip": "share of flipped answers", "kl": "KL to clean over the options (nats)",
}  # fmt: skip
MIXED = "change, each metric in its own unit"


def check_metrics(metrics: Sequence[str], per_token: bool) -> None:
    """Raises UsageError for unknown or repeated metrics, or one that has no value per token."""
    for metric in metrics:
        if metric not in METRICS:
            raise UsageError(f"metric={metric!r}; use one of {', '.join(METRICS)}")
        if per_token and metric not in PER_TOKEN:
            raise UsageError(f"per_token gives {' and '.join(PER_TOKEN)}; {metric!r} has no value per token")
    if not metrics or len(set(metrics)) < len(metrics):
        raise UsageError(f"metrics must be different names, at least one; got {tuple(metrics)!r}")


def unit_of(metrics: Sequence[str]) -> str:
    """The unit of a Result that holds these metrics."""
    units = {UNITS[m] for m in metrics}
    return units.pop() if len(units) == 1 else MIXED


@dataclass(frozen=True)
class Gauge:
    """Reads the metrics of one item.

    ids      tokens of the target; logits come with one row for each, [read, d_vocab] (one row where there is none)
    letters  tokens of the options' letters; empty without options
    clean    the clean run's logits
    """

    metrics: tuple[Metric, ...]
    ids: tuple[int, ...]
    letters: tuple[int, ...]
    clean: Tensor
    per_token: bool = False

    @property
    def argmax(self) -> int:
        """The token that the clean run answers."""
        return int(self.clean[0].argmax())

    @property
    def choice(self) -> int:
        """The option that the clean run chooses (the token, where there are no options)."""
        return _choice(self.clean, self.letters)

    @property
    def foretold(self) -> bool:
        """Whether greedy decoding would say the target: it is the argmax at each of its tokens."""
        return self.clean.argmax(-1).tolist() == list(self.ids)

    def levels(self, logits: Tensor) -> list[Any]:
        """One number for each metric; with `per_token` a list with one for each token of the target."""
        return [self._level(m, logits) for m in self.metrics]

    def _level(self, metric: Metric, logits: Tensor) -> Any:
        match metric:
            case "argmax":
                return float(_probs(logits[0])[self.argmax])
            case "answer" | "target":
                return self._each(logits).exp().tolist() if self.per_token else self._p(logits)
            case "logprob":
                each = self._each(logits)
                return each.tolist() if self.per_token else float(each.sum())
            case "flip":
                return float(_choice(logits, self.letters) != self.choice)
            case _:
                return self._of_options(metric, logits)

    def _p(self, logits: Tensor) -> float:
        if len(self.ids) == 1:
            return float(_probs(logits[0])[self.ids[0]])
        return float(self._each(logits).sum().exp())

    def _each(self, logits: Tensor) -> Tensor:
        """log p of every token of the target, [token], given all before it."""
        ids = torch.tensor(self.ids, device=logits.device)
        return logits.double().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)

    def _of_options(self, metric: Metric, logits: Tensor) -> float:
        index = list(self.letters)
        now, was = (t[0][index].double() for t in (logits, self.clean))
        if metric == "option_p":
            return 100.0 * float(now.softmax(-1)[self.choice])
        if metric == "margin":
            rest = torch.arange(len(index), device=now.device) != self.choice
            return float(now[self.choice] - now[rest].logsumexp(-1))
        p, q = was.log_softmax(-1), now.log_softmax(-1)
        return max(0.0, float((p.exp() * (p - q)).sum()))


def changes(metric: str, levels: NDArray[Any], clean: NDArray[Any]) -> NDArray[Any]:
    """How far levels are from the clean run's, in the metric's unit; nan where p was 0 and has no change in percent."""
    if metric in RELATIVE:
        return (levels - clean) * 100.0 / np.where(clean == 0, np.nan, clean)
    return levels if metric in ("flip", "kl") else levels - clean


def _probs(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1)


def _choice(logits: Tensor, letters: Sequence[int]) -> int:
    return int((logits[0][list(letters)] if letters else logits[0]).argmax())
