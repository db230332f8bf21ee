"""Cut: one set of edges, and the rule for generated rows. Fields of a policy file, each checked as it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from lab.edges.predicates import parse_where
from lab.edges.ranges import MOST, layer_text, named, parse_layers
from lab.edges.segments import names
from lab.errors import ConfigError
from lab.recipe import Part

Text = Annotated[str, Field(min_length=1, max_length=300)]
Head = Annotated[int, Field(ge=0, le=MOST)]


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Cut(Part):
    """One set of edges: from queries `q` to keys `k`, in some layers and heads, where a predicate holds.

    layers  "all" or 1-based ranges ("1-5,16-20"); heads: "all" or 0-based numbers
    q, k    segments (see `lab.edges.segments`); k is what is read, q who reads it
    where   see `lab.edges.predicates`; None: every edge of the pair
    gate    None cuts the edges; a number is added to their scores instead (a soft cut)
    """

    layers: Annotated[Text, BeforeValidator(_as_text)] = "all"
    heads: Literal["all"] | tuple[Head, ...] = "all"
    q: Text = "*"
    k: Text = "*"
    where: Text | None = None
    gate: Annotated[float, Field(strict=True)] | None = None
    reason: str | None = None

    @field_validator("layers")
    @classmethod
    def _layers_read(cls, text: str) -> str:
        return text if text == "all" else said(lambda: layer_text(parse_layers(text)))

    @field_validator("heads", mode="before")
    @classmethod
    def _heads_read(cls, heads: Any) -> Any:
        if heads == "all":
            return heads
        good = (
            isinstance(heads, list | tuple)
            and heads
            and all(type(h) is int and 0 <= h <= MOST for h in heads)
        )
        if not good:
            raise ValueError("must be 'all' or a list of 0-based numbers")
        return tuple(sorted(set(heads)))

    @field_validator("where")
    @classmethod
    def _where_reads(cls, text: str | None) -> str | None:
        if text is not None:
            said(lambda: parse_where(text))
        return text

    @field_validator("k")
    @classmethod
    def _keys_exist(cls, name: str) -> str:
        if "generated" in names(name):
            raise ValueError("edges to generated tokens are never cut; name prompt segments")
        return name

    def layers_of(self, n_layers: int) -> tuple[int, ...]:
        """0-based layers in a model of `n_layers`. Raises ConfigError for a layer it does not have."""
        if self.layers == "all":
            return tuple(range(n_layers))
        layers = parse_layers(self.layers)
        if layers[-1] >= n_layers:
            raise ConfigError(
                f"a cut names {named(layers[-1])}, the model has layers 1-{n_layers}; write the policy for this depth "
                "(presets scale themselves)"
            )
        return layers


def said(work: Callable[[], Any]) -> Any:
    """Our ConfigError as the ValueError that pydantic reports with the field's path."""
    try:
        return work()
    except ConfigError as e:
        raise ValueError(str(e)) from None


class GeneratedRows(Part):
    """Which prompt row's cuts a generated token inherits: "last", "none", or the last position of a segment."""

    inherit: Text = "last"
