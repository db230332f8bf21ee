"""Frozen structs that travel through the house: VideoQA, Frames, VideoGrid, VisionTokens, TokenMap.

They hold data and answer questions about it. They know no model, no tokenizer and no file format.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lab.errors import PromptError, UsageError
from lab.spans import GROUPS, KINDS, ROLES

Positions = Literal["preserve", "compact"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class VideoQA:
    """A question about a video.

    video     path (file or folder of images), uint8 array or tensor [frame, height, width, 3], or `Frames`
    options   answer options; empty for an open question
    answer    index of the right option, or the right text of an open question; None if unknown
    clip      (start, end), the seconds of the video that the question is about; None: all of it
    state     ground truth of a simulated video; twin: the smallest change of video that flips the answer
    """

    video: Any
    question: str
    options: tuple[str, ...] = ()
    answer: int | str | None = None
    id: str = ""
    task: str = ""
    state: Any = field(default=None, repr=False, compare=False)
    twin: VideoQA | None = field(default=None, repr=False, compare=False)
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.question, str):
            raise UsageError(f"question must be text, got {type(self.question).__name__}")
        options = self.options
        if isinstance(options, str) or not all(isinstance(o, str) for o in options):
            raise UsageError(f"options must be a sequence of texts, got {options!r}")
        for said in (self.question, *options):
            _check_unicode(said)
        object.__setattr__(self, "options", tuple(options))
        if isinstance(self.video, Path):
            object.__setattr__(self, "video", str(self.video))
        if self.clip is not None:
            object.__setattr__(self, "clip", _seconds(self.clip))
        self._check_options()

    def _check_options(self) -> None:
        n = len(self.options)
        if n > len(LETTERS):
            raise UsageError(f"{n} options but only {len(LETTERS)} letters; give at most {len(LETTERS)}")
        if any(not o.strip() for o in self.options):
            raise UsageError(f"an option is empty, got {self.options!r}; write out each")
        if len(set(self.options)) < n:
            raise UsageError(f"options must differ, got {self.options!r}")
        if n and isinstance(self.answer, str):
            object.__setattr__(self, "answer", self._named(self.answer))
        if n and isinstance(self.answer, int) and not 0 <= self.answer < n:
            raise UsageError(f"answer {self.answer} but there are {n} options; use 0..{n - 1}")

    def _named(self, answer: str) -> int:
        """Index of an option given by its text or its letter."""
        if answer in self.options:
            return self.options.index(answer)
        letters = LETTERS[: len(self.options)]
        if len(answer) == 1 and answer in letters:
            return letters.index(answer)
        raise UsageError(
            f"answer {answer!r} is none of the {len(self.options)} options {self.options!r} nor a letter of one"
        )

    @property
    def letter(self) -> str | None:
        """Letter of the right option, None if there are no options or the answer is unknown."""
        return LETTERS[self.answer] if self.options and isinstance(self.answer, int) else None


def _seconds(clip: Any) -> tuple[float, float]:
    numbers = tuple(clip) if isinstance(clip, Sequence) and not isinstance(clip, str) else ()
    if len(numbers) != 2 or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise UsageError(f"clip must be (start, end) in seconds, got {clip!r}")
    if not 0 <= numbers[0] < numbers[1]:
        raise UsageError(f"clip must have 0 <= start < end, got {clip!r}")
    return float(numbers[0]), float(numbers[1])


def _check_unicode(text: str) -> None:
    """Bytes of another encoding come from a command line as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UsageError(
            f"{text[:60]!r} is not valid text (character {e.start}); write it in UTF-8"
        ) from None


@dataclass(frozen=True)
class Frames:
    """Sampled frames as they were decoded: uint8, upright, RGB, at the file's own size.

    seconds[i] is the presentation time of frame i, from the start of the video; index[i] its place in the file, -1 for a
    picture that a mechanism composed of several frames. fps and duration (seconds) describe the source; 0.0 where the
    source does not say.
    """

    pixels: UInt8[Tensor, "frame channel height width"]
    seconds: Float[Tensor, " frame"]
    index: Int[Tensor, " frame"]
    fps: float
    duration: float
    source: str

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[1] != 3 or self.pixels.dtype != torch.uint8:
            raise UsageError(
                f"frames must be uint8 [frame, 3, height, width], got {self.pixels.dtype} {tuple(self.pixels.shape)}"
            )
        if not len(self.pixels) == len(self.seconds) == len(self.index):
            raise UsageError(
                f"{len(self.pixels)} frames but {len(self.seconds)} times and {len(self.index)} indices"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def pictures(self) -> UInt8[np.ndarray, "frame height width channel"]:
        """The frames as views and picture files take them, on the CPU."""
        return self.pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def composed(self, grid: VideoGrid) -> Bool[Tensor, " token"]:
        """Which of the grid's tokens show a picture composed of several frames (see `index`)."""
        n = int(grid.frame.max()) + 1 if len(grid) else 0
        depth = -(-len(self) // n) if n else 1  # frames per tubelet
        made = (self.index < 0).to(grid.frame.device)
        at = (grid.frame * depth).clamp(0, max(len(self) - 1, 0))
        return (grid.frame >= 0) & made[at] if len(self) else torch.zeros_like(grid.frame, dtype=torch.bool)


@dataclass(frozen=True)
class VideoGrid:
    """Where each video token lies: one entry per token, in the order the decoder reads them.

    frame    frame (tubelet) index, -1 for tokens of no single frame (newline tokens, means over the video)
    row, col place in the frame's grid, -1 for tokens of no frame
    seconds  time of the frame (mean over a tubelet), nan where unknown
    weight   how many of the tower's patches (rows x cols x frames) were merged into this token
    source   id of the token before any mechanism dropped or moved it; of a token merged from several, that of the one
             it stands for; -1 for a token that stands for none
    parts    where merged tokens come from: the share of every original token in each, rows sum to 1. None: every token is
             its own `source` alone
    """

    frame: Int[Tensor, " token"]
    row: Int[Tensor, " token"]
    col: Int[Tensor, " token"]
    seconds: Float[Tensor, " token"]
    weight: Float[Tensor, " token"]
    source: Int[Tensor, " token"]
    parts: Float[Tensor, "token original"] | None = None

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: Tensor | slice) -> VideoGrid:
        kept = {name: getattr(self, name)[index] for name in self.columns()}
        return VideoGrid(**kept, parts=None if self.parts is None else self.parts[index])

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the columns that every grid has."""
        return [f.name for f in fields(cls) if f.name != "parts"]

    def shares(self) -> Float[Tensor, "token original"]:
        """`parts`, written out where they are None. Originals beyond the largest known id are left out."""
        if self.parts is not None:
            return self.parts
        n = int(self.source.max()) + 1 if len(self) else 0
        return (self.source[:, None] == torch.arange(n, device=self.source.device)).float()

    @staticmethod
    def regular(frames: int, rows: int, cols: int, *, seconds: Tensor | None, weight: float) -> VideoGrid:
        """Frame-major, row-major grid. `seconds` is [frames] or None (unknown)."""
        n = frames * rows * cols
        at = torch.arange(n)
        frame = at // (rows * cols)
        times = torch.full((n,), torch.nan) if seconds is None else seconds.float()[frame]
        return VideoGrid(
            frame, at // cols % rows, at % cols, times, torch.full((n,), float(weight)), at.clone()
        )

    def plus_newline(self) -> VideoGrid:
        """The same grid followed by one token of no frame (LLaVA's image_newline)."""
        none, nan = torch.tensor([-1]), torch.tensor([torch.nan])
        tail = VideoGrid(none, none, none, nan, torch.tensor([0.0]), torch.tensor([len(self)]))
        return VideoGrid(*(torch.cat([getattr(self, n), getattr(tail, n)]) for n in self.columns()))


@dataclass(frozen=True)
class VisionTokens:
    """What the vision side hands to the layout. `x` is None before the tower ran (layouts need only the grid).

    x     [token, d_model]
    deep  further features to be added after decoder layers 0..n-1 (DeepStack), each [token, d_model]
    rope  rope positions the checkpoint gave these tokens, [axis, token]; None for plain 1-D positions
    positions  "preserve": tokens that are left keep their rope positions, and so does the text after them; "compact":
               positions that nobody holds any more are closed up, as in a prompt written without those tokens
    """

    x: Float[Tensor, "token d_model"] | None
    grid: VideoGrid
    deep: tuple[Tensor, ...] = ()
    rope: Int[Tensor, "axis token"] | None = None
    positions: Positions = "preserve"

    def __len__(self) -> int:
        return len(self.grid)

    def __getitem__(self, index: Tensor | slice) -> VisionTokens:
        x = None if self.x is None else self.x[index]
        rope = None if self.rope is None else self.rope[:, index]
        return VisionTokens(x, self.grid[index], tuple(d[index] for d in self.deep), rope, self.positions)


@dataclass(frozen=True)
class TokenMap:
    """What every position of one world's sequence is. The roles partition the sequence: one role per position.

    ids      token id of every position (placeholder id for video tokens)
    pieces   text of every position ("" for video tokens and where no tokenizer is known)
    role     index into `lab.spans.ROLES`; kind: index into `lab.spans.KINDS`
    frame, row, col, option   -1 where the position has none
    seconds  time of the frame or timestamp, nan where there is none
    weight   patches merged into the token (1 for text)
    order    position in the sequence before any mechanism dropped or moved tokens; rises
    source   for video tokens: the id in the original VideoGrid, else -1
    parts    where merged video tokens come from, as in VideoGrid; zeros for text. None: every token is its `source` alone
    n_layers, n_heads   of the model the prompt was prepared for; None if made for none
    ahead    mechanisms that will still drop, merge or lay out anew before the decoder reads: this is not its map
             (`model.maps(ready)` is)
    """

    ids: Int[Tensor, " pos"]
    pieces: tuple[str, ...]
    role: Int[Tensor, " pos"]
    kind: Int[Tensor, " pos"]
    frame: Int[Tensor, " pos"]
    row: Int[Tensor, " pos"]
    col: Int[Tensor, " pos"]
    option: Int[Tensor, " pos"]
    seconds: Float[Tensor, " pos"]
    weight: Float[Tensor, " pos"]
    order: Int[Tensor, " pos"]
    source: Int[Tensor, " pos"]
    n_layers: int | None = None
    n_heads: int | None = None
    parts: Float[Tensor, "pos original"] | None = None
    ahead: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.ids)
        for name in self._per_position():
            got = len(getattr(self, name))
            if got != n:
                raise PromptError(f"token map: {got} entries of {name} for {n} positions")
        if n > 1 and not bool((self.order.diff() > 0).all()):
            raise PromptError(f"token map: order must rise, got {self.order.tolist()[:8]}...")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def last(self) -> Int[Tensor, " one"]:
        """The final prompt position, as a tensor of one."""
        return self.where(role="last")

    @property
    def n_frames(self) -> int:
        """Number of frames (tubelets) that have at least one token."""
        return len(self.frame[(self.role == ROLES.index("frame")) & (self.frame >= 0)].unique())

    def roles(self) -> list[str]:
        """The role name of every position, in order."""
        return [ROLES[i] for i in self.role.tolist()]

    def where(
        self,
        *,
        role: str | Sequence[str] | None = None,
        kind: str | None = None,
        frame: int | Sequence[int] | None = None,
        row: int | None = None,
        col: int | None = None,
        option: int | Sequence[int] | None = None,
    ) -> Int[Tensor, " pos"]:
        """Positions that match every given condition, ascending. Empty if none does.

        role  a role, or a group that holds for any prompt: "video" (all frame tokens), "text" (all text but `last`)
        Raises UsageError for an unknown role or kind, naming the closest.
        """
        hit = torch.ones(len(self), dtype=torch.bool)
        if role is not None:
            hit &= torch.isin(self.role, torch.tensor(_role_codes(role)))
        if kind is not None:
            hit &= self.kind == _code(kind, KINDS, "kind")
        for column, want in ((self.frame, frame), (self.row, row), (self.col, col), (self.option, option)):
            if want is not None:
                hit &= torch.isin(column, torch.tensor([want] if isinstance(want, int) else list(want)))
        return hit.nonzero().squeeze(1)

    def only(self, index: Int[Tensor, " kept"]) -> TokenMap:
        """The map of the kept positions; `index` ascending."""
        pieces = tuple(self.pieces[i] for i in index.tolist())
        columns = {name: getattr(self, name)[index] for name in self._per_position() if name != "pieces"}
        return replace(
            self, pieces=pieces, parts=None if self.parts is None else self.parts[index], **columns
        )

    def painted(self, values: Float[Tensor, " pos"], grid: VideoGrid) -> Float[Tensor, "frame row col"]:
        """Values of the positions, painted back on the places of the original `grid`; nan where nothing is left.

        A place takes the value of the token it went into; of several, their mean weighted by its share in each. Tokens
        of no frame are left out. Raises UsageError if values and map, or map and grid, do not fit together.
        """
        if len(values) != len(self):
            raise UsageError(f"{len(values)} values for {len(self)} positions; give one each")
        video = (self.kind == KINDS.index("video")) & ((self.source >= 0) | (self.frame >= 0))
        shares = self._shares(video, len(grid))
        known = torch.as_tensor(values).cpu()[video].double()
        total, unknown = shares.sum(0), known.isnan().double() @ shares > 0
        mean = known.nan_to_num() @ shares / total
        flat = torch.where((total > 0) & ~unknown, mean, torch.nan).float()
        on = (grid.frame >= 0) & (grid.row >= 0) & (grid.col >= 0)
        if not bool(on.any()):
            raise UsageError(
                "nobody knows where this grid's tokens lie in their frames: rows and columns are -1"
            )
        out = torch.full([int(c[on].max()) + 1 for c in (grid.frame, grid.row, grid.col)], torch.nan)
        out[grid.frame[on], grid.row[on], grid.col[on]] = flat[grid.source[on]]
        return out

    def _shares(self, video: Tensor, n: int) -> Tensor:
        """Share of each of `n` original tokens in each of the given positions, double."""
        if self.parts is None:
            made = (self.source[video][:, None] == torch.arange(n)).double()
        else:
            made = torch.zeros(int(video.sum()), max(n, self.parts.shape[1]), dtype=torch.double)
            made[:, : self.parts.shape[1]] = self.parts[video]
        if made.shape[1] > n or bool((self.source[video] >= n).any()):
            raise UsageError(
                f"the map's tokens come from more than the grid's {n}; give the grid of the same prompt"
            )
        return made

    def generated(self, ids: Sequence[int], pieces: Sequence[str] | None = None) -> TokenMap:
        """The map with generated tokens appended."""
        n, start = len(ids), int(self.order[-1]) + 1
        minus = torch.full((n,), -1)
        new: dict[str, Any] = {
            "ids": torch.tensor(list(ids)), "role": torch.full((n,), ROLES.index("generated")),
            "kind": torch.zeros(n, dtype=torch.long), "seconds": torch.full((n,), torch.nan),
            "weight": torch.ones(n), "order": torch.arange(start, start + n),
            **dict.fromkeys(("frame", "row", "col", "option", "source"), minus),
        }  # fmt: skip
        joined = {name: torch.cat([getattr(self, name), column]) for name, column in new.items()}
        parts = (
            None
            if self.parts is None
            else torch.cat([self.parts, self.parts.new_zeros(n, self.parts.shape[1])])
        )
        return replace(self, pieces=self.pieces + tuple(pieces or [""] * n), parts=parts, **joined)

    @classmethod
    def _per_position(cls) -> list[str]:
        return [f.name for f in fields(cls) if f.name not in ("n_layers", "n_heads", "parts", "ahead")]


def _role_codes(role: str | Sequence[str]) -> list[int]:
    names = [role] if isinstance(role, str) else list(role)
    known = tuple(dict.fromkeys(ROLES + tuple(GROUPS)))
    for name in names:
        _code(name, known, "role")
    return [ROLES.index(r) for name in names for r in GROUPS.get(name, (name,))]


def _code(name: str, known: tuple[str, ...], what: str) -> int:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise UsageError(
            f"no {what} {name!r}; closest: {', '.join(near) or 'none'}; known: {', '.join(known)}"
        )
    return known.index(name)
