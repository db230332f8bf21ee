"""Variants: a base model trained on with a mechanism on, kept as a small folder beside it, not as a copy of it.

    delta.safetensors   low-rank delta of the base's decoder (`lab.model.lowrank`)
    variant.json        base, hash of its weights, the mechanisms as plain data, and what is to be known
    further files       of the mechanisms, e.g. routers.safetensors; a setting that names one means that file

`lab.load(folder)` gives the base with the delta on, and the mechanisms in `model.trained_with`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import ConfigError, ModelError
from lab.model import lowrank

FILE, DELTA = "variant.json", "delta.safetensors"


@dataclass(frozen=True)
class Variant:
    """What a folder holds. mechanisms: plain data (see `lab.mechanisms`), their files as full paths."""

    base: str
    weights: str | None
    delta: lowrank.Delta
    mechanisms: tuple[dict[str, Any], ...]
    about: dict[str, Any]

    def check(self, found: str | None, folder: str | Path) -> None:
        """Raises ConfigError where the base now has other weights (hash `found`) than the variant was trained on."""
        if found != self.weights:
            raise ConfigError(
                f"{folder} was trained on weights {self.weights} of {self.base!r}, which now has {found}; train it again"
            )


def is_variant(folder: str | Path) -> bool:
    """Whether the folder holds one."""
    return (Path(folder) / FILE).is_file()


def read(folder: str | Path) -> Variant:
    """Raises ConfigError if something is missing or is not what `write` wrote."""
    folder = Path(folder)
    try:
        said = json.loads((folder / FILE).read_text())
        base, weights, mechanisms = said.pop("base"), said.pop("weights"), said.pop("mechanisms")
        found = tuple({k: _file(folder, v) for k, v in m.items()} for m in mechanisms)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise ConfigError(f"{folder} holds no variant: {type(e).__name__} {e}") from None
    delta, _ = lowrank.load(folder / DELTA)
    return Variant(base, weights, delta, found, said)


def _file(folder: Path, value: Any) -> Any:
    inside = isinstance(value, str) and Path(value).name == value and value.endswith(".safetensors")
    return str((folder / value).resolve()) if inside else value


def write(
    folder: str | Path, delta: lowrank.Delta, mechanisms: Sequence[Mapping[str, Any]], *, base: str, weights: str | None,
    **about: Any,
) -> Path:  # fmt: skip
    """Write variant.json and delta.safetensors; the mechanisms' own files are the caller's."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    lowrank.save(delta, out / DELTA, base=base)
    said = {"base": base, "weights": weights, "mechanisms": [dict(m) for m in mechanisms], **about}
    (out / FILE).write_text(json.dumps(said, indent=2) + "\n")
    return out


def put_on(model: Any, folder: str | Path, found: str | None) -> Any:
    """The base model with the delta on for good. Raises ModelError for a variant of other weights."""
    variant = read(folder)
    try:
        variant.check(found, folder)
    except ConfigError as e:
        raise ModelError(str(e)) from None
    lowrank.put(model.lm, variant.delta)
    model.trained_with = variant.mechanisms
    return model
