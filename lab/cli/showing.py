"""`vlab tokens`: what every position of a prompt is, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from lab.cli.asking import Setting
from lab.cli.output import Reply, table
from lab.cli.token_picture import check_suffix, draw_tokens
from lab.spans import KINDS, ROLES

if TYPE_CHECKING:
    from lab.carriers import TokenMap, VideoQA


def show_tokens(item: VideoQA, setting: Setting, every: bool, out: str | None) -> Reply:
    """The token map of the item's prompt: one line for every run of positions of one role, frame and option."""
    path = None if out is None else check_suffix(out)
    ready = setting.outline().prepare(item, **setting.sampling())
    tokens = ready.tokens
    rows = list(positions(tokens))
    head = ("position", "role", "kind", "frame", "row", "col", "option", "seconds", "weight", "id", "text")
    lines = (
        [tuple(r[h] for h in head) for r in rows]
        if every
        else [_span(list(g)) for _, g in groupby(rows, _same)]
    )
    head = head if every else ("positions", "count", "role", "kind", "frame", "option", "seconds", "text")
    text = [table(head, lines), "", _summary(tokens)]
    if path is not None:
        text.append(str(draw_tokens(rows, path, f"{len(rows)} positions in reading order: {item.question}")))
    return Reply({"model": setting.model, "positions": rows}, "\n".join(text))


def positions(tokens: TokenMap) -> Iterator[dict[str, Any]]:
    """Every position as plain data; None where the position has no such thing."""
    for i in range(len(tokens)):
        place = {n: _known(int(getattr(tokens, n)[i])) for n in ("frame", "row", "col", "option")}
        seconds = float(tokens.seconds[i])
        yield {
            "position": i, "role": ROLES[int(tokens.role[i])], "kind": KINDS[int(tokens.kind[i])], **place,
            "seconds": None if np.isnan(seconds) else round(seconds, 3), "weight": float(tokens.weight[i]),
            "id": int(tokens.ids[i]), "text": tokens.pieces[i],
        }  # fmt: skip


def _known(n: int) -> int | None:
    return None if n < 0 else n


def _same(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["role"], row["kind"], row["frame"], row["option"]


def _span(rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    first, n = rows[0], len(rows)
    at = str(first["position"]) if n == 1 else f"{first['position']}-{rows[-1]['position']}"
    text = "".join(r["text"] for r in rows)
    if first["kind"] == "video" and first["frame"] is not None:
        text = f"{1 + max(r['row'] for r in rows)} x {1 + max(r['col'] for r in rows)} patches"
    text = text if len(text) <= 48 else f"{text[:45]}..."
    return (
        at,
        n,
        first["role"],
        first["kind"],
        first["frame"],
        first["option"],
        first["seconds"],
        repr(text) if first["kind"] != "video" else text,
    )


def _summary(tokens: TokenMap) -> str:
    counts = np.bincount(tokens.role.numpy(), minlength=len(ROLES))
    parts = [f"{n} {role}" for role, n in zip(ROLES, counts.tolist(), strict=True) if n]
    return f"{len(tokens)} positions: {', '.join(parts)}"
