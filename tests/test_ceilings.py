"""Ceilings: counted over all plans; compared with rendered pixels, with every strategy there is, and with drawn items."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

import lab.sim
from lab.sim.ceilings import best, ceilings_of, counted
from lab.sim.program import Look
from lab.sim.stage import Stage, Thing, render
from lab.sim.tasks import TASKS, module_of

OWN = [t for t in TASKS if t != "moving_direction"]
KNOWN = {  # blank, random frame, bag: what the construction of each task says; None: no simple argument
    "action_antonym": (1 / 2, 1 / 2, 1 / 2),
    "action_sequence": (1 / 2, 1 / 2, 1 / 2),
    "object_count": (
        1 / 4,
        1 / 4,
        1 / 4 + 3 / 4 / 2,
    ),  # both halves alike in a quarter of the clips, else a coin
    "scene_transition": (1 / 2, 1 / 2, 1 / 2),
    "metric_distance": (1 / 4, None, 1),
    "perspective_relation": (1 / 4, None, 1),
    "arrival_order": (1 / 3, 1 / 3, 1 / 3),
}


@pytest.mark.parametrize("task", OWN)
@pytest.mark.parametrize("frames", [8, 12])
def test_the_numbers_that_the_construction_gives(task: str, frames: int) -> None:
    c = ceilings_of(task, frames=frames)
    for got, want in zip((c.blank, c.frame, c.bag), KNOWN[task], strict=True):
        assert want is None or got == pytest.approx(want, abs=1e-9)
    assert (
        c.blank <= c.frame + 1e-9
        and c.frame <= max(c.frames) + 1e-9
        and c.error == 0
        and len(c.frames) == frames
    )


def _rendered(task: str, n: int) -> list[tuple[object, str, float, list[bytes]]]:
    """Question, answer, probability and the pixels of every frame, for n plans (or all)."""
    program, out = module_of(task), []
    pairs = program.plans(8)
    for i in np.random.default_rng(0).permutation(len(pairs))[:n]:
        plan, p = pairs[i]
        stage = program.build(plan, Look(grain=6, seed=4), 8)
        out.append((program.ask(stage), program.answer(stage), p, [f.tobytes() for f in render(stage)]))
    return out


@pytest.mark.parametrize("task", [t for t in OWN if t != "perspective_relation"])
def test_the_same_numbers_from_rendered_pixels(task: str) -> None:
    cases = _rendered(task, 2000)
    c = ceilings_of(task)
    pixels = Counter[str]()
    by_seen = {name: defaultdict(Counter) for name in ("frame", "bag")}
    for asked, said, p, frames in cases:
        by_seen["bag"][asked, tuple(sorted(frames))][said] += p
        for f in frames:
            by_seen["frame"][asked, f][said] += p / 8
    for name, table in by_seen.items():
        pixels[name] = sum(max(row.values()) for row in table.values())
    assert pixels["frame"] == pytest.approx(c.frame) and pixels["bag"] == pytest.approx(c.bag)


@pytest.mark.parametrize("task", OWN)
def test_keys_agree_where_pixels_agree(task: str) -> None:
    program, key_of, pixels_of = module_of(task), {}, {}
    pairs = program.plans(8)
    for i in np.random.default_rng(1).permutation(len(pairs))[:60]:
        stage = program.build(pairs[i][0], Look(), 8)
        for t, picture in enumerate(render(stage)):
            assert key_of.setdefault(picture.tobytes(), stage.key(t)) == stage.key(t)
            assert pixels_of.setdefault(stage.key(t), picture.tobytes()) == picture.tobytes()
    assert len(key_of) > 3


def _strategies(seen: list, said: list, weight: list) -> float:
    """The best of all ways to answer, by trying every one."""
    views, answers = sorted(set(seen)), sorted(set(said))
    return max(
        sum(w for s, a, w in zip(seen, said, weight, strict=True) if a == choice[views.index(s)])
        for choice in product(answers, repeat=len(views))
    )


def test_best_is_the_best_of_all_strategies() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        seen, said = rng.integers(4, size=9).tolist(), rng.integers(3, size=9).tolist()
        weight = rng.random(9).tolist()
        assert best(zip(seen, said, weight, strict=True)) == pytest.approx(_strategies(seen, said, weight))


def _toy(tracks: dict[str, list[int]]) -> SimpleNamespace:
    """A task of one shape on given tracks, all equally likely, each with an answer of its own."""

    def build(plan, look, frames):
        at = tuple((float(x), 0.0) for x in tracks[plan])
        return Stage(
            (Thing("circle", "red", at, (3.0,) * frames, (True,) * frames),), ("",) * frames, ask=plan
        )

    return SimpleNamespace(
        TASK="toy", plans=lambda frames: [(name, 1 / len(tracks)) for name in tracks], build=build,
        ask=lambda stage: ("?", tuple(tracks)), answer=lambda stage: stage.ask,
    )  # fmt: skip


def test_a_small_task_by_hand() -> None:
    """Up 1 2 3, down 3 2 1, and a hop 1 3 2: one bag; order up to reversal tells the hop from the others."""
    toy = _toy({"up": [1, 2, 3], "down": [3, 2, 1], "hop": [1, 3, 2]})
    c, chain = counted(toy, 3), counted(toy, 3, up_to_reversal=True)  # type: ignore[arg-type]
    assert (c.blank, c.bag, chain.bag) == pytest.approx((1 / 3, 1 / 3, 2 / 3))
    assert c.frame == pytest.approx(1 / 3)
    assert c.frames == pytest.approx((2 / 3, 2 / 3, 1))


def test_wandering_distractors_give_the_order_away_but_not_its_direction() -> None:
    for task in ("action_antonym", "action_sequence", "scene_transition"):
        assert ceilings_of(task, distractors=2).bag == pytest.approx(1 / 2)
    for task in ("arrival_order", "object_count"):  # there they stand still
        assert ceilings_of(task, distractors=2) == ceilings_of(task)


def test_moving_direction_against_a_classifier_on_drawn_items() -> None:
    c = ceilings_of("moving_direction")
    assert (c.blank, c.bag) == (0.25, 0.5) and 0.25 < c.frame < 0.35 and 0 < c.error < 0.02
    assert c.frames == pytest.approx(c.frames[::-1], abs=2 * c.error), (
        "as much at the end as at the beginning"
    )
    items = lab.sim.items("moving_direction", 400, 77)
    first = [np.array(i.state.track[0]) - 32 for i in items]  # a simple rule: away from the nearer border
    rule = [
        ("right" if x < 0 else "left") if abs(x) > abs(y) else ("down" if y < 0 else "up") for x, y in first
    ]
    rate = np.mean([i.options[i.answer] == r for i, r in zip(items, rule, strict=True)])
    assert 0.5 < rate <= c.frames[0] + c.error + 3 * 0.5 / 20


def test_bags_of_moving_direction_leave_a_coin() -> None:
    """The reversed clip is as likely as the clip: same frames, opposite answer."""
    from lab.sim.moving import draw_scene, twin_scene

    for seed in range(20):
        for way, back in (("right", "left"), ("down", "up")):
            one, other = (draw_scene(np.random.default_rng(seed), 8, way=w) for w in (way, back))
            assert one == twin_scene(other)
