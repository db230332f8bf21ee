"""Stages: several shapes, a changing background, a shaking camera; the exact ground truth of a simulated clip.

A `Stage` is all there is to know about a clip and `render` the only place that makes its pixels. numpy only; nothing is
random beyond the seeds a stage holds, so the same stage gives the same bytes anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.errors import UsageError
from lab.sim.shapes import COLOURS, SIDE, Box, Pixels

FPS = 8
INK = {
    **COLOURS,
    "white": (245, 245, 245),
    "purple": (150, 60, 190),
    "orange": (240, 140, 30),
    "cyan": (60, 210, 220),
}
PLACES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {  # two colours each, in stripes
    "grass": ((46, 104, 44), (60, 126, 52)),
    "sand": ((188, 160, 104), (170, 142, 90)),
    "snow": ((222, 226, 232), (204, 210, 222)),
    "water": ((34, 84, 140), (48, 104, 164)),
    "night": ((14, 14, 34), (24, 22, 50)),
}
_AT = np.arange(SIDE) + 0.5
_STRIPES = ((np.arange(SIDE) // 8) % 2).astype(bool)


@dataclass(frozen=True)
class Knobs:
    """How hard a clip is to see. The answer never depends on a knob, and a knob never depends on the answer.

    distractors  further shapes, in colours no question names, that wander about behind the others (0..4); they stand
                 still where the question is about all objects
    noise        largest deviation of the noise on every pixel, new in every frame (0..80)
    camera       largest shake of the camera, pixels per frame and axis, independent from frame to frame (0..8)
    static       share of the background that stands still; the rest flickers, independent from frame to frame (0..1)
    """

    distractors: int = 0
    noise: int = 0
    camera: int = 0
    static: float = 1.0

    def __post_init__(self) -> None:
        for name, high in (("distractors", 4), ("noise", 80), ("camera", 8), ("static", 1)):
            value = getattr(self, name)
            whole = name == "static" or isinstance(value, int)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not whole
                or not 0 <= value <= high
            ):
                kind = "a number" if name == "static" else "a whole number"
                raise UsageError(f"{name} must be {kind} from 0 to {high}, got {value!r}")

    @staticmethod
    def of(given: dict[str, Any]) -> Knobs:
        """Knobs from keyword arguments. Raises UsageError for an unknown one."""
        known = [f.name for f in fields(Knobs)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise UsageError(f"there is no knob {unknown[0]!r}; there are {', '.join(known)}")
        return Knobs(**given)


@dataclass(frozen=True)
class Thing:
    """One shape: its centre (x, y) in pixels, half its width, and whether it is there, in every frame."""

    shape: str
    colour: str
    track: tuple[tuple[float, float], ...]
    radius: tuple[float, ...]
    shown: tuple[bool, ...]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Event:
    """Something that happens: from `start` to `stop` seconds; `thing` is its index, -1 for the scene."""

    verb: str
    thing: int
    start: float
    stop: float


@dataclass(frozen=True)
class Stage:
    """Ground truth of one clip.

    things      the shapes questions are about, drawn in this order, over all distractors
    places      what the background is in every frame: a name of PLACES, or "" for the plain colour `ground`
    events      what happens, in seconds; ask: the word of the question that decides ("first", "last", or "")
    grid        side of the cells of a drawn floor grid, pixels; box: a drawn frame (left, top, right, bottom)
    calm        the question is about all objects: distractors stand still, and outside the box
    grain       largest deviation of the background's still noise; seed: of everything random in the picture
    shake       shift of the whole picture in every frame, pixels
    """

    things: tuple[Thing, ...]
    places: tuple[str, ...]
    events: tuple[Event, ...] = ()
    ask: str = ""
    ground: tuple[int, int, int] = (40, 40, 40)
    grid: int = 0
    box: Box | None = None
    calm: bool = False
    grain: int = 0
    seed: int = 0
    knobs: Knobs = Knobs()
    distractors: tuple[Thing, ...] = ()
    shake: tuple[tuple[int, int], ...] = field(default=())

    def __len__(self) -> int:
        return len(self.places)

    @property
    def seconds(self) -> tuple[float, ...]:
        """Time of every frame."""
        return tuple(t / FPS for t in range(len(self)))

    @property
    def boxes(self) -> tuple[tuple[Box | None, ...], ...]:
        """[thing][frame] bounding box in the picture, None where the thing is not there."""
        return tuple(tuple(self._box(thing, t) for t in range(len(self))) for thing in self.things)

    def _box(self, thing: Thing, t: int) -> Box | None:
        (x, y), r, (dx, dy) = thing.track[t], thing.radius[t], self.moved(t)
        return (x - r + dx, y - r + dy, x + r + dx, y + r + dy) if thing.shown[t] else None

    def moved(self, t: int) -> tuple[int, int]:
        """How far the camera's shake moves the picture of frame t, pixels."""
        return self.shake[t] if self.shake else (0, 0)

    def key(self, t: int) -> tuple[Any, ...]:
        """All that frame t shows, but for noise: two frames of one look are the same picture iff their keys agree."""
        seen = [
            (i, *thing.track[t], thing.radius[t]) for i, thing in enumerate(self.things) if thing.shown[t]
        ]
        return (self.places[t], *seen)


def still(at: tuple[float, float], frames: int) -> tuple[tuple[float, float], ...]:
    """The track of something that does not move."""
    return (at,) * frames


def render(stage: Stage) -> Pixels:
    """All frames, uint8 [frame, 64, 64, 3]."""
    grain, plain, drawn = _still_noise(stage), dict[str, NDArray[np.uint8]](), dict[Any, NDArray[np.uint8]]()
    for t, place in enumerate(stage.places):
        if place not in plain:
            plain[place] = _background(stage, place, grain)
        if (key := _picture_key(stage, t)) not in drawn:
            drawn[key] = _camera(stage, _draw(stage, plain[place], t), t)
    return np.stack([drawn[_picture_key(stage, t)] for t in range(len(stage))])


def _picture_key(stage: Stage, t: int) -> Any:
    """Frames of one key are the same picture; with a knob turned every frame is one of its own."""
    return stage.key(t) if stage.knobs == Knobs() else t


def _draw(stage: Stage, plain: NDArray[np.uint8], t: int) -> NDArray[np.uint8]:
    frame = _flicker(stage, plain, t) if stage.knobs.static < 1 else plain.copy()
    for thing in (*stage.distractors, *stage.things):
        if thing.shown[t]:
            _paint(frame, thing, t)
    return frame


def masks(stage: Stage) -> NDArray[np.bool_]:
    """Where each thing is seen, bool [thing, frame, 64, 64]: what later things hide is not."""
    out = np.zeros((len(stage.things), len(stage), SIDE, SIDE), np.bool_)
    for t in range(len(stage)):
        for i, thing in enumerate(stage.things):
            if thing.shown[t]:
                here = _inside(thing, t)
                out[:i, t] &= ~here
                out[i, t] = here
        if stage.shake:
            out[:, t] = [_shift(m, *stage.moved(t), fill=False) for m in out[:, t]]
    return out


def disturb(stage: Stage, knobs: Knobs, rng: np.random.Generator) -> Stage:
    """The stage with the knobs turned. Draws nothing of what decides the answer."""
    n = len(stage)
    far = knobs.camera
    shake = tuple((int(a), int(b)) for a, b in rng.integers(-far, far + 1, (n, 2))) if far else ()
    wander = tuple(_wanderer(rng, stage) for _ in range(knobs.distractors))
    return replace(stage, knobs=knobs, shake=shake, distractors=wander)


def _wanderer(rng: np.random.Generator, stage: Stage) -> Thing:
    n, right = len(stage), int(stage.box[0]) - 8 if stage.box else SIDE - 6
    (x0, x1), (y0, y1) = rng.integers(6, right, 2).tolist(), rng.integers(6, SIDE - 6, 2).tolist()
    if stage.calm:
        x1, y1 = x0, y0
    steps = [i / max(n - 1, 1) for i in range(n)]
    track = tuple((round(x0 + (x1 - x0) * s, 2), round(y0 + (y1 - y0) * s, 2)) for s in steps)
    colour = ("white", "purple", "orange", "cyan")[rng.integers(4)]
    shape = ("square", "circle", "triangle")[rng.integers(3)]
    return Thing(shape, colour, track, (float(rng.integers(3, 6)),) * n, (True,) * n)


def _still_noise(stage: Stage) -> NDArray[np.int64]:
    if not stage.grain:
        return np.zeros((1, 1, 1), np.int64)
    return np.random.default_rng(stage.seed).integers(-stage.grain, stage.grain + 1, (SIDE, SIDE, 3))


def _background(stage: Stage, place: str, grain: NDArray[np.int64]) -> NDArray[np.uint8]:
    ground = np.empty((SIDE, SIDE, 3), np.int64)
    ground[:] = PLACES[place][0] if place else stage.ground
    if place:
        ground[_STRIPES] = PLACES[place][1]
    ground += grain
    if stage.grid:
        ground[:: stage.grid] += 45
        ground[:, :: stage.grid] += 45
    if stage.box:
        left, top, right, bottom = (int(v) for v in stage.box)
        inner = ground[top + 2 : bottom - 2, left + 2 : right - 2].copy()
        ground[top:bottom, left:right] = 235
        ground[top + 2 : bottom - 2, left + 2 : right - 2] = inner
    return ground.clip(0, 255).astype(np.uint8)


def _flicker(stage: Stage, plain: NDArray[np.uint8], t: int) -> NDArray[np.uint8]:
    """Some 8 x 8 px cells of the background, the same in every frame, change their brightness at random."""
    cells = SIDE // 8
    restless = (
        np.random.default_rng((stage.seed, 1)).permutation(cells * cells)
        >= stage.knobs.static * cells * cells
    )
    light = np.random.default_rng((stage.seed, 2, t)).integers(-60, 61, cells * cells) * restless
    wide = light.reshape(cells, cells).repeat(8, 0).repeat(8, 1)
    return (plain.astype(np.int64) + wide[..., None]).clip(0, 255).astype(np.uint8)


def _camera(stage: Stage, frame: NDArray[np.uint8], t: int) -> NDArray[np.uint8]:
    if stage.shake:
        frame = _shift(frame, *stage.moved(t))
    if stage.knobs.noise:
        far = stage.knobs.noise
        dust = np.random.default_rng((stage.seed, 3, t)).integers(-far, far + 1, frame.shape)
        frame = (frame.astype(np.int64) + dust).clip(0, 255).astype(np.uint8)
    return frame


def _shift(picture: NDArray[Any], dx: int, dy: int, *, fill: bool = True) -> NDArray[Any]:
    """Moves a picture right by dx and down by dy; the border is repeated (fill) or empty."""
    rows, cols = np.arange(SIDE) - dy, np.arange(SIDE) - dx
    moved = picture[rows.clip(0, SIDE - 1)][:, cols.clip(0, SIDE - 1)]
    if not fill:
        moved[(rows < 0) | (rows >= SIDE)] = 0
        moved[:, (cols < 0) | (cols >= SIDE)] = 0
    return moved


def _paint(frame: NDArray[np.uint8], thing: Thing, t: int) -> None:
    frame[_inside(thing, t)] = INK[thing.colour]


def _inside(thing: Thing, t: int) -> NDArray[np.bool_]:
    (x, y), r = thing.track[t], thing.radius[t]
    dx, dy = (_AT - x)[None], (_AT - y)[:, None]
    if thing.shape == "square":
        return (abs(dx) <= r) & (abs(dy) <= r)
    if thing.shape == "circle":
        return dx * dx + dy * dy <= r * r
    return (abs(dy) <= r) & (2 * abs(dx) <= dy + r)  # triangle, tip up
