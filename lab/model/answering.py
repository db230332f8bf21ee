"""Answers: the probability of each option's letter at the last position, or of a free-form target, teacher-forced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lab.carriers import LETTERS
from lab.errors import UsageError
from lab.model.preparing import with_sampler
from lab.model.ready import Ready
from lab.model.run import Edges, Run
from lab.slots import plan_of


@dataclass(frozen=True)
class Answer:
    """What the model answers.

    letter, index   the chosen option (None for an open question)
    probs           softmax over the full vocabulary at the last position, [d_vocab], fp32
    option_probs    probability of each option's letter, normalised over the options, [option]; None without options
    letter_probs    the same letters' shares of `probs`, not normalised, [option]
    text            the chosen option's text, or what the model generates for an open question
    target, logprob teacher-forced log probability of a free-form target, summed over its tokens; None if none asked
    correct         whether the choice is the item's answer; None where the item has no answer index
    options         the options' texts
    """

    probs: Float[Tensor, " d_vocab"] = field(repr=False)
    letter: str | None = None
    index: int | None = None
    option_probs: Float[Tensor, " option"] | None = None
    letter_probs: Float[Tensor, " option"] | None = None
    text: str = ""
    target: str | None = None
    logprob: float | None = None
    token_logprobs: tuple[float, ...] = ()
    correct: bool | None = None
    options: tuple[str, ...] = ()

    @property
    def by_option(self) -> dict[str, float]:
        """Option -> its probability, normalised over the options; to read, so rounded to four digits."""
        probs = [] if self.option_probs is None else self.option_probs.tolist()
        return {o: round(p, 4) for o, p in zip(self.options, probs, strict=True)}


def letter_ids(tokenizer: Any, n: int) -> list[int]:
    """Token id of each option's bare letter. Raises UsageError if a letter is not one token of its own."""
    ids: list[int] = []
    for letter in LETTERS[:n]:
        coded = tokenizer(letter, add_special_tokens=False)["input_ids"]
        if len(coded) != 1 or coded[0] in ids or coded[0] == tokenizer.unk_token_id:
            raise UsageError(
                f"the tokenizer has no single token for option letter {letter!r}: {coded}; use fewer options"
            )
        ids.append(int(coded[0]))
    return ids


@torch.no_grad()
def answer(
    model: Any, ready: Ready, *, target: str | None, edges: Mapping[int, Edges] | None = None,
    mechanisms: Any = (), max_new_tokens: int = 20, policy: Any = None,
) -> Answer:  # fmt: skip
    """Answer one prepared question. Raises UsageError for several worlds or a target without tokens."""
    if ready.n_worlds != 1:
        raise UsageError(
            f"answer() takes one question, got {ready.n_worlds} worlds; call the model for logits instead"
        )
    item = ready.item
    if target is None and item is not None and not item.options and isinstance(item.answer, str):
        target = item.answer
    how: dict[str, Any] = {"edges": edges, "mechanisms": mechanisms, "policy": model.pruning.chosen(policy)}
    probs = model(ready, **how)[0, -1].float().softmax(-1).cpu()
    forced = _teacher_forced(model, ready, target, how) if target is not None else {}
    if item is None or not item.options:
        text = str(model.generate(ready, max_new_tokens=max_new_tokens, **how)) if model.tokenizer else ""
        return Answer(probs, text=text, **forced)
    letters = probs[torch.tensor(letter_ids(model.need_tokenizer(), len(item.options)))]
    best = int(letters.argmax())
    return Answer(
        probs, LETTERS[best], best, letters / letters.sum(), letters, item.options[best],
        correct=best == item.answer if isinstance(item.answer, int) else None, options=item.options, **forced,
    )  # fmt: skip


def _teacher_forced(model: Any, ready: Ready, target: str, how: dict[str, Any]) -> dict[str, Any]:
    """log p of every target token given the prompt and the target tokens before it."""
    ids = model.need_tokenizer()(target, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if not ids.shape[1]:
        raise UsageError(f"the target {target!r} has no tokens")
    if model.cfg.n_ctx and ids.shape[1] > model.cfg.n_ctx:
        raise UsageError(
            f"the target has {ids.shape[1]:,} tokens, the model was made for {model.cfg.n_ctx:,} positions; shorten it"
        )
    logits = target_logits(model, ready, ids, **how)
    each = logits.float().log_softmax(-1).gather(-1, ids.to(logits.device)[..., None]).squeeze(-1)[0]
    return {"target": target, "logprob": float(each.sum()), "token_logprobs": tuple(each.tolist())}


def target_logits(
    model: Any, ready: Ready, ids: Tensor, *, edges: Any = None, mechanisms: Any = (), policy: Any = None
) -> Tensor:
    """Logits [world, target, d_vocab] that predict the target ids [world, target], prompt and target read cached."""
    from lab.model.decoder import decode

    plan = ready.plan + plan_of(mechanisms, model.sizes)
    ready = with_sampler(model, ready, plan)
    run = Run(dict(edges or {}), policy=model.pruning.chosen(policy))
    with model.lock.shared():
        door, maps = model.arrive(ready, plan, run)
        cache = model.new_cache(plan)
        first = model.read(*model.prefill(door, run, cache, plan=plan, tokens=maps))
        if ids.shape[1] == 1:
            return first
        embedding = model.hf.get_input_embeddings()
        more = door.then(embedding(ids[:, :-1].to(model.device)))
        rest = decode(model, more, run, start=door.embeds.shape[1], cache=cache, detours=plan.detours)
        return torch.cat([first, model.read(*rest, "all")], 1)
