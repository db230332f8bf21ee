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
    "Mass": ("lab.edges.mass", "Mass"),
    "presets": ("lab.edges.presets", ""),
    "segment_mass": ("lab.edges.mass", "segment_mass"),
    "sweep": ("lab.edges.sweeping", "sweep"),
}

if TYPE_CHECKING:
    from lab.edges import presets
    from lab.edges.counting import Count
    from lab.edges.cuts import Cut
    from lab.edges.mass import Mass, segment_mass
    from lab.edges.policy import Policy
    from lab.edges.sweeping import sweep

__all__ = ["Count", "Cut", "Mass", "Policy", "presets", "segment_mass", "sweep"]


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
