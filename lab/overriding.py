"""Other values in a recipe's plain data, at dotted keys: `items.n`, `pathways.0`, `model.name`. Torch-free.

A hash in a recipe says which file is meant. Where the file's name is changed, its hash is dropped with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from lab.errors import UsageError
from lab.yamlfile import parse_yaml

# what is said about a thing once its name is known; it does not outlive a change of the name
PINNED = {"name": ("weights", "revision"), "file": ("sha256",), "path": ("sha256",), "folder": ("sha256",)}
MAX_DEPTH = 32


def changed(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `data` with other values at dotted keys, in the order given; lists are entered by index from 0.

    A text given for a mapping with a `name` (a model) changes its name alone. A key that is not there is added: whoever
    checks the data says so. Raises UsageError for a key that leads through a number or a text, or beyond a list's end.
    """
    out = deepcopy(dict(data))
    for key, value in changes.items():
        parts = key.split(".")
        if not all(parts) or len(parts) > MAX_DEPTH:
            raise UsageError(
                f"{key[:60]!r} is not a key: give names with single dots between, such as items.n"
            )
        _put(out, parts, value, key)
    return out


def setting(text: str) -> tuple[str, Any]:
    """`key=value` as key and value; the value is read as YAML: 4, 0.5, true, null, [a, b], {name: tiny}, or a text.

    Raises UsageError without a key or a `=`, ConfigError for what is not YAML.
    """
    key, found, value = text.partition("=")
    if not found or not key.strip():
        raise UsageError(f"--set {text[:60]!r}: write key=value, such as items.n=4")
    return key.strip(), parse_yaml(value, f"--set {key.strip()}")


def _put(at: Any, parts: list[str], value: Any, key: str) -> None:
    for i, part in enumerate(parts[:-1]):
        step = _step(at, part, key)
        if isinstance(at, dict) and at.get(step) is None:
            at[step] = {}
        at = at[step]
        if not isinstance(at, dict | list):
            raise UsageError(f"{key}: {'.'.join(parts[: i + 1])} is {at!r}; it has no parts to set")
    last = _step(at, parts[-1], key)
    old = at.get(last) if isinstance(at, dict) else at[last]
    if isinstance(value, str) and isinstance(old, dict) and "name" in old:
        _set(old, "name", value)
    else:
        _set(at, last, value)


def _set(at: Any, last: Any, value: Any) -> None:
    at[last] = deepcopy(value)
    if isinstance(at, dict):
        at.update({pin: None for pin in PINNED.get(str(last), ()) if pin in at})


def _step(at: dict[str, Any] | list[Any], part: str, key: str) -> Any:
    """The name or index that `part` means in `at`."""
    if isinstance(at, dict):
        return part
    if not part.isdecimal() or int(part) >= len(at):
        raise UsageError(f"{key}: {part[:20]!r} is no place in a list of {len(at)}; use 0..{len(at) - 1}")
    return int(part)
