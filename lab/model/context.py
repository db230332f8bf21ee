"""Context: a prompt that grows. Text and frames are appended as they come, read once, and stay in the cache.

Each row knows its source position, its rope position and what it is (a TokenMap that grows along), so detours, ragged
caches, cuts and hooks mean what they mean in a run over a whole prompt. Of one piece of text or one frame at a time; the
decoder, not the vision tower, sees what was before. `replay` reads the same rows in one forward without a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lab.carriers import Frames, TokenMap, VideoGrid, VisionTokens
from lab.errors import RunError, UsageError
from lab.model.decoder import decode
from lab.model.door import Door
from lab.model.hooking import check_layers, checked_edges
from lab.model.ready import Ready
from lab.model.run import Edges, Run
from lab.prompt import lay_out
from lab.slots import Plan, Stage, called
from lab.spans import KINDS, ROLES, Span


@dataclass(frozen=True)
class Rows:
    """What is appended at once: positions count from 0 here, and from what was before once they are in a Context.

    rope     [1, pos] or, with M-RoPE, [3, 1, pos]
    advance  by how many rope positions the next row stands further on
    whole    of a frame: its tokens before the stages
    """

    embeds: Float[Tensor, "one pos d_model"]
    tokens: TokenMap
    rope: Int[Tensor, "..."]
    advance: int
    deep: tuple[Tensor, ...] = ()
    whole: int = 0

    def __len__(self) -> int:
        return self.embeds.shape[1]


@dataclass(frozen=True)
class Read:
    """What a piece said: logits after its last row [d_vocab], and what the plan's heads read."""

    logits: Float[Tensor, " d_vocab"]
    heads: dict[str, Tensor]


class Context:
    """One growing prompt of one model. Raises RunError, by name, for mechanisms that need a whole video.

    edges  as in `model(ready, edges=...)`; positions count all rows so far
    """

    def __init__(self, model: Any, plan: Plan, *, edges: Mapping[int, Edges] | None = None) -> None:
        self.model, self.plan = model, plan
        for what, slot in (("sampler", plan.sampler), ("encoder", plan.encoder)):
            if slot is not None:
                raise RunError(
                    f"{called(slot)} fills the {what} slot, which needs a whole video; it cannot run in a stream"
                )
        self.stages = [_streamed(stage) for stage in plan.stages]
        self.edges = checked_edges(edges)
        check_layers(model, [*self.edges])
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.run = Run(dict(self.edges))
        self.cache = self.model.new_cache(self.plan)
        self.pieces: list[Rows] = []
        self.n, self.next_rope, self.n_frames = 0, 0, 0
        for stage in self.stages:
            if hasattr(stage, "reset"):
                cast(Any, stage).reset()

    # ---- what can be appended -------------------------------------------------------------------------------------------

    def text(self, spans: Sequence[Span]) -> Rows:
        """Text as rows, tokenised as one string; roles as the spans say. Raises PromptError as prompts do."""
        tokenizer = self.model.need_tokenizer()
        placeholder = self.model.family.placeholder(self.model.hf.config)
        nothing = VideoGrid.regular(0, 1, 1, seconds=None, weight=1.0)
        ids, tokens = lay_out(spans, nothing, tokenizer, placeholder)
        role = tokens.role.clone()
        role[-1] = ROLES.index(next(s.role for s in reversed(spans) if s.text))
        return self._words(ids, replace(tokens, role=role))

    def ids(self, ids: Sequence[int], role: str = "generated") -> Rows:
        """Token ids as rows of one role."""
        if not ids:
            raise UsageError("no ids to append")
        n, tokenizer = len(ids), self.model.tokenizer
        minus = torch.full((n,), -1)
        pieces = ("",) * n if tokenizer is None else tuple(str(tokenizer.decode([i])) for i in ids)
        tokens = TokenMap(
            ids=torch.tensor(list(ids)), pieces=pieces, role=torch.full((n,), ROLES.index(role)),
            kind=torch.zeros(n, dtype=torch.long), frame=minus, row=minus, col=minus, option=minus,
            seconds=torch.full((n,), torch.nan), weight=torch.ones(n), order=torch.arange(n), source=minus,
        )  # fmt: skip
        return self._words(tokens.ids[None], tokens)

    def _words(self, ids: Tensor, tokens: TokenMap) -> Rows:
        embeds = self.model.hf.get_input_embeddings()(ids.to(self.model.device))
        return Rows(embeds, tokens, self._line(len(tokens)), len(tokens))

    def _line(self, n: int) -> Tensor:
        at = torch.arange(n, device=self.model.device)
        return at[None, None].expand(3, 1, n) if self.model.mrope else at[None]

    @torch.no_grad()
    def frame(self, frames: Frames, query: str = "") -> Rows:
        """One frame (or one tubelet) as rows, after the stages; there may be none left.

        Tokens of no frame (newline tokens, which end a whole video) are left out. Raises UsageError for more than a frame.
        """
        model = self.model
        pixels, grid = model.family.pixels(frames, model.hf.config, model.preprocessor)
        ids = torch.full((1, len(grid)), model.family.placeholder(model.hf.config))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        ready = Ready({**inputs, **model.family.extra_inputs(ids, model.hf.config)}, ())
        with model.lock.shared():
            door = model.see(ready)
        if len(grid[grid.frame >= 0].frame.unique()) != 1:
            raise UsageError(
                f"{len(frames)} frames make {int(grid.frame.max()) + 1} steps for this model; give one step at a time"
            )
        on = (grid.frame >= 0).nonzero().squeeze(1)
        whole = _vision(door, grid, on.to(door.embeds.device))
        left = whole
        for stage in self.stages:
            left = stage(frames, left, query)
        rows = self._pictured(whole, left)
        self.n_frames += 1
        return rows

    def _pictured(self, whole: VisionTokens, left: VisionTokens) -> Rows:
        """The rows of a frame's tokens, rope positions counted from the frame's own first."""
        assert left.x is not None and left.rope is not None and whole.rope is not None
        if len(left.x) and not bool((left.grid.source.diff() > 0).all()):
            raise RunError("the stages reordered or added vision tokens; in a stream they may only drop some")
        rope = left.rope - whole.rope.min()
        advance = int(whole.rope.max() - whole.rope.min()) + 1
        if left.positions == "compact":
            rope = rope - torch.searchsorted(_gone(whole.rope, left.rope), left.rope.contiguous())
            advance = int(rope.max()) + 1 if rope.numel() else 0
        rope = rope[:, None] if self.model.mrope else rope
        tokens = _frame_map(
            left.grid, len(whole), self.n_frames, self.model.family.placeholder(self.model.hf.config)
        )
        return Rows(left.x[None], tokens, rope, advance, tuple(d[None] for d in left.deep), len(whole))

    # ---- reading ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def append(self, *pieces: Rows) -> Read | None:
        """Read the pieces in one go; None if they have no row at all.

        Raises RunError inside `model.pruned`: a policy is bound to a whole prompt.
        """
        if self.model.pruning.chosen(None) is not None:
            raise RunError(
                "a policy is bound to a whole prompt, which a stream is not; use edges=, or a run over the whole video"
            )
        rows = [self._placed(p) for p in pieces]
        rows = [r for r in rows if len(r)]
        if not rows:
            return None
        model, start = self.model, int(rows[0].tokens.order[0])
        self.pieces += rows
        with model.plan_hooks(self.plan), model.lock.shared():
            door, tokens = _joined(rows)
            resid, side = decode(
                model,
                door,
                self.run,
                start=start,
                cache=self.cache,
                detours=self.plan.detours,
                tokens=(tokens,),
            )
            heads: dict[str, Tensor] = {}
            final = model.ln_final(resid) if self.plan.heads else resid
            for head in self.plan.heads:
                heads |= head(final, side)
            return Read(model.read(resid, side)[0, -1], heads)

    def _placed(self, rows: Rows) -> Rows:
        """The rows at their place in this context, which moves on."""
        tokens = replace(rows.tokens, order=rows.tokens.order.argsort() + self.n, n_layers=self.model.cfg.n_layers, n_heads=self.model.cfg.n_heads)  # fmt: skip
        placed = replace(rows, tokens=tokens, rope=rows.rope + self.next_rope)
        self.n, self.next_rope = self.n + len(rows), self.next_rope + rows.advance
        return placed

    @property
    def tokens(self) -> TokenMap:
        """The map of all rows so far. Raises UsageError while there is none."""
        if not self.pieces:
            raise UsageError("nothing was appended yet")
        return _joined(self.pieces)[1]

    @torch.no_grad()
    def replay(self, *, read: Any = "all", cached: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [1, pos, d_vocab] and heads of one forward over all rows, offline: what a stream must equal.

        cached  through the plan's cache, as a prefill
        """
        model = self.model
        door, tokens = _joined(self.pieces)
        with model.plan_hooks(self.plan), model.lock.shared():
            cache = model.new_cache(self.plan) if cached else None
            resid, side = decode(
                model, door, Run(dict(self.edges)), cache=cache, detours=self.plan.detours, tokens=(tokens,)
            )
            heads: dict[str, Tensor] = {}
            for head in self.plan.heads:
                heads |= head(model.ln_final(resid), side)
            return model.read(resid, side, read), heads

    # ---- going back ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """What `restore` takes: cache, rows, and what stages and detours remember."""
        return {
            "cache": self.cache.snapshot(), "pieces": list(self.pieces), "run": _copied(self.run),
            "places": (self.n, self.next_rope, self.n_frames),
            "stages": [s.state() if hasattr(s, "state") else None for s in cast(list[Any], self.stages)],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a `snapshot`: as if what came after had never been."""
        self.cache.restore(state["cache"])
        self.pieces, self.run = list(state["pieces"]), _copied(state["run"])
        self.n, self.next_rope, self.n_frames = state["places"]
        for stage, held in zip(cast(list[Any], self.stages), state["stages"], strict=True):
            if held is not None:
                stage.restore(held)


def _copied(run: Run) -> Run:
    """The run with containers of its own."""
    own: dict[str, Any] = {}
    for f in fields(run):
        held = getattr(run, f.name)
        own[f.name] = held.copy() if isinstance(held, dict | list | set) else held
    return Run(**own)


def _streamed(stage: Stage) -> Stage:
    make = getattr(stage, "streamed", None)
    if make is None:
        raise RunError(
            f"{type(stage).__name__} needs the whole video; it cannot run in a stream, frame by frame"
        )
    return make()


def _vision(door: Door, grid: VideoGrid, on: Tensor) -> VisionTokens:
    """The frame's tokens; rope [axis, token], of which an axis for the text's own positions is left out."""
    rope = door.rope[-3:, 0, on] if door.rope.ndim == 3 else door.rope[:1, on]
    return VisionTokens(door.embeds[0, on], grid[on.cpu()], tuple(d[0, on] for d in door.deep), rope)


def _gone(had: Tensor, left: Tensor) -> Tensor:
    """Positions that were held and are no more, ascending."""
    held = had.unique()
    return held[~torch.isin(held, left)]


def _frame_map(grid: VideoGrid, whole: int, frame: int, placeholder: int) -> TokenMap:
    n = len(grid)
    return TokenMap(
        ids=torch.full((n,), placeholder), pieces=("",) * n, role=torch.full((n,), ROLES.index("frame")),
        kind=torch.full((n,), KINDS.index("video")), frame=torch.full((n,), frame), row=grid.row, col=grid.col,
        option=torch.full((n,), -1), seconds=grid.seconds.float(), weight=grid.weight, order=torch.arange(n),
        source=grid.source + frame * whole,
    )  # fmt: skip


def _joined(rows: Sequence[Rows]) -> tuple[Door, TokenMap]:
    """Pieces one after another as the decoder reads them."""
    depth = max(len(r.deep) for r in rows)
    deep = tuple(
        torch.cat([r.deep[i] if i < len(r.deep) else torch.zeros_like(r.embeds) for r in rows], 1)
        for i in range(depth)
    )
    maps = [r.tokens for r in rows]
    names = [n for n in TokenMap._per_position() if n != "pieces"]
    columns = {n: torch.cat([getattr(m, n) for m in maps]) for n in names}
    tokens = replace(maps[0], pieces=tuple(p for m in maps for p in m.pieces), **columns)
    return Door(
        torch.cat([r.embeds for r in rows], 1), torch.cat([r.rope for r in rows], -1), None, deep
    ), tokens
