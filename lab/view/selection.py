"""Selection: what is chosen, shared by all views on one screen. Torch-free; knows no model and draws nothing.

chosen = Selection(layer=5, patch=(1, 2), frame=3)
chosen.observe(redraw, "layer")          # a view follows
Selection.from_text(chosen.text)         # "frame=3&patch=1,2&layer=5": fits into a link
Selection.from_yaml(chosen.yaml)
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import quote, unquote

from traitlets import HasTraits, Int, TraitError, Tuple, Unicode

from lab.errors import ConfigError
from lab.yamlfile import as_yaml, parse_yaml

ARROW = "->"


class Selection(HasTraits):
    """One choice of each kind; None where nothing is chosen. Setting a wrong type or range raises TraitError.

    frame    frame (tubelet) number, 0-based
    patch    (row, column) in the frame's grid of tokens, 0-based
    token    position in the prompt, 0-based
    layer    1-based, as in plots and files
    head     0-based
    pair     (query segment, key segment): who reads, what is read
    run      name of a pinned run
    """

    frame = Int(None, allow_none=True, min=0)
    patch = Tuple(Int(min=0), Int(min=0), default_value=None, allow_none=True)
    token = Int(None, allow_none=True, min=0)
    layer = Int(None, allow_none=True, min=1)
    head = Int(None, allow_none=True, min=0)
    pair = Tuple(Unicode(), Unicode(), default_value=None, allow_none=True)
    run = Unicode(None, allow_none=True)

    def set(self, **choices: Any) -> None:
        """Choose several things at once: observers hear of all of them after the last is set.

        Raises ConfigError for names or values that a selection cannot have; then nothing has changed.
        """
        checked = _checked(choices)
        with self.hold_trait_notifications():
            for name, value in checked.items():
                setattr(self, name, value)

    def clear(self) -> None:
        """Choose nothing."""
        self.set(**dict.fromkeys(NAMES))

    # ---- plain data, YAML, short text -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What is chosen, as plain data; what is None is left out."""
        given = {name: getattr(self, name) for name in NAMES}
        return {n: list(v) if isinstance(v, tuple) else v for n, v in given.items() if v is not None}

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Raises ConfigError for anything `to_dict` cannot have given, naming the field."""
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"selection: must be a mapping of {', '.join(NAMES)}, got {type(data).__name__}"
            )
        out = cls()
        out.set(**{str(k): v for k, v in data.items()})
        return out

    @property
    def yaml(self) -> str:
        """The selection as YAML."""
        return as_yaml(self.to_dict())

    @classmethod
    def from_yaml(cls, text: str) -> Self:
        """The inverse of `yaml`. Raises ConfigError."""
        return cls.from_dict(parse_yaml(text, "selection") or {})

    @property
    def text(self) -> str:
        """A short text, safe inside a link: "frame=3&patch=1,2&pair=frame:3->last" (keys -> queries)."""
        return "&".join(f"{n}={_word(n, v)}" for n, v in self.to_dict().items())

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The inverse of `text`. Raises ConfigError, naming the part that cannot be read."""
        found: dict[str, Any] = {}
        for part in filter(None, text.split("&")):
            name, equals, word = part.partition("=")
            if not equals or name in found:
                raise ConfigError(
                    f"selection: {part!r} is not name=value, or stands twice; e.g. frame=3&layer=5"
                )
            found[name] = _read(name, word)
        return cls.from_dict(found)

    def __repr__(self) -> str:
        return f"<Selection {self.text or 'of nothing'}>"


NAMES = ("frame", "patch", "token", "layer", "head", "pair", "run")


def _checked(choices: Mapping[str, Any]) -> dict[str, Any]:
    """The choices with lists as tuples, tried on a selection nobody watches."""
    trial, out = Selection(), {}
    for name, value in choices.items():
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=2)
            raise ConfigError(
                f"selection: no field {name!r}; closest: {', '.join(near) or 'none'}; there are {', '.join(NAMES)}"
            )
        out[name] = tuple(value) if isinstance(value, list) else value
        if isinstance(value, bool):  # traitlets takes True for 1
            raise ConfigError(f"selection.{name}: a number or a name is needed, got {value}")
        try:
            setattr(trial, name, out[name])
        except TraitError as e:
            raise ConfigError(f"selection.{name}: {' '.join(str(e).split())}") from None
    return out


def _word(name: str, value: Any) -> str:
    if name == "pair":
        query, key = value
        return f"{_quoted(key)}{ARROW}{_quoted(query)}"
    if name == "patch":
        return ",".join(str(n) for n in value)
    return _quoted(str(value))


def _quoted(text: str) -> str:
    return quote(text, safe=":,*").replace("-", "%2D")  # so that an arrow only stands between two names


def _read(name: str, word: str) -> Any:
    if name == "pair":
        key, arrow, query = word.partition(ARROW)
        if not arrow:
            raise ConfigError(
                f"selection.pair: {word!r} has no arrow; write keys->queries, e.g. frame:3->last"
            )
        return unquote(query), unquote(key)
    if name == "run":
        return unquote(word)
    numbers = [_whole(name, w) for w in word.split(",")] if word else []
    return numbers if name == "patch" or len(numbers) != 1 else numbers[0]


def _whole(name: str, word: str) -> int:
    if not word.isdecimal() or len(word) > 9:
        raise ConfigError(f"selection.{name}: {word[:40]!r} is not a whole number")
    return int(word)
