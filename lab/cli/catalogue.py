"""`vlab models`: the checkpoints we know, from lab/data/models.json. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lab.cli.output import Reply, table

FILE = Path(__file__).parents[1] / "data" / "models.json"
BYTES_BF16 = 2


def read_catalogue() -> list[dict[str, Any]]:
    """The entries of models.json with two derived sizes: weights in GB and KV cache in kB per position, both bf16."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))["models"]
    return [{**e, "weights_gb": _weights(e), "kv_kb_per_position": _cache(e)} for e in entries]


def _weights(e: dict[str, Any]) -> float:
    return round(e["parameters"] * BYTES_BF16 / 1e9, 3)


def _cache(e: dict[str, Any]) -> float:
    return round(2 * e["layers"] * e["kv_heads"] * e["d_head"] * BYTES_BF16 / 1e3, 2)


def list_models() -> Reply:
    """One line a checkpoint."""
    entries = read_catalogue()
    rows = [
        (
            e["id"],
            e["family"],
            f"{e['parameters'] / 1e9:.2f} B" if e["parameters"] >= 1e8 else f"{e['parameters'] / 1e6:.1f} M",
            e["layers"],
            f"{e['weights_gb']:.2f} GB",
            f"{e['kv_kb_per_position']:.0f} kB",
        )
        for e in entries
    ]
    head = ("checkpoint", "family", "parameters", "layers", "weights bf16", "cache per position")
    notes = [f"{e['id']}: {e['note']}" for e in entries if e.get("note")]
    tail = "`vlab doctor MODEL --frames N` predicts what a run takes. Other checkpoints of these families load too."
    return Reply(entries, "\n".join([table(head, rows), "", *notes, tail]))
