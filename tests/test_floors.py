"""The floors: an import may only go down. Read from the source with `ast`; nothing is imported.

7  lab.cli lab.app figures      6  lab.comparison lab.learn lab.bench      5  probes (0-4), lab.view (torch-free half of 0)
4  lab.mechanisms (0-2) lab.sim lab.items      3  lab.edges lab.patch lab.generate lab.adapters (0-2)
2  lab.model      1  lab.video lab.pixels lab.prompt lab.runs ...    0  torch-free half, and the carriers with torch
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("lab", "probes", "figures")

# A module belongs to the longest name here that it is or lies in. Adding a room means saying here on which floor it is.
FLOOR = {
    "lab.errors": 0, "lab.result": 0, "lab.recipe": 0, "lab.overriding": 0, "lab.spans": 0, "lab.yamlfile": 0,
    "lab.axes": 0, "lab.carriers": 0, "lab.side": 0, "lab.slots": 0, "lab.settings": 0,
    "lab.video": 1, "lab.video_info": 1, "lab.video_sources": 1, "lab.video_files": 1, "lab.video_container": 1,
    "lab.pixels": 1, "lab.sizes": 1, "lab.routing": 1, "lab.quantising": 1,
    "lab.preprocessor": 1, "lab.resample": 1, "lab.prompt": 1, "lab.runs": 1,
    "lab.model": 2,
    "lab.edges": 3, "lab.patch": 3, "lab.generate": 3, "lab.adapters": 3, "lab.environment": 3,
    "lab.mechanisms": 4, "lab.sim": 4, "lab.items": 4, "lab.benchmark_rows": 1, "lab.benchmarks": 1,
    "lab.view": 5, "probes": 5,
    "lab.comparison": 6, "lab.learn": 6, "lab.bench": 6,
    "lab.cli": 7, "lab.app": 7, "figures": 7,
}  # fmt: skip
TORCH_FREE = (
    "lab.errors",
    "lab.result",
    "lab.recipe",
    "lab.overriding",
    "lab.benchmarks",
    "lab.benchmark_rows",
    "lab.spans",
    "lab.yamlfile",
    "lab.settings",
)
# Rooms that may import less than all below them: the floors, or rooms, they may use beside themselves.
HIGHEST = {
    "lab.edges": 2,
    "lab.patch": 3,  # continues the runs that lab.edges stores
    "lab.generate": 2,
    "lab.adapters": 2,
    "lab.mechanisms": 2,
    "probes": 4,
}
HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "nnsight",
    "captum",
    "jaxtyping",
    "einops",
    "accelerate",
)


@dataclass(frozen=True)
class Import:
    """One import statement's target, e.g. lab.carriers for `from lab.carriers import Frames`."""

    module: str
    name: str  # what is taken from it, "" for `import module`
    line: int
    typing_only: bool
    lazy: bool  # inside a function


@dataclass(frozen=True)
class Source:
    name: str
    tree: ast.Module

    def __str__(self) -> str:
        return self.name


def sources(root: Path) -> dict[str, Source]:
    """All modules of the project by dotted name; a package has the name of its folder."""
    found: dict[str, Source] = {}
    for top in TOPS:
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Source(name, ast.parse(path.read_text(encoding="utf-8")))
    return found


def imports(tree: ast.AST, typing_only: bool = False, lazy: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                yield from (Import(a.name, "", node.lineno, typing_only, lazy) for a in node.names)
            case ast.ImportFrom():
                module = "." * node.level + (node.module or "")
                yield from (Import(module, a.name, node.lineno, typing_only, lazy) for a in node.names)
            case ast.If() if "TYPE_CHECKING" in ast.unparse(node.test):
                yield from imports(ast.Module(node.body, []), True, lazy)
                yield from imports(ast.Module(node.orelse, []), typing_only, lazy)
            case _:
                inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from imports(node, typing_only, lazy or inside)


def room(module: str) -> str | None:
    """The entry of FLOOR that the module belongs to."""
    fits = [r for r in FLOOR if module == r or module.startswith(r + ".")]
    return max(fits, key=len) if fits else None


def target(i: Import, known: dict[str, Source]) -> str | None:
    """The project's module that is imported, None for foreign ones."""
    inner = f"{i.module}.{i.name}"
    module = inner if i.name and inner in known else i.module
    return module if module.split(".")[0] in TOPS else None


def uses(name: str, known: dict[str, Source]) -> list[tuple[str, Import]]:
    return [(t, i) for i in imports(known[name].tree) if (t := target(i, known))]


def breaks(user: str, used: str) -> str | None:
    """Why `user` may not import `used`, None if it may."""
    a, b = room(user), room(used)
    if a is None or b is None:
        return (
            f"{user if a is None else used} belongs to no floor; say in tests/test_floors.py on which it is"
        )
    if a == b:
        return "mechanisms never import each other" if a == "lab.mechanisms" and user != used else None
    if {a, b} == {"probes", "lab.view"}:
        return "probes and views never meet; a Result passes between them"
    if a == "lab.view" or a in TORCH_FREE:
        return None if b in TORCH_FREE else f"{a} may use only {', '.join(TORCH_FREE)}"
    if a == "lab.items" and FLOOR[b] > 1:
        return "lab.items may use floors 0 and 1"
    highest = HIGHEST.get(a, FLOOR[a])
    return f"{a} may use floors 0-{highest}, {b} is on floor {FLOOR[b]}" if FLOOR[b] > highest else None


def knots(graph: dict[str, set[str]]) -> list[list[str]]:
    """The cycles of an import graph: groups of modules each of which reaches all others (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[str]] = []

    def visit(v: str) -> None:
        index[v] = low[v] = len(index)
        stack.append(v)
        for w in sorted(graph.get(v, ())):
            if w not in index:
                visit(w)
            if w in stack:
                low[v] = min(low[v], low[w])
        if low[v] == index[v]:
            group = [stack.pop()]
            while group[-1] != v:
                group.append(stack.pop())
            if len(group) > 1 or v in graph.get(v, ()):
                out.append(sorted(group))

    for v in sorted(graph):
        if v not in index:
            visit(v)
    return out


KNOWN = sources(ROOT)
INNER = [n for n in KNOWN if n != "lab"]  # the root only hands things out, lazily


def says_something(tree: ast.Module) -> bool:
    """Whether a package's `__init__` holds more than its docstring."""
    return any(not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) for n in tree.body)


def test_every_module_is_on_a_floor() -> None:
    lost = [n for n in INNER if room(n) is None]
    assert not lost, f"on no floor: {lost}; say in tests/test_floors.py where they belong"
    assert {"lab.errors", "lab.carriers", "lab.cli.main"} <= set(INNER), (
        "the reader of sources finds too little"
    )


@pytest.mark.parametrize("name", INNER)
def test_imports_go_down(name: str) -> None:
    wrong = [f"line {i.line}: {used}: {why}" for used, i in uses(name, KNOWN) if (why := breaks(name, used))]
    assert not wrong, f"{name} {wrong}"


def test_nothing_imports_the_package_root_or_relatively() -> None:
    wrong = [
        f"{n} line {i.line}"
        for n in INNER
        for i in imports(KNOWN[n].tree)
        if target(i, KNOWN) == "lab" or i.module.startswith(".")
    ]
    assert not wrong, f"say `from lab.module import name`: {wrong}"


def test_torch_free_rooms_import_no_torch() -> None:
    """Redrawing a figure and `--help` must be instant. The command line may import torch inside functions."""
    light = [n for n in INNER if room(n) in (*TORCH_FREE, "lab.view", "lab.cli")]
    wrong: list[str] = []
    for name in light:
        for i in imports(KNOWN[name].tree):
            late = i.typing_only or (i.lazy and room(name) == "lab.cli")
            used = target(i, KNOWN)
            heavy = i.module.split(".")[0] in HEAVY or (
                used is not None and room(used) not in (*TORCH_FREE, "lab.view", "lab.cli")
            )
            if heavy and not late:
                wrong.append(f"{name} line {i.line}: {i.module}")
    assert not wrong, wrong


def test_no_import_cycles() -> None:
    """Imports inside functions count; imports for type checkers do not."""
    graph = {n: {u for u, i in uses(n, KNOWN) if not i.typing_only} for n in KNOWN}
    assert knots(graph) == []


def test_no_public_function_shares_its_name_with_a_module() -> None:
    """An attribute of a package that is both becomes the module once that is imported.

    A function may bear its own file's name only where the package's `__init__` hands nothing out.
    """
    wrong: list[str] = []
    for name in INNER:
        package, _, stem = name.rpartition(".")
        beside = {n.rpartition(".")[2] for n in INNER if n.rpartition(".")[0] == package}
        quiet = package in KNOWN and not says_something(KNOWN[package].tree)
        for node in KNOWN[name].tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in beside - ({stem} if quiet else set()):
                wrong.append(f"{name}.{node.name}")
    assert not wrong, f"also the name of a module beside it: {wrong}"


def test_the_surface_shares_no_name_with_a_module() -> None:
    table = next(
        n
        for n in KNOWN["lab"].tree.body
        if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_SURFACE"
    )
    handed_out = {name for name, (_, attribute) in ast.literal_eval(table.value).items() if attribute}
    assert handed_out and not handed_out & {n.split(".")[1] for n in INNER if n.startswith("lab.")}


@pytest.mark.parametrize(
    ("user", "used", "allowed"),
    [
        ("lab.carriers", "lab.errors", True),
        ("lab.errors", "lab.carriers", False),
        ("lab.model.zoo", "lab.video", True),
        ("lab.video", "lab.model.zoo", False),
        ("probes.knockout", "lab.view.draw", False),
        ("lab.view.draw", "probes.knockout", False),
        ("lab.view.draw", "lab.carriers", False),
        ("lab.mechanisms.a", "lab.mechanisms.b", False),
        ("lab.mechanisms.a", "lab.patch", False),
        ("lab.items", "lab.model.zoo", False),
        ("lab.cli.main", "probes.knockout", True),
        ("lab.nowhere", "lab.errors", False),
    ],
)
def test_the_rules_say_what_the_design_says(user: str, used: str, allowed: bool) -> None:
    assert (breaks(user, used) is None) == allowed


def test_the_reader_of_imports_sees_every_form() -> None:
    text = "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\ndef f():\n    try:\n        from .g import h\n    except E: pass"
    seen = [(i.module, i.name, i.typing_only, i.lazy) for i in imports(ast.parse(text))]
    assert seen == [
        ("a.b", "", False, False),
        ("c", "d", False, False),
        ("e", "", True, False),
        (".g", "h", False, True),
    ]
    assert knots({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
