"""Fitting linear maps: ridge regression and L2-penalised logistic regression, on few samples of many dimensions.

Both work in the span of the training samples (their singular vectors), where the solution lies anyway: the cost grows
with samples squared, not with dimensions squared. Everything is float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # times the mean squared singular value


@dataclass(frozen=True)
class Span:
    """Training samples in the coordinates of their own span.

    u [train, r] and s [r]: the standardised samples are u * s; new samples are taken there by `take`
    """

    mean: Tensor
    scale: Tensor
    u: Tensor
    s: Tensor
    v: Tensor

    @staticmethod
    def of(x: Tensor) -> Span:
        """x [train, d]; a dimension that does not vary counts nothing."""
        x = x.double()
        mean, spread = x.mean(0), x.std(0, unbiased=False)
        scale = torch.where(spread > 1e-9 * spread.max().clamp(min=1e-300), spread, torch.inf)
        u, s, vh = torch.linalg.svd((x - mean) / scale, full_matrices=False)
        real = s > 1e-10 * s.max().clamp(min=1e-300)
        return Span(mean, scale, u[:, real], s[real], vh[real].T)

    @property
    def train(self) -> Tensor:
        return self.u * self.s

    def take(self, x: Tensor) -> Tensor:
        """New samples [n, d] -> [n, r]."""
        return ((x.double() - self.mean) / self.scale) @ self.v


def ridge(span: Span, y: Tensor, new: Tensor) -> Tensor:
    """Predictions [n, k] for new samples; y [train, k] (or [train]). The penalty is the one of the least leave-one-out
    error, which has a closed form."""
    y = y.double().reshape(len(y), -1)
    middle = y.mean(0)
    target, s2 = span.u.T @ (y - middle), span.s**2
    best: tuple[float, Tensor] | None = None
    for penalty in PENALTIES:
        shrink = s2 / (s2 + penalty * (s2.mean() if len(s2) else 1.0))
        fitted = span.u @ (shrink[:, None] * target)
        # 1/n for the mean, which is fitted too
        lever = (span.u**2 * shrink).sum(1) + 1 / len(y)
        error = float((((y - middle - fitted) / (1 - lever).clamp(min=1e-9)[:, None]) ** 2).mean())
        if best is None or error < best[0]:
            best = (error, shrink)
    assert best is not None
    weight = (best[1] / span.s)[:, None] * target
    return span.take(new) @ weight + middle


def logistic(span: Span, y: Tensor, n_classes: int, new: Tensor, penalty: float = 1e-2) -> Tensor:
    """Class probabilities [n, class] for new samples; y [train] of class numbers. Newton steps by L-BFGS.

    penalty  times half the squared weights, per sample; samples are scaled to unit mean square first
    """
    size = (span.s**2).mean().sqrt() if len(span.s) else torch.tensor(1.0)
    x = span.train / size.clamp(min=1e-300) * len(y) ** 0.5 if len(span.s) else span.train
    weight = torch.zeros(x.shape[1], n_classes, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=torch.double, requires_grad=True)
    steps = torch.optim.LBFGS([weight, bias], max_iter=40, line_search_fn="strong_wolfe", tolerance_grad=1e-5)

    def loss() -> Tensor:
        with torch.enable_grad():
            steps.zero_grad()
            value = torch.nn.functional.cross_entropy(x @ weight + bias, y) + penalty / 2 * (weight**2).sum()
            value.backward()
        return value

    steps.step(loss)  # type: ignore[arg-type]
    with torch.no_grad():
        scaled = span.take(new) / size.clamp(min=1e-300) * len(y) ** 0.5 if len(span.s) else span.take(new)
        return (scaled @ weight + bias).softmax(-1)
