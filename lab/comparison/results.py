"""Finished pieces as Results: named axes, units, baselines. Layers are 1-based here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.bench.measuring import wilson
from lab.carriers import VideoQA
from lab.comparison.costing import QUANTITIES, SOURCES, Numbers
from lab.comparison.flow import centre, pairs
from lab.comparison.traces import GROUPS
from lab.comparison.variants import Variant
from lab.result import Result

NAN = float("nan")
Pieces = Mapping[tuple[str, str], dict[str, Any]]  # (item, variant) -> piece
KNOCKOUT = "% change in p of its answer"
FELT = 1.0  # percent: where no cut changes that much, a pathway has no centre


@dataclass(frozen=True)
class Found:
    """All that was measured, and what it is about."""

    variants: Sequence[Variant]
    keys: Sequence[str]
    items: Sequence[VideoQA]
    pathways: Sequence[str]
    window: int
    pieces: Pieces
    costs: Numbers | None
    frames: NDArray[np.uint8]  # of the first item: [frame, height, width, channel]
    recipe: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """The variants, vanilla first."""
        return [v.name for v in self.variants]

    def column(self, name: str) -> NDArray[Any]:
        """[item, variant, ...] of one entry of the pieces."""
        rows = [[self.pieces[k, v].get(name) for v in self.names] for k in self.keys]
        return np.array(rows, dtype=float)  # None becomes nan

    def notes(self) -> dict[str, Any]:
        """What every Result says beside its numbers."""
        videos = [
            i.video if isinstance(i.video, str) else k for k, i in zip(self.keys, self.items, strict=True)
        ]
        return {
            "controls": {v.name: v.control_of for v in self.variants if v.control_of}, "vanilla": self.names[0],
            "task": {k: i.task or "all" for k, i in zip(self.keys, self.items, strict=True)},
            "groups": {"item": dict(zip(self.keys, videos, strict=True))},
            "mechanisms": {v.name: [_said(m) for m in v.mechanisms] for v in self.variants},
        }  # fmt: skip

    def result(self, values: Any, axes: Sequence[str], unit: str, name: str, **more: Any) -> Result:
        """A Result over these variants; `more`: coordinates of further axes, and fields of Result."""
        layers = list(range(1, self.variants[0].model.cfg.n_layers + 1))
        known = {
            "item": list(self.keys),
            "variant": self.names,
            "layer": layers,
            "pathway": list(self.pathways),
        }
        coords = {a: more.pop(a) if a in more else known[a] for a in axes}
        notes = self.notes() | more.pop("notes", {})
        return Result(np.asarray(values), tuple(axes), coords, unit, self.recipe, name, notes, **more)


def _said(mechanism: Any) -> str:
    """The mechanism's settings; of files their names."""
    return re.sub(r"'[^']*[/\\\\]([^/'\\\\]+)'", r"'\1'", repr(mechanism))


def results_of(found: Found) -> dict[str, Result]:
    """Every Result by name."""
    return {
        name: replace(result, notes={**result.notes, "part": name})
        for part in (_answers, _likeness, _flow, _rows, _painted, _costs)
        for name, result in part(found).items()
    }


def _answers(f: Found) -> dict[str, Result]:
    right, over = f.column("correct"), ("item", "variant")
    flips = {name: _differs(f, name) for name in ("choice", "text")}
    return {
        "accuracy": _accuracy(f, right),
        "correct": f.result(right, over, "1: right, 0: wrong", "Right answers"),
        "p_right": f.result(f.column("p"), over, "probability of the right option", "Probability of the right option, among the options"),
        "flips": f.result(flips["choice"], over, "1: another answer than vanilla's", "Answers that changed", baseline=0.0),
        "text_flips": f.result(flips["text"], over, "1: other text than vanilla's", "Written answers that changed (several tokens)", baseline=0.0),
    }  # fmt: skip


def _differs(f: Found, name: str) -> NDArray[Any]:
    said = [[f.pieces[k, v][name] for v in f.names] for k in f.keys]
    return np.array([[float(s != row[0]) for s in row] for row in said])


def _accuracy(f: Found, right: NDArray[Any]) -> Result:
    known = np.isfinite(right)
    n, hits = known.sum(0), np.nansum(right, 0)
    ends = [wilson(int(h), int(k)) for h, k in zip(hits, n, strict=True)]
    share = np.where(n > 0, hits / np.maximum(n, 1), NAN)
    low, high = (np.array([e[i] for e in ends]) for i in (0, 1))
    name = f"Accuracy over {int(n.max(initial=0))} questions, with 95 % Wilson intervals"
    return f.result(share, ("variant",), "share of right answers", name, low=low, high=high)


def _likeness(f: Found) -> dict[str, Result]:
    axes, groups = ("item", "variant", "group", "layer"), list(GROUPS)
    return {
        "cosine": f.result(f.column("cosine"), axes, "cosine with vanilla", "Residual stream: cosine with vanilla", group=groups, baseline=1.0),
        "cka": f.result(f.column("cka"), axes, "CKA with vanilla", "Residual stream: CKA with vanilla", group=groups, baseline=1.0),
        "kl": f.result(f.column("kl"), ("item", "variant", "layer"), "KL from vanilla (nats)", "Logit lens at the last position: KL from vanilla", baseline=0.0),
    }  # fmt: skip


def _flow(f: Found) -> dict[str, Result]:
    mass = f.column("mass").swapaxes(-1, -2)
    out = {"mass": f.result(mass, ("item", "variant", "pair", "layer"), "share of the queries' attention", "Attention mass between groups of tokens", pair=pairs())}  # fmt: skip
    if not f.pathways:
        return out
    cut = f.column("cut")
    at = np.apply_along_axis(centre, -1, cut)
    at = np.where(np.abs(np.nan_to_num(cut)).max(-1) < FELT, NAN, at)
    notes = {"window": f.window}
    out["knockout"] = f.result(cut, ("item", "variant", "pathway", "layer"), KNOCKOUT, "Knock-outs of pathways", baseline=0.0, notes=notes)  # fmt: skip
    over = ("item", "variant", "pathway")
    out["carried"] = f.result(cut.mean(-1), over, f"{KNOCKOUT}, mean over layers", "What each pathway carries", baseline=0.0, notes=notes)  # fmt: skip
    out["centre"] = f.result(at, over, "layer (mean, weighted by the size of the change)", "Where each pathway matters", notes=notes)  # fmt: skip
    return out


def _rows(f: Found) -> dict[str, Result]:
    over = ("item", "variant")
    return {
        "tokens": f.result(f.column("video"), over, "video tokens", "Video tokens that are read"),
        "ran": f.result(f.column("ran"), (*over, "layer"), "share of vanilla's video tokens", "Video tokens that each layer runs", baseline=0.0),
    }  # fmt: skip


def _painted(f: Found) -> dict[str, Result]:
    first = {v: f.pieces[f.keys[0], v] for v in f.names}
    out: dict[str, Result] = {}
    for name, unit, title in (
        ("depth", "layers that ran the token", "Depth of every token"),
        ("left", "tokens a patch has (1: its own, 0: dropped)", "What is left of the video"),
    ):
        values = np.array([first[v][name] for v in f.names])
        grid = {a: list(range(n)) for a, n in zip(("frame", "row", "col"), values.shape[1:], strict=True)}
        out[name] = f.result(values, ("variant", "frame", "row", "col"), unit, title, baseline=0.0, notes={"item": f.keys[0]}, **grid)  # fmt: skip
    shape = dict(zip(("frame", "y", "x", "channel"), (list(range(n)) for n in f.frames.shape), strict=True))
    out["frames"] = f.result(f.frames, tuple(shape), "colour, 0..255", "The first question's frames", **shape)
    return out


def _costs(f: Found) -> dict[str, Result]:
    if f.costs is None:
        return {}
    values = np.array([f.costs[v] for v in f.names])
    axes, more = ("variant", "quantity", "source"), {"quantity": list(QUANTITIES), "source": list(SOURCES)}
    ratio = values / np.where(values[:1] == 0, NAN, values[:1])
    return {
        "costs": f.result(values, axes, "each in its own unit", "Costs of reading the first question", **more),
        "cost_ratios": f.result(ratio, axes, "times vanilla", "Costs in proportion to vanilla", baseline=1.0, **more),
    }  # fmt: skip
