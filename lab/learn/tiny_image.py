"""Trains `tiny-image`, the base twin of `tiny`: the same architecture and questions, but it never sees two frames.

    python -m lab.learn.tiny_image --out runs/tiny-image            # about 40 minutes on one core
    python -m lab.learn.tiny_image --out runs/tiny-image --resume

It learns what one picture tells (colour, shape, place, side, number), and then to answer the five temporal tasks from one
random frame, as well as that can be done. A third of its pictures come as a clip of eight equal frames, so that it can read
the length of a video; no clip of its training holds two different frames.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lab.learn.sft import Batch, Stage, Trainer
from lab.learn.tiny import Check, finish, load_prompts, run
from lab.learn.tiny_checks import check_on, held_out
from lab.learn.tiny_data import FRAMES, Prompts
from lab.learn.tiny_tasks import Asked, Clip, Spoil, TaskBatches, draw_clip
from lab.sim.stage import render
from lab.sim.stills import FACTS, OPTIONS, draw_fact
from lab.sim.stills import items as fact_items
from lab.sim.tasks import TEMPORAL


def draw_picture(
    task: str, rng: np.random.Generator, stem: str, wide: bool, *, frames: int
) -> tuple[Clip, list[Asked]]:
    """One frame, `frames` times: a fact's, or a random one of a clip of a temporal task."""
    if task in FACTS:
        stage, question, said = draw_fact(task, rng)
        clip, asked = render(stage), [Asked(question, OPTIONS[task], said)]
    else:
        clip, asked = draw_clip(task, rng, stem, wide)
    at = rng.integers(len(clip))
    return np.repeat(clip[at : at + 1], frames, axis=0), asked


class Pictures:
    """Draws the batches: in every third step as clips of eight equal frames, else as single frames."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.plain = self._batches(tokenizer, seed, 1, FACTS)
        self.one = self._batches(tokenizer, seed, 1, (*FACTS, *TEMPORAL))
        self.eight = self._batches(tokenizer, seed, FRAMES, (*FACTS, *TEMPORAL))

    def _batches(self, tokenizer: Any, seed: int, frames: int, tasks: Sequence[str]) -> TaskBatches:
        draw = partial(draw_picture, frames=frames)
        return TaskBatches(Prompts(tokenizer, frames), seed, tasks, draw)

    def facts(self, step: int) -> list[Batch]:
        """Facts alone, with the answer word at the `?`, no options."""
        return self.plain.video(step, worlds=10, lists=0, hints=0, rough=0.3)

    def texts(self, step: int, *, short: bool) -> list[Batch]:
        """Text only, and in every fourth step pictures."""
        if step % 4 == 0:
            return self.facts(step)
        return self.one.short(step) if short else self.one.text(step)

    def letters(self, step: int, *, wide: bool = False) -> list[Batch]:
        """Letters on pictures; every sixth step text only."""
        if step % 6 == 0:
            return self.one.text(step)
        spoil = Spoil(blank=0.03) if wide else None
        few: dict[str, Any] = {"lists": 2, "hints": 0 if wide else 1, "wide": wide, "spoil": spoil}
        if step % 3 == 1:
            return self.eight.video(step, worlds=1, **few)
        return self.one.video(step, worlds=3, **few)

    def facts_by_letter(self, step: int) -> list[Batch]:
        """Mostly facts with letters; every fourth step as `letters`, so that nothing else is forgotten."""
        if step % 4 == 0:
            return self.letters(step // 4, wide=True)
        return self.plain.video(step, worlds=4, lists=3, hints=1, wide=True)


def stages(pictures: Pictures) -> list[Stage]:
    """The recipe. Where temporal questions are in a batch, no gate can be passed: those stages have a length."""
    return [
        Stage("facts", pictures.facts, ("ask_acc", 0.93), 900),
        Stage("short", partial(pictures.texts, short=True), ("short_acc", 0.95), 1500),
        Stage("final", partial(pictures.texts, short=False), ("hint_acc", 0.95), 1500),
        Stage("letters", pictures.letters, ("letter_acc", 2.0), 900),
        Stage("settle", partial(pictures.letters, wide=True), ("letter_acc", 2.0), 500, 7e-4, True),
        Stage("facts again", pictures.facts_by_letter, ("letter_acc", 2.0), 900, decay=True),
    ]


def check(tokenizer: Any, seed: int) -> Check:
    """Facts on single frames and the temporal tasks on whole clips, all held out."""
    facts = check_on(Prompts(tokenizer, 1), {fact: fact_items(fact, 96, seed) for fact in FACTS})
    clips = held_out(Prompts(tokenizer), 96, seed)
    return lambda hf: facts(hf) | clips(hf)


def train(out: Path, *, seed: int = 0, resume: bool = False) -> Trainer:
    """Run all stages; the trainer holds the model when it is done."""
    tokenizer = load_prompts(out).tokenizer
    recipe = stages(Pictures(tokenizer, seed))
    return run(recipe, out, check=check(tokenizer, 10_000 + seed), seed=seed, resume=resume)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the image-only twin of the bundled model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    args = parser.parse_args()
    trainer = train(args.out, seed=args.seed, resume=args.resume)
    found = check(load_prompts(args.out).tokenizer, 777)(trainer.hf.eval())
    numbers = {f"{task}_letter": shares["letter"] for task, shares in found.items()}
    finish(trainer, args.out, f"python -m lab.learn.tiny_image --out OUT --seed {args.seed}", numbers)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
