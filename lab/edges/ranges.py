"""Layer ranges: 1-based texts in files ("1-5,16-20"), 0-based numbers in code. The one place that converts. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lab.errors import ConfigError

MOST = 10_000  # no model has more layers; a hostile file may ask for more
_RANGE = re.compile(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?")


def parse_layers(text: str) -> tuple[int, ...]:
    """0-based layers of a 1-based text. Raises ConfigError if it is no such text, or a range runs backwards."""
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ConfigError(f"layers {text[:60]!r} is not 'all' or 1-based ranges such as '1-5,16-20'")
        first = int(match[1])
        last = int(match[2] or first)
        if not 1 <= first <= last <= MOST:
            raise ConfigError(f"layers {part.strip()!r}: need 1 <= first <= last <= {MOST}")
        found.update(range(first - 1, last))
    return tuple(sorted(found))


def layer_text(layers: Iterable[int]) -> str:
    """The 1-based text of 0-based layers: (0, 1, 2, 9) -> "1-3,10". Empty for none."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][1] == layer:
            runs[-1][1] = layer + 1
        else:
            runs.append([layer + 1, layer + 1])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def named(layer: int) -> str:
    """How error texts name a 0-based layer: "layer 3 (blocks.2)"."""
    return f"layer {layer + 1} (blocks.{layer})"
