"""`vlab sweep`: knock-out curves over many questions, from one stored clean run a question."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.cli.asking import Setting
from lab.cli.output import Reply, folder_for, table
from lab.cli.sources import source_of
from lab.cli.switching import switched_on
from lab.errors import UsageError
from lab.result import Result


@dataclass(frozen=True)
class Asked:
    """The options of one `vlab sweep`, as they stand on the command line."""

    items: str
    out: str
    video_root: str | None = None
    pathways: Sequence[str] = ()
    window: int | None = None
    style: str = "center"
    metrics: Sequence[str] = ()
    target: str | None = None
    heads: str | None = None
    frame_pairs: str | None = None
    split: str | None = None
    panel: bool = False
    executor: str = "fast"
    mechanisms: Sequence[str] = ()


def sweep_items(asked: Asked, setting: Setting) -> Reply:
    """Result, report, pictures and recipe in a folder; interrupted, the same command goes on where it stopped."""
    from lab.cli.keeping import keep
    from lab.cli.rerunning import resumable

    started = time.monotonic()
    _check(asked, setting)
    source, on = source_of(asked.items, asked.video_root), switched_on(asked.mechanisms)
    folder = folder_for(asked.out)
    model = setting.load()
    recipe = _recipe(asked, setting, source, model, on)
    results = resumable(recipe, folder, model=model, executor=asked.executor)
    chosen = results[0].split(asked.split or "all")
    files = keep(recipe, _written(results[0], chosen, asked, folder), folder, started)
    ledger = results[0].ledger
    data = {
        "recipe": recipe.id,
        "ledger": ledger,
        "correct": _correct(results[0]),
        "files": [str(f) for f in files],
        "results": [json.loads(r.to_json()) for r in results],
    }
    spent = f"{ledger['forwards']:.1f} forward-equivalents in place of {ledger['naive']:.0f}, {ledger['tower_calls']} tower calls"
    said = [
        repr(results[0]),
        _answered(results[0]),
        spent,
        *([_table(results[0], asked)] if asked.panel else []),
    ]
    return Reply(data, "\n".join([*(s for s in said if s), *data["files"]]))


def _check(asked: Asked, setting: Setting) -> None:
    if asked.executor not in ("fast", "reference"):
        raise UsageError(f"--executor {asked.executor!r}: use fast or reference")
    if asked.split not in (None, "correct", "wrong", "all"):
        raise UsageError(f"--split {asked.split!r}: use correct, wrong or all")
    if setting.fps is not None:
        raise UsageError("--fps: a sweep takes the same number of frames of every video; use --frames")
    if asked.window is not None and asked.window < 1:
        raise UsageError(f"--window {asked.window}: at least 1 layer is needed")
    more = [n for n in ("heads", "frame_pairs") if getattr(asked, n)] + (
        ["metric"] if len(asked.metrics) > 1 else []
    )
    if asked.panel and (asked.pathways or more or asked.style == "triangle"):
        raise UsageError("--panel draws the paper's eleven curves; leave --pathway, --heads, --frame-pairs, --style triangle and a second --metric out")  # fmt: skip


def _recipe(asked: Asked, setting: Setting, source: Any, model: Any, on: tuple[dict[str, Any], ...]) -> Any:
    from lab.edges.windows import window_for
    from lab.recipe import ModelSpec
    from probes.knockout import PATHWAYS, KnockoutRecipe
    from probes.pathways import PANEL

    usual = [p for group in PANEL.values() for p in group] if asked.panel else PATHWAYS
    fields = {
        "model": ModelSpec(**(model.spec or {})), "items": source, "n_frames": setting.frames or 8,
        "pathways": tuple(asked.pathways or usual), "window": asked.window or window_for(model.cfg.n_layers),
        "style": asked.style, "metrics": tuple(asked.metrics), "target": asked.target,
        "metric": "target" if asked.target is not None and not asked.metrics else "argmax",
        "heads": _heads(asked.heads), "frame_pairs": _pairs(asked.frame_pairs), "mechanisms": on,
    }  # fmt: skip
    return _validated(KnockoutRecipe, fields)


def _validated(cls: type[Any], fields: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from lab.recipe import explain

    try:
        return cls(**fields)
    except ValidationError as e:
        raise UsageError(explain(e, cls)) from None


def _heads(text: str | None) -> Any:
    if text is None or text == "each":
        return text
    if not all(t.strip().isdecimal() for t in text.split(",")):
        raise UsageError(f"--heads {text!r}: use each, or numbers from 0 with commas between")
    return tuple(int(t) for t in text.split(","))


def _pairs(text: str | None) -> Any:
    if text is None or text == "each":
        return text
    pairs = [tuple(t.strip().split("-")) for t in text.split(",")]
    if not all(len(p) == 2 and all(n.isdecimal() for n in p) for p in pairs):
        raise UsageError(
            f"--frame-pairs {text!r}: use each, or KEY-QUERY with commas between, such as 0-3,1-3"
        )
    return tuple((int(k), int(q)) for k, q in pairs)


# ---- what is written ------------------------------------------------------------------------------------------------


def _written(whole: Result, chosen: Result, asked: Asked, folder: Path) -> list[Path]:
    """result.npz with every item; flow.png and report.html of the split that was chosen; the panel."""
    from lab.view.draw import figure_spec, report, save
    from lab.view.facets import facets

    parts = facets(chosen)
    files = [
        whole.save(folder / "result.npz"),
        save(parts[0], folder / "flow.png"),
        report(
            parts,
            folder / "report.html",
            title=whole.name,
            intro="\n\n".join(figure_spec(p).reading for p in parts[:1]),
        ),
    ]
    return files + (_panel(whole, asked, folder) if asked.panel else [])


def _panel(whole: Result, asked: Asked, folder: Path) -> list[Path]:
    from lab.view.facets import panel
    from lab.view.panel_out import save_panel
    from probes.pathways import PANEL

    title = f"Map the Flow: {whole.recipe.get('model', {}).get('name', '')}".rstrip(": ")
    means = _by_task(whole, asked)
    absent = [t for t in _correct(whole) if t not in means.coords["task"]]
    note = f"No column for {', '.join(absent)}: no item is left." if absent else ""
    made = panel(means, PANEL, title=title, note=note)
    return [save_panel(made, folder / "panel.png"), save_panel(made, folder / "panel.html")]


def _by_task(whole: Result, asked: Asked) -> Result:
    """Means by task over the items chosen: by default those answered right, as in the paper, where there are any."""
    from lab.view.facets import labelled

    which = asked.split or ("correct" if any(whole.notes["correct"].values()) else "all")
    return labelled(whole.split(which), "task").mean_by("task")


def _correct(result: Result) -> dict[str, list[int]]:
    """Task -> [answered right, known, all]."""
    tasks, right = result.notes.get("task", {}), result.notes["correct"]
    out: dict[str, list[int]] = {}
    for key in result.coords["item"]:
        row = out.setdefault(tasks.get(key, "all"), [0, 0, 0])
        row[0] += right[key] is True
        row[1] += right[key] is not None
        row[2] += 1
    return out


def _answered(result: Result) -> str:
    known = {t: row for t, row in _correct(result).items() if row[1]}
    return "; ".join(f"{t}: {right} of {n} answered right" for t, (right, n, _) in known.items())


def _table(whole: Result, asked: Asked) -> str:
    """The deepest point of every curve by task, with its interval; an interval that holds 0 is marked."""
    means = _by_task(whole, asked)
    tasks = means.coords["task"]
    rows = [(p, *(_deepest(means.select(task=t, pathway=p)) for t in tasks)) for p in means.coords["pathway"]]
    return table(("curve", *tasks), rows)


def _deepest(curve: Result) -> str:
    import numpy as np

    if not np.isfinite(curve.values).any():
        return "-"
    at = int(np.nanargmax(np.abs(curve.values)))
    value, layer = float(curve.values[at]), curve.coords["layer"][at]
    if curve.low is None or curve.high is None or not np.isfinite(curve.low[at]):
        return f"{value:+.1f} at {layer}"
    mark = "" if curve.low[at] > 0 or curve.high[at] < 0 else " (0 inside)"
    return f"{value:+.1f} [{curve.low[at]:.1f}, {curve.high[at]:.1f}] at {layer}{mark}"
