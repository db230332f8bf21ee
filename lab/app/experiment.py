"""Experiment files: what the explorer saves and opens: a recipe that `vlab run` carries out, or a policy alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lab.edges.policy import Policy
from lab.errors import ConfigError, UsageError
from lab.recipe import ItemSpec, dump, from_plain
from lab.result import plain
from lab.yamlfile import parse_yaml, read_text
from probes.answers import AnswersRecipe
from probes.asking import recipe_fields

SUFFIXES = (".yaml", ".yml")


def save(path: str | Path, model: Any, ready: Any, policy: Policy, view: dict[str, Any]) -> str:
    """Write an experiment; says in a sentence what was written.

    Where model or item cannot be named again (arrays, wrapped models) the policy alone is written: cuts still reopen.
    Raises UsageError for a name that does not end in .yaml.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UsageError(f"{str(path)[:200]!r} does not end in .yaml; name the file so")
    fields = recipe_fields(model, ready, 8, policy, ())
    if fields is None or ready.plan != type(ready.plan)():
        policy.save(path)
        return f"saved the policy alone in {path}: this model, item or mechanism cannot be named in a file"
    fields["items"] = tuple(_placed(i, Path(path).resolve().parent) for i in fields["items"])
    recipe = AnswersRecipe(**fields, view=plain(view, "view"))
    dump(recipe, path)
    return f"saved {path}; `vlab run {path}` gives the same numbers"


def load(path: str | Path) -> tuple[Policy, dict[str, Any], tuple[str, ...]]:
    """(policy, view, ids of the items it was about) of an experiment or a policy file. Raises ConfigError."""
    data, name = parse_yaml(read_text(path), str(path)), Path(path).name
    if isinstance(data, dict) and "kind" not in data:
        return Policy.from_dict(data, name), {}, ()
    recipe = from_plain(data, name)
    if not isinstance(recipe, AnswersRecipe):
        raise ConfigError(
            f"{name} is a {recipe.kind}; the explorer opens experiments it saved, and edge policies"
        )
    policy = Policy(cuts=()) if recipe.policy is None else Policy.from_dict(recipe.policy, name)
    ids = tuple(s.id for s in recipe.items) if isinstance(recipe.items, tuple) else ()
    return policy, recipe.view, ids


def _placed(item: ItemSpec, folder: Path) -> ItemSpec:
    """The item with its video's path from the file's folder if it lies below it, else in full."""
    video = Path(item.video.path).resolve()
    path = video.relative_to(folder) if video.is_relative_to(folder) else video
    return item.model_copy(update={"video": item.video.model_copy(update={"path": str(path)})})
