"""What a causal-tracing grid (layers x frames) costs: from stored runs against one full forward per cell, on a CPU.

    python -m lab.bench.patching --out patching.json

Every cell takes one frame's stream of the clean world into the corrupted one, at one layer's end (resid_post) or
entrance (resid_pre). The fast time contains the stored runs of both worlds and the vision side of both. Three naive ways:

    hf           what one would run without the lab: `hf(**inputs)` of transformers under SDPA, one forward a cell, with a
                 forward hook on the decoder layer that overwrites the frame's rows: `ratio`
    hf_last      the same with logits_to_keep=1, which spares it the head over all positions
    reference    the lab's own plain way, its vision side run once for all cells: `ratio_tower_kept`

Only some cells, spread over the grid, are timed, some before every fast run. Each round's are scaled to all and compared
with its fast run; the ratios are medians over the rounds. Both ways must give the same logits (`max_difference`, `max_difference_hf`).

"tiny" is the bundled model on a simulated question and its twin. The others are random LLaVA-OneVisions:
* the published checkpoints' depth and proportions at width 256, 25 tokens a frame and 8 of text. FLOPs by formula from the
  checkpoints' configs (196 tokens and 729 patches a frame, 50 of text) for 16 / 32 frames, as shares of the decoder's:
      LLaVA-OneVision 7B    28 layers, tower 0.245 / 0.236, head 0.080 / 0.076, decoder 43.6 / 90.5 TFLOPs
      LLaVA-OneVision 0.5B  24 layers, tower 3.80 / 3.30,   head 0.319 / 0.276, decoder 2.7 / 6.2 TFLOPs
  `flops` has the same shares of the small model, counted by torch while it runs
* 16 layers (d 512, 8 heads, 2 of keys, MLP 2,048) on Map-the-Flow's layout: 8 frames of 144 tokens or 16 of 196, and 115
  of text. Its head is small, its tower takes a quarter of a forward.

Rows set a bound on the ratio over the decoder alone. Patching frame f of F on entering layer l of n changes, exactly, every
row from f on in layer l and later; nothing stored holds those states. Of whole decoder forwards that is about
(F + 1) / 2F times half the layers (of the last one row matters) and the text; frame 0 with all before it is the other
world's from then on. An exact way that computes rows as fast as the naive one stays near 4 times there; what is above comes
from tower and head, and from rows of many cells run together, which are quicker than one prompt at a time: most of all where
a forward is short (the bundled model) and its calls cost as much as its products. resid_pre has one more layer of whole
suffixes than resid_post. `rows` is the share that was run. Time is CPU time of the process on one thread, wall time on several
(data/patching_2_threads_cpu.json).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lab.bench import models
from lab.bench.measuring import counted_flops, setting, write
from lab.bench.sweep import SHAPE, prompt
from lab.model.zoo import DATA, load, wrap
from lab.patch import Worlds, take
from lab.patch.suffix import rows_together
from lab.sim.tasks import draw_items

FIFTH = 5.0  # the least ratio aimed at
TOWER = {"tower_d": 192, "tower_mlp": 768, "tower_layers": 8, "tower_heads": 3}
WIDE = replace(SHAPE, **TOWER)
SMALL = models.Shape(d=256, heads=8, kv_heads=1, side=40, patch=4)
SEVEN = replace(
    SMALL, layers=28, mlp=1352, vocab=10864, tower_d=192, tower_mlp=720, tower_layers=5, tower_heads=3
)
HALF = replace(
    SMALL, layers=24, mlp=1392, vocab=43424, tower_d=384, tower_mlp=1440, tower_layers=14, tower_heads=6
)
CASES: dict[str, tuple[int, models.Shape | None]] = {
    "tiny": (8, None),
    "7B's proportions, 8 frames": (8, SEVEN),
    "7B's proportions, 16 frames": (16, SEVEN),
    "7B's proportions, 32 frames": (32, SEVEN),
    "0.5B's proportions, 8 frames": (8, HALF),
    "8 frames, L 1,267": (8, replace(WIDE, side=96)),
    "16 frames, L 3,251": (16, replace(WIDE, side=112)),
}  # frames, shape; None: the bundled model


@dataclass(frozen=True)
class Case:
    """The worlds of a case, and transformers' own model with the same weights under SDPA."""

    worlds: Worlds
    plain: Any


def case_of(frames: int, shape: models.Shape | None) -> Case:
    """Clean and corrupted world: a question and its twin, or random pixels and the same in reverse order of frames."""
    if shape is None:
        from transformers import LlavaOnevisionForConditionalGeneration

        item = draw_items("moving_direction", 1, 0, frames=frames)[0]
        plain: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
            DATA / "tiny", attn_implementation="sdpa", dtype=torch.float32
        )
        worlds = Worlds.of(load("tiny", device="cpu"), n_frames=frames, clean=item, corrupted=item.twin)
        return Case(worlds, plain.eval())
    model = wrap(models.build(shape))
    laid_out = prompt if shape.tokens_per_frame > 100 else _bare
    clean, corrupted = (laid_out(model, shape, frames) for _ in range(2))
    corrupted.inputs["pixel_values_videos"] = corrupted.inputs["pixel_values_videos"].flip(1)
    return Case(Worlds.of(model, clean=clean, corrupted=corrupted), models.build(shape))


def _bare(model: Any, shape: models.Shape, frames: int) -> Any:
    return model.prepare_inputs(**models.inputs(shape, frames, text=8))


def seconds(work: Any) -> tuple[float, Any]:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    found = work()
    return clock() - start, found


# ---- the naive ways -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainGrid:
    """One forward of transformers a cell; the clean states are kept once, which is not counted."""

    plain: Any
    inputs: dict[str, Any]
    clean: list[Tensor]  # entering every layer and leaving the last, [pos, d_model]
    after: bool

    @classmethod
    def of(cls, case: Case, site: str) -> PlainGrid:
        """For one site, resid_pre or resid_post."""
        ready = case.worlds.ready
        clean: list[Tensor] = []

        def before(module: Any, args: Any, kw: Any) -> None:
            clean.append((args[0] if args else kw["hidden_states"])[0].clone())

        layers = case.plain.model.language_model.layers
        with ExitStack() as open_:
            for layer in layers:
                open_.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            open_.callback(
                layers[-1]
                .register_forward_hook(lambda m, a, out: clean.append(_state(out)[0].clone()))
                .remove
            )
            with torch.no_grad():
                case.plain(**ready["clean"].inputs, use_cache=False)
        return cls(case.plain, ready["corrupted"].inputs, clean, site == "resid_post")

    @torch.no_grad()
    def run(self, layer: int, rows: Tensor, **kw: Any) -> Tensor:
        """Logits at the last position, [d_vocab]."""
        new = self.clean[layer + self.after][rows]

        def patch(state: Tensor) -> Tensor:
            state = state.clone()
            state[0, rows] = new
            return state

        def leaving(module: Any, args: Any, out: Any) -> Any:
            return (patch(out[0]), *out[1:]) if isinstance(out, tuple) else patch(out)

        def entering(module: Any, args: Any) -> Any:
            return (patch(args[0]), *args[1:])

        at = self.plain.model.language_model.layers[layer]
        hook = at.register_forward_hook(leaving) if self.after else at.register_forward_pre_hook(entering)
        try:
            return self.plain(**self.inputs, use_cache=False, **kw).logits[0, -1]
        finally:
            hook.remove()


def _state(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


@dataclass
class Naive:
    """The timed cells of every naive way: seconds of each, by round, and logits."""

    worlds: Worlds
    grid: PlainGrid
    spent: dict[str, dict[int, list[float]]] = field(default_factory=dict)
    logits: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, i: int, cells: Sequence[Any]) -> None:
        """Run the cells of round `i` in every way, the ways in turn."""
        tokens = self.worlds.tokens("corrupted")
        for [edit] in cells:
            rows = edit.rows(tokens)
            layer = edit.layers[0]
            self._time(i, "hf", lambda r=rows, at=layer: self.grid.run(at, r))
            self._time(i, "hf_last", lambda r=rows, at=layer: self.grid.run(at, r, logits_to_keep=1))
        self._reference(i, cells)

    def _time(self, i: int, way: str, work: Any) -> None:
        took, found = seconds(work)
        self.spent.setdefault(way, {}).setdefault(i, []).append(took)
        self.logits.setdefault(way, []).append(found)

    def _reference(self, i: int, cells: Sequence[Any]) -> None:
        """One forward of ours a cell; the clean world's run, done once for all cells, is not counted."""
        before = self.worlds.ledger
        clean_s, _ = seconds(lambda: self.worlds.evaluate([[]], into="clean", executor="reference"))
        took, out = seconds(lambda: self.worlds.evaluate(cells, into="corrupted", executor="reference"))
        self.worlds.ledger = before
        self.spent.setdefault("reference", {})[i] = [(took - clean_s) / len(cells)]
        self.logits.setdefault("reference", []).extend(out)


# ---- one grid -------------------------------------------------------------------------------------------------------


def measure(name: str, site: str, n_naive: int, n_rows: int | None, rounds: int) -> dict[str, Any]:
    """Times of all ways on one grid, their largest differences, and what was computed."""
    case = case_of(*CASES[name])
    worlds, tokens = case.worlds, case.worlds.tokens("corrupted")
    model = worlds.model
    cells = [
        [take("clean -> corrupted", site=site, layers=layer, role="video", frame=f)]
        for layer in range(model.cfg.n_layers)
        for f in range(tokens.n_frames)
    ]
    chosen = torch.linspace(0, len(cells) - 1, n_naive).long().tolist()
    naive = Naive(worlds, PlainGrid.of(case, site))
    _see(worlds)  # from here on the vision side is kept
    see_s, fast_s, order = [], [], []
    fast = worlds.evaluate(cells[:1], into="corrupted", n_rows=n_rows)  # warm
    for i in range(rounds):
        naive.add(i, [cells[j] for j in chosen[i::rounds]])
        order += chosen[i::rounds]
        see_s.append(_see(worlds))
        worlds.ledger = type(worlds.ledger)()
        took, fast = seconds(lambda: worlds.evaluate(cells, into="corrupted", n_rows=n_rows))
        fast_s.append(took)
    spent = worlds.ledger
    each = {way: [median(took[i]) for i in range(rounds)] for way, took in naive.spent.items()}
    apart = {way: float((fast[order] - torch.stack(out)).abs().max()) for way, out in naive.logits.items()}
    whole = [own + seen for own, seen in zip(fast_s, see_s, strict=True)]
    return {
        "positions": len(tokens), "layers": model.cfg.n_layers, "frames": tokens.n_frames, "cells": len(cells), "site": site,
        "naive_s_per_cell": {way: _short(s) for way, s in each.items()}, "fast_s": _short(fast_s), "tower_s": _short(see_s),
        "ratio": ratio(each["hf"], len(cells), whole), "ratio_hf_last": ratio(each["hf_last"], len(cells), whole),
        "ratio_tower_kept": ratio(each["reference"], len(cells), fast_s), "ratio_aimed_at": FIFTH,
        "rows": round(spent.forwards / len(cells), 3), "flops": _flops(case),
        "ledger_of_fast": spent.plain(), "reason": worlds.reason, "naive_cells_timed": n_naive,
        "max_difference": apart["reference"], "max_difference_hf": max(apart["hf"], apart["hf_last"]),
        "mean_change": float((fast - worlds.run()[1]).abs().amax(1).mean()), "n_rows": n_rows or rows_together(model),
    }  # fmt: skip


def ratio(naive: Sequence[float], cells: int, fast: Sequence[float]) -> float:
    """How many times as long all cells would take: median over the rounds, in each of which the machine is as fast."""
    return round(median(a * cells / b for a, b in zip(naive, fast, strict=True)), 2)


def _short(seconds: Sequence[float]) -> list[float]:
    return [round(s, 5) for s in seconds]


def _see(worlds: Worlds) -> float:
    """Seconds of the vision side of both worlds."""
    total = 0.0
    for ready in worlds.ready.values():
        ready.memo.clear()
        took, _ = seconds(lambda r=ready: worlds.model.see(r))
        total += took
    return total


def _flops(case: Case) -> dict[str, float]:
    """Tower (with its projector) and head of one forward of transformers, as shares of the decoder's FLOPs."""
    inputs = case.worlds.ready["corrupted"].inputs
    n = inputs["input_ids"].shape[1]
    with torch.no_grad():
        last = counted_flops(lambda: case.plain(**inputs, use_cache=False, logits_to_keep=1))
        head = (counted_flops(lambda: case.plain(**inputs, use_cache=False)) - last) / (n - 1)
        texts = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        decoder = counted_flops(lambda: case.plain(**texts, use_cache=False, logits_to_keep=1)) - head
    return {"tower": round((last - head - decoder) / decoder, 3), "head": round(head * n / decoder, 3)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Cost of a causal-tracing grid, stored runs against naive.")
    parser.add_argument("--naive", type=int, default=16, help="how many of the naive cells are timed")
    parser.add_argument(
        "--rounds", type=int, default=2, help="fast runs; the bundled model gets five times as many"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, help="rows run together; absent: what the lab takes")
    parser.add_argument("--cases", nargs="*", default=list(CASES)[:5], choices=list(CASES))
    parser.add_argument("--sites", nargs="*", default=["resid_post", "resid_pre"])
    parser.add_argument("--out", help="json file; standard output if absent")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    shapes = {c: asdict(shape) for c, (_, shape) in CASES.items() if shape is not None and c in args.cases}
    for site in args.sites:
        for case in args.cases:
            rounds = args.rounds * (1 if CASES[case][1] else 5)
            found[f"{case}, {site}"] = measure(case, site, max(args.naive, rounds), args.rows, rounds)
            if args.out:  # what has been measured is kept if it is stopped
                write(args.out, {"setting": setting(), "shapes": shapes, "cases": found})
    if not args.out:
        write(None, {"setting": setting(), "shapes": shapes, "cases": found})


if __name__ == "__main__":
    main()
