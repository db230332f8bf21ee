"""`vlab count` and `vlab policy`: edge policies read, checked, shown and counted. Torch comes with the first command run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.cli.output import Reply, as_text, table
from lab.errors import UsageError

SUFFIXES = (".yaml", ".yml", ".json")


def find(name: str, layers: int | None) -> Any:
    """The policy in a file, or the preset of that name. Raises ConfigError or UsageError."""
    from lab.edges import presets
    from lab.edges.policy import Policy

    if Path(name).suffix.lower() in SUFFIXES or Path(name).is_file():
        return Policy.load(name)
    if Path(name).is_dir():
        raise UsageError(
            f"policy {name}: a folder; give a file that ends in {', '.join(SUFFIXES)}, or a preset"
        )
    try:
        return presets.named(name, layers)
    except UsageError as e:
        raise UsageError(f"{e}; files end in {', '.join(SUFFIXES)}") from None


def count(name: str, layout: str, layers: int | None, heads: int | None) -> Reply:
    """Edges kept on a plain layout, by the paper's rule and live."""
    from lab.edges.layouts import read_layout

    policy, tokens = find(name, layers), read_layout(layout)
    found = policy.count(tokens, layers, heads)
    leak = policy.leaks(tokens)
    rows = [
        ("all edges (the paper's rule)", found.kept, found.total, _percent(found.kept_fraction)),
        ("live edges", found.kept_live, found.live_total, _percent(found.kept_live_fraction)),
        ("live, out of all", found.kept_live, found.total, _percent(found.live_of_total)),
    ]
    notes = [
        f"{_title(policy)}, {found.n_layers} layers, layout {layout} ({found.n_pos:,} positions)", "",
        table(("", "kept", "of", "share"), rows), "",
        f"Video is last read, by what can reach the answer, in layer {found.exit_layer}; up to there "
        f"{found.kept_video:,} of {found.exit_video:,} edges to it are kept.", str(leak).capitalize() + ".",
    ]  # fmt: skip
    data = {
        "policy": policy.id, "name": policy.name, "layout": layout, **found.plain(), "segments": policy.segments,
        "orphans": len(leak.positions),
    }  # fmt: skip
    return Reply(data, "\n".join(notes))


def show(name: str, layers: int | None, out: str | None) -> Reply:
    """A policy in words; written to a file if asked."""
    policy = find(name, layers)
    rows = [
        (i, c.layers, "all" if c.heads == "all" else ",".join(map(str, c.heads)), c.q, c.k, c.where or "",
         "cut" if c.gate is None else f"{c.gate:+g}", c.reason or "")
        for i, c in enumerate(policy.cuts)
    ]  # fmt: skip
    verb = "cut" if policy.default == "keep" else "kept, all others are cut"
    text = [
        _title(policy), f"segments: {policy.segments}; generated tokens inherit: {policy.generated_rows.inherit}",
        f"{len(rows)} sets of edges are {verb}:", table(("", "layers", "heads", "q", "k", "where", "does", "reason"), rows),
    ]  # fmt: skip
    if out is not None:
        policy.save(out)
        text.append(f"written to {out}")
    return Reply({"id": policy.id, **policy.to_dict()}, "\n".join(text))


def validate(name: str) -> Reply:
    """Whether a file is a policy; errors say where it is not."""
    policy = find(name, None)
    return Reply(
        {"valid": True, "id": policy.id, "cuts": len(policy.cuts)},
        f"{_title(policy)}: valid, {len(policy.cuts)} cuts",
    )


def presets_known() -> Reply:
    """The presets, with what they keep on the layout that published counts refer to."""
    from lab.edges import presets
    from lab.edges.layouts import read_layout

    rows: list[tuple[Any, ...]] = []
    for model in presets.FLOWS:
        layout = presets.LAYOUTS[model]
        for style in presets.STYLES:
            found = presets.paper(model, style).count(read_layout(layout))
            shares = (found.kept_fraction, found.kept_live_fraction)
            rows.append((f"{model}/{style}", found.n_layers, layout, *shares))
    head = ("preset", "layers", "layout", "kept", "kept live")
    tail = f"Also: {', '.join(n for n in presets.known() if n.partition('/')[0] not in presets.FLOWS)} (with --layers)."
    made = "In Python, as lab.edges.presets.NAME(...):\n" + table(
        ("name", "what it is"), list(presets.MADE.items())
    )
    data = [dict(zip(("name", "layers", "layout", "kept", "kept_live"), r, strict=True)) for r in rows]
    shown = [(*row[:3], *map(_percent, row[3:])) for row in rows]
    return Reply(data, "\n".join([table(head, shown), "", tail, "", made]))


def schema() -> Reply:
    """JSON Schema of policy files."""
    from lab.edges.policy import json_schema

    found = json_schema()
    return Reply(found, as_text(found))


def _title(policy: Any) -> str:
    return f"{policy.name} ({policy.id})" if policy.name else f"policy {policy.id}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
