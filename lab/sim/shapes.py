"""Scenes with one coloured shape over a still background, and how to draw them. numpy only, byte-reproducible.

A `Scene` is the ground truth; `render` is the only place that makes pixels. No file is read and nothing is random
beyond the scene's own background seed, so the same scene gives the same bytes anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # [frame, height, width, 3], RGB
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

SIDE = 64  # height and width of every frame, pixels
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
}
SHAPES: tuple[str, ...] = ("square", "circle", "triangle")


@dataclass(frozen=True)
class Scene:
    """One shape on a track over a still background.

    track   centre (x, y) of the shape in every frame, pixels, y downwards
    radius  half the shape's width, pixels
    ground  background colour; grain: largest deviation of its still noise, 0: plain; seed: of the noise
    """

    shape: str
    colour: str
    radius: float
    track: tuple[tuple[float, float], ...]
    ground: tuple[int, int, int] = (40, 40, 40)
    grain: int = 0
    seed: int = 0

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The shape's bounding box in every frame."""
        r = self.radius
        return tuple((x - r, y - r, x + r, y + r) for x, y in self.track)


def render(scene: Scene) -> Pixels:
    """All frames of a scene, uint8 [frame, 64, 64, 3]."""
    still = _background(scene)
    frames = np.repeat(still[None], len(scene.track), axis=0)
    for frame, (x, y) in zip(frames, scene.track, strict=True):
        frame[_inside(scene.shape, x, y, scene.radius)] = COLOURS[scene.colour]
    return frames


def _background(scene: Scene) -> NDArray[np.uint8]:
    still = np.empty((SIDE, SIDE, 3), np.int64)
    still[:] = scene.ground
    if scene.grain:
        # integers, not normals: a Gaussian goes through log and cos, which differ in the last bit between libraries
        noise = np.random.default_rng(scene.seed).integers(-scene.grain, scene.grain + 1, (SIDE, SIDE, 3))
        still += noise
    return still.clip(0, 255).astype(np.uint8)


def _inside(shape: str, x: float, y: float, r: float) -> NDArray[np.bool_]:
    rows, cols = np.mgrid[:SIDE, :SIDE]
    dx, dy = cols + 0.5 - x, rows + 0.5 - y
    if shape == "square":
        return (abs(dx) <= r) & (abs(dy) <= r)
    if shape == "circle":
        return dx * dx + dy * dy <= r * r
    return (abs(dy) <= r) & (2 * abs(dx) <= dy + r)  # triangle, tip up
