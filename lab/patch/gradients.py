"""Attribution patching: the effect of every patch at once, to first order, from backward passes (Nanda 2023).

effect of taking a row (or head) at a site  ~  (source value - own value) . d metric / d own value

That is exact for small differences only. A twin is far away: on the bundled model the effect of a part of the patch bends,
and often turns round, within its first tenth, since attention and answer are saturated where the world stands. Several
steps take the mean gradient on the way to the source (integrated gradients; EAP-IG, arXiv 2403.17806, section 3):

path "inputs"        all embeddings move; the values patched differ from those on the way, so nothing adds up exactly
path "activations"   the site's own values move, layer by layer: over all rows of a layer's stream the estimates then sum to
                     the whole difference between the worlds

What no step mends: rows move together on either path, and where several do one job (frames of one motion) a row taken alone
does less, or more, than its share. AtP*'s (arXiv 2403.00745) exact softmax for queries and keys is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lab.errors import RunError, UsageError
from lab.patch.metrics import Score
from lab.patch.points import Held
from lab.patch.sites import EMBED, MAPS, STATE, check_site, hook_name, layers_with

Path = Literal["inputs", "activations"]


def attribution_patch(
    worlds: Any, source: str, into: str, score: Score, *, site: str, steps: int = 1, path: Path = "inputs"
) -> dict[int, Tensor]:
    """Layer (0-based) -> estimated change of the score by taking each row, [pos] or [pos, head], rows of `into`.

    steps  1: the gradient where `into` stands, whatever the path; more: its mean over so many points on the way to `source`
    path   see above; `passes` says how many forward and backward passes it takes
    Raises UsageError for steps below 1 or an unknown path; RunError where mechanisms drop rows differently in the two worlds.
    """
    if check_site(site) in MAPS:
        raise RunError(
            f"no attribution patching at {site!r}: a pattern of another world is not a small step; use 'z'"
        )
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    if path not in get_args(Path):
        raise UsageError(f"path={path!r}; use one of {', '.join(get_args(Path))}")
    layers = layers_with(worlds.model, site, None)
    names = {layer: hook_name(site, layer) for layer in layers}
    deep = _deep(worlds, source, into) if steps > 1 or site in STATE else []
    # the gradient of an addition is that of what it is added to
    later = [hook_name("resid_post", i) for i in range(len(deep))] if site in STATE else []
    watched = [n for n in dict.fromkeys((*names.values(), *later)) if n in worlds.model.hook_dict]
    held: Held = {}
    door = hook_name(EMBED, 0)
    with torch.no_grad():
        worlds.forward([source], (), held, "last", {n: [source] for n in (*names.values(), door)})
        worlds.forward([into], (), held, "last", {n: [into] for n in (*watched, door)})
    own = {n: held[(n, into)].order for n in watched}
    move = _Move(worlds, source, into, score, held, deep, steps)
    if path == "inputs" or steps == 1 or site == EMBED:
        once = move.gradients(door, 0, own)
        found = dict.fromkeys(layers, once)
    else:
        brought = {n: own[n] for n in later if n in own}
        found = {
            i: move.gradients(name, i, {name: own[name], **brought}, site in STATE)
            for i, name in names.items()
        }
    return {i: _effect(held, name, source, into, found[i], deep, i, later) for i, name in names.items()}


def passes(model: Any, site: str, steps: int, path: Path) -> int:
    """Forward and backward passes that `attribution_patch` takes, beside one plain run of each world."""
    if path == "inputs" or steps == 1:
        return steps
    return steps * len(layers_with(model, site, None))


@dataclass(frozen=True)
class _Move:
    """The way from one world to another, on which gradients are taken. `held` has both ends; `deep` their difference."""

    worlds: Any
    source: str
    into: str
    score: Score
    held: Held
    deep: list[Tensor]
    steps: int

    def gradients(
        self, start: str, layer: int, orders: Mapping[str, Tensor], state: bool = True
    ) -> dict[str, Tensor | None]:
        """Hook point -> mean gradient of the score with respect to what passes there, [pos, ...]; None: plays no part.

        start   the point whose values move; state: with them the DeepStack additions from `layer` (0-based) on
        orders  the hook points, and the rows that pass there in the world as it is
        """
        total: dict[str, Tensor | None] = dict.fromkeys(orders)
        for t in self._times(start):
            hooks = [(start, _Leaf(self._between(start, t)))]
            if state and t:
                hooks += [
                    (hook_name("resid_post", i), _Shift(t * self.deep[i]))
                    for i in range(layer, len(self.deep))
                ]
            for name, grad in self._once(hooks, orders).items():
                if grad is not None:
                    before, share = total[name], grad / self.steps
                    total[name] = share if before is None else before + share
        return total

    def _times(self, start: str) -> list[float]:
        if self.steps == 1:
            return [0.0]
        theirs, own = self.held[(start, self.source)], self.held[(start, self.into)]
        if not torch.equal(theirs.order, own.order):
            raise RunError(
                f"{len(own.order)} and {len(theirs.order)} rows of the worlds pass {start}, not the same ones; there is no way "
                "between them: steps=1"
            )
        return [(i + 0.5) / self.steps for i in range(self.steps)]

    def _between(self, start: str, t: float) -> Tensor:
        own = self.held[(start, self.into)].own
        return (torch.lerp(own, self.held[(start, self.source)].own, t) if t else own)[None]

    def _once(
        self, hooks: Sequence[tuple[str, Any]], orders: Mapping[str, Tensor]
    ) -> dict[str, Tensor | None]:
        held: Held = {}
        # weights are frozen in loaded models: the graph begins at the leaf
        with torch.enable_grad(), self.worlds.model.hooks(hooks):
            logits = self.worlds.forward([self.into], (), held, "last", {n: [self.into] for n in orders})
            passed = {n: held[(n, self.into)] for n in orders}
            for name, one in passed.items():
                if not torch.equal(one.order, orders[name]):
                    raise RunError(
                        f"on the way between the worlds other rows pass {name}: a mechanism chooses them by content; steps=1"
                    )
            inside = {
                n: p for n, p in passed.items() if p.value.requires_grad
            }  # the others lie before the leaf
            grads = torch.autograd.grad(
                self.score(logits[0, -1]), [p.value for p in inside.values()], allow_unused=True
            )
        return {n: None if g is None else g[inside[n].at] for n, g in zip(inside, grads, strict=True)}


class _Shift:
    """Adds to what passes."""

    def __init__(self, by: Tensor) -> None:
        self.by = by

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        return value + self.by.to(value)


class _Leaf:
    """Puts these embeddings in, as the leaf that gradients are taken to."""

    def __init__(self, embeds: Tensor) -> None:
        self.embeds = embeds

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        return self.embeds.detach().clone().requires_grad_(True)


def _effect(
    held: Held, name: str, source: str, into: str, found: Mapping[str, Tensor | None], deep: Sequence[Tensor], layer: int,
    later: Sequence[str],
) -> Tensor:  # fmt: skip
    """What taking each row does by these gradients, with what a state brings along (see `lab.patch.edits.take`)."""
    theirs, own = held[(name, source)], held[(name, into)]
    if not torch.equal(theirs.order, own.order):
        raise RunError(
            f"the worlds hold {len(theirs.order)} and {len(own.order)} rows at {name}, not the same ones: a mechanism drops "
            "rows by content; use exact patching"
        )
    grad = found[name]
    if grad is None:
        return torch.zeros(own.own.shape[:-1])
    out = ((theirs.own - own.own) * grad).sum(-1).float().cpu()
    for i in range(layer, len(later)):
        grad = found.get(later[i])
        if grad is not None:
            out = out + (deep[i] * grad).sum(-1).float().cpu()
    return out


def _deep(worlds: Any, source: str, into: str) -> list[Tensor]:
    theirs, own = (worlds.arrive(w)[0].deep for w in (source, into))
    return [a[0] - b[0] for a, b in zip(theirs, own, strict=True)]
