"""Differential token drop: which tokens stay, and what accuracy costs at each share of tokens kept.

Tokens that repeat the frame before are dropped, by features or by pixels; as many dropped at random are the control. Cost
is counted: products of the decoder for the tokens it still reads, over those for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from figures.base import BANDS, GRID, PictureRecipe, about, pictures
from lab.result import Result
from lab.view.plates import FULL, Plate, one_scale
from lab.view.specs import FigureSpec, figure_spec

# as people read them, and as `lab.bench.token_drop.variants` names them
VARIANTS = {"by features": "feature", "by pixels": "pixel", "at random": "random"}


class TokenDropRecipe(PictureRecipe):
    """ratios: shares of the compared tokens that are dropped; shown: the one painted on frames."""

    ratios: tuple[float, ...] = Field(default=(0.0, 0.4, 0.6, 0.8, 0.9), min_length=2)
    shown: float = Field(default=0.8, ge=0, le=1)


def compute(recipe: TokenDropRecipe, *, progress: bool = True) -> list[Result]:
    """What stays (variant, frame, row, col), the frames, right answers (item, variant, ratio), and cost (variant, ratio)."""
    from lab.runs import progress as bar

    model, items = recipe.loaded()
    ready = model.prepare(items[0], recipe.n_frames)
    kept = np.stack([_kept(model, ready, _mechanism(v, recipe.shown)) for v in VARIANTS])
    found = [_item(recipe, model, i) for i in bar(items, desc="token drop", show=progress)]
    right, reads = (np.array([f[j] for f in found], float) for j in (0, 1))
    ratios, notes = list(recipe.ratios), about(items)
    from probes.asking import item_keys

    keys = item_keys(list(items))
    whole = ratios.index(0.0) if 0.0 in ratios else int(np.argmin(ratios))
    full = reads[:, :, [whole]]
    cost = np.vectorize(lambda n: _flops(model, n))(reads) / np.vectorize(lambda n: _flops(model, n))(full)
    axes = {"item": keys, "variant": list(VARIANTS), "ratio": ratios}
    return [
        Result(kept, ("variant", *GRID), {"variant": list(VARIANTS), **{a: list(range(k)) for a, k in zip(GRID, kept.shape[1:], strict=True)}}, "token is read (1) or dropped (0)", {}, f"kept when {recipe.shown:.0%} are dropped", {"shown": recipe.shown}),
        pictures(ready.frames.pixels.cpu(), kept.shape[1]),
        Result(100 * right, tuple(axes), axes, "answered right (%)", {}, "accuracy", notes),
        Result(100 * cost, tuple(axes), axes, "decoder products, % of those for all tokens", {}, "cost", notes),
    ]  # fmt: skip


def _mechanism(variant: str, ratio: float) -> Any:
    from lab.bench.token_drop import variants

    return variants(ratio)[VARIANTS[variant]] if ratio else None


def _kept(model: Any, ready: Any, mechanism: Any) -> Any:
    import torch

    tokens = model.maps(ready, mechanisms=[mechanism] if mechanism else [])[0]
    return np.nan_to_num(tokens.painted(torch.ones(len(tokens)), ready.grids[0]).numpy())


def _item(recipe: TokenDropRecipe, model: Any, item: Any) -> tuple[Any, Any]:
    """Whether the answer is right, and how many positions the decoder reads, [variant][ratio]."""
    import torch

    ready = model.prepare(item, recipe.n_frames)
    right, reads = [], []
    with torch.no_grad():
        for variant in VARIANTS:
            row = [[m] if (m := _mechanism(variant, r)) else [] for r in recipe.ratios]
            right.append([bool(model.answer(ready, mechanisms=m).correct) for m in row])
            reads.append([len(model.maps(ready, mechanisms=m)[0]) for m in row])
    return right, reads


def _flops(model: Any, n: float) -> float:
    """Multiplications of one forward over n positions: weights of the decoder's layers, scores and values."""
    c = model.cfg
    kv = 2 * c.d_model * c.n_key_value_heads * c.d_head
    layer = (
        n * (2 * c.d_model * c.n_heads * c.d_head + kv + 3 * c.d_model * c.d_mlp)
        + n * n * c.n_heads * c.d_head
    )
    return float(c.n_layers * layer)


def draw(results: Sequence[Result]) -> Plate:
    """Kept tokens on frames for each way to drop, then accuracy against tokens dropped and against cost."""
    kept, film, right, cost = results
    strips = [_strip(kept, v, film) for v in kept.coords["variant"][:2]]
    n, height = len(right.coords["item"]), 0.5 + 6.1 / 8 * -(-len(film.values) // 8)
    share = kept.notes["shown"]
    curves = one_scale([_accuracy(right), _against(right, cost)])
    return Plate(
        "Token drop: what stays, and what it costs", ((strips[0],), (strips[1],), curves),
        f"Above: tokens of one video that are read (the others are grey) when {share:.0%} of those after the first frame are dropped because they repeat the frame before, "
        f"by features or by pixels. Below: share of questions answered right against the share dropped, and against the decoder's "
        f"multiplications in % of those for all tokens (counted, not timed); as many tokens dropped at random as a control. n = {n} questions. {BANDS}",
        width=FULL, heights=(height, height, 2.0),
    )  # fmt: skip


def _strip(kept: Result, variant: str, film: Result) -> FigureSpec:
    """Tokens that are read show their picture; grey ones are dropped."""
    part = kept.select(variant=variant)
    read = int((part.values > 0).sum())
    title = f"Dropped {variant}: {read} of {part.values.size} tokens are read"
    hidden = replace(part, values=np.where(part.values > 0, 0.0, np.nan))
    spec = figure_spec(hidden, frames=film.values, limits=(0.0, 1.0), title=title, caption="")
    return replace(spec, unit="")


def _accuracy(right: Result) -> FigureSpec:
    spec = figure_spec(right, title="Accuracy against tokens dropped", caption="")
    return replace(
        spec,
        x_label="Dropped of the tokens after frame 1 (share)",
        y_label="Answered right (%)",
        reference=None,
    )


def _against(right: Result, cost: Result) -> FigureSpec:
    """The same curves over cost: of all variants alike, since as many tokens go."""
    spend = cost.mean("item").mean("variant").values
    order = np.argsort(spend, kind="stable")
    mean = right.mean("item")
    turned = replace(
        mean, values=mean.values[:, order], low=None if mean.low is None else mean.low[:, order],
        high=None if mean.high is None else mean.high[:, order], axes=("variant", "cost"),
        coords={"variant": mean.coords["variant"], "cost": [round(float(spend[i]), 1) for i in order]},
    )  # fmt: skip
    spec = figure_spec(turned, title="Accuracy against cost", caption="")
    return replace(
        spec,
        x_label="Decoder multiplications (% of all tokens')",
        y_label="Answered right (%)",
        reference=None,
    )
