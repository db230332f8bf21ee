"""Search: the smallest set of attention edges that keeps a model's answers, on calibration data.

1 dead edges go: what no live row reads (no test needed)   2 the video exits as early as the budget allows
3 from the last layer to the first: cut the layer's units together; where that is too much, halve until the culprits
stand alone, and part those by option, distance or head (reverse ACDC: all below the layer is uncut, so a trial starts
from the stored clean run at that layer)   4 polish: kept units once more, with what is left of the budget.
(`lab.edges.knapsack` goes another way: the finest units of all layers, by what each does alone.)

A set is accepted if the one-sided bounds of mean KL and of the share of flipped answers stay inside the budget, and if
it takes no more of it than its share of the edges still undecided: small units cannot spend what large ones need.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, get_args

from lab.edges.budget import FINER, Asked, Budget, Layers, Method, Scope
from lab.edges.identity import weights_id
from lab.edges.policy import Policy
from lab.edges.reuse import staged
from lab.edges.searcher import Searcher
from lab.edges.sweeping import _fingerprint, as_ready
from lab.edges.trials import Trials, check_items
from lab.edges.units import Grain, Roles
from lab.edges.warm import predicted
from lab.errors import UsageError
from lab.model.ready import Ready
from lab.recipe import Recipe as Owner  # not listed among the recipes that can be run
from lab.result import Result
from lab.runs import Cancel, Cancelled, Run


class Found(NamedTuple):
    """What a search found: the policy, and how it came to it, a Result with axes (step, measure)."""

    policy: Policy
    trail: Result


class SearchJournal(Owner):
    """What a search's journal belongs to. It cannot be run by itself."""

    model: str
    weights: str
    dtype: str
    items: tuple[str, ...]
    budget: dict[str, float]
    asked: dict[str, str]

    def run(self, *, progress: bool = True) -> list[Result]:
        """Raises UsageError: the items are only known by their fingerprints."""
        raise UsageError(
            "this journal knows its items only by fingerprint; call lab.edges.search with the same items"
        )


def search(
    model: Any, calibration: Any, *, budget: Budget | Mapping[str, float] | None = None, scores: Result | None = None,
    scope: Scope = "global", method: Method = "acdc", roles: Roles = "all", finer: Sequence[Grain] = FINER,
    layers: Layers = "free", worth: float = 0.0, relinearise: int = 0, n_frames: int = 8, out: str | Path | None = None,
    cancel: Cancel | None = None, show_progress: bool = True, memory: int | None = None,
) -> Any:  # fmt: skip
    """Search the smallest set of edges that keeps the answers of the calibration items, right ones and wrong ones.

    calibration  VideoQA or Ready, one world each
    scores   what `lab.edges.scores` says cutting would do; orders the trials. None: by exact effects alone. Scores must
             have been validated (`validate_scores`)
    scope    "global": one policy, returned as `Found`. "task", "sample": one for each, a dict by task or item id; of a
             single sample no bound can be given, so those are explanations, not claims
    method   "acdc": from the last layer to the first. "greedy": the cheapest units of all layers first. "knapsack": the
             finest units of all layers, in the order of exact single effects, or of scores made anew as cuts add up where
             forwards are few (`lab.edges.knapsack`); finds single heads that the others do not reach
    roles    "portable": only segments any prompt has (video, separator, text, last), for prompts rendered elsewhere
    finer    how units that cannot be cut whole are parted, in this order: "distance" of frames, "option", "head"
    worth    units with a smaller share of all edges are kept or cut whole: parting them saves next to nothing
    layers   "contiguous": every pair is kept in one range of layers only
    relinearise  with scores and "acdc": score what is left anew, under what is cut, after every so many layers (0: never).
             Costs about four forwards a sample each time, which the budget counts
    out      folder for a journal: an interrupted search goes on where it stopped
    Stopped (Ctrl-C, `cancel`, the budget of forwards), it returns the best policy so far: `trail.notes["complete"]`.
    Raises UsageError for what does not fit together.
    """
    finer = (finer,) if isinstance(finer, str) else tuple(finer)  # type: ignore[assignment]
    asked = Asked(Budget.of(budget), method, roles, tuple(finer), layers, worth, relinearise)
    if relinearise and (scores is None or method != "acdc"):
        raise UsageError(
            "relinearise= goes with scores= and method='acdc': there is nothing else to make anew"
        )
    if model.pruning.chosen(None) is not None:
        raise UsageError("a search cuts the model as it is, and `model.pruned` is open: search outside of it")
    check_items(calibration)
    readies = as_ready(model, calibration, None, n_frames)
    if any(staged(r.plan) for r in readies):
        raise UsageError(
            "a search cuts the prompt as it is laid out, and one was prepared with a mechanism that changes what the "
            "decoder reads; search without it"
        )
    how = _How(asked, scores, cancel, show_progress, memory)
    if scope == "global":
        return _search(model, readies, how, out)
    if scope not in get_args(Scope):
        raise UsageError(f"scope={scope!r}; use one of {', '.join(get_args(Scope))}")
    parts = _parts(readies, scope)
    return {
        name: _search(model, some, how, None if out is None else Path(out) / _slug(name))
        for name, some in parts.items()
    }


class _How(NamedTuple):
    asked: Asked
    scores: Result | None
    cancel: Cancel | None
    show: bool
    memory: int | None


def _parts(readies: Sequence[Ready], scope: Scope) -> dict[str, list[Ready]]:
    parts: dict[str, list[Ready]] = {}
    for i, ready in enumerate(readies):
        item = ready.item
        name = (item.task if scope == "task" else item.id) if item is not None else ""
        parts.setdefault(name or (f"item {i}" if scope == "sample" else "no task"), []).append(ready)
    return parts


def _slug(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _search(model: Any, readies: Sequence[Ready], how: _How, out: str | Path | None) -> Found:
    trials = Trials(model, readies, how.memory)
    owner = _owner(model, readies, how.asked)
    with nullcontext() if out is None else Run(out, owner, cancel=how.cancel) as run:
        work = Searcher(trials, how.asked, predicted(how.scores, readies), run, how.cancel)
        try:
            work.search(how.show)
        except (KeyboardInterrupt, Cancelled):
            work.stopped = "interrupted"
    return Found(work.policy(owner.id), work.trail(owner.id))


def _owner(model: Any, readies: Sequence[Ready], asked: Asked) -> SearchJournal:
    said = {
        "method": asked.method,
        "roles": asked.roles,
        "finer": ",".join(asked.finer),
        "worth": f"{asked.worth:g}",
        "layers": asked.layers,
    } | ({"relinearise": str(asked.relinearise)} if asked.relinearise else {})
    return SearchJournal(
        model=model.cfg.model_name, weights=weights_id(model), dtype=str(model.dtype),
        items=tuple(_fingerprint(r) for r in readies), budget=asdict(asked.budget), asked=said,
    )  # fmt: skip
