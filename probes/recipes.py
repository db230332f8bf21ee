"""Recipes of the probes that have no command of their own: fields named and defaulted as the functions' arguments.

    WordsRecipe(items=SimSpec(sim="moving_direction", n=4), tokens="video", top=3).run()

`vlab run` carries them out like any other. What the fields mean stands at the functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from lab.patch.metrics import Metric
from lab.recipe import Recipe as Plain
from lab.result import Result
from probes import attention, lens, patching, tuned_lens, vision
from probes.asking import ProbeRecipe as Owner  # not listed among the recipes that can be run
from probes.asking import load_spec, prepared
from probes.lens import Measure, Mode
from probes.streams import Site

Layers = tuple[int, ...] | None


class Called(Owner):
    """A recipe that calls a function with the model, the items and the recipe's own fields."""

    def probe(self) -> Callable[..., Any]:
        """The function. Subclasses say which."""
        raise NotImplementedError

    def run(self, *, progress: bool = True, model: Any = None) -> list[Result]:
        """Load what the recipe names (or use `model`) and call the function. Raises ConfigError if a file changed."""
        shared = {*Plain.model_fields, *Owner.model_fields}
        given = {n: getattr(self, n) for n in type(self).model_fields if n not in shared}
        found = self.called(model or load_spec(self.model), {**given, "policy": self.edge_policy()}, progress)
        return [replace(r, recipe=self.plain()) for r in found]

    def called(self, model: Any, given: dict[str, Any], progress: bool) -> list[Result]:
        """The function's Results."""
        return [self.probe()(model, prepared(self, model), **given, show_progress=progress)]


class OneItem(Called):
    """A recipe of a function that takes one item: it is called for each, and gives a Result for each."""

    def called(self, model: Any, given: dict[str, Any], progress: bool) -> list[Result]:
        """One Result an item."""
        return [self.probe()(model, r, **given) for r in prepared(self, model)]


class TwoWorlds(Called):
    """A recipe of a function that prepares an item and its other world by itself, alike."""

    def called(self, model: Any, given: dict[str, Any], progress: bool) -> list[Result]:
        """The function's Result."""
        how = {"n_frames": self.n_frames, "mechanisms": self.on(), "show_progress": progress}
        return [self.probe()(model, self.questions(), **given, **how)]


# ---- lens -----------------------------------------------------------------------------------------------------------


class WordsRecipe(Called):
    """The best words on every token of a set, by layer: `probes.lens.words`."""

    tokens: str = "video"
    top: int = Field(default=5, ge=1)
    site: Site = "resid_post"
    mode: Mode = "normed"
    layers: Layers = None

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return lens.words


class VocabularyRecipe(Called):
    """How often words of lists are among the best: `probes.lens.vocabulary`."""

    lists: dict[str, tuple[str, ...]] | None = None
    tokens: str = "video"
    top: int = Field(default=10, ge=1)
    mode: Mode = "normed"
    layers: Layers = None

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return lens.vocabulary


class AnswerByLayerRecipe(Called):
    """Probability of the answers by layer: `probes.lens.gen_prob`."""

    mode: Mode = "normed"
    layers: Layers = None

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return lens.gen_prob


class TunedLensRecipe(Called):
    """Training a tuned lens: `probes.tuned_lens.tune`. The Result is its report; `run` does not keep the lens itself."""

    tokens: str = "*"
    rank: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=20, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    held_out: float = Field(default=0.25, gt=0, lt=1)
    rows: int = Field(default=20_000, ge=1)
    seed: int = 0

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return tuned_lens.tune

    def called(self, model: Any, given: dict[str, Any], progress: bool) -> list[Result]:
        """The report."""
        return [tuned_lens.tune(model, prepared(self, model), **given, show_progress=progress).report]


# ---- attention ------------------------------------------------------------------------------------------------------


class HeadsRecipe(Called):
    """The heads that look along a pathway most: `probes.attention.heads`."""

    pathway: str
    top: int = Field(default=10, ge=1)
    layers: Layers = None

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return attention.heads


class EntropyRecipe(Called):
    """How spread out heads look: `probes.attention.entropy`."""

    roles: tuple[str, ...] = Field(default=("video", "last"), min_length=1)
    layers: Layers = None

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return attention.entropy


class FrameMapRecipe(Called):
    """Which frames look at which: `probes.attention.frame_map`."""

    layers: Layers = None
    causal: bool = True

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return attention.frame_map


class RowsRecipe(OneItem):
    """Rows of the attention pattern: `probes.attention.rows`."""

    queries: str = "last"
    layers: Layers = None

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return attention.rows


class SinksRecipe(OneItem):
    """Positions that everybody looks at: `probes.attention.sinks`."""

    above: float = Field(default=attention.SINK, gt=0)
    layers: Layers = None
    causal: bool = True

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return attention.sinks


# ---- patching -------------------------------------------------------------------------------------------------------


class PathPatchingRecipe(TwoWorlds):
    """Receivers alone read the other world's senders: `probes.patching.path_patching`."""

    paths: tuple[str, ...] = Field(default=patching.PATHS, min_length=1)
    via: Literal["kv", "k", "v"] = "kv"
    window: int = Field(default=1, ge=1)
    into: Literal["corrupted", "clean"] = "corrupted"
    against: str | None = None
    metric: Metric = "recovered"

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return patching.path_patching


class AttributionPatchingRecipe(TwoWorlds):
    """The patching grid estimated from gradients: `probes.patching.attribution_patching`."""

    by: patching.By = "frame"
    site: str = "resid_pre"
    role: str | None = None
    into: Literal["corrupted", "clean"] = "corrupted"
    against: str | None = None
    metric: Metric = "recovered"
    steps: int = Field(default=8, ge=1)
    path: Literal["inputs", "activations"] = "inputs"
    exact: bool = True
    added: ClassVar[tuple[str, ...]] = (*TwoWorlds.added, "path")

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return patching.attribution_patching


# ---- the tower ------------------------------------------------------------------------------------------------------


class TowerLensRecipe(Called):
    """The logit lens inside the tower: `probes.vision.tower_lens`."""

    words: tuple[str, ...] = Field(default=(lens.ANSWER,), min_length=1)
    measure: Measure = "p"
    layers: Layers = None

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return vision.tower_lens


class TowerKnockoutRecipe(Called):
    """Attention between patches cut inside the tower: `probes.vision.tower_knockout`."""

    pathways: tuple[str, ...] = Field(default=("between-patches",), min_length=1)
    window: int = Field(default=1, ge=1)
    layers: Layers = None

    def probe(self) -> Callable[..., Any]:
        """The function."""
        return vision.tower_knockout
