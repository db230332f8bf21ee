"""Windows: which layers are cut at each point of a sweep. Layers are 0-based here, 1-based in coordinates. Torch-free."""

from __future__ import annotations

from typing import Literal

Style = Literal["center", "shift", "inverse", "top_down", "bottom_up", "triangle"]
WINDOW = 9


def window_for(n_layers: int) -> int:
    """Layers cut at a time when nobody says: 9, in small models an odd number near a third of the layers."""
    return min(WINDOW, n_layers // 3 // 2 * 2 + 1)


def layers_of(centre: int, window: int, n_layers: int) -> range:
    """Layers of the window round `centre`, clipped at the ends (the paper's rule, notes A2)."""
    return range(max(0, centre - window // 2), min(n_layers, centre + (window + 1) // 2))


def styled(style: Style, centre: int, window: int, n_layers: int) -> list[int]:
    """Layers cut for the point `centre` of a style with one point a layer."""
    inside = layers_of(centre, window, n_layers)
    match style:
        case "center":
            return list(inside)
        case "shift":
            first = max(0, min(inside.start, n_layers - window))
            return list(range(first, min(n_layers, first + window)))
        case "inverse":
            return [i for i in range(n_layers) if i not in inside]
        case "top_down":
            return list(range(centre, n_layers))
        case "bottom_up":
            return list(range(centre + 1))
        case "triangle":
            raise AssertionError("a triangle has a point for every pair of layers")


def layer_axes(style: Style, n_layers: int) -> dict[str, list[int]]:
    """Names and coordinates of the axes along which layers vary: "layer", or "first" and "last" of a triangle."""
    every = list(range(1, n_layers + 1))
    return {"first": every, "last": list(every)} if style == "triangle" else {"layer": every}


def layer_sets(style: Style, window: int, n_layers: int) -> list[list[int] | None]:
    """The layers cut at every point of `layer_axes`, the last axis fastest; None where there is no such window."""
    at = range(n_layers)
    if style == "triangle":
        return [list(range(a, b + 1)) if a <= b else None for a in at for b in at]
    return [styled(style, c, window, n_layers) for c in at]
