"""Simulated clips as real mp4 files. `python -m lab.sim.clips` writes the demo clips that ship with the package."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from lab.errors import VideoError
from lab.sim.moving import DIRECTIONS, draw_scene
from lab.sim.shapes import render
from lab.sim.tasks import TEMPORAL, draw_items

FOLDER = Path(__file__).parent.parent / "data" / "clips"


def write_mp4(frames: NDArray[np.uint8], path: str | Path, fps: int = 8, *, quality: int = 10) -> Path:
    """Encode uint8 [frame, height, width, 3] as H.264 (yuv420p); `quality` is x264's crf, 0 best.

    Raises VideoError for frames that yuv420p cannot hold (no frames, odd sides, not RGB bytes).
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise VideoError(f"need uint8 [frame, height, width, 3], got {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(f"H.264 with yuv420p needs even sides, got {height} x {width}; pad by one pixel")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": str(quality), "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        for picture in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return Path(path)


def demo(folder: str | Path = FOLDER, *, frames: int = 24, seed: int = 3) -> list[Path]:
    """Write left.mp4, right.mp4, up.mp4 and down.mp4, and one clip of every other temporal task, at 8 frames per second.

    Three seconds each; object_count one second, because sampling 8 of 24 frames would not keep its beat.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for i, way in enumerate(DIRECTIONS):
        scene = draw_scene(np.random.default_rng((seed, i)), frames, way=way)
        written.append(write_mp4(render(scene), Path(folder) / f"{way}.mp4"))
        print(f"{written[-1]}: a {scene.colour} {scene.shape} moves {way}")
    for task in TEMPORAL[1:]:
        item = draw_items(task, 1, seed, frames=8 if task == "object_count" else frames)[0]
        written.append(write_mp4(item.video, Path(folder) / f"{task}.mp4"))
        print(f"{written[-1]}: {item.question} {list(item.options)} {item.options[int(item.answer or 0)]}")
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo clips.")
    parser.add_argument("--out", default=str(FOLDER))
    demo(parser.parse_args().out)
