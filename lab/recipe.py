"""Recipe: what was asked, written so that it can be asked again. Torch-free; runs nothing itself.

A recipe is a frozen pydantic model. People read and write it as YAML; its identity is the hash of its canonical JSON.
`kind` is the dotted path of the class that runs it, looked up inside `lab.`, `probes.` and `figures.` and nowhere else, so adding
a recipe means writing a class (`class KnockoutRecipe(Recipe): ...`, fields and a `run`), and no list to edit:

    recipe = load("recipe.yaml")        # the class is found by `kind`, then checks every field
    recipe = recipe.override({"model": "tiny", "items.n": 4, "pathways.0": "video->last"})
    results = recipe.run()

The recipe of a figure is a `FigureRecipe`: it also says how well a second run repeats its numbers.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    SerializeAsAny,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from lab.errors import ConfigError, UsageError
from lab.overriding import changed
from lab.result import Result, plain, write_bytes
from lab.yamlfile import as_yaml, parse_yaml, read_text

SCHEMA_VERSION = 1
ROOTS = ("lab", "probes", "figures")
WRITTEN = ROOTS[:2]  # where the recipes are that people write; those of figures lie beside their figures
# version -> function from plain data of that version to plain data of the next one
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
_KIND = re.compile(rf"({'|'.join(ROOTS)})(\.[A-Za-z]\w*)+")


class Part(BaseModel):
    """A piece of a recipe: no unknown fields, no changes after it is made, no nan or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Recipe(Part):
    """Base of all recipes. A subclass adds fields and overrides `run`; `kind` fills itself in."""

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: str = Field(default="", validate_default=True)
    _folder: Path | None = PrivateAttr(default=None)
    # Fields that came later: at their defaults they are no part of the identity, so that older recipes keep their id.
    added: ClassVar[tuple[str, ...]] = ()

    @field_validator("kind", mode="after")
    @classmethod
    def _kind_is_mine(cls, given: str) -> str:
        if given not in ("", dotted(cls)):
            raise ValueError(f"kind is {given!r} but the class is {dotted(cls)!r}")
        return dotted(cls)

    def run(self, *, progress: bool = True) -> list[Result]:
        """Carries the recipe out. `progress` shows bars on stderr. Subclasses override this."""
        raise UsageError(
            f"{self.kind} does not say how to run: give the class a method run(self, *, progress=True)"
        )

    @property
    def folder(self) -> Path:
        """Folder that relative paths in this recipe start from: the file's own, or the working folder."""
        return self._folder or Path.cwd()

    def at(self, folder: str | Path) -> Self:
        """The same recipe (same id) with its relative paths starting from `folder`."""
        out = self.model_copy()
        out._folder = Path(folder)
        return out

    def override(self, changes: Mapping[str, Any]) -> Self:
        """The recipe with other values at dotted keys (see `lab.overriding`), checked as a file is; its folder stays.

        "model" may be just a name: dtype and device stay, hashes of the old model go. Raises ConfigError, UsageError.
        """
        given = {
            k: v.model_dump(mode="json") if isinstance(v, BaseModel) else plain(v, k)
            for k, v in changes.items()
        }
        out = from_plain(changed(self.plain(), given), "recipe with the changes")
        if type(out) is not type(self):
            raise UsageError(f"kind: cannot be changed to {out.kind}; load a recipe of that kind")
        return out.at(self._folder) if self._folder else out

    def plain(self) -> dict[str, Any]:
        """The fields as dict, list, text and numbers."""
        return self.model_dump(mode="json")

    def canonical(self) -> str:
        """JSON with sorted keys and no spaces: equal recipes give equal text on every machine."""
        unsaid = {n for n in self.added if getattr(self, n) == type(self).model_fields[n].default}
        data = {k: v for k, v in self.plain().items() if k not in unsaid}
        return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @property
    def id(self) -> str:
        """First 12 hexadecimal digits of the sha256 of `canonical()`; names folders and cache entries."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()[:12]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.canonical() == other.canonical()  # type: ignore[union-attr]

    def __hash__(self) -> int:
        return hash(self.canonical())


Determinism = Literal["exact", "tolerance", "measured"]


class FigureRecipe(Recipe):
    """Base of the recipes of figures: fields that say what a second run of `run` must give.

    determinism  "exact": the same bytes; "tolerance": every number within `tolerance` of the first, in its own unit;
                 "measured": times and memory, of which counts, units and the stated order are repeated, not the numbers
    tolerance    the bound; given with determinism "tolerance" and no other
    """

    determinism: Determinism = "exact"
    tolerance: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _bound_where_due(self) -> Self:
        if (self.determinism == "tolerance") != (self.tolerance is not None):
            raise ValueError(
                f"tolerance: is {self.tolerance} with determinism {self.determinism!r}; give it with 'tolerance' alone"
            )
        return self


# ---- pieces that traces share ---------------------------------------------------------------------------------------


class ModelSpec(Part):
    """Which model. `weights` is the hash of its weights, checked at load when given."""

    name: str = "tiny"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    device: str = "auto"
    revision: str | None = None
    weights: str | None = None


class VideoSpec(Part):
    """Which video file and which of its frames: exactly one of n_frames (uniform), fps, index (explicit)."""

    path: str
    sha256: str | None = None
    n_frames: int | None = Field(default=None, ge=1)
    fps: float | None = Field(default=None, gt=0)
    index: tuple[int, ...] | None = None
    max_frames: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [n for n in ("n_frames", "fps", "index") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"choose one of n_frames, fps, index; {' and '.join(given)} are given")
        return self

    def sampling(self) -> dict[str, Any]:
        """The sampling as keyword arguments of `lab.video.read` and `model.prepare`; empty for their default."""
        names = ("n_frames", "fps", "index", "max_frames")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


class ItemSpec(Part):
    """One question about one video file."""

    video: VideoSpec
    question: str
    options: tuple[str, ...] = ()
    answer: int | str | None = None
    id: str = ""
    task: str = ""
    clip: tuple[float, float] | None = None


Benchmark = Literal["tvbench", "mvbench", "tomato", "tempcompass"]


class SimSpec(Part):
    """Simulated items: `n` items of the simulator task `sim` (or of each, with commas between), drawn with `seed`."""

    sim: str
    n: int = Field(default=8, ge=1, le=100_000)
    seed: int = Field(default=0, ge=0)


class ItemFile(Part):
    """A file of items (.jsonl, .yaml, or TVBench's and MVBench's .json); `sha256` is checked when given.

    videos   the folder below which a benchmark's videos lie
    """

    file: str
    sha256: str | None = None
    videos: str | None = None


class BenchmarkSpec(Part):
    """Questions of a public benchmark in the layout it is published in, from a folder on this machine.

    folder  the benchmark's top folder; see `lab.benchmarks` for what must lie in it
    task    one of its tasks, or several with commas between; None: all of them
    n       the first n questions of every task; None: all of them
    sha256  of the question files, checked when given
    """

    benchmark: Benchmark
    folder: str
    task: str | None = None
    n: int | None = Field(default=None, ge=1)
    sha256: str | None = None


def items_named(text: str) -> dict[str, Any]:
    """What a short text says about items: sim:TASKS[:N[:SEED]], BENCHMARK:FOLDER[:TASKS][:N], or the name of a file.

    Raises ValueError for a sim: or a benchmark: with more or other parts.
    """
    head, _, rest = text.partition(":")
    if head == "sim":
        task, *numbers = rest.split(":")
        if not task or len(numbers) > 2 or not all(n.isdecimal() for n in numbers):
            raise ValueError("not sim:TASKS:N:SEED, such as sim:moving_direction,object_count:8:0")
        return {"sim": task, **dict(zip(("n", "seed"), map(int, numbers), strict=False))}
    if head not in get_args(Benchmark):
        return {"file": text}
    folder, *more = rest.split(":")
    n = [int(more.pop())] if more and more[-1].isdecimal() else []
    if not folder or len(more) > 1:
        raise ValueError(f"not {head}:FOLDER:TASKS:N, such as {head}:/data/{head}:20")
    return {
        "benchmark": head,
        "folder": folder,
        **({"task": more[0]} if more else {}),
        **({"n": n[0]} if n else {}),
    }


def _items_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "list"
    has = value.__contains__ if isinstance(value, dict) else lambda name: hasattr(value, name)
    return next((tag for tag in ("sim", "file", "benchmark") if has(tag)), None)


_WHICH_ITEMS = Discriminator(
    _items_tag,
    custom_error_type="items",
    custom_error_message="Items are a list, or have sim:, or file:, or benchmark:",
)
_Named = (
    Annotated[SimSpec, Tag("sim")]
    | Annotated[ItemFile, Tag("file")]
    | Annotated[BenchmarkSpec, Tag("benchmark")]
)
_Text = Annotated[
    Annotated[_Named, _WHICH_ITEMS],
    BeforeValidator(items_named, json_schema_input_type=str),
    Tag("text"),
]
# Where items come from: a list of them, a simulator task, a file, a benchmark's folder, or a text that names one of
# the last three (see `items_named`).
ItemsSpec = Annotated[Annotated[tuple[ItemSpec, ...], Tag("list")] | _Named | _Text, _WHICH_ITEMS]


# ---- from and to files ----------------------------------------------------------------------------------------------


def load(path: str | Path) -> Recipe:
    """Reads a YAML recipe; its relative paths start from the file's folder, or from `base:`, seen from there.

    `base` says where files lie, not what is asked: it is no part of the recipe's identity. Raises ConfigError, always one
    line.
    """
    data, folder = parse_yaml(read_text(path), str(path)), Path(path).resolve().parent
    base = data.pop("base", ".") if isinstance(data, dict) else "."
    if not isinstance(base, str) or "\0" in base:
        raise ConfigError(f"{path}: base: must be the name of a folder, got {_short(base)}")
    return from_plain(data, str(path)).at(os.path.normpath(folder / base))


def loads(text: str, name: str = "recipe") -> Recipe:
    """Reads a recipe from YAML text; `name` stands in error messages."""
    return from_plain(parse_yaml(text, name), name)


def dump(recipe: Recipe, path: str | Path | None = None) -> str:
    """The recipe as YAML text, also written to `path` if given. Raises ConfigError if `load` could not read it back."""
    resolve(recipe.kind)
    data = recipe.plain()
    if path is not None and recipe._folder is not None and _has_relative_paths(recipe):
        start = os.path.relpath(recipe._folder.resolve(), Path(path).resolve().parent)
        data = data if start == "." else {"base": Path(start).as_posix(), **data}
    text = as_yaml(data)
    if path is not None:
        write_bytes(path, text.encode())
    return text


def _has_relative_paths(part: Any) -> bool:
    if isinstance(part, VideoSpec | ItemFile | BenchmarkSpec):
        named = (getattr(part, n, None) for n in ("path", "file", "videos", "folder"))
        return any(n is not None and not Path(n).expanduser().is_absolute() for n in named)
    values = [v for _, v in part] if isinstance(part, BaseModel) else part
    return isinstance(values, list | tuple) and any(_has_relative_paths(v) for v in values)


def from_plain(data: Any, name: str = "recipe") -> Recipe:
    """The recipe that plain data (for example `Result.recipe`) describes. Raises ConfigError."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name}: a recipe is a mapping of fields, got {type(data).__name__}")
    fields = _migrated(dict(data), name)
    kind = fields.get("kind")
    if not isinstance(kind, str) or not kind:
        raise ConfigError(f"{name}: kind: is missing; known kinds: {', '.join(known_kinds()) or 'none'}")
    cls = resolve(kind, f"{name}: kind: ")
    try:
        # JSON in strict mode: lists become tuples, but "9" is no number and true is no 1
        return cls.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as e:
        raise ConfigError(f"{name}: {explain(e, cls)}") from None


def resolve(kind: str, where: str = "") -> type[Recipe]:
    """The Recipe class at a dotted path. Raises ConfigError unless it is one, defined there, inside lab or probes."""
    module, _, name = kind.rpartition(".")
    if not _KIND.fullmatch(kind) or not module:
        raise ConfigError(
            f"{where}{_short(kind)} is not a dotted path inside {' or '.join(WRITTEN)}{_closest(kind)}"
        )
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as e:
        raise ConfigError(f"{where}{kind!r} cannot be imported ({e}){_closest(kind)}") from None
    if (
        not (isinstance(found, type) and issubclass(found, Recipe))
        or found is Recipe
        or dotted(found) != kind
    ):
        raise ConfigError(f"{where}{kind!r} is not a recipe{_closest(kind)}")
    return found


def json_schema(cls: type[Recipe]) -> dict[str, Any]:
    """JSON Schema of one recipe class; editors use it to complete and check YAML files."""
    schema = cls.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["kind"] = {"const": dotted(cls), "type": "string"}
    schema["properties"]["base"] = {
        "type": "string",
        "description": "Folder that relative paths start from (`load`).",
    }
    schema["required"] = sorted({*schema.get("required", []), "kind"})
    return schema


def known_kinds() -> list[str]:
    """Dotted paths of the recipe classes in the installed packages, found by reading their sources, not running them."""
    return sorted({kind for root in ROOTS for folder in _folders(root) for kind in _kinds_in(root, folder)})


def dotted(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _any_recipe(value: Any) -> Any:
    try:
        return value if isinstance(value, Recipe) else from_plain(value)
    except ConfigError as e:
        raise ValueError(str(e)) from None


# A field that holds a recipe of any kind: the class is found by its `kind` first, then it checks the fields.
AnyRecipe = Annotated[SerializeAsAny[Recipe], BeforeValidator(_any_recipe)]


def sha256_of(path: str | Path) -> str:
    """sha256 of a file, or of the names and contents of the files in a folder (one level). Raises ConfigError."""
    path, digest = Path(path), hashlib.sha256()
    try:
        for file in [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file()):
            if file != path:
                digest.update(file.name.encode() + b"\0")
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from None
    except ValueError:  # a zero byte
        raise ConfigError(f"cannot read {str(path)!r}: not a path") from None
    return digest.hexdigest()


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """pydantic's findings in one line: path of the field, what is wrong, what was given; at most three of them."""
    found = [_finding(e, cls) for e in error.errors(include_url=False, include_context=False)]
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def _finding(error: Any, cls: type[BaseModel]) -> str:
    path = ".".join(str(p) for p in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _names_in(cls), n=2, cutoff=0.7)
        return f"{path}: there is no such field{'; closest: ' + ', '.join(near) if near else ''}"
    if error["type"] == "missing":
        return f"{path}: is missing"
    message = " ".join(error["msg"].removeprefix("Value error, ").split())
    return f"{path}: {message} (got {_short(error['input'])})"


def _names_in(cls: type[BaseModel]) -> list[str]:
    schema = cls.model_json_schema()
    parts = [schema, *schema.get("$defs", {}).values()]
    return sorted({name for part in parts for name in part.get("properties", {})})


def _migrated(data: dict[str, Any], name: str) -> dict[str, Any]:
    version = data.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or isinstance(version, bool):
        raise ConfigError(f"{name}: schema_version: must be a whole number (got {_short(version)})")
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{name}: schema_version: is {version}, this lab reads up to {SCHEMA_VERSION}; update the lab"
        )
    while version < SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise ConfigError(
                f"{name}: schema_version: {version} cannot be brought to {SCHEMA_VERSION}; write it anew"
            )
        data = {**MIGRATIONS[version](data), "schema_version": version + 1}
        version += 1
    return data


def _folders(root: str) -> list[Path]:
    try:
        return [Path(p) for p in importlib.import_module(root).__path__]
    except ImportError:
        return []


def _kinds_in(root: str, folder: Path) -> Iterator[str]:
    for file in sorted(folder.rglob("*.py")):
        place = ".".join((root, *file.relative_to(folder).with_suffix("").parts))
        if place == __name__:  # bases, none of which runs
            continue
        # by name; a base that others share derives from `Recipe as Owner`, and is not for running
        for name in re.findall(
            r"^class (\w*Recipe)\((?!Owner\))[\w., ]+\)", file.read_text("utf-8", "replace"), re.M
        ):
            yield f"{place}.{name}"


def _closest(kind: str) -> str:
    known = sorted(known_kinds(), key=lambda k: not k.startswith(WRITTEN))
    near = difflib.get_close_matches(kind, known, n=3, cutoff=0.3) or known[:3]
    return f"; closest: {', '.join(near)}" if near else "; no recipe kinds are installed"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
