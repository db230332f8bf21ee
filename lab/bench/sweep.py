"""What a knock-out sweep costs: the fast executor against one full forward per point, in one run on a CPU.

    python -m lab.bench.sweep --out sweep.json

A random LLaVA-OneVision of 16 layers (d 512, 8 heads, 2 of keys, MLP 2,048) reads a prompt of Map-the-Flow's layout:
52 positions that are neither video nor question (the family's row-end token among them), 8 frames of 144 or 16 of 196,
63 of text: 24 stem, 4 x 8 options, 7 template. Ten text pathways, then the eleventh across frames as well, are cut in
16 windows of 9 layers. The clean run that is stored counts as fast work; the tower is left out on both sides.

Naive is the same sweep under SDPA with dense boolean masks, one forward per point. Only some of its points, spread over
the sweep, are timed, half before and half after the fast run, and their mean is scaled to all (`naive_points` of
`points`). Time is CPU time of the process on one thread. `one` is a single cut of a few rows, against a clean forward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from lab.bench import models
from lab.bench.measuring import median_ratio, paired, peak_bytes, setting, write
from lab.carriers import Frames, VideoQA
from lab.edges.closure import Cuts, touched_rows
from lab.edges.dense import run_dense
from lab.edges.fast import ROWS, run_cut
from lab.edges.pathrows import path_rows
from lab.edges.store import Store
from lab.edges.sweeping import WINDOW, Sweep, layers_of
from lab.model.ready import Ready
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap

Clock = Callable[[], float]
BEFORE, TEXT = 51, 63
PATHWAYS = (
    "video->question+option", "video->last", "question+option->last", "last->last", "question->last",
    "true-option->last", "false-options->last", "video->question", "question->true-option", "video->true-option",
)  # fmt: skip
CASES = {  # frames, side of a frame (tokens: side / 8 squared), pathways, least ratio aimed at
    "10 text pathways, L 1,267": (8, 96, PATHWAYS, 30.0),
    "10 text pathways, L 3,251": (16, 112, PATHWAYS, 60.0),
    "with cross-frame, L 1,267": (8, 96, (*PATHWAYS, "cross-frame"), 10.0),
}
SHAPE = models.Shape(d=512, mlp=2048, layers=16, heads=8, kv_heads=2, side=96, patch=4)


def prompt(model: VideoLLM, shape: models.Shape, frames: int) -> Ready:
    """The layout above, with a right answer, so that true and false options have places."""
    x = models.inputs(shape, frames, text=BEFORE + TEXT)
    ids = x["input_ids"][0]
    video, words = ids[ids == models.VIDEO], ids[ids != models.VIDEO]
    x["input_ids"] = torch.cat([words[:BEFORE], video, words[BEFORE:]])[None]
    start = BEFORE + len(video)
    options = [(start + 24 + 8 * i, start + 32 + 8 * i) for i in range(4)]
    ready = model.prepare_inputs(roles={"question": (start, start + 24), "option": options}, **x)
    nothing = Frames(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1), torch.zeros(1, dtype=torch.long), 1.0, 1.0, "none")  # fmt: skip
    ready.item = VideoQA(nothing, "?", ("a", "b", "c", "d"), answer=1)
    return ready


def seconds(work: Callable[[], Any], clock: Clock = time.process_time) -> tuple[float, Any]:
    """How long it takes, and what it returns."""
    start = clock()
    found = work()
    return clock() - start, found


def measure(
    shape: models.Shape, frames: int, pathways: Sequence[str], *, n_naive: int, n_rows: int
) -> dict[str, Any]:
    """Times of both executors on one prompt, their largest difference, and what was computed."""
    model = wrap(models.build(shape))
    ready = prompt(model, shape, frames)
    model.see(ready)  # the tower runs once for either
    n, what = shape.layers, Sweep(tuple(pathways))
    masks = {p: path_rows(ready.tokens, p, ready.item) for p in pathways}
    cuts = [dict.fromkeys(what.layers(c, n), masks[p]) for p in pathways for c in range(n)]
    found = compared(model, ready, cuts, n_naive=n_naive, n_rows=n_rows)
    store = Store.of(model, ready)
    return {
        "pathways": list(pathways), **found, "n_rows": n_rows,
        "forwards_by_formula": round(by_formula(shape, ready.n_pos, cuts), 2),
        "store_bytes": sum(t.nbytes for t in (*store.resid, *store.keys, *store.values)),
        "peak_bytes": peak_bytes(lambda: run_cut(model, store, cuts, n_rows=n_rows)),
        "one": _one(model, ready, store),
    }  # fmt: skip


def by_formula(shape: models.Shape, n_pos: int, cuts: Sequence[Cuts]) -> float:
    """Forward-equivalents of one clean run and of every cut run, had it to run all rows from the first that loses an edge.

    A ceiling for the ledger, which counts only rows that can change and can matter. FLOPs of a row in a layer: its
    products with the weights, and its scores and values over the keys before it.
    """
    d_head = shape.d // shape.heads
    weights = 2 * (shape.d * 2 * (shape.d + d_head * shape.kv_heads) + 3 * shape.d * shape.mlp)

    def layer(n: float) -> float:
        return weights * n + 4 * shape.d * n * (n_pos - n / 2)

    first = {id(cut): int(touched_rows(cut).int().argmax()) for c in cuts for cut in c.values()}
    suffix = [(shape.layers - min(c)) * layer(n_pos - min(first[id(x)] for x in c.values())) for c in cuts]
    return 1 + sum(suffix) / (shape.layers * layer(n_pos))


def compared(
    model: VideoLLM,
    ready: Ready,
    cuts: Sequence[Cuts],
    *,
    n_naive: int,
    n_rows: int,
    clock: Clock = time.process_time,
) -> dict[str, Any]:
    """Times of all cut runs by the fast executor and of some by the naive one, and how far their logits lie apart."""
    chosen = torch.linspace(0, len(cuts) - 1, n_naive).long().tolist()
    run_dense(model, ready, cuts[0])  # warm
    early = [seconds(lambda i=i: run_dense(model, ready, cuts[i]), clock) for i in chosen[: n_naive // 2]]
    store_s, store = seconds(lambda: Store.of(model, ready), clock)
    fast_s, fast = seconds(lambda: run_cut(model, store, cuts, n_rows=n_rows), clock)
    spent = store.ledger
    late = [seconds(lambda i=i: run_dense(model, ready, cuts[i]), clock) for i in chosen[n_naive // 2 :]]
    point_s = sum(t for t, _ in early + late) / n_naive
    reference = torch.cat([logits for _, logits in early + late])
    return {
        "positions": ready.n_pos, "points": len(cuts), "naive_points": n_naive,
        "naive_s_per_point": round(point_s, 4), "naive_s_scaled": round(point_s * len(cuts), 2),
        "store_s": round(store_s, 4), "fast_s": round(fast_s, 4),
        "ratio": round(point_s * len(cuts) / (store_s + fast_s), 1), "ledger": spent.plain(),
        "fallbacks": store.work.fallbacks, "max_difference": float((fast[chosen] - reference).abs().max()),
        "mean_change": float((fast - store.clean(model)).abs().amax((1, 2)).mean()),
    }  # fmt: skip


def _one(model: VideoLLM, ready: Ready, store: Store) -> dict[str, Any]:
    """One cut of the eight positions before the last from the video, in the middle window: with the store, and without."""
    n = ready.n_pos
    cut = torch.zeros(n, n, dtype=torch.bool)
    cut[n - 9 : n - 1, ready.tokens.where(role="video")] = True
    cuts = dict.fromkeys(layers_of(store.n_layers // 2, WINDOW, store.n_layers), cut)
    works = {
        "clean": lambda: model(ready),
        "stored": lambda: run_cut(model, store, [cuts]),
        "from nothing": lambda: run_cut(model, Store.of(model, ready), [cuts]),
    }
    took = paired(works, pairs=5, warm=1)
    return {
        "stored / clean": round(median_ratio(took, "stored", "clean"), 4),
        "from nothing / clean": round(median_ratio(took, "from nothing", "clean"), 3),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Cost of a knock-out sweep, fast against naive.")
    parser.add_argument("--naive", type=int, default=10, help="how many of the naive points are timed")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows the fast executor runs together")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", help="json file; standard output if absent")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name in args.cases:
            frames, side, pathways, target = CASES[name]
            shape = replace(SHAPE, side=side)
            row = measure(shape, frames, pathways, n_naive=args.naive, n_rows=args.rows)
            found[name] = {"target_ratio": target, **row}
    write(args.out, {"setting": setting(), "shape": asdict(SHAPE), "cases": found})


if __name__ == "__main__":
    main()
