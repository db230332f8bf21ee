"""What `tiny` is trained on: prompts cut into parts, clips as pixels, and the batches of every stage."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lab.carriers import LETTERS, VideoGrid, VideoQA
from lab.learn import vocabulary
from lab.learn.sft import Batch, Part, pack
from lab.prompt import answer_spans, lay_out, question_spans
from lab.sim.moving import DIRECTIONS, direction, draw_scene
from lab.sim.shapes import COLOURS, SHAPES, SIDE, Scene, render
from lab.spans import Span

FRAMES, PIXELS, GRID = 8, 32, 4
VIDEO = FRAMES * GRID * GRID + 1  # and image_newline
STEMS: tuple[str, ...] = (
    "Which way does the {0} {1} move?",
    "Which way does the {1} move?",
    "Which direction does the {0} {1} move?",
    "Which way does the object move?",
    "Which way does it move?",
    "In which direction does the {1} move?",
    "Where does the {0} {1} go?",
    "In what direction is the {0} {1} moving?",
    "Which way is the {1} going?",
)
MORE_STEMS: tuple[str, ...] = (  # for the last stage; {2} is "left or right" or "up or down"
    *STEMS,
    "Does the {0} {1} move {2}?",
    "Does the {1} go left, right, up or down?",
    "Which way is the {0} {1} moving?",
    "Which way did the {0} {1} go?",
    "What is the direction of motion?",
)


# ---- prompts: the ids the model reads at inference, cut into parts ----


def spans(item: VideoQA, frames: int = FRAMES) -> list[Span]:
    """The whole prompt of one question, as the llava_onevision family lays it out."""
    side = GRID * GRID
    video = [Span("frame", kind="video", rows=(f * side, f * side + side), frame=f) for f in range(frames)]
    video.append(Span("separator", kind="video", rows=(frames * side, frames * side + 1)))
    user = [Span("template", "<|im_start|>user "), *video, Span("connector", "\n"), *question_spans(item)]
    return [*user, Span("template", "<|im_end|><|im_start|>assistant\n"), *answer_spans(item)]


class Prompts:
    """Token ids of prompts with a video of `frames` frames, through the same `lay_out` that inference uses."""

    def __init__(self, tokenizer: Any, frames: int = FRAMES) -> None:
        self.tokenizer, self.frames = tokenizer, frames
        self.ids = vocabulary.token_ids()
        self.cut = lru_cache(maxsize=None)(self._cut)

    def whole(self, item: VideoQA) -> Tensor:
        """[1, pos] ids of the whole prompt."""
        grid = VideoGrid.regular(self.frames, GRID, GRID, seconds=None, weight=4).plus_newline()
        return lay_out(spans(item, self.frames), grid, self.tokenizer, self.ids["<video>"])[0]

    def _cut(self, question: str, options: tuple[str, ...]) -> tuple[list[int], list[int], list[int]]:
        """Prompt ids as (up to the video's end, question up to its `?`, the rest)."""
        ids = self.whole(VideoQA("", question, options))[0].tolist()
        head = max(i for i, t in enumerate(ids) if t == self.ids["<video>"]) + 1
        ask = ids.index(self.ids["?"]) + 1
        return ids[:head], ids[head:ask], ids[ask:]

    def word(self, words: list[str]) -> Tensor:
        """Ids of single words, [n]."""
        return torch.tensor([self.ids[w] for w in words])


# ---- pixels ----


def shrink(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pillow's bicubic resize to the tower's size, [frame, h, w, 3] -> [frame, 32, 32, 3]."""
    size = (PIXELS, PIXELS)
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames])


def to_pixels(clips: NDArray[np.uint8]) -> Tensor:
    """uint8 [clip, frame, h, w, 3] -> float [clip, frame, 3, h, w] in -1..1."""
    return torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def roughen(rng: np.random.Generator, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What cameras and codecs do: blur, gain and tint, noise that changes from frame to frame."""
    if rng.random() < 0.3:
        side = int(rng.integers(20, 60))
        small = [Image.fromarray(f).resize((side, side), Image.Resampling.BILINEAR) for f in frames]
        frames = np.stack([np.asarray(s.resize((64, 64), Image.Resampling.BILINEAR)) for s in small])
    x = shrink(frames).astype(np.float32)
    x = (x - 128) * rng.uniform(0.8, 1.15) + 128 + rng.uniform(-20, 20) + rng.uniform(-8, 8, 3)
    if rng.random() < 0.6:
        x = x + rng.normal(0, rng.uniform(1, 10), x.shape)
    return x.clip(0, 255).round().astype(np.uint8)


def outward(rng: np.random.Generator, frames: int) -> Scene:
    """An easier scene to begin with: plain, and from the middle outwards, so that the place alone tells the direction."""
    scene = replace(draw_scene(rng, frames), grain=0)
    way, middle = direction(scene), SIDE / 2
    along = np.linspace(0, rng.uniform(14, middle - 1 - scene.radius), frames)
    along = middle + (along if way in ("right", "down") else -along)
    across = [float(middle + rng.uniform(-6, 6))] * frames
    pairs = zip(along, across, strict=True) if way in ("left", "right") else zip(across, along, strict=True)
    return replace(scene, track=tuple((float(x), float(y)) for x, y in pairs))


def relit(rng: np.random.Generator, scene: Scene) -> Scene:
    """The same scene over a grey background of any brightness."""
    level = int(rng.integers(0, 256))
    return replace(scene, ground=(level, level, level))


def axis(scene: Scene) -> str:
    """Both directions of the scene's axis, as a question names them."""
    return "left or right" if direction(scene) in ("left", "right") else "up or down"


# ---- batches ----


class Batches:
    """Draws the batches of every stage; step n of seed s is always the same batch."""

    def __init__(self, prompts: Prompts, seed: int) -> None:
        self.prompts, self.seed = prompts, seed

    def _videos(
        self, rng: np.random.Generator, n: int, easy: float, rough: float, wide: bool
    ) -> tuple[Tensor, list[Scene]]:
        scenes = [(outward if rng.random() < easy else draw_scene)(rng, FRAMES) for _ in range(n)]
        if wide:
            scenes = [s if rng.random() < 0.5 else relit(rng, s) for s in scenes]
        clips = [(roughen(rng, f) if rng.random() < rough else shrink(f)) for f in map(render, scenes)]
        return to_pixels(np.stack(clips)), scenes

    def _questions(self, rng: np.random.Generator, scenes: list[Scene], wide: bool) -> list[str]:
        stems = MORE_STEMS if wide else STEMS
        stem = STEMS[0] if rng.random() < 0.5 else stems[rng.integers(len(stems))]
        return [stem.format(s.colour, s.shape, axis(s)) for s in scenes]

    def video(
        self,
        step: int,
        *,
        worlds: int = 12,
        lists: int = 0,
        hints: int = 0,
        easy: float = 0.0,
        rough: float = 0.7,
        wide: bool = False,
    ) -> Batch:
        """Clips with the answer word at the `?`, an open answer, and `lists` option lists answered by letter.

        Before `hints` further lists the answer word is written out after the `?`. `easy`: share of clips that move
        outwards; `rough`: share with blur, tint and noise; `wide`: backgrounds of any brightness, more ways to ask,
        and the answer written to its end: `B) right<|im_end|>`.
        """
        rng = np.random.default_rng((self.seed, 1, step))
        pixels, scenes = self._videos(rng, worlds, easy, rough, wide)
        asked = self._questions(rng, scenes, wide)
        words = self.prompts.word([direction(s) for s in scenes])
        cuts = [self.prompts.cut(q, DIRECTIONS) for q in asked]
        parts = [Part(torch.tensor([c[0] for c in cuts]))]
        stem = torch.tensor([c[1] for c in cuts])
        parts.append(Part(stem, 0, (("ask", stem.shape[1] - 1, words),)))
        parts.append(self._open(asked, words))
        right = [direction(s) for s in scenes]
        for i in range(lists + hints):
            part = self._options(rng, right, hint=i >= lists)
            parts.append(self._to_the_end(part, words) if wide else part)
        return pack(parts, pixels)

    def _open(self, asked: list[str], words: Tensor) -> Part:
        cuts = [self.prompts.cut(q, ()) for q in asked]
        ids = torch.cat([torch.tensor([c[1] + c[2] for c in cuts]), words[:, None]], dim=1)
        n, stop = ids.shape[1], torch.full_like(words, self.prompts.ids["<|im_end|>"])
        return Part(
            ids, 0, (("open", len(cuts[0][1]) - 1, words), ("open", n - 2, words), ("open", n - 1, stop))
        )

    def _options(self, rng: np.random.Generator, right: list[str], *, hint: bool, parent: int = 1) -> Part:
        n = 4 if rng.random() < 0.8 else int(rng.integers(2, 4))
        orders = [self._order(rng, w, n) for w in right]
        rows = [self.prompts.cut(STEMS[0], o)[2] for o in orders]
        letters = self.prompts.word([LETTERS[o.index(w)] for o, w in zip(orders, right, strict=True)])
        ids = torch.tensor(rows)
        if hint:
            ids = torch.cat([self.prompts.word(right)[:, None], ids], dim=1)
        return Part(ids, parent, (("hint" if hint else "letter", ids.shape[1] - 1, letters),))

    def _to_the_end(self, part: Part, words: Tensor) -> Part:
        letters, n = part.targets[0][2], part.ids.shape[1]
        close, stop = (torch.full_like(words, self.prompts.ids[t]) for t in (")", "<|im_end|>"))
        ids = torch.cat([part.ids, torch.stack([letters, close, words], dim=1)], dim=1)
        return Part(
            ids,
            part.parent,
            (*part.targets, ("tail", n, close), ("tail", n + 1, words), ("tail", n + 2, stop)),
        )

    def _order(self, rng: np.random.Generator, right: str, n: int) -> tuple[str, ...]:
        others = [str(w) for w in rng.permutation([d for d in DIRECTIONS if d != right])][: n - 1]
        return tuple(str(w) for w in rng.permutation([right, *others]))

    def short(self, step: int, *, worlds: int = 32, asks: int = 8) -> Batch:
        """Text only: `A left B up C right D down`, then `? up` -> B; several questions to each list."""
        rng = np.random.default_rng((self.seed, 2, step))
        orders = [self._order(rng, DIRECTIONS[rng.integers(4)], 4) for _ in range(worlds)]
        lists = [[x for pair in zip(LETTERS, o, strict=False) for x in pair] for o in orders]
        parts = [Part(torch.stack([self.prompts.word(x) for x in lists]))]
        for _ in range(asks):
            picks = rng.integers(4, size=worlds)
            ids = torch.stack([self.prompts.word(["?", o[p]]) for o, p in zip(orders, picks, strict=True)])
            parts.append(Part(ids, 0, (("short", 1, self.prompts.word([LETTERS[p] for p in picks])),)))
        return pack(parts)

    def final(self, step: int, *, worlds: int = 8, lists: int = 8) -> Batch:
        """Text only, in the words of the real prompt, the answer word written out after the `?`."""
        rng = np.random.default_rng((self.seed, 3, step))
        colours, shapes = list(COLOURS), SHAPES
        stem = STEMS[0] if rng.random() < 0.5 else STEMS[rng.integers(len(STEMS))]
        asked = [stem.format(colours[rng.integers(4)], shapes[rng.integers(3)]) for _ in range(worlds)]
        cuts = [self.prompts.cut(q, DIRECTIONS) for q in asked]
        parts = [Part(torch.tensor([c[0][:2] + c[1] for c in cuts]))]
        for _ in range(lists):
            right = [DIRECTIONS[k] for k in rng.integers(4, size=worlds)]
            parts.append(self._options(rng, right, hint=True, parent=0))
        return pack(parts)

    def mixed(self, name: str, every: int, step: int) -> Batch:
        """A text stage with a video batch in every `every`-th step, so that the video is not forgotten."""
        return self.video(step, worlds=12) if step % every == 0 else getattr(self, name)(step)

    def letters(self, step: int) -> Batch:
        """The mix: letters on video, some with the answer word written out; every sixth step text only."""
        return self.final(step) if step % 6 == 0 else self.video(step, worlds=12, lists=5, hints=1)

    def whole(self, step: int) -> Batch:
        """The last stage: letters on video with everything a user may vary (see `wide`)."""
        return self.video(step, worlds=12, lists=5, wide=True)
