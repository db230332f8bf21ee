"""The shelf of mechanisms: one paper, one file. Every file that has NEUTRAL and EXAMPLE is on it; nothing is registered.

shelf()                            names of the files
load("differential_token_drop")    the module, imported when it is asked for
plain(m), of_plain(data)           a mechanism as the plain data of a recipe, and back
trained_with(model)                what a variant was trained with, e.g. that of lab.load("tiny-mod")
"""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from lab.errors import ConfigError, UsageError

CONSTANTS = ("NEUTRAL", "EXAMPLE")
KEY = "mechanism"  # where plain data says which mechanism it is: FILE.Class


@cache
def shelf() -> tuple[str, ...]:
    """Names of the files of this package that set NEUTRAL and EXAMPLE, in order. Reads their sources, imports none."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if _is_mechanism(m.name)))


def _is_mechanism(name: str) -> bool:
    spec = find_spec(f"{__name__}.{name}")
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return False
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    set_here = {
        t.id
        for node in body
        for t in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
        if isinstance(t, ast.Name)
    }
    return set(CONSTANTS) <= set_here


def load(name: str) -> ModuleType:
    """The module of a mechanism. Raises UsageError for a name that is not on the shelf, with the closest ones."""
    if name not in shelf():
        near = difflib.get_close_matches(str(name), shelf(), n=3, cutoff=0.3) or shelf()
        raise UsageError(f"no mechanism {name!r}; closest: {', '.join(near)}")
    return importlib.import_module(f"{__name__}.{name}")


def plain(mechanism: Any) -> dict[str, Any]:
    """The mechanism as plain data: which one it is, and its fields that are not at their defaults."""
    kind = type(mechanism)
    package, _, file = kind.__module__.rpartition(".")
    if package != __name__ or not is_dataclass(mechanism):
        raise UsageError(f"{kind.__module__}.{kind.__qualname__} is no mechanism of {__name__}")
    set_fields = {f.name: getattr(mechanism, f.name) for f in fields(mechanism) if f.init}
    changed = {
        f.name: set_fields[f.name] for f in fields(mechanism) if f.init and set_fields[f.name] != f.default
    }
    return {
        KEY: f"{file}.{kind.__name__}",
        **{k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()},
    }


def of_plain(data: Mapping[str, Any]) -> Any:
    """The mechanism that plain data describes. Raises ConfigError for an unknown one, or unknown or wrong fields."""
    file, _, name = str(data.get(KEY, "")).partition(".")
    try:
        found = getattr(load(file), name, None)
    except UsageError as e:
        raise ConfigError(f"{KEY}: {e}") from None
    if not (isinstance(found, type) and is_dataclass(found) and hasattr(found, "plan")):
        raise ConfigError(f"{KEY}: {file} has no mechanism {name!r}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != KEY}
    known = [f.name for f in fields(found)]
    for field in given:
        if field not in known:
            near = difflib.get_close_matches(str(field), known, n=2) or known
            raise ConfigError(f"{file}.{name} has no field {field!r}; closest: {', '.join(near)}")
    try:
        return found(**given)
    except (UsageError, TypeError, ValueError) as e:
        raise ConfigError(f"{file}.{name}: {e}") from None


def trained_with(model: Any) -> tuple[Any, ...]:
    """The mechanisms a bundled variant ("tiny-mod") was trained with, routers and all: `mechanisms=trained_with(model)`.

    () for a model that was trained as it is.
    """
    return tuple(of_plain(m) for m in model.trained_with)
