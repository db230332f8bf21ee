"""What Mixture-of-Depths saves: rows, FLOPs, key/value bytes, forward time, training step time and memory.

    python -m lab.bench.depths --out depths.json
    python -m lab.bench.depths --device cuda --seven-b --frames 64 --out depths_gpu.json

A random LLaVA-OneVision of 16 layers (d 512, 8 heads, 2 of keys, MLP 2,048) reads 16 frames of 196 tokens and 100 of text.
Every other layer keeps a share r of the video tokens (0.2, frame by frame, untrained routers). Predicted by formula and
measured, side by side: with video alone the layer average would be (1 + r) / 2 = 0.60 for FLOPs of matrices and for
keys and values; text, which is never dropped, adds a little, attention (n squared) takes a little off.

FLOPs are counted by torch over the forward that was run. Time is CPU time of the process on one thread, medians over
rounds of the ratio of neighbours; on a GPU, time until the device is done. A training step is forward, backward and AdamW
over routers and a low-rank delta of the decoder, as the paper trains, over a shorter video (`--train-frames`).

Targets: FLOPs <= 0.62, keys and values <= 0.62, forward time <= 0.75 of vanilla's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lab.bench import models
from lab.bench.measuring import counted_flops, median_ratio, paired, peak_bytes, setting, write
from lab.mechanisms.mixture_of_depths import MixtureOfDepths
from lab.model import lowrank
from lab.model.cache import KVCache
from lab.model.ready import Ready
from lab.model.run import Run
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap
from lab.slots import ModelSizes, Plan, plan_of

SHAPE = models.Shape(d=512, mlp=2048, layers=16, heads=8, kv_heads=2, side=112, patch=4)
TEXT = 100
TARGETS = {"flops": 0.62, "kv": 0.62, "forward": 0.75}


class Kept:
    """A mechanism that hands out the run's cache."""

    def __init__(self) -> None:
        self.cache = KVCache()

    def plan(self, cfg: ModelSizes) -> Plan:
        """The plain cache, held here too."""
        return Plan(cache=lambda: self.cache)


def layer_flops(shape: models.Shape, n: int) -> float:
    """One decoder layer over n rows that read each other causally; a multiply-add is 2 (spec: F(n, n / 2))."""
    d_kv = shape.kv_heads * shape.d // shape.heads
    matrices = 2 * n * shape.d * (2 * shape.d + 2 * d_kv) + 6 * n * shape.d * shape.mlp
    return matrices + 4 * n * (n / 2) * shape.d


def counts(model: VideoLLM, shape: models.Shape, ready: Ready, m: MixtureOfDepths) -> dict[str, Any]:
    """Rows, FLOPs and bytes by formula and by measuring, vanilla's and the mechanism's, and their ratios."""
    n, layers = ready.n_pos, shape.layers
    rows = m.rows(ready.tokens, layers)
    plain, routed = Kept(), Kept()
    flops = [
        counted_flops(lambda: model(ready, mechanisms=[plain])),
        counted_flops(lambda: model(ready, mechanisms=[m, routed])),
    ]
    formula = sum(layer_flops(shape, r) for r in rows) + 2 * n * shape.d * sum(r < n for r in rows)
    video = len(ready.tokens.where(role="video"))
    return {
        "positions": n, "video_share": video / n, "rows_by_layer": rows, "rows_measured": routed.cache.lengths(),
        "video_rows_ratio": (sum(rows) - layers * (n - video)) / (layers * video),
        "flops": {"predicted": formula, "vanilla_predicted": layers * layer_flops(shape, n), "measured": flops[1],
                  "vanilla_measured": flops[0]},
        "flops_ratio": {"predicted": formula / (layers * layer_flops(shape, n)), "measured": flops[1] / flops[0]},
        "kv_bytes": {"predicted": sum(rows) * _kv_bytes(shape, model), "measured": routed.cache.nbytes(), "vanilla": plain.cache.nbytes()},
        "kv_ratio": {"predicted": sum(rows) / (layers * n), "measured": routed.cache.nbytes() / plain.cache.nbytes()},
    }  # fmt: skip


def _kv_bytes(shape: models.Shape, model: VideoLLM) -> int:
    """Bytes of one row of keys and values."""
    return 2 * shape.kv_heads * shape.d // shape.heads * torch.finfo(model.dtype).bits // 8


def prepared(model: VideoLLM, shape: models.Shape, frames: int) -> Ready:
    """A question about so many frames of noise; the tower has run."""
    x = models.inputs(shape, frames, device=model.device, dtype=model.dtype, text=TEXT)
    ready = model.prepare_inputs(**x)
    model.see(ready)
    return ready


def step_of(model: VideoLLM, ready: Ready, m: MixtureOfDepths | None) -> tuple[Callable[[], Any], int]:
    """One training step (call it inside `lowrank.learning`), and the bytes of what learns with gradients and AdamW's state."""
    mechanisms = [] if m is None else [m]
    learns = [p for p in model.lm.parameters() if p.requires_grad]
    learns += [] if m is None or m.routers is None else list(m.routers.parameters())
    optimiser = torch.optim.AdamW(learns, lr=1e-6)
    door = model.see(ready)
    plan = plan_of(mechanisms, model.sizes)

    def step() -> Tensor:
        with torch.enable_grad():
            resid, side = model.stream(door, Run(), plan=plan, tokens=ready.maps)
            loss = model.read(resid, side).float().logsumexp(-1).sum()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        return loss.detach()

    return step, 4 * sum(p.numel() * p.element_size() for p in learns)


def training(
    model: VideoLLM, shape: models.Shape, m: MixtureOfDepths, *, frames: int, pairs: int
) -> dict[str, Any]:
    """Time of a training step and the most bytes its tensors hold at once, beside weights and optimiser."""
    with torch.no_grad():
        ready = prepared(model, shape, frames)
    routed = replace(m, routers=m.fresh_routers(model.sizes, start="random").to(model.device))
    with lowrank.learning(model.lm, 16):
        steps = {"vanilla": step_of(model, ready, None), "mod": step_of(model, ready, routed)}
        works = {name: step for name, (step, _) in steps.items()}
        seconds = paired(works, pairs=pairs, warm=1, clock=clock_of(model.device))
        peaks = {name: peak_bytes(step, model.device) for name, step in works.items()}
        held = {name: extra for name, (_, extra) in steps.items()}
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    whole = {name: peaks[name] + held[name] + weights for name in peaks}
    return {
        "positions": ready.n_pos, "seconds": seconds, "time_ratio": median_ratio(seconds, "mod", "vanilla"),
        "peak_bytes": peaks, "peak_ratio": peaks["mod"] / peaks["vanilla"], "weights_bytes": weights,
        "whole_ratio": whole["mod"] / whole["vanilla"],
    }  # fmt: skip


def clock_of(device: torch.device) -> Callable[[], float]:
    """CPU seconds of the process; on a GPU, seconds with the device done."""
    if device.type != "cuda":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def reading(
    model: VideoLLM, shape: models.Shape, m: MixtureOfDepths, *, frames: int, pairs: int
) -> dict[str, Any]:
    """Counts, time and memory of a forward."""
    with torch.no_grad():
        ready = prepared(model, shape, frames)
        found = counts(model, shape, ready, m)
        works = {"vanilla": lambda: model(ready), "mod": lambda: model(ready, mechanisms=[m])}
        seconds = paired(
            works, pairs=pairs, warm=0, clock=clock_of(model.device)
        )  # the counts have warmed up
        peaks = {name: peak_bytes(work, model.device) for name, work in works.items()}
    return found | {
        "shape": asdict(shape), "frames": frames, "keep": m.keep, "dtype": str(model.dtype), "targets": TARGETS,
        "forward_seconds": seconds, "forward_ratio": median_ratio(seconds, "mod", "vanilla"), "forward_peak_bytes": peaks,
    }  # fmt: skip


def failures(found: dict[str, Any]) -> list[str]:
    """Targets missed, in words."""
    got = {
        "flops": found["flops_ratio"]["measured"],
        "kv": found["kv_ratio"]["measured"],
        "forward": found["forward_ratio"],
    }
    missed = [f"{name}: {got[name]:.3f}, target {top}" for name, top in TARGETS.items() if got[name] > top]
    if found["rows_by_layer"] != found["rows_measured"]:
        missed.append("rows stored are not the rows predicted")
    return missed


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print; 1 if a target was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.bench.depths", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", help="json file; standard output without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seven-b", action="store_true", help="LLaVA-OneVision 7B's shape, bfloat16")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--train-frames", type=int, default=6, help="frames of the training step; 0: none")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--pairs", type=int, default=5, help="rounds (default 5)")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    shape, dtype = (models.SEVEN_B, torch.bfloat16) if given.seven_b else (SHAPE, torch.float32)
    model = wrap(models.build(shape, device=given.device, dtype=dtype))
    m = MixtureOfDepths(keep=given.keep)
    m = replace(m, routers=m.fresh_routers(model.sizes, start="random").to(model.device))
    found = setting(given.device) | reading(model, shape, m, frames=given.frames, pairs=given.pairs)
    write(given.out, found)
    if given.train_frames:
        found["training"] = training(
            model, shape, m, frames=given.train_frames, pairs=max(2, given.pairs // 2)
        )
        write(given.out, found)
    if given.out:
        print(_said(found))
    return int(bool(failures(found)))


def _said(found: dict[str, Any]) -> str:
    lines = [
        f"positions {found['positions']} ({found['video_share']:.1%} video); of vanilla's, at keep {found['keep']}:",
        f"  FLOPs          {found['flops_ratio']['measured']:.3f} (predicted {found['flops_ratio']['predicted']:.3f})",
        f"  keys, values   {found['kv_ratio']['measured']:.3f} (video alone {found['video_rows_ratio']:.3f})",
        f"  forward time   {found['forward_ratio']:.3f}",
    ]
    if "training" in found:
        t = found["training"]
        lines += [
            f"  training step  {t['time_ratio']:.3f} of the time, {t['peak_ratio']:.3f} of the activations' peak, "
            f"{t['whole_ratio']:.3f} with weights ({t['positions']} positions)"
        ]
    return "\n".join([*lines, *(f"MISSED {m}" for m in failures(found))])


if __name__ == "__main__":
    raise SystemExit(main())
