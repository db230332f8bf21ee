"""Evaluation of an edge policy on items it was not made on, beside its baselines: `lab.edges.evidence`, with a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from lab.edges.curves import curve_of
from lab.edges.evidence import evaluate
from lab.edges.policy import Policy
from lab.items import load_items
from lab.recipe import ItemsSpec, ModelSpec, Recipe
from lab.result import Result
from probes.asking import load_spec


class EvaluationRecipe(Recipe):
    """A policy measured on held-out items. policy: as `lab.edges.Policy.to_dict` writes it; baselines: see `evaluate`."""

    model: ModelSpec = ModelSpec()
    items: ItemsSpec
    n_frames: int = Field(default=8, ge=1)
    policy: dict[str, Any]
    baselines: tuple[str, ...] | str = "all"
    seed: int = 0

    def run(self, *, progress: bool = True, model: Any = None, out: str | Path | None = None) -> list[Result]:
        """The evaluation, and accuracy against edges kept. Raises ConfigError if file or weights changed."""
        model = model or load_spec(self.model)
        found = evaluate(
            model, Policy.from_dict(self.policy, "policy"), list(load_items(self.items, base=self.folder)), self.baselines,
            n_frames=self.n_frames, seed=self.seed, out=out, show_progress=progress,
        )  # fmt: skip
        found = replace(found, recipe=self.plain())
        return [found, curve_of(found)]

    def further(self, results: Sequence[Result], folder: Path) -> list[Path]:
        """Writes the policy that was measured."""
        Policy.from_dict(self.policy, "policy").save(folder / "policy.yaml")
        return [folder / "policy.yaml"]
