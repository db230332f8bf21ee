"""The `where` of a cut: a small safe language over the query q and the key k of one edge.

    frame(q) > frame(k)      frame(q) - frame(k) > 2      pos(q) - pos(k) < 8 and not row(q) == row(k)

frame, row and col of a text position, and pos of a token not yet written, are unknown. What is unknown stays unknown
through comparisons, `and`, `or`, `not` (Kleene's logic), and only what is certainly true matches an edge.
Texts are parsed with `ast` and every node is checked against a short list; nothing is ever evaluated as Python.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lab.errors import ConfigError

MOST_CHARACTERS, LARGEST = 500, 10**6
COLUMNS = ("frame", "pos", "row", "col")
_COMPARE: dict[type[Any], Any] = {
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_ARITHMETIC: dict[type[Any], Any] = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_HELP = f"use {', '.join(COLUMNS)} of q or k, whole numbers, + - *, comparisons, and, or, not"

# column name -> float values, nan where unknown
Columns = Mapping[str, Tensor]
Truth = tuple[Tensor, Tensor]  # (certainly true, certainly false)


def parse_where(text: str) -> ast.expr:
    """The checked tree of a predicate. Raises ConfigError, one line, for anything outside the language."""
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"where has {len(text)} characters, at most {MOST_CHARACTERS}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        _check_truth(tree, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ConfigError(f"where {text[:60]!r} cannot be read; {_HELP}") from None
    return tree


def uses(tree: ast.expr, side: str) -> bool:
    """Whether the predicate asks anything of one side, "q" or "k"."""
    return any(isinstance(n, ast.Name) and n.id == side for n in ast.walk(tree))


def matches(tree: ast.expr, q: Columns, k: Columns) -> Bool[Tensor, "q k"]:
    """Which edges certainly fulfil the predicate; `q` and `k` hold the columns of the query and key positions asked."""
    sides = {
        "q": {n: c.double()[:, None] for n, c in q.items()},
        "k": {n: c.double()[None, :] for n, c in k.items()},
    }
    true, _ = _truth(tree, sides)
    return true.expand(len(q["pos"]), len(k["pos"]))


# ---- checking -------------------------------------------------------------------------------------------------------


def _check_truth(node: ast.expr, text: str) -> None:
    match node:
        case ast.BoolOp(values=values):
            for value in values:
                _check_truth(value, text)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            _check_truth(inner, text)
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(o) in _COMPARE for o in ops):
            for number in (left, *rest):
                _check_number(number, text)
        case _:
            raise _refused(node, text)


def _check_number(node: ast.expr, text: str) -> None:
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            _check_number(left, text)
            _check_number(right, text)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            _check_number(inner, text)
        case ast.Constant(value=int() as value) if not isinstance(value, bool) and value <= LARGEST:
            return
        case ast.Call(func=ast.Name(id=name), args=[ast.Name(id=side)], keywords=[]):
            if name not in COLUMNS or side not in ("q", "k"):
                raise _refused(node, text)
        case _:
            raise _refused(node, text)


def _refused(node: ast.expr, text: str) -> ConfigError:
    part = " ".join((ast.get_source_segment(text.strip(), node) or type(node).__name__).split())
    return ConfigError(f"where {text[:60]!r}: {part[:40]!r} is not allowed here; {_HELP}")


# ---- evaluating -----------------------------------------------------------------------------------------------------


def _truth(node: ast.expr, sides: dict[str, dict[str, Tensor]]) -> Truth:
    match node:
        case ast.BoolOp(op=op, values=values):
            first, *rest = (_truth(v, sides) for v in values)
            for other in rest:
                first = _both(first, other) if isinstance(op, ast.And) else _either(first, other)
            return first
        case ast.UnaryOp(operand=inner):
            true, false = _truth(inner, sides)
            return false, true
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            numbers = [_number(n, sides) for n in (left, *comparators)]
            out = _compared(ops[0], numbers[0], numbers[1])
            for op, a, b in zip(ops[1:], numbers[1:], numbers[2:], strict=False):
                out = _both(out, _compared(op, a, b))
            return out
        case _:
            raise AssertionError(f"unchecked node {node!r}")


def _both(a: Truth, b: Truth) -> Truth:
    return a[0] & b[0], a[1] | b[1]


def _either(a: Truth, b: Truth) -> Truth:
    return a[0] | b[0], a[1] & b[1]


def _compared(op: ast.cmpop, a: Tensor, b: Tensor) -> Truth:
    known = ~(a.isnan() | b.isnan())
    held = _COMPARE[type(op)](a, b)
    return held & known, ~held & known


def _number(node: ast.expr, sides: dict[str, dict[str, Tensor]]) -> Tensor:
    match node:
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_number(left, sides), _number(right, sides))
        case ast.UnaryOp(operand=inner):
            return -_number(inner, sides)
        case ast.Constant(value=value):
            device = next(iter(sides["q"].values())).device
            return torch.full((1, 1), float(str(value)), dtype=torch.float64, device=device)
        case ast.Call(func=ast.Name(id=name), args=[ast.Name(id=side)]):
            return sides[side][name]
        case _:
            raise AssertionError(f"unchecked node {node!r}")
