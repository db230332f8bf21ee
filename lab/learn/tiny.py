"""Trains `tiny`, the bundled model: a small LLaVA-OneVision that says which way a shape moves.

    python -m lab.learn.tiny --out runs/tiny             # three hours on one core
    python -m lab.learn.tiny --out runs/tiny --resume    # continue after an interruption

Stages, each ended by a number: the video first, with the answer word supervised at the `?`; then matching a word to its
letter in text alone, short form before final form; then letters on video, with a falling rate; last, everything a user
may vary. Shuffled option order throughout.
The finished checkpoint with `training.json` lies in OUT/model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab.learn import vocabulary
from lab.learn.curves import draw as draw_curves
from lab.learn.sft import Stage, Trainer
from lab.learn.tiny_checks import full_report, held_out
from lab.learn.tiny_data import Batches, Prompts
from lab.learn.tiny_model import config, start, write
from lab.learn.tiny_tasks import Spoil, TaskBatches

Check = Callable[[Any], dict[str, Any]]


def stages(batches: Batches, tasks: TaskBatches) -> list[Stage]:
    """The recipe: one task first, then all five."""
    return [*_direction(batches), *_five(tasks)]


def _direction(batches: Batches) -> list[Stage]:
    return [
        Stage("outward", partial(batches.video, easy=1.0, rough=0.0), ("ask_acc", 0.9), 600),
        Stage("half outward", partial(batches.video, easy=0.4, rough=0.0), ("ask_acc", 0.85), 1000),
        Stage("video", batches.video, ("ask_acc", 0.95), 2000),
        Stage("short", partial(batches.mixed, "short", 4), ("short_acc", 0.95), 2000),
        Stage("final", partial(batches.mixed, "final", 4), ("hint_acc", 0.95), 2000),
        Stage("letters", batches.letters, ("letter_acc", 0.95), 3000),
        Stage("settle", batches.letters, ("letter_acc", 2.0), 400, decay=True),
        Stage("whole answer", batches.whole, ("letter_acc", 2.0), 450, peak=7e-4, decay=True),
    ]


def _five(tasks: TaskBatches) -> list[Stage]:
    """Counting comes last: four tasks are learned in 600 steps; it needs easier clips, and most of the worlds."""
    few = {"worlds": 1, "counts": 8, "rough": 0.3}
    spoil = Spoil(shuffled=0.15, blank=0.03)
    last = partial(tasks.mixed, every=8, lists=3, hints=0, rough=0.6, wide=True, spoil=spoil, counts=4)
    mixed = partial(
        tasks.mixed, every=8, worlds=1, counts=10, hints=0, rough=0.6, wide=True,
        spoil=spoil, spoil_counts=Spoil(shuffled=0.55, blank=0.03),
    )  # fmt: skip
    mostly = partial(
        tasks.mixed, every=8, worlds=1, counts=12, hints=0, rough=0.5, wide=True,
        spoil=spoil, spoil_counts=Spoil(shuffled=0.8, blank=0.03),
    )  # fmt: skip
    return [
        Stage("five tasks", partial(tasks.mixed, every=4, rough=0.3, easy=0.7), ("ask_acc", 0.9), 1231),
        Stage("count", partial(tasks.mixed, every=6, easy=0.7, **few), ("ask_acc", 0.9), 1500),
        Stage("whole count", partial(tasks.mixed, every=6, **few), ("ask_acc", 0.95), 677),
        Stage("five settle", last, ("letter_acc", 2.0), 1400, peak=8e-4, decay=True),
        Stage("unordered counts", mixed, ("letter_acc", 2.0), 700, peak=6e-4, decay=True),
        Stage("unordered counts again", mixed, ("letter_acc", 2.0), 1500, peak=8e-4, decay=True),
        Stage("mostly unordered counts", mostly, ("letter_acc", 2.0), 1000, peak=8e-4, decay=True),
        Stage("counts settle", mixed, ("letter_acc", 2.0), 350, peak=4e-4, decay=True),
    ]


def train(out: Path, *, seed: int = 0, resume: bool = False) -> Trainer:
    """Run all stages; the trainer holds the model when it is done."""
    prompts = load_prompts(out)
    recipe = stages(Batches(prompts, seed), TaskBatches(prompts, seed))
    return run(recipe, out, check=held_out(prompts, 96, 10_000 + seed), seed=seed, resume=resume)


def run(recipe: Sequence[Stage], out: Path, *, check: Check, seed: int, resume: bool) -> Trainer:
    """Train a fresh model of the bundled architecture through `recipe`."""
    from transformers import LlavaOnevisionForConditionalGeneration

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    hf = LlavaOnevisionForConditionalGeneration(config())
    start(hf)
    print(f"{sum(p.numel() for p in hf.parameters()) / 1e6:.2f} M parameters")
    trainer = Trainer(hf, recipe, out, check=check)
    if resume and trainer.resume():
        print(f"resumed at step {trainer.progress.step}")
    trainer.run()
    return trainer


def load_prompts(folder: Path) -> Prompts:
    """The tokenizer, written to `folder` and read back as users will read it."""
    from transformers import AutoTokenizer

    return Prompts(AutoTokenizer.from_pretrained(vocabulary.save(folder)))


def finish(trainer: Trainer, out: Path, command: str, held_out: dict[str, float]) -> dict[str, Any]:
    """Write OUT/model with `training.json` (command, stages passed, first losses) and OUT/curves.png."""
    hf = trainer.hf.eval()
    model = write(hf, out / "model")
    losses = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    report = {
        "command": command,
        "parameters": sum(p.numel() for p in hf.parameters()),
        "steps": trainer.progress.step,
        "seconds": round(trainer.progress.seconds),
        "torch": torch.__version__,
        "stages": _stages_passed(out),
        "held_out": held_out,
        "first_losses": [line["loss"] for line in losses[:200]],
    }
    (model / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_curves(out).savefig(out / "curves.png", dpi=150)
    return report


def stored(out: Path) -> Any:
    """The model of OUT/model as users will load it: weights rounded to half precision."""
    from transformers import LlavaOnevisionForConditionalGeneration

    return LlavaOnevisionForConditionalGeneration.from_pretrained(out / "model", local_files_only=True).eval()


def _stages_passed(out: Path) -> list[dict[str, Any]]:
    """What the journal says about the end of each stage."""
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if "ends" in line]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for journal, checkpoints and the model"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    args = parser.parse_args()
    trainer = train(args.out, seed=args.seed, resume=args.resume)
    write(trainer.hf, args.out / "model")
    found = full_report(stored(args.out), load_prompts(args.out))
    numbers = {k: round(v, 4) for k, v in found.items()}
    finish(trainer, args.out, f"python -m lab.learn.tiny --out OUT --seed {args.seed}", numbers)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
