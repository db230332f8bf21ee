"""Fine-tunes any wrapped VideoLLM on questions with answers; the lab's own forward carries the gradients.

    trainer = finetune(model, lab.sim.items("moving_direction", 64, seed=1), "runs/ft", steps=100)

The target is what a user reads: `B) right` for a question with options, the text itself for an open one. Because the
forward is the lab's, mechanisms can be on while the model learns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.carriers import LETTERS, VideoQA
from lab.errors import UsageError
from lab.learn.sft import Stage, Trainer
from lab.model.answering import target_logits


def finetune(
    model: Any,
    items: Sequence[VideoQA],
    out: str | Path,
    *,
    steps: int,
    batch: int = 4,
    peak: float = 1e-4,
    seed: int = 0,
    n_frames: int | None = None,
    mechanisms: Any = (),
    trained: Callable[[str], bool] = lambda name: True,
    check: Callable[[Any], dict[str, Any]] = lambda hf: {},
    resume: bool = False,
) -> Trainer:
    """Train `model` in place; journal and checkpoints go to `out`.

    items       questions with options and a right answer, or open ones with the answer's text
    batch       questions a step, drawn with a generator seeded with (seed, step); their losses are averaged
    mechanisms  on during training, as in `model(ready, mechanisms=...)`
    trained     which of the checkpoint's parameters learn, by name; the others stay as they are
    Afterwards the model is frozen and in eval mode again. Raises UsageError for items without an answer.
    """
    if not items:
        raise UsageError("no items to learn from; give at least one question with its answer")
    targets = [target(model, item) for item in items]
    loss = partial(_loss, model, items, targets, n_frames, mechanisms)
    stage = Stage("finetune", partial(_draw, len(items), batch, seed), ("loss", 2.0), steps, peak=peak)
    with _learning(model, trained):
        trainer = Trainer(model.hf, [stage], out, check=check, loss=loss)
        if resume:
            trainer.resume()
        trainer.run()
    return trainer


def target(model: Any, item: VideoQA) -> Tensor:
    """Token ids [1, target] of what the model should say. Raises UsageError where the item does not say."""
    text = item.answer
    if item.options and isinstance(item.answer, int):
        text = f"{LETTERS[item.answer]}) {item.options[item.answer]}"
    if not isinstance(text, str):
        raise UsageError(f"item {item.id or item.question!r} has no answer to learn from")
    return model.need_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def _draw(n: int, batch: int, seed: int, step: int) -> list[int]:
    """Indices of the questions of a step."""
    return np.random.default_rng((seed, step)).integers(n, size=batch).tolist()


def _loss(
    model: Any, items: Sequence[VideoQA], targets: Sequence[Tensor], n_frames: int | None, mechanisms: Any,
    hf: nn.Module, index: int,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    ready = model.prepare(items[index], n_frames=n_frames)
    want = targets[index].to(model.device)
    logits = target_logits(model, ready, want, mechanisms=mechanisms).float()
    right = (logits.argmax(-1) == want).float().mean().item()
    return F.cross_entropy(logits[0], want[0]), {"token_acc": right}


@contextmanager
def _learning(model: Any, trained: Callable[[str], bool]) -> Iterator[None]:
    """The chosen parameters ask for gradients inside; frozen and in eval mode afterwards."""
    chosen = {name for name, _ in model.hf.named_parameters() if trained(name)}
    if not chosen:
        raise UsageError("no parameter of the model was chosen to learn")
    try:
        for name, p in model.hf.named_parameters():
            p.requires_grad_(name in chosen)
        with torch.enable_grad():
            yield
    finally:
        model.hf.requires_grad_(False).eval()
