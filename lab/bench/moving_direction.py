"""One page about Moving Direction: five probes of one model, what each says, and whether they agree.

    python -m lab.bench.moving_direction --out out/moving_direction [--model tiny] [--items 16] [--more 64] [--seed 11]

Writes page.html, note.txt and one npz for each Result. The questions and comparisons are `probes.agreement`'s.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lab.model.zoo import load
from lab.sim.tasks import draw_items
from lab.view.draw import report
from lab.view.overlay import overlay
from probes.agreement import Part, all_parts, named, verdict


def note(model: Any, items: Sequence[Any], parts: Sequence[Part]) -> list[str]:
    """What was found, a sentence each."""
    right = sum(bool(model.answer(i).correct) for i in items)
    return [
        f"{right} of {len(items)} questions are answered rightly.",
        *(p.sentence for p in parts),
        "Do they agree?",
        *verdict(parts),
    ]


def page(model: Any, items: Sequence[Any], parts: Sequence[Part], out: Path) -> Path:
    """Saves every Result and writes the page."""
    for i, part in enumerate(parts, 1):
        part.result.save(out / f"{i}-{part.asks}.npz")
    words = note(model, items, parts)
    (out / "note.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    frames = model.prepare(items[0], 8).frames.pixels.permute(0, 2, 3, 1).cpu().numpy()
    worth = next(p.result for p in parts if p.asks == "valued")
    pictures = {
        f"{items[0].question} ({items[0].options[items[0].answer]})": frames,
        "What each frame is worth": overlay(worth.values[0], frames),
    }
    return report(
        [named(p) for p in parts], out / "page.html", title="Moving Direction: where does the answer come from?",
        intro="\n\n".join(words), pictures=pictures,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One page about Moving Direction.")
    parser.add_argument("--out", default="out/moving_direction")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--more", type=int, default=64, help="items on which linear probes are fitted")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model = load(args.model)
    items, more = (
        draw_items("moving_direction", n, args.seed + i) for i, n in enumerate((args.items, args.more))
    )
    print(page(model, items, all_parts(model, items, more), out))


if __name__ == "__main__":
    main()
