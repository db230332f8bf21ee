"""`vlab prune` and `vlab eval`: search a policy of attention edges, and measure one beside its baselines."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.cli.asking import Setting
from lab.cli.keeping import keep
from lab.cli.output import Reply, folder_for, table
from lab.cli.probing import checked
from lab.cli.sources import source_of
from lab.errors import UsageError

HEAD = ("policy", "accuracy", "drop", "<=", "flips", "KL", "kept", "live", "of video")
SHOWN = ("accuracy", "drop", "drop_bound", "flips", "kl", "kept", "kept_live", "kept_video")
MARGIN = 0.01  # accuracy that may be lost, one-sided 95 % bound: one point


def prune(
    items: str,
    holdout: str | None,
    setting: Setting,
    out: str,
    *,
    budget: dict[str, float],
    options: dict[str, Any],
) -> Reply:
    """Policy file `out`; beside it, in a folder of its name, trail, evaluation, pictures and recipe."""
    from lab.recipe import ModelSpec, dump
    from lab.view.draw import save
    from probes.prune import DRAWN, BudgetSpec, PruneRecipe

    if setting.fps is not None:
        raise UsageError("--fps: pruning takes the same number of frames of every video; use --frames")
    if Path(out).suffix.lower() not in (".yaml", ".yml", ".json"):
        raise UsageError(f"--out {out}: a policy file ends in .yaml or .json")
    folder = Path(out).with_suffix("")
    model = setting.load()
    recipe = checked(
        PruneRecipe, model=ModelSpec(**(model.spec or {})), items=source_of(items), n_frames=setting.frames or 8,
        holdout=None if holdout is None else source_of(holdout), budget=checked(BudgetSpec, **budget), **options,
    )  # fmt: skip
    journal = folder / f"journal-{recipe.id}"
    found = recipe.prune(model=model, out=journal)
    if found.trail.notes["stopped"] != "interrupted":
        shutil.rmtree(journal, ignore_errors=True)  # the next run measures anew
    found.policy.save(out)
    dump(recipe, folder / "recipe.yaml")
    files = [Path(out), folder / "recipe.yaml", found.trail.save(folder / "trail.npz")]
    files += [save(r, folder / f"{name}.png", **DRAWN[name]) for name, r in found.pictures.items()]
    files += [] if found.evaluation is None else [found.evaluation.save(folder / "evaluation.npz")]
    notes = found.trail.notes
    data = {
        "policy": found.policy.id, "recipe": recipe.id, "complete": notes["complete"], "stopped": notes["stopped"],
        "caution": notes["caution"], "forwards_per_item": notes["forwards_per_item"],
        "naive_per_item": notes["naive_per_item"], "files": [str(f) for f in files],
        "count": found.policy.count_.model_dump(), "evaluation": _rows(found.evaluation),
    }  # fmt: skip
    # an interrupted search has written its best policy so far, and says by its code that it is not done
    code = 130 if notes["stopped"] == "interrupted" else 0
    return Reply(
        data, "\n".join(filter(None, [*_said(data), _told(found.evaluation), *map(str, files)])), code
    )


def sorts(given: Sequence[str] | None) -> str | tuple[str, ...]:
    """What `--baseline` names: "all", "none", or some."""
    one = (given or ["all"])[0]
    return one if len(given or [one]) == 1 and one in ("all", "none") else tuple(given or ())


def evaluate(
    policy: str, items: str, setting: Setting, baselines: str | tuple[str, ...], out: str | None
) -> Reply:
    """The table of a policy and its baselines; saved to folder `out` with curve and recipe, if given."""
    from lab.cli.policies import find
    from lab.cli.rerunning import resumable
    from lab.recipe import ModelSpec
    from probes.evaluation import EvaluationRecipe

    started, folder = time.monotonic(), None if out is None else folder_for(out)
    model = setting.load()
    chosen = find(policy, model.cfg.n_layers)
    recipe = checked(
        EvaluationRecipe, model=ModelSpec(**(model.spec or {})), items=source_of(items), n_frames=setting.frames or 8,
        policy=chosen.to_dict(), baselines=baselines,
    )  # fmt: skip
    results = resumable(recipe, folder, model=model)
    files = [] if folder is None else keep(recipe, _measured(results, folder), folder, started)
    data = {
        "policy": chosen.id, "recipe": recipe.id, "evaluation": _rows(results[0]), "ledger": results[0].ledger,
        "files": [str(f) for f in files],
    }  # fmt: skip
    return Reply(data, "\n".join([_told(results[0]), *map(str, files)]))


def _measured(results: Sequence[Any], folder: Path) -> list[Path]:
    from lab.view.draw import save

    names = ("evaluation.npz", "curve.npz")
    return [
        *(r.save(folder / n) for r, n in zip(results, names, strict=True)),
        save(results[1], folder / "curve.png"),
    ]


def _said(data: dict[str, Any]) -> list[str]:
    count = data["count"]
    return [
        f"policy {data['policy']}: {count['kept_paper']:.1%} of all edges kept (the paper's rule), {count['kept_live']:.1%} of live ones",
        f"search: {data['forwards_per_item']:.1f} forward-equivalents an item, in place of {data['naive_per_item']:.0f}",
        f"not complete: {data['stopped']}; this is the best policy so far" if data["stopped"] else "",
        f"caution: {data['caution']}" if data["caution"] else "",
    ]


def _rows(evaluation: Any) -> list[dict[str, Any]]:
    """One row for every policy, over all tasks."""
    if evaluation is None:
        return []
    part = evaluation.select(task="all")
    return [
        {"policy": name, **dict(zip(part.coords["measure"], row.tolist(), strict=True))}
        for name, row in zip(part.coords["policy"], part.values, strict=True)
    ]


def _told(evaluation: Any) -> str:
    """The table for people, and whether the policy is good enough."""
    if evaluation is None:
        return ""
    rows = _rows(evaluation)
    cells = [
        (r["policy"], *(f"{r[m]:.4f}" if m == "kl" else f"{100 * r[m]:.1f} %" for m in SHOWN)) for r in rows
    ]
    mine = next(r for r in rows if r["policy"] == "policy")
    verdict = "within" if mine["drop_bound"] < MARGIN else "not shown to be within"
    n = json.dumps(evaluation.notes["n"]["item"])
    return "\n".join([
        table(HEAD, cells), "",
        f"On {n} items the policy is {verdict} one point of the full model's accuracy (drop <= {100 * mine['drop_bound']:.2f} points, one-sided 95 %).",
        f"Its live edges to video: {mine['excess_over_exit']:+,.0f} against the best exit of no worse accuracy ({evaluation.notes['best_exit']}).",
    ])  # fmt: skip
