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
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lab.adapters.captum import (
    COMPLETE,
    SMALL,
    Attribution,
    Forward,
    arrived,
    complete_gradients,
    layer_integrated_gradients,
    refuse_zero,
)
from lab.adapters.captum_pixels import Pixels
from lab.adapters.captum_players import Coalitions, ablation, infidelity, occlusion, shapley
from lab.errors import LabWarning, UsageError
from lab.items import load_items
from lab.model.ready import Ready
from lab.patch.alike import same_tokens
from lab.patch.doors import unlike
from lab.patch.metrics import answers_of
from lab.recipe import ItemsSpec, ModelSpec, Recipe
from lab.result import Result
from lab.runs import Cancel, progress
from lab.slots import plan_of
from probes import against as corrupting
from probes.knockout import load_spec
from probes.video_grid import grid_shape, merged, painted, players_of, pooled, standing

Method = Literal["ig", "gradient_shap", "occlusion", "ablation", "shapley"]
Output = Literal["logit_diff", "logit", "logprob"]
GRADIENTS = ("ig", "gradient_shap")
LAYERED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "pattern")
PLACES = ("embed", "pixels", "connector", *LAYERED)
UNITS = {
    "logit_diff": "logit difference, part of",
    "logit": "logit, part of",
    "logprob": "log probability, part of",
}


class AttributionRecipe(Recipe):
    """An attribution. `items` are simulated or from a file; see `attribute` for the fields (`place` is its `at`)."""

    model: ModelSpec = ModelSpec()
    items: ItemsSpec
    n_frames: int = 8
    method: Method = "shapley"
    place: str = "embed"
    layer: int | None = None
    players: str = "frames"
    block: tuple[int, int, int] = (2, 2, 2)
    against: str | None = None
    target: str | None = None
    output: Output | None = None
    n_steps: int = 32

    def run(self, *, progress: bool = True, model: Any = None) -> list[Result]:
        """Load what the recipe names (or use `model`) and attribute."""
        model = model or load_spec(self.model)
        given = (
            [s.model_dump(mode="json") for s in self.items] if isinstance(self.items, tuple) else self.items
        )
        items = load_items(given, base=self.folder)
        names = ("method", "layer", "players", "block", "against", "target", "output", "n_steps", "n_frames")
        return [
            attribute(
                model,
                items,
                at=self.place,
                **{n: getattr(self, n) for n in names},
                show_progress=progress,
                recipe=self,
            )
        ]


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
    what = _What(
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
    ready = [_ready(model, i, n_frames, mechanisms) for i in given]
    against = corrupting.usual(ready) if against is None else against
    others = _baselines(model, ready, against, given, n_frames, mechanisms)
    cases = list(zip(_keys(ready), ready, others, strict=True))
    rows = [
        _row(model, *case, what, policy)
        for case in progress(cases, desc="attribution", show=show_progress, cancel=cancel)
    ]
    return _result(rows, what, against, recipe)


@dataclass(frozen=True)
class _What:
    """What was asked, checked."""

    method: str
    at: str
    layer: int | None
    players: str
    block: tuple[int, ...]
    target: str | None
    output: str | None
    n_steps: int
    n_samples: int
    max_new_tokens: int
    batch: int
    seed: int

    def check(self, model: Any) -> None:
        for name, value, allowed in (("method", self.method, get_args(Method)), ("at", self.at, PLACES), ("output", self.output, (None, *get_args(Output)))):  # fmt: skip
            if value not in allowed:
                raise UsageError(f"{name}={value!r}; use one of {', '.join(str(a) for a in allowed if a)}")
        if (self.at in LAYERED) != (self.layer is not None):
            raise UsageError(
                f"at={self.at!r}, layer={self.layer}: a layer (0-based) goes with {', '.join(LAYERED)} and with nothing else"
            )
        if self.layer is not None and not 0 <= self.layer < model.cfg.n_layers:
            raise UsageError(
                f"no layer {self.layer + 1} (blocks.{self.layer}): the model has layers 1..{model.cfg.n_layers}"
            )
        if self.method not in GRADIENTS and self.at != "embed":
            raise UsageError(
                f"method={self.method!r} replaces pieces at the decoder's door; leave at='embed', or use 'ig'"
            )
        if min(self.n_steps, self.n_samples, self.batch, self.max_new_tokens) < 1:
            raise UsageError("n_steps, n_samples, batch and max_new_tokens must be at least 1")

    @property
    def point(self) -> str:
        """The hook point of `at`."""
        if self.at in ("embed", "connector"):
            return f"{self.at}.hook_out"
        inner = "attn." if self.at in ("z", "pattern") else ""
        return f"blocks.{self.layer}.{inner}hook_{self.at}"


@dataclass(frozen=True)
class _Row:
    """One item: values over `columns` or over the grid, and notes."""

    key: str
    values: np.ndarray
    columns: list[str] | None
    notes: dict[str, Any]


# ---- one item -------------------------------------------------------------------------------------------------------


class _Case:
    """One item: the question and its baseline at the door, and f."""

    def __init__(self, model: Any, ready: Ready, other: Any, what: _What, policy: Any) -> None:
        self.model, self.ready, self.what, self.policy = model, ready, what, policy
        self.other = other if isinstance(other, Ready) else None
        self.said = _said(model, ready, what, policy)
        self.forward = Forward(model, ready, policy=policy, said=self.said)
        self.base = _base_door(model, ready, other, self.forward)
        refuse_zero(model, self.base.embeds)
        self.tokens = self.forward.maps[0]
        self.score = None if self.said is not None else self._score()
        self.scored = _Scored(self.forward, self.score)

    def _score(self) -> Any:
        with torch.no_grad():
            own, base = (
                self.forward.at(d, torch.zeros(1, dtype=torch.long))[0]
                for d in (self.forward.door, self.base)
            )
        item = self.ready.item
        tokens, letters = answers_of(self.model, item, None if self.other is None else self.other.item)
        token = tokens[0] if tokens else int(own.argmax())
        if tokens is None and letters is not None and item is not None and isinstance(item.answer, int):
            token = letters[item.answer]
        rival = tokens[1] if tokens else int(base.argmax())
        output = self.what.output or ("logit_diff" if rival != token else "logprob")
        if output == "logit_diff" and rival == token:
            raise UsageError(
                f"the baseline answers as the question does ({_text(self.model, token)!r}); use output='logprob'"
            )
        return _Output(output, token, rival)

    @property
    def output(self) -> str:
        return "logprob" if self.score is None else self.score.output

    def ends(self) -> tuple[float, float]:
        """f(x), f(baseline)."""
        world = torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            return float(self.scored.at(self.forward.door, world)[0]), float(
                self.scored.at(self.base, world)[0]
            )

    def game(self, members: Tensor) -> Coalitions:
        return Coalitions(self.scored, self.forward.door, self.base, members, batch=self.what.batch)


@dataclass(frozen=True)
class _Output:
    """Logits [..., d_vocab] -> f [...]."""

    output: str
    token: int
    rival: int

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        match self.output:
            case "logit":
                return logits[..., self.token]
            case "logprob":
                return logits.log_softmax(-1)[..., self.token]
            case _:
                return logits[..., self.token] - logits[..., self.rival]


class _Scored:
    """`Forward` with one number a row."""

    def __init__(self, forward: Forward, score: Any) -> None:
        self.forward, self.score = forward, score

    def __call__(self, embeds: Tensor, world: Tensor | None = None) -> Tensor:
        out = self.forward(embeds, world)
        return out if self.score is None else self.score(out)

    def at(self, door: Any, world: Tensor) -> Tensor:
        out = self.forward.at(door, world)
        return out if self.score is None else self.score(out)


def _row(model: Any, key: str, ready: Ready, other: Any, what: _What, policy: Any) -> _Row:
    calls = model.tower_calls
    case = _Case(model, ready, other, what, policy)
    if what.method in GRADIENTS:
        values, columns, notes = _gradients(case)
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


def _said_text(model: Any, case: _Case) -> str:
    """The answer that is attributed, as text (or as token ids without a tokenizer)."""
    if case.score is not None:
        return _text(model, case.score.token)
    ids = [] if case.said is None else case.said.tolist()
    return model.tokenizer.decode(ids) if model.tokenizer is not None else str(ids)


def _replaced(case: _Case) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
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
        notes["completeness_error"] = _share(float(values.sum()), x - base)
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


def _share(total: float, wanted: float) -> float:
    return abs(total - wanted) / max(abs(wanted), SMALL)


# ---- gradients ------------------------------------------------------------------------------------------------------


def _gradients(case: _Case) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
    match case.what.at:
        case "pixels":
            return _at_pixels(case)
        case "connector":
            return _at_connector(case)
        case _:
            return _at_point(case)


def _at_point(case: _Case) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
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


def _gradient_shap(case: _Case) -> Tensor:
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


def _at_pixels(case: _Case) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
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
    error = _share(float(values.sum()), total) if what.method == "ig" else None
    notes = {"completeness_error": error, "completeness": "applies", "total": total, "tower_rows": run.rows}
    return grid.double().numpy(), None, notes


def _pixel_baseline(case: _Case) -> Ready:
    if case.other is None:
        raise UsageError("pixels have no mean embedding; use against='twin', 'reversed' or 'blank'")
    return case.other


def _at_connector(case: _Case) -> tuple[np.ndarray, list[str] | None, dict[str, Any]]:
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
        "completeness_error": _share(float(values.sum()), total), "completeness": "applies" if not case.forward.door.deep else
        "not applicable (DeepStack goes round the connector)", "total": total, "tower_rows": run.rows,
    }  # fmt: skip
    return grid.double().numpy(), None, notes


# ---- items and baselines --------------------------------------------------------------------------------------------


def _ready(model: Any, item: Any, n_frames: int, mechanisms: Sequence[Any]) -> Ready:
    if isinstance(item, Ready | dict):
        ready = item if isinstance(item, Ready) else model.prepare_inputs(**item)
        ready = replace(ready, plan=ready.plan + plan_of(mechanisms, model.sizes))
    else:
        ready = model.prepare(item, n_frames, mechanisms=mechanisms)
    if ready.n_worlds != 1:
        raise UsageError(
            f"attribution takes one world at a time, got {ready.n_worlds}; prepare them one by one"
        )
    return ready


def _baselines(
    model: Any,
    ready: Sequence[Ready],
    against: Any,
    items: Sequence[Any],
    n_frames: int,
    mechanisms: Sequence[Any],
) -> list[Any]:
    """The other world of every item, prepared; for "mean" the mean video embedding, [d_model]."""
    if isinstance(against, list | tuple) and len(against) != len(ready):
        raise UsageError(f"{len(against)} baselines for {len(ready)} items; give one each")
    if against == "noise":
        raise UsageError("noise is no baseline; use 'twin', 'reversed', 'blank' or 'mean'")
    if against == "zero":
        refuse_zero(model, torch.zeros(1))
        return [torch.zeros(model.cfg.d_model, device=model.device, dtype=model.dtype)] * len(ready)
    if against == "mean":
        return [_mean_embedding(model, ready)] * len(ready)
    each = against if isinstance(against, list | tuple) else [against] * len(ready)
    found = [
        corrupting.corrupted(model, r, a, n_frames, mechanisms) for r, a in zip(ready, each, strict=True)
    ]
    made = [f if isinstance(f, Ready | Tensor) else _ready(model, f, n_frames, mechanisms) for f in found]
    return [
        m if isinstance(m, Tensor) else same_tokens(model, {"question": r, "baseline": m})["baseline"]
        for r, m in zip(ready, made, strict=True)
    ]


@torch.no_grad()
def _mean_embedding(model: Any, ready: Sequence[Ready]) -> Tensor:
    rows = []
    for r in ready:
        door, maps = arrived(model, r)
        rows.append(door.embeds[0, maps[0].where(role="video").to(door.embeds.device)])
    return torch.cat(rows).mean(0)


def _base_door(model: Any, ready: Ready, other: Any, forward: Forward) -> Any:
    """The baseline at the door: the other world's, or the question's with its video tokens all one vector."""
    if isinstance(other, Tensor):
        rows = forward.maps[0].where(role="video").to(forward.embeds.device)
        embeds = forward.embeds.clone()
        embeds[:, rows] = other.to(embeds)
        refuse_zero(model, other)
        return replace(forward.door, embeds=embeds)
    door, maps = arrived(model, other)
    if door.embeds.shape == forward.embeds.shape:
        why = unlike({"the question": forward.maps[0], "the baseline": maps[0]})
        if why:
            raise UsageError(why)
    else:
        raise UsageError(
            f"the baseline has {len(maps[0])} positions and the question {len(forward.maps[0])}; attributions need one for "
            "one: the same number of frames and equally long texts"
        )
    return replace(forward.door, embeds=door.embeds, deep=door.deep)


def _said(model: Any, ready: Ready, what: _What, policy: Any) -> Tensor | None:
    """Token ids of the answer whose log probability is attributed; None: the answer is a single choice."""
    item = ready.item
    if (
        what.target is None
        and item is not None
        and not item.options
        and isinstance(item.answer, str)
        and model.tokenizer
    ):
        text = item.answer
    else:
        text = what.target
    if text is None:
        return None
    if text == "generated":
        ids = model.generate(ready, max_new_tokens=what.max_new_tokens, policy=policy).ids[0]
    else:
        ids = model.need_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if not len(ids):
        raise UsageError(f"the target {text!r} has no tokens")
    return ids


def _result(rows: Sequence[_Row], what: _What, against: Any, recipe: Recipe | None) -> Result:
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


def _text(model: Any, token: int) -> str:
    return model.tokenizer.decode([token]) if model.tokenizer is not None else str(token)
