"""A trace: one forward pass of one question, with the residual stream after every layer and the rows each layer ran.

Two traces of one question are compared on the tokens they share: text stands for text, a video token for the same place
of the same frame, a merged token for the mean of those that went into it (by their shares).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lab.carriers import TokenMap, VideoGrid
from lab.model.cache import KVCache
from lab.model.ready import Ready
from lab.model.run import Run
from lab.side import Side
from lab.slots import Plan, Step
from lab.spans import KINDS, ROLES

GROUPS = ("video", "question", "option", "other text", "last")
_OF_ROLE = {"frame": 0, "question": 1, "option": 2, "last": 4, "pad": -1}


@dataclass
class _Rows:
    """Two detours in one: as the outermost it keeps the stream after every layer, as the innermost what the layer ran."""

    resid: list[tuple[Tensor, Tensor]] = field(
        default_factory=list
    )  # rows [pos, d_model], their source positions

    def __call__(self, layer: int, step: Step, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
        resid, side = step(resid, side)
        self.resid.append((resid[0].detach().float().cpu(), side.order.cpu()))
        return resid, side


@dataclass
class _Ran:
    orders: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, step: Step, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
        here = side.order if side.absent is None else side.order[~side.absent[0].to(side.order.device)]
        self.orders[layer] = here.cpu()
        return step(resid, side)


@dataclass(frozen=True)
class Trace:
    """What one run did.

    tokens    what the decoder read; grid: the video tokens before any mechanism
    resid     stream after every layer, nan where a row is gone
    ran       which positions each layer ran
    lens      log probabilities if the last position were read after each layer
    kv_bytes  keys and values as stored by the end
    """

    tokens: TokenMap
    grid: VideoGrid
    resid: Float[Tensor, "layer pos d_model"]
    ran: Bool[Tensor, "layer pos"]
    lens: Float[Tensor, "layer d_vocab"]
    kv_bytes: int

    @property
    def groups(self) -> Int[Tensor, " pos"]:
        """Index into GROUPS of every position; -1: padding."""
        return torch.tensor([_OF_ROLE.get(role, 3) for role in self.tokens.roles()])

    def painted(self, values: Float[Tensor, " pos"]) -> Float[Tensor, "frame row col"]:
        """Values of the tokens on the places of the video; 0 where nothing is left."""
        return self.tokens.painted(values, self.grid).nan_to_num(0.0)


@torch.no_grad()
def trace(model: Any, ready: Ready) -> Trace:
    """Run one prepared question (its mechanisms are in `ready.plan`)."""
    rows, ran, held = _Rows(), _Ran(), list[Any]()
    plan = Plan(detours=(rows,)) + _kept(ready.plan, held) + Plan(detours=(ran,))
    with model.plan_hooks(plan), model.lock.shared():
        door, maps = model.arrive(ready, plan)
        resid, _ = model.stream(door, Run(), plan=plan, tokens=maps)
    n, layers = len(maps[0]), model.cfg.n_layers
    stream = torch.full((layers, n, resid.shape[-1]), torch.nan)
    passed = torch.zeros(layers, n, dtype=torch.bool)
    for layer, (x, order) in enumerate(rows.resid):
        stream[layer, order] = x
        passed[layer, ran.orders.get(layer, order[:0])] = True
    return Trace(maps[0], ready.grids[0], stream, passed, _lens(model, stream[:, -1]), held[0].nbytes())


def _kept(plan: Plan, held: list[Any]) -> Plan:
    """The plan, with a cache that is noted in `held` when it is made."""
    make = plan.cache or KVCache

    def cache() -> Any:
        held.append(make())
        return held[-1]

    return Plan(
        plan.sampler, plan.encoder, plan.stages, plan.layout, plan.hooks, plan.detours, cache, plan.heads
    )


def _lens(model: Any, last: Float[Tensor, "layer d_model"]) -> Float[Tensor, "layer d_vocab"]:
    x = last[None].to(model.device, model.dtype)
    return model.unembed(model.ln_final.normalise(x))[0].double().log_softmax(-1).cpu()


# ---- tokens that two traces share -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """Tokens of a trace and what they stand for in the other: `here` positions, `share` of each of the other's."""

    here: Int[Tensor, " token"]
    share: Float[Tensor, "token pos"]

    def of(self, x: Float[Tensor, "pos d"]) -> Float[Tensor, "token d"]:
        """The other trace's rows, or means of rows, that the tokens stand for."""
        one = (self.share == 1).any(1)
        out = torch.empty(len(self.here), x.shape[1])
        out[one] = x[self.share[one].argmax(1)]
        out[~one] = self.share[~one] @ x if bool((~one).any()) else out[~one]
        return out


def shared(base: Trace, other: Trace) -> Shared:
    """The tokens of `other` that stand for tokens of `base`, a run that dropped nothing."""
    here, share = [], []
    for at, there in _text(base.tokens, other.tokens):
        here.append(at)
        share.append(torch.nn.functional.one_hot(there, len(base.tokens)).float())
    at, part = _video(base, other)
    return Shared(torch.cat([*here, at]), torch.cat([*share, part]))


def _text(base: TokenMap, other: TokenMap) -> list[tuple[Tensor, Tensor]]:
    """(positions, the base's positions) of the text, role by role, where both have the same words there."""
    out: list[tuple[Tensor, Tensor]] = []
    for code, role in enumerate(ROLES):
        if role in ("pad", "frame"):
            continue
        a, b = (((m.role == code) & (m.kind != KINDS.index("video"))).nonzero()[:, 0] for m in (base, other))
        if len(a) == len(b) and bool((base.ids[a] == other.ids[b]).all()):
            out.append((b, a))
    return out


def _video(base: Trace, other: Trace) -> tuple[Tensor, Tensor]:
    """Video tokens, and the share of each of the base's positions in them; those that hold what the base has not are out."""
    mine = other.tokens.where(kind="video")
    n = len(other.grid)
    if other.tokens.parts is None:
        shares = (other.tokens.source[mine][:, None] == torch.arange(n)).float()
    else:
        shares = other.tokens.parts[mine][:, :n].float()
    place = _places(base, other.grid)
    known = (shares[:, place >= 0].sum(1) - 1).abs() < 1e-4
    out = torch.zeros(len(mine), len(base.tokens))
    out[:, place[place >= 0]] = shares[:, place >= 0]
    return mine[known], out[known]


def _places(base: Trace, grid: VideoGrid) -> Int[Tensor, " original"]:
    """Where the base's decoder read each token of a grid of the same video; -1: nowhere."""
    at = {
        _key(base.grid, int(i)): int(p)
        for p, i in zip(
            base.tokens.where(kind="video"),
            base.tokens.source[base.tokens.where(kind="video")],
            strict=True,
        )
    }
    return torch.tensor([at.get(_key(grid, i), -1) for i in range(len(grid))], dtype=torch.long)


def _key(grid: VideoGrid, i: int) -> tuple[float, ...]:
    """A token's time (its frame where no time is known), row and column: the same place in another sampling."""
    seconds = float(grid.seconds[i])
    when = (0.0, float(grid.frame[i])) if seconds != seconds else (1.0, round(seconds, 4))
    return (*when, float(grid.row[i]), float(grid.col[i]))
