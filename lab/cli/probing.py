"""`vlab lens`, `vlab attention`, `vlab probe`: probes over the same items as `vlab sweep`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.cli.asking import Setting
from lab.cli.keeping import keep
from lab.cli.output import Reply, folder_for
from lab.cli.rerunning import resumable, write_results
from lab.cli.sources import source_of
from lab.cli.switching import switched_on
from lab.errors import UsageError


@dataclass(frozen=True)
class Over:
    """What every probe is asked over: items as `--items` names them, a model, a policy and mechanisms, and where the files go."""

    items: str
    setting: Setting
    policy: str | None
    mechanisms: Sequence[str] | None
    layers: str | None
    out: str

    def fields(self, model: Any) -> dict[str, Any]:
        """Fields of the probe's recipe."""
        from lab.cli.policies import find
        from lab.recipe import ModelSpec

        rules = None if self.policy is None else find(self.policy, model.cfg.n_layers).to_dict()
        return {
            "model": ModelSpec(**(model.spec or {})), "items": source_of(self.items), "n_frames": self.setting.frames or 8,
            "policy": rules, "mechanisms": switched_on(self.mechanisms), "layers": _layers(self.layers, model.cfg.n_layers),
        }  # fmt: skip


def _layers(said: str | None, n_layers: int) -> tuple[int, ...] | None:
    """ "1-4,8" as layers. Raises UsageError."""
    if said is None:
        return None
    out: list[int] = []
    for part in said.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--layers {said!r}: give layers such as 1-4,8")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high <= n_layers:
            raise UsageError(f"--layers {said!r}: {part.strip()} is not in 1-{n_layers}, the model's layers")
        out += range(low, high + 1)
    return tuple(out)


def lens(
    over: Over, tokens: Sequence[str], words: Sequence[str], measure: str, by: str, site: str, mode: str, paint: int | None
) -> Reply:  # fmt: skip
    """Result, report, picture and recipe; with `paint`, the best words of that layer on the first item's frames."""
    from probes.lens import LensRecipe

    model = over.setting.load()
    if paint is not None and not 1 <= paint <= model.cfg.n_layers:
        raise UsageError(f"--paint {paint}: the model has layers 1..{model.cfg.n_layers}")
    recipe = checked(
        LensRecipe, **over.fields(model), tokens=tuple(tokens or ["last"]), words=tuple(words or ["answer"]), measure=measure,
        by=by, site=site, mode=mode,
    )  # fmt: skip
    reply = _carried_out(recipe, model, over)
    return reply if paint is None else _painted(reply, recipe, model, over, paint)


def attention(over: Over, pathways: Sequence[str], causal: bool) -> Reply:
    """Result, report, picture and recipe; the causal check is drawn beside."""
    from probes.attention import AttentionRecipe

    model = over.setting.load()
    recipe = checked(AttentionRecipe, **over.fields(model), pathways=tuple(pathways) or None, causal=causal)
    return _carried_out(recipe, model, over)


def linear(
    over: Over, label: str, roles: Sequence[str], site: str, folds: int, twins: bool, seed: int
) -> Reply:
    """Result, report, picture and recipe; interrupted, the same command goes on where it stopped."""
    from probes.linear import LinearRecipe

    model = over.setting.load()
    recipe = checked(
        LinearRecipe, **over.fields(model), label=label, roles=tuple(roles or ["video", "last"]), site=site, folds=folds,
        twins=twins, seed=seed,
    )  # fmt: skip
    return _carried_out(recipe, model, over)


def checked(cls: Any, **fields: Any) -> Any:
    """The recipe. Raises UsageError with pydantic's findings in one line."""
    from pydantic import ValidationError

    from lab.recipe import explain

    try:
        return cls(**fields)
    except ValidationError as e:
        raise UsageError(explain(e, cls)) from None


def _carried_out(recipe: Any, model: Any, over: Over) -> Reply:
    if over.setting.fps is not None:
        raise UsageError("--fps: a probe takes the same number of frames of every video; use --frames")
    folder, started = folder_for(over.out), time.monotonic()
    results = resumable(recipe, folder, model=model)
    files = keep(recipe, write_results(results, folder), folder, started)
    data = {
        "recipe": recipe.id, "ledger": results[0].ledger, "files": [str(f) for f in files],
        "results": [json.loads(r.to_json()) for r in results],
    }  # fmt: skip
    return Reply(data, "\n".join([*map(repr, results), *_readings(results), *data["files"]]))


def _readings(results: Sequence[Any]) -> list[str]:
    """What stands out in each picture, in a sentence."""
    from lab.view.panels import panels
    from lab.view.specs import figure_spec

    said = [(p.name, figure_spec(p).reading) for r in results for p in panels(r)]
    return [f"{name}: {text}" for name, text in said if text]


def _painted(reply: Reply, recipe: Any, model: Any, over: Over, layer: int) -> Reply:
    from lab.view.words import paint
    from probes.lens import painted, words

    who = recipe.asked(model)
    ready = who.cases[0].ready
    found = painted(
        words(
            model,
            ready,
            "video",
            top=1,
            mode=recipe.mode,
            layers=[layer],
            policy=who.policy,
            site=recipe.site,
        ),
        layer=layer,
    )
    if ready.frames is None:
        raise UsageError("--paint: this item has no frames to paint on")
    file = paint(found, ready.frames.pictures, Path(over.out) / "words.png")
    return Reply({**reply.data, "files": [*reply.data["files"], str(file)]}, f"{reply.text}\n{file}")
