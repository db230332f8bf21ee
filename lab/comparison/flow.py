"""Where information flows: attention mass between groups of tokens, and what knock-outs of pathways do, layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.carriers import TokenMap
from lab.edges.mass import partition, segment_mass
from lab.edges.pathways import cut_mask
from lab.edges.sweeping import sweep
from lab.errors import LabWarning, UsageError
from lab.model.ready import Ready

OWN, EARLIER = "own frame", "earlier frames"
READERS = ("video", "question", "option", "last")
SOURCES = (OWN, EARLIER, "video", "question", "option", "other text", "last")


def pairs() -> list[str]:
    """Names of the pairs of groups that attention goes between, "keys->queries"."""
    frames = [f"{k}->video" for k in (OWN, EARLIER, "other text")]
    return [*frames, *(f"{k}->{q}" for q in READERS[1:] for k in SOURCES[2:] if k == q or _before(k, q))]


def _before(key: str, query: str) -> bool:
    order = ("other text", "video", "question", "option", "last")
    return order.index(key) < order.index(query)


def mass(model: Any, ready: Ready) -> NDArray[Any]:
    """[layer, pair]: share of their attention that the queries of a pair give to its keys, mean over rows and heads."""
    found = segment_mass(model, ready, partition(model.maps(ready)[0]))
    of = [_group(name) for name in found.names]
    out = [_pair(found, of, *pair.split("->")) for pair in pairs()]
    return torch.stack(out, 1).numpy()


def _group(segment: str) -> str:
    role, colon, _ = segment.partition(":")
    known = {
        "frame": segment if colon else "video",
        "option": "option",
        "question": "question",
        "last": "last",
    }
    return known.get(role, "other text")


def _pair(found: Any, of: Sequence[str], key: str, query: str) -> Tensor:
    """[layer]: nan where no layer ran a row of the queries."""
    queries = [i for i, g in enumerate(of) if _is(g, query)]
    total = torch.zeros(found.sums.shape[0], dtype=torch.float64)
    for i in queries:
        keys = [j for j, g in enumerate(of) if _reads(of[i], g, key, i, j)]
        total += found.sums[:, :, i][:, :, keys].nan_to_num(0.0).sum(-1).mean(1)
    return total / found.n_ran[:, queries].sum(1).double()


def _is(group: str, name: str) -> bool:
    return group == name or (name == "video" and group.startswith("frame:"))


def _reads(query: str, group: str, key: str, i: int, j: int) -> bool:
    if key == OWN:
        return i == j
    if key == EARLIER:
        return _is(group, "video") and i != j
    return _is(group, key)


# ---- knock-outs -----------------------------------------------------------------------------------------------------


def knocked(model: Any, ready: Ready, pathways: Sequence[str], window: int) -> list[list[float]]:
    """[pathway][layer]: change of the answer's probability in percent when the pathway is cut round a layer.

    nan for a pathway this prompt has no tokens for (a mechanism may have dropped them).
    """
    tokens = model.maps(ready)[0]
    here = [p for p in pathways if _exists(tokens, p, ready.item)]
    curves: dict[str, list[float]] = {}
    if here:
        with (
            warnings.catch_warnings()
        ):  # a pathway that changes nothing is a finding here, shown as a curve at 0
            warnings.simplefilter("ignore", LabWarning)
            found = sweep(model, ready, here, window=window, show_progress=False)
        curves = dict(zip(here, found.values[0].tolist(), strict=True))
    nothing = [float("nan")] * int(model.cfg.n_layers)
    return [curves.get(p, nothing) for p in pathways]


def _exists(tokens: TokenMap, pathway: str, item: Any) -> bool:
    try:
        return bool(cut_mask(tokens, pathway, item).any())
    except UsageError:
        return False


def centre(curve: NDArray[Any]) -> float:
    """The layer (1-based) round which a curve of changes lies: mean layer, weighted by the size of the change; nan at 0."""
    size = np.abs(np.nan_to_num(curve))
    return float((size * np.arange(1, len(curve) + 1)).sum() / size.sum()) if size.sum() > 0 else float("nan")
