"""Trials: what cutting a set of units does to the answers of a calibration set, measured exactly, sample by sample.

Every sample has one stored clean run; a trial computes only the rows that change and matter (`lab.edges.fast`). A trial
that cannot keep its limit any more is given up early, the samples that suffered most so far going first. What is
measured is the answer's distribution over the options and one more class for all other tokens; wrong answers count too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.carriers import VideoQA
from lab.edges.bounds import mean_bound, share_bound
from lab.edges.fast import run_cut
from lab.edges.store import Store
from lab.edges.units import Grid, Unit
from lab.errors import UsageError
from lab.model.answering import letter_ids
from lab.model.ready import Ready
from lab.runs import Ledger

TOGETHER = 64  # cut runs of one sample whose masks exist at once
KEPT = 0.25  # share of free memory that stored clean runs may take


@dataclass(frozen=True)
class Answers:
    """Log probabilities of the options' letters and of everything else together, [class]; of the vocabulary if open."""

    logp: Tensor
    n_options: int

    @property
    def choice(self) -> int:
        """Index of the option chosen (of the token, if open)."""
        return int(self.logp[: self.n_options].argmax())

    def margin(self, of: int) -> float:
        """How far class `of` lies above the best other option, in nats."""
        others = torch.cat([self.logp[:of], self.logp[of + 1 : self.n_options]])
        return float(self.logp[of] - others.max())

    def kl(self, other: Answers) -> float:
        """KL divergence of `other` from this, in nats."""
        p = self.logp.exp()
        return max(0.0, float((p * (self.logp - other.logp)).nan_to_num(0.0).sum()))


class Reader:
    """Logits at the last position -> Answers. Letters are looked up once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._letters: dict[int, Tensor] = {}

    def __call__(self, logits: Tensor, item: VideoQA | None) -> Answers:
        logp = logits.detach().double().cpu().log_softmax(-1)
        n = 0 if item is None else len(item.options)
        if n < 2:
            return Answers(logp, len(logp))
        if n not in self._letters:
            self._letters[n] = torch.tensor(letter_ids(self.model.need_tokenizer(), n))
        letters = logp[self._letters[n]]
        rest = logp.clone()
        rest[self._letters[n]] = -torch.inf
        return Answers(torch.cat([letters, rest.logsumexp(0, keepdim=True)]), n)


@dataclass(frozen=True)
class Effect:
    """What a set of cuts did. nan where a sample was not reached before the trial was given up.

    kl [sample] in nats, flips [sample] 1 where the choice changed, margin [sample] its change in nats (negative: worse)
    """

    kl: NDArray[Any]
    flips: NDArray[Any]
    margin: NDArray[Any]

    @property
    def seen(self) -> NDArray[np.bool_]:
        return np.isfinite(self.kl)

    @property
    def whole(self) -> bool:
        """Whether every sample was measured."""
        return bool(self.seen.all())

    @property
    def mean_kl(self) -> float:
        """Mean over the samples seen."""
        return float(self.kl[self.seen].mean()) if self.seen.any() else 0.0

    @property
    def n_flips(self) -> int:
        return int(np.nansum(self.flips))

    def bounds(self, confidence: float) -> tuple[float, float]:
        """One-sided bounds of mean KL and of the share of flips, from the samples seen."""
        n = int(self.seen.sum())
        return mean_bound(self.kl[self.seen], confidence), share_bound(self.n_flips, n, confidence)

    def plain(self) -> dict[str, Any]:
        return {"kl": self.kl.tolist(), "flips": self.flips.tolist(), "margin": self.margin.tolist()}

    @classmethod
    def read(cls, data: dict[str, Any]) -> Effect:
        return cls(*(np.array(data[name], dtype=float) for name in ("kl", "flips", "margin")))

    @classmethod
    def none(cls, n: int) -> Effect:
        """Of cutting nothing."""
        return cls(np.zeros(n), np.zeros(n), np.zeros(n))


# effect so far, number of samples -> whether it cannot keep its limit any more
Hopeless = Callable[[Effect], bool]


@dataclass
class Trials:
    """The calibration set on one model.

    readies  one world each; memory: bytes that stored runs may take (None: a quarter of what is free); runs beyond it
             are made again when they are needed, and counted again
    """

    model: Any
    readies: Sequence[Ready]
    memory: int | None = None
    spent: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        if not self.readies:
            raise UsageError("a search needs calibration items, got none")
        for ready in self.readies:
            if ready.n_worlds != 1:
                raise UsageError(f"calibration takes one world at a time, got {ready.n_worlds}")
        free = psutil.virtual_memory().available if self.model.device.type == "cpu" else _free(self.model)
        self.memory = int(free * KEPT) if self.memory is None else self.memory
        self.read = Reader(self.model)
        self.grids = self._grids()
        self._stores: OrderedDict[int, Store] = OrderedDict()
        self._clean: dict[int, Answers] = {}
        self._suffered = np.zeros(len(self.readies))

    def _grids(self) -> list[Grid]:
        made: dict[bytes, Grid] = {}
        c = self.model.cfg
        return [
            made.setdefault(Grid.key(r.maps[0]), Grid(r.maps[0], c.n_layers, c.n_heads, r.item))
            for r in self.readies
        ]

    def __len__(self) -> int:
        return len(self.readies)

    @property
    def layouts(self) -> list[tuple[Grid, int]]:
        """The different layouts and how many samples have each."""
        count: dict[int, int] = {}
        for g in self.grids:
            count[id(g)] = count.get(id(g), 0) + 1
        known = {id(g): g for g in self.grids}
        return [(known[i], n) for i, n in count.items()]

    def weight(self, units: Collection[Unit]) -> float:
        """Edges of these units in a prompt, mean over the samples."""
        return sum(n * sum(g.size(u) for u in units) for g, n in self.layouts) / len(self)

    # ---- measuring --------------------------------------------------------------------------------------------------

    def effect(
        self, units: Collection[Unit], hopeless: Hopeless | None = None, only: Sequence[int] | None = None
    ) -> Effect:
        """What cutting the units does to every sample (to those of `only`). Given up when `hopeless` says so."""
        out = Effect(*(np.full(len(self), np.nan) for _ in range(3)))
        for i in np.argsort(-self._suffered, kind="stable").tolist() if only is None else only:
            out.kl[i], out.flips[i], out.margin[i] = self._sample(i, units)
            if hopeless is not None and hopeless(out):
                break
        self.learn(out)
        return out

    def alone(
        self, units: Sequence[Unit], cut: frozenset[Unit], samples: Sequence[int]
    ) -> NDArray[np.float64]:
        """KL of cutting each unit alone on top of `cut`, [unit], nats, mean over some samples. Many go through together."""
        found = np.zeros((len(samples), len(units)))
        for row, i in zip(found, samples, strict=True):
            store = self.store(i)
            before = store.ledger
            for start in range(0, len(units), TOGETHER):
                some = units[start : start + TOGETHER]
                logits = run_cut(self.model, store, [self.grids[i].cuts(cut | {u}) for u in some])
                row[start : start + len(some)] = [
                    self._clean[i].kl(self.read(one[-1], self.readies[i].item)) for one in logits
                ]
            self._book(store.ledger.forwards - before.forwards, len(units))
        return found.mean(0)

    def unsure(self, n: int) -> list[int]:
        """The samples whose answers are least sure: they are the first to change. Fewer than `n` if there are not so many."""
        margins = [a.margin(a.choice) for a in map(self.clean, range(len(self)))]
        return np.argsort(margins, kind="stable")[:n].tolist()

    def learn(self, effect: Effect) -> None:
        """Samples that suffered go first from now on (also for effects read from a journal)."""
        self._suffered += np.nan_to_num(effect.kl)

    def _sample(self, i: int, units: Collection[Unit]) -> tuple[float, float, float]:
        store = self.store(i)
        before = store.ledger
        logits = run_cut(self.model, store, [self.grids[i].cuts(units)])[0, -1]
        self._book(store.ledger.forwards - before.forwards, 1)
        clean, found = self._clean[i], self.read(logits, self.readies[i].item)
        of = clean.choice
        return clean.kl(found), float(found.choice != of), found.margin(of) - clean.margin(of)

    def clean(self, i: int) -> Answers:
        """The uncut answer of a sample."""
        if i not in self._clean:
            self.store(i)
        return self._clean[i]

    def store(self, i: int) -> Store:
        """The stored clean run of a sample; made if it is not there, the least used one dropped if there is no room."""
        if i in self._stores:
            self._stores.move_to_end(i)
            return self._stores[i]
        calls = self.model.tower_calls
        store = Store.of(self.model, self.readies[i])
        self._clean[i] = self.read(store.clean(self.model)[-1], self.readies[i].item)
        self._book(store.ledger.forwards, 1, self.model.tower_calls - calls)
        self._stores[i] = store
        while len(self._stores) > 1 and sum(map(_bytes, self._stores.values())) > (self.memory or 0):
            self._stores.popitem(last=False)
        return store

    def _book(self, forwards: float, naive: float, tower: int = 0) -> None:
        self.spent += Ledger(forwards, naive, tower)


def check_items(items: Any) -> None:
    """Raises UsageError for what is neither a question nor a prepared one."""
    for item in items if isinstance(items, list | tuple) else [items]:
        if not isinstance(item, VideoQA | Ready):
            raise UsageError(f"items are VideoQA or Ready, got {type(item).__name__}")


def _bytes(store: Store) -> int:
    return sum(t.numel() * t.element_size() for t in (*store.resid, *store.keys, *store.values))


def _free(model: Any) -> int:
    return int(torch.cuda.mem_get_info(model.device)[0]) if model.device.type == "cuda" else 1 << 30
