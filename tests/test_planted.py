"""Planted models: they answer, and every claim about their circuits is proved by cutting it."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from lab.errors import UsageError
from lab.model.verifying import audit, verify
from lab.sim.planted import (
    HEADS,
    LAYERS,
    SEGMENTS,
    TRUTH,
    Edge,
    Truth,
    all_edges,
    heads_cut,
    planted_model,
    questions,
)
from probes.knockout import knockout
from probes.pathways import cut_mask

SAME = 1e-6  # largest change of any probability that counts as none
VARIANTS = list(TRUTH)


@pytest.fixture(scope="module")
def planted():
    made = {}

    def get(variant):
        if variant not in made:
            model = planted_model(variant)
            made[variant] = model, [model.prepare(q) for q in questions(3, seed=4)]
        return made[variant]

    return get


def probs(model, ready, edges=()):
    """Probabilities of the next token with some edges cut, [d_vocab]."""
    cut = defaultdict(lambda: torch.zeros(HEADS, len(ready.tokens), len(ready.tokens), dtype=torch.bool))
    for e in edges:
        mask = cut_mask(ready.tokens, e.pathway)
        assert mask.any(), e
        cut[e.layer][list(e.heads)] |= mask
    keep = {layer: (lambda q, k, c=c: ~c[:, q][:, :, k]) for layer, c in cut.items()}
    with torch.no_grad():
        return model(ready, edges=keep or None)[0, -1].softmax(-1)


def change(model, ready, edges):
    return float((probs(model, ready, edges) - probs(model, ready)).abs().max())


def others(e: Edge) -> Edge:
    """The same edges in all heads that the truth does not name."""
    return Edge(e.layer, e.pathway, tuple(h for h in range(HEADS) if h not in e.heads))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_answers_and_its_twin_too(variant, planted):
    model, _ = planted(variant)
    for q in questions(24, seed=9):
        for one in (q, q.twin):
            answer = model.answer(model.prepare(one))
            assert answer.correct and answer.letter_probs.max() > 0.9
        assert q.answer != q.twin.answer


def test_it_is_an_ordinary_checkpoint(planted):
    model, ready = planted("plain")
    verify(model)
    audit(model)
    roles = dict.fromkeys(ready[0].tokens.roles())
    assert {s.partition(":")[0] for s in SEGMENTS} == set(roles), "the segments are all there is"


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_irrelevant_edge_does_anything(variant, planted):
    """Every pair of segments in every layer, one after the other."""
    model, ready = planted(variant)
    truth = TRUTH[variant]
    clean = probs(model, ready[0])
    edges = truth.irrelevant()
    assert len(edges) > 400
    wrong = {e: d for e in edges if (d := float((probs(model, ready[0], [e]) - clean).abs().max())) > SAME}
    assert not wrong


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_irrelevant_edges_at_once_do_nothing(variant, planted):
    """And beside them, in the heads that are not named, those of the circuit itself."""
    model, ready = planted(variant)
    edges = TRUTH[variant].irrelevant() + [others(e) for e in all_edges(TRUTH[variant])]
    for one in ready:
        assert change(model, one, edges) <= SAME
        kept = len(edges) + len(list(all_edges(TRUTH[variant])))
        assert kept > 400


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_edge_of_the_circuit_matters(variant, planted):
    model, ready = planted(variant)
    for e in TRUTH[variant].matters:
        effects = [change(model, one, [e]) for one in ready]
        # an option's letter is missed where that option is the answer; the others by what they took of the attention
        assert max(effects) > (1e-5 if e.pathway.startswith("option:") else 0.1), e
        assert min(effects) > SAME, e


@pytest.mark.parametrize("edge", [Edge(0, "cross-frame"), Edge(1, "video->option")])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_the_comparison_all_options_are_alike(variant, edge, planted):
    """What a frame reads of itself is not enough, and neither is what the options read of each other."""
    model, ready = planted(variant)
    letters = torch.tensor([model.tokenizer.convert_tokens_to_ids(x) for x in "ABCD"])
    for one in ready:
        cut = probs(model, one, [edge])[letters]
        assert float(cut.max() - cut.min()) < 1e-3 < float(cut.min())


@pytest.mark.parametrize("variant", ["plain", "leak", "decoy"])
def test_the_answer_is_lost_without_its_way_to_the_last_position(variant, planted):
    model, ready = planted(variant)
    late = [e for e in TRUTH[variant].matters if e.layer >= 2]
    assert late
    for one in ready:
        right = int(probs(model, one).argmax())
        assert all(probs(model, one, [e])[right] < 0.1 for e in late)


def test_either_route_alone_is_enough_and_none_is_not(planted):
    model, ready = planted("redundant")
    first, second = TRUTH["redundant"].redundant
    for one in ready:
        right = int(probs(model, one).argmax())
        for route in (first, second):
            for e in route:
                assert change(model, one, [e]) <= SAME, e
            assert change(model, one, list(route)) <= SAME
        for a in first:
            for b in second:
                assert probs(model, one, [a, b])[right] < 0.1, (a, b)


def test_the_leak_runs_through_the_template(planted):
    """Cutting what a paper would cut (options and question to last) leaves the answer whole."""
    model, ready = planted("leak")
    for one in ready:
        usual = [
            Edge(layer, f"{k}->last", tuple(range(HEADS)))
            for layer in range(LAYERS) for k in ("question", "option", "instruction", "video")
        ]  # fmt: skip
        assert change(model, one, usual) <= SAME
    plain, ready = planted("plain")
    assert change(plain, ready[0], usual) > 0.1


def test_the_decoy_has_the_attention_and_no_effect(planted):
    model, ready = planted("decoy")
    (decoy,) = TRUTH["decoy"].decoys
    for one in ready:
        _, cache = model.run_with_cache(one, names_filter=f"blocks.{decoy.layer}.attn.hook_pattern")
        pattern = cache[f"blocks.{decoy.layer}.attn.hook_pattern"][0, decoy.heads[0], -1]
        assert float(pattern[one.tokens.where(role="video")].sum()) > 0.99
        assert change(model, one, [decoy]) <= SAME
        _, cache = model.run_with_cache(one, names_filter=f"blocks.{decoy.layer}.attn.hook_z")
        z = cache[f"blocks.{decoy.layer}.attn.hook_z"][0, -1, decoy.heads[0]]
        assert float(z.abs().max()) > 0.01, "it does carry something"


def test_the_trace_shows_the_circuit(planted):
    """The knock-out probe, one layer at a time, points at the layers the truth names and at no other."""
    model, ready = planted("plain")
    ways = ["cross-frame", "video->option", "option->last", "video->last"]
    with pytest.warns(UserWarning, match="changed nothing"):
        curves = knockout(model, ready[:2], ways, window=1, show_progress=False).values
    seen = (abs(curves) > 1e-2).all(0)
    assert seen.nonzero()[0].tolist() == [0, 1, 2] and seen.nonzero()[1].tolist() == [0, 1, 2]


def test_heads_are_cut_one_by_one(planted):
    model, ready = planted("plain")
    one = ready[0]
    mask = cut_mask(one.tokens, "option->last")
    with torch.no_grad():
        cut = {h: model(one, edges={2: heads_cut(mask, (h,))})[0, -1] for h in range(HEADS)}
        clean = model(one)[0, -1]
    assert not torch.allclose(cut[0], clean, atol=0.1)
    assert all(torch.allclose(cut[h], clean, atol=1e-5) for h in range(1, HEADS))


def test_what_covers_what():
    e = Edge(1, "video->option")
    assert (
        e.covers(1, "frame:3", "option:0")
        and not e.covers(1, "frame:3", "last")
        and not e.covers(2, "frame:3", "option:0")
    )
    assert not Edge(0, "option:1->option:1").covers(0, "option:0", "option:1")
    assert len(Truth(()).irrelevant()) == LAYERS * len(
        {(k, q) for i, q in enumerate(SEGMENTS) for k in SEGMENTS[: i + 1]}
    )


def test_walks_of_any_pace_are_answered_too():
    """Thousands of different questions, for evidence on held-out ones."""
    model, items = planted_model("plain"), questions(40, 3, steady=False)
    assert (
        len({i.video.tobytes() for i in items}) > 30
        and len({i.video.tobytes() for i in questions(40, 3)}) <= 16
    )
    assert all(model.answer(i).correct for i in items)
    assert all(model.answer(i.twin).correct for i in items[:10])


def test_an_unknown_variant_is_named():
    with pytest.raises(UsageError, match="no planted model 'plane'; there are plain, leak"):
        planted_model("plane")  # type: ignore[arg-type]
