"""What segment mass costs: a forward that measures all rows, layers and heads against one that does not, on a CPU.

    python -m lab.bench.mass --out mass.json

Random LLaVA-OneVisions read about 2,000 positions under SDPA with one thread: the decoder of the sweep's bench (d 512,
MLP 2,048), and a narrow one (d 256, MLP 704), where attention is a larger share. Every row's mass is kept, over the
partition of the prompt, clean and under a policy that cuts across frames in half the layers (reported, not bounded:
the masks are made a second time, a few rows at once). Time is CPU time, median
of rounds; memory is the peak of tensor bytes over that of the plain run, what is returned included. The tower is left
out on both sides. `largest_difference` is to sums over the pattern of an explicit run, in two layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lab.bench import models
from lab.bench.measuring import median_ratio, paired, peak_bytes, setting, write
from lab.bench.sweep import SHAPE
from lab.edges.mass import partition, segment_mass
from lab.edges.policy import FORMAT, Policy
from lab.edges.segments import members
from lab.model.ready import Ready
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap

MOST_TIME, MOST_BYTES, MOST_DIFFERENCE = 1.5, 20_000_000, 1e-6
SHAPES = {"d 512": SHAPE, "d 256": models.Shape(side=96, patch=4)}
POSITIONS = 2000


def measure(shape: models.Shape, *, positions: int, pairs: int, layers_timed: int) -> dict[str, Any]:
    """Ratios (on a model of `layers_timed` layers: layers cost alike), bytes (on the whole one) and differences."""
    model, ready = _subject(replace(shape, layers=layers_timed), positions)
    policy = _across(layers_timed)
    took = paired(
        {
            "plain": lambda: model(ready),
            "mass": lambda: segment_mass(model, ready, rows=True),
            "cut": lambda: model(ready, policy=policy),
            "cut, mass": lambda: segment_mass(model, ready, policy=policy, rows=True),
        },
        pairs=pairs,
        warm=1,
    )
    whole, prompt = _subject(shape, positions)
    extra = peak_bytes(lambda: segment_mass(whole, prompt, rows=True)) - peak_bytes(lambda: whole(prompt))
    return {
        "shape": asdict(shape), "positions": prompt.n_pos, "segments": len(partition(prompt.tokens)), "pairs": pairs,
        "layers_timed": layers_timed, "ratio": round(median_ratio(took, "mass", "plain"), 3),
        "ratio_under_a_policy": round(median_ratio(took, "cut, mass", "cut"), 3), "seconds": took, "extra_bytes": extra,
        "largest_difference": max(_difference(model, ready, layer) for layer in (0, layers_timed - 1)),
    }  # fmt: skip


def _subject(shape: models.Shape, positions: int) -> tuple[VideoLLM, Ready]:
    model = wrap(models.build(shape))
    ready = model.prepare_inputs(**models.inputs(shape, shape.frames_for(positions), text=60))
    model.see(ready)
    return model, ready


def _across(n_layers: int) -> Policy:
    cut = {"layers": f"1-{max(1, n_layers // 2)}", "q": "video", "k": "video", "where": "frame(q) > frame(k)"}
    return Policy.from_dict({"format": FORMAT, "cuts": [cut]})


def _difference(model: VideoLLM, ready: Ready, layer: int) -> float:
    names = partition(ready.tokens)
    of = torch.stack([members(ready.tokens, n) for n in names], 1).double()
    rows = segment_mass(model, ready, rows=True).rows
    assert rows is not None
    found: list[float] = []

    def look(pattern: Tensor, hook: Any) -> None:
        for head in range(pattern.shape[1]):  # a head at a time: in double precision a pattern is large
            found.append(float((pattern[0, head].double() @ of - rows[layer, head]).abs().max()))

    model.run_with_hooks(ready, fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", look)])
    return max(found)


def failures(case: dict[str, Any]) -> list[str]:
    """Targets missed, in words."""
    bounds = {"ratio": MOST_TIME, "extra_bytes": MOST_BYTES, "largest_difference": MOST_DIFFERENCE}
    return [f"{name}: {case[name]:g}, target {top:g}" for name, top in bounds.items() if case[name] > top]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Cost of segment attention mass.")
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model that is timed")
    parser.add_argument("--out", help="json file; standard output if absent")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with torch.no_grad():
        found = {
            name: measure(shape, positions=POSITIONS, pairs=args.pairs, layers_timed=args.layers)
            for name, shape in SHAPES.items()
        }
    for name, case in found.items():
        print(name, "; ".join(failures(case)) or "all targets met")
    write(args.out, {"setting": setting(), "cases": found})


if __name__ == "__main__":
    main()
