"""Supervised training in stages: packed questions with a block mask, a journal, checkpoints, resume.

A world is a prefix and several blocks that read it but not each other, so one video carries many supervised option
lists and each of them sees exactly what it would see alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """A piece of every world in the batch.

    ids      [world, n] token ids
    parent   index of the part this one continues (it also sees the parent's parents); None for the first
    targets  (group name, place in this part, wanted next token [world]); groups are averaged apart
    """

    ids: Int[Tensor, "world n"]
    parent: int | None = None
    targets: tuple[tuple[str, int, Int[Tensor, " world"]], ...] = ()


@dataclass(frozen=True)
class Batch:
    """What one forward reads: packed ids, who may see whom, where targets stand; `name`: for numbers of its own."""

    ids: Int[Tensor, "world pos"]
    positions: Int[Tensor, "one pos"]
    mask: Bool[Tensor, "one one pos pos"]
    at: Int[Tensor, " target"]
    want: Int[Tensor, "world target"]
    groups: tuple[str, ...]
    pixels: Float[Tensor, "world frame channel height width"] | None = None
    name: str = ""


def pack(parts: Sequence[Part], pixels: Tensor | None = None) -> Batch:
    """Join parts into one sequence; every part sees itself, its ancestors, nothing else, and nothing ahead."""
    starts: list[int] = []
    positions: list[Tensor] = []
    family: list[set[int]] = []
    for i, part in enumerate(parts):
        up = part.parent
        starts.append(0 if up is None else starts[up] + parts[up].ids.shape[1])
        positions.append(starts[i] + torch.arange(part.ids.shape[1]))
        family.append({i} if up is None else family[up] | {i})
    owner = torch.cat([torch.full((p.ids.shape[1],), i) for i, p in enumerate(parts)])
    kin = torch.tensor([[j in family[i] for j in range(len(parts))] for i in range(len(parts))])
    n = len(owner)
    mask = kin[owner][:, owner] & torch.ones(n, n, dtype=torch.bool).tril()
    offsets = [sum(p.ids.shape[1] for p in parts[:i]) for i in range(len(parts))]
    marks = [(name, offsets[i] + k, want) for i, p in enumerate(parts) for name, k, want in p.targets]
    return Batch(
        ids=torch.cat([p.ids for p in parts], dim=1),
        positions=torch.cat(positions)[None],
        mask=mask[None, None],
        at=torch.tensor([k for _, k, _ in marks]),
        want=torch.stack([w for _, _, w in marks], dim=1),
        groups=tuple(name for name, _, _ in marks),
        pixels=pixels,
    )


def score(hf: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Loss (sum over groups of the mean cross-entropy) and, per group, `NAME_loss` and `NAME_acc`."""
    seen = {} if batch.pixels is None else {"pixel_values_videos": batch.pixels}
    out = hf.model(
        input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False, **seen
    )
    return graded(hf.lm_head(out.last_hidden_state[:, batch.at]), batch)


def graded(logits: Float[Tensor, "world target d_vocab"], batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """What `score` says of the logits at the targets, however they were computed."""
    logits = logits.float()
    each = F.cross_entropy(logits.flatten(0, 1), batch.want.flatten(), reduction="none").view_as(batch.want)
    right = (logits.argmax(-1) == batch.want).float()
    total, numbers = logits.new_zeros(()), {}
    for name in dict.fromkeys(batch.groups):
        here = torch.tensor([g == name for g in batch.groups])
        total = total + each[:, here].mean()
        numbers |= {f"{name}_loss": each[:, here].mean().item(), f"{name}_acc": right[:, here].mean().item()}
    return total, {f"{batch.name}:{k}" if batch.name else k: v for k, v in numbers.items()}


def worst(means: Mapping[str, float], name: str) -> float:
    """The lowest of a number over all batches that have it; 0 where none has it yet."""
    return min((v for k, v in means.items() if k.rpartition(":")[2] == name), default=0.0)


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    batch   step number -> Batch, or several whose losses are averaged (or whatever the trainer's `loss` reads; drawn from a generator seeded with the step, so
            resuming repeats them)
    gate    (number's name, threshold): the stage ends when the running mean of that number reaches it in every batch
    steps   and at the latest after so many steps; peak: learning rate; decay: let it fall to a tenth at the end
    """

    name: str
    batch: Callable[[int], Any]
    gate: tuple[str, float]
    steps: int
    peak: float = 1e-3
    decay: bool = False

    def rate(self, done: int) -> float:
        """Learning rate after `done` steps of this stage."""
        warm = min(1.0, (done + 1) / 50)
        return self.peak * warm * (1 - 0.9 * done / self.steps if self.decay else 1.0)


@dataclass
class Progress:
    """Where training stands; all of it is in the checkpoint."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    seconds: float = 0.0
    means: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Runs stages one after the other; writes `journal.jsonl` and `checkpoint.*` into `folder`."""

    def __init__(
        self,
        hf: nn.Module,
        stages: Sequence[Stage],
        folder: str | Path,
        *,
        check: Callable[[nn.Module], dict[str, Any]],
        loss: Callable[[Any, Any], tuple[Tensor, dict[str, float]]] = score,
        check_every: int = 200,
        save_every: float = 240.0,
    ) -> None:
        self.hf, self.stages, self.folder, self.check = hf, list(stages), Path(folder), check
        self.loss = loss
        self.check_every, self.save_every = check_every, save_every
        self.folder.mkdir(parents=True, exist_ok=True)
        trained = [p for p in hf.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1]
        plain = [p for p in trained if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
        self.progress = Progress()
        self._began = time.time()

    def run(self) -> Progress:
        """Train until the last stage is over."""
        self._began = time.time() - self.progress.seconds
        saved = time.time()
        while self.progress.stage < len(self.stages):
            self._one()
            if time.time() - saved > self.save_every:
                self.save()
                saved = time.time()
        self.save()
        return self.progress

    def _one(self) -> None:
        now = self.progress
        stage = self.stages[now.stage]
        for group in self.optimiser.param_groups:
            group["lr"] = stage.rate(now.stage_step)
        drawn = stage.batch(now.step)
        self.optimiser.zero_grad()
        loss, numbers = self._backward(drawn if isinstance(drawn, list) else [drawn])
        nn.utils.clip_grad_norm_(self.hf.parameters(), 1.0)
        self.optimiser.step()
        now.step, now.stage_step, now.seconds = now.step + 1, now.stage_step + 1, time.time() - self._began
        for name, value in numbers.items():
            now.means[name] = 0.95 * now.means.get(name, value) + 0.05 * value
        self._log("losses.jsonl", {"step": now.step, "loss": loss})
        self._report(stage)
        if worst(now.means, stage.gate[0]) >= stage.gate[1] and now.stage_step >= 50:
            self._next("gate passed")
        elif now.stage_step >= stage.steps:
            self._next("out of steps")

    def _backward(self, batches: Sequence[Any]) -> tuple[float, dict[str, float]]:
        """Gradients of the mean loss; one batch at a time, so that only one graph is alive."""
        total, numbers = 0.0, dict[str, float]()
        for batch in batches:
            loss, found = self.loss(self.hf, batch)
            (loss / len(batches)).backward()
            total, numbers = total + loss.item() / len(batches), numbers | found
        return total, numbers

    def _report(self, stage: Stage) -> None:
        now = self.progress
        if now.step == 200:
            left = sum(s.steps for s in self.stages) - now.step
            print(
                f"at most {left} steps left, about {left * now.seconds / now.step / 60:.0f} minutes at this pace"
            )
        if now.step % 50 == 0:
            self._write({"stage": stage.name, **{k: round(v, 4) for k, v in now.means.items()}})
        if now.step % self.check_every == 0:
            self._write({"stage": stage.name, "held_out": self.check(self.hf)})

    def _next(self, why: str) -> None:
        now = self.progress
        name = self.stages[now.stage].name
        self._write(
            {"stage": name, "ends": why, "stage_steps": now.stage_step, "held_out": self.check(self.hf)}
        )
        now.stage, now.stage_step, now.means = now.stage + 1, 0, {}

    def _write(self, entry: dict[str, Any]) -> None:
        line = {"step": self.progress.step, "seconds": round(self.progress.seconds, 1), **entry}
        self._log("journal.jsonl", line)
        print(json.dumps(line), flush=True)

    def _log(self, name: str, line: dict[str, Any]) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Write weights, optimiser state and progress; replaces the last checkpoint in one move."""
        names: dict[Tensor, str] = {p: n for n, p in self.hf.named_parameters()}
        tensors = {f"weight/{n}": p.detach().contiguous() for n, p in self.hf.named_parameters()}
        for p, state in self.optimiser.state.items():
            tensors |= {f"{k}/{names[p]}": v.contiguous() for k, v in state.items()}
        temporary = self.folder / "checkpoint.new"
        save_file(tensors, temporary, metadata={"progress": json.dumps(vars(self.progress))})
        temporary.replace(self.folder / "checkpoint.safetensors")

    def resume(self) -> bool:
        """Continue from the checkpoint in `folder`; False if there is none.

        A run of one stage that has used up its steps goes on where the stage now has more.
        """
        from safetensors import safe_open

        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return False
        tensors = load_file(path)
        for name, p in self.hf.named_parameters():
            p.data.copy_(tensors[f"weight/{name}"])
            state = {
                k: tensors[f"{k}/{name}"]
                for k in ("step", "exp_avg", "exp_avg_sq")
                if f"{k}/{name}" in tensors
            }
            if state:
                self.optimiser.state[p] = state
        with safe_open(path, "pt") as file:
            self.progress = Progress(**json.loads(file.metadata()["progress"]))
        done = self.progress
        if len(self.stages) == done.stage == 1 and done.step < self.stages[0].steps:
            done.stage, done.stage_step = 0, done.step
        for name in ("journal.jsonl", "losses.jsonl"):
            _forget(self.folder / name, self.progress.step)
        return True


def _forget(journal: Path, step: int) -> None:
    """Drop the lines after `step`: those steps are run again. A last line cut short by a kill goes too."""
    if not journal.exists():
        return
    whole = [line for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = "".join(line for line in whole if json.loads(line)["step"] <= step)
    temporary = journal.with_suffix(".new")
    temporary.write_text(kept)
    temporary.replace(journal)
