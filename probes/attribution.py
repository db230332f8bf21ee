"""Attribution: how much of an answer each piece of the video is worth, against a baseline, with captum.

    "ig", "gradient_shap"                   gradients, at pixels, connector, embeddings or a residual point
    "occlusion", "ablation", "shapley"      pieces replaced by the baseline's, in embedding space: frames, tubelets, objects

f is the answer's score: of a letter, or the log probability of a generated or given text. Gradients and Shapley values
sum to f(x) - f(baseline) (completeness), which is checked. Baselines are twins, blank videos or the data set's mean
embedding; a zero embedding says nothing under RMSNorm and is refused. Draws nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from lab.adapters.captum import (
    COMPLETE,
)
from lab.adapters.captum_players import ablation, infidelity, occlusion, shapley
from lab.errors import LabWarning, UsageError
from lab.model.ready import Ready
from lab.recipe import Recipe
from lab.result import Result
from lab.runs import Cancel, progress
from probes import against as corrupting
from probes.asking import ProbeRecipe, load_spec
from probes.attributed import GRADIENTS, Case, Method, Output, What, share_off, text_of
from probes.attribution_gradients import by_gradients
from probes.baselines import baselines_of, made_ready
from probes.video_grid import painted, players_of, standing

UNITS = {
    "logit_diff": "logit difference, part of",
    "logit": "logit, part of",
    "logprob": "log probability, part of",
}


class AttributionRecipe(ProbeRecipe):
    """An attribution; see `attribute` for the fields (`place` is its `at`)."""

    method: Method = "shapley"
    place: str = "embed"
    layer: int | None = None
    players: str = "frames"
    block: tuple[int, int, int] = (2, 2, 2)
    against: str | None = None
    target: str | None = None
    output: Output | None = None
    n_steps: int = 32
    added: ClassVar[tuple[str, ...]] = ("mechanisms", "policy")

    def run(self, *, progress: bool = True, model: Any = None) -> list[Result]:
        """Load what the recipe names (or use `model`) and attribute."""
        names = ("method", "layer", "players", "block", "against", "target", "output", "n_steps", "n_frames")
        given = {n: getattr(self, n) for n in names}
        return [
            attribute(
                model or load_spec(self.model), self.questions(), at=self.place, **given, policy=self.edge_policy(),
                mechanisms=self.on(), show_progress=progress, recipe=self,
            )
        ]  # fmt: skip


def attribute(
    model: Any, items: Any, *, method: Method = "shapley", at: str = "embed", layer: int | None = None,
    players: str = "frames", block: Sequence[int] = (2, 2, 2), against: Any = None, target: str | None = None,
    output: Output | None = None, n_frames: int = 8, n_steps: int = 32, n_samples: int = 25, max_new_tokens: int = 16,
    batch: int = 32, seed: int = 0, policy: Any = None, mechanisms: Sequence[Any] = (), cancel: Cancel | None = None,
    show_progress: bool = True, recipe: Recipe | None = None,
) -> Result:  # fmt: skip
    """What every frame, block, object or token of the video is worth for the answer.

    items     one or several VideoQA or Ready (one world each), of one grid of video tokens
    method    "ig" and "gradient_shap" at a place; "occlusion", "ablation" and "shapley" of players at the door
    at        of gradients: "embed", "pixels", "connector", or a site of `layer` (0-based): "resid_pre", "z", "pattern"
    players   "frames", "tubelets" (blocks of `block` frames, rows, columns), "tokens", "objects" (simulated videos);
              occlusion slides `block` over the tokens, half a block at a time
    against   the baseline: "twin", "reversed", "blank", "mean" (the mean video embedding over all items), or one per item
    target    None: the right letter of items with options, else the token answered; "generated": what the model says,
              `max_new_tokens` at most; or a text
    output    "logit_diff" to the baseline's answer, "logit" or "logprob"; None: "logit_diff" where the baseline answers
              otherwise, else "logprob". Of a text always its log probability

    Returns a Result with axes (item, frame), (item, player) or (item, frame, row, col). `notes`: f(x), f(baseline), the
    completeness error (null where it is not to be expected), infidelity, decoder rows and tower calls.
    Raises UsageError for a zero baseline under RMSNorm and items of different grids; RunError where gradients at "embed"
    or "resid_pre" miss completeness by more than 1 %.
    """
    what = What(
        method,
        at,
        layer,
        players,
        tuple(block),
        target,
        output,
        n_steps,
        n_samples,
        max_new_tokens,
        batch,
        seed,
    )
    what.check(model)
    given = _listed(items)
    policy = model.pruning.chosen(policy)
    ready = [made_ready(model, i, n_frames, mechanisms) for i in given]
    against = corrupting.usual(ready) if against is None else against
    others = baselines_of(model, ready, against, given, n_frames, mechanisms)
    cases = list(zip(_keys(ready), ready, others, strict=True))
    rows = [
        _row(model, *case, what, policy)
        for case in progress(cases, desc="attribution", show=show_progress, cancel=cancel)
    ]
    return _result(rows, what, against, recipe)


@dataclass(frozen=True)
class _Row:
    """One item: values over `columns` or over the grid, and notes."""

    key: str
    values: np.ndarray
    columns: list[str] | None
    notes: dict[str, Any]


# ---- one item -------------------------------------------------------------------------------------------------------


def _row(model: Any, key: str, ready: Ready, other: Any, what: What, policy: Any) -> _Row:
    calls = model.tower_calls
    case = Case(model, ready, other, what, policy)
    if what.method in GRADIENTS:
        values, columns, notes = by_gradients(case)
    else:
        values, columns, notes = _replaced(case)
    x, base = case.ends()
    answer = _said_text(model, case)
    more = {
        "answer": answer,
        "output": case.output,
        "f": x,
        "f_baseline": base,
        "tower_calls": model.tower_calls - calls,
    }
    return _Row(key, values, columns, {**more, **notes})


def _said_text(model: Any, case: Case) -> str:
    """The answer that is attributed, as text (or as token ids without a tokenizer)."""
    if case.score is not None:
        return text_of(model, case.score.token)
    ids = [] if case.said is None else case.said.tolist()
    return model.tokenizer.decode(ids) if model.tokenizer is not None else str(ids)


def _replaced(case: Case) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
    """Players replaced by the baseline."""
    what, item = case.what, case.ready.item
    kind = "tokens" if what.method == "occlusion" else what.players
    names, members = players_of(case.tokens, kind, what.block, item)
    game = case.game(members)
    notes: dict[str, Any] = {}
    match what.method:
        case "occlusion":
            strides = [max(1, b // 2) for b in what.block]
            values = occlusion(game, standing(case.tokens), what.block, strides)
        case "ablation":
            values = ablation(game)
        case _:
            torch.manual_seed(what.seed)  # captum draws the orders of players from the global generator
            values, notes["exact"] = shapley(game, n_samples=what.n_samples)
    if what.method == "shapley":
        x, base = case.ends()
        notes["completeness_error"] = share_off(float(values.sum()), x - base)
    else:
        notes["completeness_error"] = None  # one piece at a time: interactions are in none, or in several
    notes["infidelity"] = infidelity(game, values, seed=what.seed)
    notes |= {"decoder_rows": game.runs, "players": len(names)}
    values = values.detach().cpu()
    if kind in ("frames", "objects"):
        return values.double().numpy(), names, notes
    if what.method != "occlusion":  # a block's value, shared by its tokens: sums stay what they are
        values = values / members.sum(1)
    paint = (members.float() * values[:, None]).sum(0)
    return painted(case.tokens, paint), None, notes


# ---- gradients ------------------------------------------------------------------------------------------------------


# ---- items and baselines --------------------------------------------------------------------------------------------


def _result(rows: Sequence[_Row], what: What, against: Any, recipe: Recipe | None) -> Result:
    gridded = rows[0].columns is None
    if gridded:
        shapes = {r.values.shape for r in rows}
        if len(shapes) > 1:
            raise UsageError(
                f"the items have grids of {sorted(shapes)} video tokens; attribute them one by one"
            )
        values, axes = np.stack([r.values for r in rows]), ("item", "frame", "row", "col")
        coords = {a: list(range(n)) for a, n in zip(axes[1:], values.shape[1:], strict=True)}
    else:
        columns = list(dict.fromkeys(c for r in rows for c in r.columns or ()))
        values = np.full((len(rows), len(columns)), np.nan)
        for i, r in enumerate(rows):
            values[i, [columns.index(c) for c in r.columns or ()]] = r.values
        frames = what.players == "frames"
        axes = ("item", "frame") if frames else ("item", "player")
        coords = {axes[1]: list(range(len(columns))) if frames else columns}
    outputs = {r.notes["output"] for r in rows}
    _warn(rows)
    return Result(
        values=values, axes=axes, coords={"item": [r.key for r in rows], **coords},
        unit=UNITS[outputs.pop()] if len(outputs) == 1 else "score, part of",
        recipe=recipe.plain() if recipe else {}, name=f"attribution ({what.method}, {what.at})", baseline=0.0,
        notes={
            "method": what.method, "at": what.at if what.layer is None else f"{what.at}, layer {what.layer + 1}",
            "players": what.players if what.method not in GRADIENTS else "tokens",
            "against": against if isinstance(against, str | None) else "given", "items": {r.key: r.notes for r in rows},
        },
    )  # fmt: skip


def _warn(rows: Sequence[_Row]) -> None:
    """Where completeness was only looked at."""
    for r in rows:
        error = r.notes.get("completeness_error")
        if error is not None and r.notes.get("completeness", "applies") == "applies" and error > COMPLETE:
            warnings.warn(
                f"{r.key}: the attributions miss f(x) - f(baseline) by {100 * error:.1f} %; take more n_steps",
                LabWarning,
                stacklevel=3,
            )


def _listed(items: Any) -> list[Any]:
    given = list(items) if isinstance(items, list | tuple) else [items]
    if not given:
        raise UsageError("no items given; a probe needs at least one question")
    return given


def _keys(ready: Sequence[Ready]) -> list[str]:
    names = [(r.item.id if r.item is not None else "") or f"item:{n}" for n, r in enumerate(ready, 1)]
    return [name if names.count(name) == 1 else f"{name}#{n}" for n, name in enumerate(names, 1)]
