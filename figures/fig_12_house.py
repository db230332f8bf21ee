"""The house: which room imports which, read from the source; filled are the rooms that one question to the model enters.

A room is a module or package right below `lab`, or `probes` or `figures`. Rooms stand on floors: each one above all it
imports, so an arrow can only point down. Nothing is drawn by hand.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from figures.base import PictureRecipe
from lab.errors import RunError
from lab.result import Result
from lab.view.plates import FULL, Plate
from lab.view.specs import FigureSpec, figure_spec

TOPS = ("lab", "probes", "figures")
# one question, in a process of its own: what is imported by then is what it enters
ASK = """
import json, sys
from lab.recipe import from_plain
model, items = from_plain(json.load(sys.stdin)).loaded()
model.answer(model.prepare(items[0], int(sys.argv[1])))
print("\\n".join(sorted(m for m in sys.modules if m.split(".")[0] in ("lab", "probes", "figures"))))
"""


class HouseRecipe(PictureRecipe):
    """items: the first one is asked, to see which rooms that enters."""


def compute(recipe: HouseRecipe, *, progress: bool = True) -> list[Result]:
    """One Result, axes (room, imported): how many modules of a room import the other, with floors and lines in its notes."""
    found = modules()
    rooms = sorted({room(m) for m in found})
    links = np.zeros((len(rooms), len(rooms)), int)
    for module, path in found.items():
        for used in {room(u) for u in imported(path, found)} - {room(module)}:
            links[rooms.index(room(module)), rooms.index(used)] += 1
    graph = {r: {rooms[j] for j in np.flatnonzero(row)} for r, row in zip(rooms, links, strict=True)}
    lines = {r: sum(_lines(p) for m, p in found.items() if room(m) == r) for r in rooms}
    notes = {
        "floor": floors(graph),
        "lines": lines,
        "entered": sorted({room(m) for m in _entered(recipe) if m in found}),
        "model": recipe.model.name,
        "modules": len(found),
    }
    return [
        Result(
            links,
            ("room", "imported"),
            {"room": rooms, "imported": rooms},
            "modules that import it",
            {},
            "the house",
            notes,
        )
    ]


def modules() -> dict[str, Path]:
    """Every module of the project that can be imported here, by dotted name; a package has the name of its folder."""
    out: dict[str, Path] = {}
    for top in TOPS:
        spec = find_spec(top)
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*.py")):
            parts = (top, *path.relative_to(root).with_suffix("").parts)
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def room(module: str) -> str:
    """`lab.edges` of `lab.edges.fast`; `probes` of `probes.lens`."""
    return ".".join(module.split(".")[:2]) if module.startswith("lab.") else module.split(".")[0]


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """Modules of the project that a file imports when it runs: those for type checkers alone, and the root, left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _running(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else _from(node, known)
        yield from (n for n in names if n in known and n not in ("lab",))


def _running(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from _running(node)


def _from(node: ast.ImportFrom, known: Mapping[str, Path]) -> list[str]:
    module = node.module or ""
    return [inner if (inner := f"{module}.{a.name}") in known else module for a in node.names]


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """0 for rooms that import none; else one above the highest imported. Raises RunError for rooms that import each other."""

    @cache
    def floor(name: str) -> int:
        if name in path:
            raise RunError(
                f"{name} imports itself by way of {' and '.join(path[path.index(name) + 1 :])}; a house has no such stairs"
            )
        path.append(name)
        found = 1 + max((floor(u) for u in graph[name]), default=-1)
        path.pop()
        return found

    path: list[str] = []
    return {name: floor(name) for name in graph}


def _lines(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())


def _entered(recipe: HouseRecipe) -> list[str]:
    root = str(modules()["figures"].parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(recipe.n_frames)], input=json.dumps(recipe.plain()), capture_output=True, text=True,
        cwd=str(recipe.folder), env={**_environment(), "PYTHONPATH": root},
    )  # fmt: skip
    if done.returncode:
        raise RunError(f"asking {recipe.model.name} failed: {' '.join(done.stderr.split())[-300:]}")
    return done.stdout.split()


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def draw(results: Sequence[Result]) -> Plate:
    """Rooms on their floors, the lowest at the bottom."""
    (house,) = results
    floor, lines = house.notes["floor"], house.notes["lines"]
    total, n = sum(lines.values()), len(floor)
    spec = _graph(house)
    return Plate(
        "The house: who imports whom", ((spec,),),
        f"Import graph of the code: {n} rooms, {house.notes['modules']} modules, {total:,} lines that are not empty. A room stands above all that it imports, "
        f"so every line leads down; stronger lines stand for more importing modules. Filled: the {len(house.notes['entered'])} rooms that one question "
        f"to {house.notes['model']} enters. Below each name, its lines. n = 1 question.",
        width=FULL, heights=(0.52 * (max(floor.values()) + 1),), letters=False,
    )  # fmt: skip


def _graph(house: Result) -> FigureSpec:
    floor: dict[str, int] = house.notes["floor"]
    rooms = house.coords["room"]
    top = max(floor.values())
    places = np.zeros((len(rooms), 2))
    for level in range(top + 1):
        here = [r for r in rooms if floor[r] == level]
        for i, r in enumerate(here):
            # neighbours on a crowded floor stand a little higher and lower, so that names do not touch
            sway = 0.0 if len(here) < 9 else (0.22 if i % 2 else -0.22)
            places[rooms.index(r)] = (i + 0.5) / len(here), (level + 0.5 + sway) / (top + 1)
    names = [f"{r.removeprefix('lab.')}\n{house.notes['lines'][r]:,}" for r in rooms]
    notes: dict[str, Any] = {
        "places": places.tolist(),
        "marked": [r in house.notes["entered"] for r in rooms],
    }
    named = replace(house, coords={"room": names, "imported": names}, notes=notes)
    return replace(figure_spec(named, kind="graph", title="", caption=""), title="")
