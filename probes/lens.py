"""Logit lens: what the stream would say at every layer, if it were read there (nostalgebraist 2020; Map the Flow A6).

1 run the prompt once   2 at every layer, take the rows of the tokens asked for, norm them as the last layer's are, and
unembed them   3 keep what is asked of the distribution: a word's probability or rank, the entropy, the best words.

    lens(model, item)                                       p of the answer at the last position, by layer
    lens(model, item, "video", by="patch", words=["left"], measure="rank")
    words(model, item, "video")                             the best words on every video token
    vocabulary(model, items)                                how often spatial, temporal and object words are among them
    gen_prob(model, items)                                  p of the right and the other letters (the paper's gen-prob)

`mode="raw"` and `mode="paper"` are the released code's ways, without the final norm: the sudden rise they show late in
the model is partly the growth of the stream. The tuned lens is in `probes.tuned_lens`, the tower's in `probes.vision`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lab.carriers import TokenMap
from lab.errors import UsageError
from lab.model.answering import letter_ids
from lab.result import Result
from lab.runs import progress
from probes.asking import Asked, Case, ProbeRecipe, asked, recipe_fields
from probes.streams import Site, check_site, layers_asked, visit
from probes.unembedding import NOT_NORMED, Logits, Mode, Said, reading, said_by
from probes.wordlists import WORDS, Lists, checked_lists, groups_of

Measure = Literal["p", "logp", "rank", "entropy"]
By = Literal["role", "frame", "patch"]
UNITS = {
    "p": "probability",
    "logp": "log probability (nats)",
    "rank": "rank (1 = most probable)",
    "entropy": "entropy (nats)",
}
ANSWER, RIGHT = "answer", "right"


class LensRecipe(ProbeRecipe):
    """A logit lens: which tokens are read, where, and what of them is kept. Layers 1-based."""

    tokens: tuple[str, ...] = Field(default=("last",), min_length=1)
    words: tuple[str, ...] = Field(default=(ANSWER,), min_length=1)
    measure: Measure = "p"
    by: By = "role"
    site: Site = "resid_post"
    mode: Mode = "normed"
    layers: tuple[int, ...] | None = None

    def run(self, *, progress: bool = True, model: Any = None) -> list[Result]:
        """Load what the recipe names (or use `model`) and read."""
        what = _What(self.tokens, self.words, self.measure, self.by, self.site, self.mode, self.layers)
        return [_lens(self.asked(model), what, None, self.plain(), progress)]


@dataclass(frozen=True)
class _What:
    """A lens's settings. Raises UsageError for what is not known."""

    tokens: tuple[str, ...]
    words: tuple[Any, ...]
    measure: str
    by: str
    site: str
    mode: str
    layers: Any

    def __post_init__(self) -> None:
        for name, allowed in (("measure", Measure), ("by", By)):
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(f"{name}={getattr(self, name)!r}; use one of {', '.join(get_args(allowed))}")
        check_site(self.site)
        if not self.tokens or not self.words:
            raise UsageError(f"nothing to read: {len(self.tokens)} token sets, {len(self.words)} words")
        if self.by != "role" and len(self.tokens) > 1:
            raise UsageError(f"by={self.by!r} reads one set of tokens, got {len(self.tokens)}; use by='role'")


def lens(
    model: Any, items: Any, tokens: str | Sequence[str] = "last", *, words: Sequence[str | int] | str = ANSWER,
    measure: Measure = "p", by: By = "role", site: Site = "resid_post", mode: Mode = "normed",
    layers: Sequence[int] | None = None, tuned: Any = None, n_frames: int = 8, policy: Any = None,
    mechanisms: Sequence[Any] = (), show_progress: bool = True,
) -> Result:  # fmt: skip
    """Read tokens at every layer, and follow words.

    items    one or several VideoQA or Ready (one world each)
    tokens   segments as `lab.edges.segments` names them: "last", "video", "option", "frame:3", "question", ...
    words    "answer" (the token the clean run answers), "right" (the right option's letter), a text that is one token,
             or a token id
    measure  "p", "logp", "rank" (1: the most probable word) or "entropy" (of the whole distribution; words play no part)
    by       "role": mean over the tokens of each set; "frame": mean over each frame's tokens among them; "patch": every
             video token by itself
    site     "resid_pre", "resid_mid", "resid_post"; "attn_out" and "mlp_out" are normed by themselves
    mode     "normed"; "raw" and "paper" as in the module's docstring: labelled so in unit and notes
    layers   1-based; None: all
    tuned    a `probes.tuned_lens.TunedLens`

    Returns a Result with axes (item, word, layer, role), (item, word, layer, frame) or (item, word, layer, frame, row,
    col). Tokens that a mechanism has dropped before a layer count as nan there.
    Raises UsageError for unknown names, and for tokens or words a prompt does not have.
    """
    names = (tokens,) if isinstance(tokens, str) else tuple(tokens)
    spoken = (words,) if isinstance(words, str | int) else tuple(words)
    what = _What(names, spoken, measure, by, site, mode, layers)
    fields = recipe_fields(model, items, n_frames, policy, mechanisms)
    recipe: dict[str, Any] = {}
    texts = tuple(w for w in spoken if isinstance(w, str))
    if fields is not None and tuned is None and texts == spoken:
        chosen = None if layers is None else tuple(layers)
        recipe = LensRecipe(**fields, tokens=names, words=texts, measure=measure, by=by, site=site, mode=mode, layers=chosen).plain()  # fmt: skip
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    return _lens(who, what, tuned, recipe, show_progress)


def _lens(who: Asked, what: _What, tuned: Any, recipe: dict[str, Any], show: bool) -> Result:
    model, logits = who.model, reading(who.model, what.mode, tuned)
    layers = layers_asked(model.cfg.n_layers, what.layers)
    if what.by != "role":
        grid_shared(who)
    read = [_read(who, case, what, layers, logits) for case in progress(who.cases, desc="lens", show=show)]
    values, coords = _joined(who, read, what, layers)
    words = ["entropy"] if what.measure == "entropy" else [str(w) for w in what.words]
    axes = {"role": ("role",), "frame": ("frame",), "patch": ("frame", "row", "col")}[what.by]
    label = NOT_NORMED.get(what.mode)
    return Result(
        values=values, axes=("item", "word", "layer", *axes),
        coords={"item": who.keys, "word": words, "layer": [i + 1 for i in layers], **coords},
        unit=UNITS[what.measure] + (" (raw lens)" if label else ""), recipe=recipe,
        name="tuned lens" if tuned is not None else "logit lens" if label is None else f"logit lens, {what.mode}",
        notes={
            "mode": label or ("tuned" if tuned is not None else "normed"), "site": what.site, "tokens": list(what.tokens),
            "said": {c.key: dict(zip(words, r.spoken, strict=False)) for c, r in zip(who.cases, read, strict=True)},
            "ledger": who.ledger(len(read) * (1 + (ANSWER in what.words))),
            **({"seconds": _seconds(who.cases[0].tokens)} if what.by != "role" else {}),
        },
    )  # fmt: skip


@dataclass(frozen=True)
class _Read:
    """One item read: values [word, layer, token] over the union of the tokens asked for, and the words in print."""

    values: Tensor
    positions: Tensor
    spoken: list[str]


def _read(who: Asked, case: Case, what: _What, layers: Sequence[int], logits: Logits) -> _Read:
    positions = torch.cat([case.at(name) for name in what.tokens]).unique()
    ids = [] if what.measure == "entropy" else [word_id(who, case, w) for w in what.words]
    out = torch.full((max(1, len(ids)), len(layers), len(positions)), torch.nan)

    def see(layer: int, rows: Tensor, kept: Tensor) -> None:
        said = said_by(logits, layer, rows, ids, 0, who.model.cfg.d_vocab)
        out[:, layers.index(layer), kept] = _measured(said, what.measure)

    visit(who.model, case, what.site, layers, positions, see, policy=who.policy)
    return _Read(out, positions, [_printed(who.model, i) for i in ids])


def _measured(said: Said, measure: str) -> Tensor:
    """[word, row]"""
    match measure:
        case "entropy":
            return said.entropy[None]
        case "rank":
            return said.rank.T.float()
        case "logp":
            return said.followed.T.log()
        case _:
            return said.followed.T


def _joined(
    who: Asked, read: Sequence[_Read], what: _What, layers: Sequence[int]
) -> tuple[Any, dict[str, Any]]:
    """All items' values with the last axes as `what.by` says. Raises UsageError if grids differ."""
    if what.by == "role":
        rows = [_by_role(c, r, what.tokens) for c, r in zip(who.cases, read, strict=True)]
        return np.stack(rows), {"role": list(what.tokens)}
    grid = grid_shared(who)
    rows = [on_grid(c.tokens, r.positions, r.values) for c, r in zip(who.cases, read, strict=True)]
    coords = {n: list(range(k)) for n, k in zip(("frame", "row", "col"), grid, strict=True)}
    if what.by == "patch":
        return np.stack(rows), coords
    # a mean over no token at all is nan, without numpy's warning
    seen = np.stack([np.isfinite(r).sum((-2, -1)) for r in rows])
    total = np.stack([np.nansum(r, (-2, -1)) for r in rows])
    return np.where(seen > 0, total / np.maximum(seen, 1), np.nan), {"frame": coords["frame"]}


def _by_role(case: Case, read: _Read, names: Sequence[str]) -> Any:
    """[word, layer, role]: mean over each set's tokens that are there."""
    sets = [torch.isin(read.positions, case.at(name)) for name in names]
    return torch.stack([read.values[..., hit].nanmean(-1) for hit in sets], -1).numpy()


def grid_of(tokens: TokenMap) -> tuple[int, int, int]:
    """Frames, rows and columns of the video tokens. Raises UsageError where their places are not known."""
    at = tokens.where(role="frame")
    if not len(at) or bool((tokens.row[at] < 0).any()):
        raise UsageError("this prompt's video tokens have no known rows and columns; use by='role'")
    return tuple(int(x[at].max()) + 1 for x in (tokens.frame, tokens.row, tokens.col))  # type: ignore[return-value]


def grid_shared(who: Asked) -> tuple[int, int, int]:
    """The grid of all items' videos. Raises UsageError if there are several."""
    grids = {grid_of(c.tokens) for c in who.cases}
    if len(grids) > 1:
        raise UsageError(
            f"the items' videos have different grids {sorted(grids)}; ask about them one at a time"
        )
    return grids.pop()


def on_grid(tokens: TokenMap, positions: Tensor, values: Tensor) -> Any:
    """values [..., token] -> [..., frame, row, col]; nan where no token asked for is.

    Raises UsageError if none of the tokens lies in a frame.
    """
    out = np.full((*values.shape[:-1], *grid_of(tokens)), np.nan)
    mine = tokens.role[positions] == tokens.role[tokens.where(role="frame")[0]]
    if not bool(mine.any()):
        raise UsageError("none of these tokens lies in a frame; use by='role'")
    place = (x[positions[mine]].numpy() for x in (tokens.frame, tokens.row, tokens.col))
    out[(..., *place)] = values[..., mine].numpy()
    return out


def _seconds(tokens: TokenMap) -> list[float | None]:
    """The time of every frame, None where unknown."""
    at = tokens.where(role="frame")
    first = {
        int(f): float(s) for f, s in reversed(list(zip(tokens.frame[at], tokens.seconds[at], strict=True)))
    }
    return [first[f] if np.isfinite(first[f]) else None for f in sorted(first)]


# ---- words ----------------------------------------------------------------------------------------------------------


def word_id(who: Asked, case: Case, word: str | int) -> int:
    """The token followed for one item. Raises UsageError if there is none."""
    model = who.model
    if isinstance(word, int) and not isinstance(word, bool):
        if not 0 <= word < model.cfg.d_vocab:
            raise UsageError(
                f"token id {word}: the vocabulary has {model.cfg.d_vocab} tokens, 0..{model.cfg.d_vocab - 1}"
            )
        return word
    if word == ANSWER:  # the clean model's, whatever policy the lens is read under
        return clean_answer(model, case)
    if word == RIGHT:
        if case.item is None or not case.item.options or not isinstance(case.item.answer, int):
            raise UsageError(
                "words='right' needs items with options and the index of the right one; use 'answer'"
            )
        return letter_ids(model.need_tokenizer(), len(case.item.options))[case.item.answer]
    return model.to_single_token(word)


@torch.no_grad()
def clean_answer(model: Any, case: Case) -> int:
    """The token the model answers without any policy of ours (one that is open as `model.pruned` holds)."""
    return int(model(case.ready, mechanisms=case.mechanisms)[0, -1].argmax())


def _printed(model: Any, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token])


def words(
    model: Any, items: Any, tokens: str = "video", *, top: int = 5, site: Site = "resid_post", mode: Mode = "normed",
    layers: Sequence[int] | None = None, tuned: Any = None, n_frames: int = 8, policy: Any = None,
    mechanisms: Sequence[Any] = (), show_progress: bool = True,
) -> Result:  # fmt: skip
    """The best words on every token of a set, by layer.

    Returns a Result of their probabilities, axes (item, layer, pos, place); pos counts the tokens of the set from 0, and
    place the words from the best, 1. `notes["words"]` holds the words, nested likewise; `notes["where"]` each token's
    position, frame, row and col. Items with fewer tokens than others are filled up with nan and "". `painted` turns one
    layer of one item into words on frames. Other arguments as in `lens`.
    """
    if not isinstance(top, int) or top < 1:
        raise UsageError(f"top must be at least 1 word, got {top!r}")
    check_site(site)
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    logits, chosen = reading(model, mode, tuned), layers_asked(model.cfg.n_layers, layers)
    found = [
        _best(who, c, tokens, top, site, chosen, logits)
        for c in progress(who.cases, desc="words", show=show_progress)
    ]
    n, top = max(p.shape[1] for p, _ in found), found[0][0].shape[2]
    name = functools.cache(functools.partial(_printed, model))
    pad = [[""] * top]
    said = [
        [[[name(i) for i in pos] for pos in layer] + pad * (n - len(layer)) for layer in ids.tolist()]
        for _, ids in found
    ]
    values = [torch.nn.functional.pad(p, (0, 0, 0, n - p.shape[1]), value=torch.nan) for p, _ in found]
    label = NOT_NORMED.get(mode)
    return Result(
        values=torch.stack(values).numpy(), axes=("item", "layer", "pos", "place"),
        coords={"item": who.keys, "layer": [i + 1 for i in chosen], "pos": list(range(n)), "place": list(range(1, top + 1))},
        unit="probability" + (" (raw lens)" if label else ""), recipe={}, name="words by layer",
        notes={"words": said, "tokens": tokens, "mode": label or "normed", "site": site, "where": [_where(c, tokens) for c in who.cases]},
    )  # fmt: skip


def _best(
    who: Asked, case: Case, tokens: str, top: int, site: str, layers: Sequence[int], logits: Logits
) -> tuple[Tensor, Tensor]:
    """Probabilities and ids, [layer, token, top]; nan and 0 where a token is gone."""
    positions = case.at(tokens)
    top = min(top, who.model.cfg.d_vocab)
    p = torch.full((len(layers), len(positions), top), torch.nan)
    ids = torch.zeros(p.shape, dtype=torch.long)

    def see(layer: int, rows: Tensor, kept: Tensor) -> None:
        said = said_by(logits, layer, rows, (), top, who.model.cfg.d_vocab)
        p[layers.index(layer), kept], ids[layers.index(layer), kept] = said.p, said.ids

    visit(who.model, case, site, layers, positions, see, policy=who.policy)
    return p, ids


def _where(case: Case, tokens: str) -> dict[str, list[int]]:
    at = case.at(tokens)
    columns = {"frame": case.tokens.frame, "row": case.tokens.row, "col": case.tokens.col}
    return {"position": at.tolist(), **{n: c[at].tolist() for n, c in columns.items()}}


def painted(result: Result, *, layer: int, item: str | None = None, place: int = 1) -> Result:
    """One layer of `words` on the video's grid: axes (frame, row, col), `notes["words"]` nested likewise.

    Raises UsageError if the tokens of the set have no places in frames.
    """
    item = result.coords["item"][0] if item is None else item
    part = result.select(item=item, layer=layer, place=place)
    i, j = result.coords["item"].index(item), result.coords["layer"].index(layer)
    where = result.notes["where"][i]
    here = [n for n, r in enumerate(where["row"]) if r >= 0 and where["frame"][n] >= 0]
    if not here:
        raise UsageError(f"tokens of {result.notes['tokens']!r} have no places in frames; read 'video'")
    index = tuple(np.array([where[n][k] for k in here]) for n in ("frame", "row", "col"))
    size = tuple(int(x.max()) + 1 for x in index)
    p, text = np.full(size, np.nan), np.full(size, "", object)
    p[index] = part.values[here]
    text[index] = [result.notes["words"][i][j][k][place - 1] for k in here]
    return Result(
        p, ("frame", "row", "col"), {a: list(range(n)) for a, n in zip(("frame", "row", "col"), size, strict=True)},
        result.unit, result.recipe, f"{_ordinal(place)}best word, layer {layer}",
        {"words": text.tolist(), "mode": result.notes["mode"], "selected": {"item": item, "layer": layer}},
    )  # fmt: skip


def _ordinal(place: int) -> str:
    return "" if place == 1 else f"{place}. "


# ---- the paper's two figures ----------------------------------------------------------------------------------------


def vocabulary(
    model: Any, items: Any, lists: Lists | None = None, *, tokens: str = "video", top: int = 10, mode: Mode = "normed",
    layers: Sequence[int] | None = None, n_frames: int = 8, policy: Any = None, mechanisms: Sequence[Any] = (),
    show_progress: bool = True,
) -> Result:  # fmt: skip
    """How often words of a list are among a token's best words, by layer (Map the Flow, logit lens).

    lists  name -> words; None: short lists of spatial, temporal and object words (`probes.wordlists.WORDS`). A token
           counts for a list if its text, without spaces and in lower case, is in it. A word may be in several lists
    top    how many best words of a token count (the paper's 10)

    Returns a Result with axes (item, list, layer): the share of the best words that are in the list. `notes["known"]`
    says how many of each list's words the vocabulary has as one token.
    """
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    chosen, logits = layers_asked(model.cfg.n_layers, layers), reading(model, mode)
    groups = groups_of(
        model.need_tokenizer(), model.cfg.d_vocab, checked_lists(WORDS if lists is None else lists)
    )
    shares: list[Tensor] = []
    for case in progress(who.cases, desc="vocabulary", show=show_progress):
        p, ids = _best(who, case, tokens, top, "resid_post", chosen, logits)
        there = p.isfinite()
        hits = [
            (torch.isin(ids, torch.tensor(sorted(g), dtype=torch.long)) & there).sum((1, 2))
            for g in groups.values()
        ]
        shares.append(torch.stack(hits) / there.sum((1, 2)))
    label = NOT_NORMED.get(mode)
    return Result(
        values=torch.stack(shares).numpy(), axes=("item", "list", "layer"),
        coords={"item": who.keys, "list": list(groups), "layer": [i + 1 for i in chosen]},
        unit=f"share of the {top} best words" + (" (raw lens)" if label else ""), recipe={}, name="vocabulary by layer",
        notes={"tokens": tokens, "mode": label or "normed", "known": {n: len(g) for n, g in groups.items()}},
    )  # fmt: skip


def gen_prob(
    model: Any, items: Any, *, mode: Mode = "normed", layers: Sequence[int] | None = None, n_frames: int = 8,
    policy: Any = None, mechanisms: Sequence[Any] = (), show_progress: bool = True,
) -> Result:  # fmt: skip
    """Probability of the answers at the last position, by layer (Map the Flow's generation probability).

    mode  "normed"; "raw" is what the paper's scripts compute (no final norm before the last layer)
    Returns a Result with axes (item, answer, layer): "right" (the right option's letter) and "others" (mean over the
    other letters). Raises UsageError for items without options or without a known answer.
    """
    who = asked(model, items, n_frames=n_frames, policy=policy, mechanisms=mechanisms, twins=False)
    chosen, logits = layers_asked(model.cfg.n_layers, layers), reading(model, mode)
    rows = [
        _letters(who, c, chosen, logits) for c in progress(who.cases, desc="gen-prob", show=show_progress)
    ]
    label = NOT_NORMED.get(mode)
    return Result(
        values=torch.stack(rows).numpy(), axes=("item", "answer", "layer"),
        coords={"item": who.keys, "answer": ["right", "others"], "layer": [i + 1 for i in chosen]},
        unit="probability" + (" (raw lens)" if label else ""), recipe={}, name="probability of the answer by layer",
        notes={"mode": label or "normed"},
    )  # fmt: skip


def _letters(who: Asked, case: Case, layers: Sequence[int], logits: Logits) -> Tensor:
    right = word_id(who, case, RIGHT)
    n = len(case.item.options) if case.item is not None else 0
    ids = letter_ids(who.model.need_tokenizer(), n)
    out = torch.full((n, len(layers)), torch.nan)

    def see(layer: int, rows: Tensor, kept: Tensor) -> None:
        out[:, layers.index(layer)] = said_by(logits, layer, rows, ids, 0, who.model.cfg.d_vocab).followed[0]

    visit(who.model, case, "resid_post", layers, case.at("last"), see, policy=who.policy)
    others = [i for i in range(n) if ids[i] != right]
    return torch.stack([out[ids.index(right)], out[others].mean(0)])
