"""Inside the vision tower: what its patches would say, and what happens when they cannot see each other.

    tower_lens(model, items, words=["left"])           the tower left after each layer: what the video tokens say then
    tower_knockout(model, items, ["between-patches"])  edges between patches cut, layer by layer: change of the answer

The tower is left early by letting every later layer hand on what the layer in question made; the rest of the way (last
norm, pooling, connector, the decoder's norm and head) is the checkpoint's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.edges.sweeping import UNIT, layers_of
from lab.errors import LabWarning, UsageError
from lab.model.tower import TowerMap, tower_map
from lab.result import Result
from lab.runs import progress
from lab.slots import plan_of
from probes.asking import Asked, Case, asked
from probes.lens import ANSWER, UNITS, Measure, _measured, grid_shared, on_grid, word_id
from probes.streams import layers_asked
from probes.unembedding import reading, said_by

NEG = float("-inf")
PATHWAYS = ("between-patches", "between-frames", "within-frame:N", "beyond:N", "none")
Cut = Callable[[TowerMap], Tensor]  # -> bool [frame, q patch, k patch], True where an edge is cut


# ---- lens by patch --------------------------------------------------------------------------------------------------


def tower_lens(
    model: Any, items: Any, *, words: Sequence[str | int] | str = ANSWER, measure: Measure = "p",
    layers: Sequence[int] | None = None, n_frames: int = 8, mechanisms: Sequence[Any] = (), policy: Any = None,
    show_progress: bool = True,
) -> Result:  # fmt: skip
    """The logit lens on video tokens as they enter the decoder, had the tower ended after each of its layers.

    words, measure  as in `probes.lens.lens`; layers: of the tower, 1-based. A policy cuts edges of the decoder only, so
    it plays no part here but for the word "answer".

    Returns a Result with axes (item, word, layer, frame, row, col). Models that read the tower before its last layer
    say the same from that layer on. Raises UsageError for a model without a tower.
    """
    spoken = (words,) if isinstance(words, str | int) else tuple(words)
    n = len(model.vision)
    if not n:
        raise UsageError("this model has no vision tower")
    chosen = layers_asked(n, layers)
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    size = grid_shared(who)
    found = [
        _tower_read(who, c, spoken, measure, chosen)
        for c in progress(who.cases, desc="tower lens", show=show_progress)
    ]
    grid = {a: list(range(k)) for a, k in zip(("frame", "row", "col"), size, strict=True)}
    return Result(
        values=np.stack(found), axes=("item", "word", "layer", "frame", "row", "col"),
        coords={"item": who.keys, "word": [str(w) for w in spoken] if measure != "entropy" else ["entropy"], "layer": [i + 1 for i in chosen], **grid},
        unit=UNITS[measure], recipe={}, name="logit lens in the vision tower", notes={"ledger": who.ledger(0)},
    )  # fmt: skip


@torch.no_grad()
def _tower_read(who: Asked, case: Case, words: Sequence[Any], measure: str, layers: Sequence[int]) -> Any:
    ids = [] if measure == "entropy" else [word_id(who, case, w) for w in words]
    at, logits = case.at("video"), reading(who.model, "normed")
    rows: list[Tensor] = []
    for layer in layers:
        said = said_by(logits, 0, _leaving(who.model, case, layer)[at], ids, 0, who.model.cfg.d_vocab)
        rows.append(_measured(said, measure))
    return on_grid(case.tokens, at, torch.stack(rows, 1))


def _leaving(model: Any, case: Case, layer: int) -> Tensor:
    """What enters the decoder, [pos, d_model], if the tower's later layers only hand on what `layer` (0-based) made."""
    held: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        held[:] = [value]

    def hand_on(value: Tensor, hook: Any) -> Tensor:
        return held[0]

    later = [(f"vision.{i}.hook_resid_post", hand_on) for i in range(layer + 1, len(model.vision))]
    plan = case.ready.plan + plan_of(case.mechanisms, model.sizes)
    hooks = [(f"vision.{layer}.hook_resid_post", keep), *later]
    with model.plan_hooks(plan), model.hooks(fwd_hooks=hooks), model.lock.shared():
        door, _ = model.arrive(case.ready, plan)
    return door.embeds[0]


# ---- knock-out ------------------------------------------------------------------------------------------------------


def tower_knockout(
    model: Any, items: Any, pathways: Sequence[str | Cut] = ("between-patches",), *, window: int = 1,
    layers: Sequence[int] | None = None, n_frames: int = 8, policy: Any = None, mechanisms: Sequence[Any] = (),
    show_progress: bool = True,
) -> Result:  # fmt: skip
    """Cut attention between patches inside the tower, in a window of its layers, and watch the answer move.

    pathways  "between-patches": a patch sees itself alone (and class tokens); "beyond:N": patches more than N rows or
              columns apart; "within-frame:N": patches of frame N (tubelet, 0-based) only; "between-frames", where the
              tower mixes frames; "none"; or a function from a `TowerMap` to a mask [frame, q, k]
    window    number of tower layers cut together, clipped at the ends

    Returns a Result with axes (item, pathway, layer): change of the probability of the token the run answers, in
    percent; layers of the tower, 1-based. Raises UsageError for pathways that cut nothing in this tower.
    """
    if window < 1:
        raise UsageError(f"window must be at least 1 layer, got {window}")
    names = [pathways] if isinstance(pathways, str) or callable(pathways) else list(pathways)
    if not names or not len(model.vision):
        raise UsageError(f"nothing to do: {len(names)} pathways, {len(model.vision)} tower layers")
    chosen = layers_asked(len(model.vision), layers)
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    cuts = [(name, _cut(name)) for name in names]
    values = [
        [_curve(who, case, cut, chosen, window, name) for name, cut in cuts]
        for case in progress(who.cases, desc="tower knock-out", show=show_progress)
    ]
    values = np.array(values)
    for i, (name, _) in enumerate(cuts):
        if name != "none" and not np.abs(values[:, i]).max() > 0:
            warnings.warn(
                f"cutting {name!r} in the tower changed nothing in any window of any item",
                LabWarning,
                stacklevel=2,
            )
    n = len(who.cases) * (len(cuts) * len(chosen) + 1)
    return Result(
        values=values, axes=("item", "pathway", "layer"),
        coords={"item": who.keys, "pathway": [_said(name) for name, _ in cuts], "layer": [i + 1 for i in chosen]},
        unit=UNIT, recipe={}, name="knock-out in the vision tower", baseline=0.0, notes={"window": window, "ledger": who.ledger(n)},
    )  # fmt: skip


def _said(name: Any) -> str:
    return name if isinstance(name, str) else getattr(name, "__name__", "cut")


def _cut(name: str | Cut) -> Cut:
    """The mask of a pathway. Raises UsageError for an unknown one."""
    if callable(name):
        return name
    kind, _, number = name.partition(":")
    if kind in ("within-frame", "beyond") and number.isdecimal():
        return _within_frame(int(number)) if kind == "within-frame" else _beyond(int(number))
    match name:
        case "none":
            return lambda m: torch.zeros(*m.frame.shape, m.frame.shape[1], dtype=torch.bool)
        case "between-patches":
            return lambda m: _both(m) & ~torch.eye(m.frame.shape[1], dtype=torch.bool)
        case "between-frames":
            return lambda m: _both(m) & (m.frame[:, :, None] != m.frame[:, None])
        case _:
            raise UsageError(
                f"no pathway {name!r} inside a tower; there are {', '.join(PATHWAYS)}, and functions of a TowerMap"
            )


def _both(m: TowerMap) -> Tensor:
    """Edges between two patches: class tokens are none."""
    patch = m.row >= 0
    return patch[:, :, None] & patch[:, None]


def _within_frame(number: int) -> Cut:
    def cut(m: TowerMap) -> Tensor:
        here = m.frame == number
        return here[:, :, None] & here[:, None] & ~torch.eye(m.frame.shape[1], dtype=torch.bool)

    return cut


def _beyond(number: int) -> Cut:
    def cut(m: TowerMap) -> Tensor:
        apart = [(x[:, :, None] - x[:, None]).abs() for x in (m.row, m.col)]
        return _both(m) & (torch.maximum(*apart) > number) & (m.frame[:, :, None] == m.frame[:, None])

    return cut


@torch.no_grad()
def _curve(who: Asked, case: Case, cut: Cut, layers: Sequence[int], window: int, name: Any) -> list[float]:
    model, how = who.model, {"policy": who.policy, "mechanisms": case.mechanisms}
    clean = model(case.ready, **how)[0, -1].float().softmax(-1)
    token, places, touched = int(clean.argmax()), tower_map(model, case.ready), 0

    def edit(scores: Tensor, hook: Any) -> Tensor:
        nonlocal touched
        mask = _mask(cut, places, scores)
        touched += int((mask[:, None] & (scores > NEG)).sum())
        return scores.masked_fill(mask[:, None], NEG)

    out: list[float] = []
    for layer in layers:
        inside = layers_of(layer, window, len(model.vision))
        with model.hooks(fwd_hooks=[(f"vision.{i}.attn.hook_attn_scores", edit) for i in inside]):
            p = model(case.ready, **how)[0, -1].float().softmax(-1)
        out.append(float((p[token] - clean[token]) * 100 / clean[token]))
    if not touched and name != "none":
        raise UsageError(
            f"{_said(name)!r} cuts no edge of this tower{': its frames never see each other' if name == 'between-frames' else ''}"
        )
    return out


def _mask(cut: Cut, places: TowerMap, scores: Tensor) -> Tensor:
    """The cut [frame, q, k] as the layer has its frames: one entry for all of them where they see each other."""
    if scores.shape[0] == 1 and places.frame.shape[0] > 1:
        places = TowerMap(*(x.reshape(1, -1) for x in (places.frame, places.row, places.col)))
    mask = torch.as_tensor(cut(places))
    if mask.dtype != torch.bool or mask.ndim != 3 or any(a not in (1, b) for a, b in zip(mask.shape, (scores.shape[0], *scores.shape[2:]), strict=True)):  # fmt: skip
        raise UsageError(
            f"a cut of this tower is a bool mask {(scores.shape[0], *scores.shape[2:])} (frame, q, k), got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask.to(scores.device)
