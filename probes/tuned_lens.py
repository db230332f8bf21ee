"""Tuned lens (Belrose et al. 2023, arXiv 2303.08112): one affine translator a layer, trained to say what the model will say.

1 run the items once; keep, at every layer, the rows of the tokens asked for, and the last stream of the same tokens
2 for every layer, train h -> h + A h + b so that the model's own norm and head make the final distribution of it (KL)
3 report, on items that trained nothing, KL(final || lens) beside that of the plain lens.

Items that show the same video, and twins, stay on one side of the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lab.errors import ConfigError, UsageError
from lab.result import Result
from lab.runs import progress
from probes.asking import Asked, asked
from probes.folds import groups_of_items
from probes.streams import visit
from probes.unembedding import chunk_rows

BATCH = 256  # rows a step


@dataclass(frozen=True)
class TunedLens:
    """Translators of all layers but the last, which needs none.

    weight  [layer, d_model, d_model] or, of low rank, the product down @ up; bias [layer, d_model]
    report  held-out KL of plain and tuned lens, axes (lens, layer)
    """

    down: Tensor  # [layer, d_model, rank]
    up: Tensor  # [layer, rank, d_model]
    bias: Tensor
    report: Result

    def translate(self, layer: int, rows: Tensor) -> Tensor:
        """Rows [n, d_model] of a layer (0-based) as the last layer would have them."""
        if layer >= len(self.bias):
            return rows
        down, up, bias = (x[layer].to(rows) for x in (self.down, self.up, self.bias))
        return rows + rows @ down @ up + bias

    def save(self, path: str | Path) -> Path:
        """One safetensors file; the report beside it, as `.npz`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {n: getattr(self, n).contiguous() for n in ("down", "up", "bias")}
        save_file(tensors, path)
        self.report.save(path.with_suffix(".npz"))
        return path

    @staticmethod
    def load(path: str | Path) -> TunedLens:
        """What `save` wrote. Raises ConfigError for anything else."""
        try:
            with safe_open(str(path), "pt") as f:
                found = {n: f.get_tensor(n) for n in ("down", "up", "bias")}
        except Exception as e:  # safetensors raises its own kinds, and OSError
            raise ConfigError(f"{path} holds no tuned lens ({str(e)[:120]})") from None
        return TunedLens(**found, report=Result.load(Path(path).with_suffix(".npz")))


@dataclass(frozen=True)
class _Rows:
    """Streams of some items: x [layer, row, d_model], final [row, d_model] (after the last layer, not normed)."""

    x: Tensor
    final: Tensor


def tune(
    model: Any, items: Any, *, tokens: str = "*", rank: int | None = None, epochs: int = 20, lr: float = 1e-3,
    held_out: float = 0.25, rows: int = 20_000, seed: int = 0, n_frames: int = 8, policy: Any = None,
    mechanisms: Sequence[Any] = (), show_progress: bool = True,
) -> TunedLens:  # fmt: skip
    """Train a tuned lens on the spot.

    tokens    whose rows train it; "*": all of the prompt
    rank      of the translators; None: full, which is right for narrow models (d_model below a thousand or so)
    epochs    at most; training of a layer stops where KL on a tenth of the training items no longer falls
    held_out  share of the items (groups of twins) that train nothing and make the report
    rows      at most so many rows train, taken evenly from all training items

    Raises UsageError if the split leaves a side without items, or for a model of one layer.
    """
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    if model.cfg.n_layers < 2:
        raise UsageError("a tuned lens needs a model of at least 2 layers")
    if rank is not None and not 1 <= rank <= model.cfg.d_model:
        raise UsageError(f"rank {rank}: use 1..{model.cfg.d_model}, or None for full rank")
    train, test = _split(who, held_out, seed)
    inner = max(1, len(train) // 10) if len(train) > 1 else 0
    watching, learning = (train[:inner], train[inner:]) if inner else (train, train)
    data = {
        n: _rows(who, part, tokens, rows, seed)
        for n, part in (("learn", learning), ("watch", watching), ("test", test))
    }
    generator = torch.Generator().manual_seed(seed)
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in progress(range(model.cfg.n_layers - 1), desc="tuned lens", show=show_progress):
        made.append(_translator(model, layer, data["learn"], data["watch"], rank, epochs, lr, generator))
    down, up, bias = (torch.stack(list(x)) for x in zip(*made, strict=True))
    return TunedLens(
        down,
        up,
        bias,
        _report(model, (down, up, bias), data["test"], len(learning) + inner, len(test), tokens),
    )


def _split(who: Asked, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    groups = groups_of_items([c.item for c in who.cases])
    names = sorted(set(groups))
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    n_test = max(1, round(held_out * len(names)))
    if not 0 < held_out < 1 or n_test >= len(names):
        raise UsageError(
            f"{len(who.cases)} items of {len(names)} videos cannot be split with held_out={held_out}; give more items"
        )
    chosen = {names[i] for i in order[:n_test]}
    test = [i for i, g in enumerate(groups) if g in chosen]
    return [i for i in range(len(groups)) if i not in set(test)], test


def _rows(who: Asked, part: Sequence[int], tokens: str, most: int, seed: int) -> _Rows:
    n_layers = who.model.cfg.n_layers
    kept: list[list[Tensor]] = [[] for _ in range(n_layers)]
    for i in part:
        case = who.cases[i]
        positions = case.at(tokens)
        each = max(1, most // len(part))
        if len(positions) > each:
            g = torch.Generator().manual_seed(seed * 1_000_003 + i)
            positions = positions[torch.randperm(len(positions), generator=g)[:each]].sort().values

        rows: dict[int, tuple[Tensor, Tensor]] = {}

        def see(layer: int, x: Tensor, here: Tensor, rows: dict[int, tuple[Tensor, Tensor]] = rows) -> None:
            rows[layer] = (x.float().cpu(), here)

        visit(who.model, case, "resid_post", range(n_layers), positions, see, policy=who.policy)
        last = rows[n_layers - 1][1]
        for layer, (x, here) in rows.items():  # rows that are gone at the end have no final distribution
            kept[layer].append(x[torch.isin(here, last)])
    stacked = torch.stack([torch.cat(x) for x in kept])
    return _Rows(stacked[:-1], stacked[-1])


def _translator(
    model: Any, layer: int, learn: _Rows, watch: _Rows, rank: int | None, epochs: int, lr: float, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer's translator, by Adam from the identity; the best by the watched items, the identity among them."""
    d = learn.final.shape[1]
    down = torch.eye(d) if rank is None else torch.randn(d, rank, generator=g) / d**0.5
    up, bias = torch.zeros(down.shape[1], d, requires_grad=True), torch.zeros(d, requires_grad=True)
    trained = [up, bias] if rank is None else [down.requires_grad_(True), up, bias]
    steps = torch.optim.Adam(trained, lr=lr)
    best, tries = (
        (_kl(model, watch.x[layer], watch.final), tuple(t.detach().clone() for t in (down, up, bias))),
        0,
    )
    for _ in range(epochs):
        for at in torch.randperm(len(learn.final), generator=g).split(
            min(BATCH, chunk_rows(model.cfg.d_vocab))
        ):
            x = learn.x[layer][at]
            with torch.enable_grad():
                loss = _divergence(model, x + x @ down @ up + bias, learn.final[at]).mean()
                steps.zero_grad()
                loss.backward()
            steps.step()
        with torch.no_grad():
            now = _kl(model, watch.x[layer] + watch.x[layer] @ down @ up + bias, watch.final)
        if now < best[0]:
            best, tries = (now, tuple(t.detach().clone() for t in (down, up, bias))), 0
        elif (tries := tries + 1) >= 3:
            break
    return best[1]  # type: ignore[return-value]


def _divergence(model: Any, rows: Tensor, final: Tensor) -> Tensor:
    """KL(final || lens) in nats, [row]."""

    def says(x: Tensor) -> Tensor:
        return model.unembed(model.ln_final(x.to(model.device, model.dtype))).float().log_softmax(-1)

    with torch.no_grad():
        truth = says(final)
    return (truth.exp() * (truth - says(rows))).nan_to_num(0.0).sum(-1)


@torch.no_grad()
def _kl(model: Any, rows: Tensor, final: Tensor) -> float:
    pieces = zip(*(x.split(chunk_rows(model.cfg.d_vocab)) for x in (rows, final)), strict=True)
    return float(torch.cat([_divergence(model, a, b).cpu() for a, b in pieces]).mean())


def _report(
    model: Any, made: tuple[Tensor, Tensor, Tensor], test: _Rows, n_train: int, n_test: int, tokens: str
) -> Result:
    down, up, bias = made
    n = len(bias)
    plain = [_kl(model, test.x[i], test.final) for i in range(n)]
    tuned = [_kl(model, test.x[i] + test.x[i] @ down[i] @ up[i] + bias[i], test.final) for i in range(n)]
    return Result(
        values=np.array([plain, tuned]), axes=("lens", "layer"),
        coords={"lens": ["plain", "tuned"], "layer": list(range(1, n + 1))}, unit="KL(final || lens) in nats, held out",
        recipe={}, name="tuned lens against plain lens", baseline=0.0,
        notes={"train_items": n_train, "held_out_items": n_test, "held_out_rows": len(test.final), "tokens": tokens},
    )  # fmt: skip
