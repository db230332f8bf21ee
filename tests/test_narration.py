"""Narration: conversations from ground truth, a delta that learns LIVE's loss and comes off, a variant that is loaded."""

import json

import pytest
import torch

from lab.errors import UsageError
from lab.learn.live import Say, Watch
from lab.learn.narration import ASK, THETA, lessons, main, measured, narrated, train
from lab.mechanisms import trained_with
from lab.mechanisms.streaming import Streaming
from lab.model.zoo import load
from lab.sim.tasks import draw_items

CONFIG = Streaming(max_new_tokens=8)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", device="cpu", verify=False)


def test_events_are_told_in_the_frame_that_shows_them():
    for task in ("action_sequence", "scene_transition"):
        for item in draw_items(task, 5, 3):
            stage, script = item.state, narrated(item)
            assert script[:2] == (Watch(1, learn=0), Say("user", ASK))
            assert sum(p.frames for p in script if isinstance(p, Watch)) == len(stage)
            frame, told = -1, []
            for part in script:
                frame += part.frames if isinstance(part, Watch) else 0
                if isinstance(part, Say) and part.who == "assistant":
                    told.append((frame, part.text))
            if task == "scene_transition":
                ((at, text),) = told
                assert (
                    stage.places[at - 1] != stage.places[at]
                    and text == f"The scene becomes {stage.places[at]}."
                )
            else:
                thing = stage.things[0]
                assert [t.split()[-1].rstrip(".") for _, t in told] == [e.verb for e in stage.events]
                for at, _ in told:  # the pose has just changed
                    before, now = ((thing.track[f], thing.radius[f], thing.shown[f]) for f in (at - 1, at))
                    assert before != now
    with pytest.raises(UsageError, match="nobody narrates 'moving_direction'"):
        narrated(draw_items("moving_direction", 1, 0)[0])


def test_lessons_are_drawn_again_as_they_were():
    one, again, other = (lessons(4, 0, s) for s in (7, 7, 8))
    assert [i.id for i, _ in one] == [i.id for i, _ in again] != [i.id for i, _ in other]
    assert [i.task for i, _ in one] == ["action_sequence"] * 2 + ["scene_transition"] * 2


def test_a_delta_learns_and_comes_off(tiny, tmp_path):
    kept = {n: p.detach().clone() for n, p in tiny.hf.named_parameters()}
    delta, how = train(
        tiny, CONFIG, tmp_path, steps=20, batch=2, rank=8, check=1, peak=3e-2
    )  # 50 steps of warming up
    losses = [json.loads(line)["loss"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert how["steps"] == 20 and sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert all(torch.equal(p, kept[n]) for n, p in tiny.hf.named_parameters()) and len(delta) > 10
    _, more = train(tiny, CONFIG, tmp_path, steps=22, batch=2, rank=8, check=1, resume=True)
    assert more["steps"] == 22 and len((tmp_path / "losses.jsonl").read_text().splitlines()) == 22
    with pytest.raises(UsageError, match="steps must be at least 1"):
        train(tiny, CONFIG, tmp_path, steps=0)


def test_the_command_line_leaves_a_variant(tmp_path, capsys):
    assert (
        main(
            [
                "--out",
                str(tmp_path),
                "--steps",
                "1",
                "--batch",
                "2",
                "--check",
                "1",
                "--items",
                "1",
                "--rank",
                "2",
            ]
        )
        == 0
    )
    model = load(tmp_path / "variant", device="cpu", verify=False)
    (config,) = trained_with(model)
    assert config == Streaming(theta=THETA, max_new_tokens=20)
    said = json.loads((tmp_path / "variant/variant.json").read_text())
    with torch.no_grad():
        assert measured(model, config, 1, 777) == said["held_out"]
    assert said["tasks"] == ["action_sequence", "scene_transition"]
    capsys.readouterr()
    assert main(["--out", str(tmp_path), "--steps", "0"]) == 2 and "steps must be" in capsys.readouterr().out
