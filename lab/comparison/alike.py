"""How alike two runs are inside: cosine and CKA of the residual stream, and what the answer would be at every layer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lab.comparison.traces import GROUPS, Trace, shared

MOST = 512  # tokens a CKA is made of; more are thinned evenly


def likeness(base: Trace, other: Trace) -> dict[str, Any]:
    """ "cosine" and "cka" [group][layer] over shared tokens, "kl" [layer] at the last position (nats, from the base)."""
    tokens = shared(base, other)
    group = other.groups[tokens.here]
    cosines, ckas = [], []
    for mine, theirs in zip(other.resid, base.resid, strict=True):
        x, y = mine[tokens.here], tokens.of(theirs)
        there = x.isfinite().all(1)
        cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
        at = [there & (group == g) for g in range(len(GROUPS))]
        cosines.append([float(cosine[a].mean()) if bool(a.any()) else float("nan") for a in at])
        ckas.append([cka(x[a], y[a]) for a in at])
    kl = (base.lens.exp() * (base.lens - other.lens)).sum(-1)
    return {"cosine": _by_group(cosines), "cka": _by_group(ckas), "kl": kl.clamp(min=0).tolist()}


def _by_group(rows: list[list[float]]) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)]


def cka(x: Float[Tensor, "token d"], y: Float[Tensor, "token d"]) -> float:
    """Linear CKA over tokens with the unbiased estimate of HSIC (Song et al. 2012; Nguyen et al. 2021); nan below 4 tokens.

    Unbiased, because tokens are often fewer than dimensions, where the plain estimate is near 1 whatever is compared.
    """
    if len(x) > MOST:
        at = torch.linspace(0, len(x) - 1, MOST).long()
        x, y = x[at], y[at]
    if len(x) < 4:
        return float("nan")
    a, b = (_gram(t) for t in (x, y))
    scale = _hsic(a, a) * _hsic(b, b)
    return float(_hsic(a, b) / scale.sqrt()) if float(scale) > 0 else float("nan")


def _gram(x: Tensor) -> Tensor:
    x = x.double() - x.double().mean(0)
    return (x @ x.T).fill_diagonal_(0)


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    n = len(a)
    rows = a.sum(1) @ b.sum(1)
    mean = a.sum() * b.sum() / ((n - 1) * (n - 2))
    return ((a * b).sum() + mean - 2 / (n - 2) * rows) / (n * (n - 3))
