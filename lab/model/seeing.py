"""See: run the vision side to the decoder's door, or take what an earlier run of the same `ready` saw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lab.model.door import Door, capture
from lab.model.ready import Ready
from lab.model.run import Front, watched, written
from lab.model.tower import attend, attentions, frame_lengths


def see(model: Any, ready: Ready) -> Door:
    """The state at the door. When it is kept, and when not: see `VideoLLM.see`."""
    front = _front(model, ready)
    keep = (
        not _wants_graph(model, ready)
        and not model.hf.training
        and not watched(*front.after.values(), *front.before.values())
        and not any(front.shown(tower) for tower in front.towers.values())
        and not model.lock.claimed
    )
    if keep and ready.memo.get("key") == _version(model, ready):
        return _copied(ready.memo["door"])
    inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in ready.inputs.items()}
    model.tower_calls += 1
    door = capture(model.hf, front, inputs)
    if not keep:
        return door
    # transformers may have placed its capturing hooks in this very call: the key is the state after it
    hand_over(model, ready, door)
    return _copied(door)


def hand_over(model: Any, ready: Ready, door: Door) -> None:
    """Keep a door as what `see` will give for `ready`: the caller knows that it is this prompt's."""
    # the inputs are held, so that no other tensor can come to lie where they lay
    ready.memo.update(key=_version(model, ready), door=door, inputs=tuple(ready.inputs.values()))


def _front(model: Any, ready: Ready) -> Front:
    tower = model.family.tower_layers(model.hf)
    points = list(model.vision)
    after = {layer: p.hook_resid_post for layer, p in zip(tower, points, strict=True)}
    connector = model.family.connector(model.hf)
    if connector is not None:
        after[connector] = model.connector.hook_out
    before = {layer: p.hook_resid_pre for layer, p in zip(tower, points, strict=True)}
    return Front(
        after, before, towers=attentions(model), attend=attend, lengths=frame_lengths(ready.inputs),
        every=model.lock.claimed,
    )  # fmt: skip


def _modules(model: Any) -> Iterator[nn.Module]:
    """The checkpoint's modules without the decoder's layers, which lie behind the door."""
    layers, waiting = model.lm.layers, [model.hf]
    while waiting:
        module = waiting.pop()
        if module is not layers:
            yield module
            waiting += [m for m in module._modules.values() if m is not None]


def _weights(model: Any) -> list[nn.Parameter]:
    return [p for m in _modules(model) for p in m._parameters.values() if p is not None]


def _wants_graph(model: Any, ready: Ready) -> bool:
    """Whether a gradient could be asked of what lies before the door (weights loaded by `lab.load` are frozen)."""
    given = [v for v in ready.inputs.values() if isinstance(v, Tensor)]
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *_weights(model)))


def _version(model: Any, ready: Ready) -> int:
    weights = tuple((p.data_ptr(), written(p)) for p in _weights(model))
    given = tuple((k, id(v), written(v) if isinstance(v, Tensor) else 0) for k, v in ready.inputs.items())
    hooks = tuple(h for m in _modules(model) for h in (*m._forward_pre_hooks, *m._forward_hooks))
    return hash((weights, given, hooks))


def _copied(door: Door) -> Door:
    """Hooks, traces and detours may edit in place; what `ready` keeps must stay clean."""
    return Door(door.embeds.clone(), door.rope, door.pad, tuple(d.clone() for d in door.deep))
