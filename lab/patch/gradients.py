"""Attribution patching: the effect of every patch at once, to first order, from one backward pass (Nanda 2023).

effect of taking a row (or head) at a site  ~  (source value - own value) . d metric / d own value

With several steps the gradient is the mean over embeddings on the way from one world to the other, which sees what the
first order at one end does not (integrated gradients; EAP-IG, arXiv 2403.17806).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lab.errors import RunError, UsageError
from lab.patch.metrics import Score
from lab.patch.points import Held
from lab.patch.sites import EMBED, MAPS, STATE, check_site, hook_name, layers_with


def attribution_patch(
    worlds: Any, source: str, into: str, score: Score, *, site: str, steps: int = 1
) -> dict[int, Tensor]:
    """Layer (0-based) -> estimated change of the score by taking each row, [pos] or [pos, head], rows of `into`.

    steps  1: the gradient where `into` stands; more: its mean over so many points on the way to `source`, one backward
           pass each. DeepStack's additions stay those of `into` on the way
    Raises UsageError for steps below 1; RunError where mechanisms drop rows differently in the two worlds.
    """
    if check_site(site) in MAPS:
        raise RunError(
            f"no attribution patching at {site!r}: a pattern of another world is not a small step; use 'z'"
        )
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    layers = layers_with(worlds.model, site, None)
    names = {hook_name(site, layer): layer for layer in layers}
    deep = _deep(worlds, source, into) if site in STATE else []
    # the gradient of an addition is that of what it is added to
    later = {hook_name("resid_post", i) for i in range(len(deep))}
    watched = [n for n in dict.fromkeys((*names, *later)) if n in worlds.model.hook_dict]
    held: Held = {}
    door = hook_name(EMBED, 0)
    with torch.no_grad():
        worlds.forward([source], (), held, "last", {n: [source] for n in (*names, door)})
        worlds.forward([into], (), held, "last", {n: [into] for n in (*watched, door)})
    own = {n: held[(n, into)].order for n in watched}
    found = _gradients(worlds, into, score, own, _ways(held, source, into, steps))
    out = {layer: _effect(held, name, source, into, found[name]) for name, layer in names.items()}
    for layer in out:
        for i in range(layer, len(deep)):  # what a state brings along (see `lab.patch.edits.take`)
            grad = found.get(hook_name("resid_post", i))
            if grad is not None:
                out[layer] = out[layer] + (deep[i] * grad).sum(-1).float().cpu()
    return out


def _ways(held: Held, source: str, into: str, steps: int) -> list[Tensor]:
    """Embeddings [1, pos, d_model] at which gradients are taken."""
    door = hook_name(EMBED, 0)
    own, theirs = held[(door, into)].own, held[(door, source)].own
    if steps == 1:
        return [own[None]]
    if own.shape != theirs.shape:
        raise RunError(
            f"the worlds enter the decoder with {len(own)} and {len(theirs)} rows; there is no way between them: steps=1"
        )
    return [torch.lerp(own, theirs, (i + 0.5) / steps)[None] for i in range(steps)]


def _gradients(
    worlds: Any, into: str, score: Score, orders: Mapping[str, Tensor], ways: Sequence[Tensor]
) -> dict[str, Tensor | None]:
    """Hook point -> mean gradient of the score with respect to what passes there, [pos, ...]; None if it plays no part.

    orders  the hook points, and the rows that pass there in the world as it is
    """
    total: dict[str, Tensor | None] = dict.fromkeys(orders)
    for embeds in ways:
        held: Held = {}
        # weights are frozen in loaded models: the graph begins at the embeddings
        with torch.enable_grad(), worlds.model.hooks([(hook_name(EMBED, 0), _Leaf(embeds))]):
            logits = worlds.forward([into], (), held, "last", {n: [into] for n in orders})
            passed = [held[(n, into)] for n in orders]
            grads = torch.autograd.grad(score(logits[0, -1]), [p.value for p in passed], allow_unused=True)
        for name, one, grad in zip(orders, passed, grads, strict=True):
            if not torch.equal(one.order, orders[name]):
                raise RunError(
                    f"on the way between the worlds other rows pass {name}: a mechanism chooses them by content; steps=1"
                )
            if grad is not None:
                before = total[name]
                share = grad[one.at] / len(ways)
                total[name] = share if before is None else before + share
    return total


class _Leaf:
    """Puts these embeddings in, as the leaf that gradients are taken to."""

    def __init__(self, embeds: Tensor) -> None:
        self.embeds = embeds

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        return self.embeds.detach().clone().requires_grad_(True)


def _effect(held: Held, name: str, source: str, into: str, grad: Tensor | None) -> Tensor:
    theirs, own = held[(name, source)], held[(name, into)]
    if not torch.equal(theirs.order, own.order):
        raise RunError(
            f"the worlds hold {len(theirs.order)} and {len(own.order)} rows at {name}, not the same ones: a mechanism drops "
            "rows by content; use exact patching"
        )
    if grad is None:
        return torch.zeros(own.own.shape[:-1])
    return ((theirs.own - own.own) * grad).sum(-1).float().cpu()


def _deep(worlds: Any, source: str, into: str) -> list[Tensor]:
    theirs, own = (worlds.arrive(w)[0].deep for w in (source, into))
    return [a[0] - b[0] for a, b in zip(theirs, own, strict=True)]
