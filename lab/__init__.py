"""See into video language models: load one, ask it about a video, trace where the answer comes from.

    import lab
    model = lab.load("tiny")
    answer = model.answer(lab.VideoQA("clip.mp4", "Which way does it move?", ("left", "right"), answer=0))

Names are fetched at their first use, so `import lab` and `vlab --help` load no torch. Code inside the project imports
from the modules themselves, never from here.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> (module, attribute); an empty attribute hands out the module itself
_SURFACE = {
    "load": ("lab.model.zoo", "load"),
    "wrap": ("lab.model.zoo", "wrap"),
    "VideoLLM": ("lab.model.videollm", "VideoLLM"),
    "VideoQA": ("lab.carriers", "VideoQA"),
    "Frames": ("lab.carriers", "Frames"),
    "TokenMap": ("lab.carriers", "TokenMap"),
    "Result": ("lab.result", "Result"),
    "Recipe": ("lab.recipe", "Recipe"),
    "load_items": ("lab.items", "load_items"),
    "about": ("lab.environment", "about"),
    "errors": ("lab.errors", ""),
    "edges": ("lab.edges", ""),
    "mechanisms": ("lab.mechanisms", ""),
    "apply": ("lab.edges.applying", "apply"),
    "explore": ("lab.app.explorer", "explore"),
    "compare": ("lab.comparison", "compare"),
}

if TYPE_CHECKING:
    from lab import edges, errors, mechanisms
    from lab.app.explorer import explore
    from lab.carriers import Frames, TokenMap, VideoQA
    from lab.comparison import compare
    from lab.edges.applying import apply
    from lab.environment import about
    from lab.items import load_items
    from lab.model.videollm import VideoLLM
    from lab.model.zoo import load, wrap
    from lab.recipe import Recipe
    from lab.result import Result

__all__ = [
    "Frames",
    "Recipe",
    "Result",
    "TokenMap",
    "VideoLLM",
    "VideoQA",
    "__version__",
    "about",
    "apply",
    "compare",
    "edges",
    "errors",
    "explore",
    "load",
    "load_items",
    "mechanisms",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _SURFACE:
        near = difflib.get_close_matches(name, _SURFACE, n=3)
        raise AttributeError(f"module 'lab' has no {name!r}; closest: {', '.join(near) or 'none'}")
    module, attribute = _SURFACE[name]
    found = importlib.import_module(module)
    value = getattr(found, attribute) if attribute else found
    globals()[name] = value  # asked once, then an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_SURFACE})
