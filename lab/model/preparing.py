"""From a question, or from a processor's tensors, to a Ready. Touches no weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.errors import LabWarning, PromptError, RunError, UsageError
from lab.model.ready import Ready
from lab.model.token_maps import token_maps
from lab.prompt import answer_spans, lay_out, question_spans, render
from lab.slots import Plan, called
from lab.video import read as read_video

N_FRAMES = 8
FAR = 16  # times the positions a model was made for: nobody means so long a prompt


def prepare(
    model: Any, item: VideoQA, *, n_frames: int | None, fps: float | None, index: Sequence[int] | None,
    system: str | None, plan: Plan,
) -> Ready:  # fmt: skip
    """Video -> frames -> pixels; question -> spans -> ids. The frames default to 8 uniform ones.

    Raises VideoError for an unreadable video, PromptError for a prompt whose tokens cannot be given roles,
    UsageError without a tokenizer, and for more frames than the model's positions could hold.
    """
    tokenizer = model.need_tokenizer()
    if n_frames is None and fps is None and index is None:
        n_frames = N_FRAMES
    _check_frames(model, n_frames)
    frames = read_video(item.video, n_frames=n_frames, fps=fps, index=index, clip=item.clip)
    if plan.sampler is not None:
        frames = plan.sampler(frames, item.question)
    family, config = model.family, model.hf.config
    pixels, grid = family.pixels(frames, config, model.preprocessor)
    spans = family.turn_for(
        tokenizer, family.video_spans(frames, grid), question_spans(item), answer_spans(item), system
    )
    ids, tokens = lay_out(spans, grid, tokenizer, family.placeholder(config))
    _check_context(model, tokens)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **pixels,
        **family.extra_inputs(ids, config),
    }
    asked = {"n_frames": n_frames, "fps": fps, "index": None if index is None else list(index)}
    sampling = {k: v for k, v in asked.items() if v is not None}
    maps = (replace(_sized(tokens, model), ahead=_ahead(plan)),)
    return Ready(inputs, maps, (grid,), item, frames, render(spans), plan, sampling, system)


def _ahead(plan: Plan) -> tuple[str, ...]:
    """What in the plan changes the tokens between here and the decoder."""
    return tuple(type(s).__name__ for s in (plan.encoder, *plan.stages, plan.layout) if s is not None)


def with_sampler(model: Any, ready: Ready, plan: Plan) -> Ready:
    """The same question with the frames that the plan's sampler chooses, prepared once and kept on `ready`.

    `ready` itself where it was prepared with that sampler, or where the plan has none. Raises RunError for tensors that
    a processor made: their frames are chosen.
    """
    if plan.sampler is None or ready.plan.sampler is not None:
        return ready
    if ready.item is None:
        raise RunError(
            f"{called(plan.sampler)} chooses frames, and these inputs came from a processor, which chose already; use "
            "model.prepare(item, mechanisms=[...])"
        )
    held = ready.memo.get("sampled")
    if held is None or held[0] != plan.sampler:
        how = {"n_frames": None, "fps": None, "index": None, **ready.sampling}
        own = Plan(sampler=plan.sampler)
        held = plan.sampler, prepare(model, ready.item, **how, system=ready.system, plan=own)
        ready.memo["sampled"] = held
    return replace(held[1], plan=ready.plan)


def _check_frames(model: Any, n_frames: int | None) -> None:
    """Before so many are decoded: two frames make at least one token in every family."""
    n_ctx = model.cfg.n_ctx
    if n_ctx and (n_frames or 0) > 2 * n_ctx:
        raise UsageError(
            f"n_frames={n_frames:,} makes at least {(n_frames or 0) // 2:,} positions, the model was made for {n_ctx:,}; take "
            "fewer frames"
        )


def _check_context(model: Any, tokens: TokenMap) -> None:
    """Text that fills the model's context alone is a mistake; a video that reaches beyond it may be meant."""
    n, n_ctx = len(tokens), model.cfg.n_ctx
    text = n - len(tokens.where(kind="video"))
    if not n_ctx or n <= n_ctx:
        return
    if text > n_ctx:
        raise PromptError(
            f"the text has {text:,} tokens, the model was made for {n_ctx:,} positions; shorten it"
        )
    if n > FAR * n_ctx:
        raise PromptError(
            f"the prompt has {n:,} positions, more than {FAR} times the {n_ctx:,} that the model was made for; take fewer frames"
        )
    warnings.warn(
        f"the prompt has {n:,} positions, the model was made for {n_ctx:,}; answers may mean nothing: take fewer frames",
        LabWarning,
        stacklevel=4,
    )


def prepare_inputs(model: Any, inputs: dict[str, Any], *, roles: Any) -> Ready:
    """A transformers processor's own tensors, unchanged. Raises UsageError for what is missing or does not fit."""
    inputs = {k: v for k, v in inputs.items() if v is not None}
    _check(model, inputs)
    inputs["input_ids"] = inputs["input_ids"].long()  # some families index with them
    config = model.hf.config
    maps = token_maps(model.family, config, inputs, tokenizer=model.tokenizer, roles=roles)
    maps = tuple(_sized(m, model) for m in maps)
    return Ready(inputs, maps, tuple(model.family.grids(config, inputs)))


def _sized(tokens: TokenMap, model: Any) -> TokenMap:
    """The map with the model's sizes, so that edges can be counted from it alone."""
    return replace(tokens, n_layers=model.cfg.n_layers, n_heads=model.cfg.n_heads)


def _check(model: Any, inputs: dict[str, Any]) -> None:
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        what = "nothing" if ids is None else f"{type(ids).__name__} {tuple(getattr(ids, 'shape', ()))}"
        raise UsageError(f"input_ids must be an integer tensor [world, pos], got {what}")
    if not ids.numel():
        raise UsageError(f"input_ids are empty: {tuple(ids.shape)}")
    n = model.hf.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= n:
        raise UsageError(
            f"input_ids reach from {int(ids.min())} to {int(ids.max())}, the model has {n} embeddings"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        raise UsageError(f"attention_mask must be a tensor like input_ids, got {type(mask).__name__}")
    if mask is not None and tuple(mask.shape) != tuple(ids.shape):
        raise UsageError(f"attention_mask {tuple(mask.shape)} does not fit input_ids {tuple(ids.shape)}")
    missing = model.family.missing_inputs(inputs, model.hf.config)
    if missing:
        raise UsageError(
            f"{', '.join(missing)} missing: the model would run and give other numbers without a word; "
            "pass all that the processor returned"
        )
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UsageError(
                f"{name} holds {int((~torch.isfinite(value)).sum())} values that are nan or infinite"
            )
