"""What a run costs, by formula and measured: FLOPs, bytes of keys and values, time, and the most memory at once.

Of n rows that a layer runs (spec section 0; a multiply-add is 2, attention over all pairs, as kernels are counted):
    FLOPs = 2 n (weights of its linear layers) + 4 n^2 (heads x d_head), and 2 d_model d_vocab for the row that is read
    bytes of keys and values = 2 n (kv heads x d_head) (bytes of a number); a quantising cache has a formula of its own
    peak = keys and values of all layers + in the largest layer n (2 d_model + 3 d_mlp) numbers, beside the n d_model
           of the stream and of the door
Predicted time is vanilla's measured time in proportion to FLOPs. The tower, the same in all, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lab.bench.measuring import clock_of, counted_flops, paired, peak_bytes
from lab.carriers import TokenMap
from lab.comparison.traces import trace
from lab.comparison.variants import Variant
from lab.errors import UsageError
from lab.model.cache import KVCache
from lab.model.ready import Ready
from lab.slots import Plan

QUANTITIES = ("FLOPs", "KV bytes", "seconds", "peak bytes")
SOURCES = ("predicted", "measured")
Numbers = dict[str, list[list[float]]]  # variant -> [quantity][source]


class _Stored:
    """A mechanism that stores keys and values, as generation does."""

    def plan(self, cfg: Any) -> Plan:
        return Plan(cache=KVCache)


@torch.no_grad()
def costs(variants: Sequence[Variant], ready: Mapping[str, Ready], rounds: int) -> Numbers:
    """Of every variant, over one question. Times are medians over rounds in which all variants run once."""
    works = {v.name: _work(v, ready[v.name]) for v in variants}
    device = variants[0].model.device
    seconds = paired(works, pairs=rounds, warm=1, clock=clock_of(device))
    measured = {
        v.name: [
            float(counted_flops(works[v.name])), float(trace(v.model, ready[v.name]).kv_bytes),
            sorted(seconds[v.name])[rounds // 2], float(peak_bytes(works[v.name], device)),
        ]
        for v in variants
    }  # fmt: skip
    base = variants[0].name
    predicted = {v.name: list(_predicted(v, ready[v.name])) for v in variants}
    for numbers in predicted.values():
        numbers.insert(2, measured[base][2] * numbers[0] / predicted[base][0])
    return {n: [list(p) for p in zip(predicted[n], measured[n], strict=True)] for n in measured}


def _work(v: Variant, ready: Ready) -> Callable[[], Any]:
    """One prefill that stores keys and values; the tower has run, the stages run every time."""
    v.model.see(ready)
    extra = [] if ready.plan.cache is not None else [_Stored()]
    return lambda: v.model.run(ready, mechanisms=extra)


# ---- formulas -------------------------------------------------------------------------------------------------------


def _predicted(v: Variant, ready: Ready) -> tuple[float, float, float]:
    """FLOPs, bytes of keys and values, peak bytes."""
    model, tokens = v.model, v.model.maps(ready)[0]
    rows = rows_of(v, tokens)
    kv = sum(_kv_bytes(v, n) for n in rows)
    cfg, size = model.cfg, torch.finfo(model.dtype).bits // 8
    head = 2.0 * cfg.d_model * cfg.d_vocab
    flops = head + sum(
        2.0 * n * _weights(part.layer) + 4.0 * n * n * cfg.n_heads * cfg.d_head
        for n, part in zip(rows, model.parts, strict=True)
    )
    return (
        flops,
        kv,
        kv + size * (2 * len(tokens) * cfg.d_model + max(rows) * (2 * cfg.d_model + 3 * _mlp(model))),
    )


def rows_of(v: Variant, tokens: TokenMap) -> list[int]:
    """Rows of the prompt each layer runs: those a mechanism says, else all that the decoder reads."""
    n, layers = len(tokens), v.model.cfg.n_layers
    said = [n] * layers
    for m in v.mechanisms:
        if callable(getattr(m, "rows", None)):
            try:
                said = [min(a, b) for a, b in zip(said, m.rows(tokens, layers), strict=True)]
            except UsageError:  # a threshold: nobody knows before the run
                return [0] * layers
    return said


def _kv_bytes(v: Variant, rows: int) -> float:
    cfg, size = v.model.cfg, torch.finfo(v.model.dtype).bits // 8
    for m in v.mechanisms:
        if callable(getattr(m, "kv_bytes", None)):
            return m.kv_bytes(rows, v.model.sizes, size)
    return 2.0 * rows * cfg.n_key_value_heads * cfg.d_head * size


def _weights(layer: nn.Module) -> int:
    """Numbers in a layer's linear maps."""
    return sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))


def _mlp(model: Any) -> int:
    """Width of the widest map of a layer."""
    return max(m.out_features for p in model.parts for m in p.layer.modules() if isinstance(m, nn.Linear))
