"""The same knock-out sweep by several tools: what the cost figure times. Needs torch.

Every work runs all cuts of a case and returns the logits of the last position, [cut, vocabulary].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lab.adapters.nnsight import tracing
from lab.adapters.transformer_lens import bridge
from lab.bench.scaling import NEG, _handed
from lab.edges.closure import Cuts
from lab.edges.cutrows import rows_of
from lab.edges.dense import run_dense
from lab.edges.fast import run_cut
from lab.edges.pathrows import path_rows
from lab.edges.store import Store
from lab.edges.sweeping import layers_of
from lab.errors import ModelError
from lab.model.zoo import wrap

Work = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A model, one prompt, and the cuts of a sweep; masks: each cut's removed edges, dense [q, k], and its layers."""

    model: Any
    ready: Any
    cuts: list[Cuts]
    masks: list[tuple[list[int], Tensor]]

    @staticmethod
    def of(model: Any, item: Any, n_frames: int, pathways: Sequence[str], window: int) -> Case:
        """Every pathway cut in a window round every layer."""
        ready = model.prepare(item, n_frames)
        n, order = model.cfg.n_layers, torch.arange(ready.n_pos)
        cuts: list[Cuts] = []
        masks: list[tuple[list[int], Tensor]] = []
        for pathway in pathways:
            cut = path_rows(ready.maps[0], pathway, ready.item)
            dense = rows_of(cut, order)[0]
            for centre in range(n):
                layers = list(layers_of(centre, window, n))
                cuts.append(dict.fromkeys(layers, cut))
                masks.append((layers, dense))
        return Case(model, ready, cuts, masks)


def works(case: Case) -> tuple[dict[str, Work], dict[str, str]]:
    """Tool -> its way through the sweep; and the tools that cannot run this model, with the reason."""
    done: dict[str, Work] = {
        "ours, fast": lambda: run_cut(case.model, Store.of(case.model, case.ready), case.cuts)[:, -1].float(),
        "ours, reference": lambda: torch.cat(
            [_last(run_dense(case.model, case.ready, c)) for c in case.cuts]
        ),
        "naive": _naive(case),
    }
    left_out: dict[str, str] = {}
    try:
        done["TransformerLens"] = _transformer_lens(case)
    except ModelError as e:
        left_out["TransformerLens"] = str(e).split(";")[0]
    done["nnsight"] = lambda: torch.cat([_nnsight(case, *m) for m in case.masks])
    return done, left_out


def _last(logits: Tensor) -> Tensor:
    return logits[:, -1].float()


def _naive(case: Case) -> Work:
    """The released method: a mask of finfo.min handed to the layers by a wrapper of their attention's forward."""
    hf = copy.deepcopy(case.model.hf)
    hf.set_attn_implementation({"text_config": "eager"})
    parts, dtype = wrap(hf).parts, case.model.dtype

    def run() -> Tensor:
        return torch.cat(
            [_eager(hf, parts, case.ready.inputs, layers, cut, dtype) for layers, cut in case.masks]
        )

    return run


def _eager(
    hf: Any, parts: Any, inputs: Any, layers: Sequence[int], cut: Tensor, dtype: torch.dtype
) -> Tensor:
    kept = torch.ones_like(cut).tril() & ~cut
    mask = ((~kept).to(dtype) * torch.finfo(dtype).min)[None, None]
    attentions = [parts[i].attn for i in layers]
    for a in attentions:
        a.forward = _handed(a.forward, mask)
    try:
        return _last(hf(**inputs, use_cache=False, logits_to_keep=1).logits)
    finally:
        for a in attentions:
            del a.forward


def _transformer_lens(case: Case) -> Work:
    made, given = bridge(case.model), dict(case.ready.inputs)
    ids = given.pop("input_ids")

    def one(layers: Sequence[int], cut: Tensor) -> Tensor:
        def hide(scores: Tensor, hook: Any) -> Tensor:
            return scores.masked_fill(cut, torch.finfo(scores.dtype).min)

        hooks = [(f"blocks.{i}.attn.hook_attn_scores", hide) for i in layers]
        return _last(made.run_with_hooks(ids, fwd_hooks=hooks, output_attentions=False, **given))

    return lambda: torch.cat([one(*m) for m in case.masks])


def _nnsight(case: Case, layers: Sequence[int], cut: Tensor) -> Tensor:
    with torch.no_grad(), tracing(case.model) as n, n.trace(case.ready, look=list(layers)):
        for i in layers:
            point = n.blocks[i].attn.hook_attn_scores
            point.output = point.output.masked_fill(cut, NEG)
        logits = n.output.save()
    return _last(logits)
