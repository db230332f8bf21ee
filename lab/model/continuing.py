"""Prompts that go on from one another: a response after its prompt, several questions after one video.

What two prompts have in common up to some position is the same at the decoder's door, so the vision side runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab.errors import UsageError
from lab.model.ready import Ready
from lab.model.seeing import hand_over, see

# inputs with one entry per position, and what a text token has there
_PER_POSITION = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 0}


def with_response(model: Any, ready: Ready, ids: Sequence[int], pieces: Sequence[str]) -> Ready:
    """The prompt followed by tokens of its answer, which have the role "generated". The vision side is not run again.

    Raises UsageError for several worlds, padding, a mechanism's own layout, or inputs that cannot be made longer.
    """
    if ready.n_worlds != 1 or ready.plan.layout is not None or _padded(ready):
        raise UsageError(
            f"an answer's text can follow one prompt without padding, of the model's own layout; this one has "
            f"{ready.n_worlds} worlds{', padding' if _padded(ready) else ''}"
        )
    new = torch.tensor([list(ids)])
    inputs = {
        **ready.inputs,
        "input_ids": torch.cat([ready.inputs["input_ids"], new.to(ready.inputs["input_ids"])], 1),
    }
    for name, value in ready.inputs.items():
        if name in _PER_POSITION:
            inputs[name] = torch.cat(
                [value, torch.full_like(value[:, :1], _PER_POSITION[name]).expand(-1, len(ids))], 1
            )
        elif name == "position_ids":
            raise UsageError(
                "position_ids are given with the prompt, and an answer's text would have none; leave them out"
            )
    longer = replace(ready, inputs=inputs, maps=(ready.tokens.generated(ids, pieces),), memo={})
    lend(model, ready, longer, ready.n_pos)
    return longer


def beginning_of(model: Any, ready: Ready, n: int) -> Ready:
    """The first `n` positions of a prompt, its whole video among them, as a prompt. The vision side is not run again."""
    inputs = {k: v[:, :n] if k == "input_ids" or k in _PER_POSITION else v for k, v in ready.inputs.items()}
    short = replace(ready, inputs=inputs, maps=(ready.tokens.only(torch.arange(n)),), memo={})
    lend(model, ready, short, n)
    return short


def lend(model: Any, source: Ready, to: Ready, n: int) -> None:
    """Let `to`, which has the first `n` positions of `source` and text after them, have what `source` saw."""
    with torch.no_grad():
        door = see(model, source)
        if not source.memo:  # nothing is kept now (see `see`): then `to` must look for itself
            return
        rest: Tensor = to.inputs["input_ids"][:, n:].to(model.device)
        start = door.rows(0, n)
        if not rest.shape[1]:
            hand_over(model, to, start)
            return
        after = start.then(model.hf.get_input_embeddings()(rest))
        embeds = torch.cat([start.embeds, after.embeds], 1)
        rope = torch.cat([start.rope, after.rope.to(start.rope)], -1)
        deep = tuple(torch.cat([d, torch.zeros_like(after.embeds)], 1) for d in start.deep)
        hand_over(model, to, replace(start, embeds=embeds, rope=rope, deep=deep))


def shared_start(a: Ready, b: Ready) -> int:
    """How many positions two prompts share from their first one on, all that is seen included; 0 if not the whole video.

    At most one less than the shorter prompt has: the last position of each is its own.
    """
    if not _alike(a, b):
        return 0
    n = min(a.n_pos, b.n_pos) - 1
    ids, others = (r.inputs["input_ids"][0, :n].cpu() for r in (a, b))
    differ = (ids != others).nonzero()
    n = int(differ[0]) if len(differ) else n
    video = [r.maps[0].where(kind="video") for r in (a, b)]
    return n if all(not len(v) or int(v[-1]) < n for v in video) else 0


def _alike(a: Ready, b: Ready) -> bool:
    """Whether both are one world without padding, seen through the same pixels, with no mechanism of their own."""
    if any(
        r.n_worlds != 1 or _padded(r) or r.plan != type(r.plan)() or "position_ids" in r.inputs
        for r in (a, b)
    ):
        return False
    left, right = (
        {k: v for k, v in r.inputs.items() if k != "input_ids" and k not in _PER_POSITION} for r in (a, b)
    )
    return left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu()))
    return type(a) is type(b) and bool(a == b)


def _padded(ready: Ready) -> bool:
    mask = ready.inputs.get("attention_mask")
    return mask is not None and not bool(mask.all())
