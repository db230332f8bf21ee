"""Mixture-of-Depths on video tokens: VideoLLM-MoD (arXiv 2408.16730, NeurIPS 2024), and its open relatives p-MoD
(arXiv 2412.04449) and gamma-MoD (arXiv 2410.13859).

1 in some layers a linear router scores every video token   2 in every frame the share `keep` with the highest scores
goes through the layer, attention and MLP   3 the others take the identity path and leave no key and no value there
4 what the layer adds to a chosen token is multiplied by a function of its score: that is how routers learn
5 text always passes.

No code of VideoLLM-MoD was released and its gate and the parity of its layers are not stated where we could read them;
what is not known is a field below. Reads: `out = model.run(ready, mechanisms=[m])`, then `out.heads["mod.keep"]` etc.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.carriers import TokenMap
from lab.errors import LabWarning, RunError, UsageError
from lab.model.attention import with_edges
from lab.model.masks import keep_rows
from lab.routing import (
    Budget,
    Routed,
    Routers,
    Scope,
    budget,
    ends_of_groups,
    group_sizes,
    groups_of,
    scrambled,
    stride,
    top,
)
from lab.settings import check_names, check_number, check_whole
from lab.side import Side
from lab.slots import ModelSizes, Plan, Step

Layers = Literal["interleaved", "all"]
Parity = Literal["odd", "even"]
Selector = Literal["learned", "random", "uniform", "attention", "norm", "oracle"]
ScoreOn = Literal["resid", "ln"]
Gate = Literal["raw", "tanh1", "softmax", "none"]
GateSite = Literal["block_delta", "block_out", "mlp_only"]
Rounding = Literal["round", "floor"]
Positions = Literal["preserve", "compact"]
Compat = Literal["paper", "released"]
TOP = 1e9  # no setting is larger


@dataclass(frozen=True)
class ShiftedCosine:
    """p-MoD's keep ratios: cos(pi * layer / (n_layers - 1)) / 2 + mean, at least `least`; above `dense` a layer stays
    whole. (The released code writes 31 for n_layers - 1: the same for its 32 layers.)"""

    mean: float = 0.5
    least: float = 0.15
    dense: float = 0.85

    def ratios(self, n_layers: int) -> list[float | None]:
        """One keep ratio a layer, None where the layer is not routed."""
        raw = [math.cos(math.pi * i / max(1, n_layers - 1)) / 2 + self.mean for i in range(n_layers)]
        return [None if r > self.dense else max(r, self.least) for r in raw]


@dataclass(frozen=True)
class MixtureOfDepths:
    """VideoLLM-MoD, arXiv 2408.16730, section 3: most video tokens skip some layers.

    keep       share of video tokens that go through a routed layer; or one share a layer (None: not routed), or a
               `ShiftedCosine`: then `layers`, `parity` and `first` do not count. 0 is EarlyExit and LayerSkip
    layers     routed layers: "interleaved" (every other one), "all", or 0-based numbers
    parity     which of the interleaved: "odd" keeps layer 1 (blocks.0) whole (the paper does not say)
    first      no layer before this one is routed; "half": the deeper half only (the paper's "Deep")
    scope      "frame": tokens compete within their frame, nothing of the future is used; "sequence": with all frames
    routed     "vision", or "prefix": all up to the last video token (gamma-MoD's released code)
    least, rounding  a group keeps max(least, round(keep * tokens)); p-MoD rounds down
    threshold  keep what scores above this number, in units of the gate, in place of a share (gamma-MoD's inference)
    selector   "learned"; "random" (seeded), "uniform" (evenly spaced), "norm" (largest residual), "attention" (most
               attended in the layer below, by the queries of its own group), "oracle" (`scores`, see `oracle_scores`)
    score_on   what routers read: the residual stream, or its RMS-normed form "ln" (the norm's gain is in the weights)
    gate       "tanh1": 1 + tanh_scale * tanh(score), exactly 1 for zero routers (p-MoD's, safe on trained models);
               "raw": the score itself (the paper's, as far as known: noise unless trained); "softmax" over two logits
               (gamma-MoD's); "none"
    gate_site  what is multiplied: "block_delta" all that the layer adds, "block_out" the stream after it, "mlp_only"
    scale_skipped  skipped tokens too are multiplied by their gate (p-MoD): then skipping is not the identity
    force_keep_last, force_keep_cls  the last (first) token of every frame is always chosen; the budget stays
    positions  rope ids in routed layers: "preserve" the original ones, "compact" 0, 1, ... (gamma-MoD's released code)
    train_noise  standard deviation of noise on learned scores while `routers` are in training mode
    routers    trained `lab.routing.Routers`; None: untrained ones, drawn from `seed`
    weights    file of routers, read if `routers` is None
    scores     layer -> [pos] for "oracle"
    compat     "paper". "released" is refused: there is no released code (see `p_mod`, `gamma_mod`)

    Raises UsageError for values that make no sense. Layers are 0-based here, as hook names are.
    """

    keep: float | tuple[float | None, ...] | ShiftedCosine = 0.2
    layers: Layers | tuple[int, ...] = "interleaved"
    parity: Parity = "odd"
    first: int | Literal["half"] = 0
    scope: Scope = "frame"
    routed: Routed = "vision"
    least: int = 0
    rounding: Rounding = "round"
    threshold: float | None = None
    selector: Selector = "learned"
    score_on: ScoreOn = "resid"
    gate: Gate = "tanh1"
    gate_site: GateSite = "block_delta"
    scale_skipped: bool = False
    tanh_scale: float = 0.2
    force_keep_last: bool = False
    force_keep_cls: bool = False
    positions: Positions = "preserve"
    train_noise: float = 0.0
    router_bias: bool = False
    seed: int = 0
    weights: str | None = None
    compat: Compat = "paper"
    routers: Routers | None = field(default=None, compare=False, repr=False)
    scores: Mapping[int, Tensor] | None = field(default=None, compare=False, repr=False)

    NEUTRAL: ClassVar[MixtureOfDepths]
    EXAMPLE: ClassVar[MixtureOfDepths]

    def __post_init__(self) -> None:
        _check_names(self)
        _check_numbers(self)
        if self.compat == "released":
            raise UsageError(
                "no code of VideoLLM-MoD was released, so there is nothing to be compatible with; use compat='paper', "
                "or the open relatives MixtureOfDepths.p_mod() and MixtureOfDepths.gamma_mod()"
            )
        if self.routed == "prefix" and self.scope == "frame":
            raise UsageError("routed='prefix' routes text too, which has no frame; use scope='sequence'")
        if (self.selector == "oracle") != (self.scores is not None):
            raise UsageError(
                "selector='oracle' and scores= go together; make them with oracle_scores(model, ready)"
            )
        if self.threshold is not None and self.selector != "learned":
            raise UsageError(f"threshold= compares gates of learned scores, not selector={self.selector!r}")

    # ---- presets ------------------------------------------------------------------------------------------------------

    @classmethod
    def early_exit(cls, first: int) -> MixtureOfDepths:
        """No video token enters a layer from `first` (0-based) on: the paper's EarlyExit baseline."""
        return cls(keep=0.0, layers="all", first=first, selector="uniform", gate="none")

    @classmethod
    def layer_skip(cls) -> MixtureOfDepths:
        """No video token enters every other layer: the paper's LayerSkip baseline."""
        return cls(keep=0.0, selector="uniform", gate="none")

    @classmethod
    def p_mod(cls, *, compat: Compat = "released", routers: Routers | None = None) -> MixtureOfDepths:
        """p-MoD (arXiv 2412.04449): ratios fall with depth, all video tokens compete, tanh gate, skipped ones reweighted.

        compat  "paper": the gate multiplies all that the layer adds; "released": what the MLP adds
        """
        return cls(
            keep=ShiftedCosine(), scope="sequence", rounding="floor", gate="tanh1", scale_skipped=True, routers=routers,
            gate_site="mlp_only" if compat == "released" else "block_delta",
        )  # fmt: skip

    @classmethod
    def gamma_mod(
        cls, layers: Sequence[int], *, compat: Compat = "released", routers: Routers | None = None
    ) -> MixtureOfDepths:
        """gamma-MoD (arXiv 2410.13859): half of the tokens of chosen layers, softmax gate on the MLP, normed scores.

        layers  those the method's attention-rank measure picks (not computed here), 0-based
        compat  "released": everything up to the last video token competes, with positions counted anew (the training
                code); "paper": video tokens only, positions kept
        Left out: inference by threshold (`threshold=0.005` does it for the prompt; decoded tokens always pass here).
        """
        made = cls(
            keep=0.5, layers=tuple(layers), scope="sequence", score_on="ln", gate="softmax", gate_site="mlp_only",
            routers=routers,
        )  # fmt: skip
        return replace(made, routed="prefix", positions="compact") if compat == "released" else made

    # ---- what it asks for -----------------------------------------------------------------------------------------------

    def ratios(self, n_layers: int) -> list[float | None]:
        """Keep ratio of every layer, None where it is not routed. Raises UsageError for layers the model has not."""
        if isinstance(self.keep, ShiftedCosine):
            return self.keep.ratios(n_layers)
        if isinstance(self.keep, tuple):
            if len(self.keep) != n_layers:
                raise UsageError(
                    f"keep has {len(self.keep)} ratios, the model {n_layers} layers; give one a layer"
                )
            return list(self.keep)
        chosen = self._chosen(n_layers)
        return [self.keep if i in chosen else None for i in range(n_layers)]

    def _chosen(self, n_layers: int) -> set[int]:
        first = n_layers // 2 if self.first == "half" else self.first
        match self.layers:
            case "interleaved":
                chosen = set(range(int(self.parity == "odd"), n_layers, 2))
            case "all":
                chosen = set(range(n_layers))
            case tuple() as named:
                chosen = set(named)
        beyond = sorted(i for i in {*chosen, first} if not 0 <= i < n_layers)
        if beyond:
            raise UsageError(
                f"no layer {beyond[0] + 1} (blocks.{beyond[0]}): the model has layers 1..{n_layers}"
            )
        return {i for i in chosen if i >= first}

    def rows(self, tokens: TokenMap, n_layers: int) -> list[int]:
        """How many rows of the prompt go through each layer (and leave a key there): what the paper's counts predict."""
        if self.threshold is not None:
            raise UsageError("how many rows pass a threshold is not known before the run; read 'mod.keep'")
        group = groups_of(tokens, self.scope, self.routed)
        counts, free = group_sizes(group), int((group < 0).sum())
        return [
            len(tokens) if r is None else free + sum(self.budget(r)(c) for c in counts)
            for r in self.ratios(n_layers)
        ]

    def budget(self, ratio: float) -> Budget:
        """How many tokens of a group stay."""
        return budget(ratio, self.least, self.rounding)

    @property
    def needs_routers(self) -> bool:
        """Whether a linear score is used at all."""
        return self.selector == "learned" or self.gate != "none"

    def fresh_routers(self, cfg: ModelSizes, *, start: Literal["random", "zero"] = "zero") -> Routers:
        """Untrained routers of the right shape: "zero" to train from (gate tanh1 is 1), "random" directions."""
        routed = [i for i, r in enumerate(self.ratios(cfg.n_layers)) if r is not None]
        outputs = 2 if self.gate == "softmax" else 1
        return Routers(
            routed, cfg.d_model, outputs=outputs, bias=self.router_bias, start=start, seed=self.seed
        )

    def control(self, seed: int = 0) -> MixtureOfDepths:
        """As many tokens in the same layers, but chosen at random. Raises UsageError for a threshold, which has no budget."""
        if self.threshold is not None:
            raise UsageError(
                "threshold= keeps as many as score high, so no random choice has its budget; give keep="
            )
        return replace(self, selector="random", scores=None, seed=seed)

    def plan(self, cfg: ModelSizes) -> Plan:
        """A Detour that routes, and a Head that says what was decided. Raises UsageError for what does not fit the model."""
        ratios = self.ratios(cfg.n_layers)
        if self.selector == "attention" and ratios and ratios[0] is not None:
            raise UsageError(
                "selector='attention' looks at the layer below, and layer 1 (blocks.0) has none; use first=1"
            )
        routers = self.routers
        if routers is None and self.needs_routers:
            read = None if self.weights is None else _read_routers(self.weights)
            routers = read or self.fresh_routers(cfg, start="random")
        routing = Routing(self, ratios, routers)
        return Plan(detours=(routing,), heads=(Decisions(routing),))


def _check_names(m: MixtureOfDepths) -> None:
    named: dict[str, Any] = {
        "scope": Scope, "routed": Routed, "rounding": Rounding, "selector": Selector, "score_on": ScoreOn, "gate": Gate,
        "gate_site": GateSite, "positions": Positions, "parity": Parity, "compat": Compat,
    }  # fmt: skip
    check_names(m, named)
    if m.layers not in get_args(Layers):
        if isinstance(m.layers, str) or not isinstance(m.layers, Iterable):
            raise UsageError(
                f"layers={m.layers!r}; use one of {', '.join(get_args(Layers))}, or several 0-based numbers"
            )
        for i in m.layers:
            check_whole("a layer", i)
        object.__setattr__(m, "layers", tuple(int(i) for i in m.layers))
    if m.first != "half":
        check_whole("first ('half' or a 0-based layer)", m.first)


def _check_numbers(m: MixtureOfDepths) -> None:
    if isinstance(m.keep, list):
        object.__setattr__(m, "keep", tuple(m.keep))
    ratios = () if isinstance(m.keep, ShiftedCosine) else m.keep if isinstance(m.keep, tuple) else (m.keep,)
    for r in ratios:
        if r is None and isinstance(m.keep, tuple):
            continue
        if isinstance(r, bool) or not isinstance(r, Real) or not 0 <= float(r) <= 1:  # nan is refused too
            raise UsageError(f"keep={r!r}: a share of tokens lies in 0..1")
    check_whole("least", m.least, 0)
    check_whole("seed", m.seed)
    check_number("train_noise", m.train_noise, 0)
    check_number("tanh_scale", m.tanh_scale, -TOP, TOP)
    if m.threshold is not None:
        check_number("threshold", m.threshold, -TOP, TOP)


@lru_cache(maxsize=8)
def _read_routers(path: str) -> Routers:
    return Routers.load(path)


# ---- the run ------------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What one run has decided so far, and what it must remember between pieces.

    group     group of the rows of the maps seen last, [world, pos]
    received  attention every token received when last seen, [world, source pos]
    held      rows each routed layer holds, [world] (for compact positions)
    log       (layer, source positions, keep, score, gate, logits) of every choice
    ties      groups whose border was a tie
    pieces    pieces of the prompt that held tokens to choose from; reached: the last of their source positions
    began     source position of the first row this run saw
    """

    tokens: tuple[TokenMap, ...] | None = None
    group: Tensor | None = None
    received: Tensor | None = None
    held: dict[int, Tensor] = field(default_factory=dict)
    log: list[tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    ties: int = 0
    pieces: int = 0
    reached: int = -1
    began: int | None = None


class Routing:
    """The Detour: in routed layers only the chosen rows take the step."""

    def __init__(self, what: MixtureOfDepths, ratios: list[float | None], routers: Routers | None) -> None:
        self.what, self.ratios, self.routers = what, ratios, routers

    def state(self, side: Side) -> _State:
        """This mechanism's memory of the run."""
        return side.run.notes.setdefault(self, _State())

    def __call__(self, layer: int, step: Step, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
        """Raises RunError for a step that changes the number of rows, and where compact positions cannot be counted."""
        if layer == 0:  # a new pass writes into a copy: a run that is copied keeps what it knew
            held = self.state(side)
            side.run.notes[self] = replace(held, held=dict(held.held), log=list(held.log))
        state = self.state(side)
        state.began = int(side.order[0]) if state.began is None else state.began
        self._watch(layer, state, side)
        ratio = self.ratios[layer] if layer < len(self.ratios) else None
        if ratio is None:
            return step(resid, side)
        group = self._groups(state, side)
        if group is None:  # no row competes: text, or decoded rows, which have no map
            keep = torch.ones(len(resid), resid.shape[1], dtype=torch.bool, device=resid.device)
            return step(resid, self._placed(layer, state, side, keep))[0], side
        logits, score, gate = self._scores(layer, resid, side, group)
        gate = torch.where(group >= 0, gate, 1.0)
        keep = self._keep(state, score, gate, group, ratio)
        state.log.append((layer, side.order, keep, score.masked_fill(group < 0, math.nan), gate, logits))
        return self._routed(layer, state, step, resid, side, keep, gate, group), side

    def _groups(self, state: _State, side: Side) -> Tensor | None:
        """[world, pos] on the stream's device; None if no row is in any group."""
        if side.tokens and state.tokens is not side.tokens:
            found = [groups_of(t, self.what.scope, self.what.routed) for t in side.tokens]
            group = torch.stack(found).to(side.order.device)
            rows = side.order[(group >= 0).any(0)]
            state.tokens, state.group = side.tokens, group if len(rows) else None
            if len(rows):
                self._count_pieces(state, int(rows[0]), int(rows[-1]))
        return state.group if side.tokens else None

    def _count_pieces(self, state: _State, first: int, last: int) -> None:
        """Warns that sequence-wide choices differ between a whole prompt and its pieces."""
        state.pieces += first > state.reached
        state.reached = max(state.reached, last)
        if state.pieces == 2 and self.what.scope == "sequence":
            warnings.warn(
                "scope='sequence' chooses among the tokens that run together, and this prompt runs in pieces: the choice "
                "is not that of the whole prompt; use scope='frame'",
                LabWarning,
                stacklevel=2,
            )

    # ---- scores -------------------------------------------------------------------------------------------------------

    def _scores(
        self, layer: int, resid: Tensor, side: Side, group: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Router logits or None, what rows are ranked by, and the gate; the last two [world, pos]."""
        logits = None
        if self.routers is not None and self.what.needs_routers:
            x = resid if self.what.score_on == "resid" else F.rms_norm(resid.float(), resid.shape[-1:])
            logits = self.routers(layer, x)
        gate = self._gate(logits, resid)
        if self.what.selector == "learned":
            assert logits is not None
            rank = logits[..., -1] - logits[..., 0] if logits.shape[-1] == 2 else logits[..., 0]
            if self.routers is not None and self.routers.training and self.what.train_noise:
                rank = rank + self.what.train_noise * torch.randn_like(rank)
        else:
            rank = torch.stack([self._rank(layer, w, resid, side, group) for w in range(len(resid))])
        return logits, rank.detach(), gate

    def _gate(self, logits: Tensor | None, resid: Tensor) -> Tensor:
        match self.what.gate:
            case "none":
                return torch.ones(resid.shape[:2], device=resid.device)
            case "softmax":
                assert logits is not None
                if logits.shape[-1] != 2:
                    raise UsageError(
                        f"gate='softmax' needs routers with 2 outputs, these have {logits.shape[-1]}"
                    )
                return logits.softmax(-1)[..., 1]
            case "tanh1":
                assert logits is not None
                return 1 + self.what.tanh_scale * logits[..., 0].tanh()
            case "raw":
                assert logits is not None
                return logits[..., 0]

    def _rank(self, layer: int, world: int, resid: Tensor, side: Side, group: Tensor) -> Tensor:
        """Scores [pos] that nobody learned, for one world."""
        ratio = self.ratios[layer]
        assert ratio is not None
        match self.what.selector:
            case "random":
                source = side.tokens[world].source
                ids = torch.where(source >= 0, source, side.order.cpu()).to(resid.device)
                return scrambled(ids, self.what.seed, layer)
            case "uniform":
                return stride(group[world], self.what.budget(ratio))
            case "norm":
                return resid[world].detach().float().norm(dim=-1)
            case "attention":
                received = self.state(side).received
                if received is None:
                    raise RunError(
                        f"nothing was attended below layer {layer + 1} (blocks.{layer}); is it softmax attention?"
                    )
                return received[world, side.order]
            case _:
                return self._given(layer, side).to(resid.device)

    def _given(self, layer: int, side: Side) -> Tensor:
        given = (self.what.scores or {}).get(layer)
        last = int(side.order.max())
        if given is None or given.ndim != 1 or len(given) <= last:
            what = "nothing" if given is None else f"shape {tuple(given.shape)}"
            raise UsageError(
                f"scores of layer {layer + 1} (blocks.{layer}): {what}; need one number for each of {last + 1} positions"
            )
        return given[side.order.to(given.device)].detach().float()

    def _watch(self, layer: int, state: _State, side: Side) -> None:
        """For selector "attention": see what the tokens of this layer receive, if the next one chooses by it."""
        if self.what.selector != "attention":
            return
        side.run.sinks.pop(self, None)
        group = self._groups(state, side)
        above = layer + 1 < len(self.ratios) and self.ratios[layer + 1] is not None
        if above and group is not None:
            side.run.sinks[self] = _Received(state, group, side.order)

    # ---- choosing and routing ---------------------------------------------------------------------------------------------

    def _keep(self, state: _State, score: Tensor, gate: Tensor, group: Tensor, ratio: float) -> Tensor:
        """[world, pos] True for rows that go through."""
        if self.what.threshold is not None:
            return (gate.detach() > self.what.threshold) | (group < 0)
        kept: list[Tensor] = []
        for one, g in zip(self._forced(score, group), group, strict=True):
            keep, ties = top(one, g, self.what.budget(ratio))
            state.ties += ties
            kept.append(keep)
        return torch.stack(kept)

    def _forced(self, score: Tensor, group: Tensor) -> Tensor:
        for wanted, first in ((self.what.force_keep_last, False), (self.what.force_keep_cls, True)):
            if wanted:
                ends = torch.stack([ends_of_groups(g, first=first) for g in group])
                score = score.masked_fill(ends, math.inf)
        return score

    def _routed(
        self, layer: int, state: _State, step: Step, resid: Tensor, side: Side, keep: Tensor, gate: Tensor, group: Tensor
    ) -> Tensor:  # fmt: skip
        """The stream after the layer."""
        what = self.what
        if what.gate == "none" and bool(keep.all()):
            return step(resid, self._placed(layer, state, side, keep))[0]
        gate = gate.to(resid.dtype)[..., None]
        out = torch.where((group >= 0)[..., None], gate * resid, resid) if what.scale_skipped else resid
        rows = keep.any(0).nonzero().squeeze(1)
        if not len(rows):
            return out
        part, factor, inside = keep[:, rows, None], gate[:, rows], resid[:, rows]
        sub = self._placed(layer, state, side.only(rows), keep[:, rows])
        if what.gate_site == "mlp_only" and what.gate != "none":
            sub = replace(sub, mlp_gain=factor)
        new = self._stepped(step, inside, sub)
        if what.gate != "none":
            new = self._gated(inside, new, factor, (group[:, rows] >= 0)[..., None])
        return out.index_copy(1, rows, torch.where(part, new, out[:, rows]))

    def _stepped(self, step: Step, inside: Tensor, sub: Side) -> Tensor:
        new, _ = step(inside, sub)
        if new.shape != inside.shape:
            raise RunError(
                f"a detour inside mixture-of-depths made {new.shape[1]} rows of {inside.shape[1]}: what shortens the stream "
                "must come before it in `mechanisms`"
            )
        return new

    def _gated(self, inside: Tensor, new: Tensor, factor: Tensor, routed: Tensor) -> Tensor:
        match self.what.gate_site:
            case "mlp_only":
                return new
            case "block_out":
                return torch.where(routed, factor * new, new)
            case "block_delta":
                return torch.where(routed, inside + factor * (new - inside), new)

    def _placed(self, layer: int, state: _State, side: Side, keep: Tensor) -> Side:
        """The side of the rows that go through: who is absent in which world, and rope ids."""
        if not bool(keep.all()):
            side = replace(side, absent=~keep)
        return side if self.what.positions == "preserve" else self._compact(layer, state, side, keep)

    def _compact(self, layer: int, state: _State, side: Side, keep: Tensor) -> Side:
        if side.rope.ndim != 2:
            raise RunError(
                "positions='compact' counts 1-D positions, this model's rope has axes; use 'preserve'"
            )
        real = keep if side.pad is None else keep & side.pad.to(keep.device)[:, side.order]
        if state.began and side.cache is not None:
            raise RunError(
                "positions='compact' cannot go on from a cache that another run filled; use 'preserve'"
            )
        held = state.held.get(layer, torch.zeros(len(keep), dtype=torch.long, device=keep.device))
        state.held[layer] = held + real.sum(1)
        at = (held[:, None] + real.long().cumsum(1) - 1).clamp(min=0)
        return replace(side, rope=at.to(side.rope))


class _Received:
    """A sink: the mean attention every token gets from those queries of its own group that may read it."""

    BLOCK = 256  # queries whose scores exist at once

    def __init__(self, state: _State, group: Tensor, order: Tensor) -> None:
        self.state, self.group, self.order = state, group, order

    @torch.no_grad()
    def __call__(self, call: Any, query: Tensor, key: Tensor, k_order: Tensor, kw: Mapping[str, Any]) -> None:
        # the layer may run fewer rows than there are, the last ones among those it leaves out
        n = int(max(k_order.max(), self.order.max())) + 1
        group = torch.full((len(query), n), -1, device=query.device)
        group[:, self.order] = self.group.to(group.device)
        mass, votes = (torch.zeros(len(group), n, device=group.device) for _ in range(2))
        for start in range(0, query.shape[2], self.BLOCK):
            part = slice(start, start + self.BLOCK)
            pattern, may = self._pattern(call, query[:, :, part], key, call.side.order[part], k_order, kw)
            own = group[:, call.side.order[part]]
            if call.side.absent is not None:  # rows that only other worlds run have no vote here
                own = own.masked_fill(call.side.absent[:, part].to(own.device), -1)
            kin = (own[:, :, None] == group[:, k_order][:, None]) & (own >= 0)[:, :, None] & may.any(1)
            mass[:, k_order] += (pattern * kin).sum(1)
            votes[:, k_order] += kin.sum(1)
        old = self.state.received
        received = torch.zeros_like(mass)
        if old is not None:
            received[:, : old.shape[1]] = old[:, :n]
        self.state.received = torch.where(votes > 0, mass / votes.clamp(min=1), received)

    def _pattern(
        self, call: Any, query: Tensor, key: Tensor, order: Tensor, k_order: Tensor, kw: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Attention [world, q, k] of some queries, mean over heads, and which keys they may read [world | 1, head | 1, q, k]."""
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scale = query.shape[-1] ** -0.5 if kw.get("scaling") is None else kw["scaling"]
        scores = (query @ keys.transpose(2, 3)).float() * scale
        order, k_order = order.to(query.device), k_order.to(query.device)
        may, bias = with_edges(call, keep_rows(call, order, k_order), order, k_order, query.dtype)
        scores = scores if bias is None else scores + bias
        return scores.masked_fill(~may, -math.inf).softmax(-1).nan_to_num().mean(1), may


@dataclass(frozen=True)
class Decisions:
    """The Head: what was decided, aligned with source positions. Rows never scored are kept, with score nan, gate 1.

    mod.layers  routed layers, 0-based [layer]      mod.keep, mod.score, mod.gate  [layer, world, pos]
    mod.depth   layers that updated each token [world, pos]      mod.ties  groups whose border was a tie
    mod.aux     gamma-MoD's auxiliary loss: cross-entropy of the two router logits with membership; for gate "softmax"
    """

    routing: Routing

    def __call__(self, resid: Tensor, side: Side) -> dict[str, Tensor]:
        state = self.routing.state(side)
        if not state.log:
            return {}
        n = max(int(order.max()) for _, order, *_ in state.log) + 1
        layers = sorted({layer for layer, *_ in state.log})
        worlds, device = len(state.log[0][2]), state.log[0][2].device
        keep = torch.ones(len(layers), worlds, n, dtype=torch.bool, device=device)
        score = torch.full((len(layers), worlds, n), torch.nan, device=device)
        gate = torch.ones(len(layers), worlds, n, device=device)
        for layer, order, kept, rank, factor, _ in state.log:
            at = layers.index(layer)
            keep[at][:, order] = kept
            score[at][:, order] = rank.float()
            gate[at][:, order] = factor.detach().float()
        found = {
            "mod.layers": torch.tensor(layers), "mod.keep": keep, "mod.score": score, "mod.gate": gate,
            "mod.depth": len(self.routing.ratios) - (~keep).sum(0), "mod.ties": torch.tensor(state.ties),
        }  # fmt: skip
        return found | self._aux(state)

    def _aux(self, state: _State) -> dict[str, Tensor]:
        """With gradient, unlike the rest."""
        if self.routing.what.gate != "softmax":
            return {}
        losses = [
            F.cross_entropy(logits.flatten(0, 1), keep.flatten().long())
            for _, _, keep, _, _, logits in state.log
            if logits is not None
        ]
        return {"mod.aux": torch.stack(losses).mean()}


# ---- the oracle -----------------------------------------------------------------------------------------------------------


def oracle_scores(model: Any, ready: Any, target: int | None = None) -> dict[int, Tensor]:
    """How much the answer depends on what each layer adds to each token: for selector "oracle", layer -> [pos].

    |d log p(target) / d g| at g = 1, where g multiplies what the layer adds to the token: to first order, what skipping
    would change (keys and values of the token are not part of it). target: a token id; None: what the clean run answers.
    Raises UsageError for more than one world.
    """
    if ready.n_worlds != 1:
        raise UsageError(f"oracle scores are of one world, got {ready.n_worlds}; prepare them one by one")
    scaled = _Scaled()
    with torch.enable_grad(), model.lock.shared():
        from lab.model.run import Run

        door, maps = model.arrive(ready)
        resid, side = model.stream(
            door, Run(), plan=replace(ready.plan, detours=(*ready.plan.detours, scaled)), tokens=maps
        )
        logp = model.read(resid, side)[0, -1].float().log_softmax(-1)
        grads = torch.autograd.grad(
            logp[int(logp.argmax()) if target is None else target], list(scaled.gain.values())
        )
    return {layer: g[0, :, 0].abs().float() for layer, g in zip(scaled.gain, grads, strict=True)}


class _Scaled:
    """A Detour that multiplies what every layer adds by ones that gradients are taken of."""

    def __init__(self) -> None:
        self.gain: dict[int, Tensor] = {}

    def __call__(self, layer: int, step: Step, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
        new, side = step(resid, side)
        self.gain[layer] = torch.ones(
            *resid.shape[:2], 1, device=resid.device, dtype=resid.dtype, requires_grad=True
        )
        return resid + self.gain[layer] * (new - resid), side


NEUTRAL = MixtureOfDepths(keep=1.0, selector="uniform", gate="none")
EXAMPLE = MixtureOfDepths(keep=0.2)
MixtureOfDepths.NEUTRAL, MixtureOfDepths.EXAMPLE = NEUTRAL, EXAMPLE
