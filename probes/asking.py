"""What probes share: items made ready, and the recipe fields that say which model, items, policy and frames."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from lab.carriers import TokenMap, VideoQA
from lab.edges.policy import Policy
from lab.edges.segments import segment
from lab.edges.sweeping import _keys as item_keys
from lab.errors import ConfigError, UsageError
from lab.items import load_items, spec_of
from lab.mechanisms import of_plain, plain
from lab.model.ready import Ready
from lab.model.zoo import load, weights_hash
from lab.recipe import ItemsSpec, ModelSpec
from lab.recipe import Recipe as Owner  # not listed among the recipes that can be run
from lab.runs import Ledger
from lab.slots import Plan, plan_of


def load_spec(spec: ModelSpec) -> Any:
    """The model a recipe names. Raises ConfigError if its weights are not the ones the recipe was made with."""
    have = weights_hash(spec.name) if spec.weights else None
    if spec.weights and have != spec.weights:
        raise ConfigError(
            f"weights of {spec.name} have hash {have}, the recipe was made with {spec.weights}; get those"
        )
    dtype, device = (None if v == "auto" else v for v in (spec.dtype, spec.device))
    return load(spec.name, dtype=dtype, device=device, revision=spec.revision)


def _known(mechanisms: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    try:
        _ = [of_plain(m) for m in mechanisms]
    except ConfigError as e:
        raise ValueError(str(e)) from None
    return mechanisms


# Mechanisms that are on in every run, as `lab.mechanisms.plain` writes them, e.g. {mechanism: vidkv.VidKV}.
MechanismSpecs = Annotated[tuple[dict[str, Any], ...], AfterValidator(_known)]


def prepared(recipe: Any, model: Any, items: Sequence[VideoQA] | None = None) -> list[Ready]:
    """The recipe's items made ready, each by its own sampling or `n_frames`, with the recipe's mechanisms.

    Raises ConfigError if a file changed.
    """
    items = load_items(recipe.items, base=recipe.folder) if items is None else items
    specs = recipe.items if isinstance(recipe.items, tuple) else (None,) * len(items)
    on = tuple(of_plain(m) for m in recipe.mechanisms)
    how = [(s.video.sampling() if s else {}) or {"n_frames": recipe.n_frames} for s in specs]
    return [model.prepare(i, **h, mechanisms=on) for i, h in zip(items, how, strict=True)]


class ProbeRecipe(Owner):
    """Fields every probe's recipe has. `n_frames` holds for items that do not say their own; policy: an edge policy."""

    model: ModelSpec = ModelSpec()
    items: ItemsSpec
    n_frames: int = Field(default=8, ge=1)
    policy: dict[str, Any] | None = None
    mechanisms: MechanismSpecs = ()
    added: ClassVar[tuple[str, ...]] = ("mechanisms",)

    def questions(self) -> list[VideoQA]:
        """The recipe's items. Raises ConfigError if a file changed."""
        return load_items(self.items, base=self.folder)

    def on(self) -> tuple[Any, ...]:
        """The recipe's mechanisms."""
        return tuple(of_plain(m) for m in self.mechanisms)

    def ready(self, model: Any = None) -> tuple[Any, list[Ready]]:
        """The recipe's model (or `model`), and its items ready to run. Raises ConfigError if a file changed."""
        model = model or load_spec(self.model)
        return model, prepared(self, model)

    def edge_policy(self) -> Policy | None:
        """The recipe's policy. Raises ConfigError if it is none."""
        return None if self.policy is None else Policy.from_dict(self.policy, "policy")

    def asked(self, model: Any) -> Asked:
        """The recipe's model (or `model`), items and policy, ready to run. Raises ConfigError if a file changed."""
        model, ready = self.ready(model)
        return asked(
            model, ready, n_frames=self.n_frames, policy=self.edge_policy(), mechanisms=(), twins=False
        )


@dataclass(frozen=True)
class Case:
    """One item ready to run: its key, the token map the decoder will read, and how to run it."""

    key: str
    ready: Ready
    item: VideoQA | None
    tokens: TokenMap
    mechanisms: tuple[Any, ...]

    def at(self, name: str) -> Any:
        """Positions of a segment. Raises UsageError if this prompt has none of it."""
        return segment(self.tokens, name, self.item)


@dataclass(frozen=True)
class Asked:
    """A model and the cases it is asked, with the policy that holds in all of them."""

    model: Any
    cases: tuple[Case, ...]
    policy: Any
    tower_calls: int = 0  # of the model, before

    def ledger(self, forwards: int) -> dict[str, Any]:
        """What was spent since: full forwards, and runs of the vision tower."""
        return Ledger(forwards, forwards, self.model.tower_calls - self.tower_calls).plain()

    @property
    def keys(self) -> list[str]:
        """Names of the items, each its own."""
        return [c.key for c in self.cases]


def asked(
    model: Any, items: Any, *, n_frames: int, policy: Any, mechanisms: Sequence[Any], twins: bool
) -> Asked:  # fmt: skip
    """Items (VideoQA or Ready, one or several) made ready; with `twins`, every item is followed by its twin.

    Raises UsageError if there are none, for several worlds in one Ready, and for an item without a twin.
    """
    given, calls = list(items) if isinstance(items, list | tuple) else [items], model.tower_calls
    if not given:
        raise UsageError("nothing to do: 0 items")
    if twins:
        given = [one for item in given for one in _pair(item)]
    ready = [_ready(model, i, n_frames, tuple(mechanisms)) for i in given]
    keys = item_keys([r.item for r, _ in ready])
    cases = tuple(Case(k, r, r.item, _map(model, r, m), m) for k, (r, m) in zip(keys, ready, strict=True))
    return Asked(model, cases, model.pruning.chosen(policy), calls)


def _pair(item: Any) -> tuple[VideoQA, VideoQA]:
    item = item.item if isinstance(item, Ready) else item
    if not isinstance(item, VideoQA) or item.twin is None:
        raise UsageError("twins=True needs items with a twin: those of lab.sim have one")
    return item, item.twin


def _ready(
    model: Any, item: Any, n_frames: int, mechanisms: tuple[Any, ...]
) -> tuple[Ready, tuple[Any, ...]]:
    """What is prepared here carries the mechanisms itself (they may choose frames); what comes ready is run with them."""
    if not isinstance(item, Ready | VideoQA):
        raise UsageError(f"items are VideoQA or Ready, got {type(item).__name__}")
    ready, rest = (
        (item, mechanisms)
        if isinstance(item, Ready)
        else (model.prepare(item, n_frames, mechanisms=mechanisms), ())
    )
    if ready.n_worlds != 1:
        raise UsageError(f"a probe takes one world at a time, got {ready.n_worlds}; prepare them one by one")
    return ready, rest


def _map(model: Any, ready: Ready, mechanisms: tuple[Any, ...]) -> TokenMap:
    """The map of what the decoder reads: that of the prompt, unless a mechanism lays it out anew."""
    plan = ready.plan + plan_of(mechanisms, model.sizes)
    if not (plan.encoder or plan.stages or plan.layout):
        return ready.tokens
    with model.lock.shared():
        return model.arrive(ready, plan)[1][0]


def recipe_fields(
    model: Any, items: Any, n_frames: int, policy: Any, mechanisms: Sequence[Any]
) -> dict[str, Any] | None:
    """Fields of a ProbeRecipe, or None where something cannot be named again: arrays as videos, wrapped models,
    mechanisms that are on no shelf or came with a Ready, policies that are no `lab.edges.Policy`."""
    given = list(items) if isinstance(items, list | tuple) else [items]
    asked_of = [i.item if isinstance(i, Ready) else i for i in given]
    if not getattr(model, "spec", None) or not isinstance(policy, Policy | None):
        return None
    if any(i is None or not isinstance(i.video, str) for i in asked_of):
        return None
    if any(isinstance(i, Ready) and i.plan != Plan() for i in given):
        return None
    try:
        on = tuple(_plain(m) for m in mechanisms)
    except UsageError:
        return None
    how = [i.sampling if isinstance(i, Ready) else {} for i in given]
    specs = tuple(spec_of(i, **s) for i, s in zip(asked_of, how, strict=True) if i is not None)
    rules = None if policy is None else policy.to_dict()
    return {
        "model": ModelSpec(**model.spec),
        "items": specs,
        "n_frames": n_frames,
        "policy": rules,
        "mechanisms": on,
    }


def _plain(mechanism: Any) -> dict[str, Any]:
    """As a recipe holds it. Raises UsageError for one that is on no shelf, or holds more than plain data."""
    try:
        return json.loads(json.dumps(plain(mechanism)))
    except TypeError as e:
        raise UsageError(f"{type(mechanism).__name__} cannot be written down: {e}") from None
