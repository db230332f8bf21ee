"""Trains `tiny` to watch and to speak (LIVE, VideoLLM-online, arXiv 2406.11816): narration of simulated events.

    python -m lab.learn.narration --out runs/live

A clip is watched frame by frame; when an event begins the model says what it is, else it is silent. The streaming loss
(`lab.learn.live`) trains a low-rank delta of the decoder. OUT/variant is a variant of `tiny` (`lab.load("OUT/variant")`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lab.carriers import VideoQA
from lab.errors import LabError, UsageError
from lab.learn.live import Say, Script, Scripted, Watch, end_text, evaluate, live_loss, targets
from lab.learn.sft import Stage, Trainer
from lab.mechanisms import plain
from lab.mechanisms.streaming import Streaming, silent_id
from lab.model import lowrank, variants
from lab.model.videollm import VideoLLM
from lab.model.zoo import load, weights_hash
from lab.sim.stage import FPS
from lab.sim.tasks import draw_items

TASKS = ("action_sequence", "scene_transition")
ASK = "Tell what happens."
THETA = 0.1  # the unembedding is not trained, and keeps p(silence) below 0.3 even where silence is likeliest by far
Lesson = tuple[VideoQA, Script]


def narrated(item: VideoQA) -> tuple[Watch | Say, ...]:
    """The conversation about a simulated clip: a frame, the request, and every event told in the frame that shows it first.

    Raises UsageError for an item that is not of `TASKS`.
    """
    if item.task not in TASKS:
        raise UsageError(
            f"nobody narrates {item.task or 'this item'!r}; use items of lab.sim: {', '.join(TASKS)}"
        )
    script: list[Watch | Say] = [Watch(1, learn=0), Say("user", ASK)]
    at = 0
    for frame, text in _told(item.state):
        script += [Watch(frame - at), Say("assistant", text)]
        at = frame
    left = len(item.state) - 1 - at
    return (*script, *([Watch(left)] if left else []))


def _told(stage: Any) -> list[tuple[int, str]]:
    """(frame, what is said) of every event, in order."""
    out: list[tuple[int, str]] = []
    for event in sorted(stage.events, key=lambda e: e.start):
        frame = round(event.start * FPS)
        # not which shape: tiny was never asked for colours, and 800 steps did not teach it to name them
        out.append(
            (frame, f"It {event.verb}." if event.thing >= 0 else f"The scene becomes {stage.places[frame]}.")
        )
    return out


class Narrator(nn.Module):
    """What the trainer trains: the deltas. The model itself is held aside and stays frozen."""

    def __init__(self, model: VideoLLM, added: dict[str, nn.Module]) -> None:
        super().__init__()
        self.held = (model,)  # a tuple, so that its weights are not among those that learn
        self.added = nn.ModuleDict({name.replace(".", "/"): m for name, m in added.items()})


def lesson_loss(
    config: Streaming, w: float, narrator: Narrator, lesson: Lesson
) -> tuple[Tensor, dict[str, float]]:
    """LIVE's loss of one conversation (frames weighed by `w`), and shares of frames and words that are predicted right."""
    (model,), (item, script) = narrator.held, lesson
    ready = model.prepare(item, index=range(len(item.state)))
    out = model.run(ready, read="all", mechanisms=[Scripted(tuple(script), config, end_text(model))])
    wanted = targets(out.maps[0], script, silent_id(model, config))
    loss, right = live_loss(out.logits[0], wanted, w=w), out.logits[0].argmax(-1) == wanted.labels
    said = (wanted.labels >= 0) & ~wanted.at_frame
    shares = {"frame_acc": right[wanted.at_frame], "word_acc": right[said]}
    return loss, {f"{item.task}:{name}": float(r.float().mean()) for name, r in shares.items()}


def lessons(batch: int, seed: int, step: int) -> list[Lesson]:
    """The conversations of one step, half of each task."""
    rng = np.random.default_rng((seed, step))
    return [
        (item, narrated(item))
        for task in TASKS
        for item in draw_items(task, max(1, batch // len(TASKS)), int(rng.integers(1 << 31)))
    ]


def measured(model: VideoLLM, config: Streaming, n: int, seed: int) -> dict[str, float]:
    """LIVE's scores on conversations that training never draws, `n` a task; time_diff in frames."""
    items = [i for task in TASKS for i in draw_items(task, n, seed)]
    turns = [t for i in items for t in evaluate(model, i, narrated(i), config)]
    return {
        "replies": len(turns), "in_time": _mean([t.frame_diff == 0 for t in turns]),
        "time_diff_frames": _mean([abs(t.frame_diff) for t in turns]), "fluency": _mean([t.fluency for t in turns]),
        "correctness": _mean([t.correctness for t in turns]), "perplexity": _mean([t.perplexity for t in turns]),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def train(
    model: VideoLLM, config: Streaming, out: str | Path, *, steps: int, batch: int = 4, peak: float = 1e-3, rank: int = 16,
    w: float = 1.0, seed: int = 0, check: int = 8, resume: bool = False,
) -> tuple[lowrank.Delta, dict[str, Any]]:  # fmt: skip
    """Train a delta of the decoder; the model is afterwards as it was. Returns the delta and how it was trained."""
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    stage = Stage("narration", partial(lessons, batch, seed), ("none", 2.0), steps, peak=peak, decay=True)

    def scores(narrator: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return measured(model, config, check, 10_000 + seed)

    with lowrank.learning(model.lm, rank, seed=seed) as added, torch.enable_grad():
        trainer = Trainer(
            Narrator(model, added), [stage], out, check=scores, loss=partial(lesson_loss, config, w)
        )
        if resume:
            trainer.resume()
        trainer.run()
        delta = lowrank.taken(added)
    done = trainer.progress
    return delta, {"steps": done.step, "seconds": round(done.seconds), "batch": batch, "rank": rank, "peak": peak, "w": w, "seed": seed}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, save; 0, or the exit code of what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m lab.learn.narration", description="Train tiny to narrate events as it watches.")  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for journal, checkpoints and the variant"
    )
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--w", type=float, default=1.0, help="weight of frames in the loss (the paper's 1)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the delta")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=int, default=8, help="held-out clips per task on the way")
    parser.add_argument("--items", type=int, default=100, help="held-out clips per task at the end")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        _train(args)
    except LabError as e:
        print(f"{type(e).__name__}: {e}")
        return e.exit_code
    return 0


def _train(args: argparse.Namespace) -> None:
    model, config = load(args.base, device="cpu"), replace(Streaming.EXAMPLE, theta=THETA, max_new_tokens=20)
    with torch.no_grad():
        before = measured(model, config, args.check, 777)
    delta, how = train(
        model, config, args.out, steps=args.steps, batch=args.batch, peak=args.peak, rank=args.rank, w=args.w, seed=args.seed,
        check=args.check, resume=args.resume,
    )  # fmt: skip
    with lowrank.applied(model.lm, delta), torch.no_grad():
        found = measured(model, config, args.items, 777)
    folder = variants.write(
        args.out / "variant", delta, [plain(config)], base=args.base, weights=weights_hash(args.base), **how,
        tasks=list(TASKS), items=args.items, held_out=found, not_trained=before,
    )  # fmt: skip
    print(f"{folder}: {json.dumps(found)}")


if __name__ == "__main__":
    raise SystemExit(main())
