"""The attention-edge engine: policies say which edges are cut; executors run them; counts and sweeps measure them.

    policy = lab.edges.Policy.from_dict({"format": "edge-policy/1", "cuts": [{"layers": "all", "q": "last", "k": "video"}]})
    logits = model(ready, policy=policy)

Names are fetched at their first use. Code inside the project imports from the modules themselves.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# name -> (module, attribute); an empty attribute hands out the module itself
_SURFACE = {
    "Cut": ("lab.edges.cuts", "Cut"),
    "Policy": ("lab.edges.policy", "Policy"),
    "Count": ("lab.edges.counting", "Count"),
    "Budget": ("lab.edges.searching", "Budget"),
    "Found": ("lab.edges.searching", "Found"),
    "evaluate": ("lab.edges.evidence", "evaluate"),
    "ladder": ("lab.edges.found", "ladder"),
    "overlap": ("lab.edges.evidence", "overlap"),
    "search": ("lab.edges.searching", "search"),
    "presets": ("lab.edges.presets", ""),
    "sweep": ("lab.edges.sweeping", "sweep"),
}

if TYPE_CHECKING:
    from lab.edges import presets
    from lab.edges.counting import Count
    from lab.edges.cuts import Cut
    from lab.edges.evidence import evaluate, overlap
    from lab.edges.found import ladder
    from lab.edges.policy import Policy
    from lab.edges.searching import Budget, Found, search
    from lab.edges.sweeping import sweep

__all__ = [
    "Budget", "Count", "Cut", "Found", "Policy", "evaluate", "ladder", "overlap", "presets", "search", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _SURFACE:
        raise AttributeError(f"module 'lab.edges' has no {name!r}; it has: {', '.join(sorted(_SURFACE))}")
    module, attribute = _SURFACE[name]
    found = importlib.import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_SURFACE})
