"""Variants: the model as it is, the same with each mechanism on, models trained otherwise, and the controls of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.carriers import VideoQA
from lab.errors import UsageError
from lab.mechanisms import load as mechanism_file
from lab.mechanisms import trained_with
from lab.model.ready import Ready
from lab.model.videollm import VideoLLM
from lab.model.zoo import load

VANILLA = "vanilla"


@dataclass(frozen=True)
class Variant:
    """One way to run: a model, the mechanisms that are on, and whose random control it is ("": nobody's)."""

    name: str
    model: VideoLLM
    mechanisms: tuple[Any, ...] = ()
    control_of: str = ""

    def prepared(self, item: VideoQA, sampling: Mapping[str, Any]) -> Ready:
        """The question as this variant reads it."""
        return self.model.prepare(item, mechanisms=self.mechanisms, **sampling)


def variants_of(models: Any, mechanisms: Any, *, controls: bool, seed: int) -> tuple[Variant, ...]:
    """Vanilla first, then the first model with each mechanism, then the other models; every one followed by its control.

    models      a model or the name of one; or name -> model, name, or (model, mechanisms): of these the first, without
                mechanisms, is vanilla, the others run with those given or else with those they were trained with
    mechanisms  one or several, or name -> one or several at once; a text names a file of the shelf, and means its EXAMPLE
    Raises UsageError for what is neither, and for two variants of one name.
    """
    named = dict(models) if isinstance(models, Mapping) else {VANILLA: models}
    if not named:
        raise UsageError("nothing to compare: no model was given")
    base, *others = [_model(name, given) for name, given in named.items()]
    if base.mechanisms:
        raise UsageError(
            f"the first model, {base.name!r}, is what the others are compared with; give it without mechanisms"
        )
    found = [base, *(Variant(n, base.model, m) for n, m in named_mechanisms(mechanisms).items()), *others]
    _check(found)
    return tuple(v for one in found for v in (one, *_control(one, controls, seed)))


def _model(name: str, given: Any) -> Variant:
    model, *asked = given if isinstance(given, tuple) else (given,)
    model = load(model) if isinstance(model, str) else model
    if not isinstance(model, VideoLLM):
        raise UsageError(
            f"{name!r} is a {type(model).__name__}; give a model of lab.load or lab.wrap, or its name"
        )
    if name == VANILLA and not asked:
        return Variant(name, model)
    return Variant(name, model, _several(asked[0]) if asked else trained_with(model))


def named_mechanisms(given: Any) -> dict[str, tuple[Any, ...]]:
    """Name -> the mechanisms that are on at once. Unnamed ones are called after their file."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {str(name): _several(m) for name, m in given.items()}
    out: dict[str, tuple[Any, ...]] = {}
    for one in given if isinstance(given, list | tuple) else [given]:
        several = _several(one)
        name = " + ".join(_called(m) for m in several)
        same = [n for n in out if n == name or n.startswith(f"{name} #")]
        out[f"{name} #{len(same) + 1}" if same else name] = several
    return out


def _several(given: Any) -> tuple[Any, ...]:
    return tuple(_mechanism(m) for m in (given if isinstance(given, list | tuple) else [given]))


def _mechanism(given: Any) -> Any:
    if isinstance(given, str):
        return mechanism_file(given.strip().replace("-", "_").replace(" ", "_")).EXAMPLE
    if not callable(getattr(given, "plan", None)) or isinstance(given, type):
        raise UsageError(
            f"{given!r} is no mechanism; give an instance of one of lab.mechanisms, or the name of its file"
        )
    return given


def _called(mechanism: Any) -> str:
    return type(mechanism).__module__.rpartition(".")[2].replace("_", " ")


def _control(one: Variant, wanted: bool, seed: int) -> list[Variant]:
    """The same with every mechanism in place of which a random one of its budget can stand."""
    if not wanted:
        return []
    made = [m.control(seed) if hasattr(m, "control") else None for m in one.mechanisms]
    if all(c is None for c in made):
        return []
    mixed = tuple(m if c is None else c for m, c in zip(one.mechanisms, made, strict=True))
    return [Variant(f"{one.name}, random", one.model, mixed, control_of=one.name)]


def _check(found: Sequence[Variant]) -> None:
    names = [v.name for v in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(f"two variants are called {name!r}; name them: {{'name': mechanism}}")
    if len(found) == 1:
        raise UsageError(
            f"one variant alone, {names[0]!r}, compares with nothing; give mechanisms, e.g. 'mixture_of_depths'"
        )
