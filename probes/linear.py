"""Linear probes: what can be read off the stream with a straight cut, at which layer, on which tokens (Alain & Bengio 2016).

1 run every item once; keep the mean row of each role at each layer (or of each frame)   2 fit a linear map from rows to
labels on all folds but one, predict the one; items that show the same video, and twins, are in one fold   3 do the same
with labels shuffled over the samples: what such a probe reads is chance, and the difference is selectivity (Hewitt &
Liang 2019).
Texts as labels are classified (logistic), numbers are regressed (ridge). Streams are kept item by item, in safetensors
files where a folder is given: an interrupted run goes on, and no more than one layer of all items is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from lab.edges.sweeping import _fingerprint as fingerprint
from lab.errors import UsageError
from lab.result import Result, write_bytes
from lab.runs import progress
from probes.asking import Asked, Case, ProbeRecipe, asked, recipe_fields
from probes.fitting import Span, logistic, ridge
from probes.folds import folds_of, groups_of_items
from probes.labels import LABELS, labels_of
from probes.streams import Site, check_site, layers_asked, visit

__all__ = ["LABELS", "LinearRecipe", "linear"]

Kind = Literal["auto", "logistic", "ridge"]
FRAME = "frames"  # the role that stands for every frame by itself
SHUFFLES = 5
BOOTS = 1000


class LinearRecipe(ProbeRecipe):
    """A linear probe: what is read, where. Layers 1-based."""

    label: str = "answer"
    roles: tuple[str, ...] = Field(default=("video", "last"), min_length=1)
    site: Site = "resid_post"
    layers: tuple[int, ...] | None = None
    kind_of_probe: Kind = "auto"
    folds: int = Field(default=5, ge=2)
    shuffles: int = Field(default=SHUFFLES, ge=1)
    twins: bool = False
    seed: int = Field(default=0, ge=0)

    def run(self, *, progress: bool = True, model: Any = None, out: str | Path | None = None) -> list[Result]:
        """Load what the recipe names (or use `model`) and probe. `out`: a folder for streams, to go on from."""
        who = self.asked(model)
        if self.twins:
            found = [c.ready for c in who.cases]
            who = asked(
                who.model,
                found,
                n_frames=self.n_frames,
                policy=who.policy,
                mechanisms=self.on(),
                twins=True,
            )
        what = _What(
            self.label,
            self.roles,
            self.site,
            self.layers,
            self.kind_of_probe,
            self.folds,
            self.shuffles,
            self.seed,
        )
        return [_linear(who, what, out, self.plain(), progress)]


@dataclass(frozen=True)
class _What:
    """A probe's settings. Raises UsageError for what is not known."""

    label: Any
    roles: tuple[str, ...]
    site: str
    layers: Any
    kind: str
    folds: int
    shuffles: int
    seed: int

    def __post_init__(self) -> None:
        check_site(self.site)
        if self.kind not in get_args(Kind):
            raise UsageError(f"kind={self.kind!r}; use one of {', '.join(get_args(Kind))}")
        if not self.roles or self.shuffles < 1:
            raise UsageError(
                f"{len(self.roles)} roles and {self.shuffles} shuffles: at least one of each is needed"
            )


def linear(
    model: Any, items: Any, label: Any = "answer", *, roles: str | Sequence[str] = ("video", "last"),
    site: Site = "resid_post", layers: Sequence[int] | None = None, kind: Kind = "auto", folds: int = 5,
    shuffles: int = SHUFFLES, twins: bool = False, seed: int = 0, n_frames: int = 8, policy: Any = None,
    mechanisms: Sequence[Any] = (), out: str | Path | None = None, show_progress: bool = True,
) -> Result:  # fmt: skip
    """Probe streams for a label, by layer and role, held out by video.

    label    a name of `LABELS` ("direction", "position", "count", "colour", "time", "next event", "answer", ...; for
             simulated items), a function of an item, or one value for every item. A list of values for an item holds one
             for every frame of its video: then only "frames" and "frame:N" make sense as roles
    roles    segments (mean over their tokens); "frames": every frame's mean is a sample of its own
    kind     "auto": logistic for texts, ridge for numbers
    folds    groups of items that are held out in turn; twins and items with the same video are never parted
    shuffles how often the control is fitted, with labels shuffled over the samples
    twins    take every item's twin too
    out      folder for the streams; the same call goes on where it stopped

    Returns a Result with axes (labels, role, layer): "true", "random" and "selectivity" (their difference), each held-out
    accuracy (classes) or R2 (numbers, below 0: worse than the mean); low and high bound the true probe and the
    selectivity by a bootstrap over videos. `notes`: chance, number of samples and videos, predictions of nobody.
    Raises UsageError for too few videos, one class only, or labels that do not fit.
    """
    names = (roles,) if isinstance(roles, str) else tuple(roles)
    if seed < 0:
        raise UsageError(f"seed must be at least 0, got {seed}")
    what = _What(label, names, site, layers, kind, folds, shuffles, seed)
    fields = recipe_fields(model, items, n_frames, policy, mechanisms)
    recipe: dict[str, Any] = {}
    if fields is not None and isinstance(label, str) and not twins:
        chosen = None if layers is None else tuple(layers)
        recipe = LinearRecipe(**fields, label=label, roles=names, site=site, layers=chosen, kind_of_probe=kind, folds=folds, shuffles=shuffles, seed=seed).plain()  # fmt: skip
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=twins)
    return _linear(who, what, out, recipe, show_progress)


def _linear(who: Asked, what: _What, out: Any, recipe: dict[str, Any], show: bool) -> Result:
    layers = layers_asked(who.model.cfg.n_layers, what.layers)
    labels = labels_of(what.label, [c.item for c in who.cases])
    groups = groups_of_items([c.item for c in who.cases])
    streams = _Streams(who, what, layers, None if out is None else Path(out))
    jobs = {role: _job(who, what, role, labels, groups) for role in what.roles}
    streams.fill(show)  # after all that can be refused without running anything
    cells = [(r, i) for r in range(len(what.roles)) for i in range(len(layers))]
    values, low, high = (np.full((3, len(what.roles), len(layers)), np.nan) for _ in range(3))
    for r, i in progress(cells, desc="probes", show=show):
        found = jobs[what.roles[r]].probe(streams.rows(what.roles[r], i))
        values[:, r, i], low[:, r, i], high[:, r, i] = found
    first = jobs[what.roles[0]]
    return Result(
        values=values, axes=("labels", "role", "layer"),
        coords={"labels": ["true", "random", "selectivity"], "role": list(what.roles), "layer": [i + 1 for i in layers]},
        unit="held-out accuracy" if first.classes else "held-out R2", recipe=recipe, low=low, high=high,
        name=f"linear probe: {what.label if isinstance(what.label, str) else 'label'}", baseline=first.chance,
        notes={
            "chance": first.chance, "classes": first.classes, "folds": what.folds, "site": what.site,
            "samples": {role: len(job.of_sample) for role, job in jobs.items()}, "videos": len(set(groups)),
            "probe": first.kind, "shuffles": what.shuffles, "ledger": who.ledger(streams.ran),
        },
    )  # fmt: skip


# ---- streams --------------------------------------------------------------------------------------------------------


class _Streams:
    """Mean rows of every role, layer and item: in memory, or one safetensors file an item."""

    def __init__(self, who: Asked, what: _What, layers: Sequence[int], folder: Path | None) -> None:
        self.who, self.what, self.layers, self.folder = who, what, layers, folder
        self.held: list[dict[str, Tensor]] = []
        self.paths = {c.key: self._path(c) for c in who.cases}
        self.ran = 0

    def fill(self, show: bool) -> None:
        """Run what is not there yet."""
        for case in progress(self.who.cases, desc="streams", show=show):
            path = self.paths[case.key]
            if path is None:
                self.held.append(self._run(case))
            elif not _whole(path):
                write_bytes(path, save(self._run(case)))

    def rows(self, role: str, layer: int) -> list[Tensor]:
        """The samples of every item at one layer (by its place among those asked), [sample, d_model] each."""
        if self.folder is None:
            return [h[role][layer] for h in self.held]
        out: list[Tensor] = []
        for case in self.who.cases:
            with safe_open(str(self.paths[case.key]), "pt") as f:
                out.append(f.get_slice(role)[layer])
        return out

    def _path(self, case: Case) -> Path | None:
        """Named after all that the rows depend on; of the weights, what a recipe would say of them."""
        if self.folder is None:
            return None
        policy = self.who.policy
        about = [
            self.who.model.cfg.model_name, str(getattr(self.who.model, "spec", "")), fingerprint(case.ready), self.what.site,
            *self.what.roles, *map(str, self.layers), str(getattr(policy, "id", policy)), repr(case.mechanisms), repr(case.ready.plan),
        ]  # fmt: skip
        return self.folder / f"{hashlib.sha256('|'.join(about).encode()).hexdigest()[:24]}.safetensors"

    def _run(self, case: Case) -> dict[str, Tensor]:
        """role -> [layer, sample, d_model]; a role's tokens that a mechanism dropped are left out, nan if none is left."""
        self.ran += 1
        sets = {role: _samples(case, role) for role in self.what.roles}
        positions = torch.cat([p for sample in sets.values() for p in sample]).unique()
        width = self.who.model.cfg.d_model
        out = {r: torch.full((len(self.layers), len(s), width), torch.nan) for r, s in sets.items()}

        def see(layer: int, rows: Tensor, kept: Tensor) -> None:
            rows, here = rows.float().cpu(), positions[kept]
            for role, samples in sets.items():
                for j, sample in enumerate(samples):
                    mine = torch.isin(here, sample)
                    if bool(mine.any()):
                        out[role][self.layers.index(layer), j] = rows[mine].mean(0)

        visit(self.who.model, case, self.what.site, self.layers, positions, see, policy=self.who.policy)
        return out


def _samples(case: Case, role: str) -> list[Tensor]:
    """The positions of each sample of a role: one, or one a frame."""
    if role != FRAME:
        return [case.at(role)]
    return [case.tokens.where(role="frame", frame=f) for f in range(case.tokens.n_frames)]


def _whole(path: Path) -> bool:
    """Whether the file holds a finished item."""
    if not path.exists():
        return False
    try:
        load(path.read_bytes())
    except Exception:  # damaged: run that item again
        return False
    return True


# ---- one role -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What is asked of one role's samples.

    of_sample  item of every sample; y: class numbers [sample] or values [sample, k]; fold, group of every sample
    shuffled   y for every control
    """

    of_sample: list[int]
    y: Tensor
    shuffled: list[Tensor]
    classes: list[str]
    kind: str
    fold: Tensor
    group: Tensor
    chance: float
    seed: int

    def probe(self, rows: Sequence[Tensor]) -> tuple[Any, Any, Any]:
        """(true, random, selectivity): values, low, high, from every item's samples [sample, d_model]."""
        x = torch.cat(list(rows))
        if not bool(x.isfinite().all()):
            lost = np.full(3, np.nan)
            return lost, lost, lost
        spans = [Span.of(x[self.fold != f]) for f in range(int(self.fold.max()) + 1)]
        true = self._scores(x, self.y, spans)
        random = [self._scores(x, y, spans) for y in self.shuffled]
        value = np.array([self._total(*true), float(np.mean([self._total(*r) for r in random])), 0.0])
        value[2] = value[0] - value[1]
        low, high = self._interval(true, random)
        return value, low, high

    def _scores(self, x: Tensor, y: Tensor, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Held out: what was got right of every sample, and what there was to get: 1, or the squares (for R2)."""
        got, of = torch.zeros(len(y), dtype=torch.double), torch.ones(len(y), dtype=torch.double)
        for f, span in enumerate(spans):
            test = self.fold == f
            if self.classes:
                # a ridge probe of classes: one number per class, the largest wins
                one_hot = torch.nn.functional.one_hot(y[~test], len(self.classes))
                said = logistic(span, y[~test], len(self.classes), x[test]) if self.kind == "logistic" else ridge(span, one_hot, x[test])  # fmt: skip
                got[test] = (said.argmax(-1) == y[test]).double()
                continue
            left = ((y[test] - ridge(span, y[~test], x[test])) ** 2).sum(-1)
            of[test] = ((y[test] - y[~test].mean(0)) ** 2).sum(-1)
            got[test] = of[test] - left
        return got, of

    @staticmethod
    def _total(got: Tensor, of: Tensor) -> float:
        return float(got.sum() / of.sum())

    def _interval(
        self, true: tuple[Tensor, Tensor], random: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Any, Any]:
        """95 % by resampling videos; the control's own spread is that over shuffles."""
        n = int(self.group.max()) + 1
        sums = [
            torch.zeros(n, dtype=torch.double).index_add_(0, self.group, t)
            for pair in (true, *random)
            for t in pair
        ]
        draws = torch.randint(n, (BOOTS, n), generator=torch.Generator().manual_seed(self.seed))
        picked = [s[draws].sum(1) for s in sums]
        scores = [g / o.clamp(min=1e-300) for g, o in zip(picked[::2], picked[1::2], strict=True)]
        control = torch.stack(scores[1:]).mean(0)
        ends = [np.quantile(s.numpy(), (0.025, 0.975)) for s in (scores[0], control, scores[0] - control)]
        return np.array([e[0] for e in ends]), np.array([e[1] for e in ends])


def _job(who: Asked, what: _What, role: str, labels: Sequence[Any], groups: Sequence[int]) -> _Job:
    values: list[Any] = []
    of_sample: list[int] = []
    for i, (case, label) in enumerate(zip(who.cases, labels, strict=True)):
        mine = _labels_of_case(case, role, label)
        values += mine
        of_sample += [i] * len(mine)
    y, classes = _targets(values)
    if what.kind == "logistic" and not classes:
        raise UsageError("kind='logistic' needs texts as labels, these are numbers; use 'ridge' or 'auto'")
    fold_of_item = folds_of(groups, what.folds, what.seed)
    names = sorted(set(groups))
    index = torch.tensor(of_sample)
    kind = ("logistic" if classes else "ridge") if what.kind == "auto" else what.kind
    counts = torch.bincount(y, minlength=len(classes)) if classes else None
    # always saying the commonest
    chance = 0.0 if counts is None else float(counts.max() / counts.sum())
    return _Job(
        of_sample, y, [_shuffled(y, what.seed * 1000 + s) for s in range(what.shuffles)], classes, kind,
        torch.tensor(fold_of_item)[index], torch.tensor([names.index(g) for g in groups])[index], chance, what.seed,
    )  # fmt: skip


def _labels_of_case(case: Case, role: str, label: Any) -> list[Any]:
    """The labels of one item's samples of a role."""
    per_frame = isinstance(label, list)
    n = case.tokens.n_frames
    if not per_frame:
        return [label] * (n if role == FRAME else 1)
    seen = None if case.ready.frames is None else case.ready.frames.index.tolist()
    if seen is None or not seen or max(seen) >= len(label):
        raise UsageError(
            f"{case.key}: {len(label)} labels, but frames up to {None if not seen else max(seen)} are shown"
        )
    shown = [
        label[seen[(2 * f + 1) * len(seen) // (2 * n)]] for f in range(n)
    ]  # a tubelet counts as its middle
    name, _, number = role.partition(":")
    if role == FRAME:
        return shown
    if name == "frame" and number.isdecimal() and int(number) < n:
        return [shown[int(number)]]
    raise UsageError(
        f"this label has one value a frame; role {role!r} has no frame: use {FRAME!r} or 'frame:N'"
    )


def _targets(values: Sequence[Any]) -> tuple[Tensor, list[str]]:
    """Class numbers and names, or values [sample, k] and no names. Raises UsageError for what is neither."""
    if all(isinstance(v, str | bool) for v in values):
        classes = sorted({str(v) for v in values})
        if len(classes) < 2:
            raise UsageError(
                f"all {len(values)} samples have the label {classes[0] if classes else None!r}; nothing to tell apart"
            )
        return torch.tensor([classes.index(str(v)) for v in values]), classes
    try:
        y = torch.tensor(np.array(values, dtype=float))
    except (TypeError, ValueError):
        raise UsageError(
            f"labels are texts, or numbers of equal length; got such as {values[0]!r:.40}"
        ) from None
    y = y.reshape(len(values), -1)
    if not bool(y.isfinite().all()):
        raise UsageError(f"{int((~y.isfinite()).sum())} of {y.numel()} label values are nan or infinite")
    if not bool((y.std(0) > 0).any()):
        raise UsageError(
            f"all {len(values)} samples have the same label {values[0]!r:.40}; nothing to tell apart"
        )
    return y, []


def _shuffled(y: Tensor, seed: int) -> Tensor:
    """Labels that belong to other samples: samples change places, so that frequencies stay."""
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
