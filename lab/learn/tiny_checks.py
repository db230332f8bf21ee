"""What the bundled model can and cannot do: held-out numbers and controls."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.carriers import VideoQA
from lab.learn.tiny_data import FRAMES, Prompts, relit, shrink, to_pixels
from lab.learn.tiny_tasks import Asked
from lab.sim.clips import write_mp4
from lab.sim.moving import items
from lab.sim.shapes import render
from lab.sim.tasks import TEMPORAL, draw_items
from lab.video import read

Clips = NDArray[np.uint8]  # [item, frame, height, width, 3]


@torch.no_grad()
def answers(hf: Any, prompts: Prompts, asked: Sequence[VideoQA], clips: Clips) -> tuple[Tensor, Tensor]:
    """Most likely token over the whole vocabulary at the last position and at the `?`, [item] each."""
    letters: list[Tensor] = []
    words: list[Tensor] = []
    for i in range(0, len(asked), 32):
        ids = torch.cat([prompts.whole(item) for item in asked[i : i + 32]])
        logits = hf(input_ids=ids, pixel_values_videos=to_pixels(clips[i : i + 32]), use_cache=False).logits
        at = (ids == prompts.ids["?"]).int().argmax(1)
        letters.append(logits[:, -1].argmax(-1))
        words.append(logits[torch.arange(len(ids)), at].argmax(-1))
    return torch.cat(letters), torch.cat(words)


def right(hf: Any, prompts: Prompts, asked: Sequence[VideoQA], clips: Clips) -> dict[str, float]:
    """Share of right letters (`letter`) and of right words at the `?` (`ask`)."""
    letters, words = answers(hf, prompts, asked, clips)
    want = prompts.word([item.letter or "" for item in asked])
    named = prompts.word([Asked("", i.options, i.options[int(i.answer or 0)]).telling for i in asked])
    return {"letter": (letters == want).float().mean().item(), "ask": (words == named).float().mean().item()}


def held_out(prompts: Prompts, n: int, seed: int) -> Callable[[Any], dict[str, Any]]:
    """A check for the trainer: `right` by task, on `n` clips of each that training never draws."""
    return check_on(prompts, {task: draw_items(task, n, seed) for task in TEMPORAL})


def check_on(prompts: Prompts, asked: Mapping[str, Sequence[VideoQA]]) -> Callable[[Any], dict[str, Any]]:
    """A check for the trainer: `right` by task on these items."""
    clips = {task: np.stack([shrink(item.video) for item in drawn]) for task, drawn in asked.items()}

    def check(hf: Any) -> dict[str, Any]:
        found = {task: right(hf, prompts, drawn, clips[task]) for task, drawn in asked.items()}
        return {task: {k: round(v, 4) for k, v in numbers.items()} for task, numbers in found.items()}

    return check


def through_mp4(item: VideoQA, folder: str | Path) -> NDArray[np.uint8]:
    """The item's clip written as mp4, read back, sampled uniformly to 8 frames, shrunk: [8, 32, 32, 3]."""
    path = write_mp4(item.video, Path(folder) / "clip.mp4")
    frames = read(str(path), n_frames=FRAMES).pixels
    return shrink(frames.permute(0, 2, 3, 1).numpy())


def full_report(hf: Any, prompts: Prompts, *, n: int = 200, seed: int = 777) -> dict[str, float]:
    """All numbers for `training.json`: accuracies on clean and decoded clips, and three
    controls.

    any_ground_letter        backgrounds of any brightness, outside what the simulator draws
    reversed_letter_of_twin  same clip backwards: share that now gives the opposite direction's letter
    shuffled_letter          frames in random order; 0.5 is what the motion's axis alone allows
    blank_letter             one grey for all pixels; chance is 0.25
    """
    asked, long = items(n, seed), items(n, seed, frames=24)
    twins = [item.twin for item in asked if item.twin is not None]
    clips = np.stack([shrink(item.video) for item in asked])
    rng = np.random.default_rng(seed)
    relit_clips = np.stack([shrink(render(relit(rng, item.state))) for item in asked])
    mixed = np.stack([clip[rng.permutation(FRAMES)] for clip in clips])
    with tempfile.TemporaryDirectory() as folder:
        decoded = np.stack([through_mp4(item, folder) for item in long])
    clean, coded = right(hf, prompts, asked, clips), right(hf, prompts, long, decoded)
    return {
        "clips": n,
        "ask": clean["ask"],
        "letter": clean["letter"],
        "mp4_ask": coded["ask"],
        "mp4_letter": coded["letter"],
        "any_ground_letter": right(hf, prompts, asked, relit_clips)["letter"],
        "reversed_letter_of_twin": right(hf, prompts, twins, clips[:, ::-1].copy())["letter"],
        "shuffled_letter": right(hf, prompts, asked, mixed)["letter"],
        "blank_letter": right(hf, prompts, asked, np.full_like(clips, 128))["letter"],
    }
