"""The number whose change is predicted: the option logit margin, a function of one world's last logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lab.carriers import LETTERS, VideoQA
from lab.errors import UsageError
from lab.model.answering import letter_ids

Metric = str | Callable[[Tensor], Tensor]
METRICS = ("margin", "margin-right")
UNIT = "predicted change of the logit margin"


@dataclass(frozen=True)
class Margin:
    """The logit of one token less the log-sum-exp of the others' logits. Calling it with logits [d_vocab] gives a scalar.

    token, others  ids; choice: the token in words
    """

    token: int
    others: tuple[int, ...]
    choice: str

    def __call__(self, logits: Tensor) -> Tensor:
        at = torch.tensor(self.others, device=logits.device)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide[self.token] - wide[at].logsumexp(0)


def check_metric(metric: Metric) -> None:
    """Raises UsageError for metrics that do not exist, or whose gradient is zero where it is taken."""
    if callable(metric) or metric in METRICS:
        return
    if isinstance(metric, str) and "kl" in metric.lower().replace("-", "_").split("_"):
        raise UsageError(
            f"metric={metric!r} has no gradient to score edges with: the clean run minimises the KL divergence to itself, so "
            "its gradient at the clean run is 0 and every edge would score 0; use metric='margin', and measure KL of real cuts"
        )
    raise UsageError(f"metric={metric!r}; use one of {', '.join(METRICS)}, or a function of the last logits")


def margin_of(
    model: Any, metric: Metric, item: VideoQA | None, clean: Tensor
) -> tuple[Callable[[Tensor], Tensor], str]:
    """The metric for one prompt whose clean last logits are `clean` [d_vocab], and the choice it is about, in words.

    margin        the option the clean run chooses, against all other options; without options the token it would say,
                  against the runner-up
    margin-right  the right option against all others
    Raises UsageError for an item without the answer that the metric needs.
    """
    check_metric(metric)
    if callable(metric):
        return partial(_scalar, metric), ""
    if item is None or not item.options:
        if metric == "margin-right":
            raise UsageError("metric='margin-right' needs items with options and the index of the right one")
        return _over_words(model, clean)
    if len(item.options) < 2:
        raise UsageError(f"a margin needs at least 2 options, item {item.id!r} has {len(item.options)}")
    letters = letter_ids(model.need_tokenizer(), len(item.options))
    chosen = int(clean[torch.tensor(letters, device=clean.device)].argmax())
    if metric == "margin-right":
        if not isinstance(item.answer, int):
            raise UsageError(f"metric='margin-right' needs the right option of item {item.id!r}")
        chosen = item.answer
    rest = tuple(t for i, t in enumerate(letters) if i != chosen)
    return Margin(letters[chosen], rest, LETTERS[chosen]), LETTERS[chosen]


def _scalar(metric: Callable[[Tensor], Any], logits: Tensor) -> Tensor:
    """What a user's function makes of the logits. Raises UsageError if that is not one finite number with a gradient."""
    value = metric(logits)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(
            f"the metric gave {shape}, not a tensor of one number; it is given logits {tuple(logits.shape)}"
        )
    if not bool(torch.isfinite(value).all()):
        raise UsageError(f"the metric gave {float(value.detach())}; edges cannot be scored by it")
    if logits.requires_grad and not value.requires_grad:
        raise UsageError(
            "the metric does not depend on the logits; compute it from them in torch, without detach()"
        )
    return value.reshape(())


def _over_words(model: Any, clean: Tensor) -> tuple[Margin, str]:
    first, second = clean.topk(2).indices.tolist()
    word = str(first) if model.tokenizer is None else str(model.tokenizer.decode([first]))
    return Margin(first, (second,), word), word
