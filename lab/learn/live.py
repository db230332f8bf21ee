"""What LIVE is trained on and scored by (VideoLLM-online, arXiv 2406.11816): targets, loss, and the streaming scores.

1 a conversation is stretches of frames, and what user and assistant say; `Scripted` lays it out in a run   2 the last
token of every frame is to predict silence, of the last frame before a reply the closing bracket; the assistant's turns,
to the end-of-text token, are learned as usual; nothing else is   3 both are one cross-entropy, frames weighed by `w`,
divided by the number of targets   4 scores: perplexity and correctness of what is said, and by how many frames it comes
too early or too late (`Turn`)

    out = model.run(ready, read="all", mechanisms=[Scripted(script, config, end)])
    loss = live_loss(out.logits[0], targets(out.maps[0], script, silent_id(model, config)))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lab.carriers import Frames, TokenMap, VideoQA, VisionTokens
from lab.errors import UsageError
from lab.mechanisms.streaming import FramesOnly, Streaming, decided, end_id, frame_ends, silent_id
from lab.slots import ModelSizes, Plan
from lab.spans import ROLES, Span

IGNORED = -100
SAID, LAST = ROLES.index("generated"), ROLES.index("last")


@dataclass(frozen=True)
class Watch:
    """So many frames in silence. learn: how many of them, from the first, are supervised; None: all."""

    frames: int
    learn: int | None = None


@dataclass(frozen=True)
class Say:
    """What somebody says."""

    who: Literal["user", "assistant"]
    text: str


Script = Sequence[Watch | Say]


@dataclass(frozen=True)
class Scripted:
    """A mechanism that lays a conversation out as the stream it is, with the texts of `config`.

    end  the end-of-text token's text (`end_text(model)`)
    """

    script: tuple[Watch | Say, ...]
    config: Streaming
    end: str

    def plan(self, cfg: ModelSizes) -> Plan:
        """A layout for the frames' tokens."""
        return Plan(stages=(FramesOnly(),), layout=self)

    def __call__(self, item: VideoQA, frames: Frames, vision: VisionTokens) -> list[Span]:
        """The Layout. What the assistant says has the role "generated". Raises UsageError if frames are left over."""
        n = sum(part.frames for part in self.script if isinstance(part, Watch))
        if n != len(frames):
            raise UsageError(
                f"the conversation watches {n} frames, the video has {len(frames)}; they must be the same"
            )
        fed = (self.config.interval or "") if self.config.compat == "released" else ""
        spans, frame, opened = self.config.start()[:-1], 0, False
        for part in self.script:
            if isinstance(part, Watch):
                for f in range(frame, frame + part.frames):
                    spans += [Span("separator", fed if opened else self.config.open), *_frame(vision, f)]
                    opened = True
                frame += part.frames
                continue
            spans.append(Span("separator", self.config.close if opened else ""))
            opened = False
            if part.who == "user":
                spans += [Span("template", self.config.user), Span("question", part.text)]
            else:
                spans.append(Span("generated", f"{self.config.assistant} {part.text}{self.end}"))
        return [s for s in spans if s.text or s.rows]


def _frame(vision: VisionTokens, frame: int) -> list[Span]:
    at = (vision.grid.frame == frame).nonzero().squeeze(1)
    return [Span("frame", kind="video", rows=(int(at[0]), int(at[-1]) + 1), frame=frame)] if len(at) else []


def end_text(model: Any) -> str:
    """The end-of-text token as text."""
    return str(model.need_tokenizer().decode([end_id(model)]))


# ---- targets and loss -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """What every position is to predict.

    labels    [pos] ids, already shifted; IGNORED: nothing
    at_frame  [pos] the position is the supervised end of a frame
    turn      [pos] how many replies were finished before
    """

    labels: Int[Tensor, " pos"]
    at_frame: Bool[Tensor, " pos"]
    turn: Int[Tensor, " pos"]


def targets(tokens: TokenMap, script: Script, silent: int) -> Targets:
    """The targets of a conversation that `Scripted` laid out; `silent`: the id that means silence.

    Of a stretch that no reply follows, the last frame has none: nobody knows what was to be said. A frame that a token
    drop left nothing of has none either.
    """
    said = tokens.role == SAID
    if len(tokens) > 1 and int(tokens.role[-1]) == LAST:
        said[-1] = said[-2]  # the conversation ends with a reply; `last` stands on its end-of-text token
    following = torch.cat([tokens.ids[1:], tokens.ids.new_tensor([IGNORED])])
    before = said.new_zeros(1)
    labels = torch.where(torch.cat([said[1:], before]), following, IGNORED)
    turn = torch.cat([before, said[:-1] & ~said[1:]]).long().cumsum(0)
    at_frame = torch.zeros_like(said)
    at = frame_ends(tokens)
    ends = dict(zip(tokens.frame[at].tolist(), at.tolist(), strict=True))
    for f, speaks in _supervised(script):
        if f in ends:
            at_frame[ends[f]] = True
            labels[ends[f]] = following[ends[f]] if speaks else silent
    return Targets(labels, at_frame, turn)


def _supervised(script: Script) -> list[tuple[int, bool]]:
    """(frame, whether a reply follows at once) of every supervised frame."""
    out, frame = list[tuple[int, bool]](), 0
    for part, after in zip(script, [*script[1:], None], strict=True):
        if not isinstance(part, Watch):
            continue
        replies = isinstance(after, Say) and after.who == "assistant"
        learn = min(
            part.frames if replies else part.frames - 1, part.frames if part.learn is None else part.learn
        )
        out += [(frame + i, replies and i == part.frames - 1) for i in range(learn)]
        frame += part.frames
    return out


def live_loss(logits: Float[Tensor, "pos d_vocab"], wanted: Targets, *, w: float = 1.0) -> Tensor:
    """Cross-entropy over all targets, those at frames times `w`, divided by their number (not by the sum of weights).

    Raises UsageError if there is no target.
    """
    n = int((wanted.labels != IGNORED).sum())
    if not n:
        raise UsageError("this conversation has no target: no reply, and no frame that is supervised")
    labels = wanted.labels.to(logits.device)
    each = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none")
    return (each * torch.where(wanted.at_frame.to(logits.device), w, 1.0)).sum() / n


# ---- scores ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """How one reply went, teacher-forced.

    n_frames, n_words   supervised frames before it, and its tokens
    right               its tokens before the first one that is wrong
    frame_diff          frames by which the model spoke too early (above 0) or too late (below 0)
    nll                 mean negative log likelihood of its tokens, nats
    """

    n_frames: int
    n_words: int
    right: int
    frame_diff: int
    nll: float

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)

    @property
    def correctness(self) -> float:
        """Share of the reply before its first wrong token."""
        return self.right / self.n_words

    @property
    def fluency(self) -> float:
        """Share of the turn, frames and words, that went well: too early or too late, no word counts.

        (As released: a turn that is never begun, and is the last, counts as begun in time.)
        """
        good = self.n_frames + self.right
        if self.frame_diff > 0:
            good = self.n_frames - self.frame_diff
        elif self.frame_diff < 0:
            good = self.n_frames - 1
        return good / (self.n_frames + self.n_words)


def turn_of(speaks: Sequence[bool], words: Sequence[bool], nll: float, ahead: Sequence[bool] | None) -> Turn:
    """The scores of one reply.

    speaks  at each supervised frame before it, whether the model would have spoken
    words   at each of its tokens, whether the most likely token is the right one
    ahead   if it never would have: the same at the frames that follow, were the reply left out; None: the last turn
    """
    first = next((i for i, s in enumerate(speaks) if s), None)
    late = next((i for i, s in enumerate(ahead or ()) if s), None)
    if first is not None:
        diff = len(speaks) - first - 1
    else:
        diff = -(late + 1) if late is not None else -len(ahead or ())
    return Turn(len(speaks), len(words), len(list(takewhile(bool, words))), diff, nll)


def time_diff(turns: Sequence[Turn], fps: float) -> float:
    """Mean absolute frame_diff in seconds."""
    return sum(abs(t.frame_diff) for t in turns) / len(turns) / fps if turns else 0.0


@torch.no_grad()
def evaluate(
    model: Any, item: VideoQA, script: Script, config: Streaming, *, mechanisms: Sequence[Any] = ()
) -> list[Turn]:
    """Scores of every reply of a conversation about the item's video (all its frames), history taken as it should be."""
    logits, wanted = _read(model, item, script, config, mechanisms)
    silent = silent_id(model, config)
    turns: list[Turn] = []
    replies = [i for i, part in enumerate(script) if isinstance(part, Say) and part.who == "assistant"]
    for n, at in enumerate(replies):
        mine = wanted.turn == n
        frames = logits[mine & wanted.at_frame]
        said = mine & ~wanted.at_frame & (wanted.labels != IGNORED)
        speaks = [decided(row, silent, config.theta)[0] for row in frames]
        logp = logits[said].float().log_softmax(-1)
        want = wanted.labels[said].to(logits.device)
        nll = float(-logp.gather(1, want[:, None]).mean())
        ahead = None if any(speaks) else _ahead(model, item, script, at, config, mechanisms)
        turns.append(turn_of(speaks, (logp.argmax(-1) == want).tolist(), nll, ahead))
    return turns


def _read(
    model: Any, item: VideoQA, script: Script, config: Streaming, mechanisms: Sequence[Any]
) -> tuple[Tensor, Targets]:
    """Logits [pos, d_vocab] and targets of a script over the video's first frames."""
    n = sum(part.frames for part in script if isinstance(part, Watch))
    ready = model.prepare(item, index=range(n))
    mech = Scripted(tuple(script), config, end_text(model))
    out = model.run(ready, read="all", mechanisms=[mech, *mechanisms])
    return out.logits[0], targets(out.maps[0], script, silent_id(model, config))


def _ahead(
    model: Any, item: VideoQA, script: Script, at: int, config: Streaming, mechanisms: Sequence[Any]
) -> list[bool] | None:
    """Whether the model speaks at the frames after a reply, were it left out: at most as many as its own stretch has,
    less one, and as the next stretch has. None after the last stretch."""
    own = script[at - 1] if at else None
    following = next((part for part in script[at + 1 :] if isinstance(part, Watch)), None)
    if not isinstance(own, Watch) or following is None:
        return None
    more = min(following.frames, own.frames - 1)
    if more < 1:
        return []
    longer = [*script[: at - 1], replace(own, frames=own.frames + more, learn=None), Say("assistant", "")]
    logits, wanted = _read(model, item, longer, config, mechanisms)
    ends = wanted.at_frame.nonzero().squeeze(1)[-more:]
    silent = silent_id(model, config)
    return [decided(logits[int(i)], silent, config.theta)[0] for i in ends]
