"""Which tokens of a video the decoder reads under each mechanism that drops or merges, painted on the frames.

    python -m figures.fig_kept_tokens --out out/kept

One question about one simulated clip, the bundled model. Dropped tokens leave their place blank (0); a token merged
from many shows on every patch it holds how many these are. Writes one picture and one Result per mechanism, a page with
all of them, and the curve of what is dropped in every frame.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.mechanisms.segment_merging import SegmentMerging
from lab.mechanisms.thumbnail_and_sampling import ThumbnailAndSampling
from lab.model.layout import vision_of
from lab.model.zoo import load
from lab.result import Result
from lab.sim.tasks import draw_items
from lab.view.draw import report, save

MECHANISMS: dict[str, Any] = {
    "token drop, 80 % by features": DifferentialTokenDrop(ratio=0.8),
    "token drop, 80 % by pixels": DifferentialTokenDrop(ratio=0.8, space="pixel"),
    "thumbnail and 32 samples": ThumbnailAndSampling(n_thumbnail=4, n_samples=32),
    "merged to 2 segments of 12": SegmentMerging(n_segments=2, keep=12, n_global=1),
}


def painted(model: Any, item: Any, name: str, mechanism: Any) -> tuple[Result, Any]:
    """(Result with axes frame, row, col; the frames): patches in the token of each place, 0 where it was dropped."""
    ready = model.prepare(item, mechanisms=[mechanism])
    tokens, grid = model.maps(ready)[0], ready.grids[0]
    patch = float(grid.weight[grid.frame >= 0].min())
    shown = tokens.painted(tokens.weight / patch, grid).nan_to_num(0.0).numpy()
    n = len(tokens.where(role="frame"))
    result = Result(
        shown, ("frame", "row", "col"), {a: list(range(k)) for a, k in zip(("frame", "row", "col"), shown.shape, strict=True)},
        "tokens merged (0: dropped)", {}, name=f"{name}: {n} of {int((grid.frame >= 0).sum())} tokens are read",
        baseline=0.0, notes={"mechanism": repr(mechanism)},
    )  # fmt: skip
    return result, ready.frames.pixels.permute(0, 2, 3, 1).numpy()


def curves(model: Any, item: Any) -> Result:
    """Share dropped in every frame, by features and by pixels."""
    ready = model.prepare(item)
    vision = vision_of(ready, model.see(ready))
    drops = {
        s: DifferentialTokenDrop(ratio=0.8, space=s).decide(ready.frames, vision)
        for s in ("feature", "pixel")
    }
    values = np.stack([d.curve().numpy() for d in drops.values()])
    coords = {"compared": [f"{s}s" for s in drops], "frame": list(range(values.shape[1]))}
    return Result(values, ("compared", "frame"), coords, "share of the frame's tokens dropped", {}, name="What token drop drops, frame by frame", baseline=0.0)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Kept, dropped and merged tokens, painted on frames.")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", default="moving_direction")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", default="out/kept")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, out = load(args.model, device="cpu", verify=False), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    item, specs = draw_items(args.task, 1, args.seed)[0], list[Any]()
    from lab.view.specs import figure_spec

    with torch.no_grad():
        for name, mechanism in MECHANISMS.items():
            result, frames = painted(model, item, name, mechanism)
            stem = name.replace(" ", "_").replace("%", "percent").replace(",", "")
            result.save(out / f"{stem}.npz")
            specs.append(figure_spec(result, frames=frames))
            save(specs[-1], out / f"{stem}.png")
        curve = curves(model, item)
    curve.save(out / "curve.npz")
    specs.append(figure_spec(curve))
    save(specs[-1], out / "curve.png")
    report(specs, out / "kept_tokens.html", title=f"Which tokens are read: {item.question}")
    print(f"{out / 'kept_tokens.html'} and {len(specs)} pictures")


if __name__ == "__main__":
    main()
