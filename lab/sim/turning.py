"""The same clip backwards: the ground truth is turned round and the answer read from it again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lab.carriers import VideoQA
from lab.sim.shapes import Scene
from lab.sim.stage import FPS, Event, Stage, Thing
from lab.sim.tasks import module_of


def backwards(item: VideoQA) -> VideoQA:
    """The item with its video and its state in reverse; the answer is recomputed, and may be the same.

    A drawn item of `lab.sim` in choice form, no knob turned.
    """
    state: Any = item.state
    if isinstance(state, Scene):
        state = replace(state, track=state.track[::-1])
        said = module_of("moving_direction").direction(state)
    else:
        state = _turned(state)
        said = module_of(item.task).answer(state)
    return replace(
        item, video=item.video[::-1].copy(), state=state, answer=item.options.index(said), twin=None
    )


def _turned(stage: Stage) -> Stage:
    things = tuple(_thing(thing) for thing in stage.things)
    # an event lies between two instants; backwards its end comes first
    end = (len(stage) - 1) / FPS
    events = tuple(Event(e.verb, e.thing, end - e.stop, end - e.start) for e in stage.events)
    return replace(stage, things=things, places=stage.places[::-1], events=events)


def _thing(thing: Thing) -> Thing:
    return replace(thing, track=thing.track[::-1], radius=thing.radius[::-1], shown=thing.shown[::-1])
