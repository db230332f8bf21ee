"""Templates: which tokens of a prompt rendered elsewhere are the question, the options, the instruction.

A template is the prompt's own text with named slots, from any literal text on:

    "Question: {question}\\nOptions:\\n{options}Only give the best option.{template}"

It must match the prompt in one place, and in one only; case and white space do not count. What a slot holds has the
slot's role, `{instruction:Only give the best option.}` gives a role to literal text, and the literal text between is
template. Options are told apart by their letters, else by lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import Formatter
from typing import Any

from lab.errors import PromptError

SLOTS = ("system", "connector", "question", "options", "instruction", "template", "text")
RoleMap = dict[str, list[tuple[int, int]]]
_LETTER = r"(?<!\w)\(?\s*{}\s*[).:]"  # (A)  A)  A.  A:
_LINE = re.compile(r"[^\n]*\n?")


def places(template: str, tokenizer: Any, ids: Sequence[int], hidden: Sequence[bool]) -> RoleMap:
    """Role -> (start, stop) token places of one prompt without padding, as `roles=` takes them.

    hidden  True for video tokens: they are no text, and nothing is matched across them
    Raises PromptError for a template without slots or with unknown ones, for no match, and for several.
    """
    shown = [i for i, no in enumerate(hidden) if not no]
    text, starts = _text(tokenizer, [ids[i] for i in shown])
    found = _match(template, text)
    out: RoleMap = {}
    for role, start, stop in _pieces(found):
        for a, b in _runs([i for i, at in zip(shown, starts, strict=True) if start <= at < stop]):
            out.setdefault(role, []).append((a, b))
    return out


def _text(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of the tokens and where each begins in it, white space before it left out."""
    starts, text = [], ""
    for i in range(len(ids)):
        before, text = text, tokenizer.decode(list(ids[: i + 1]), skip_special_tokens=False)
        new = text[len(before) :]
        starts.append(len(before) + len(new) - len(new.lstrip() or new))
    return text, starts


def _match(template: str, text: str) -> re.Match[str]:
    found = list(re.finditer(f"(?=({_pattern(template)}))", text, re.S | re.I))
    if len(found) != 1:
        shown = " ".join(text.split())
        raise PromptError(
            f"the template matches the prompt in {len(found)} places, it must in 1; the prompt reads {shown[:200]!r}; "
            + (
                "write more of the text round the slots"
                if found
                else "write its text as it is, with {question} and {options}"
            )
        )
    return found[0]


def _pattern(template: str) -> str:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as e:
        raise PromptError(f"template: {e}; slots are {', '.join('{' + s + '}' for s in SLOTS)}") from None
    slots = [name for _, name, _, _ in parts if name is not None]
    for name in slots:
        if name not in SLOTS or slots.count(name) > 1:
            why = "stands twice" if name in SLOTS else "is no slot"
            raise PromptError(f"template: {{{name}}} {why}; slots are {', '.join(SLOTS)}, each at most once")
    if not slots or not template[: template.index("{")].strip():
        raise PromptError(
            "a template begins with text and has slots, such as 'Question: {question} Options: {options}'"
        )
    out = ""
    for i, (literal, name, said, _) in enumerate(parts):
        out += f"(?P<literal{i}>{_literal(literal)})" if literal else ""
        if name is not None:
            touches = bool(i and not literal)  # a slot that follows a slot has to say where it begins
            out += f"(?P<{name}>{_slot(name, said or '', touches, i == len(parts) - 1)})"
    return out.replace(r"\s*", "", 1)  # a match begins at its first mark, not at the white space before it


def _slot(name: str, said: str, touches: bool, last: bool) -> str:
    """What a slot matches: its literal text, options from the first letter on, anything; the last to the prompt's end."""
    if said:
        return _literal(said)
    return (_LETTER.format("A") if name == "options" and touches else "") + (".+" if last else ".+?")


def _literal(text: str) -> str:
    """Any white space between words and round marks, or none: tokenizers differ in what they give back."""
    return r"\s*" + r"\s*".join(re.escape(p) for p in re.findall(r"\w+|[^\w\s]", text)) + r"\s*"


def _pieces(found: re.Match[str]) -> list[tuple[str, int, int]]:
    """(role, start, stop) in the text: options one by one, literal text as template."""
    out: list[tuple[str, int, int]] = []
    for name in found.groupdict():
        start, stop = found.span(name)
        if name == "options":
            out += [("option", start + a, start + b) for a, b in _options(found.group(name))]
        else:
            out.append(("template" if name.startswith("literal") else name, start, stop))
    return [p for p in out if p[1] < p[2]]


def _options(text: str) -> list[tuple[int, int]]:
    """Where each option stands: from its letter to the next letter's; without letters, by lines."""
    starts: list[int] = []
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        at = re.compile(_LETTER.format(letter), re.I).search(text, starts[-1] + 1 if starts else 0)
        if at is None:
            break
        starts.append(at.start())
    if not starts:
        return [m.span() for m in _LINE.finditer(text) if m.group().strip()]
    starts[0] = 0  # white space before the first letter is its own
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """Unbroken runs of places as (start, stop)."""
    out: list[tuple[int, int]] = []
    for p in places:
        if out and out[-1][1] == p:
            out[-1] = (out[-1][0], p + 1)
        else:
            out.append((p, p + 1))
    return out
