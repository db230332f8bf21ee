"""One chat turn as spans: from a family's published pieces, or from the tokenizer's own chat template.

A template is rendered with private-use characters where our own texts go, and cut at those. What the user wrote is put
in afterwards, so nothing is ever searched for in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab.errors import PromptError
from lab.spans import Span

VIDEO, USER, SYSTEM = "\ue0f0", "\ue0f1", "\ue0f2"  # Unicode private use: no text has them but by intent
_NAMES = {VIDEO: "video", USER: "user text", SYSTEM: "system prompt"}


@dataclass(frozen=True)
class ChatMarks:
    """A published chat template, taken apart.

    bos             written before everything, where the tokenizer would add it
    default_system  system prompt the template writes when none is given
    system          texts before and after a system prompt
    user_open, after_video, user_close   round the video and the user's text
    video           texts a template may write for a video, longest first; our own video spans replace them whole
    """

    bos: str = ""
    default_system: str = ""
    system: tuple[str, str] = ("", "\n")
    user_open: str = ""
    after_video: str = "\n"
    user_close: str = "\n"
    video: tuple[str, ...] = (
        "<|vision_start|><|video_pad|><|vision_end|>",
        "<|video_pad|>",
        "<video>",
        "<image>",
    )

    def turn(
        self, video: Sequence[Span], user: Sequence[Span], answer: Sequence[Span], system: str | None = None
    ) -> list[Span]:
        """The turn. `system` None: the default system prompt; "": none."""
        words = self.default_system if system is None else system
        refuse_sentinels([*user, *answer], words)
        before, after = self.system if words else ("", "")
        spans = [Span("bos", self.bos), Span("template", before), Span("system", words)]
        spans += [Span("template", after), Span("template", self.user_open), *video]
        spans += [
            Span("connector", self.after_video if video else ""),
            *user,
            Span("template", self.user_close),
        ]
        return [s for s in [*spans, *_answer(self.user_close, answer)] if s.text or s.rows is not None]


def chatml(*, video: tuple[str, ...], default_system: str = "", after_video: str = "\n") -> ChatMarks:
    """ChatML as Qwen writes it: <|im_start|>role, newline, text, <|im_end|>, newline."""
    return ChatMarks(
        default_system=default_system,
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user_open="<|im_start|>user\n",
        after_video=after_video,
        user_close="<|im_end|>\n<|im_start|>assistant\n",
        video=video,
    )


def spans_from_template(
    chat: ChatMarks,
    tokenizer: Any,
    video: Sequence[Span],
    user: Sequence[Span],
    answer: Sequence[Span],
    system: str | None = None,
) -> list[Span]:
    """The turn as `tokenizer.chat_template` writes it, with our spans in it.

    What the template itself writes for a video (marks included) is replaced by `video`, which brings its own marks.
    Raises PromptError if the template loses or repeats the video, the user's text or the system prompt.
    """
    refuse_sentinels([*user, *answer], system or "")
    text = _with_video_sentinel(chat, tokenizer, bool(video), bool(system))
    for mark in [USER, *([VIDEO] if video else []), *([SYSTEM] if system else [])]:
        if text.count(mark) != 1:
            raise PromptError(
                f"the chat template writes the {_NAMES[mark]} {text.count(mark)} times, not once; "
                "give the tokenizer another chat_template, or None to use the family's own"
            )
    ours = {VIDEO: list(video), USER: list(user), SYSTEM: [Span("system", system or "")]}
    spans = _bos(tokenizer, text)
    for piece in _cut(text[len(spans[0].text) if spans and text.startswith(spans[0].text) else 0 :]):
        spans += ours[piece] if piece in ours else _template(piece, spans, chat)
    tail = text.rpartition(USER)[2]
    return [
        s for s in [*_between(spans, video, user), *_answer(tail, answer)] if s.text or s.rows is not None
    ]


def refuse_sentinels(spans: Sequence[Span], system: str) -> None:
    """PromptError if a text holds one of the characters that mark our insertions."""
    for text in (*(s.text for s in spans), system):
        for mark in _NAMES:
            if mark in text:
                raise PromptError(f"the text {text!r} holds the private-use character {mark!r}; remove it")


def _with_video_sentinel(chat: ChatMarks, tokenizer: Any, with_video: bool, with_system: bool) -> str:
    """The rendered template, first with typed content parts, then (for templates that know only text) with plain text."""
    problems = []
    parts = [{"type": "video"}] * with_video + [{"type": "text", "text": USER}]
    plain = (VIDEO + chat.after_video) * with_video + USER
    for content, system in ((parts, [{"type": "text", "text": SYSTEM}]), (plain, SYSTEM)):
        messages = [{"role": "system", "content": system}] * with_system + [
            {"role": "user", "content": content}
        ]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like: jinja errors, TypeError, KeyError
            problems.append(f"{type(error).__name__}: {error}")
            continue
        text = next((text.replace(m, VIDEO) for m in chat.video if m in text), text)
        if text.count(USER) == 1 and text.count(VIDEO) >= with_video:
            return text
        problems.append(f"{text.count(USER)} user texts and {text.count(VIDEO)} videos in the result")
    raise PromptError(
        f"the chat template cannot write a user turn: with content parts: {problems[0]}; with plain text: {problems[1]}"
    )


def _cut(text: str) -> list[str]:
    """`text` cut at the sentinels, which stay as pieces of their own."""
    for mark in _NAMES:
        text = text.replace(mark, f"\0{mark}\0")
    return [piece for piece in text.split("\0") if piece]


def _bos(tokenizer: Any, text: str) -> list[Span]:
    """The bos span: as the template writes it, or as the tokenizer would add it (processors let it)."""
    bos = getattr(tokenizer, "bos_token", None)
    if not bos:
        return []
    adds = list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return [Span("bos", bos)] if text.startswith(bos) or adds else []


def _template(piece: str, before: Sequence[Span], chat: ChatMarks) -> list[Span]:
    """A piece of the template; the default system prompt in its head gets its own role."""
    at_head = not any(s.role not in ("bos", "template") for s in before)
    if not chat.default_system or not at_head or piece.count(chat.default_system) != 1:
        return [Span("template", piece)]
    head, tail = piece.split(chat.default_system)
    return [Span("template", head), Span("system", chat.default_system), Span("template", tail)]


def _between(spans: list[Span], video: Sequence[Span], user: Sequence[Span]) -> list[Span]:
    """Template text between the video and the user's text is the connector."""
    if not video or not user:
        return spans
    at = {id(s): i for i, s in enumerate(spans)}
    ends = sorted(at[id(s)] for s in (video[0], video[-1], user[0], user[-1]))
    return [Span("connector", s.text) if ends[1] < i < ends[2] else s for i, s in enumerate(spans)]


def _answer(tail: str, answer: Sequence[Span]) -> list[Span]:
    """The answer's beginning, parted by a space from a generation prompt that ends in a word ("ASSISTANT:")."""
    if not answer:
        return []
    return [Span("template", " " if tail and not tail[-1].isspace() else ""), *answer]
