"""How good edge scores are, on a model that answers: the validation report, every form against real cuts, the cost.

    python -m lab.bench.scores --model tiny --tasks moving_direction --items 32 --out out/scores

Writes scores.npz (with the report), scores.json (report, forms, cost) and units.png (layer x kind of pair). `forms` holds
predictions against real cuts of whole units (every kind of pair, cross-frame edges and neighbouring frames, in every
layer, all heads): the sum of cell scores by form, GradDrop, attention mass, and scores that are exact in each row.
`cost` is CPU time of a scored prompt in clean forwards, on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lab.bench.measuring import setting, write
from lab.edges.agreeing import agreement, recall
from lab.edges.cuts import Cut
from lab.edges.fast import run_cut
from lab.edges.margins import margin_of
from lab.edges.pairs import kind_of
from lab.edges.policy import Policy
from lab.edges.scoring import scalars, scores
from lab.edges.store import Store
from lab.edges.subsets import unit_name, unit_scores
from lab.edges.validating import validate_scores
from lab.model.ready import Ready
from lab.model.zoo import load
from lab.result import Result
from lab.runs import progress
from lab.sim.tasks import draw_items
from lab.view.draw import save
from probes.scores import unit_map

FRAMES = {
    "frame(q) > frame(k)": lambda d: d > 0,
    "frame(q) - frame(k) == 1": lambda d: d == 1,
    "frame(q) == frame(k)": lambda d: d == 0,
}

FORMS = 8  # about so many prompts on which the forms are compared


def units_of(names: Sequence[str]) -> list[Cut]:
    """Every kind of pair in the order it can be read, and edges between frames by their distance."""
    kinds = list(dict.fromkeys(map(kind_of, names)))
    pairs = [Cut(q=q, k=k) for q in kinds for k in kinds if (q, k) != ("frame", "frame")]
    return [Cut(q="frame", k="frame", where=where) for where in FRAMES] + pairs


def exact(model: Any, ready: Sequence[Ready], units: Sequence[Cut]) -> NDArray[np.float64]:
    """[item, layer, unit] measured change of the margin; one cut run each, from a stored clean run."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    out = np.zeros((len(ready), n_layers, len(units)))
    for i, r in enumerate(progress(ready, desc="real cuts")):
        store = Store.of(model, r)
        clean = store.clean(model)[-1]
        metric, _ = margin_of(model, "margin", r.item, clean)
        masks = [Policy(cuts=(u,)).bind(r.tokens, n_layers, n_heads, r.item).removed(0) for u in units]
        cuts = [{} if m is None else {layer: m[0]} for layer in range(n_layers) for m in masks]
        found = [
            float(metric(z))
            for at in range(0, len(cuts), 32)
            for z in run_cut(model, store, cuts[at : at + 32])[:, -1]
        ]
        out[i] = (np.array(found) - float(metric(clean))).reshape(n_layers, -1)
    return out


def added(found: Result, units: Sequence[Cut]) -> NDArray[np.float64]:
    """[item, layer, unit] sums of scores [item, layer, head, query, key] over the cells of each unit."""
    heads, names = np.nansum(found.values, 2), found.coords["query"]
    out = np.zeros((*heads.shape[:2], len(units)))
    for u, unit in enumerate(units):
        near = FRAMES.get(unit.where or "", lambda d: True)
        for i, q in enumerate(names):
            for j, k in enumerate(names):
                if (kind_of(q), kind_of(k)) == (unit.q, unit.k) and near(_frame(q) - _frame(k)):
                    out[:, :, u] += heads[:, :, i, j]
    return out


def _frame(name: str) -> int:
    return int(name.partition(":")[2] or 0)


def forms(model: Any, ready: Sequence[Ready], found: Result) -> dict[str, Any]:
    """Agreement of each form with real cuts of units, over all items, layers and units that have edges."""
    units = units_of(found.coords["query"])
    real = exact(model, ready, units)
    rows = unit_scores(model, ready, units).values.sum(2)
    mass = scalars(model, ready).select(scalar="mass")
    made = {
        "sum of knock-outs": added(found, units), "exact in each row": rows,
        "sum of gates": added(scores(model, ready, form="gate"), units),
        "sum of reads": added(scores(model, ready, form="read"), units),
        "GradDrop": added(scores(model, ready, drop=True), units),
        "attention mass": -added(mass, units),
    }  # fmt: skip
    some = np.abs(rows).sum((0, 1)) > 0
    tau = 0.01 * float(np.abs(real).max())
    out: dict[str, Any] = {"units": [unit_name(u) for u, has in zip(units, some, strict=True) if has]}
    for name, told in made.items():
        p, e = told[:, :, some], real[:, :, some]
        k = max(1, e[0].size // 10)
        found_first = recall(np.abs(p).mean(0).ravel(), np.abs(e).mean(0).ravel(), k)
        out[name] = agreement(p.ravel(), e.ravel(), tau) | {"recall_at_2k": found_first}
    return out


def cost(model: Any, ready: Sequence[Ready]) -> dict[str, float]:
    """CPU seconds of a clean forward, and of scoring one prompt in forwards; the best of three."""
    with torch.no_grad():
        forward = _cpu(lambda: [model(r) for r in ready])
    scored = _cpu(lambda: scores(model, ready, show_progress=False))
    return {"forward_s": forward / len(ready), "forwards_per_prompt": scored / forward}


def _cpu(work: Callable[[], Any]) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tasks", nargs="+", default=["moving_direction"])
    parser.add_argument("--items", type=int, default=32, help="per task")
    parser.add_argument("--cells", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("out/scores"))
    said = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = load(said.model)
    ready = [model.prepare(i, 8) for task in said.tasks for i in draw_items(task, said.items, said.seed)]
    some = range(0, len(ready), max(1, len(ready) // FORMS))  # of every task
    found = validate_scores(model, ready, scores(model, ready), n=said.cells)
    found.save(said.out / "scores.npz")
    save(unit_map(found), said.out / "units.png")
    report = {
        "setting": setting(), "tasks": said.tasks, "items": said.items, "validation": found.notes["validation"],
        "forms": forms(model, [ready[i] for i in some], found.select(item=[found.coords["item"][i] for i in some])),
        "cost": cost(model, ready[:4]),
    }  # fmt: skip
    write(said.out / "scores.json", report)
    shown = {
        k: report["validation"][k]
        for k in ("overall", "measurable", "grains", "layers", "recall_at_2k", "weak")
    }
    print(json.dumps(shown | {k: report[k] for k in ("forms", "cost")}, indent=1))


if __name__ == "__main__":
    main()
