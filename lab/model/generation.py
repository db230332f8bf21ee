"""Cached generation through the same loop: prefill once, then one new row a step. Cuts and hooks act in every step.

Greedy ids equal `hf.generate(do_sample=False)`; of a checkpoint's generation config, eos, pad and repetition_penalty count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

from lab.errors import UsageError
from lab.model.door import Door
from lab.model.ready import Ready
from lab.model.run import Run
from lab.slots import Plan


class Generated(str):
    """Generated text of the first world; `.texts` of every world, `.ids` [world, new] on the CPU."""

    ids: Tensor
    texts: list[str]

    @staticmethod
    def of(ids: Tensor, texts: list[str]) -> Generated:
        made = Generated(texts[0] if texts else "")
        made.ids, made.texts = ids, texts
        return made


@torch.no_grad()
def generate(
    model: Any, ready: Ready, run: Run, *, plan: Plan, max_new_tokens: int, do_sample: bool, temperature: float,
    top_k: int, top_p: float, seed: int, stop: Sequence[int] | None, chunk: int | None,
    callback: Callable[[list[int], str], Any] | None,
) -> Generated:  # fmt: skip
    """Generate until every world has met a stop token, or `max_new_tokens`.

    stop      token ids that end a world's text; None takes the checkpoint's own
    callback  called after each step with (new id of every world, text of world 0 so far)
    Raises UsageError for settings that make no sense.
    """
    _check(max_new_tokens, temperature, top_p, top_k)
    choose = _Chooser(model, ready, do_sample, temperature, top_k, top_p, seed)
    ends = _ends(model, stop)
    pad = _pad_id(model, ends)
    ids: list[Tensor] = []
    with model.lock.shared():
        door, maps = model.arrive(ready, plan, run)
        cache = model.new_cache(plan)
        resid, side = model.prefill(door, run, cache, chunk=chunk, plan=plan, tokens=maps)
        logits = model.read(resid, side)[:, -1]
    done = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    at = door.embeds.shape[1]
    for _ in range(max_new_tokens):
        new = torch.where(done, pad, choose(logits, ids))
        ids.append(new)
        done = done | torch.isin(new, ends.to(new.device))
        if callback is not None:
            callback(new.tolist(), _texts(model, torch.stack(ids, 1)[:1])[0])
        if bool(done.all()) or len(ids) == max_new_tokens:
            break
        with model.lock.shared():
            door = _next(model, door, new)
            logits = _step(model, door, run, cache, plan, at)
        at += 1
    out = torch.stack(ids, 1).cpu()
    return Generated.of(out, _texts(model, out))


def _next(model: Any, door: Door, new: Tensor) -> Door:
    """The door of one new token per world."""
    embedding = model.hf.get_input_embeddings()
    return door.then(embedding(new.to(model.device))[:, None])


def _step(model: Any, door: Door, run: Run, cache: Any, plan: Plan, at: int) -> Tensor:
    from lab.model.decoder import decode

    resid, side = decode(model, door, run, start=at, cache=cache, detours=plan.detours)
    return model.read(resid, side)[:, -1]


def _check(max_new_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    numbers = {"temperature": temperature, "top_p": top_p}
    whole = {"max_new_tokens": max_new_tokens, "top_k": top_k}
    for name, value in {**numbers, **whole}.items():
        if not isinstance(value, Real if name in numbers else Integral):
            raise UsageError(
                f"{name} must be a {'number' if name in numbers else 'whole number'}, got {value!r}"
            )
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not temperature > 0 or not 0 < top_p <= 1 or top_k < 0:
        raise UsageError(
            f"need temperature > 0, 0 < top_p <= 1, top_k >= 0; got {temperature}, {top_p}, {top_k}"
        )


def _ends(model: Any, stop: Sequence[int] | None) -> Tensor:
    found: Any = stop
    if found is None:
        found = getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(model.tokenizer, "eos_token_id", None)
    flat = [] if found is None else [found] if isinstance(found, int) else list(found)
    try:
        return torch.tensor([int(i) for i in flat], dtype=torch.long)
    except (TypeError, ValueError):
        raise UsageError(f"stop takes token ids, got {found!r}") from None


def _pad_id(model: Any, ends: Tensor) -> int:
    pad = getattr(getattr(model.hf, "generation_config", None), "pad_token_id", None)
    return int(pad) if pad is not None else int(ends[0]) if len(ends) else 0


def _texts(model: Any, ids: Tensor) -> list[str]:
    if model.tokenizer is None:
        return [""] * len(ids)
    return [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids.tolist()]


class _Chooser:
    """Logits [world, d_vocab] -> next ids [world]: the argmax, or a seeded sample through transformers' own warpers."""

    def __init__(
        self,
        model: Any,
        ready: Ready,
        do_sample: bool,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
    ) -> None:
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self.prompt: Tensor = ready.inputs["input_ids"]
        self.process = LogitsProcessorList()
        penalty = getattr(getattr(model.hf, "generation_config", None), "repetition_penalty", None)
        if penalty is not None and penalty != 1.0:
            self.process.append(RepetitionPenaltyLogitsProcessor(penalty))
        self.generator: torch.Generator | None = None
        if do_sample:
            self.generator = torch.Generator(model.device).manual_seed(seed)
            self.process += [TemperatureLogitsWarper(float(temperature))] if temperature != 1.0 else []
            self.process += [TopKLogitsWarper(top_k)] if top_k else []
            self.process += [TopPLogitsWarper(top_p)] if top_p < 1.0 else []

    def __call__(self, logits: Tensor, ids: list[Tensor]) -> Tensor:
        so_far = torch.cat([self.prompt.to(logits.device), *(i[:, None] for i in ids)], 1)
        scores: Tensor = self.process(cast(Any, so_far), cast(Any, logits.float()))
        if self.generator is None:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator).squeeze(1)
