"""Unembedding: rows of the stream -> what they say in the vocabulary, a few rows at a time.

A row of logits is d_vocab numbers; thousands of rows never stand in memory together. What is kept of a row is small:
its best words, the words that are followed, its entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lab.errors import UsageError

Mode = Literal["normed", "raw", "paper"]
NOT_NORMED = {
    "raw": "raw: the model's head without its final norm, except after the last layer (Map the Flow's gen_prob)",
    "paper": "raw: the input embeddings without the final norm, except after the last layer (Map the Flow's logit lens)",
}
CHUNK_BYTES = 64 << 20  # of fp32 logits at a time; softmax and sorting need about three times as much
Logits = Callable[[int, Tensor], Tensor]  # layer (0-based), rows [n, d_model] -> logits [n, d_vocab]


def reading(model: Any, mode: str, tuned: Any = None) -> Logits:
    """How a mode reads rows. Raises UsageError for an unknown mode, or for one beside a tuned lens."""
    if mode not in get_args(Mode):
        raise UsageError(f"no mode {mode!r}; use one of {', '.join(get_args(Mode))}")
    if tuned is not None and mode != "normed":
        raise UsageError(f"a tuned lens reads normed rows, mode={mode!r} does not; leave mode out")
    last = model.cfg.n_layers - 1

    def logits(layer: int, rows: Tensor) -> Tensor:
        if tuned is not None:
            return model.unembed(model.ln_final(tuned.translate(layer, rows)))
        rows = model.ln_final(rows) if mode == "normed" or layer == last else rows
        if mode == "paper":
            return rows @ model.hf.get_input_embeddings().weight.T.to(rows)
        return model.unembed(rows)

    return logits


@dataclass(frozen=True)
class Said:
    """What n rows say.

    ids, p        the best words and their probabilities, [n, top]
    followed, rank   probability of the followed words, and how many words are more probable plus one, [n, word]
    entropy       of the whole distribution in nats, [n]
    """

    ids: Tensor
    p: Tensor
    followed: Tensor
    rank: Tensor
    entropy: Tensor


def chunk_rows(d_vocab: int) -> int:
    """Rows whose logits are computed together."""
    return max(1, CHUNK_BYTES // (4 * d_vocab))


@torch.no_grad()
def said_by(logits: Logits, layer: int, rows: Tensor, words: Sequence[int], top: int, d_vocab: int) -> Said:
    """What rows [n, d_model] of one layer say. top: how many best words to keep (0: none)."""
    n = chunk_rows(d_vocab)
    parts = [_said(logits(layer, piece).float(), words, top) for piece in rows.split(n)] if len(rows) else []
    if not parts:
        empty = torch.empty(0, len(words))
        return Said(torch.empty(0, top).long(), torch.empty(0, top), empty, empty.long(), torch.empty(0))
    return Said(*(torch.cat([getattr(p, name) for p in parts]) for name in Said.__dataclass_fields__))


def _said(logits: Tensor, words: Sequence[int], top: int) -> Said:
    total = logits.logsumexp(-1, keepdim=True)
    best = logits.topk(min(top, logits.shape[-1]), -1)
    mine = logits[:, list(words)]
    rank = (
        torch.stack([(logits > mine[:, i : i + 1]).sum(-1) + 1 for i in range(len(words))], -1)
        if words
        else mine.long()
    )
    p = logits.sub_(total).exp_()  # in place: a chunk is the largest thing here
    # of a softmax, -sum p log p; rows of -inf logits give p = 0, whose logarithm counts as 0
    entropy = torch.special.entr(p).sum(-1)
    return Said(
        *(x.cpu() for x in (best.indices, (best.values - total).exp(), (mine - total).exp(), rank, entropy))
    )
