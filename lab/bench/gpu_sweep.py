"""Knock-out sweeps on a GPU at 7B sizes: the table of `lab.bench.sweep` with lengths, dtypes, peaks and rounding noise.

    python -m lab.bench.gpu --sweep --out DIR                           all of it; see --shapes, --lengths, --dtypes
    python -m lab.bench.gpu --sweep --quick --device cpu --out DIR      a small model: a smoke test

Random weights in the shape of Llama-7B (32 layers, 32 heads of keys) and of Qwen2.5-VL-7B (28 layers, 28 heads over 4
of keys), behind a small tower; Map-the-Flow's layout. For each: the ten text pathways in every window of 9 layers from
one stored run, and one window in four of the eleventh (across frames), against naive SDPA forwards with dense masks
(some timed, scaled). Rows of every table are written as they are done, so that a run that is stopped leaves them.

What rounding does, in the largest |change of logits|: `effect` of the naive cuts, `fast - naive`, `path` (uncut runs by
the fast way against the clean run: the noise that a same-path clean run takes out) and `fast - naive, path taken out`.
In float32 the weights and all rows are in single precision: what a single-precision suffix would give at best.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.bench import models
from lab.bench.measuring import peak_bytes, setting, write
from lab.bench.sweep import PATHWAYS, compared, prompt
from lab.edges.closure import Cuts
from lab.edges.dense import run_dense
from lab.edges.fast import ROWS, run_cut, run_uncut
from lab.edges.pathrows import path_rows
from lab.edges.store import Store
from lab.edges.sweeping import WINDOW, layers_of
from lab.model.ready import Ready
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap

SHAPES = {
    "llama-7b": models.Shape(
        d=4096, mlp=11008, layers=32, heads=32, kv_heads=32, vocab=32064, side=96, patch=4
    ),
    "qwen2.5-vl-7b": models.Shape(
        d=3584, mlp=18944, layers=28, heads=28, kv_heads=4, vocab=152064, side=96, patch=4
    ),
}
SMALL = {"small": models.Shape(d=64, mlp=96, layers=4, heads=4, kv_heads=2, side=16, patch=4)}
# positions -> frames, side of a frame (tokens: side / 8 squared)
LENGTHS = {1267: (8, 96), 3251: (16, 112), 6387: (32, 112), 12659: (64, 112)}
SHORT = {131: (4, 16)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NAIVE = 6  # points timed
EVERY = 4  # across frames: one window in so many


def run(
    device: str, out: str | Path | None, *, quick: bool, shapes: Sequence[str], lengths: Sequence[int], dtypes: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    """All tables asked for; names and lengths as in `SHAPES`, `LENGTHS`, `DTYPES`, empty for all."""
    kinds = SMALL if quick else {n: s for n, s in SHAPES.items() if not shapes or n in shapes}
    found: dict[str, Any] = {}
    for name, shape in kinds.items():
        for dtype in dtypes or DTYPES:
            for side, rows in _by_side(SHORT if quick else LENGTHS, () if quick else lengths).items():
                sized = replace(shape, side=side)
                model = wrap(models.build(sized, device=device, dtype=DTYPES[dtype]))
                for positions, frames in rows:
                    key = f"{name}, {dtype}, L {positions:,}"
                    found[key] = _or_said(lambda m=model, s=sized, f=frames: table(m, s, f, device))
                    _written(out, device, found)
                    print(key, line(found[key]), flush=True)
                del model
                gc.collect()
    return found


def _by_side(known: dict[int, tuple[int, int]], asked: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """Side of a frame -> (positions, frames) of the lengths asked: a tower takes frames of one size."""
    out: dict[int, list[tuple[int, int]]] = {}
    for positions, (frames, side) in known.items():
        if not asked or positions in asked:
            out.setdefault(side, []).append((positions, frames))
    return out


def _written(out: str | Path | None, device: str, found: dict[str, Any]) -> None:
    if out is not None:
        shapes = {n: asdict(s) for n, s in (SHAPES | SMALL).items()}
        write(Path(out) / "gpu_sweep.json", {"setting": setting(device), "shapes": shapes, "tables": found})


def _or_said(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A length for which the device has no memory is a line of the table, not the end of it."""
    try:
        return work()
    except torch.OutOfMemoryError as e:
        reason = str(e).splitlines()[0]
    gc.collect()
    torch.cuda.empty_cache()
    return {"no room": reason}


@torch.no_grad()
def table(model: VideoLLM, shape: models.Shape, frames: int, device: str) -> dict[str, Any]:
    """One row: costs, peaks and noise of one prompt."""
    ready = _prompt(model, shape, frames, device)
    model.see(ready)
    n = shape.layers
    texts = _cuts(ready, PATHWAYS, range(n), n)
    across = _cuts(ready, ("cross-frame",), range(0, n, EVERY), n)
    clock = _clock(device)
    found: dict[str, Any] = {
        "text pathways": compared(model, ready, texts, n_naive=NAIVE, n_rows=ROWS, clock=clock),
        "across frames": compared(
            model, ready, across, n_naive=min(NAIVE, len(across)), n_rows=ROWS, clock=clock
        ),
    }
    store = Store.of(model, ready)
    for name, cuts in (("text pathways", texts), ("across frames", across[:1])):
        found[name]["peak_bytes"] = peak_bytes(lambda c=cuts: run_cut(model, store, c), device)
    found["naive_peak_bytes"] = peak_bytes(lambda: run_dense(model, ready, texts[0]), device)
    found["store_bytes"] = sum(t.nbytes for t in (*store.resid, *store.keys, *store.values))
    found["store_bytes_aside"] = store.aside
    chosen = [texts[i] for i in torch.linspace(0, len(texts) - 1, NAIVE).long().tolist()]
    found["noise"] = {
        "text pathways": noise(model, ready, store, chosen),
        "across frames": noise(model, ready, store, across[-2:]),
    }
    return found


def _prompt(model: VideoLLM, shape: models.Shape, frames: int, device: str) -> Ready:
    ready = prompt(model, shape, frames)
    ready.inputs = {
        k: v.to(device, model.dtype if v.is_floating_point() else v.dtype) for k, v in ready.inputs.items()
    }
    return ready


def _cuts(ready: Ready, pathways: Sequence[str], centres: range, n: int) -> list[Cuts]:
    masks = [path_rows(ready.tokens, p, ready.item) for p in pathways]
    return [dict.fromkeys(layers_of(c, WINDOW, n), mask) for mask in masks for c in centres]


def _clock(device: str) -> Callable[[], float]:
    if torch.device(device).type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


def noise(model: VideoLLM, ready: Ready, store: Store, cuts: Sequence[Cuts]) -> dict[str, float]:
    """Largest changes of logits over some cuts; see the module's text."""
    clean = store.clean(model)[0].float()
    fast, path = (f(model, store, cuts)[:, 0].float() for f in (run_cut, run_uncut))
    naive = torch.cat([run_dense(model, ready, c)[:, 0] for c in cuts]).float()
    dense = run_dense(model, ready, {})[0, 0].float()
    parts: dict[str, Tensor] = {
        "effect": naive - dense, "fast - naive": fast - naive, "path": path - clean,
        "fast - naive, path taken out": (fast - path) - (naive - dense),
    }  # fmt: skip
    return {name: float(x.abs().max()) for name, x in parts.items()}


def line(row: dict[str, Any]) -> str:
    """One table in a line."""
    if "no room" in row:
        return f"no room: {row['no room']}"
    text, across, said = row["text pathways"], row["across frames"], row["noise"]["text pathways"]
    return (
        f"naive {text['naive_s_per_point']:.3f} s a point; text {text['ratio']:.0f}x, across frames {across['ratio']:.1f}x "
        f"(of one window in {EVERY}); peak {text['peak_bytes']:,} of naive {row['naive_peak_bytes']:,} bytes; "
        f"fast - naive {said['fast - naive']:.1e}, path {said['path']:.1e}, effect {said['effect']:.1e}"
    )
