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
    "presets": ("lab.edges.presets", ""),
    "sweep": ("lab.edges.sweeping", "sweep"),
    "scores": ("lab.edges.scoring", "scores"),
    "scalars": ("lab.edges.scoring", "scalars"),
    "unit_scores": ("lab.edges.subsets", "unit_scores"),
    "row_scores": ("lab.edges.subsets", "row_scores"),
    "validate_scores": ("lab.edges.validating", "validate_scores"),
    "check_validated": ("lab.edges.validating", "check_validated"),
}

if TYPE_CHECKING:
    from lab.edges import presets
    from lab.edges.counting import Count
    from lab.edges.cuts import Cut
    from lab.edges.policy import Policy
    from lab.edges.scoring import scalars, scores
    from lab.edges.subsets import row_scores, unit_scores
    from lab.edges.sweeping import sweep
    from lab.edges.validating import check_validated, validate_scores

__all__ = [
    "Count", "Cut", "Policy", "check_validated", "presets", "row_scores", "scalars", "scores", "sweep", "unit_scores",
    "validate_scores",
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
