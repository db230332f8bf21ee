"""A cut run the obvious way: a dense boolean mask per layer and one full forward. What the fast executor must equal."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lab.carriers import VideoQA
from lab.edges.closure import Cuts
from lab.edges.cutrows import LayerCut, rows_of
from lab.model.reading import Read
from lab.model.ready import Ready
from lab.model.run import Edges
from lab.slots import ModelSizes


class _Nothing:
    """The policy that cuts nothing: an open `model.pruned` must not add to the cuts asked here."""

    def edges(self, tokens: Any, sizes: ModelSizes, item: VideoQA | None = None) -> dict[int, Edges]:
        return {}


def dense_edges(cut: LayerCut) -> Edges:
    """The edges a mask keeps, as the model asks for them. `cut` is [q, k] or [head, q, k], True where one is removed.

    Generated rows follow the last prompt row, and read each other. A cut made by rows is made dense: here is the
    reference.
    """
    if not isinstance(cut, Tensor):
        cut = rows_of(cut, torch.arange(cut.n_pos))
    n = cut.shape[-1]

    def keep(q: Tensor, k: Tensor) -> Tensor:
        rows, columns = q.clamp(max=n - 1), k.clamp(max=n - 1)
        removed = cut.to(q.device)[..., rows[:, None], columns[None, :]]
        return ~removed | (k >= n)[None, :]

    return keep


@torch.no_grad()
def run_dense(
    model: Any, ready: Ready, cuts: Cuts, read: Read = "last"
) -> Float[Tensor, "world read d_vocab"]:
    """Logits of a full run under `cuts` (layers 0-based), and under nothing else."""
    edges = {layer: dense_edges(cut) for layer, cut in cuts.items()}
    return model(ready, read=read, edges=edges, policy=_Nothing())
