"""Who is compared: a policy, every baseline it must be better than, and the curves they belong to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges import presets
from lab.edges.policy import Policy
from lab.edges.unit_mass import most_attended
from lab.errors import LabError, LabWarning, UsageError
from lab.model.ready import Ready

FULL, MINE, NO_VIDEO, SHUFFLED = "full", "policy", "no-video", "shuffled-frames"
SORTS = ("paper", "random", "shuffled", "exit", "local", "mass", "controls")


class CutsEdges(Protocol):
    """What a contestant offers."""

    def masks(
        self, tokens: TokenMap, n_layers: int, n_heads: int = 1, item: VideoQA | None = None
    ) -> dict[int, Tensor]: ...

    def count(
        self, tokens: TokenMap, n_layers: int, n_heads: int = 1, item: VideoQA | None = None
    ) -> Any: ...


@dataclass(frozen=True)
class Contestant:
    """One row of the table. family: the curve it is a point of."""

    name: str
    policy: CutsEdges
    family: str


def contestants(
    model: Any, policy: Policy, readies: Sequence[Ready], baselines: Any, curve: Sequence[Policy], seed: int
) -> list[Contestant]:
    """The full model, the policy, the baselines asked for, and further points of the policy's own curve.

    baselines  "all", "none", some of `SORTS`, or a mapping of name -> policy
    Raises UsageError for an unknown sort, or a name that stands twice.
    """
    out = [Contestant(FULL, presets.nothing(), FULL), Contestant(MINE, policy, "search")]
    if isinstance(baselines, Mapping):
        for name, p in baselines.items():
            check_rival(str(name), p)
        out += [Contestant(str(name), p, _family(str(name))) for name, p in baselines.items()]
    else:
        for sort in _sorts(baselines):
            out += _MAKE[sort](model, policy, readies, seed)
    out += [Contestant(f"search/{i}", p, "search") for i, p in enumerate(curve, 1)]
    if all(c.name != NO_VIDEO for c in out):
        out.append(Contestant(NO_VIDEO, presets.video_exit(0, model.cfg.n_layers), "exit"))
    names = [c.name for c in out]
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise UsageError(f"baseline {twice[0]!r} stands twice; each needs a name of its own")
    return out


def check_rival(name: str, policy: Any) -> None:
    """Raises UsageError for what cuts no edges."""
    if not callable(getattr(policy, "masks", None)) or not callable(getattr(policy, "count", None)):
        raise UsageError(
            f"{name}: expected a lab.edges.Policy, got {type(policy).__name__}; use Policy.load(path)"
        )


def _family(name: str) -> str:
    """The curve a named baseline belongs to: what stands before the slash."""
    first = name.partition("/")[0]
    return {"video-exit": "exit"}.get(first, first)


def _sorts(asked: Any) -> list[str]:
    if asked in ("none", None, ()):
        return []
    wanted: list[str] = [*SORTS] if asked == "all" else [asked] if isinstance(asked, str) else [*asked]
    unknown = [w for w in wanted if w not in SORTS]
    if unknown:
        raise UsageError(f"no baselines {unknown[0]!r}; use 'all', 'none' or some of {', '.join(SORTS)}")
    return wanted


def _paper(model: Any, policy: Policy, readies: Any, seed: int) -> list[Contestant]:
    n = model.cfg.n_layers
    names = [(f"{flow}/{style}", flow, style) for flow in presets.FLOWS for style in presets.STYLES]
    return [Contestant(name, presets.paper(flow, style, n), "paper") for name, flow, style in names]


def _random(model: Any, policy: Policy, readies: Sequence[Ready], seed: int) -> list[Contestant]:
    """The paper's random pairs: at the policy's own count, as far as there are pairs to cut, and at the paper's ratio."""
    tokens, c = readies[0].maps[0], model.cfg
    most = _most_random(tokens)
    mine = 1.0 - policy.count(tokens, c.n_layers, c.n_heads, readies[0].item).kept_fraction
    out: list[Contestant] = []
    for name, ratio in (("random-pairs", mine), ("random-pairs/7b", presets.FLOWS["7b"].random_ratio)):
        if ratio > 0:
            out.append(Contestant(name, presets.random_pairs(min(ratio, most), seed), "random"))
    return out


def _most_random(tokens: TokenMap) -> float:
    """Share of all pairs that stand after the video's start, a little less, so that it fits prompts of other lengths."""
    n, video = len(tokens), tokens.where(role="video")
    late = n - int(video[0]) if len(video) else 0
    return 0.97 * late * (late + 1) / (n * (n + 1))


def _shuffled(model: Any, policy: Policy, readies: Any, seed: int) -> list[Contestant]:
    n = model.cfg.n_layers
    made = {
        "layer-permuted": (presets.layer_permuted, policy),
        "composition-matched": (presets.composition_matched, policy),
        "7b/strict layer-permuted": (presets.layer_permuted, presets.paper("7b", "strict", n)),
    }
    return [Contestant(name, make(p, n, seed), "shuffled") for name, (make, p) in made.items() if p.cuts]


def _exit(model: Any, policy: Policy, readies: Any, seed: int) -> list[Contestant]:
    n = model.cfg.n_layers
    return [
        Contestant(f"video-exit/{i}" if i else NO_VIDEO, presets.video_exit(i, n), "exit") for i in range(n)
    ]


def _local(model: Any, policy: Policy, readies: Any, seed: int) -> list[Contestant]:
    n = model.cfg.n_layers
    return [Contestant(f"frame-local/{k}", presets.frame_local(k, n), "frame-local") for k in range(1, n + 1)]


def _mass(model: Any, policy: Policy, readies: Sequence[Ready], seed: int) -> list[Contestant]:
    tokens, c = readies[0].maps[0], model.cfg
    keep = policy.count(tokens, c.n_layers, c.n_heads, readies[0].item).kept_fraction
    try:
        return [Contestant("attention-mass", most_attended(model, readies, keep), "attention-mass")]
    except LabError as e:
        warnings.warn(f"no attention-mass baseline: {e}", LabWarning, stacklevel=5)
        return []


def _controls(model: Any, policy: Policy, readies: Any, seed: int) -> list[Contestant]:
    return []  # no-video is always there; shuffled frames are no policy: `evaluate` runs them


_MAKE = {
    "paper": _paper, "random": _random, "shuffled": _shuffled, "exit": _exit, "local": _local, "mass": _mass,
    "controls": _controls,
}  # fmt: skip
