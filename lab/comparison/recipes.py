"""The recipe of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from lab.comparison.reports import Report
from lab.comparison.running import compared
from lab.comparison.variants import VANILLA, variants_of
from lab.items import load_items
from lab.mechanisms import of_plain
from lab.recipe import ItemsSpec, ModelSpec, Recipe
from lab.result import Result

SETTINGS = ("pathways", "window", "controls", "rounds", "new_tokens", "seed")


class CompareRecipe(Recipe):
    """A comparison: a model, mechanisms by name (each a list of plain data), further models by name, items.

    The rest is as `lab.compare` names it; `n_frames` holds for items that do not say their own.
    """

    model: ModelSpec = ModelSpec()
    mechanisms: dict[str, tuple[dict[str, Any], ...]] = {}
    variants: dict[str, ModelSpec] = {}
    items: ItemsSpec
    n_frames: int = 8
    pathways: tuple[str, ...] | None = None
    window: int | None = Field(default=None, ge=1)
    controls: bool = True
    rounds: int = Field(default=5, ge=0)
    new_tokens: int = Field(default=8, ge=1)
    seed: int = 0

    def run(self, *, progress: bool = True, model: Any = None, out: str | Path | None = None) -> list[Result]:
        """Load what the recipe names (or use `model`) and compare. Raises ConfigError if a file or weights changed."""
        return list(self.report(progress=progress, model=model, out=out).results.values())

    def report(self, *, progress: bool = True, model: Any = None, out: str | Path | None = None) -> Report:
        """The same as a Report."""
        from probes.knockout import load_spec

        others = {name: load_spec(spec) for name, spec in self.variants.items()}
        named = {VANILLA: model or load_spec(self.model), **others}
        variants = variants_of(named, self.mechanisms_on(), controls=self.controls, seed=self.seed)
        items, sampling = self.loaded_items()
        return compared(
            variants,
            items,
            sampling,
            self.model_dump(include=set(SETTINGS)),
            self.plain(),
            out,
            None,
            progress,
        )

    def write(self, results: Sequence[Result], folder: str | Path) -> list[Path]:
        """Save what `run` gave as a report; returns the files."""
        return Report.of(results).save(folder)

    def mechanisms_on(self) -> dict[str, tuple[Any, ...]]:
        """Name -> mechanisms. Raises ConfigError for unknown ones."""
        return {name: tuple(of_plain(m) for m in several) for name, several in self.mechanisms.items()}

    def loaded_items(self) -> tuple[list[Any], list[dict[str, Any]]]:
        """The items, and how each one's frames are chosen."""
        listed = self.items if isinstance(self.items, tuple) else None
        source = self.items if listed is None else [s.model_dump(mode="json") for s in listed]
        items = load_items(source, base=self.folder)
        own = [s.video.sampling() for s in listed] if listed is not None else [{}] * len(items)
        return items, [how or {"n_frames": self.n_frames} for how in own]
