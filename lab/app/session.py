"""Session: one model asked about one item, its clean run kept, and what the explorer asks of it. No widgets.

Every run is made under one lock per model, so that callbacks, the worker and another explorer never overlap.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.app.segments import marks_of, pairs_of
from lab.carriers import VideoQA
from lab.edges.closure import Cuts, closure_of
from lab.edges.cutrows import policy_cuts
from lab.edges.fast import run_cut
from lab.edges.mass import partition
from lab.edges.pathrows import path_rows
from lab.edges.pathways import usual_pathways
from lab.edges.policy import Policy
from lab.edges.store import Store
from lab.edges.store import version as model_version
from lab.edges.windows import layers_of
from lab.errors import UsageError
from lab.model.ready import Ready
from lab.result import Result
from lab.spans import ROLES
from lab.view.lens_table import Lensed
from probes.answers import Choices
from probes.unembedding import reading, said_by

LOCKS: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
PIECE = 0.1  # seconds that a piece of a long trace takes, about: an Apply or Stop in between waits no longer
LIGHT = 2e9  # weights times positions
FRAMES = 24  # segments of frames in the editor; more frames stand in groups
TOGETHER = 25  # frames of a group at most: a policy file takes names of 300 characters
TEXTS = 24  # text tokens at the prompt's end whose lens is shown


@dataclass(frozen=True)
class Answered:
    """An answer: probability of every choice, and the policy it was given under.

    removed  edges that the policy cut, over all layers and heads; seconds: how long the answer took
    """

    name: str
    p: tuple[float, ...]
    policy: Policy = field(repr=False)
    removed: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> int:
        """Index of the likeliest choice."""
        return int(np.argmax(self.p))


@dataclass(frozen=True)
class _Clean:
    """The clean run of the model as it is: its store, logits at the last position, and what it chooses."""

    store: Store
    logits: Tensor
    choices: Choices
    said: int


class Session:
    """A model and an item. item: a VideoQA, or a Ready of one world.

    Raises UsageError for anything else, and for what cannot be run from a stored clean run (`Store.reason`).
    """

    def __init__(self, model: Any, item: Any, *, n_frames: int = 8) -> None:
        if not isinstance(item, VideoQA | Ready):
            raise UsageError(
                f"explore takes a VideoQA or a Ready, got {type(item).__name__}; load_items(...)[0] is one"
            )
        self.model = model
        self.ready: Ready = item if isinstance(item, Ready) else model.prepare(item, n_frames)
        if self.ready.n_worlds != 1:
            raise UsageError(f"explore takes one world, got {self.ready.n_worlds}; prepare them one by one")
        self.lock = LOCKS.setdefault(model, threading.RLock())
        self._made: _Clean | None = None
        if self.store.reason:
            raise UsageError(
                f"the explorer works from one stored clean run, and here {self.store.reason}; use probes.knockout and "
                "probes.lens, which run the model in full"
            )

    # ---- the prompt -------------------------------------------------------------------------------------------------

    @property
    def item(self) -> VideoQA | None:
        return self.ready.item

    @cached_property
    def tokens(self) -> Any:
        """The token map that the decoder reads."""
        return self.store.side.tokens[0]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Segments that partition the prompt; of many frames, neighbours stand together ("frame:0+frame:1")."""
        names = partition(self.tokens)
        frames = [n for n in names if n.startswith("frame:")]
        if len(frames) <= FRAMES:
            return names
        size = min(-(-len(frames) // FRAMES), TOGETHER)
        groups = ["+".join(frames[i : i + size]) for i in range(0, len(frames), size)]
        first = names.index(frames[0])
        return (*names[:first], *groups, *(n for n in names[first:] if n not in frames))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What the screen calls the segments: "frames 0-9" for a group of them."""
        return tuple(_short(n) for n in self.names)

    @cached_property
    def marks(self) -> Tensor:
        """Which positions every segment has, bool [segment, pos]."""
        return marks_of(self.tokens, self.names, self.item)

    @cached_property
    def pairs(self) -> NDArray[np.int64]:
        """Edges of every (query, key) pair of segments in one layer and head."""
        return pairs_of(self.bound(Policy(cuts=())), self.marks)

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """Prompt position of every video token, [frame, row, col], -1 where there is none.

        Raises UsageError for a prompt without video tokens. Tokens whose row is not known stand in one row.
        """
        t = self.tokens
        at = t.where(role="frame")
        if not len(at):
            raise UsageError("this prompt has no video tokens; explore an item with a video")
        rows, cols = (c[at] for c in (t.row, t.col))
        if bool((rows < 0).any()) or bool((cols < 0).any()):
            rows, cols = torch.zeros_like(rows), _place_in_frame(t.frame[at])
        shape = tuple(int(c.max()) + 1 for c in (t.frame[at], rows, cols))
        out = np.full(shape, -1)
        out[t.frame[at].numpy(), rows.numpy(), cols.numpy()] = at.numpy()
        return out

    @cached_property
    def pictures(self) -> NDArray[np.uint8]:
        """One picture for every frame of tokens, uint8 [frame, height, width, 3]; grey where there are none."""
        n = len(self.positions)
        if self.ready.frames is None:
            return np.full((n, 64, 64, 3), 128, np.uint8)
        pixels = self.ready.frames.pixels.permute(0, 2, 3, 1).cpu().numpy()
        at = np.minimum(np.arange(n) * max(1, -(-len(pixels) // n)), len(pixels) - 1)
        return np.ascontiguousarray(pixels[at])

    @cached_property
    def seconds(self) -> list[float]:
        """The time of every frame; nan where unknown."""
        first = self.positions.reshape(len(self.positions), -1).max(1)
        return [float(self.tokens.seconds[int(p)]) if p >= 0 else float("nan") for p in first]

    @property
    def light(self) -> bool:
        """Whether a run costs so little that a click may ask for dozens of them."""
        weights = sum(p.numel() for p in self.model.hf.parameters())
        return weights * len(self.tokens) < LIGHT

    def segment_of(self, position: int) -> str:
        """The segment a position belongs to. Raises UsageError for a position that is not there."""
        if not 0 <= position < len(self.tokens):
            raise UsageError(f"token {position}: the prompt has positions 0-{len(self.tokens) - 1}")
        return self.names[int(self.marks[:, position].long().argmax())]

    def is_video(self, position: int) -> bool:
        """Whether a position is a token of a frame."""
        return int(self.tokens.role[position]) == ROLES.index("frame")

    def label(self, position: int) -> str:
        """What a token is: its text, or frame, row and column."""
        t = self.tokens
        if self.is_video(position):
            return f"f{int(t.frame[position])} r{int(t.row[position])} c{int(t.col[position])}"
        return t.pieces[position].strip() or f"pos {position}"

    # ---- runs -------------------------------------------------------------------------------------------------------

    @property
    def store(self) -> Store:
        """The clean run; made anew after the model's weights, mode or hooks changed."""
        return self._now.store

    @property
    def clean(self) -> Tensor:
        """Logits of the clean run at the last position, [d_vocab]."""
        return self._now.logits

    @property
    def choices(self) -> Choices:
        """What can be answered."""
        return self._now.choices

    @property
    def said(self) -> int:
        """Index of the choice that the clean run makes."""
        return self._now.said

    @property
    def _now(self) -> _Clean:
        with self.lock:
            if self._made is None or self._made.store.version != model_version(self.model):
                store = Store.of(self.model, self.ready)
                logits = store.clean(self.model)[0]
                choices = Choices.of(self.model, self.item, logits)
                self._made = _Clean(store, logits, choices, int(np.argmax(choices.p(logits))))
            return self._made

    @property
    def n_layers(self) -> int:
        return int(self.model.cfg.n_layers)

    @property
    def n_heads(self) -> int:
        return int(self.model.cfg.n_heads)

    def bound(self, policy: Policy) -> Any:
        """A policy on this prompt."""
        return policy.bind(self.tokens, self.n_layers, self.n_heads, self.item)

    def answer(self, policy: Policy, name: str, removed: int = 0) -> Answered:
        """The answer under a policy, from the stored clean run. removed: how many edges that cuts."""
        with self.lock:
            choices, start = self.choices, time.perf_counter()
            cuts = policy_cuts(self.bound(policy))
            p = choices.p(self.run([cuts])[0] if cuts else self.clean)
        return Answered(name, p, policy, removed, time.perf_counter() - start)

    def run(self, cuts: Sequence[Cuts]) -> Tensor:
        """Logits at the last position of one cut run each, [cut, d_vocab]."""
        with self.lock:
            return run_cut(self.model, self.store, cuts)[:, -1]

    def effect(self, logits: Tensor) -> float:
        """Change in the log-odds of the clean run's choice, nats."""
        return self.choices.log_odds(logits, self.said) - self.choices.log_odds(self.clean, self.said)

    @property
    def effect_unit(self) -> str:
        """What `effect` is, with its sign."""
        return f"change in log-odds of {self.choices.names[self.said]} (nats)"

    # ---- what is asked ------------------------------------------------------------------------------------------------

    def needed(self, policy: Policy) -> Result:
        """Which video tokens run through which layer if only what reaches the answer is computed.

        Axes (layer, frame, row, col): 1 where the layer's output at the token can still reach the last position.
        """
        with self.lock:
            cuts = policy_cuts(self.bound(policy))
            live = closure_of(cuts, len(self.tokens), self.n_layers, self.store.positions("last")).live
        rows = np.stack([m.numpy() for m in live[1:]]).astype(float)
        there = self.positions >= 0
        values = np.where(there, rows[:, np.where(there, self.positions, 0)], np.nan)
        axes = ("layer", "frame", "row", "col")
        coords = {a: list(range(n)) for a, n in zip(axes, values.shape, strict=True)}
        coords["layer"] = [i + 1 for i in coords["layer"]]
        share = "share of tokens needed"
        return Result(
            values,
            axes,
            coords,
            share,
            {},
            "Efficiency: tokens whose output in a layer can still reach the answer",
        )

    @torch.no_grad()
    def lens(self, patch: int | None, *, top: int = 5) -> Lensed:
        """Logit lens of the clean run: a video token, then the last text tokens; the model's own norm and head."""
        text = [i for i, role in enumerate(self.tokens.roles()) if role not in ("frame", "pad")]
        at = [*([] if patch is None else [patch]), *text[-TEXTS:]]
        rows = torch.tensor(at)
        follow = self._followed
        with self.lock:
            logits = reading(self.model, "normed")
            said = [
                said_by(
                    logits,
                    i,
                    self.store.resid.rows(i + 1, rows),
                    list(follow.values()),
                    top,
                    self.model.cfg.d_vocab,
                )
                for i in range(self.n_layers)
            ]
        layers, pos = list(range(1, self.n_layers + 1)), list(range(len(at)))
        words = [[[self._word(i) for i in row] for row in s.ids.tolist()] for s in said]
        best = Result(
            torch.stack([s.p for s in said]).numpy(), ("layer", "pos", "place"),
            {"layer": layers, "pos": pos, "place": list(range(1, said[0].p.shape[1] + 1))}, "probability", {},
            "Logit lens of the clean run", {"words": words, "mode": "normed", "where": {"position": at}},
        )  # fmt: skip
        ranks = torch.stack([s.rank for s in said]).permute(2, 0, 1).numpy()
        coords = {"word": list(follow), "layer": layers, "pos": pos}
        return Lensed(
            best, Result(ranks, ("word", "layer", "pos"), coords, "rank", {}), [self.label(i) for i in at]
        )

    @property
    def _followed(self) -> dict[str, int]:
        """Words whose rank can be followed: the choices' tokens, and the likeliest words of the answer."""
        ids = [*self.choices.ids, *self.clean.topk(min(8, len(self.clean))).indices.tolist()]
        return {self._word(i): i for i in dict.fromkeys(ids)}

    def _word(self, token: int) -> str:
        return str(token) if self.model.tokenizer is None else self.model.tokenizer.decode([token])

    @torch.no_grad()
    def lens_on_video(self, layer: int) -> Result:
        """Probability of the clean answer's token, read at every video token after a layer (1-based)."""
        at = torch.from_numpy(self.positions[self.positions >= 0])
        best = self.choices.ids[self.said]
        with self.lock:
            said = said_by(
                reading(self.model, "normed"),
                layer - 1,
                self.store.resid.rows(layer, at),
                [best],
                0,
                self.model.cfg.d_vocab,
            )
        values = np.full(self.positions.shape, np.nan)
        values[self.positions >= 0] = said.followed[:, 0].numpy()
        name = f"p({self._word(best)!r}) on every patch after layer {layer}: raw logit lens"
        return self.on_frames(values, "probability", name)

    def on_frames(self, values: NDArray[Any], unit: str, name: str) -> Result:
        """Values [frame, row, col] as a Result."""
        axes = ("frame", "row", "col")
        return Result(
            values,
            axes,
            {a: list(range(n)) for a, n in zip(axes, values.shape, strict=True)},
            unit,
            {},
            name,
            baseline=0.0,
        )

    # ---- traces -------------------------------------------------------------------------------------------------------

    def from_token(self, position: int, *, alone: bool) -> dict[str, str]:
        """Column -> pathway: from a token (alone), or from its whole segment, to every segment that reads it later."""
        source = self.segment_of(position)
        k = self.names.index(source)
        if alone:
            first = int((self.tokens.role != ROLES.index("pad")).long().argmax())
            asked = f" where pos(k) == {position - first} and pos(q) > {position - first}"
        else:
            asked = ""
        named = zip(self.names, self.labels, self.pairs[:, k], strict=True)
        paths = {
            label: f"{source}->{n}{asked}" for n, label, edges in named if edges and (alone or n != source)
        }
        return {n: p for n, p in paths.items() if path_rows(self.tokens, p, self.item).any()}

    def frames_out(self) -> dict[str, str]:
        """Column -> pathway: from every frame to all that comes after it."""
        last = [int(m.nonzero().max()) for m in self.marks]
        first = int((self.tokens.role != ROLES.index("pad")).long().argmax())
        names = [(n, e - first) for n, e in zip(self.names, last, strict=True) if n.startswith("frame:")]
        return {n: f"{n}->* where pos(q) > {end}" for n, end in names}

    def by_frame(self, values: NDArray[Any]) -> NDArray[Any]:
        """One value for every segment of `frames_out`, on all tokens of its frames, [frame, row, col]."""
        out = np.full(self.positions.shape, np.nan)
        for name, value in zip(self.frames_out(), values, strict=True):
            out[[int(part.removeprefix("frame:")) for part in name.split("+")]] = value
        return out

    def usual(self) -> dict[str, str]:
        """Column -> pathway: those of the paper that this prompt has."""
        return {p: p for p in usual_pathways(self.tokens)}

    @property
    def window(self) -> int:
        """Layers of a window: the paper's share of the depth (9 of 32), odd."""
        return max(1, round(9 * self.n_layers / 32) // 2 * 2 + 1)

    def traced(
        self, pathways: Mapping[str, str], name: str, *, whole: bool = False
    ) -> Generator[Result, None, None]:
        """Exact knock-outs: every pathway cut in a window round every layer (whole: in all layers at once).

        Yields the Result so far after every piece of about `PIECE` seconds, axes (layer, pathway): the `effect`
        of it; nan where it is not computed yet. Whole: one layer, 0. The last one yielded is complete.
        """
        centres = [0] if whole else list(range(1, self.n_layers + 1))
        if not pathways:
            raise UsageError("nothing reads this token: it has no edges to cut")
        values = np.full((len(centres), len(pathways)), np.nan)
        rows = [path_rows(self.tokens, p, self.item) for p in pathways.values()]
        todo = [(i, j) for i in range(len(centres)) for j in range(len(rows))]
        n = 1
        while todo:
            some, todo, start = todo[:n], todo[n:], time.perf_counter()
            with self.lock:
                logits = self.run([dict.fromkeys(self._cut(centres[i]), rows[j]) for i, j in some])
            for (i, j), each in zip(some, logits, strict=True):
                values[i, j] = self.effect(each)
            spent = time.perf_counter() - start
            n = max(1, min(2 * n, round(n * PIECE / max(spent, 1e-4))))
            coords = {"layer": centres, "pathway": list(pathways)}
            done = 1 - len(todo) / values.size
            yield Result(
                values.copy(),
                ("layer", "pathway"),
                coords,
                self.effect_unit,
                {},
                name,
                {"done": done},
                baseline=0.0,
            )

    def _cut(self, centre: int) -> range:
        """0-based layers cut for a 1-based centre; 0: all."""
        return range(self.n_layers) if centre == 0 else layers_of(centre - 1, self.window, self.n_layers)


def _short(name: str) -> str:
    frames = name.split("+")
    return (
        name
        if len(frames) == 1
        else f"frames {frames[0].removeprefix('frame:')}–{frames[-1].removeprefix('frame:')}"
    )


def _place_in_frame(frame: Tensor) -> Tensor:
    """How many tokens of the same frame stand before each."""
    seen: dict[int, int] = {}
    out: list[int] = []
    for f in frame.tolist():
        out.append(seen.get(f, 0))
        seen[f] = out[-1] + 1
    return torch.tensor(out)
