"""What a materialised policy saves: KV bytes and time of a prefill, against the masked policy and the full model.

    python -m lab.bench.materialise --out materialise.json

A random LLaVA-OneVision of 12 layers (d 512, 8 heads, 2 of keys, MLP 1,408) reads 16 frames of 196 tokens and 114 words,
L 3,251. The policies: video exits after two thirds of the layers; frames read only themselves in the last third before
that as well; Map the Flow's strict one. Works take turns within a round; ratios are medians over rounds. Time is CPU
time of the process on one thread (wall time on a GPU). The tower is left out on all sides.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from lab.bench import models
from lab.bench.measuring import median_ratio, paired, setting, write
from lab.bench.sweep import prompt
from lab.edges import presets
from lab.edges.cuts import Cut
from lab.edges.policy import Policy
from lab.model.zoo import wrap

SHAPE = models.Shape(d=512, mlp=1408, layers=12, heads=8, kv_heads=2, side=112, patch=4)
FRAMES = 16


def policies(n: int) -> dict[str, Policy]:
    """Exit at two thirds, the same with frames on their own before it, and the paper's."""
    exit_ = presets.video_exit(2 * n // 3, n)
    alone = Cut(layers=f"1-{2 * n // 3}", q="video", k="video", where=presets.CROSS)
    return {
        "exit at two thirds": exit_,
        "exit, frames on their own": exit_.model_copy(update={"cuts": (*exit_.cuts, alone)}),
        "7b/strict": presets.paper("7b", "strict", n),
    }


@torch.no_grad()
def measure(
    shape: models.Shape, frames: int, pairs: int, device: str, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Time ratios, bytes and the largest difference of every policy."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = wrap(models.build(shape, device=device, dtype=dtype))
    ready = prompt(model, shape, frames)
    model.see(ready)
    found: dict[str, Any] = {"positions": ready.n_pos}
    for name, policy in policies(shape.layers).items():
        if names and name not in names:
            continue
        saved = model.materialise(policy)
        masked, short = model(ready, policy=policy), saved(ready)
        clock = time.process_time if device == "cpu" else _waited
        works = {
            "full": lambda: model(ready),
            "masked": lambda p=policy: model(ready, policy=p),
            "materialised": lambda s=saved: s(ready),
        }
        took = paired(works, pairs=pairs, warm=0, clock=clock)  # the two runs above warmed up
        found[name] = {
            "full / materialised": round(1 / median_ratio(took, "materialised", "full"), 3),
            "masked / materialised": round(1 / median_ratio(took, "materialised", "masked"), 3),
            "seconds": took, "max_difference": float((masked - short).abs().max()),
            "same_token": int(masked.argmax()) == int(short.argmax()),
            "kv": {**saved.kv_bytes(ready), "measured": saved.kv_measured(ready)},
        }  # fmt: skip
    return found


def _waited() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Savings of materialised policies.")
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    parser.add_argument("--policies", nargs="*", default=[], help="names; all if none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="json file; standard output if absent")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shape = replace(SHAPE, layers=args.layers)
    found = measure(shape, args.frames, args.pairs, args.device, args.policies)
    write(args.out, {"setting": setting(args.device), "shape": asdict(shape), "found": found})


if __name__ == "__main__":
    main()
