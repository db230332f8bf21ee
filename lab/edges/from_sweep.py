"""From curves to a policy: keep each pathway only in the layers where cutting it hurts (Map the Flow, effective pathways).

A curve says what one pathway is worth with all others in place; a policy cuts them together. Whether the answers stand
that is for `lab.edges.evaluate` to say: two pathways that stand in for each other both look worthless alone.
"""

from __future__ import annotations

from lab.edges.cuts import Cut
from lab.edges.fingerprints import ModelInfo
from lab.edges.pathnames import CROSS_FRAME, Part, parts_of
from lab.edges.policy import Policy
from lab.edges.presets import CROSS
from lab.edges.ranges import layer_text
from lab.errors import UsageError
from lab.result import Result


def effective(found: Result, *, at_least: float = 5.0) -> Policy:
    """The policy that cuts every pathway of a sweep in the layers where that alone cost less than `at_least`.

    found     what `lab.edges.sweep` or `probes.knockout` returned, axes (item, pathway, layer) or (pathway, layer)
    at_least  in units of the sweep (percent of the answer's probability); the mean over items is taken
    Windows wider than one layer smear: a layer counts as needed where the window round it is.
    Raises UsageError for other Results, named pathways (their edges are not in the Result), and a bar of 0 or less.
    """
    if not at_least > 0:
        raise UsageError(f"at_least must be above 0, got {at_least!r}: below it every layer would be needed")
    curves = found.mean("item") if "item" in found.axes else found
    if curves.axes != ("pathway", "layer"):
        raise UsageError(f"expected a sweep with axes (item, pathway, layer), got {found.axes}")
    layers = [int(n) for n in curves.coords["layer"]]
    cuts = [
        cut
        for name, curve in zip(curves.coords["pathway"], curves.values, strict=True)
        for cut in _cuts(name, [n - 1 for n, v in zip(layers, curve, strict=True) if not v <= -at_least])
    ]
    about = f"every pathway is kept where cutting it alone costs at least {at_least:g} ({found.unit})"
    return Policy(name="effective", model=ModelInfo(layers=max(layers)), cuts=tuple(cuts), notes=about)


def _cuts(pathway: str, layers: list[int]) -> list[Cut]:
    """The pathway's edges in these layers (0-based); none where there is no layer."""
    text = layer_text(layers)
    if not text:
        return []
    if pathway == CROSS_FRAME:
        return [Cut(layers=text, q="video", k="video", where=CROSS, reason=pathway)]
    return [
        Cut(layers=text, q=p.queries, k=p.keys, where=p.where or None, reason=pathway)
        for p in _parts(pathway)
    ]


def _parts(pathway: str) -> list[Part]:
    try:
        return parts_of(pathway)
    except UsageError as e:
        raise UsageError(
            f"{e}; sweep without names of your own, so that the Result says what was cut"
        ) from None
