"""The shelf of figures: every `fig_NN_name.py` with its `fig_NN_name.yaml` is on it; nothing is registered. Torch-free."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lab.errors import ConfigError, UsageError
from lab.recipe import FigureRecipe, load

HERE = Path(__file__).resolve().parent
_FILE = re.compile(r"fig_(\d+)_(\w+)")


@dataclass(frozen=True)
class Entry:
    """One figure: its number in the set, its name, its script, and the recipe beside it."""

    number: int
    name: str
    script: Path

    @property
    def recipe_file(self) -> Path:
        return self.script.with_suffix(".yaml")

    @property
    def module(self) -> ModuleType:
        """The script, imported; that needs no torch."""
        return importlib.import_module(f"figures.{self.script.stem}")

    @property
    def title(self) -> str:
        """First sentence of the script's docstring."""
        return " ".join((self.module.__doc__ or self.name).split("\n\n")[0].split()).rstrip(".")

    def recipe(self) -> FigureRecipe:
        """The recipe beside the script. Raises ConfigError if it is none of a figure."""
        found = load(self.recipe_file)
        if not isinstance(found, FigureRecipe):
            raise ConfigError(f"{self.recipe_file}: {found.kind} is no recipe of a figure")
        return found

    def measuring(self) -> str:
        """Hash of the part of the script that `compute` reaches: drawing may change without a new measurement."""
        tree = ast.parse(self.script.read_text(encoding="utf-8"))
        parts = {name: node for node in tree.body for name in _names(node)}
        reached, todo = set[str](), ["compute"]
        while todo:
            name = todo.pop()
            if name in parts and name not in reached:
                reached.add(name)
                todo += [n.id for n in ast.walk(parts[name]) if isinstance(n, ast.Name)]
        text = "\n".join(f"{n}: {ast.dump(parts[n])}" for n in sorted(reached))
        return hashlib.sha256(text.encode()).hexdigest()


def _names(node: ast.stmt) -> list[str]:
    """What a statement of a module defines."""
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Assign():
            return [t.id for t in node.targets if isinstance(t, ast.Name)]
        case ast.ImportFrom() | ast.Import():
            return [a.asname or a.name for a in node.names]
        case _:
            return []


def shelf() -> list[Entry]:
    """All figures, by number."""
    found = [(m, p) for p in HERE.glob("fig_*.py") if (m := _FILE.fullmatch(p.stem))]
    return sorted((Entry(int(m[1]), m[2], p) for m, p in found), key=lambda e: e.number)


def find(name: str) -> Entry:
    """A figure by name, number, or file name. Raises UsageError with the closest names."""
    wanted = Path(name).stem.removeprefix("fig_")
    for entry in shelf():
        if wanted in (entry.name, str(entry.number), f"{entry.number:02}", f"{entry.number:02}_{entry.name}"):
            return entry
    names = [e.name for e in shelf()]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.3) or names
    raise UsageError(f"no figure {name!r}; closest: {', '.join(near)}")
