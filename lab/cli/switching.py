"""What `--mechanism` says: names of mechanisms and their settings, as the plain data of recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lab.errors import ConfigError, LabError, UsageError
from lab.yamlfile import parse_yaml


def switched_on(texts: Sequence[str] | None) -> tuple[dict[str, Any], ...]:
    """All mechanisms of a repeated `--mechanism`, in order. Raises UsageError as `described`."""
    return tuple(one for text in texts or () for one in described(text))


def described(text: str) -> tuple[dict[str, Any], ...]:
    """What `--mechanism` says, as the plain data of a recipe: NAME, NAME:field=value,..., several with +.

    Raises UsageError for what cannot be read or is no mechanism.
    """
    return tuple(_one(part) for part in text.split("+"))


def _one(text: str) -> dict[str, Any]:
    from lab.mechanisms import KEY, load, of_plain, plain

    name, colon, said = text.strip().partition(":")
    module = load(name.replace("-", "_"))
    if not colon:
        return plain(module.EXAMPLE)
    data = {KEY: f"{module.__name__.rpartition('.')[2]}.{type(module.EXAMPLE).__name__}", **_fields(said)}
    try:
        of_plain(data)
    except LabError as e:
        raise UsageError(f"--mechanism {text}: {e}") from None
    return data


def _fields(said: str) -> dict[str, Any]:
    wrong = f"--mechanism: cannot read {said!r}; write settings as keep=0.2,selector=random"
    try:
        read = parse_yaml("{" + said.replace("=", ": ") + "}", "--mechanism")
    except ConfigError:
        raise UsageError(wrong) from None
    if not isinstance(read, dict) or any(v is None for v in read.values()):
        raise UsageError(wrong)
    return read
