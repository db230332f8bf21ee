"""Attribution by gradients: at pixels, at the connector, at the embeddings, or at a residual point."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.adapters.captum import Attribution, complete_gradients, layer_integrated_gradients
from lab.adapters.captum_pixels import Pixels
from lab.adapters.captum_players import infidelity
from lab.errors import UsageError
from lab.model.ready import Ready
from probes.attributed import Case, share_off
from probes.video_grid import grid_shape, merged, painted, players_of, pooled


def by_gradients(case: Case) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
    match case.what.at:
        case "pixels":
            return _at_pixels(case)
        case "connector":
            return _at_connector(case)
        case _:
            return _at_point(case)


def _at_point(case: Case) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
    """At a hook point whose values have positions."""
    what = case.what
    if what.method == "gradient_shap":
        found, complete = _gradient_shap(case), False
        values, total, error = found, float("nan"), None
    else:
        how: dict[str, Any] = {
            "baseline": case.base.embeds, "target": None, "policy": case.policy, "said": case.said, "forward": case.scored,
            "internal_batch_size": what.batch,
        }  # fmt: skip
        asserted = what.at in ("embed", "resid_pre")
        run = complete_gradients if asserted else layer_integrated_gradients
        got: Attribution = run(case.model, case.ready, what.point, n_steps=what.n_steps, **how)
        complete, values, total = got.complete, got.values, float(got.total[0])
        error = float(got.error[0]) if complete else None
    each = _per_position(values[0], what.at)
    notes: dict[str, Any] = {
        "completeness_error": error,
        "completeness": "applies" if complete else "not applicable",
        "total": total,
    }
    if what.at == "embed":
        _, members = players_of(case.tokens, "tokens", (), None)
        with torch.no_grad():
            game = case.game(members)
            notes["infidelity"] = infidelity(game, members.float() @ each, seed=what.seed)
    video = case.tokens.where(role="video")
    notes["outside_video"] = float(each.sum() - each[video].sum())
    return painted(case.tokens, each), None, notes


def _per_position(values: Tensor, at: str) -> Tensor:
    """[pos, ...] summed to [pos]; of patterns [head, q, k], over heads and queries: what is read of every position."""
    values = values.detach().float().cpu()
    return values.sum((0, 1)) if at == "pattern" else values.flatten(1).sum(1)


def _gradient_shap(case: Case) -> Tensor:
    """captum's LayerGradientShap at the point: gradients at random places between question and baseline."""
    from captum.attr import LayerGradientShap

    torch.manual_seed(case.what.seed)  # captum draws from the global generators
    np.random.seed(case.what.seed)
    with case.model.alone():
        method = LayerGradientShap(case.scored, case.model.hook_dict[case.what.point])
        values: Any = method.attribute(
            case.forward.embeds,
            case.base.embeds,
            n_samples=case.what.n_samples,
            additional_forward_args=(case.forward.world,),
        )
    return values[0] if isinstance(values, tuple) else values


def _at_pixels(case: Case) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
    from captum.attr import GradientShap, IntegratedGradients

    what, other = case.what, _pixel_baseline(case)
    run = Pixels(
        case.model, case.ready, case.score or (lambda logits: logits), policy=case.policy, said=case.said
    )
    x, base = run.value, run.of(other)
    torch.manual_seed(what.seed)
    np.random.seed(what.seed)
    if what.method == "ig":
        values = IntegratedGradients(run).attribute(x, base, n_steps=what.n_steps, internal_batch_size=1)
    else:
        values = GradientShap(run).attribute(x, base, n_samples=what.n_samples)
    with torch.no_grad():
        total = float(run(x)[0] - run(base)[0])
    flat = values[0].detach().float().cpu()
    shape = grid_shape(case.tokens)
    grid = merged(flat, shape) if flat.ndim == 2 else pooled(flat, shape, channels="first")
    error = share_off(float(values.sum()), total) if what.method == "ig" else None
    notes = {"completeness_error": error, "completeness": "applies", "total": total, "tower_rows": run.rows}
    return grid.double().numpy(), None, notes


def _pixel_baseline(case: Case) -> Ready:
    if case.other is None:
        raise UsageError("pixels have no mean embedding; use against='twin', 'reversed' or 'blank'")
    return case.other


def _at_connector(case: Case) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
    from captum.attr import LayerIntegratedGradients

    what, other = case.what, _pixel_baseline(case)
    if what.method != "ig":
        raise UsageError("at the connector there is 'ig'; use at='embed' or 'pixels' for gradient_shap")
    run = Pixels(
        case.model, case.ready, case.score or (lambda logits: logits), policy=case.policy, said=case.said
    )
    x, base = run.value, run.of(other)
    with case.model.alone(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Internal batch size cannot be less")
        method = LayerIntegratedGradients(run, case.model.hook_dict[what.point])
        # one video at a time: the connector's output has frames or patches, not worlds, in front
        values: Any = method.attribute(x, base, n_steps=what.n_steps, internal_batch_size=1)
    values = (values[0] if isinstance(values, tuple) else values).detach().float().cpu()
    with torch.no_grad():
        total = float(run(x)[0] - run(base)[0])
    grid = pooled(values, grid_shape(case.tokens), channels="last")
    notes = {
        "completeness_error": share_off(float(values.sum()), total), "completeness": "applies" if not case.forward.door.deep else
        "not applicable (DeepStack goes round the connector)", "total": total, "tower_rows": run.rows,
    }  # fmt: skip
    return grid.double().numpy(), None, notes
