"""What a causal-tracing grid (layers x frames) costs: from stored runs against one full forward per cell, on a CPU.

    python -m lab.bench.patching --out patching.json

"tiny" is the bundled model on a simulated question and its twin. The others are random LLaVA-OneVisions of 16 layers
(d 512, 8 heads, 2 of keys, MLP 2,048) on Map-the-Flow's layout: 8 frames of 144 tokens or 16 of 196 and 115 of text.
Their tower takes a quarter of a forward: LLaVA-OneVision 7B's has a fifth of the operations and a third of the time.
Every cell takes one frame's stream of the clean world into the corrupted one, at one layer's end (resid_post) or
entrance (resid_pre). The fast time contains the stored runs of both worlds. Naive is one forward per cell with one hook
under SDPA: `ratio`. Only some cells, spread over the grid, are timed, half before and half after the fast run, and their
mean is scaled to all. `ratio_tower_kept` grants the naive way a vision side that is run once.

Rows set a bound on that second ratio. Patching frame f of F at the end of layer l of n changes, exactly, every row from f
on in every later layer; nothing stored holds those states. Of whole decoder forwards that is about (F + 1) / 2F times
1 / 2 and the text, so an exact way that computes rows as fast as the naive one stays below 4 times, whatever it stores.
`rows` is the share that was run. Time is CPU time of the process on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from lab.bench import models
from lab.bench.measuring import setting, write
from lab.bench.sweep import SHAPE, prompt
from lab.model.zoo import load, wrap
from lab.patch import Worlds, take
from lab.sim.tasks import draw_items

CASES = {
    "tiny": (8, 64),
    "8 frames, L 1,267": (8, 96),
    "16 frames, L 3,251": (16, 112),
}  # frames, side of a frame
FIFTH = 5.0  # the least ratio aimed at
TOWER = {"tower_d": 192, "tower_mlp": 768, "tower_layers": 8, "tower_heads": 3}


def worlds_of(case: str) -> Worlds:
    """Clean and corrupted world of a case."""
    frames, side = CASES[case]
    if case == "tiny":
        item = draw_items("moving_direction", 1, 0, frames=frames)[0]
        return Worlds.of(load("tiny", device="cpu"), n_frames=frames, clean=item, corrupted=item.twin)
    shape = replace(SHAPE, side=side, **TOWER)
    model = wrap(models.build(shape))
    clean, corrupted = (prompt(model, shape, frames) for _ in range(2))
    corrupted.inputs["pixel_values_videos"] = corrupted.inputs["pixel_values_videos"].flip(1)
    return Worlds.of(model, clean=clean, corrupted=corrupted)


def seconds(work: Any) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def measure(case: str, site: str, n_naive: int, n_rows: int) -> dict[str, Any]:
    """Times of both ways on one grid, their largest difference, and what was computed."""
    worlds = worlds_of(case)
    model, tokens = worlds.model, worlds.tokens("corrupted")
    cells = [
        [take("clean -> corrupted", site=site, layers=layer, role="video", frame=f)]
        for layer in range(model.cfg.n_layers)
        for f in range(tokens.n_frames)
    ]
    tower = 0.0
    for ready in worlds.ready.values():
        ready.memo.clear()
        tower, _ = seconds(lambda r=ready: model.see(r))  # from here on the vision side is kept
    chosen = torch.linspace(0, len(cells) - 1, n_naive).long().tolist()
    some = [chosen[: n_naive // 2], chosen[n_naive // 2 :]]
    naive_s, found = _naive(worlds, [[cells[i] for i in part] for part in some[:1]])
    fast_s, fast = seconds(lambda: worlds.evaluate(cells, into="corrupted", n_rows=n_rows))
    spent = worlds.ledger
    more_s, more = _naive(worlds, [[cells[i] for i in part] for part in some[1:]])
    each, reference = (naive_s + more_s) / n_naive, torch.cat([found, more])
    return {
        "positions": len(tokens), "layers": model.cfg.n_layers, "frames": tokens.n_frames, "cells": len(cells), "site": site,
        "naive_s_per_cell": round(each, 4), "naive_s_scaled": round(each * len(cells), 2), "fast_s": round(fast_s, 2),
        "tower_s": round(tower, 4), "ratio": round((each + tower) * len(cells) / fast_s, 2),
        "ratio_tower_kept": round(each * len(cells) / fast_s, 2), "ratio_aimed_at": FIFTH,
        "rows": round(spent.forwards / len(cells), 3),
        "ledger_of_fast": spent.plain(), "reason": worlds.reason, "naive_cells_timed": n_naive,
        "max_difference": float((fast[chosen] - reference).abs().max()),
        "mean_change": float((fast - worlds.run()[1]).abs().amax(1).mean()), "n_rows": n_rows,
    }  # fmt: skip


def _naive(worlds: Worlds, parts: Sequence[Any]) -> tuple[float, torch.Tensor]:
    """One forward a cell; the clean world's run, done once for all cells, is not counted."""
    cells = [c for part in parts for c in part]
    worlds.ledger = type(worlds.ledger)()
    clean_s, _ = seconds(lambda: worlds.evaluate([[]], into="clean", executor="reference"))
    taken, out = seconds(lambda: worlds.evaluate(cells, into="corrupted", executor="reference"))
    worlds.ledger = type(worlds.ledger)()
    return taken - clean_s, out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Cost of a causal-tracing grid, stored runs against naive.")
    parser.add_argument("--naive", type=int, default=16, help="how many of the naive cells are timed")
    parser.add_argument("--rows", type=int, default=4096, help="rows run together")
    parser.add_argument("--cases", nargs="*", default=list(CASES)[:2], choices=list(CASES))
    parser.add_argument("--sites", nargs="*", default=["resid_post", "resid_pre"])
    parser.add_argument("--out", help="json file; standard output if absent")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {f"{c}, {s}": measure(c, s, args.naive, args.rows) for c in args.cases for s in args.sites}
    write(args.out, {"setting": setting(), "shape": asdict(replace(SHAPE, **TOWER)), "cases": found})


if __name__ == "__main__":
    main()
