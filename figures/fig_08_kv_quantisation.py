"""KV quantisation (VidKV, arXiv 2503.16257): bytes stored, errors of keys and values, and what answers feel of it.

The released life cycle computes the prompt with exact keys and values, so the first token of an answer never differs: the
whole answer is teacher-forced and the divergence is shown token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from figures.base import BANDS, PictureRecipe, about, counted
from lab.result import Result
from lab.view.plates import FULL, Plate
from lab.view.specs import FigureSpec, figure_spec


class KvQuantisationRecipe(PictureRecipe):
    """tokens: of each answer that are compared; settings: names in `lab.bench.kv_bits.SETTINGS`."""

    tokens: int = Field(default=3, ge=1)
    settings: tuple[str, ...] = Field(
        default=("released 2 / 2", "released 1.5 / 1.58", "corrected 2 / 2", "corrected 1.5 / 1.58"),
        min_length=1,
    )


def compute(recipe: KvQuantisationRecipe, *, progress: bool = True) -> list[Result]:
    """KL (item, setting, token) in nats; bytes in % of exact ones and errors in % (setting, measure)."""
    from lab.bench.kv_bits import SETTINGS
    from lab.errors import UsageError
    from lab.runs import progress as bar
    from probes.asking import item_keys

    lost = [s for s in recipe.settings if s not in SETTINGS]
    if lost:
        raise UsageError(f"no setting {lost[0]!r}; there are {', '.join(SETTINGS)}")
    model, items = recipe.loaded()
    chosen = {s: SETTINGS[s] for s in recipe.settings}
    rows = [_item(recipe, model, i, chosen) for i in bar(items, desc="KV bits", show=progress)]
    kl, stored = np.stack([k for k, _ in rows]), np.mean([s for _, s in rows], axis=0)
    names, keys = list(chosen), item_keys(list(items))
    tokens = list(range(1, recipe.tokens + 1))
    return [
        Result(kl, ("item", "setting", "token"), {"item": keys, "setting": names, "token": tokens}, "KL to exact keys and values, nats", {}, "divergence of the answer", about(items)),
        Result(100 * stored, ("setting", "measure"), {"setting": names, "measure": ["bytes stored", "error of keys", "error of values"]}, "% of exact", {}, "what is stored", {"n": {"item": len(items)}}),
    ]  # fmt: skip


def _item(recipe: KvQuantisationRecipe, model: Any, item: Any, chosen: dict[str, Any]) -> tuple[Any, Any]:
    """KL [setting, token] and [setting, (bytes share, key error, value error)] of one question."""
    import torch

    from lab.bench.kv_bits import said

    ready = model.prepare(item, recipe.n_frames)
    ids = model.need_tokenizer()(said(item), add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        exact, _ = _forced(model, ready, ids, None)
        found = [_forced(model, ready, ids, m) for m in chosen.values()]
    kl = np.full((len(chosen), recipe.tokens), np.nan)
    for row, (logp, _) in zip(kl, found, strict=True):
        each = (exact.exp() * (exact - logp)).sum(-1)[: recipe.tokens]
        row[: len(each)] = each.numpy()
    return kl, [s for _, s in found]


def _forced(model: Any, ready: Any, ids: Any, mechanism: Any) -> tuple[Any, list[float]]:
    """Log probabilities at every token of the answer, and how much was stored and how far off it is."""
    from lab.model.answering import target_logits

    mechanisms = [] if mechanism is None else [mechanism]
    logp = target_logits(model, ready, ids, mechanisms=mechanisms)[0].float().log_softmax(-1)
    if mechanism is None:
        return logp, []
    heads = model.run(ready, mechanisms=[replace(mechanism, audit=True)]).heads
    share = float(heads["vidkv.bytes"].double().sum() / heads["vidkv.bytes_exact"].double().sum())
    return logp, [share, *(float(heads[f"vidkv.{n}_error"].double().mean()) for n in ("key", "value"))]


def draw(results: Sequence[Result]) -> Plate:
    """Bytes and errors as bars, KL token by token."""
    kl, stored = results
    return Plate(
        "KV quantisation: bytes, errors and answers", ((_bars(stored), _tokens(kl)),),
        "VidKV at several bits for keys / values, as released and corrected. (a) Bytes of the cache in % of the exact cache's, and relative "
        "errors (Frobenius norm, mean over layers) of what is read back. (b) Mean KL divergence of the next-token distribution from the model "
        "with an exact cache, at each token of the right answer, teacher-forced. The released method computes the prompt with "
        f"exact keys, so token 1 differs by 0 by construction. {counted(kl)} questions. {BANDS}",
        width=FULL, heights=(2.35,), legend="inside", shares=((1.1, 1.0),),
    )  # fmt: skip


def _bars(stored: Result) -> FigureSpec:
    turned = replace(
        stored, values=stored.values.T, axes=("measure", "setting"),
        coords={a: stored.coords[a] for a in ("measure", "setting")},
    )  # fmt: skip
    spec = figure_spec(turned, kind="barh", title="Stored, and how far off", caption="")
    return replace(spec, unit="% of exact")


def _tokens(kl: Result) -> FigureSpec:
    spec = figure_spec(kl, title="Divergence by token of the answer", caption="")
    return replace(spec, x_label="Token of the answer", y_label="KL (nats)")
