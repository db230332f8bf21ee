"""Answers with and without a policy: the probability of every choice, clean and with the policy's edges cut.

1 run the prompt clean and keep the run   2 run it again from there with the policy's edges cut   3 read the last
position: the options' letters, or where there are none the five words that the clean run finds most probable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.carriers import LETTERS, VideoQA
from lab.edges.asked import Executor
from lab.edges.policy import Policy
from lab.edges.store import Store
from lab.edges.targets import letters_of
from lab.result import Result
from lab.runs import progress as bar
from probes.asking import Asked, Case, ProbeRecipe, asked, recipe_fields

RUNS = ("clean", "policy")
WORDS = 5  # of a question without options
OF_OPTIONS, OF_ALL = "probability among the options", "probability of the next token"


class AnswersRecipe(ProbeRecipe):
    """Answers of a model to items, clean and under `policy` (none: twice the clean ones).

    view   what the explorer showed when it wrote the file; changes no number, and is no part of the recipe's id
    """

    executor: Executor = "fast"
    view: dict[str, Any] = {}

    def canonical(self) -> str:
        """As of all recipes, without `view`."""
        return super().canonical() if not self.view else self.model_copy(update={"view": {}}).canonical()

    def run(self, *, progress: bool = True, model: Any = None) -> list[Result]:
        """Load what the recipe names (or use `model`) and answer."""
        return [_answers(self.asked(model), self.executor, self.plain(), progress)]


@dataclass(frozen=True)
class Choices:
    """What can be answered to one prompt: tokens, their names, and whether they are options."""

    ids: tuple[int, ...]
    names: tuple[str, ...]
    options: bool

    @staticmethod
    def of(model: Any, item: VideoQA | None, clean: Tensor) -> Choices:
        """The letters of the item's options; without options the likeliest words of the clean logits [d_vocab]."""
        letters = letters_of(model, item)
        if item is not None and letters:
            return Choices(
                letters, tuple(f"{a} {o}" for a, o in zip(LETTERS, item.options, strict=False)), True
            )
        best = tuple(clean.topk(min(WORDS, len(clean))).indices.tolist())
        return Choices(best, tuple(_printed(model, i) for i in best), False)

    @property
    def unit(self) -> str:
        """What `p` gives."""
        return OF_OPTIONS if self.options else OF_ALL

    def p(self, logits: Tensor) -> tuple[float, ...]:
        """Probability of every choice, from logits [d_vocab]: among the options, or among all tokens."""
        ids = list(self.ids)
        if self.options:
            return tuple(logits[ids].double().softmax(-1).tolist())
        return tuple(logits.double().softmax(-1)[ids].tolist())

    def log_odds(self, logits: Tensor, choice: int) -> float:
        """Log-odds of one choice, nats: against the other options, or against all other tokens. Does not saturate."""
        among = logits[list(self.ids)] if self.options else logits
        at = choice if self.options else self.ids[choice]
        rest = torch.arange(len(among), device=among.device) != at
        return float(among[at].double() - among[rest].double().logsumexp(-1))


def answers(
    model: Any, items: Any, *, policy: Policy | None = None, executor: Executor = "fast", n_frames: int = 8,
    show_progress: bool = True,
) -> Result:  # fmt: skip
    """Probabilities of every choice, clean and under a policy.

    items     one or several VideoQA or Ready (one world each)
    executor  "fast": from one stored clean run; "reference": one full forward with dense masks; equal up to rounding

    Returns a Result with axes (item, run, choice), run "clean" or "policy"; choices are numbered from 0, and
    `notes["choices"]` names those of every item. Where an item has fewer than others, nan.
    """
    fields = recipe_fields(model, items, n_frames, policy, ())
    recipe = {} if fields is None else AnswersRecipe(**fields, executor=executor).plain()
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=(), twins=False)
    return _answers(who, executor, recipe, show_progress)


def _answers(who: Asked, executor: Executor, recipe: dict[str, Any], show: bool) -> Result:
    found = [_one(who, case, executor) for case in bar(who.cases, desc="answers", show=show)]
    most = max(len(c.names) for c, _ in found)
    values = np.full((len(found), len(RUNS), most), np.nan)
    for i, (choices, rows) in enumerate(found):
        values[i, :, : len(choices.names)] = rows
    units = sorted({c.unit for c, _ in found})
    names = {key: list(c.names) for key, (c, _) in zip(who.keys, found, strict=True)}
    return Result(
        values, ("item", "run", "choice"), {"item": who.keys, "run": list(RUNS), "choice": list(range(most))},
        " or ".join(units), recipe, "answers, clean and under the policy", {"choices": names},
    )  # fmt: skip


@torch.no_grad()
def _one(who: Asked, case: Case, executor: Executor) -> tuple[Choices, Sequence[Sequence[float]]]:
    model, policy = who.model, who.policy or Policy(cuts=())
    clean = (
        Store.of(model, case.ready).clean(model)[0]
        if executor == "fast"
        else _full(model, case, Policy(cuts=()))
    )
    cut = clean if policy.is_null else _full(model, case, policy, executor)
    choices = Choices.of(model, case.item, clean)
    return choices, [choices.p(clean), choices.p(cut)]


def _full(model: Any, case: Case, policy: Policy, executor: Executor = "reference") -> Tensor:
    return model(case.ready, policy=policy, executor=executor)[0, -1]


def _printed(model: Any, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token])
