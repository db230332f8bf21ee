"""One page about Moving Direction: five probes of one model, and whether they agree.

    python -m figures.fig_moving_direction --out out/moving_direction [--model tiny] [--items 16] [--seed 11]

Where patching a twin's frames flips the answer, which frames Shapley attribution picks, which edges the knock-out picks;
where direction is linearly readable and what the lens reads on video tokens come from `probes.linear` and `probes.lens`:
`further_parts` is the place where they are added. Every part is a Result, saved beside the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.model.zoo import load
from lab.result import Result
from lab.sim.tasks import draw_items
from lab.view.draw import report
from lab.view.overlay import overlay
from probes.attribution import attribute
from probes.knockout import knockout
from probes.patching import attribution_patching, patching

NOTEWORTHY = 0.1  # share of the largest effect below which a layer is not named


@dataclass(frozen=True)
class Part:
    """One probe on the page: what it found, in one sentence, and the layers (1-based) or frames it points at."""

    result: Result
    sentence: str
    layers: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()


def patched(model: Any, items: Sequence[Any]) -> list[Part]:
    """Where taking the twin's values flips the answer: by role, and by frame."""
    roles = patching(model, items, by="role", into="clean", metric="flip")
    frames = patching(model, items, by="frame", into="clean", metric="recovered")
    carried = roles.mean("item")
    video = carried.select(role="frame").values
    last = carried.select(role="last").values
    until, since = _last_above(video, 0.5), _first_above(last, 0.5)
    said = (
        f"Taking the twin's video tokens flips the answer in up to {video.max():.0%} of the items, in more than half up to layer {until}; "
        f"taking the last position alone does so from layer {since} on: in between the answer leaves the video."
    )
    each = np.nan_to_num(frames.mean("item").values)
    best = tuple(int(i) for i in np.argsort(-each[0])[:2])
    more = f"Of single frames, {best[0]} and {best[1]} carry most at layer 1 ({each[0, best[0]]:.0%} and {each[0, best[1]]:.0%} of the way)."
    return [Part(roles, said, layers=tuple(range(until, since + 1))), Part(frames, more, frames=best)]


def estimated(model: Any, items: Sequence[Any]) -> list[Part]:
    """The same grid from one backward pass, and how far it is off."""
    found = attribution_patching(model, items, by="frame", into="clean")
    error = found.notes["against_exact"]
    said = (
        f"One backward pass estimates the same grid with correlation {error['pearson']:.2f}, slope {error['slope']:.2f} and a mean "
        f"error of {error['mean_abs']:.3f} where cells change by {error['mean_abs_effect']:.3f} on average."
    )
    return [Part(found, said)]


def attributed(model: Any, items: Sequence[Any]) -> list[Part]:
    """What each frame is worth (exact Shapley values against the twin)."""
    found = attribute(model, items, method="shapley")
    worth = found.mean("item").values
    best = tuple(int(i) for i in np.argsort(-worth)[:2])
    share = worth / max(worth.sum(), 1e-9)
    ends = share[[0, -1]].sum()
    said = (
        f"Attribution picks frames {best[0]} and {best[1]} ({share[best[0]]:.0%} and {share[best[1]]:.0%}); the first and the last "
        f"frame together are worth {ends:.0%} of the answer."
    )
    return [Part(found, said, frames=best)]


def cut(model: Any, items: Sequence[Any]) -> list[Part]:
    """Which attention edges the answer hangs on."""
    found = knockout(model, items, window=3, executor="fast")
    curves = found.mean("item")
    falls = {name: curves.select(pathway=name).values for name in curves.coords["pathway"]}
    ranked = sorted(falls, key=lambda n: float(falls[n].min()))
    where = {n: int(falls[n].argmin()) + 1 for n in ranked}
    parts = [f"{n} round layer {where[n]} ({falls[n].min():.0f} %)" for n in ranked[:3]]
    return [
        Part(
            found,
            f"Knock-out picks {', then '.join(parts)}.",
            layers=tuple(sorted(where[n] for n in ranked[:2])),
        )
    ]


def further_parts(model: Any, items: Sequence[Any]) -> list[Part]:
    """Where direction is linearly readable (`probes.linear`), what the lens reads on video tokens (`probes.lens`)."""
    return []


def _last_above(values: Any, share: float) -> int:
    """The last layer (1-based) with at least so much; 0 if none has."""
    return max((i + 1 for i, v in enumerate(values) if v >= share), default=0)


def _first_above(values: Any, share: float) -> int:
    return min((i + 1 for i, v in enumerate(values) if v >= share), default=len(values))


def verdict(parts: Sequence[Part]) -> str:
    """Whether the parts point at the same layers and frames, in plain words."""
    layers = [set(p.layers) for p in parts if p.layers]
    frames = [set(p.frames) for p in parts if p.frames]
    shared = set.intersection(*layers) if layers else set()
    both = set.intersection(*frames) if frames else set()
    said = [
        f"Layers: {len(layers)} probes name some, and all name {_listed(shared)}." if shared else f"Layers: {len(layers)} probes name some, and no layer is named by all.",
        f"Frames: all that name frames name {_listed(both)}." if both else "Frames: those that name frames name different ones.",
    ]  # fmt: skip
    return " ".join(said)


def _listed(numbers: set[int]) -> str:
    return ", ".join(str(n) for n in sorted(numbers))


def page(model: Any, items: Sequence[Any], out: Path) -> Path:
    """Runs every probe, saves its Result, and writes the page."""
    parts = [
        *patched(model, items),
        *estimated(model, items),
        *attributed(model, items),
        *cut(model, items),
        *further_parts(model, items),
    ]
    for i, part in enumerate(parts, 1):
        part.result.save(out / f"result_{i}.npz")
    right = sum(bool(model.answer(i).correct) for i in items)
    words = [
        f"{right} of {len(items)} questions are answered rightly.",
        *(p.sentence for p in parts),
        f"Do they agree? {verdict(parts)}",
    ]
    frames = model.prepare(items[0], 8).frames.pixels.permute(0, 2, 3, 1).cpu().numpy()
    worth = next(p.result for p in parts if p.result.name.startswith("attribution (shapley"))
    pictures = {
        f"{items[0].question} ({items[0].options[items[0].answer]})": frames,
        "What each frame is worth": overlay(worth.values[0], frames),
    }
    (out / "note.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return report(
        [p.result for p in parts], out / "moving_direction.html", title="Moving Direction: where does the answer come from?",
        intro="\n\n".join(words), pictures=pictures,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="One page about Moving Direction.")
    parser.add_argument("--out", default="out/moving_direction")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model = load(args.model)
    print(page(model, draw_items("moving_direction", args.items, args.seed), out))


if __name__ == "__main__":
    main()
