"""Trains `tiny` with Mixture-of-Depths on (VideoLLM-MoD, arXiv 2408.16730): routers and a low-rank delta of the decoder.

    python -m lab.learn.mod --out runs/mod                    # keep 0.2 on every other layer, learned routers
    python -m lab.learn.mod --out runs/full --keep 1          # the control: the same budget without routing
    python -m lab.learn.mod --out runs/random --selector random
    python -m lab.learn.mod --table runs/mod runs/full runs/random --out runs/table.json

As the paper: routers and LoRA learn together, on the data the base model was trained on, with the mechanism on; top-k is
hard throughout. OUT/variant holds what makes the variant of `tiny` (`lab.load("OUT/variant")`): see `lab.model.variants`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.carriers import LETTERS, TokenMap, VideoQA
from lab.errors import LabError, UsageError
from lab.learn.sft import Batch, Stage, Trainer, graded
from lab.learn.table import shown
from lab.learn.tiny_checks import Clips
from lab.learn.tiny_data import Prompts, to_pixels
from lab.learn.tiny_tasks import Spoil, TaskBatches
from lab.mechanisms import of_plain, plain
from lab.mechanisms.mixture_of_depths import MixtureOfDepths
from lab.model import lowrank, variants
from lab.model.ready import Ready
from lab.model.run import Run
from lab.model.videollm import VideoLLM
from lab.model.zoo import load, weights_hash
from lab.routing import Routers
from lab.sim.tasks import TASKS, draw_items
from lab.slots import Plan, plan_of

ROUTERS = "routers.safetensors"
SEED = 777  # of the items that are measured on; training never draws it
Lessons = Callable[[int], Batch | list[Batch]]


# ---- the model that learns ------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """What the trainer trains: deltas and routers. The model itself is held aside and stays frozen."""

    def __init__(self, model: VideoLLM, mechanism: MixtureOfDepths, added: dict[str, nn.Module]) -> None:
        super().__init__()
        self.held = (model,)  # a tuple, so that its weights are not among those that learn
        self.mechanism = mechanism
        self.routers = mechanism.routers
        self.added = nn.ModuleDict({name.replace(".", "/"): m for name, m in added.items()})

    @property
    def model(self) -> VideoLLM:
        return self.held[0]


def learn_score(learner: Learner, batch: Batch, *, aux: float = 0.0) -> tuple[Tensor, dict[str, float]]:
    """`lab.learn.sft.score` through the lab's own decoder, with the mechanism on. aux: weight of gamma-MoD's auxiliary loss."""
    model = learner.model
    plan = plan_of([learner.mechanism], model.sizes)
    ready = _ready(model, batch)
    with model.lock.shared():
        door = replace(model.see(ready), rope=batch.positions.to(model.device), pad=None)
        run = Run(dict.fromkeys(range(model.cfg.n_layers), partial(_block_mask, batch.mask[0, 0])))
        resid, side = model.stream(door, run, plan=plan, tokens=ready.maps)
        logits = model.unembed(model.ln_final(resid[:, batch.at]))
    loss, numbers = graded(logits, batch)
    return loss + aux * _auxiliary(plan, resid, side) if aux else loss, numbers


def _ready(model: VideoLLM, batch: Batch) -> Ready:
    inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids)}
    if batch.pixels is not None:
        return model.prepare_inputs(**inputs, pixel_values_videos=batch.pixels)
    return Ready(inputs, tuple(_text_map(ids) for ids in batch.ids))


def _text_map(ids: Tensor) -> TokenMap:
    """The map of a prompt of text alone."""
    from lab.spans import KINDS, ROLES

    n, none, nan = len(ids), torch.full_like(ids, -1), torch.full((len(ids),), torch.nan)
    role, kind = torch.full_like(ids, ROLES.index("text")), torch.full_like(ids, KINDS.index("text"))
    return TokenMap(
        ids, ("",) * n, role, kind, none, none, none, none, nan, torch.ones(n), torch.arange(n), none
    )


def _block_mask(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Who may see whom in a packed world, as edges of a layer."""
    return mask.to(q.device)[q[:, None], k[None, :]]


def _auxiliary(plan: Plan, resid: Tensor, side: Any) -> Tensor:
    found = [head(resid, side).get("mod.aux") for head in plan.heads]
    return sum((f for f in found if f is not None), resid.new_zeros(()))


# ---- training -------------------------------------------------------------------------------------------------------


def lessons(prompts: Prompts, seed: int) -> Lessons:
    """The questions of tiny's own last stages, mostly counting, which is what routing costs most.

    Tiny's last stages shuffle half of the counting clips, to teach it what unordered frames allow. Here nearly all keep
    their order: a clip without one says nothing about which rows must meet in which layer.
    """
    spoil = Spoil(shuffled=0.1, blank=0.03)
    drawn = TaskBatches(prompts, seed).mixed
    return partial(drawn, every=8, worlds=1, counts=12, hints=0, rough=0.6, wide=True, spoil=spoil)


def train(
    model: VideoLLM, mechanism: MixtureOfDepths, drawn: Lessons, out: str | Path, *, steps: int, peak: float = 1e-3,
    rank: int = 16, seed: int = 0, aux: float = 0.0, check: Callable[[Any], dict[str, Any]] = lambda learner: {},
    check_every: int = 200, resume: bool = False,
) -> Variant:  # fmt: skip
    """Train routers and a delta of the decoder with the mechanism on; the model is afterwards as it was.

    drawn   step number -> the batches of that step      out   folder for journal, checkpoints and OUT/variant
    check   what to measure on the way, of the `Learner`
    Raises UsageError for steps below 1.
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    routers = mechanism.routers
    if routers is None and mechanism.needs_routers:
        # equal scores would choose the first rows of every frame, and routers learn from chosen rows alone
        routers = mechanism.fresh_routers(model.sizes, start="random")
    stage = Stage("mod", drawn, ("none", 2.0), steps, peak=peak, decay=True)
    with lowrank.learning(model.lm, rank, seed=seed) as added, torch.enable_grad():
        learner = Learner(model, replace(mechanism, routers=routers), added)
        trainer = Trainer(
            learner, [stage], out, check=check, loss=partial(learn_score, aux=aux), check_every=check_every
        )
        if resume:
            trainer.resume()
        trainer.run()
        delta = lowrank.taken(added, torch.half)  # half the file; what is measured is what is stored
    about = {
        "steps": trainer.progress.step,
        "seconds": round(trainer.progress.seconds),
        "rank": rank,
        "peak": peak,
        "seed": seed,
    }
    return Variant(learner.mechanism, delta, about)


# ---- variants: what was learned, saved and put on a model -------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A base model's delta, the mechanism (with its routers) it was trained with, and how."""

    mechanism: MixtureOfDepths
    delta: lowrank.Delta
    about: dict[str, Any]

    def save(self, folder: str | Path, *, base: str) -> Path:
        """Write the folder (see `lab.model.variants`), routers.safetensors among it if there are any."""
        routers = self.mechanism.routers
        named = replace(self.mechanism, routers=None, weights=None if routers is None else ROUTERS)
        out = variants.write(
            folder, self.delta, [_plain(named)], base=base, weights=weights_hash(base), **self.about
        )
        if routers is not None:
            routers.save(out / ROUTERS)
        return out

    @staticmethod
    def load(folder: str | Path) -> Variant:
        """Read what `save` wrote. Raises ConfigError if something is missing or belongs to another base model."""
        found = variants.read(folder)
        found.check(weights_hash(found.base), folder)
        mechanism = of_plain(found.mechanisms[0])
        routers = None if mechanism.weights is None else Routers.load(mechanism.weights)
        about = {"base": found.base, "weights": found.weights, **found.about}
        return Variant(replace(mechanism, routers=routers, weights=None), found.delta, about)

    @contextmanager
    def on(self, model: VideoLLM) -> Iterator[MixtureOfDepths]:
        """The model with the delta, inside; yields the mechanism to switch on: `model(ready, mechanisms=[m])`."""
        with lowrank.applied(model.lm, self.delta):
            yield self.mechanism


def _plain(mechanism: MixtureOfDepths) -> dict[str, Any]:
    """As plain data. Raises UsageError for what json cannot hold: `ShiftedCosine` and scores."""
    found = plain(mechanism)
    try:
        json.dumps(found)
    except TypeError:
        raise UsageError("only keep ratios that are numbers can be written; give keep as a tuple") from None
    return found


# ---- measuring ------------------------------------------------------------------------------------------------------


def accuracy(model: VideoLLM, items: Sequence[VideoQA], mechanisms: Sequence[Any] = ()) -> float:
    """Share of items whose most likely option letter is the right one. Raises UsageError if there are none."""
    if not items:
        raise UsageError("no items to measure on")
    return sum(bool(model.answer(item, mechanisms=mechanisms).correct) for item in items) / len(items)


@torch.no_grad()
def batched(
    model: VideoLLM, items: Sequence[VideoQA], clips: Clips, mechanisms: Sequence[Any] = (), *, size: int = 25
) -> float:
    """The same as `accuracy` for simulated items of one task, `size` at a time. clips: theirs, at the tower's size."""
    if not items:
        raise UsageError("no items to measure on")
    prompts, right = Prompts(model.need_tokenizer()), 0
    for at in range(0, len(items), size):
        part = items[at : at + size]
        ids = torch.cat([prompts.whole(item) for item in part])
        ready = model.prepare_inputs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=to_pixels(clips[at : at + size]),
        )
        letters = prompts.word(list(LETTERS[: len(part[0].options)]))
        picks = model(ready, mechanisms=mechanisms)[:, -1, letters].argmax(-1).tolist()
        right += sum(int(p == item.answer) for p, item in zip(picks, part, strict=True))
    return right / len(items)


def report(
    model: VideoLLM, mechanisms: Sequence[Any], asked: Mapping[str, tuple[Sequence[VideoQA], Clips]]
) -> dict[str, float]:
    """Accuracy by task."""
    return {
        task: round(batched(model, items, clips, mechanisms), 4) for task, (items, clips) in asked.items()
    }


def held_out(tasks: Sequence[str], n: int, seed: int) -> dict[str, tuple[Sequence[VideoQA], Clips]]:
    """`n` items a task that training never draws, with their clips at the tower's size."""
    items = {task: draw_items(task, n, seed) for task in tasks}
    return {task: (some, shown(some)) for task, some in items.items()}


def compared(
    folders: Sequence[str | Path], tasks: Sequence[str], *, n: int, seed: int
) -> dict[str, dict[str, float]]:
    """Accuracy by task of the base model, of it with each variant's mechanism merely switched on (no training), of each
    variant, and of each variant with random and uniform choices at the same keep ratio."""
    variants_ = {
        Path(f).name: Variant.load(Path(f) / "variant" if (Path(f) / "variant").exists() else f)
        for f in folders
    }
    model = load(next(iter(variants_.values())).about["base"], device="cpu")
    measure = partial(report, model, asked=held_out(tasks, n, seed))
    rows = {"base": measure([])}
    for name, variant in variants_.items():
        m = variant.mechanism
        if not _is_plain(m):
            rows[f"{name}, not trained"] = measure([replace(m, routers=None)])
        with variant.on(model):
            rows[name] = measure([m])
            for selector in ("random", "uniform"):
                if m.selector == "learned":
                    rows[f"{name}, {selector} choice"] = measure([replace(m, selector=selector)])
    return rows


def _is_plain(m: MixtureOfDepths) -> bool:
    """Whether the mechanism routes nothing: the control of training."""
    return m.keep == 1 and m.gate == "none"


# ---- command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Train and save, or make the table of trained variants; 0, or the exit code of what went wrong."""
    args = _arguments(argv)
    torch.set_num_threads(1)
    try:
        (_make_table if args.table else _train)(args)
    except LabError as e:
        print(f"{type(e).__name__}: {e}")
        return e.exit_code
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab.learn.mod", description="Train tiny with Mixture-of-Depths on."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for journal, checkpoints and the variant"
    )
    parser.add_argument("--base", default="tiny", help="model to start from (default tiny)")
    parser.add_argument("--keep", type=float, default=0.2, help="share of video tokens kept (default 0.2)")
    parser.add_argument("--layers", default="interleaved", choices=("interleaved", "all"))
    parser.add_argument("--first", type=int, default=0, help="no layer before this one (0-based) is routed")
    parser.add_argument("--selector", default="learned", choices=("learned", "random", "uniform", "norm"))
    parser.add_argument("--gate", default="tanh1", choices=("raw", "tanh1", "softmax", "none"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--rank", type=int, default=16, help="rank of the delta")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--check", type=int, default=32, help="held-out items per task on the way")
    parser.add_argument("--items", type=int, default=200, help="held-out items per task at the end")
    parser.add_argument("--tasks", nargs="+", default=["moving_direction"], choices=sorted(TASKS))
    parser.add_argument(
        "--table", nargs="+", type=Path, help="trained folders to compare; --out is a json file then"
    )
    return parser.parse_args(argv)


def _train(args: argparse.Namespace) -> None:
    model = load(args.base, device="cpu")
    mechanism = MixtureOfDepths(
        keep=args.keep, layers=args.layers, first=args.first, seed=args.seed,
        selector=args.selector if args.keep < 1 else "uniform", gate=args.gate if args.keep < 1 else "none",
    )  # fmt: skip
    held = held_out(args.tasks, args.check, 10_000 + args.seed)

    def check(learner: Learner) -> dict[str, Any]:
        return report(model, [_frozen(learner)], held)

    variant = train(
        model, mechanism, lessons(Prompts(model.need_tokenizer()), args.seed), args.out, steps=args.steps, peak=args.peak,
        rank=args.rank, seed=args.seed, check=check, resume=args.resume,
    )  # fmt: skip
    with variant.on(model) as m:
        found = report(model, [m], held_out(args.tasks, args.items, SEED))
    variant = replace(variant, about={**variant.about, "held_out": found, "items": args.items})
    folder = variant.save(args.out / "variant", base=args.base)
    print(f"{folder}: {json.dumps(found)}")


def _frozen(learner: Learner) -> MixtureOfDepths:
    """The mechanism as it is used: no noise."""
    return replace(learner.mechanism, train_noise=0.0)


def _make_table(args: argparse.Namespace) -> None:
    rows = compared(args.table, args.tasks, n=args.items, seed=SEED)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"items": args.items, "seed": SEED, "rows": rows}, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name:32}" + "  ".join(f"{task} {value:.3f}" for task, value in row.items()))


if __name__ == "__main__":
    raise SystemExit(main())
