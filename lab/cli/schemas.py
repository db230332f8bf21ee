"""`vlab schema`: the JSON Schema of recipes, by which editors complete and check their YAML."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from lab.cli.output import Reply, as_text
from lab.errors import UsageError
from lab.recipe import SCHEMA_VERSION, json_schema, known_kinds, resolve
from lab.result import write_bytes

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(kind: str | None, out: str | None) -> Reply:
    """Of one kind, or of all in one document; written to a file if asked."""
    data = every_kind() if kind is None else json_schema(resolve(named(kind)))
    text = as_text(data)
    if out is None:
        return Reply(data, text)
    write_bytes(Path(out), (text + "\n").encode())
    said = f"{out}\nIn a recipe's first line, for editors:  # yaml-language-server: $schema={out}"
    return Reply({"file": out}, said)


def named(kind: str) -> str:
    """The dotted path of a kind given by it, by its class, or by its class without "Recipe". Raises UsageError."""
    known = known_kinds()
    if kind in known:
        return kind
    short = {name: k for k in known for c in [k.rpartition(".")[2]] for name in (c, c.removesuffix("Recipe"))}
    folded = {name.lower(): k for name, k in short.items()}
    if kind.lower() in folded:
        return folded[kind.lower()]
    near = difflib.get_close_matches(kind, [*known, *short], n=3, cutoff=0.4) or known[:3]
    raise UsageError(f"no recipe kind {kind[:60]!r}; closest: {', '.join(near)}")


def every_kind() -> dict[str, Any]:
    """One schema for a recipe of any kind. Parts that recipes share stand in it once."""
    parts: dict[str, Any] = {}
    for kind in known_kinds():
        one = json_schema(resolve(kind))
        inner = one.pop("$defs", {})
        renamed = {n: n if parts.get(n, p) == p else f"{kind}.{n}" for n, p in inner.items()}
        parts |= {renamed[n]: _pointed(p, renamed) for n, p in inner.items()}
        del one["$schema"]
        parts[kind] = _pointed(one, renamed)
    return {
        "$schema": DIALECT, "title": f"videollm-lab recipe, version {SCHEMA_VERSION}",
        "oneOf": [{"$ref": f"#/$defs/{kind}"} for kind in known_kinds()], "$defs": dict(sorted(parts.items())),
    }  # fmt: skip


def _pointed(part: Any, renamed: dict[str, str]) -> Any:
    """The same with its references to parts under their new names."""
    if isinstance(part, list):
        return [_pointed(p, renamed) for p in part]
    if not isinstance(part, dict):
        return part
    out = {k: _pointed(v, renamed) for k, v in part.items()}
    name = str(out.get("$ref", "")).removeprefix("#/$defs/")
    return {**out, "$ref": f"#/$defs/{renamed[name]}"} if name in renamed else out
