"""Attribution patching: the effect of every patch at once, to first order, from one backward pass (Nanda 2023).

effect of taking a row (or head) at a site  ~  (source value - own value) . d metric / d own value
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lab.errors import RunError
from lab.patch.metrics import Score
from lab.patch.points import Held
from lab.patch.sites import MAPS, STATE, check_site, hook_name, layers_with


def attribution_patch(worlds: Any, source: str, into: str, score: Score, *, site: str) -> dict[int, Tensor]:
    """Layer (0-based) -> estimated change of the score by taking each row, [pos] or [pos, head], rows of `into`.

    Raises RunError where mechanisms drop rows differently in the two worlds.
    """
    if check_site(site) in MAPS:
        raise RunError(
            f"no attribution patching at {site!r}: a pattern of another world is not a small step; use 'z'"
        )
    layers = layers_with(worlds.model, site, None)
    names = {hook_name(site, layer): layer for layer in layers}
    deep = _deep(worlds, source, into) if site in STATE else []
    later = {
        hook_name("resid_post", i) for i in range(len(deep))
    }  # the gradient is that of what is added to it
    held: Held = {}
    with torch.no_grad():
        worlds.forward([source], (), held, "last", {n: [source] for n in names})
    # weights are frozen in loaded models: the graph begins at the embeddings
    with torch.enable_grad(), worlds.model.hooks([("embed.hook_out", _leaf)]):
        logits = worlds.forward([into], (), held, "last", {n: [into] for n in (*names, *later)})
        watched = [n for n in dict.fromkeys((*names, *later)) if n in worlds.model.hook_dict]
        values = [held[(n, into)].value for n in watched]
        grads = torch.autograd.grad(score(logits[0, -1]), values, allow_unused=True)
    found = dict(zip(watched, grads, strict=True))
    out = {layer: _effect(held, name, source, into, found[name]) for name, layer in names.items()}
    for layer in out:
        for i in range(layer, len(deep)):  # what a state brings along (see `lab.patch.edits.take`)
            grad = found.get(hook_name("resid_post", i))
            out[layer] = out[layer] + (0.0 if grad is None else (deep[i] * grad[0]).sum(-1))
    return out


def _leaf(value: Tensor, hook: Any) -> Tensor:
    return value.detach().requires_grad_(True)


def _effect(held: Held, name: str, source: str, into: str, grad: Tensor | None) -> Tensor:
    theirs, own = held[(name, source)], held[(name, into)]
    if not torch.equal(theirs.order, own.order):
        raise RunError(
            f"the worlds hold {len(theirs.order)} and {len(own.order)} rows at {name}, not the same ones: a mechanism drops "
            "rows by content; use exact patching"
        )
    if grad is None:
        return torch.zeros(own.own.shape[:-1])
    return ((theirs.own - own.own.detach()) * grad[own.at]).sum(-1).float().cpu()


def _deep(worlds: Any, source: str, into: str) -> list[Tensor]:
    theirs, own = (worlds.arrive(w)[0].deep for w in (source, into))
    return [a[0] - b[0] for a, b in zip(theirs, own, strict=True)]
