"""What differential token drop costs and keeps on simulated videos with a still background: accuracy, tokens, time.

    python -m lab.bench.token_drop --out lab/bench/data/token_drop_cpu.json

The clips have no noise, no camera, and a background that stands still, so that most of a frame repeats the one before.
Every variant answers the same questions: the model as it is, DTD at a target share of the compared tokens (features or
pixels, positions kept or closed up), and its control: as many tokens dropped at random (the first frame kept whole, as
DTD keeps it). Accuracies have 95 % Wilson intervals; `flips` counts answers that differ from the model as it is. Time is
CPU time of one decoder forward, tower left out, in alternating rounds, also on clips of more frames, where the tokens count.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm

from lab.bench.measuring import median_ratio, paired, setting, wilson, write
from lab.carriers import VideoQA
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.model.ready import Ready
from lab.model.zoo import load, weights_hash
from lab.sim.tasks import TEMPORAL, draw_items


def variants(ratio: float) -> dict[str, Any]:
    """Name -> mechanism; None: none."""
    drop = DifferentialTokenDrop(ratio=ratio)
    return {
        "vanilla": None,
        "feature": drop,
        "feature, compact": replace(drop, positions="compact"),
        "feature, per frame": replace(drop, scope="frame"),
        "pixel": replace(drop, space="pixel"),
        "random": drop.control(),
    }


@torch.no_grad()
def answers(model: Any, ready: Ready, named: dict[str, Any]) -> dict[str, tuple[bool, int | None, int]]:
    """Of every variant: whether it is right, what it answers, and how many video tokens it read."""
    out: dict[str, tuple[bool, int | None, int]] = {}
    for name, mechanism in named.items():
        mechanisms = [] if mechanism is None else [mechanism]
        said = model.answer(ready, mechanisms=mechanisms)
        tokens = model.maps(ready, mechanisms=mechanisms)[0]
        out[name] = bool(said.correct), said.index, len(tokens.where(role="frame"))
    return out


def accuracy(model: Any, task: str, n: int, seed: int, named: dict[str, Any]) -> dict[str, Any]:
    """One row per variant: accuracy with interval, tokens read, answers that differ from vanilla."""
    items = draw_items(task, n, seed, static=1.0, noise=0)
    found = [answers(model, model.prepare(i), named) for i in tqdm(items, desc=task)]
    rows: dict[str, Any] = {}
    for name in named:
        right = sum(f[name][0] for f in found)
        low, high = wilson(right, n)
        rows[name] = {
            "accuracy": round(right / n, 4), "low": round(low, 4), "high": round(high, 4),
            "video_tokens": round(sum(f[name][2] for f in found) / n, 2),
            "flips": sum(f[name][1] != f["vanilla"][1] for f in found),
        }  # fmt: skip
    return rows


def seconds(model: Any, frames: int, named: dict[str, Any], pairs: int) -> dict[str, Any]:
    """CPU time of a forward, relative to vanilla; positions and bytes of keys and values of one prompt."""
    item: VideoQA = draw_items("moving_direction", 1, 0, frames=frames)[0]
    ready = model.prepare(item, n_frames=frames)
    model.see(ready)  # once: what is timed are stages and decoder
    lists = {name: [] if m is None else [m] for name, m in named.items()}
    with torch.no_grad():
        taken = paired({n: lambda m=m: model(ready, mechanisms=m) for n, m in lists.items()}, pairs=pairs)
        rows: dict[str, Any] = {}
        for name, m in lists.items():
            n_pos = len(model.maps(ready, mechanisms=m)[0])
            per_row = 2 * model.cfg.n_key_value_heads * model.cfg.d_head * model.cfg.n_layers * 4
            rows[name] = {
                "ms": round(1000 * sorted(taken[name])[pairs // 2], 2), "positions": n_pos, "kv_bytes": n_pos * per_row,
                "time_ratio": round(median_ratio(taken, name, "vanilla"), 3),
            }  # fmt: skip
    return rows


def table(found: dict[str, Any]) -> str:
    """The numbers as text."""
    lines = [f"{'task':18} {'variant':20} {'accuracy':>8} {'95 %':>16} {'tokens':>7} {'flips':>6}"]
    for task, rows in found["accuracy"].items():
        for name, r in rows.items():
            interval = f"[{r['low']:.3f}, {r['high']:.3f}]"
            lines.append(
                f"{task:18} {name:20} {r['accuracy']:8.3f} {interval:>16} {r['video_tokens']:7.1f} {r['flips']:6}"
            )
    lines.append(f"\n{'frames':>6} {'variant':20} {'ms':>8} {'ratio':>7} {'positions':>9} {'KV bytes':>9}")
    for frames, rows in found["time"].items():
        for name, r in rows.items():
            lines.append(
                f"{frames:>6} {name:20} {r['ms']:8.2f} {r['time_ratio']:7.3f} {r['positions']:9} {r['kv_bytes']:9}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Differential token drop on simulated videos that stand still."
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--ratio", type=float, default=0.8, help="share of the compared tokens to drop")
    parser.add_argument("--items", type=int, default=100, help="questions per task")
    parser.add_argument("--seed", type=int, default=9000)
    parser.add_argument("--tasks", nargs="*", default=list(TEMPORAL))
    parser.add_argument(
        "--frames", nargs="*", type=int, default=[8, 48], help="frames of the clips that are timed"
    )
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument(
        "--only", nargs="*", default=[], choices=list(variants(0.8)), help="these variants, beside vanilla"
    )
    parser.add_argument("--out", help="json file; standard output if absent")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, named = load(args.model, device="cpu"), variants(args.ratio)
    named = {n: m for n, m in named.items() if not args.only or n in ("vanilla", *args.only)}
    found: dict[str, Any] = {
        "setting": setting(), "model": args.model, "weights": weights_hash(args.model), "ratio": args.ratio,
        "items": args.items, "seed": args.seed,
        "accuracy": {task: accuracy(model, task, args.items, args.seed, named) for task in args.tasks},
        "time": {str(f): seconds(model, f, named, args.pairs) for f in args.frames},
    }  # fmt: skip
    write(args.out, found)
    if args.out:
        print(table(found))


if __name__ == "__main__":
    main()
