"""What a search found, as policies: the final one, and the nested ones on the way to it and beyond (`ladder`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lab.edges.cuts import Cut
from lab.edges.fingerprints import CountInfo, LayoutInfo, ModelInfo, template_sha
from lab.edges.policy import Policy
from lab.edges.trials import Trials
from lab.edges.units import Roles, Unit, cuts_of, disjoint
from lab.result import Result

RULE = "causal-pairs, head-shared, all positions"


def as_policy(trials: Trials, roles: Roles, cut: Iterable[Unit], dead: Iterable[Unit]) -> Policy:
    """The policy that removes these units, with the model, layout and counts it was made on."""
    model, tokens = trials.model, trials.readies[0].maps[0]
    gone = set(cut)
    cuts = (*cuts_of(disjoint(gone)), *cuts_of(set(dead) - gone, "dead"))
    heads = model.cfg.n_heads if any(c.heads != "all" for c in cuts) else None
    policy = Policy(
        name="search", model=ModelInfo(id=model.cfg.model_name, layers=model.cfg.n_layers, heads=heads), cuts=cuts,
        layout=_layout(trials, roles),
    )  # fmt: skip
    return policy.model_copy(update={"count_": _count(trials, policy, tokens)})


def _layout(trials: Trials, roles: Roles) -> LayoutInfo:
    """Policies for any prompt name no template; others name theirs, if all calibration prompts share one."""
    if roles == "portable":
        return LayoutInfo(schema="portable", orphans="none")  # type: ignore[call-arg]
    shas = {template_sha(r.maps[0]) for r in trials.readies}
    return LayoutInfo(template_sha=shas.pop() if len(shas) == 1 else None, orphans="none")


def _count(trials: Trials, policy: Policy, tokens: Any) -> CountInfo:
    c = trials.model.cfg
    found = policy.count(tokens, c.n_layers, c.n_heads, trials.readies[0].item)
    return CountInfo(
        rule=RULE, kept_paper=round(found.kept_fraction, 4), kept_live=round(found.kept_live_fraction, 4)
    )


# ---- units as plain data --------------------------------------------------------------------------------------------


def plain_unit(unit: Unit) -> list[Any]:
    """[layer (1-based), q, k, where, heads] for JSON."""
    return [unit.layer + 1, unit.q, unit.k, unit.where, list(unit.heads)]


def unit_of(data: Sequence[Any]) -> Unit:
    """The way back."""
    return Unit(int(data[0]) - 1, str(data[1]), str(data[2]), str(data[3]), tuple(int(h) for h in data[4]))


# ---- policies along the way -----------------------------------------------------------------------------------------


def ladder(found: Policy, trail: Result) -> list[Policy]:
    """Nested policies: what the search had after each accepted trial, the one found, and on from there.

    Beyond it the units that were kept are cut too, those first that cost least when they were tried: what a search with
    a larger budget would begin with. For curves of accuracy against edges kept.
    """
    accepted = [
        [unit_of(u) for u in units]
        for ok, units in zip(_accepted(trail), trail.notes["cut"], strict=True)
        if ok
    ]
    kept = sorted(trail.notes["kept"], key=lambda row: row[5])
    out: list[Policy] = []
    gone: set[Unit] = set()
    for units in accepted:
        gone |= set(units)
        out.append(_rung(found, cuts_of(disjoint(gone)), len(out)))
    out = [*out[:-1], found] if out else [found]
    for row in kept:
        gone.add(unit_of(row))
        out.append(_rung(found, (*cuts_of(disjoint(gone)), *_dead(found)), len(out)))
    return out


def _accepted(trail: Result) -> list[bool]:
    return [bool(v) for v in trail.select(measure="accepted").values]


def _dead(found: Policy) -> tuple[Cut, ...]:
    return tuple(c for c in found.cuts if c.reason == "dead")


def _rung(found: Policy, cuts: tuple[Cut, ...], at: int) -> Policy:
    return Policy(name=f"search/{at + 1}", model=found.model, layout=found.layout, cuts=cuts)
