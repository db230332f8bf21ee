"""The words of pathways: how a text names the edges that are cut together. Torch-free.

`keys->queries where PREDICATE`, several with ";" between them, and a name before " = ". See `lab.edges.pathways`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from lab.errors import UsageError

CROSS_FRAME = "cross-frame"
NOTHING = "none"  # cuts no edge: the null test


@dataclass(frozen=True)
class Part:
    """One `keys->queries where PREDICATE` of a pathway, or "cross-frame" or "none" as `keys` alone."""

    keys: str
    queries: str = ""
    where: str = ""


def name_of(pathway: str) -> str:
    """What a pathway is called: the name before " = ", else its text."""
    name, equals, rest = pathway.partition(" = ")
    return name.strip() if equals and "->" not in name and rest.strip() else pathway


def parts_of(pathway: str) -> list[Part]:
    """The parts that are cut together. Raises UsageError for a text that is no pathway."""
    named = name_of(pathway) != pathway
    body = pathway.partition(" = ")[2] if named else pathway
    return [_part(text.strip(), pathway) for text in body.split(";")]


def _part(text: str, pathway: str) -> Part:
    if text in (CROSS_FRAME, NOTHING):
        return Part(text)
    edges, _, where = text.replace("→", "->").partition(" where ")
    keys, arrow, queries = edges.partition("->")
    if not arrow:
        raise UsageError(
            f"pathway {pathway!r} is not 'keys->queries' (such as 'video->last') nor {CROSS_FRAME!r}"
        )
    return Part(keys.strip(), queries.strip(), where.strip())


def listed(pathways: str | Sequence[str] | Mapping[str, str | Sequence[str]]) -> tuple[str, ...]:
    """Pathways as texts: one, several, or name -> the pathway or pathways cut under that name.

    Raises UsageError for what is no text, and for a name that stands twice.
    """
    if isinstance(pathways, str):
        return (pathways,)
    if isinstance(pathways, Mapping):
        pathways = [_named(n, p) for n, p in pathways.items()]
    texts = tuple(cast("Sequence[object]", pathways))
    if not all(isinstance(t, str) for t in texts):
        raise UsageError(f"pathways are texts such as 'video->last', got {texts!r}")
    names = [name_of(str(t)) for t in texts]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UsageError(
            f"pathway {twice[0]!r} is asked {names.count(twice[0])} times; ask once, or name them"
        )
    return cast("tuple[str, ...]", texts)


def _named(name: str, pathway: str | Sequence[str]) -> str:
    body = pathway if isinstance(pathway, str) else "; ".join(pathway)
    if not name.strip() or " = " in name or "->" in name or not body.strip():
        raise UsageError(f"pathway {name!r}: give a plain name, and what is cut, such as 'video->last'")
    return f"{name.strip()} = {body}"
