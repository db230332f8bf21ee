"""What looking costs: the lab's forward and hooks against plain transformers, on a CPU.

    python -m lab.bench.overhead --out overhead.json

A random LLaVA-OneVision of 8 layers reads about 2,000 positions under SDPA with one thread. All works of a round run
in turn, in alternating order, and each is compared with its neighbour: medians over rounds of the ratios. Time is CPU
time of the process. Memory is counted from every allocation and release of tensors (`measuring.peak_bytes`).

Targets: forward <= 1.03 of transformers' with its cache off, as ours keeps none; residual stream of every layer <= 1.10
of our own forward, and no more memory than that forward and the tensors kept.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lab.bench import models
from lab.bench.measuring import median_ratio, paired, peak_bytes, setting, write
from lab.model.ready import Ready
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap

TARGETS = {"forward / hf": 1.03, "resid / decoder": 1.10}
RATIOS = {
    "forward / hf": ("forward", "hf"),
    "forward / hf with its cache": ("forward", "hf, cache kept"),
    "decoder / hf decoder": ("decoder", "hf decoder"),
    "resid / decoder": ("resid", "decoder"),
    "resid / hf hidden states": ("resid", "hf hidden states"),
    "pattern / decoder": ("pattern", "decoder"),
    "cut / decoder": ("cut", "decoder"),
}


def works(hf: Any, model: VideoLLM, ready: Ready, x: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """Name -> what is timed. All but the first two leave the tower out: ours by its memo, transformers' by embeddings."""
    door = model.see(ready)
    inner = {"inputs_embeds": door.embeds, "attention_mask": x["attention_mask"], "use_cache": False}
    cut = dict.fromkeys(range(model.cfg.n_layers), band)

    def forward() -> Tensor:
        ready.memo.clear()
        return model(ready, read="all")

    return {
        "hf": lambda: hf(**x, use_cache=False).logits,
        "forward": forward,
        "hf, cache kept": lambda: hf(**x).logits,
        "hf decoder": lambda: hf(**inner).logits,
        "decoder": lambda: model(ready, read="all"),
        "resid": lambda: model.run_with_cache(ready, names_filter=is_resid, read="all"),
        "hf hidden states": lambda: hf(**inner, output_hidden_states=True),
        "pattern": lambda: model.run_with_cache(ready, names_filter="blocks.3.attn.hook_pattern", read="all"),
        "cut": lambda: model(ready, read="all", edges=cut),
    }


def is_resid(name: str) -> bool:
    """The residual stream after every decoder layer (the tower's layers have points of that name too)."""
    return name.startswith("blocks.") and name.endswith("hook_resid_post")


def band(q: Tensor, k: Tensor) -> Tensor:
    """A cut of every other band of 64 positions, but for the first and a row's own key."""
    distance = q[:, None] - k[None, :]
    return (distance // 64 % 2 == 0) | (k[None, :] < 64) | (distance == 0)


def measure(shape: models.Shape, *, positions: int, pairs: int) -> dict[str, Any]:
    """All ratios and peaks for one shape."""
    frames = shape.frames_for(positions)
    x = models.inputs(shape, frames)
    plain = models.build(shape)
    model = wrap(copy.deepcopy(plain))
    ready = model.prepare_inputs(**x)
    with torch.no_grad():
        todo = works(plain, model, ready, x)
        difference = float((todo["forward"]() - todo["hf"]()).abs().max())
        seconds = paired(todo, pairs=pairs)
        peaks = {
            name: peak_bytes(todo[name])
            for name in ("hf", "hf decoder", "decoder", "resid", "pattern", "cut")
        }
        kept = sum(t.nbytes for t in todo["resid"]()[1].cache_dict.values())
    ratios = {name: median_ratio(seconds, a, b) for name, (a, b) in RATIOS.items()}
    return {
        "shape": asdict(shape), "positions": ready.n_pos, "frames": frames, "pairs": pairs,
        "largest_difference_of_logits": difference, "ratios": ratios, "targets": TARGETS, "seconds": seconds,
        "peak_bytes": peaks, "resid_kept_bytes": kept, "resid_extra_bytes": peaks["resid"] - peaks["decoder"],
        "method": {
            "time": "process time, one thread; all works within each round, order alternating; median of the rounds' ratios",
            "memory": "peak of the running sum of all tensor allocations and releases in the profiler's record",
        },
    }  # fmt: skip


def failures(result: dict[str, Any]) -> list[str]:
    """Targets missed, in words."""
    ratios = result["ratios"]
    missed = [f"{n}: {ratios[n]:.3f}, target {top}" for n, top in TARGETS.items() if ratios[n] > top]
    if result["resid_extra_bytes"] > result["resid_kept_bytes"]:
        missed.append(
            f"resid took {result['resid_extra_bytes']:,} bytes to keep {result['resid_kept_bytes']:,}"
        )
    if result["largest_difference_of_logits"] > 0:
        missed.append(f"logits differ by {result['largest_difference_of_logits']:.1e}")
    return missed


def main(args: Sequence[str] | None = None) -> int:
    """Measure, write, print the ratios; 1 if a target was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.bench.overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", help="json file; standard output without it")
    parser.add_argument("--pairs", type=int, default=11, help="rounds (default 11)")
    parser.add_argument("--positions", type=int, default=2000, help="length of the prompt (default 2000)")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    result = setting() | measure(models.Shape(), positions=given.positions, pairs=given.pairs)
    write(given.out, result)
    if given.out:
        for name, ratio in result["ratios"].items():
            print(f"{name:30} {ratio:6.3f}")
        print(f"resid keeps {result['resid_kept_bytes']:,} bytes and takes {result['resid_extra_bytes']:,}")
    missed = failures(result)
    print("\n".join(missed) or "all targets met") if given.out else None
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
