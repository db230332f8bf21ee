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
    "Budget": ("lab.edges.budget", "Budget"),
    "Count": ("lab.edges.counting", "Count"),
    "Cut": ("lab.edges.cuts", "Cut"),
    "Found": ("lab.edges.searching", "Found"),
    "Mass": ("lab.edges.mass", "Mass"),
    "Policy": ("lab.edges.policy", "Policy"),
    "check_validated": ("lab.edges.validating", "check_validated"),
    "effective": ("lab.edges.from_sweep", "effective"),
    "evaluate": ("lab.edges.evidence", "evaluate"),
    "ladder": ("lab.edges.found", "ladder"),
    "overlap": ("lab.edges.evidence", "overlap"),
    "presets": ("lab.edges.presets", ""),
    "row_scores": ("lab.edges.subsets", "row_scores"),
    "scalars": ("lab.edges.scoring", "scalars"),
    "scores": ("lab.edges.scoring", "scores"),
    "search": ("lab.edges.searching", "search"),
    "search_gates": ("lab.edges.gates", "search_gates"),
    "segment_mass": ("lab.edges.mass", "segment_mass"),
    "sweep": ("lab.edges.sweeping", "sweep"),
    "train_gates": ("lab.edges.gates", "train_gates"),
    "unit_scores": ("lab.edges.subsets", "unit_scores"),
    "validate_scores": ("lab.edges.validating", "validate_scores"),
}

if TYPE_CHECKING:
    from lab.edges import presets
    from lab.edges.budget import Budget
    from lab.edges.counting import Count
    from lab.edges.cuts import Cut
    from lab.edges.evidence import evaluate, overlap
    from lab.edges.found import ladder
    from lab.edges.from_sweep import effective
    from lab.edges.gates import search_gates, train_gates
    from lab.edges.mass import Mass, segment_mass
    from lab.edges.policy import Policy
    from lab.edges.scoring import scalars, scores
    from lab.edges.searching import Found, search
    from lab.edges.subsets import row_scores, unit_scores
    from lab.edges.sweeping import sweep
    from lab.edges.validating import check_validated, validate_scores

__all__ = [
    "Budget",
    "Count",
    "Cut",
    "Found",
    "Mass",
    "Policy",
    "check_validated",
    "effective",
    "evaluate",
    "ladder",
    "overlap",
    "presets",
    "row_scores",
    "scalars",
    "scores",
    "search",
    "search_gates",
    "segment_mass",
    "sweep",
    "train_gates",
    "unit_scores",
    "validate_scores",
]


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
