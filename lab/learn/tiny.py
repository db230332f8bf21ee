"""Trains `tiny`, the bundled model: a small LLaVA-OneVision that says which way a shape moves.

    python -m lab.learn.tiny --out runs/tiny             # 40 minutes on one busy core
    python -m lab.learn.tiny --out runs/tiny --resume    # continue after an interruption

Stages, each ended by a number: the video first, with the answer word supervised at the `?`; then matching a word to its
letter in text alone, short form before final form; then letters on video, with a falling rate; last, everything a user
may vary. Shuffled option order throughout.
The finished checkpoint with `training.json` lies in OUT/model.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab.learn import vocabulary
from lab.learn.sft import Stage, Trainer
from lab.learn.tiny_checks import full_report, held_out
from lab.learn.tiny_data import Batches, Prompts
from lab.learn.tiny_model import config, start, write


def stages(batches: Batches) -> list[Stage]:
    """The recipe."""
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


def train(out: Path, *, seed: int = 0, resume: bool = False) -> Trainer:
    """Run all stages; the trainer holds the model when it is done."""
    from transformers import LlavaOnevisionForConditionalGeneration

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    prompts = load_prompts(out)
    hf = LlavaOnevisionForConditionalGeneration(config())
    start(hf)
    print(f"{sum(p.numel() for p in hf.parameters()) / 1e6:.2f} M parameters")
    trainer = Trainer(hf, stages(Batches(prompts, seed)), out, check=held_out(prompts, 128, 10_000 + seed))
    if resume and trainer.resume():
        print(f"resumed at step {trainer.progress.step}")
    trainer.run()
    return trainer


def load_prompts(folder: Path) -> Prompts:
    """The tokenizer, written to `folder` and read back as users will read it."""
    from transformers import AutoTokenizer

    return Prompts(AutoTokenizer.from_pretrained(vocabulary.save(folder)))


def finish(trainer: Trainer, out: Path, seed: int) -> dict[str, Any]:
    """Write OUT/model with its numbers in `training.json`."""
    hf = trainer.hf.eval()
    model = write(hf, out / "model")
    report = {
        "command": f"python -m lab.learn.tiny --out OUT --seed {seed}",
        "seed": seed,
        "parameters": sum(p.numel() for p in hf.parameters()),
        "steps": trainer.progress.step,
        "seconds": round(trainer.progress.seconds),
        "torch": torch.__version__,
        "stages": _stages_passed(out),
        "held_out": {k: round(v, 4) for k, v in full_report(hf, load_prompts(out)).items()},
    }
    (model / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


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
    print(json.dumps(finish(trainer, args.out, args.seed), indent=2))


if __name__ == "__main__":
    main()
