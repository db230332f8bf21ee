"""Attention mass: how much of its queries' attention a unit gets. A baseline for pruning, never our scorer.

Mass is not effect: a head may look where it reads nothing, and sinks draw mass that carries nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from lab.edges.fingerprints import ModelInfo
from lab.edges.policy import Policy
from lab.edges.trials import Trials
from lab.edges.units import Grain, Unit, cuts_of, split, units_of
from lab.errors import TooBig, UsageError
from lab.model.ready import Ready

MOST = 16  # prompts looked at: patterns are L x L


@torch.no_grad()
def mass_of(model: Any, readies: Sequence[Ready], units: Sequence[Unit]) -> dict[Unit, float]:
    """Mean over samples, heads and query rows of the share of attention that each unit's keys get."""
    trials, nothing = Trials(model, list(readies)[:MOST]), Policy(cuts=())
    check_room(model, max(g.bound.n for g in trials.grids))
    total = dict.fromkeys(units, 0.0)
    by_layer: dict[int, list[Unit]] = {}
    for u in units:
        by_layer.setdefault(u.layer, []).append(u)
    for ready, grid in zip(trials.readies, trials.grids, strict=True):

        def look(pattern: Tensor, hook: Any, grid: Any = grid) -> None:
            for u in by_layer[int(hook.name.split(".")[1])]:
                total[u] += _share(pattern[0], grid.mask(u.edges), u.heads)

        hooks = [(f"blocks.{layer}.attn.hook_pattern", look) for layer in by_layer]
        with model.hooks(fwd_hooks=hooks):
            model(ready, policy=nothing)
    return {u: t / len(trials) for u, t in total.items()}


def check_room(model: Any, n: int) -> None:
    """Raises TooBig if one layer's pattern, scores and their softmax in float32 would take most of free memory."""
    need = 3 * 4 * model.cfg.n_heads * n * n
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    if need > free // 2:
        raise TooBig(
            f"attention of {n:,} positions takes {need:,} bytes a layer, {free:,} are free; use fewer frames"
        )


def _share(pattern: Tensor, mask: Tensor, heads: tuple[int, ...]) -> float:
    rows = mask.any(-1)
    if not bool(rows.any()):
        return 0.0
    seen = pattern[list(heads)] if heads else pattern
    on = mask.to(seen.device)
    return float((seen * on).sum(-1)[:, rows.to(seen.device)].float().mean())


def most_attended(
    model: Any, readies: Sequence[Ready], keep: float, *, grain: Grain = "distance", roles: Any = "all"
) -> Policy:
    """The policy that keeps the units with most attention, as many as make up the share `keep` of all edges."""
    if not 0 <= keep <= 1:
        raise UsageError(f"keep must be a share of the edges, 0 to 1, got {keep}")
    n, heads = model.cfg.n_layers, model.cfg.n_heads
    base = units_of([r.maps[0] for r in readies], n, roles, "distance" if grain == "distance" else "pair")
    units = [
        p for u in base for p in (split(u, "head", n_heads=heads, n_options=0) if grain == "head" else [u])
    ]
    mass, trials = mass_of(model, readies, units), Trials(model, readies)
    weight = {u: trials.weight([u]) for u in units}
    left, cut = keep * sum(weight.values()), list[Unit]()
    for u in sorted(units, key=lambda u: (-mass[u], u)):
        if weight[u] <= left + 1e-6:
            left -= weight[u]
        else:
            cut.append(u)
    info = ModelInfo(layers=n, heads=heads if grain == "head" else None)
    return Policy(name="attention-mass", model=info, cuts=cuts_of(cut))
