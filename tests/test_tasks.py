"""The tasks: same seed, same bytes; pixels, state and plan agree; twins flip and change little; no shortcut in text."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import lab.sim
import lab.sim.program
from lab.errors import UsageError
from lab.items import load_items
from lab.learn.vocabulary import token_ids
from lab.sim.checking import CRITICAL, agrees, check, chi_square, reread
from lab.sim.moving import stage_of
from lab.sim.perspective_relation import side
from lab.sim.show import contact_sheet
from lab.sim.show import main as show_main
from lab.sim.stage import INK, PLACES, Knobs, Stage, masks, render
from lab.sim.tasks import TASKS, module_of

OWN = [t for t in TASKS if t != "moving_direction"]  # those with a list of plans
HARD = {"distractors": 3, "noise": 12, "camera": 2, "static": 0.5}
DIGEST = "c1969aac24ee846013de76f4a012813a1483936adc897c69fb09110245c3cca9"


def test_same_seed_same_bytes() -> None:
    digest = hashlib.sha256()
    for task in OWN:
        first, again = (lab.sim.items(task, 3, 5, **HARD) for _ in range(2))
        for a, b in zip(first, again, strict=True):
            assert a == replace(b, video=a.video) and a.state == b.state and a.twin.state == b.twin.state
            assert a.video.tobytes() == b.video.tobytes() and a.video.shape == (8, 64, 64, 3)
            digest.update(a.video.tobytes() + a.twin.video.tobytes() + repr(a.options).encode())
    assert digest.hexdigest() == DIGEST, "other bytes than on the machine these were written on"


def test_one_item_does_not_depend_on_how_many_are_drawn() -> None:
    few, many = lab.sim.items("arrival_order", 2, 1), lab.sim.items("arrival_order", 5, 1)
    assert [i.state for i in few] == [i.state for i in many[:2]] and many[2].state != many[1].state


@pytest.mark.parametrize("task", TASKS)
def test_pixels_agree_and_letters_are_balanced(task: str) -> None:
    """`python -m lab.sim.checking` does this for 10,000 items."""
    v = check(task, 150, seed=11)
    assert (v.wrong, v.twins_wrong, v.twins_same) == (0, 0, 0)
    assert max(v.letters, v.options) < CRITICAL[v.n_letters - 1]
    assert 0 < v.changed < (1 if task == "scene_transition" else 0.2)


def test_chi_square_notices_a_favourite() -> None:
    assert chi_square([25, 25, 25, 25]) == 0 and chi_square([40, 20, 20, 20]) == 12
    assert chi_square([60, 20, 10, 10]) > CRITICAL[3]


@pytest.mark.parametrize("task", TASKS)
def test_the_checker_notices_a_wrong_answer(task: str) -> None:
    item = lab.sim.items(task, 1, 3)[0]
    assert agrees(item) and not agrees(replace(item, answer=(item.answer + 1) % len(item.options)))
    assert not agrees(replace(item, video=item.twin.video))


@pytest.mark.parametrize("task", OWN)
@pytest.mark.parametrize("frames", [8, 24])
def test_every_plan_answers_with_an_option_and_its_twin_with_another(task: str, frames: int) -> None:
    program, rng = module_of(task), np.random.default_rng(0)
    pairs = program.plans(frames)
    plans = [p for p, _ in pairs]
    assert abs(sum(w for _, w in pairs) - 1) < 1e-9 and len(set(plans)) == len(plans)
    look = lab.sim.program.Look()
    for plan in [plans[i] for i in rng.permutation(len(plans))[:200]]:
        stage, other = (program.build(p, look, frames) for p in (plan, program.twin(plan, rng, frames)))
        assert program.ask(stage)[0] == program.ask(other)[0] and len(stage) == frames
        assert program.answer(stage) != program.answer(other)
        assert {program.answer(stage), program.answer(other)} <= set(program.ask(stage)[1])
        assert program.twin(plan, rng, frames) in plans, "a twin is a clip that could have been drawn"


@pytest.mark.parametrize("task", OWN)
def test_the_question_alone_tells_nothing(task: str) -> None:
    """Over all plans, every option of every question is equally often right."""
    program, table = module_of(task), dict[object, Counter[str]]()
    for plan, p in program.plans(8):
        stage = program.build(plan, lab.sim.program.Look(), 8)
        row = table.setdefault(program.ask(stage), Counter())
        row[program.answer(stage)] += p
    for (_, options), row in table.items():
        assert np.allclose([row[o] for o in options], sum(row.values()) / len(options))


def test_reversal_flips_some_answers_and_not_others() -> None:
    """A clip played backwards is no twin: who moves, and where something is, may stay as it was."""
    flips = {}
    for task in OWN:
        items = lab.sim.items(task, 40, 2)
        played = [reread(replace(i, video=i.video[::-1])) for i in items]
        flips[task] = np.mean(
            [not i.options[i.answer].startswith(p) for i, p in zip(items, played, strict=True)]
        )
    assert flips["metric_distance"] == flips["perspective_relation"] == 0
    assert (
        flips["action_antonym"]
        == flips["action_sequence"]
        == flips["scene_transition"]
        == flips["arrival_order"]
        == 1
    )
    assert 0 < flips["object_count"] < 1


@pytest.mark.parametrize("task", ["action_antonym", "action_sequence", "scene_transition", "arrival_order"])
def test_twins_of_order_show_the_same_frames(task: str) -> None:
    for item in lab.sim.items(task, 20, 4):
        bags = [sorted(f.tobytes() for f in q.video) for q in (item, item.twin)]
        assert bags[0] == bags[1]


@pytest.mark.parametrize("task", TASKS)
def test_knobs_change_pixels_and_no_answer(task: str) -> None:
    for easy, hard in zip(lab.sim.items(task, 6, 8), lab.sim.items(task, 6, 8, **HARD), strict=True):
        assert (easy.question, easy.options, easy.answer) == (hard.question, hard.options, hard.answer)
        assert (easy.video != hard.video).mean() > 0.5
        assert (
            hard.state.distractors == hard.twin.state.distractors
            and hard.state.shake == hard.twin.state.shake
        )
        assert not {d.colour for d in hard.state.distractors} & {t.colour for t in hard.state.things}


def test_each_knob_does_what_it_says() -> None:
    easy = lab.sim.items("action_sequence", 1, 0)[0]
    still = lab.sim.items("action_sequence", 1, 0, static=0.75)[0]
    moving = (still.video != easy.video).any(-1).any(0)
    cells = moving.reshape(8, 8, 8, 8).any((1, 3))
    assert 10 <= cells.sum() <= 16, "a quarter of 64 cells flicker, but for those behind the shape"
    noisy = lab.sim.items("action_sequence", 1, 0, noise=9)[0].video.astype(int) - easy.video
    assert 7 <= abs(noisy).max() <= 9 and abs(noisy.mean()) < 1
    shaken = lab.sim.items("action_sequence", 1, 0, camera=3)[0]
    (x, y), (dx, dy) = shaken.state.things[0].track[0], shaken.state.shake[0]
    left, top, right, bottom = shaken.state.boxes[0][0]
    assert ((left + right) / 2, (top + bottom) / 2) == (x + dx, y + dy)
    assert (shaken.video[0][masks(shaken.state)[0, 0]] == INK[shaken.state.things[0].colour]).all()
    many = lab.sim.items("action_sequence", 1, 0, distractors=2)[0]
    assert len(many.state.distractors) == 2 and (many.video != easy.video).any()


def test_distractors_stand_still_where_all_objects_count() -> None:
    for task in TASKS:
        calm = task in ("object_count", "arrival_order")
        for item in lab.sim.items(task, 5, 3, distractors=4):
            tracks = [d.track for d in item.state.distractors]
            assert any(len(set(t)) > 1 for t in tracks) != calm
            if item.state.box:
                assert max(x for t in tracks for x, _ in t) + 5 < item.state.box[0]


def test_masks_boxes_and_events_say_where_and_when() -> None:
    for task in OWN:
        for item in lab.sim.items(task, 4, 6, camera=2):
            stage, where = item.state, masks(item.state)
            for i, thing in enumerate(stage.things):
                for t, box in enumerate(stage.boxes[i]):
                    assert (box is None) == (not thing.shown[t])
                    assert (item.video[t][where[i, t]] == INK[thing.colour]).all()
                    if not where[i, t].any():
                        continue
                    rows, cols = where[i, t].nonzero()
                    assert (
                        cols.min() >= box[0] - 1
                        and cols.max() <= box[2]
                        and rows.min() >= box[1] - 1
                        and rows.max() <= box[3]
                    )
            assert stage.events or task == "object_count"
            assert all(0 <= e.start <= e.stop <= len(stage) / 8 for e in stage.events)


def test_later_things_hide_earlier_ones() -> None:
    stage = lab.sim.items("object_count", 1, 0)[0].state
    one = stage.things[0]
    both = replace(stage, things=(one, replace(stage.things[1], track=one.track, shape=one.shape)))
    under, over = masks(both)
    assert not under.any() and over.any()


@pytest.mark.parametrize("task", TASKS)
def test_open_form_asks_the_same(task: str) -> None:
    for choice, open_ in zip(lab.sim.items(task, 3, 9), lab.sim.items(task, 3, 9, form="open"), strict=True):
        assert open_.options == () and open_.question == choice.question
        assert (
            open_.answer == choice.options[choice.answer]
            and open_.twin.answer == choice.twin.options[choice.twin.answer]
        )
        assert (open_.video == choice.video).all()


def test_a_moving_scene_is_the_same_as_a_stage() -> None:
    for item in lab.sim.items("moving_direction", 8, 2):
        assert (render(stage_of(item.state)) == item.video).all()


def test_sides_as_seen_from_p() -> None:
    """y runs downwards: looking up the picture, the picture's left is left."""
    assert side((32, 52), (32, 32), (12, 52)) == "left" and side((32, 12), (32, 32), (12, 12)) == "right"
    assert side((32, 52), (32, 32), (32, 12)) == "front" and side((32, 32), (32, 12), (32, 52)) == "behind"
    assert side((0, 0), (0, 10), (10, 10)) is None, "45 degrees is neither"


def test_every_word_is_in_the_bundled_models_vocabulary() -> None:
    known = token_ids()
    for task in TASKS:
        for item in lab.sim.items(task, 60, 1):
            for text in (item.question, *item.options):
                words = text.lower().replace("?", " ?").replace(",", " ,").split()
                assert not [w for w in words if w not in known], text


def test_items_of_a_recipe(tmp_path) -> None:
    for task in TASKS:
        made = load_items({"sim": task, "n": 2, "seed": 3})
        assert [i.id for i in made] == [i.id for i in lab.sim.items(task, 2, 3)] and made[0].task == task


@pytest.mark.parametrize(
    ("args", "kw", "said"),
    [
        (("action_antonim", 1, 0), {}, "closest: action_antonym"),
        (("action_antonym", 1, 0), {"noise": 90}, "noise must be a whole number from 0 to 80, got 90"),
        (("action_antonym", 1, 0), {"static": -1}, "static must be a number from 0 to 1"),
        (("action_antonym", 1, 0), {"distractors": 1.5}, "distractors must be a whole number"),
        (("moving_direction", 1, 0), {"blur": 1}, "no knob 'blur'"),
        (("action_antonym", 1, 0), {"frames": 7}, "even number, at least 8, got 7"),
        (("arrival_order", 1, 0), {"form": "essay"}, "'choice' or 'open'"),
        (("moving_direction", 1, 0), {"form": "essay"}, "'choice' or 'open'"),
    ],
)
def test_wrong_arguments_are_named(args: tuple, kw: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        lab.sim.items(*args, **kw)


def test_the_package_hands_out_nothing_else() -> None:
    assert lab.sim.TASKS == TASKS
    with pytest.raises(AttributeError, match="no attribute 'itmes'"):
        lab.sim.itmes  # noqa: B018


@pytest.mark.parametrize("task", TASKS)
def test_contact_sheets_can_be_drawn(task: str) -> None:
    sheet = contact_sheet(lab.sim.items(task, 1, 0)[0])
    assert sheet.width >= 760 and np.asarray(sheet).std() > 10
    with pytest.raises(UsageError, match="no twin"):
        contact_sheet(lab.sim.items(task, 1, 0)[0].twin)


def test_the_command_line_writes_a_sheet(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "sheet.png"
    command = ["show", "arrival_order", "--seed", "2", "--camera", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    show_main()
    assert out.stat().st_size > 5000 and "enters the box" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--noise", "500"])
    with pytest.raises(SystemExit):
        show_main()
    assert "noise must be a whole number from 0 to 80, got 500" in capsys.readouterr().err


def test_places_are_told_apart() -> None:
    means = [np.mean(c, axis=0) for c in PLACES.values()]
    gaps = [abs(a - b).sum() for i, a in enumerate(means) for b in means[:i]]
    assert (
        min(gaps) > 60
        and isinstance(lab.sim.items("scene_transition", 1, 0)[0].state, Stage)
        and Knobs().static == 1
    )


@pytest.mark.parametrize(("task", "n", "message"), [("nope", 1, "no task"), ("action_antonym", -1, "n=-1")])
def test_what_cannot_be_drawn_is_refused(task, n, message):
    with pytest.raises(UsageError, match=message):
        lab.sim.items(task, n, 1)
