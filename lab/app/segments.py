"""Between policies and the edge editor's grid: which cells a policy cuts, and which edges a prompt's segments have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.binding import Bound
from lab.edges.policy import Policy
from lab.edges.ranges import named
from lab.edges.segments import members
from lab.errors import ConfigError


def marks_of(tokens: TokenMap, names: Sequence[str], item: VideoQA | None) -> Tensor:
    """Which positions every segment has, bool [segment, pos]."""
    return torch.stack([members(tokens, n, item) for n in names])


def pairs_of(bound: Bound, marks: Tensor) -> NDArray[np.int64]:
    """Edges of every (query, key) pair of segments in one layer and head, [query, key]."""
    rows = [bound.exists(m.nonzero().squeeze(1)).sum(0) for m in marks]
    return (torch.stack(rows).double() @ marks.T.double()).long().numpy()


def blocked_of(
    policy: Policy, tokens: TokenMap, names: Sequence[str], n_layers: int, n_heads: int, item: VideoQA | None
) -> NDArray[np.bool_]:
    """The cells that a policy cuts, bool [layer, head, query, key].

    Raises ConfigError for gates, and for a policy that cuts a part of a cell: the editor has whole segments.
    """
    bound, marks = policy.bind(tokens, n_layers, n_heads, item), marks_of(tokens, names, item)
    pairs = torch.from_numpy(pairs_of(bound, marks))
    made: dict[object, Tensor] = {}
    for layer in range(n_layers):
        if bound.active(layer, gated=True):
            raise ConfigError(
                f"the policy has gates in {named(layer)}; the editor blocks edges or allows them"
            )
        key = bound.key(layer)
        if key not in made:
            made[key] = _cells(bound, layer, marks, pairs, names)
    return torch.stack([made[bound.key(layer)].expand(n_heads, -1, -1) for layer in range(n_layers)]).numpy()


def _cells(bound: Bound, layer: int, marks: Tensor, pairs: Tensor, names: Sequence[str]) -> Tensor:
    """The cells cut in one layer, bool [head or 1, query, key]."""
    removed = [bound.removed(layer, m.nonzero().squeeze(1)) for m in marks]
    heads = max((len(r) for r in removed if r is not None), default=1)
    none = torch.zeros(heads, len(bound.tokens))
    rows = [none if r is None else r.sum(1).expand(heads, -1) for r in removed]
    lost = (torch.stack(rows, 1).double() @ marks.T.double()).long()
    partly = ((lost > 0) & (lost < pairs)).any(0).nonzero().tolist()
    if partly:
        q, k = partly[0]
        raise ConfigError(
            f"the policy cuts {int(lost[:, q, k].max())} of {int(pairs[q, k])} edges from {names[k]} to {names[q]} in "
            f"{named(layer)}; the editor has whole segments, run such a policy with `vlab run` or model(ready, policy=)"
        )
    return lost > 0
