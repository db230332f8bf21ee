"""VideoLLM-online, LIVE (arXiv 2406.11816, CVPR 2024): watch frame by frame, speak when there is something to say.

1 the context is `system, newline, [` and then frames as they come; keys and values stay   2 after each frame the model
predicts: the interval token (or, in its first version, the end-of-text token) means silence   3 where silence is less
likely than `theta`, it is ruled out; whatever else is most likely means "speak": the bracket is closed and a reply decoded
4 questions are asked at a time, and answered after the frame of that time

`Session` is the loop; `Streaming` in a run lays the whole video out as that stream, ends it with the item's question, and
reads the ends of frames, so that every instrument works on it: streaming equals offline. `Speak` is a head that decides
in place of the interval token (MMDuet, arXiv 2411.17991). Left out: the FIFO between encoder and decoder processes.
Training targets, loss and scores are in `lab.learn.live`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lab.carriers import Frames, TokenMap, VideoQA, VisionTokens
from lab.errors import ConfigError, RunError, UsageError
from lab.model.context import Context, Read, Rows
from lab.model.families.geometry import temporal_patch
from lab.model.generation import _ends
from lab.prompt import answer_spans, question_spans
from lab.result import Result
from lab.settings import check_names, check_number, check_texts, check_whole
from lab.side import Side
from lab.slots import ModelSizes, Plan, called, plan_of
from lab.spans import Span
from lab.video import read as read_video

Decide = Literal["silence", "head", "scene", "never"]
Compat = Literal["paper", "released"]


@dataclass(frozen=True)
class Streaming:
    """LIVE (sections 3.1, 3.2). All texts are the released code's; the tokenizer must know `interval` as one token.

    theta     silence: speak where p(silence) is below it and something else is likelier still (0: plain argmax; above 1:
              always). head: speak where `Speak` gives more. scene: speak where less than this share of the frame was
              dropped by a token drop in the same session
    decide    what decides: the language model's "silence" token, the "head", the "scene", or "never"
    interval  the silence token; None: the end-of-text token
    open, close, user, assistant   texts round the stream, a question, a reply; system and bos before all
    fps       frames per second, where frames come without a time
    max_new_tokens, forget_replies   of a reply: its limit, and whether the context keeps it
    layout    "stream": the whole video as a stream, in runs; "prompt": the family's own prompt, only the heads read
    speak     a file of `Speak` weights (safetensors); "": none
    compat    "released": the interval token that was predicted is fed before the next frame (P + 1 rows a frame; the
              paper feeds none); a reply that reaches its limit is left open, and the next frame glued to it; a question
              right after a reply closes a bracket that is not open, and drops the reply's end-of-text token; a question
              before any frame is fed without the system prompt
    """

    NEUTRAL: ClassVar[Any]
    EXAMPLE: ClassVar[Any]

    theta: float = 0.725
    decide: Decide = "silence"
    interval: str | None = ","
    open: str = "\n["
    close: str = "]"
    user: str = "\nUser: "
    assistant: str = "\nAssistant:"
    system: str = ""
    bos: str = ""
    fps: float = 2.0
    max_new_tokens: int = 100
    forget_replies: bool = False
    layout: Literal["stream", "prompt"] = "stream"
    speak: str = ""
    compat: Compat = "paper"

    def __post_init__(self) -> None:
        check_names(self, {"decide": Decide, "compat": Compat, "layout": Literal["stream", "prompt"]})
        check_texts(self, ("open", "close", "user", "assistant", "system", "bos", "speak"))
        check_number("theta", self.theta, 0)
        if (
            isinstance(self.fps, bool)
            or not isinstance(self.fps, int | float)
            or not 0 < self.fps < float("inf")
        ):
            raise UsageError(f"fps must be a number above 0, got {self.fps!r}")
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        if self.interval is not None and not (isinstance(self.interval, str) and self.interval):
            raise UsageError(
                f"interval must be a text, or None for the end-of-text token; got {self.interval!r}"
            )
        if not (self.open and self.close and self.assistant):
            raise UsageError(
                "open, close and assistant are what the stream is made of; none of them can be empty"
            )

    def plan(self, cfg: ModelSizes) -> Plan:
        """The layout of a stream, and heads that read where frames end."""
        heads = (FrameEnds(), *([Speak.load(self.speak, cfg.d_model)] if self.speak else []))
        if self.layout == "prompt":
            return Plan(heads=heads)
        return Plan(stages=(FramesOnly(),), layout=StreamLayout(self), heads=heads)

    def start(self) -> list[Span]:
        """What stands before the first frame."""
        return [Span("bos", self.bos), Span("system", self.system), Span("separator", self.open)]

    def asking(self, question: str | VideoQA, *, opened: bool) -> list[Span]:
        """A question, and the beginning of its reply; the bracket is closed if it is open."""
        item = question if isinstance(question, VideoQA) else None
        stem = [Span("question", str(question))] if item is None else question_spans(item)
        spans = [Span("separator", self.close if opened else ""), Span("template", self.user), *stem]
        spans.append(Span("template", self.assistant))
        return [*spans, *([] if item is None else answer_spans(item))]


# ---- a whole video as a stream --------------------------------------------------------------------------------------


class FramesOnly:
    """A Stage that leaves out tokens of no frame (the newline token that ends a whole video)."""

    def __call__(self, frames: Frames, vision: VisionTokens | None, query: str) -> VisionTokens:
        if vision is None:
            raise RunError("a stream lays out vision tokens; it needs an encoder before it")
        kept = (vision.grid.frame >= 0) | (vision.grid.source < 0)
        return vision[kept.nonzero().squeeze(1).to("cpu" if vision.x is None else vision.x.device)] if not bool(kept.all()) else vision  # fmt: skip

    def streamed(self) -> FramesOnly:
        """Streams have none to begin with."""
        return self


@dataclass(frozen=True)
class StreamLayout:
    """A Layout: all frames in silence, then the item's question. One frame after the other, however many tokens are left."""

    config: Streaming

    def __call__(self, item: VideoQA, frames: Frames, vision: VisionTokens) -> list[Span]:
        fed = self.config.interval if self.config.compat == "released" else None
        spans = [s for s in self.config.start() if s.text]
        last = 0
        for span in _runs(vision):
            now = last if span.frame is None else span.frame
            spans += [Span("separator", fed) for _ in range(last, now) if fed]
            spans.append(span)
            last = max(last, now)
        return [*spans, *(s for s in self.config.asking(item, opened=True) if s.text)]


def _runs(vision: VisionTokens) -> list[Span]:
    """One video span per run of tokens of one frame."""
    frame = vision.grid.frame
    edges = [0, *((frame.diff() != 0).nonzero().squeeze(1) + 1).tolist(), len(frame)] if len(frame) else [0]
    return [
        Span("frame", kind="video", rows=(a, b), frame=int(frame[a]) if int(frame[a]) >= 0 else None)
        for a, b in zip(edges, edges[1:], strict=False)
    ]


def frame_ends(tokens: TokenMap) -> Tensor:
    """Position of the last token of every frame, in order of frames; a frame without tokens has none."""
    video = tokens.where(role="frame")
    video = video[tokens.frame[video] >= 0]
    names = tokens.frame[video].unique().tolist()
    return torch.tensor([int(video[tokens.frame[video] == f][-1]) for f in names], dtype=torch.long)


class FrameEnds:
    """A Head: the final, normed stream where frames end, "frame_end" [world, frame, d_model]. LIVE decides there."""

    def __call__(self, resid: Tensor, side: Side) -> dict[str, Tensor]:
        return {"frame_end": _at_ends(resid, side)}


class Speak(nn.Module):
    """A Head: p(speak) at the end of every frame, "speak" [world, frame]; two rows read by softmax (MMDuet, section 3.2).

    weight  [2, d_model], trained; silence first
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, d_model))

    def forward(self, resid: Tensor, side: Side) -> dict[str, Tensor]:
        """Reads the final, normed stream [world, pos, d_model]."""
        scores = _at_ends(resid, side) @ self.weight.to(resid).T
        return {"speak": scores.softmax(-1)[..., 1]}

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors."""
        from safetensors.torch import save_file

        save_file({"weight": self.weight.detach().contiguous()}, str(path))

    @staticmethod
    def load(path: str | Path, d_model: int) -> Speak:
        """A head from a file. Raises ConfigError if it cannot be read, or was made for another width."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weight = load_file(str(path))["weight"]
        except (OSError, KeyError, SafetensorError) as e:
            raise ConfigError(f"speak: {path} holds no weights of a Speak head: {e}") from None
        if tuple(weight.shape) != (2, d_model):
            raise ConfigError(
                f"speak: {path} has shape {tuple(weight.shape)}, this model needs (2, {d_model})"
            )
        head = Speak(d_model)
        head.weight.data.copy_(weight)
        return head


def _at_ends(resid: Tensor, side: Side) -> Tensor:
    if not side.tokens:
        return resid[:, :0]
    ends = [frame_ends(t) for t in side.tokens]
    if len({len(e) for e in ends}) > 1:
        raise RunError(f"worlds of one batch must have as many frames each, got {[len(e) for e in ends]}")
    return torch.stack([resid[w, e.to(resid.device)] for w, e in enumerate(ends)])


# ---- deciding -------------------------------------------------------------------------------------------------------


def decided(logits: Float[Tensor, " d_vocab"], silent: int, theta: float) -> tuple[bool, float]:
    """(whether to speak, p(silence)): silence below `theta` is ruled out, then the most likely token decides."""
    p = logits.float().softmax(-1)
    p_silent = float(p[silent])
    if p_silent < theta:
        p = p.index_fill(0, torch.tensor([silent], device=p.device), 0.0)
    return int(p.argmax()) != silent, p_silent


def silence(logits: Float[Tensor, "frame d_vocab"], silent: int) -> Float[Tensor, " frame"]:
    """p(silence) where frames end."""
    return logits.float().softmax(-1)[:, silent]


def silent_id(model: Any, config: Streaming) -> int:
    """Id of the token that means silence. Raises UsageError if the tokenizer has no single one."""
    if config.interval is not None:
        return int(model.to_single_token(config.interval))
    return end_id(model)


def end_id(model: Any) -> int:
    """Id of the first end-of-text token. Raises UsageError if the checkpoint names none."""
    ends = _ends(model, None)
    if not len(ends):
        raise UsageError("this checkpoint names no end-of-text token; streams need one")
    return int(ends[0])


@dataclass(frozen=True)
class Reply:
    """What was said. ids without the end-of-text token; first: logits before the first one; capped: cut off by the limit."""

    text: str
    ids: tuple[int, ...]
    seconds: float
    query: str | None
    first: Float[Tensor, " d_vocab"] = field(repr=False)
    capped: bool = False


@dataclass(frozen=True)
class Moment:
    """What happened at one frame.

    p_silent   None where a question took the place of the decision, or where nothing could be read yet
    triggered  whether the model spoke of itself
    read_at    where the decision was read: "frame" (its last kept token), "interval" (all of the frame was dropped, text
               was fed), "previous" (nothing was fed: the last decision stands)
    kept, of   tokens of the frame that were read, and all
    rows       rows every layer's cache holds afterwards, where the cache can tell
    spent      seconds for "see", "read", "reply"
    """

    frame: int
    seconds: float
    p_silent: float | None
    triggered: bool
    read_at: Literal["frame", "interval", "previous"]
    kept: int
    of: int
    replies: tuple[Reply, ...] = ()
    rows: tuple[int, ...] = ()
    heads: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    spent: Mapping[str, float] = field(default_factory=dict, repr=False)

    @property
    def dropped(self) -> float:
        """Share of the frame's tokens that was dropped."""
        return 1 - self.kept / self.of


# ---- the loop -------------------------------------------------------------------------------------------------------


class Session:
    """One stream being watched. `see` a frame, `ask` a question, `run` both over a whole video.

    mechanisms  others to run with: detours, a cache, a token drop that can stream
    edges       cuts, as in `model(ready, edges=...)`; positions count all rows so far
    log         all moments; context: the rows, their token map, the cache
    """

    def __init__(
        self,
        model: Any,
        config: Streaming | None = None,
        *,
        mechanisms: Sequence[Any] = (),
        edges: Any = None,
    ) -> None:
        self.model, self.config = model, EXAMPLE if config is None else config
        own = plan_of([self.config], model.sizes)
        plan = Plan(heads=own.heads) + plan_of(mechanisms, model.sizes)
        if plan.layout is not None:
            raise RunError(f"{called(plan.layout)} lays out a whole prompt; a session has its own layout")
        if self.config.decide == "head" and not self.config.speak:
            raise UsageError("decide='head' needs the weights of a Speak head: speak='file.safetensors'")
        if self.config.decide == "scene" and not plan.stages:
            raise UsageError("decide='scene' looks at what a token drop drops; give one in mechanisms=")
        self.context = Context(model, plan, edges=edges)
        self.silent, self.end = silent_id(model, self.config), end_id(model)
        self.depth = temporal_patch(model.hf.config)
        self.reset()

    def reset(self) -> None:
        """Another stream begins."""
        self.context.reset()
        self.log: list[Moment] = []
        self.waiting: list[tuple[float, str | VideoQA]] = []
        self.open = False  # whether a bracket of frames is open
        self.pending: list[Rows] = []  # to be fed before what comes next

    def ask(self, question: str | VideoQA, at: float | None = None) -> None:
        """Put a question in the queue, for the time `at` in seconds (None: now). Answered when frames reach that time.

        Raises UsageError for what is no question or no time.
        """
        if not isinstance(question, str | VideoQA) or not (at is None or (isinstance(at, Real) and at == at)):
            raise UsageError(f"ask(text or VideoQA, seconds), got {question!r:.60} at {at!r}")
        now = self.log[-1].seconds if self.log else 0.0
        self.waiting.append((now if at is None else float(at), question))
        self.waiting.sort(key=lambda w: w[0])

    def see(self, picture: Any, seconds: float | None = None) -> Moment:
        """Watch one frame: `Frames`, or uint8 [height, width, 3] (models with tubelets: as many frames as one holds).

        Questions of an earlier time are answered before the frame, those of its own time after it, in place of the
        decision. Returns what happened.
        """
        frames = self._frames(picture, seconds)
        at = float(frames.seconds[-1])
        clock = _Clock()
        replies = [self._answer(q, t) for t, q in self._due(lambda t: t < at)]
        clock.lap("reply")
        rows = self.context.frame(frames)
        clock.lap("see")
        before = self._before_frame()
        read = self.context.append(*before, rows)
        clock.lap("read")
        moment = self._moment(rows, before, read, at)
        asked = self._due(lambda t: t <= at)
        if asked:
            moment = replace(moment, p_silent=None, triggered=False)
            replies += [self._answer(q, t) for t, q in asked]
        elif moment.triggered:
            replies.append(self._speak(at))
        else:
            self.pending = self._after_silence()
        clock.lap("reply")
        moment = replace(moment, replies=tuple(replies), rows=self.rows, spent=clock.laps)
        self.log.append(moment)
        return moment

    def run(
        self, video: Any, questions: Sequence[tuple[float, str | VideoQA]] = (), **sampling: Any
    ) -> list[Moment]:
        """Watch a whole video (anything `lab.video.read` takes, or Frames), with questions as (seconds, text)."""
        frames = video if isinstance(video, Frames) and not sampling else read_video(video, **sampling)
        for at, question in questions:
            self.ask(question, at)
        for i in range(0, len(frames), self.depth):
            self.see(_slice(frames, i, i + self.depth))
        return self.log

    def flush(self) -> list[Reply]:
        """Answer the questions that still wait."""
        return [self._answer(q, t) for t, q in self._due(lambda t: True)]

    # ---- one frame -----------------------------------------------------------------------------------------------------

    def _frames(self, picture: Any, seconds: float | None) -> Frames:
        n = self.context.n_frames
        frames = picture if isinstance(picture, Frames) else _as_frames(picture)
        if len(frames) > self.depth or not len(frames):
            raise UsageError(
                f"see() takes the {self.depth} frames of one step, got {len(frames)}; use run() for a video"
            )
        times = frames.seconds if seconds is None else torch.full((len(frames),), float(seconds))
        if bool(times.isnan().any()):
            times = (n * self.depth + torch.arange(len(frames))) / self.config.fps
        if self.log and float(times[-1]) < self.log[-1].seconds:
            raise UsageError(
                f"a frame at {float(times[-1]):g} s after one at {self.log[-1].seconds:g} s; frames come in order"
            )
        return replace(frames, seconds=times)

    def _before_frame(self) -> list[Rows]:
        """Text to be fed before a frame: what is pending, and the bracket, if it is not open."""
        rows = list(self.pending)
        if not self.open:
            spans = self.config.start() if not self.context.n else [Span("separator", self.config.open)]
            rows.append(self.context.text([s for s in spans if s.text]))
        self.pending, self.open = [], True
        return rows

    def _moment(self, rows: Rows, before: list[Rows], read: Read | None, at: float) -> Moment:
        """What was decided at a frame, replies and costs left out. Where nothing was read, the last decision stands."""
        where = "frame" if len(rows) else "interval" if before else "previous"
        held = self.log[-1] if self.log else None
        found = Moment(self.context.n_frames - 1, at, None, False, where, len(rows), rows.whole)
        speaks, p = bool(held and held.triggered), held and held.p_silent
        if read is not None:
            speaks, p = decided(read.logits, self.silent, self.config.theta)
        match self.config.decide:
            case "never":
                speaks = False
            case "scene":
                speaks = found.frame > 0 and found.dropped < self.config.theta
            case "head" if read is not None:
                score = read.heads["speak"][0]
                speaks = bool(len(score)) and float(score[-1]) > self.config.theta
            case _:
                pass
        return replace(found, p_silent=p, triggered=speaks, heads={} if read is None else read.heads)

    def _after_silence(self) -> list[Rows]:
        """The released code feeds the interval token it predicted; end-of-text is never fed as silence."""
        fed = self.config.compat == "released" and self.config.interval is not None
        return [self.context.ids([self.silent], "separator")] if fed else []

    # ---- replies -------------------------------------------------------------------------------------------------------

    def _due(self, when: Callable[[float], bool]) -> list[tuple[float, str | VideoQA]]:
        """Questions whose time has come, in order; they leave the queue."""
        due = [w for w in self.waiting if when(w[0])]
        self.waiting = [w for w in self.waiting if not when(w[0])]
        return due

    def _speak(self, at: float) -> Reply:
        """A reply that nobody asked for."""
        before = self.context.snapshot() if self.config.forget_replies else None
        spans = [Span("separator", self.config.close), Span("template", self.config.assistant)]
        reply = self._decode([self.context.text(spans)], at, None)
        if before is not None:
            self.context.restore(before)
            self.open, self.pending = True, self._after_silence()
        return reply

    def _answer(self, question: str | VideoQA, at: float) -> Reply:
        """The reply to a question; of the two, only the question stays if replies are forgotten."""
        text = question.question if isinstance(question, VideoQA) else question
        released, rows = self.config.compat == "released", list[Rows]()
        if not self.context.n and not released:
            spans = [s for s in self.config.start()[:-1] if s.text]
            rows += [self.context.text(spans)] if spans else []
        elif self.pending and not self.open and not released:
            rows += self.pending
        opened = self.open or released
        spans = [s for s in self.config.asking(question, opened=opened) if s.text]
        self.pending = []
        return self._decode([*rows, self.context.text(spans)], at, text)

    def _decode(self, rows: Sequence[Rows], at: float, query: str | None) -> Reply:
        """Greedy decoding until end of text or the limit. The last token is fed with what comes next."""
        asked = self.context.append(*rows)
        assert asked is not None
        after_question = self.context.snapshot() if query is not None and self.config.forget_replies else None
        logits, ids, capped = asked.logits, list[int](), True
        ends = set(_ends(self.model, None).tolist())
        while len(ids) < self.config.max_new_tokens:
            new = int(logits.argmax())
            if new in ends:
                capped = False
                break
            ids.append(new)
            if len(ids) < self.config.max_new_tokens:
                read = self.context.append(self.context.ids([new]))
                assert read is not None
                logits = read.logits
        self._closed(ids, capped)
        if after_question is not None:
            self.context.restore(after_question)
            self.open, self.pending = False, [self.context.ids([self.end])]
        text = self.model.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Reply(text, tuple(ids), at, query, asked.logits, capped)

    def _closed(self, ids: Sequence[int], capped: bool) -> None:
        """What a reply leaves to be fed: its end-of-text token; of a capped one its last token, and after it (but for the
        released code, which goes on with frames as if nothing were) the end-of-text token."""
        glued = capped and self.config.compat == "released"
        fed = [*(ids[-1:] if capped else []), *([] if glued else [self.end])]
        self.open, self.pending = glued, [self.context.ids(fed)]

    # ---- looking back ----------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows that every layer's cache holds, where the cache can tell."""
        lengths = getattr(self.context.cache.store, "lengths", None)
        return tuple(lengths()) if lengths is not None else ()

    @property
    def replies(self) -> list[Reply]:
        """Everything that was said, in order."""
        return [r for m in self.log for r in m.replies]

    def result(self) -> Result:
        """p(silence) at every frame (nan where a question was answered instead); triggers and replies in the notes."""
        notes = {
            "seconds": [m.seconds for m in self.log], "triggered": [m.frame for m in self.log if m.triggered],
            "replies": [{"seconds": r.seconds, "query": r.query or "", "text": r.text} for r in self.replies],
            "kept": [m.kept for m in self.log], "of": [m.of for m in self.log], "read_at": [m.read_at for m in self.log],
            "theta": self.config.theta,
        }  # fmt: skip
        values = [float("nan") if m.p_silent is None else m.p_silent for m in self.log]
        return Result(
            torch.tensor(values).double().numpy(), ("frame",), {"frame": list(range(len(values)))}, "probability of silence",
            {}, name="stream", notes=notes,
        )  # fmt: skip

    def snapshot(self) -> dict[str, Any]:
        """What `restore` takes: the context, and where the loop stands."""
        loop = {
            "log": list(self.log),
            "waiting": list(self.waiting),
            "open": self.open,
            "pending": list(self.pending),
        }
        return {"context": self.context.snapshot(), **loop}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a `snapshot`."""
        self.context.restore(state["context"])
        self.log, self.waiting = list(state["log"]), list(state["waiting"])
        self.open, self.pending = state["open"], list(state["pending"])


class _Clock:
    """Seconds between laps, added up by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now


def _as_frames(picture: Any) -> Frames:
    try:
        pixels = torch.as_tensor(picture)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"see() takes Frames or a picture, uint8 [height, width, 3]; got {type(picture).__name__}"
        ) from None
    return read_video(
        pixels[None] if pixels.ndim == 3 else pixels, index=range(1 if pixels.ndim == 3 else len(pixels))
    )


def _slice(frames: Frames, start: int, stop: int) -> Frames:
    return replace(
        frames,
        pixels=frames.pixels[start:stop],
        seconds=frames.seconds[start:stop],
        index=frames.index[start:stop],
    )


NEUTRAL = Streaming.NEUTRAL = Streaming(layout="prompt")
EXAMPLE = Streaming.EXAMPLE = Streaming()
