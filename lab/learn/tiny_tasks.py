"""Batches over all five temporal tasks: what `tiny` learns once it can tell a direction and name its letter.

A step reads one small batch a task. Everything is drawn from generators seeded with the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.carriers import LETTERS
from lab.learn import vocabulary
from lab.learn.sft import Batch, Part, pack
from lab.learn.tiny_data import FRAMES, MORE_STEMS, STEMS, Prompts, axis, relit, roughen, shrink, to_pixels
from lab.sim.moving import DIRECTIONS, direction, draw_scene
from lab.sim.program import Program, draw_look, draw_plan
from lab.sim.shapes import render as render_scene
from lab.sim.stage import Stage, render
from lab.sim.tasks import TEMPORAL, module_of

Clip = NDArray[np.uint8]
ANY = "any words"  # text only: options are words of the vocabulary, so that binding is not bound to the tasks' words


@dataclass(frozen=True)
class Asked:
    """A question about one clip, its options in their own order, and the right one."""

    question: str
    options: tuple[str, ...]
    said: str
    helps: bool = False  # asked in training only: a step on the way to the task's own question

    @property
    def telling(self) -> str:
        """The first word of the answer that not all options have in its place: `grass` of `from grass to sand`."""
        columns = zip(*(o.split() for o in self.options), strict=True)
        at = next(i for i, column in enumerate(columns) if len(set(column)) > 1)
        return self.said.split()[at]


@dataclass(frozen=True)
class Spoil:
    """Shares of clips that cannot be answered: the frames in random order, or one colour. Their answers stay."""

    shuffled: float = 0.0
    blank: float = 0.0

    def __call__(self, rng: np.random.Generator, clip: Clip) -> Clip:
        draw = rng.random()
        if draw < self.shuffled:
            return clip[rng.permutation(len(clip))]
        return np.full_like(clip, rng.integers(0, 256)) if draw < self.shuffled + self.blank else clip


# ---- clips ----


def draw_clip(
    task: str, rng: np.random.Generator, stem: str, wide: bool, *, easy: float = 0.0
) -> tuple[Clip, list[Asked]]:
    """Pixels [frame, 64, 64, 3] of a random clip, and all questions of its task that can be asked about it.

    easy: share of object_count's clips in which the same shapes move in both halves
    """
    if task == "moving_direction":
        scene = draw_scene(rng, FRAMES)
        scene = relit(rng, scene) if wide and rng.random() < 0.5 else scene
        asked = Asked(stem.format(scene.colour, scene.shape, axis(scene)), DIRECTIONS, direction(scene))
        return render_scene(scene), [asked]
    program = cast(Program, module_of(task))
    plan = draw_plan(program, rng, FRAMES)
    counting = task == "object_count"
    plan = (plan[0], *plan[:1], *plan[2:]) if counting and rng.random() < easy else plan
    stage = program.build(plan, draw_look(rng), FRAMES)
    asked = [_asked(program, s) for s in _both(stage)]
    return render(stage), asked + (_who_moves(rng, stage) if counting else [])


def _who_moves(rng: np.random.Generator, stage: Stage) -> list[Asked]:
    """One shape for each half: does it move? Counts alone were still at chance after 600 steps."""
    half = len(stage) // 2
    parts = {"beginning": slice(0, half), "end": slice(half, None)}
    out: list[Asked] = []
    for when, part in parts.items():
        thing = stage.things[rng.integers(len(stage.things))]
        said = "yes" if len(set(thing.track[part])) > 1 else "no"
        out.append(Asked(f"Does the {thing.name} move at the {when}?", ("yes", "no"), said, helps=True))
    return out


def _both(stage: Stage) -> list[Stage]:
    """The stage with either word of its question: `first` and `last`."""
    return [replace(stage, ask=w) for w in ("first", "last")] if stage.ask in ("first", "last") else [stage]


def _asked(program: Program, stage: Stage) -> Asked:
    question, options = program.ask(stage)
    return Asked(question, tuple(options), program.answer(stage))


# ---- batches ----

Draw = Callable[..., tuple[Clip, list[Asked]]]  # (task, rng, stem, wide, **how)


class TaskBatches:
    """Draws the batches of the five-task stages; step n of seed s is always the same."""

    def __init__(
        self, prompts: Prompts, seed: int, tasks: Sequence[str] = TEMPORAL, draw: Draw | None = None
    ) -> None:
        self.prompts, self.seed, self.tasks, self.draw = prompts, seed, tuple(tasks), draw or draw_clip

    def video(
        self,
        step: int,
        *,
        worlds: int = 3,
        lists: int = 2,
        hints: int = 1,
        rough: float = 0.5,
        wide: bool = False,
        spoil: Spoil | None = None,
        spoil_counts: Spoil | None = None,
        counts: int | None = None,
        **how: Any,
    ) -> list[Batch]:
        """One batch a task: answer word at the `?`, open answer, `lists` option lists answered by letter.

        Before `hints` further lists the answer is written out after the `?`. rough, wide: see `tiny_data.Batches`;
        counts, spoil_counts: of object_count, where they are not those of the other tasks; how: handed to `draw`.
        """
        rng = np.random.default_rng((self.seed, 5, step))
        made: list[Batch] = []
        for task in self.tasks:
            stems = MORE_STEMS if wide else STEMS
            stem = STEMS[0] if rng.random() < 0.5 else stems[rng.integers(len(stems))]
            n = counts if counts and task == "object_count" else worlds
            drawn = [self.draw(task, rng, stem, wide, **how) for _ in range(n)]
            clips = [roughen(rng, c) if rng.random() < rough else shrink(c) for c, _ in drawn]
            damage = spoil_counts if spoil_counts and task == "object_count" else spoil
            clips = [damage(rng, c) for c in clips] if damage else clips
            questions = list(zip(*(asked for _, asked in drawn), strict=True))
            parts = self._parts(rng, questions, lists, hints, wide)
            made.append(replace(pack(parts, to_pixels(np.stack(clips))), name=task))
        return made

    def _parts(
        self, rng: np.random.Generator, questions: list[tuple[Asked, ...]], lists: int, hints: int, wide: bool
    ) -> list[Part]:
        first = [self.prompts.cut(a.question, a.options)[0] for a in questions[0]]
        parts = [Part(torch.tensor(first))]
        for column in questions:
            stem = torch.tensor([self.prompts.cut(a.question, a.options)[1] for a in column])
            words = self.prompts.word([a.telling for a in column])
            parts.append(Part(stem, 0, (("ask", stem.shape[1] - 1, words),)))
            asked = len(parts) - 1
            n, more = (min(lists, 1), 0) if column[0].helps else (lists, hints)
            parts += [self._listed(rng, column, asked, i >= n, wide) for i in range(n + more)]
        own = [column for column in questions if not column[0].helps]
        return [*parts, self._open(own[rng.integers(len(own))])]

    def _open(self, column: Sequence[Asked]) -> Part:
        """The question without options and the whole answer."""
        cuts = [self.prompts.cut(a.question, ()) for a in column]
        said = self._words([a.said for a in column])
        ids = torch.cat([torch.tensor([c[1] + c[2] for c in cuts]), said], dim=1)
        stop = torch.full((len(cuts),), self.prompts.ids["<|im_end|>"])
        n, first = said.shape[1], ids.shape[1] - said.shape[1] - 1
        targets = [("open", first + i, said[:, i]) for i in range(n)]
        return Part(ids, 0, (*targets, ("open", first + n, stop)))

    def _words(self, said: Sequence[str]) -> Tensor:
        """[world, word] ids of answers of equally many words."""
        return torch.tensor([[self.prompts.ids[w] for w in s.split()] for s in said])

    def _listed(
        self, rng: np.random.Generator, column: Sequence[Asked], parent: int, hint: bool, to_end: bool
    ) -> Part:
        """A shuffled option list up to the letter; `to_end`: and on to the end, `B) right<|im_end|>`."""
        total = len(column[0].options)
        n = total if rng.random() < 0.8 else int(rng.integers(2, total + 1))
        orders = [_shuffled(rng, a, n) for a in column]
        ids = torch.tensor([self.prompts.cut(column[0].question, o)[2] for o in orders])
        letters = [LETTERS[o.index(a.said)] for o, a in zip(orders, column, strict=True)]
        said, chosen = self._words([a.said for a in column]), self.prompts.word(letters)
        ids = torch.cat([said, ids], dim=1) if hint else ids
        part = Part(ids, parent, (("hint" if hint else "letter", ids.shape[1] - 1, chosen),))
        return self._to_the_end(part, said) if to_end else part

    def _to_the_end(self, part: Part, said: Tensor) -> Part:
        letters, n = part.targets[0][2], part.ids.shape[1]
        close, stop = (torch.full_like(letters, self.prompts.ids[t]) for t in (")", "<|im_end|>"))
        tail = torch.cat([letters[:, None], close[:, None], said, stop[:, None]], dim=1)
        targets = [("tail", n + i, tail[:, i + 1]) for i in range(tail.shape[1] - 1)]
        return replace(part, ids=torch.cat([part.ids, tail[:, :-1]], 1), targets=(*part.targets, *targets))

    def text(self, step: int, *, worlds: int = 8, lists: int = 6) -> list[Batch]:
        """Text only: the answer written out after the `?`, several option lists, one kind of question a step."""
        rng = np.random.default_rng((self.seed, 6, step))
        task = (*self.tasks, ANY, ANY)[rng.integers(len(self.tasks) + 2)]
        n, names = int(rng.integers(2, 5)), rng.random() < 0.3
        asked = [self._text_asked(task, rng, n, names) for _ in range(worlds)]
        cuts = [self.prompts.cut(a.question, a.options) for a in asked]
        parts = [Part(torch.tensor([c[0][:2] + c[1] for c in cuts]))]
        for _ in range(lists):
            again = [replace(a, said=str(rng.choice(a.options))) for a in asked]
            parts.append(self._listed(rng, again, 0, True, False))
        return [pack(parts)]

    def short(self, step: int, *, worlds: int = 32, asks: int = 8) -> list[Batch]:
        """Text only: `A hat B red C up D door`, then `? red` -> B; any words, several questions to each list."""
        rng = np.random.default_rng((self.seed, 7, step))
        lists = [_text_any(rng, 4, False).options for _ in range(worlds)]
        rows = [[x for pair in zip(LETTERS, o, strict=False) for x in pair] for o in lists]
        parts = [Part(torch.stack([self.prompts.word(r) for r in rows]))]
        for _ in range(asks):
            picks = rng.integers(4, size=worlds)
            ids = torch.stack([self.prompts.word(["?", o[p]]) for o, p in zip(lists, picks, strict=True)])
            parts.append(Part(ids, 0, (("short", 1, self.prompts.word([LETTERS[p] for p in picks])),)))
        return [pack(parts)]

    def _text_asked(self, task: str, rng: np.random.Generator, n: int, names: bool) -> Asked:
        return _text_any(rng, n, names) if task == ANY else self.draw(task, rng, STEMS[0], False)[1][0]

    def mixed(self, step: int, *, every: int = 4, **kw: Any) -> list[Batch]:
        """`video`, and in every `every`-th step `text`."""
        return self.text(step) if step % every == 0 else self.video(step, **kw)


def _shuffled(rng: np.random.Generator, asked: Asked, n: int) -> tuple[str, ...]:
    """The right option and n - 1 of the others."""
    others = [str(o) for o in rng.permutation([o for o in asked.options if o != asked.said])]
    return tuple(str(o) for o in rng.permutation([asked.said, *others[: n - 1]]))


def _text_any(rng: np.random.Generator, n: int, names: bool) -> Asked:
    """`n` different options from the vocabulary: words, or names like `red square`."""
    draw = _name if names else _word
    options: list[str] = []
    while len(options) < n:
        word = draw(rng)
        options += [word] if word not in options else []
    return Asked("Which object do you see?", tuple(options), "")


def _name(rng: np.random.Generator) -> str:
    from lab.sim.shapes import COLOURS, SHAPES

    return f"{list(COLOURS)[rng.integers(4)]} {SHAPES[rng.integers(len(SHAPES))]}"


def _word(rng: np.random.Generator) -> str:
    return vocabulary.WORDS[rng.integers(len(vocabulary.WORDS))]
