"""Policies to start from and to compare with: the four of Map the Flow (arXiv 2510.13251), and the baselines they need.

The paper's ranges (1-based, inclusive), read from its released code:

    model        layers  video reads earlier frames  question reads video  last reads question  video x video  question x question
    7b           32      6-15                        6-20                  16-25                1-20           1-25
    13b          40      6-15                        6-20                  16-30                1-20           1-30
    internvl-4b  32      6-15                        6-20                  11-30                1-20           1-30
    videollama3  28      1-15                        6-20                  21-28                1-20           1-28

`last` never reads the video nor itself. As released, system prompt and template belong to no segment: they read the
video in every layer, and `last` reads them. `strict` counts all text after the video as question, and all between the
first and the last video token as video, so that nothing passes beside the cuts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.edges.cuts import Cut
from lab.edges.drawing import RandomPairs
from lab.edges.fingerprints import ModelInfo
from lab.edges.mass import Mass
from lab.edges.policy import Policy
from lab.edges.ranges import layer_text
from lab.errors import UsageError

Range = tuple[int, int]
CROSS = "frame(q) > frame(k)"
WITHIN = "frame(q) == frame(k)"


@dataclass(frozen=True)
class Flow:
    """One row of the table: the layers in which each pathway is kept, 1-based and inclusive."""

    depth: int
    cross_frame: Range
    video_question: Range
    question_last: Range
    video_video: Range
    question_question: Range
    timestamps: bool = False  # the released code counts timestamps as video
    random_ratio: float = 0.0  # share of all pairs that the paper's random baseline cuts


FLOWS = {
    "7b": Flow(32, (6, 15), (6, 20), (16, 25), (1, 20), (1, 25), random_ratio=0.58),
    "13b": Flow(40, (6, 15), (6, 20), (16, 30), (1, 20), (1, 30), random_ratio=0.63),
    "internvl-4b": Flow(32, (6, 15), (6, 20), (11, 30), (1, 20), (1, 30), random_ratio=0.6),
    "videollama3": Flow(28, (1, 15), (6, 20), (21, 28), (1, 20), (1, 28), timestamps=True, random_ratio=0.42),
}  # fmt: skip
STYLES = ("released", "strict")
# The layouts of `lab.edges.layouts` on which the presets are counted: 52 system tokens, 8 frames, 44 of question and
# options, 19 of template. VideoLLaMA3's frames are 128 tokens after 7 of timestamp (its own sizes vary by video).
LAYOUTS = {
    "7b": "52,8x144,44,19", "13b": "52,8x144,44,19", "internvl-4b": "52,8x256,44,19", "videollama3": "52,8x7+128,44,19",
}  # fmt: skip


def scaled(kept: Range, depth: int, n_layers: int) -> Range:
    """A range of kept layers at another depth: both ends round(end * n_layers / depth), inclusive, within the model."""
    first, last = (min(max(1, round(end * n_layers / depth)), n_layers) for end in kept)
    return first, last


def paper(name: str, style: str = "released", n_layers: int | None = None) -> Policy:
    """One of the paper's policies, for its own depth or another. Raises UsageError for an unknown name or style."""
    flow = _flow(name)
    if style not in STYLES:
        raise UsageError(f"no style {style!r}; there are: {', '.join(STYLES)}")
    n = n_layers or flow.depth
    if n < 1:
        raise UsageError(f"n_layers must be at least 1, got {n}")
    released = style == "released"
    return Policy(
        name=f"map-the-flow/{name}/{style}", model=ModelInfo(layers=n), segments="paper" if released else "strict",
        cuts=tuple(c for c in (_released(flow, n) if released else _strict(flow, n)) if c is not None),
        notes="Map the Flow (arXiv 2510.13251), effective pathway" + ("" if n == flow.depth else f", scaled from {flow.depth} layers"),
    )  # fmt: skip


def _flow(name: str) -> Flow:
    if name not in FLOWS:
        near = difflib.get_close_matches(name, FLOWS, n=2)
        raise UsageError(
            f"no preset {name!r}; closest: {', '.join(near) or 'none'}; there are: {', '.join(FLOWS)}"
        )
    return FLOWS[name]


def _released(flow: Flow, n: int) -> list[Cut | None]:
    video = "video+separator" if flow.timestamps else "video"
    return _flow_cuts(flow, n, video, "question")


def _strict(flow: Flow, n: int) -> list[Cut | None]:
    """The same flow for a partition of the prompt; text before the video cannot read it and keeps all its edges."""
    return _flow_cuts(flow, n, "video-span", "after-video")


def _flow_cuts(flow: Flow, n: int, video: str, question: str) -> list[Cut | None]:
    """Disjoint cuts, so that layers can be shuffled cut by cut and the count stays."""

    def outside(kept: Range) -> list[int]:
        first, last = scaled(kept, flow.depth, n)
        return [layer for layer in range(n) if not first <= layer + 1 <= last]

    across = sorted({*outside(flow.cross_frame), *outside(flow.video_video)})
    return [
        _cut(across, video, video, "frames read earlier frames", CROSS),
        _cut(outside(flow.video_video), video, video, "frames read themselves", WITHIN),
        _cut(outside(flow.video_question), question, video, "question reads video"),
        _cut(outside(flow.question_last), "last", question, "last reads question"),
        _cut(outside(flow.question_question), question, question, "question reads itself"),
        _cut(range(n), "last", video, "last reads video"),
        _cut(range(n), "last", "last", "last reads itself"),
    ]


def _cut(
    layers: Iterable[int], q: str, k: str, reason: str | None = None, where: str | None = None
) -> Cut | None:
    """A cut of 0-based layers, None if there are none."""
    text = layer_text(layers)
    return Cut(layers=text, q=q, k=k, where=where, reason=reason) if text else None


# ---- baselines --------------------------------------------------------------------------------------------------------


def nothing() -> Policy:
    """The null policy: a run under it is the clean run."""
    return Policy(name="nothing", cuts=())


def video_exit(layer: int, n_layers: int) -> Policy:
    """Nobody reads video after `layer` (1-based; 0: nobody ever does), and video rows, dead then, read nothing."""
    if not 0 <= layer <= n_layers:
        raise UsageError(
            f"exit layer {layer}: the model has layers 1-{n_layers}; 0 lets the video exit at once"
        )
    after = range(layer, n_layers)
    cuts = (_cut(after, "*", "video", "video exits"), _cut(after, "video", "*", "dead"))
    return Policy(name=f"video-exit/{layer}", model=ModelInfo(layers=n_layers), cuts=_some(cuts))


def frame_local(k: int, n_layers: int, layers: Sequence[int] | None = None) -> Policy:
    """Frames do not read earlier frames in `k` layers: the last k, or the 1-based `layers` given."""
    chosen = range(n_layers - k, n_layers) if layers is None else [layer - 1 for layer in layers]
    if not 0 <= k <= n_layers or len(set(chosen)) != k or not set(chosen) <= set(range(n_layers)):
        raise UsageError(f"frame-local attention in {k} layers: give {k} different layers of 1-{n_layers}")
    cuts = (_cut(chosen, "video", "video", "frames read earlier frames", CROSS),)
    return Policy(name=f"frame-local/{k}", model=ModelInfo(layers=n_layers), cuts=_some(cuts))


def layer_permuted(policy: Policy, n_layers: int, seed: int = 0) -> Policy:
    """The same cuts with the layers shuffled by one permutation: equal paper count, structure across layers gone."""
    order = _order(n_layers, _generator(seed))
    return _moved(policy, [order] * len(policy.cuts), n_layers, f"layer-permuted/{seed}")


def composition_matched(policy: Policy, n_layers: int, seed: int = 0) -> Policy:
    """Every cut in as many layers as before, drawn for each cut apart: the same number of edges of every sort.

    The paper counts agree where the policy's cuts do not overlap (those of `paper` do not).
    """
    generator = _generator(seed)
    orders = [_order(n_layers, generator) for _ in policy.cuts]
    return _moved(policy, orders, n_layers, f"composition-matched/{seed}")


def random_pairs(name_or_ratio: str | float, seed: int = 0) -> RandomPairs:
    """The paper's random baseline: that share of all pairs is cut at random, afresh in every layer (see `RandomPairs`)."""
    ratio = _flow(name_or_ratio).random_ratio if isinstance(name_or_ratio, str) else float(name_or_ratio)
    return RandomPairs(ratio, seed)


def attention_mass(
    measured: Mass | Sequence[Mass],
    k: int | None = None,
    *,
    share: float | None = None,
    by_head: bool = False,
) -> Policy:
    """Attention-mass top-k: keep the segment edges that are read most, cut the others.

    A segment edge is a pair of segments in one layer (`by_head`: and one head); its mass is what a row of the query
    segment gives to the key segment, averaged over heads and over the runs measured (`lab.edges.mass.segment_mass`).
    Edges that a causal prompt does not have, with no mass at all in any layer and head, are left out of the ranking.

    k      how many segment edges are kept
    share  or: how much of all mass they keep together (0..1), fewest edges first
    Mass is no importance: a baseline, never a search. The cuts name the segments that were measured ("frame:3").
    Raises UsageError for runs over different segments, for segments that overlap, and for a k or share out of range.
    """
    runs = [measured] if isinstance(measured, Mass) else list(measured)
    table = _averaged(runs)
    n_layers, n_heads = table.shape[:2]
    table = table if by_head else table.mean(1, keepdim=True)
    ranked = _ranked(table)
    kept = _top(table, ranked, k, share)
    gone = torch.zeros(table.shape, dtype=torch.bool)
    gone.view(-1)[ranked[kept:]] = True
    info = ModelInfo(layers=n_layers, heads=n_heads if by_head else None)
    notes = (
        f"keeps {kept:,} of {len(ranked):,} segment edges, those with most attention mass in {len(runs)} runs"
    )
    return Policy(
        name=f"attention-mass/{kept}", model=info, cuts=_cuts_of(runs[0].names, gone, by_head), notes=notes
    )


def _averaged(runs: Sequence[Mass]) -> Tensor:
    """Mean mass of the runs, [layer, head, query, key]; layers without attention have none."""
    if not runs:
        raise UsageError(
            "attention-mass needs at least one measured run: lab.edges.segment_mass(model, ready)"
        )
    names, shape = runs[0].names, runs[0].sums.shape
    for run in runs[1:]:
        if run.names != names or run.sums.shape != shape:
            raise UsageError(
                f"the runs were measured over different segments or models: {', '.join(names)} {tuple(shape)} against "
                f"{', '.join(run.names)} {tuple(run.sums.shape)}"
            )
    # nan where a run has no such row: the others tell
    table = torch.stack([run.mean for run in runs]).nanmean(0)
    over = float(table.nan_to_num().sum(-1).max())
    if over > 1 + 1e-3:
        raise UsageError(
            f"the segments overlap: a row gives them {over:.3f} of its attention; measure a partition (segments=None)"
        )
    return table


def _ranked(table: Tensor) -> Tensor:
    """Flat indices of the segment edges that exist, most mass first; ties in order of layer and segments."""
    known = table.nan_to_num()
    exists = (known.amax((0, 1)) > 0) & ~table.isnan()
    order = known.flatten().sort(descending=True, stable=True).indices
    return order[exists.flatten()[order]]


def _top(table: Tensor, ranked: Tensor, k: int | None, share: float | None) -> int:
    if (k is None) == (share is None):
        raise UsageError(
            "attention-mass takes k= (segment edges kept) or share= (of all mass), one of the two"
        )
    if k is not None:
        if isinstance(k, bool) or not 0 <= k <= len(ranked):
            raise UsageError(f"k={k}: there are {len(ranked)} segment edges; keep 0 to {len(ranked)}")
        return k
    assert share is not None
    if not 0 <= share <= 1:
        raise UsageError(f"share must lie in 0..1, got {share}")
    total = table.nan_to_num().flatten()[ranked].double().cumsum(0)
    return int((total < share * total[-1] * (1 - 1e-12)).sum()) + 1 if share > 0 else 0


def _cuts_of(names: Sequence[str], gone: Tensor, by_head: bool) -> tuple[Cut, ...]:
    """One cut for each pair of segments, or for each pair and set of layers that lose the same heads."""
    cuts: list[Cut | None] = []
    pairs: list[tuple[int, int]] = gone.any(0).any(0).nonzero().tolist()
    for q, k in pairs:
        layers: dict[tuple[int, ...], list[int]] = {}
        for layer, lost in enumerate(gone[:, :, q, k]):
            if bool(lost.any()):
                layers.setdefault(tuple(lost.nonzero().squeeze(1).tolist()), []).append(layer)
        for heads, at in layers.items():
            cut = _cut(at, names[q], names[k], "little attention mass")
            cuts.append(cut.model_copy(update={"heads": heads}) if by_head and cut is not None else cut)
    return _some(cuts)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _order(n: int, generator: torch.Generator) -> list[int]:
    return torch.randperm(n, generator=generator).tolist()


def _moved(policy: Policy, orders: Sequence[list[int]], n_layers: int, how: str) -> Policy:
    cuts = [
        cut.model_copy(update={"layers": layer_text(order[layer] for layer in cut.layers_of(n_layers))})
        for cut, order in zip(policy.cuts, orders, strict=True)
    ]
    name = f"{policy.name or policy.id}/{how}"
    return policy.model_copy(update={"cuts": tuple(cuts), "name": name, "model": ModelInfo(layers=n_layers)})


def _some(cuts: Iterable[Cut | None]) -> tuple[Cut, ...]:
    return tuple(c for c in cuts if c is not None)


# ---- by name ------------------------------------------------------------------------------------------------------------


def known() -> list[str]:
    """Names that `named` takes, with N for numbers."""
    flows = [f"{name}/{style}" for name in FLOWS for style in STYLES]
    return [*flows, "video-exit/N", "frame-local/N", "nothing"]


# Presets that are drawn or measured on a prompt, or made from another policy: no file, so no name for `named`.
MADE = {
    "random_pairs": "random pairs from the video's start on, as many as the paper's baseline cuts",
    "layer_permuted": "another policy with its layers shuffled",
    "composition_matched": "another policy with each cut in layers of its own drawing",
    "attention_mass": "keep the k segment edges with most attention mass, as segment_mass measures it",
}


def named(name: str, n_layers: int | None = None) -> Policy:
    """A preset by name: "7b/released", "7b/strict", "7b" (released), "video-exit/N", "frame-local/N", "nothing".

    Raises UsageError for an unknown name, or one that needs `n_layers`.
    """
    head, _, tail = name.partition("/")
    made = head.replace("-", "_")
    if made in MADE:
        raise UsageError(
            f"preset {head!r} is not made from its name alone ({MADE[made]}): call lab.edges.presets.{made}(...) and save "
            "what it gives"
        )
    if name == "nothing":
        return nothing()
    if head in ("video-exit", "frame-local"):
        if not tail.isdecimal() or len(tail) > 5 or n_layers is None:
            raise UsageError(
                f"preset {name!r}: write {head}/N with a number of layers, and say the model's depth too"
            )
        return video_exit(int(tail), n_layers) if head == "video-exit" else frame_local(int(tail), n_layers)
    return paper(head, tail or "released", n_layers)
