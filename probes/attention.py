"""Attention maps, each with its causal check beside it: what is looked at much is not always what is used.

    attention(model, items)                    share of attention by pathway, layer and head; and what cutting it does
    heads(model, items, "video->last")         the heads that look there most, each cut by itself
    entropy(model, items)                      how spread out every head looks
    frame_map(model, items, policy=p)          which frames look at which, clean and under a policy
    rows(model, item, "last")                  chosen rows of the pattern
    sinks(model, item)                         positions everybody looks at

Patterns exist one layer at a time, [head, q, k], and are summed up at once. `masses` is the only place that needs them
for a share of attention: a sink that never builds them can stand in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lab.edges.dense import dense_edges
from lab.edges.pathways import cut_mask, usual_pathways
from lab.errors import TooBig, UsageError
from lab.model.activations import free_bytes
from lab.model.run import CURRENT, Call
from lab.result import Result
from lab.runs import progress
from probes.asking import Asked, Case, ProbeRecipe, asked, recipe_fields
from probes.streams import _Looking, layers_asked

CHANGE = "% change in probability"
SINK = 5.0  # times the share it would get if everybody looked everywhere alike
See = Callable[
    [int, Tensor, Tensor], None
]  # layer (0-based), pattern [head, q, k], source positions of its rows


class AttentionRecipe(ProbeRecipe):
    """Attention by pathway, layer and head, with the knock-out of the same edges. Layers 1-based."""

    pathways: tuple[str, ...] | None = Field(default=None, min_length=1)
    layers: tuple[int, ...] | None = None
    causal: bool = True

    def run(self, *, progress: bool = True, model: Any = None) -> list[Result]:
        """Load what the recipe names (or use `model`) and look."""
        made = _attention(self.asked(model), self.pathways, self.layers, self.causal, self.plain(), progress)
        return [made, causal(made)] if self.causal else [made]


def attention(
    model: Any, items: Any, pathways: Sequence[str] | str | None = None, *, layers: Sequence[int] | None = None,
    causal: bool = True, n_frames: int = 8, policy: Any = None, mechanisms: Sequence[Any] = (), show_progress: bool = True,
) -> Result:  # fmt: skip
    """The share of their attention that the queries of a pathway give to its keys: mean over queries.

    pathways  "keys->queries" or "cross-frame" (see `lab.edges.pathways`); None: the paper's five
    layers    1-based; None: all with softmax attention
    causal    knock the same edges out, layer by layer, and note the change of the answer's probability

    Returns a Result with axes (item, pathway, layer, head). `notes["causal"]` holds [item][pathway][layer], in percent
    of the probability of the token the run answers; `notes["uniform"]` the share if all were looked at alike.
    Raises UsageError for unknown pathways; TooBig where one layer's pattern does not fit into memory.
    """
    names = None if pathways is None else (pathways,) if isinstance(pathways, str) else tuple(pathways)
    fields = recipe_fields(model, items, n_frames, policy, mechanisms)
    chosen = None if layers is None else tuple(layers)
    recipe = (
        {}
        if fields is None
        else AttentionRecipe(**fields, pathways=names, layers=chosen, causal=causal).plain()
    )
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    return _attention(who, names, layers, causal, recipe, show_progress)


def _attention(
    who: Asked, pathways: Sequence[str] | None, layers: Sequence[int] | None, causal: bool, recipe: dict[str, Any], show: bool
) -> Result:  # fmt: skip
    chosen = softmax_layers(who.model, layers)
    names = usual_pathways(who.cases[0].tokens) if pathways is None else tuple(pathways)
    if not names:
        raise UsageError("nothing to do: 0 pathways")
    values, uniform, effects, runs = [], [], [], 0
    for case in progress(who.cases, desc="attention", show=show):
        cuts = [cut_mask(case.tokens, p, case.item) for p in names]
        values.append(masses(who, case, cuts, chosen))
        uniform.append([_uniform(case, cut) for cut in cuts])
        runs += 1
        if causal:
            clean = _clean(who, case)
            effects.append([[_effect(who, case, {i: cut}, clean) for i in chosen] for cut in cuts])
            runs += len(cuts) * len(chosen) + 1
    return Result(
        values=np.stack(values), axes=("item", "pathway", "layer", "head"),
        coords={"item": who.keys, "pathway": list(names), "layer": [i + 1 for i in chosen], "head": list(range(who.model.cfg.n_heads))},
        unit="share of attention", recipe=recipe, name="attention by pathway",
        notes={"causal": effects, "causal_unit": CHANGE, "uniform": uniform, "ledger": who.ledger(runs)},
    )  # fmt: skip


def causal(result: Result) -> Result:
    """The causal check of an attention Result as one of its own: axes (item, pathway, layer), change in percent."""
    if not result.notes.get("causal"):
        raise UsageError("this Result has no causal check; make it with causal=True")
    axes = tuple(a for a in ("item", "pathway", "layer") if a in result.axes)
    coords = {a: result.coords[a] for a in axes}
    return Result(np.array(result.notes["causal"], float), axes, coords, CHANGE, result.recipe, "knock-out of the same edges", baseline=0.0)  # fmt: skip


def softmax_layers(model: Any, layers: Sequence[int] | None) -> list[int]:
    """Layers (1-based, None: all) that have patterns, as code counts them. Raises UsageError if none is left."""
    found = [i for i in layers_asked(model.cfg.n_layers, layers) if model.parts[i].attn is not None]
    if not found:
        raise UsageError(f"layers {layers} have no softmax attention, so no pattern")
    return found


# ---- patterns -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def visit_patterns(who: Asked, case: Case, layers: Sequence[int], see: See) -> Tensor:
    """Run the case once and show the pattern of every layer (0-based), one at a time; returns the last logits.

    Rows and columns are those the layer has: where a mechanism drops or routes tokens, fewer than the prompt's.
    Raises TooBig beyond a quarter of free memory.
    """
    model = who.model
    # scores, softmax in fp32, and its result stand beside each other
    need, free = 3 * 4 * model.cfg.n_heads * len(case.tokens) ** 2, free_bytes(model.device)
    if need > free // 4:
        raise TooBig(
            f"one layer's pattern of {len(case.tokens):,} positions needs {need:,} bytes, more than a quarter of the {free:,} "
            "bytes free; take fewer frames"
        )

    def look(value: Tensor, hook: Any) -> None:
        call = CURRENT.get()
        assert isinstance(call, Call)
        see(call.parts.index, value[0].float(), call.side.order.cpu())

    looking = _Looking(tuple((f"blocks.{i}.attn.hook_pattern", look) for i in layers))
    return model(case.ready, policy=who.policy, mechanisms=(*case.mechanisms, looking))[0, -1]


def masses(who: Asked, case: Case, edges: Sequence[Tensor], layers: Sequence[int]) -> Any:
    """Share of attention on sets of edges [q, k] (masks over the prompt), mean over the queries they have:
    [set, layer, head]; nan where a layer has none of the queries."""
    out = torch.full((len(edges), len(layers), who.model.cfg.n_heads), torch.nan)

    def see(layer: int, pattern: Tensor, order: Tensor) -> None:
        for i, mask in enumerate(edges):
            mine = mask[order][:, order].to(pattern.device)
            queries = mine.any(1)
            if bool(queries.any()):
                out[i, layers.index(layer)] = (pattern * mine).sum(-1)[:, queries].mean(-1).cpu()

    visit_patterns(who, case, layers, see)
    return out.numpy()


def _uniform(case: Case, cut: Tensor) -> float:
    """Share of the edges of a pathway's queries that are the pathway's."""
    queries = cut.any(1)
    seen = torch.arange(1, len(cut) + 1)[queries]
    return float((cut.sum(1)[queries] / seen).mean()) if bool(queries.any()) else float("nan")


@torch.no_grad()
def _effect(who: Asked, case: Case, cuts: Mapping[int, Tensor], clean: Tensor) -> float:
    """Change in percent of p of the token that the run answers, when edges [q, k] or [head, q, k] are cut beside the
    policy's own."""
    model, how = who.model, {"policy": who.policy, "mechanisms": case.mechanisms}
    edges = {i: dense_edges(c) for i, c in cuts.items()}
    p = model(case.ready, edges=edges, **how)[0, -1].float().softmax(-1)
    token = int(clean.argmax())
    return float((p[token] - clean[token]) * 100 / clean[token])


@torch.no_grad()
def _clean(who: Asked, case: Case) -> Tensor:
    """Probabilities of the run without further cuts, [d_vocab]."""
    return who.model(case.ready, policy=who.policy, mechanisms=case.mechanisms)[0, -1].float().softmax(-1)


# ---- heads ----------------------------------------------------------------------------------------------------------


def heads(
    model: Any, items: Any, pathway: str, *, top: int = 10, layers: Sequence[int] | None = None, n_frames: int = 8,
    policy: Any = None, mechanisms: Sequence[Any] = (), show_progress: bool = True,
) -> Result:  # fmt: skip
    """The heads that look along a pathway most (mean over items), and what the answer loses when one of them cannot.

    Returns a Result with axes (measure, head): "share of attention" and "change when cut" (percent of p of the answer,
    this pathway cut in this one head). Heads are named "layer.head", the layer 1-based, the head 0-based.
    """
    if not isinstance(top, int) or top < 1:
        raise UsageError(f"top must be at least 1 head, got {top!r}")
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    chosen = softmax_layers(model, layers)
    cuts = [cut_mask(c.tokens, pathway, c.item) for c in who.cases]
    share = np.nanmean([masses(who, c, [cut], chosen)[0] for c, cut in zip(who.cases, cuts, strict=True)], 0)
    order = np.argsort(-np.nan_to_num(share.ravel()), kind="stable")[:top]
    best = [(chosen[i // share.shape[1]], int(i % share.shape[1])) for i in order.tolist()]
    clean = [_clean(who, c) for c in who.cases]
    change = [
        _head_change(who, cuts, clean, layer, head)
        for layer, head in progress(best, desc="heads", show=show_progress)
    ]
    return Result(
        values=np.array([share.ravel()[order], change]), axes=("measure", "head"),
        coords={"measure": ["share of attention", "change when cut"], "head": [f"{i + 1}.{h}" for i, h in best]},
        unit=f"share; {CHANGE}", recipe={}, name=f"heads that look along {pathway}", notes={"pathway": pathway, "n": {"item": len(who.cases)}},
    )  # fmt: skip


def _head_change(who: Asked, cuts: Sequence[Tensor], clean: Sequence[Tensor], layer: int, head: int) -> float:
    """Mean over items of the change when one head's edges are cut."""
    n = who.model.cfg.n_heads
    one = [{layer: _one_head(cut, head, n)} for cut in cuts]
    return float(np.mean([_effect(who, *args) for args in zip(who.cases, one, clean, strict=True)]))


def _one_head(cut: Tensor, head: int, n_heads: int) -> Tensor:
    """[head, q, k], cut in one head only."""
    out = torch.zeros(n_heads, *cut.shape, dtype=torch.bool)
    out[head] = cut
    return out


def entropy(
    model: Any, items: Any, roles: str | Sequence[str] = ("video", "last"), *, layers: Sequence[int] | None = None,
    n_frames: int = 8, policy: Any = None, mechanisms: Sequence[Any] = (), show_progress: bool = True,
) -> Result:  # fmt: skip
    """How spread out every head looks: entropy of the pattern in nats, mean over a role's queries.

    Returns a Result with axes (item, role, layer, head). 0: all attention on one key.
    """
    names = (roles,) if isinstance(roles, str) else tuple(roles)
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    chosen = softmax_layers(model, layers)
    values = [
        _entropy(who, c, names, chosen) for c in progress(who.cases, desc="entropy", show=show_progress)
    ]
    return Result(
        values=np.stack(values), axes=("item", "role", "layer", "head"),
        coords={"item": who.keys, "role": list(names), "layer": [i + 1 for i in chosen], "head": list(range(model.cfg.n_heads))},
        unit="entropy (nats)", recipe={}, name="entropy of attention",
    )  # fmt: skip


def _entropy(who: Asked, case: Case, roles: Sequence[str], layers: Sequence[int]) -> Any:
    out = torch.full((len(roles), len(layers), who.model.cfg.n_heads), torch.nan)
    sets = [case.at(role) for role in roles]

    def see(layer: int, pattern: Tensor, order: Tensor) -> None:
        spread = torch.special.entr(pattern).sum(-1).cpu()
        for i, mine in enumerate(sets):
            hit = torch.isin(order, mine)
            if bool(hit.any()):
                out[i, layers.index(layer)] = spread[:, hit].mean(-1)

    visit_patterns(who, case, layers, see)
    return out.numpy()


# ---- frames, rows, sinks --------------------------------------------------------------------------------------------


def frame_map(
    model: Any, items: Any, *, layers: Sequence[int] | None = None, causal: bool = True, n_frames: int = 8,
    policy: Any = None, mechanisms: Sequence[Any] = (), show_progress: bool = True,
) -> Result:  # fmt: skip
    """Which frames look at which: share of attention from a frame's tokens to another's, mean over heads.

    policy  also draw the map with its edges cut, beside the clean one
    causal  knock "cross-frame" out in every layer and note the change of the answer (clean run)

    Returns a Result with axes (item, run, layer, query frame, key frame); run is "clean", and "cut" with a policy.
    `notes["causal"]` holds [item][layer]. Raises UsageError for videos of different numbers of frames, or of one.
    """
    who = asked(model, items, n_frames=n_frames, policy=None, mechanisms=mechanisms, twins=False)
    chosen, sizes = softmax_layers(model, layers), {c.tokens.n_frames for c in who.cases}
    if len(sizes) > 1:
        raise UsageError(f"the items have {sorted(sizes)} frames; ask about them one at a time")
    runs = (
        {"clean": who}
        if policy is None
        else {"clean": who, "cut": replace(who, policy=model.pruning.chosen(policy))}
    )
    values, effects = [], []
    for case in progress(who.cases, desc="frames", show=show_progress):
        values.append(np.stack([_frames(run, case, chosen) for run in runs.values()]))
        if causal:
            cut = cut_mask(case.tokens, "cross-frame", case.item)
            clean = _clean(who, case)
            effects.append([_effect(who, case, {i: cut}, clean) for i in chosen])
    n = list(range(sizes.pop()))
    return Result(
        values=np.stack(values), axes=("item", "run", "layer", "query frame", "key frame"),
        coords={"item": who.keys, "run": list(runs), "layer": [i + 1 for i in chosen], "query frame": n, "key frame": n},
        unit="share of attention", recipe={}, name="attention between frames", notes={"causal": effects, "causal_unit": CHANGE},
    )  # fmt: skip


def _frames(who: Asked, case: Case, layers: Sequence[int]) -> Any:
    """[layer, query frame, key frame]"""
    n = case.tokens.n_frames
    out = torch.full((len(layers), n, n), torch.nan)
    frame = torch.where(torch.isin(torch.arange(len(case.tokens)), case.at("video")), case.tokens.frame, -1)

    def see(layer: int, pattern: Tensor, order: Tensor) -> None:
        mine = torch.nn.functional.one_hot(frame[order] + 1, n + 1)[:, 1:].float()  # [row, frame]
        total = mine.T @ pattern.mean(0).cpu() @ mine
        out[layers.index(layer)] = total / mine.sum(0)[:, None]

    visit_patterns(who, case, layers, see)
    return out.numpy()


def rows(
    model: Any, item: Any, queries: str = "last", *, layers: Sequence[int] | None = None, n_frames: int = 8,
    policy: Any = None, mechanisms: Sequence[Any] = (),
) -> Result:  # fmt: skip
    """The pattern's rows of chosen queries of one item, as they are. Axes (layer, head, q, k), positions of the prompt."""
    who = asked(model, item, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    case, chosen = _only(who), softmax_layers(model, layers)
    mine, n = case.at(queries), len(case.tokens)
    out = torch.full((len(chosen), model.cfg.n_heads, len(mine), n), torch.nan)

    def see(layer: int, pattern: Tensor, order: Tensor) -> None:
        for i, q in enumerate(mine.tolist()):
            at = (order == q).nonzero().flatten()
            if len(at):
                out[chosen.index(layer), :, i] = 0.0
                out[chosen.index(layer), :, i, order] = pattern[:, int(at)].cpu()

    visit_patterns(who, case, chosen, see)
    return Result(
        values=out.numpy(), axes=("layer", "head", "q", "k"),
        coords={"layer": [i + 1 for i in chosen], "head": list(range(model.cfg.n_heads)), "q": mine.tolist(), "k": list(range(n))},
        unit="share of attention", recipe={}, name=f"pattern of {queries}", notes={"item": case.key, "roles": case.tokens.roles()},
    )  # fmt: skip


def sinks(
    model: Any, item: Any, *, above: float = SINK, layers: Sequence[int] | None = None, causal: bool = True,
    n_frames: int = 8, policy: Any = None, mechanisms: Sequence[Any] = (),
) -> Result:  # fmt: skip
    """How much every position is looked at: mean over heads and over the queries after it, in multiples of the share
    it would get if everybody looked everywhere alike.

    above   from which multiple on, in the mean over layers, a position is called a sink

    Returns a Result with axes (layer, k). `notes["sinks"]` lists position, role, text and multiple of each, and, with
    `causal`, the change of the answer when nobody may read it in any layer. Positions that fewer than eight queries see
    are not called sinks.
    """
    who = asked(model, item, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    case, chosen = _only(who), softmax_layers(model, layers)
    n = len(case.tokens)
    out = torch.full((len(chosen), n), torch.nan)

    def see(layer: int, pattern: Tensor, order: Tensor) -> None:
        alike = 1 / torch.arange(1, len(order) + 1)  # what a query gives to each of the keys it sees
        got = pattern.mean(0).cpu().tril(-1)  # the look at oneself is not counted
        due = alike[:, None].expand(-1, len(order)).tril(-1)
        out[chosen.index(layer), order] = got.sum(0) / due.sum(0).clamp(min=1e-12)

    visit_patterns(who, case, chosen, see)
    out[:, -1] = torch.nan  # nobody comes after the last
    times = out.nanmean(0)
    found = [int(k) for k in times.nan_to_num(0.0).argsort(descending=True) if times[k] > above and k < n - 8]
    return Result(
        values=out.numpy(), axes=("layer", "k"), coords={"layer": [i + 1 for i in chosen], "k": list(range(n))},
        unit="times the even share", recipe={}, name="how much every position is looked at", baseline=1.0,
        notes={"item": case.key, "above": above, "sinks": [_sink(who, case, k, float(times[k]), chosen, causal) for k in found]},
    )  # fmt: skip


def _sink(
    who: Asked, case: Case, k: int, times: float, layers: Sequence[int], causal: bool
) -> dict[str, Any]:
    cut = torch.zeros(len(case.tokens), len(case.tokens), dtype=torch.bool)
    cut[k + 1 :, k] = True
    effect = (
        {"change when cut": _effect(who, case, dict.fromkeys(layers, cut), _clean(who, case))}
        if causal
        else {}
    )
    return {
        "position": k,
        "role": case.tokens.roles()[k],
        "text": case.tokens.pieces[k],
        "times": times,
        **effect,
    }


def _only(who: Asked) -> Case:
    case, *more = who.cases
    if more:
        raise UsageError(f"this reads one item at a time, got {len(who.cases)}")
    return case
