"""What probes share: items made ready, and the recipe fields that say which model, items, policy and frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.carriers import TokenMap, VideoQA
from lab.edges.policy import Policy
from lab.edges.segments import segment
from lab.edges.sweeping import _keys as item_keys
from lab.errors import UsageError
from lab.items import load_items, spec_of
from lab.model.ready import Ready
from lab.recipe import ItemSpec, ItemsSpec, ModelSpec
from lab.recipe import Recipe as Owner  # not listed among the recipes that can be run
from lab.runs import Ledger
from lab.slots import plan_of


class ProbeRecipe(Owner):
    """Fields every probe's recipe has. `n_frames` holds for items that do not say their own; policy: an edge policy."""

    model: ModelSpec = ModelSpec()
    items: ItemsSpec
    n_frames: int = 8
    policy: dict[str, Any] | None = None

    def asked(self, model: Any) -> Asked:
        """The recipe's model (or `model`), items and policy, ready to run. Raises ConfigError if a file changed."""
        from probes.knockout import load_spec

        model = model or load_spec(self.model)
        listed = isinstance(self.items, tuple)
        source = (
            [s.model_dump(mode="json") for s in self.items] if isinstance(self.items, tuple) else self.items
        )
        items = load_items(source, base=self.folder)
        specs: Sequence[ItemSpec | None] = (
            self.items if isinstance(self.items, tuple) and listed else [None] * len(items)
        )
        ready = [
            model.prepare(i, **((s.video.sampling() if s else {}) or {"n_frames": self.n_frames}))
            for i, s in zip(items, specs, strict=True)
        ]
        policy = None if self.policy is None else Policy.from_dict(self.policy, "policy")
        return asked(model, ready, n_frames=self.n_frames, policy=policy, mechanisms=(), twins=False)


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
    mechanisms, policies that are no `lab.edges.Policy`."""
    given = list(items) if isinstance(items, list | tuple) else [items]
    asked_of = [i.item if isinstance(i, Ready) else i for i in given]
    if not getattr(model, "spec", None) or mechanisms or not isinstance(policy, Policy | None):
        return None
    if any(i is None or not isinstance(i.video, str) for i in asked_of):
        return None
    how = [i.sampling if isinstance(i, Ready) else {} for i in given]
    specs = tuple(spec_of(i, **s) for i, s in zip(asked_of, how, strict=True) if i is not None)
    rules = None if policy is None else policy.to_dict()
    return {"model": ModelSpec(**model.spec), "items": specs, "n_frames": n_frames, "policy": rules}
