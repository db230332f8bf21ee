"""The simulator: same seed, same bytes; the answer follows from the state; the twin flips it; clips are real mp4."""

import hashlib

import av
import numpy as np
import pytest

from lab.errors import VideoError
from lab.sim.clips import demo, write_mp4
from lab.sim.moving import DIRECTIONS, direction, draw_scene, items, twin_scene
from lab.sim.shapes import COLOURS, SHAPES, Scene, render
from lab.sim.tasks import TASKS
from lab.video import read

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def test_same_seed_same_bytes() -> None:
    first, second = items(6, seed=5), items(6, seed=5)
    for a, b in zip(first, second, strict=True):
        assert (a.state, a.options, a.answer, a.id) == (b.state, b.options, b.answer, b.id)
        assert a.video.tobytes() == b.video.tobytes()
        assert a.video.dtype == np.uint8 and a.video.shape == (8, 64, 64, 3)
    assert items(1, seed=6)[0].state != first[0].state


def test_bytes_are_those_of_other_machines() -> None:
    digest = hashlib.sha256(b"".join(item.video.tobytes() for item in items(6, seed=5))).hexdigest()
    assert digest == "5f245df4a190d4f28c7261cfaf35a64853d621af45d9cd91efa40e5f1bdd7c4d"


def test_answer_follows_from_state_and_twin_flips_it() -> None:
    for item in items(40, seed=1):
        assert item.twin is not None and sorted(item.options) == sorted(DIRECTIONS)
        said, other = item.options[item.answer], item.twin.options[item.twin.answer]
        assert said == direction(item.state) and other == OPPOSITE[said]
        assert item.twin.state == twin_scene(item.state)
        assert item.twin.options == item.options
        assert (item.twin.video == item.video[::-1]).all()


def test_every_answer_and_letter_comes_up() -> None:
    many = items(120, seed=2)
    assert {item.options[item.answer] for item in many} == set(DIRECTIONS)
    assert {item.letter for item in many} == set("ABCD")


def test_single_frames_do_not_tell_the_direction() -> None:
    """The set of places is drawn before the direction: left and right of one seed walk the same track."""
    left, right = (draw_scene(np.random.default_rng(3), 8, way=way) for way in ("left", "right"))
    assert left == twin_scene(right)


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_is_drawn_inside_its_box(shape: str) -> None:
    scene = Scene(shape, "red", 8.0, ((20.0, 30.0),))
    picture, ((x0, y0, x1, y1),) = render(scene)[0], scene.boxes
    rows, cols = (picture == COLOURS["red"]).all(-1).nonzero()
    assert (x0, y0) == (12.0, 22.0)
    assert cols.min() >= x0 and cols.max() < x1 and rows.min() >= y0 and rows.max() < y1
    assert len(rows) > 100


def test_mp4_round_trip(tmp_path) -> None:
    item = items(1, seed=4, frames=24)[0]
    frames = read(str(write_mp4(item.video, tmp_path / "clip.mp4", fps=8)), n_frames=24)
    decoded = frames.pixels.permute(0, 2, 3, 1).numpy().astype(int)
    assert decoded.shape == item.video.shape
    assert abs(decoded - item.video).mean() < 4
    assert frames.fps == pytest.approx(8) and frames.duration == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((0, 64, 64, 3), "uint8"), ((4, 63, 64, 3), "uint8"), ((4, 64, 64, 3), "float32")]
)
def test_frames_that_cannot_be_encoded(tmp_path, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(VideoError, match="need"):
        write_mp4(np.zeros(shape, dtype), tmp_path / "clip.mp4")


def test_demo_clips(tmp_path) -> None:
    paths = demo(tmp_path, frames=8)
    assert [p.stem for p in paths] == [*DIRECTIONS, *TASKS[1:5]]
    with av.open(str(paths[0])) as file:
        assert file.streams.video[0].codec_context.name == "h264"
