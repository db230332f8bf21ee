"""Policies: which attention edges are cut, as predicates over roles, frames, layers and heads. Never positions.

So a policy re-applies to another length, frame count or model, or is refused with the reason. Files are YAML or JSON
with `format: edge-policy/1`; only `format` and `cuts` are required. Layers are 1-based in files, heads 0-based.

    policy = Policy.load("paper.yaml")
    logits = model(ready, policy=policy)                  # executor="fast" for the incremental one
    policy.count(ready.tokens, n_layers=32).kept_fraction
"""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from lab.carriers import TokenMap, VideoQA
from lab.edges.binding import Bound
from lab.edges.counting import Count, count_of
from lab.edges.cuts import Cut, GeneratedRows, said
from lab.edges.fingerprints import Leak, Metadata, check_layout, check_sizes, leaks_of
from lab.edges.ranges import MOST
from lab.edges.reference import biases_of, edges_of, masks_of
from lab.edges.segments import Segmentation, check_name
from lab.errors import ConfigError, LabWarning, UsageError
from lab.model.run import Edges
from lab.recipe import explain
from lab.result import write_bytes
from lab.slots import ModelSizes
from lab.yamlfile import as_yaml, parse_yaml, read_text

FORMAT = "edge-policy/1"
# lab.edges.<name>; all but the reference, which the model is itself, have execute(model, ready, policy, *, read)
EXECUTORS = ("reference", "fast")
# format -> function from plain data of that format to plain data of the next one, its "format" included
MIGRATIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}


class Policy(Metadata):
    """A set of cuts with the rules that make them unambiguous, and what is known about them.

    default  "keep": the edges listed in `cuts` are cut. "cut": they are the only ones kept
    segments "strict" or "paper" (see `lab.edges.segments`; `leaks` says what paper mode lets through)
    empty_row  a row with no key left outputs zero; the stream passes it by
    """

    format: Literal["edge-policy/1"] = FORMAT
    default: Literal["keep", "cut"] = "keep"
    segments: Segmentation = "strict"
    empty_row: Literal["zero"] = "zero"
    generated_rows: GeneratedRows = GeneratedRows()
    cuts: Annotated[tuple[Cut, ...], Field(max_length=MOST)]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for i, cut in enumerate(self.cuts):
            for side in ("q", "k"):
                try:
                    check_name(getattr(cut, side), self.segments)
                except ConfigError as e:
                    raise ValueError(f"cuts.{i}.{side}: {e}") from None
            if cut.gate is not None and self.default == "cut":
                raise ValueError(
                    f"cuts.{i}.gate: with default: cut the list says what is kept; a gate adds to edges"
                )
        if self.generated_rows.inherit != "none":
            said(lambda: check_name(self.generated_rows.inherit, self.segments))
        return self

    # ---- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, data: Any, name: str = "policy") -> Self:
        """A policy from plain data. Raises ConfigError, one line, with the path of the field."""
        if not isinstance(data, dict):
            raise ConfigError(f"{name}: must be a mapping with format and cuts, got {type(data).__name__}")
        data = _migrated(data, name)
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise ConfigError(f"{name}: {explain(e, cls).removeprefix('recipe: ')}") from None
        except RecursionError:
            raise ConfigError(f"{name}: lists or mappings are nested too deep") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what is unset is left out."""
        return {"format": FORMAT, **self.model_dump(mode="json", by_alias=True, exclude_defaults=True)}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML or JSON file. Raises ConfigError for anything that is no policy."""
        text, name = read_text(path), Path(path).name
        if Path(path).suffix.lower() != ".json":
            return cls.from_dict(parse_yaml(text, name), name)
        try:
            return cls.from_dict(json.loads(text, object_pairs_hook=_no_double_keys), name)
        except json.JSONDecodeError as e:
            raise ConfigError(f"{name}: line {e.lineno}: not JSON: {e.msg}") from None
        except (RecursionError, ValueError) as e:
            raise ConfigError(f"{name}: {' '.join(str(e).split())[:200]}") from None

    def save(self, path: str | Path) -> None:
        """Write YAML, or JSON if the name ends in .json."""
        as_json = Path(path).suffix.lower() == ".json"
        text = (
            json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
            if as_json
            else as_yaml(self.to_dict())
        )
        write_bytes(Path(path), text.encode())

    @property
    def id(self) -> str:
        """First 12 hexadecimal digits of the sha256 of the canonical JSON of all that changes numbers."""
        said = self.model_dump(
            mode="json", include={"format", "default", "segments", "empty_row", "generated_rows"}
        )
        said["cuts"] = [c.model_dump(mode="json", exclude={"reason"}) for c in self.cuts]
        return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[
            :12
        ]

    # ---- on a prompt ------------------------------------------------------------------------------------------------

    @property
    def is_null(self) -> bool:
        """Whether the policy says that nothing is cut; such a run takes the clean path."""
        return not self.cuts and self.default == "keep"

    def bind(self, tokens: TokenMap, n_layers: int, n_heads: int, item: VideoQA | None = None) -> Bound:
        """This policy on one prompt. Raises ConfigError if model or layout are not those it was made for."""
        check_sizes(self, n_layers, n_heads)
        check_layout(self, tokens)
        for i, cut in enumerate(self.cuts):
            cut.layers_of(n_layers)
            if cut.heads != "all" and cut.heads[-1] >= n_heads:
                raise ConfigError(
                    f"cuts.{i}.heads: names head {cut.heads[-1]}, the model has heads 0-{n_heads - 1}"
                )
        return Bound(self, tokens, n_layers, n_heads, item)

    def masks(
        self, tokens: TokenMap, n_layers: int, n_heads: int = 1, item: VideoQA | None = None
    ) -> dict[int, Tensor]:
        """0-based layer -> edges removed by hard cuts, bool [q, k] or [head, q, k]; layers without any are left out."""
        return masks_of(self.bind(tokens, n_layers, n_heads, item))

    def bias(
        self, tokens: TokenMap, n_layers: int, n_heads: int = 1, item: VideoQA | None = None
    ) -> dict[int, Tensor]:
        """0-based layer -> what gates add to the scores, float [q, k] or [head, q, k]."""
        return biases_of(self.bind(tokens, n_layers, n_heads, item))

    def edges(
        self, tokens: TokenMap | Sequence[TokenMap], sizes: ModelSizes, item: VideoQA | None = None
    ) -> dict[int, Edges]:
        """What `model(ready, edges=...)` takes, for one map or one per world. Empty for a policy without cuts.

        Raises UsageError if no cut touches an edge; ConfigError if the policy was made for something else.
        """
        maps = [tokens] if isinstance(tokens, TokenMap) else list(tokens)
        return edges_of([self.bind(t, sizes.n_layers, sizes.n_heads, item) for t in maps])

    def count(
        self,
        tokens: TokenMap,
        n_layers: int | None = None,
        n_heads: int | None = None,
        item: VideoQA | None = None,
    ) -> Count:
        """Edges in all and kept: the paper's rule, and live ones. See `lab.edges.counting`.

        n_layers, n_heads   left out: those of the policy's `model`, or of the model `tokens` were prepared for; one head
                            if no cut names heads
        Warns (LabWarning) where mechanisms will still change the tokens: then the decoder's map is `model.maps(ready)[0]`.
        """
        if tokens.ahead:
            warnings.warn(
                f"these are the {len(tokens)} tokens before {', '.join(tokens.ahead)}, not those that the decoder reads: count "
                "model.maps(ready)[0]",
                LabWarning,
                stacklevel=2,
            )
        n_layers = n_layers or self.model.layers or tokens.n_layers
        if n_layers is None:
            raise UsageError(
                "neither the policy nor the token map says how many layers the model has; give n_layers= (model.cfg.n_layers)"
            )
        n_heads = n_heads or self.model.heads or (1 if self.head_shared else tokens.n_heads)
        if n_heads is None:
            raise UsageError(
                "the policy cuts single heads, and nothing says how many there are; give n_heads="
            )
        return count_of(self.bind(tokens, n_layers, n_heads, item))

    @property
    def head_shared(self) -> bool:
        """Whether every cut is for all heads."""
        return all(c.heads == "all" for c in self.cuts)

    def leaks(self, tokens: TokenMap) -> Leak:
        """The positions that belong to no segment of this policy: information passes them uncut. None when strict."""
        return leaks_of(self, tokens)

    def materialised(self, model: Any) -> Any:
        """See `VideoLLM.materialise`."""
        return importlib.import_module("lab.edges.materialised").materialise(model, self)

    def executor(self, name: str) -> Callable[..., Tensor]:
        """The `execute(model, ready, policy, *, read)` of an executor other than the reference, which the model is itself."""
        if name not in EXECUTORS[1:]:
            raise UsageError(f"no executor {name!r}; there are: {', '.join(EXECUTORS)}")
        try:
            return importlib.import_module(f"lab.edges.{name}").execute
        except ImportError as e:
            raise UsageError(f"executor {name!r} cannot be loaded ({e}); use executor='reference'") from None


def json_schema() -> dict[str, Any]:
    """JSON Schema of a policy file; editors complete and check YAML with it."""
    schema = Policy.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["required"] = ["format", "cuts"]
    return schema


def _migrated(data: dict[str, Any], name: str) -> dict[str, Any]:
    if "format" not in data:
        raise ConfigError(f"{name}: format: is missing; write format: {FORMAT}")
    for _ in range(len(MIGRATIONS) + 1):
        given = data.get("format")
        if given == FORMAT:
            return data
        if not isinstance(given, str) or given not in MIGRATIONS:
            break
        data = MIGRATIONS[given](dict(data))
    raise ConfigError(f"{name}: format: is {str(data.get('format'))[:40]!r}, this lab reads {FORMAT!r}")


def _no_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a key stands twice")
    return out
