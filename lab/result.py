"""Result: numbers with named axes, a unit, and the recipe that made them. Torch-free; draws nothing.

A Result is saved as one `.npz` file that holds the arrays and a JSON text. The file has no dates, no compression and
no pickles: saving twice gives the same bytes, and loading a file from a stranger runs none of its code.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.errors import ConfigError, UsageError

FORMAT = "videollm-lab result"
VERSION = 1
ARRAYS = ("values", "low", "high")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip entry can carry


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """What a probe found.

    values    one number per combination of coordinates, shape = number of coordinates of each axis; read-only
    axes      names of the axes, words of `lab.axes` where they fit ("item", "pathway", "layer", ...)
    coords    for every axis one number or text per index; layers are 1-based here, as in plots and files
    unit      what one value is, with its sign, e.g. "% change in probability"
    recipe    the recipe that reproduces it, as plain data ({} if there is none)
    name      a short title
    notes     further plain data (how many items, what was left out, ...)
    low, high bounds of an interval round every value, same shape as values; both or neither
    baseline  the value that means "nothing happened"; None where there is no such value

    Raises UsageError if shapes, axes and coordinates do not fit together.
    """

    values: NDArray[Any]
    axes: tuple[str, ...]
    coords: dict[str, list[Any]]
    unit: str
    recipe: dict[str, Any]
    name: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    low: NDArray[Any] | None = None
    high: NDArray[Any] | None = None
    baseline: float | None = None

    def __post_init__(self) -> None:
        recipe = self.recipe.model_dump(mode="json") if hasattr(self.recipe, "model_dump") else self.recipe  # type: ignore[attr-defined]
        values = _numbers(self.values, "values")
        axes = (self.axes,) if isinstance(self.axes, str) else tuple(self.axes)
        _check_axes(axes, values.shape, self.coords)
        coords = {a: _coordinates(a, self.coords[a], n) for a, n in zip(axes, values.shape, strict=True)}
        if (self.low is None) != (self.high is None):
            raise UsageError("an interval needs both low and high; one of them is missing")
        for name in ("low", "high"):
            self._set(name, _like(getattr(self, name), values, name))
        if not isinstance(self.unit, str) or not isinstance(self.name, str):
            raise UsageError(f"unit and name must be text, got {self.unit!r} and {self.name!r}")
        for name, value in (("values", values), ("axes", axes), ("coords", coords)):
            self._set(name, value)
        self._set("recipe", plain(recipe, "recipe"))
        self._set("notes", plain(self.notes, "notes"))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of coordinates of each axis."""
        return self.values.shape

    @property
    def ledger(self) -> dict[str, Any]:
        """What it cost: `forwards` (forward-equivalents computed), `naive` (one full forward per number), `tower_calls`.

        Empty where nothing was counted.
        """
        return dict(self.notes.get("ledger", {}))

    @property
    def not_finite(self) -> int:
        """How many values are nan or infinite."""
        return int(np.size(self.values) - np.isfinite(self.values).sum())

    def __repr__(self) -> str:
        size = " x ".join(f"{a} {n}" for a, n in zip(self.axes, self.shape, strict=True)) or "one number"
        return f"<Result {self.name!r}: {size}, {self.unit}>"

    def same(self, other: Result) -> bool:
        """True if both hold the same numbers (nan equals nan), coordinates, unit, recipe and notes."""
        mine, theirs = _meta(self), _meta(other)
        return mine == theirs and all(_equal(getattr(self, a), getattr(other, a)) for a in ARRAYS)

    def select(self, **wanted: Any) -> Result:
        """The part at the given coordinates: `select(layer=3)` drops the axis (and notes the
        choice in `notes["selected"]`), `select(layer=[3, 4])` keeps it.

        Raises UsageError for an axis or a coordinate that is not there, naming the closest, or is there twice.
        """
        out = self
        for axis, want in wanted.items():
            at = out._axis(axis)
            if isinstance(want, list | tuple | range):
                out = out._take(at, [out._index(axis, w) for w in want])
            else:
                chosen = {**out.notes.get("selected", {}), axis: want}
                part = out._take(at, out._index(axis, want))
                out = replace(part, unit=_unit(out, axis, want), notes={**out.notes, "selected": chosen})
        return out

    def split(self, which: str) -> Result:
        """The items whose answer the clean run gets "correct", those it gets "wrong", or "all" of them.

        Needs `notes["correct"]` (sweeps write it); items whose right answer is not known are in "all" alone.
        Raises UsageError for another word, where nothing is known, or where no item is left.
        """
        if which not in ("correct", "wrong", "all"):
            raise UsageError(f"split({which!r}): use 'correct', 'wrong' or 'all'")
        if which == "all":
            return self
        n, known = self.shape[self._axis("item")], self.notes.get("correct", {})
        keep = [c for c in self.coords["item"] if known.get(str(c)) is (which == "correct")]
        if not keep:
            told = sum(v is not None for v in known.values())
            raise UsageError(
                f"none of {n} items is answered {which} in the clean run; {told} have a known right answer"
            )
        part = self.select(item=keep)
        return replace(part, notes={**part.notes, "split": which})

    def mean(self, axis: str, *, n_boot: int = 1000, seed: int = 0) -> Result:
        """Mean over one axis; low and high become a 95 % bootstrap interval made by resampling that axis.

        Coordinates that `notes["groups"][axis]` gives the same label (questions about one video) are resampled
        together: the groups are drawn. nan counts as missing. `notes["n"][axis]` says over how many the mean was taken;
        with a single group there is no interval. The same seed gives the same interval.
        """
        at = self._axis(axis)
        values = np.moveaxis(self.values.astype(float), at, 0)
        n = len(values)
        if n == 0:
            raise UsageError(f"axis {axis!r} has 0 entries, so there is nothing to average")
        middle = _mean(np.ones((1, n)), values)[0]
        groups = _groups(self.coords[axis], self.notes.get("groups", {}).get(axis, {}))
        low, high = _interval(values, n_boot, seed, groups) if groups.shape[0] > 1 else (None, None)
        counts = {**self.notes.get("n", {}), axis: n}
        axes = tuple(a for a in self.axes if a != axis)
        coords = {a: self.coords[a] for a in axes}
        notes = {**self.notes, "n": counts}
        return replace(self, values=middle, axes=axes, coords=coords, notes=notes, low=low, high=high)

    def mean_by(self, label: str, axis: str = "item", *, n_boot: int = 1000, seed: int = 0) -> Result:
        """Means over the entries of `axis` that have one label each: the axis becomes `label`, in order of appearance.

        label  a name in `notes`, whose entry gives every coordinate its label: "task" of items
        Raises UsageError if a coordinate has none.
        """
        at, given = self._axis(axis), self.notes.get(label)
        labels = [str(given.get(str(c), "")) if isinstance(given, dict) else "" for c in self.coords[axis]]
        if not labels or not all(labels):
            raise UsageError(f"notes[{label!r}] does not give each of the {len(labels)} {axis}s a label")
        names = list(dict.fromkeys(labels))
        parts = [
            self._take(at, [i for i, v in enumerate(labels) if v == name]).mean(
                axis, n_boot=n_boot, seed=seed
            )
            for name in names
        ]
        return _stacked(self, parts, axis, label, names)

    def tidy(self) -> list[dict[str, Any]]:
        """One row for every value: its coordinates, `value`, and `low` and `high` where there is an interval."""
        rows: list[dict[str, Any]] = []
        names = [n for n in ARRAYS if getattr(self, n) is not None]
        columns = {"value" if n == "values" else n: getattr(self, n).ravel().tolist() for n in names}
        for i, place in enumerate(itertools.product(*(self.coords[a] for a in self.axes))):
            rows.append({**dict(zip(self.axes, place, strict=True)), **{k: v[i] for k, v in columns.items()}})
        return rows

    def csv(self) -> str:
        """The tidy rows as CSV text; floats in full, so reading them back gives the same numbers."""
        text = io.StringIO()
        interval = ["low", "high"] if self.low is not None else []
        writer = csv.DictWriter(text, [*self.axes, "value", *interval], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.tidy())
        return text.getvalue()

    def to_csv(self, path: str | Path) -> Path:
        """Writes `csv()` to a file."""
        return write_bytes(path, self.csv().encode())

    def to_json(self) -> str:
        """JSON text. JSON has no nan and no infinity: they become null and `not_finite` says how many there were."""
        arrays = {n: _nullable(getattr(self, n)) for n in ARRAYS}
        return json.dumps(
            {**_meta(self), **arrays, "not_finite": self.not_finite}, ensure_ascii=False, allow_nan=False
        )

    def save(self, path: str | Path) -> Path:
        """Writes one `.npz` file (arrays and JSON), all at once: a reader never sees half a file."""
        text = json.dumps(_meta(self), sort_keys=True, ensure_ascii=False, allow_nan=False)
        members = {n: getattr(self, n) for n in ARRAYS if getattr(self, n) is not None}
        members["meta"] = np.frombuffer(text.encode(), np.uint8)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
            for name in sorted(members):
                z.writestr(zipfile.ZipInfo(f"{name}.npy", _EPOCH), _npy(members[name]))
        return write_bytes(path, out.getvalue())

    @staticmethod
    def load(path: str | Path) -> Result:
        """Reads what `save` wrote. Raises ConfigError for anything else: damaged, foreign, compressed or newer."""
        members = _members(Path(path))
        if "meta" not in members or "values" not in members:
            raise ConfigError(
                f"{path} is not a saved Result: it holds {sorted(members) or 'nothing'}, not 'values' and 'meta'"
            )
        meta = _read_meta(path, members["meta"])
        arrays = {n: members.get(n) for n in ARRAYS}
        try:
            return Result(**arrays, **restore(meta))  # type: ignore[arg-type]
        except (TypeError, KeyError, AttributeError, ValueError, UsageError) as e:
            raise ConfigError(f"{path}: the saved Result does not fit together: {e}") from None

    def _axis(self, name: str) -> int:
        if name not in self.axes:
            raise UsageError(f"no axis {name!r}; the axes are {', '.join(self.axes) or 'none'}")
        return self.axes.index(name)

    def _index(self, axis: str, want: Any) -> int:
        have = self.coords[axis]
        hits = [i for i, c in enumerate(have) if c == want and isinstance(c, str) == isinstance(want, str)]
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise UsageError(
                f"{axis} {want!r} stands {len(hits)} times among {len(have)} coordinates; select needs exactly 1"
            )
        near = difflib.get_close_matches(str(want), [str(c) for c in have], n=3, cutoff=0.4)
        shown = ", ".join(near) or ", ".join(str(c) for c in have[:6])
        raise UsageError(f"no {axis} {want!r} among {len(have)} coordinates; closest: {shown}")

    def _take(self, at: int, index: int | list[int]) -> Result:
        axis, keep = self.axes[at], isinstance(index, list)
        arrays = {
            n: None if getattr(self, n) is None else np.take(getattr(self, n), index, axis=at) for n in ARRAYS
        }
        coords = dict(self.coords)
        coords[axis] = [coords[axis][i] for i in index] if isinstance(index, list) else []
        axes = tuple(a for a in self.axes if keep or a != axis)
        return replace(self, axes=axes, coords={a: coords[a] for a in axes}, **arrays)


def plain(value: Any, where: str) -> Any:
    """A deep copy made of dict, list, text, numbers, bool and None. Raises UsageError for anything else."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain(v, f"{where}.{i}") for i, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    raise UsageError(
        f"{where} holds a {type(value).__name__}; only text, numbers, lists and dicts can be saved"
    )


def storable(value: Any) -> Any:
    """Plain data in which nan and infinities are written {"$float": "nan"}, because JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if isinstance(value, dict):
        return {k: storable(v) for k, v in value.items()}
    return [storable(v) for v in value] if isinstance(value, list) else value


def restore(value: Any) -> Any:
    """The inverse of `storable`."""
    if isinstance(value, dict):
        if set(value) == {"$float"}:
            return float(value["$float"])
        return {k: restore(v) for k, v in value.items()}
    return [restore(v) for v in value] if isinstance(value, list) else value


def write_bytes(path: str | Path, data: bytes) -> Path:
    """Writes a file all at once (a temporary file beside it, then a rename); makes the folder if there is none."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError as e:
        beside.unlink(missing_ok=True) if beside.parent.is_dir() else None
        raise UsageError(f"cannot write {path}: {e.strerror or e}") from None
    return path


# ---- checks -------------------------------------------------------------------------------------------------------


def _numbers(value: Any, name: str) -> NDArray[Any]:
    try:
        array = np.array(value)  # a copy: nobody else can change the numbers
    except ValueError:
        raise UsageError(f"{name} must be an array of numbers; the rows have different lengths") from None
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{name} must be real numbers, got dtype {array.dtype}")
    array = np.require(array, array.dtype.newbyteorder("<"), "C")
    array.setflags(write=False)
    return array


def _like(value: Any, values: NDArray[Any], name: str) -> NDArray[Any] | None:
    if value is None:
        return None
    array = _numbers(value, name)
    if array.shape != values.shape:
        raise UsageError(f"{name} has shape {array.shape} but values has {values.shape}")
    return array


def _check_axes(axes: tuple[str, ...], shape: tuple[int, ...], coords: Mapping[str, Any]) -> None:
    if len(axes) != len(shape):
        raise UsageError(f"{len(axes)} axes {axes} but values has {len(shape)} dimensions {shape}")
    if not all(isinstance(a, str) and a for a in axes) or len(set(axes)) < len(axes):
        raise UsageError(f"axes must be different names, got {axes}")
    reserved = {"value", "low", "high"} & set(axes)
    if reserved:
        raise UsageError(
            f"an axis cannot be called {sorted(reserved)[0]!r}: tables use that word for the number itself"
        )
    if set(coords) != set(axes):
        raise UsageError(
            f"coordinates are given for {sorted(coords)} but the axes are {sorted(axes)}; give one list per axis"
        )


def _coordinates(axis: str, given: Iterable[Any], n: int) -> list[Any]:
    listed = plain(list(given), f"coords.{axis}")
    if len(listed) != n:
        raise UsageError(f"axis {axis!r} has {len(listed)} coordinates but values has {n} entries along it")
    for c in listed:
        if not isinstance(c, str | int | float) or (isinstance(c, float) and not math.isfinite(c)):
            raise UsageError(f"coordinates of {axis!r} must be finite numbers or texts, got {c!r}")
    return listed


def _equal(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _nullable(array: NDArray[Any] | None) -> Any:
    if array is None:
        return None
    shown = array.astype(object)
    shown[~np.isfinite(array)] = None
    return shown.tolist()


# ---- bootstrap ----------------------------------------------------------------------------------------------------


def _mean(weight: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
    """Weighted means that skip nan: weight [draw, n], values [n, ...] -> [draw, ...]. Infinities give nan or inf."""
    flat = values.reshape(len(values), -1)
    known = ~np.isnan(flat)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = weight @ np.where(known, flat, 0.0)
        return (total / (weight @ known)).reshape(len(weight), *values.shape[1:])


def _groups(coords: list[Any], labels: Mapping[str, str]) -> NDArray[Any]:
    """[group, coordinate], 1 where a coordinate belongs to a group; one without a label is a group of its own."""
    owner = [("label", labels[str(c)]) if str(c) in labels else ("alone", i) for i, c in enumerate(coords)]
    names = list(dict.fromkeys(owner))
    return np.array([[float(o == name) for o in owner] for name in names])


def _interval(
    values: NDArray[Any], n_boot: int, seed: int, groups: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    n = len(groups)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot).astype(float) @ groups
    means = _mean(draws, values)
    missing = np.isnan(means).all(0)  # all draws lack a value: nothing to take a quantile of
    with np.errstate(invalid="ignore"):
        low, high = np.nanquantile(np.where(missing, 0.0, means), [0.025, 0.975], axis=0)
    return np.where(missing, np.nan, low), np.where(missing, np.nan, high)


def _unit(r: Result, axis: str, want: Any) -> str:
    """The unit of the part at one coordinate of an axis whose coordinates have units of their own."""
    own = r.notes.get("units", {}).get(axis, {})
    return str(own.get(str(want), r.unit))


def _stacked(whole: Result, parts: list[Result], axis: str, label: str, names: list[str]) -> Result:
    """Means of several groups side by side; a group of one has no interval, and then its bounds are nan."""
    at = whole.axes.index(axis)
    some = any(p.low is not None for p in parts)
    low, high = (np.moveaxis(_bounds(parts, n), 0, at) if some else None for n in ("low", "high"))
    axes = tuple(label if a == axis else a for a in whole.axes)
    coords = {a: names if a == label else whole.coords[a] for a in axes}
    counts = {
        **whole.notes.get("n", {}),
        axis: {k: p.notes["n"][axis] for k, p in zip(names, parts, strict=True)},
    }
    values = np.stack([p.values for p in parts], at)
    return replace(
        whole, values=values, axes=axes, coords=coords, low=low, high=high, notes={**whole.notes, "n": counts}
    )


def stack(parts: Mapping[str, Result], axis: str) -> Result:
    """Results of the same axes, coordinates and unit, side by side along a new first axis named by the keys.

    For one figure of several models, policies or mechanisms. Intervals are kept where any part has one (nan elsewhere);
    the recipe is not: it made one part only. Raises UsageError for none, or for parts that do not fit together.
    """
    if not parts:
        raise UsageError("nothing to stack; give name -> Result, at least one")
    first, *others = parts.values()
    for name, other in zip(list(parts)[1:], others, strict=True):
        if (other.axes, other.coords, other.unit) != (first.axes, first.coords, first.unit):
            raise UsageError(
                f"{name!r} has {other!r}, {next(iter(parts))!r} has {first!r}; they must be alike"
            )
    if axis in first.axes:
        raise UsageError(f"the results have an axis {axis!r} already: {first.axes}")
    some = any(p.low is not None for p in parts.values())
    low, high = (_bounds(list(parts.values()), n) if some else None for n in ("low", "high"))
    values = np.stack([p.values for p in parts.values()])
    coords = {axis: list(parts), **first.coords}
    return replace(
        first, values=values, axes=(axis, *first.axes), coords=coords, low=low, high=high, recipe={}
    )


def _bounds(parts: Sequence[Result], name: str) -> NDArray[Any]:
    bounds = [getattr(p, name) for p in parts]
    return np.stack(
        [np.full(p.shape, np.nan) if b is None else b for p, b in zip(parts, bounds, strict=True)]
    )


# ---- the file -----------------------------------------------------------------------------------------------------


def _meta(r: Result) -> dict[str, Any]:
    kept = {k: getattr(r, k) for k in ("coords", "unit", "recipe", "name", "notes", "baseline")}
    return storable({"format": FORMAT, "version": VERSION, "axes": list(r.axes), **kept})


def _read_meta(path: str | Path, raw: NDArray[Any]) -> dict[str, Any]:
    try:
        meta = json.loads(raw.tobytes().decode())
    except (ValueError, RecursionError):
        raise ConfigError(f"{path} is damaged: its description is not JSON") from None
    if not isinstance(meta, dict) or meta.pop("format", None) != FORMAT:
        raise ConfigError(f"{path} is not a saved Result (its description does not say {FORMAT!r})")
    version = meta.pop("version", None)
    if version != VERSION:
        raise ConfigError(
            f"{path} has format version {version!r}, this lab reads version {VERSION}; update the lab"
        )
    return meta


def _npy(array: NDArray[Any]) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=(1, 0), allow_pickle=False)
    return out.getvalue()


def _members(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as z:
            for info in z.infolist():
                # our own files are not compressed: a small file that unpacks to gigabytes is refused unread
                if info.compress_type != zipfile.ZIP_STORED:
                    raise ConfigError(
                        f"{path} is not a saved Result: its part {info.filename!r} is compressed"
                    )
            return {i.filename.removesuffix(".npy"): _array(z.read(i)) for i in z.infolist()}
    except FileNotFoundError:
        raise ConfigError(f"no file {path}; give the .npz that Result.save wrote") from None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError, NotImplementedError) as e:
        raise ConfigError(f"{path} is damaged or not a saved Result: {e}") from None


def _array(data: bytes) -> NDArray[Any]:
    """The array of one .npy text; the claimed size must be the real one, so that no header can ask for terabytes."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"array format {version}, expected (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    left, claimed = len(data) - stream.tell(), math.prod(shape) * dtype.itemsize
    if dtype.hasobject or fortran or left != claimed:
        raise ValueError(f"an array of {dtype} {shape} needs {claimed} bytes, {left} are there")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
