"""Streams: run a prompt once and show every layer's rows to whoever asks, as they pass. Nothing is kept here.

Rows are named by their position in the sequence the decoder first reads, so that mechanisms which shorten or route the
stream in between stay right: a row that is gone is not shown. What a policy or a mechanism edits is shown edited.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lab.errors import UsageError
from lab.model.run import CURRENT, Call
from lab.side import Side
from lab.slots import ModelSizes, Plan, Step
from probes.asking import Case

Site = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
# layer (0-based), rows [kept, d_model], which of the positions asked for they are [kept]
See = Callable[[int, Tensor, Tensor], None]


def check_site(site: str, known: Sequence[str] = get_args(Site)) -> None:
    """Raises UsageError for an unknown site, naming the closest."""
    if site not in known:
        near = difflib.get_close_matches(str(site), known, n=1)
        raise UsageError(
            f"no site {site!r}{f'; closest: {near[0]}' if near else ''}; use one of {', '.join(known)}"
        )


def layers_asked(n_layers: int, layers: Sequence[int] | None) -> list[int]:
    """Layers as coordinates (1-based) -> as code counts them. Raises UsageError for one that is not there."""
    if layers is None:
        return list(range(n_layers))
    wrong = [i for i in layers if not isinstance(i, int) or not 1 <= i <= n_layers]
    if wrong or not layers:
        raise UsageError(
            f"layers {list(layers)}: the model has layers 1..{n_layers}; name at least one of them"
        )
    return sorted({i - 1 for i in layers})


@dataclass
class _Orders:
    """A detour that changes nothing: notes which rows enter and leave every layer."""

    before: dict[int, Tensor] = field(default_factory=dict)
    after: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, layer: int, step: Step, resid: Tensor, side: Side) -> tuple[Tensor, Side]:
        self.before[layer] = side.order
        resid, side = step(resid, side)
        self.after[layer] = side.order
        return resid, side

    def at(self, site: str, layer: int, n: int) -> Tensor:
        """Source positions of the rows that a site of this layer has now."""
        if site == "resid_post":
            return self.after[layer]
        call = CURRENT.get()
        if isinstance(call, Call):
            return call.side.order
        return self.after[layer - 1] if layer else torch.arange(n)


@dataclass(frozen=True)
class _Looking:
    """A mechanism of hooks only: stands last in the plan, so that it sees what others edited."""

    hooks: tuple[Any, ...]

    def plan(self, cfg: ModelSizes) -> Plan:
        return Plan(hooks=self.hooks)


@torch.no_grad()
def visit(
    model: Any, case: Case, site: str, layers: Sequence[int], positions: Tensor, see: See, *, policy: Any
) -> Tensor:
    """Run the case once; `see` gets the rows at every layer (0-based). Returns the last position's logits [d_vocab].

    Raises UsageError for a site this model's layers do not have.
    """
    orders = _Orders()

    def look(value: Tensor, hook: Any) -> None:
        layer = int(hook.name.split(".")[1])
        order = orders.at(site, layer, value.shape[1]).to(positions.device)
        place = torch.full((int(max(order.max(), positions.max())) + 1,), -1)
        place[order] = torch.arange(len(order))
        kept = (place[positions] >= 0).nonzero().squeeze(1)
        see(layer, value[0, place[positions[kept]].to(value.device)], kept)

    names = [f"blocks.{i}.hook_{site}" for i in layers]
    missing = [n for n in names if n not in model.hook_dict]
    if missing:
        raise UsageError(f"this model has no {missing[0]}; use site='resid_post'")
    ready = replace(case.ready, plan=Plan(detours=(orders,)) + case.ready.plan)
    looking = _Looking(tuple((n, look) for n in names))
    return model(ready, policy=policy, mechanisms=(*case.mechanisms, looking))[0, -1]
