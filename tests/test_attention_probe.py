"""Attention maps: the pattern's own numbers, and a decoy that is looked at and does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lab.edges.pathways import cut_mask
from lab.edges.policy import Policy
from lab.edges.sweeping import sweep
from lab.errors import TooBig, UsageError
from lab.model.zoo import wrap
from lab.recipe import from_plain
from lab.sim.planted import planted_model, questions
from lab.slots import Plan
from probes import attention as module
from probes.attention import attention, causal, entropy, frame_map, heads, rows, sinks
from tests import families
from tests.families import FAMILIES, inputs
from tests.test_slots import Filling, Shorten

QUIET: dict[str, Any] = {"show_progress": False}
CUT = Policy.from_dict({"format": "edge-policy/1", "cuts": [{"layers": "2", "q": "last", "k": "video"}]})
EACH = pytest.mark.parametrize("name", FAMILIES)


def pattern(model: Any, ready: Any, layer: int, **how: Any) -> torch.Tensor:
    name = f"blocks.{layer}.attn.hook_pattern"
    with torch.no_grad():
        _, cache = model.run_with_cache(ready, names_filter=name, **how)
    return cache[name][0]


@EACH
def test_shares_are_those_of_the_pattern(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    names = ["video->last", "cross-frame", "text->text"]
    found = attention(model, ready, names, layers=[1, 4], causal=False, **QUIET)
    assert found.axes == ("item", "pathway", "layer", "head") and found.shape == (1, 3, 2, 4)
    for i, pathway in enumerate(names):
        mask = cut_mask(ready.tokens, pathway)
        for j, layer in enumerate((0, 3)):
            mine = pattern(model, ready, layer) * mask
            want = mine.sum(-1)[:, mask.any(1)].mean(-1)
            assert np.allclose(found.values[0, i, j], want, atol=1e-6)


@EACH
def test_the_causal_check_is_the_sweep_and_policies_compose(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    found = attention(model, ready, ["video->last"], **QUIET)
    swept = sweep(model, ready, ["video->last"], window=1, executor="reference", show_progress=False)
    assert np.allclose(causal(found).values, swept.values, atol=1e-3)
    under = attention(model, ready, ["video->last"], policy=CUT, **QUIET)
    assert (under.values[0, 0, 1] == 0).all() and (under.values[0, 0, 0] == found.values[0, 0, 0]).all()
    assert causal(under).values[0, 0, 1] == 0.0 and (abs(causal(under).values[0, 0, 2:]) > 0).all()


def test_a_decoy_is_looked_at_and_does_not_matter() -> None:
    model, items = planted_model("decoy"), questions(2, 0)
    best = heads(model, items, "video->last", top=3, **QUIET)
    assert "3.2" in best.coords["head"] and best.values[0, best.coords["head"].index("3.2")] > 0.99
    assert (best.values[1] == 0).all()
    real = heads(model, items, "option->last", top=2, layers=[3], **QUIET)
    assert real.coords["head"][0] == "3.0" and real.values[0, 0] > 0.99 and real.values[1, 0] < -50
    assert abs(real.values[1, 1]) < 1e-3
    found = attention(model, items, ["option->last", "video->option"], **QUIET)
    change = causal(found).mean("item").values.copy()
    assert change[0, 2] < -50 and change[1, 1] < -50  # option->last in layer 3, video->option in layer 2
    change[0, 2] = change[1, 1] = 0.0
    assert (abs(change) < 1e-3).all()  # and nowhere else


@EACH
def test_entropy_rows_frames_and_sinks_of_every_family(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    tokens, here = ready.tokens, pattern(model, ready, 2)
    spread = entropy(model, ready, ("video", "last"), layers=[3], **QUIET).values[0]
    by_hand = -(here * here.clamp(min=1e-30).log()).sum(-1)
    assert np.allclose(spread[1, 0], by_hand[:, -1], atol=1e-5)
    assert np.allclose(spread[0, 0], by_hand[:, tokens.where(role="frame")].mean(-1), atol=1e-5)
    assert np.array_equal(rows(model, ready, "last", layers=[3]).values[0, :, 0], here[:, -1].numpy())
    frames = frame_map(model, ready, layers=[3], causal=False, **QUIET).values[0, 0, 0]
    q, k = tokens.where(role="frame", frame=1), tokens.where(role="frame", frame=0)
    assert frames[1, 0] == pytest.approx(float(here.mean(0)[q][:, k].sum(-1).mean()), abs=1e-6)
    assert (np.triu(frames, 1) == 0).all()
    looked = sinks(model, ready, layers=[3], above=0.0, causal=False)
    even = 1 / torch.arange(1, ready.n_pos + 1)
    want = here.mean(0)[5:, 4].sum() / even[5:].sum()
    assert looked.values[0, 4] == pytest.approx(float(want), rel=1e-4) and looked.notes["sinks"]


def test_frame_maps_show_what_a_policy_cuts() -> None:
    model, item = planted_model(), questions(1, 0)[0]
    policy = Policy.from_dict(
        {
            "format": "edge-policy/1",
            "cuts": [{"layers": "1", "q": "video", "k": "video", "where": "frame(q) > frame(k)"}],
        }
    )
    found = frame_map(model, item, policy=policy, **QUIET)
    clean, cut = found.values[0]
    assert (
        found.coords["run"] == ["clean", "cut"]
        and np.tril(clean[0], -1).sum() > 1
        and np.tril(cut[0], -1).sum() == 0
    )
    change = found.notes["causal"][0]
    assert change[0] < -50 and all(abs(c) < 1e-3 for c in change[1:])  # planted: only layer 1 compares frames


def test_dropped_rows_are_left_out(wrapped: Any) -> None:
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**inputs("llava_onevision"))
    kept = torch.tensor([i for i, r in enumerate(ready.tokens.roles()) if r != "frame"])
    drop = Filling(Plan(detours=(Shorten(2, kept),)))
    found = attention(
        model, ready, ["video->last", "text->last"], mechanisms=[drop], causal=False, **QUIET
    ).values[0]
    assert (
        np.isfinite(found[:, :2]).all() and np.isnan(found[0, 2:]).all() and np.isfinite(found[1, 2:]).all()
    )
    assert (
        np.nan_to_num(
            rows(model, ready, mechanisms=[drop]).values[2][..., ready.tokens.where(role="frame")]
        ).max()
        == 0
    )


def test_layers_without_softmax_attention_are_left_out() -> None:
    model = wrap(families.build("qwen3_5"))
    ready = model.prepare_inputs(**inputs("qwen3_5"))
    assert attention(model, ready, ["video->last"], causal=False, **QUIET).coords["layer"] == [2, 4, 5]
    with pytest.raises(UsageError, match="no softmax attention"):
        attention(model, ready, ["video->last"], layers=[1], **QUIET)


def test_what_cannot_be_looked_at_is_named(wrapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("internvl")
    ready = model.prepare_inputs(**inputs("internvl"))
    for call, why in (
        (lambda: attention(model, ready, [], **QUIET), "0 pathways"),
        (lambda: attention(model, ready, ["vidoe->last"], **QUIET), "closest: video"),
        (lambda: heads(model, ready, "video->last", top=0, **QUIET), "top must be"),
        (lambda: rows(model, [ready, ready]), "one item at a time, got 2"),
        (lambda: causal(attention(model, ready, ["video->last"], causal=False, **QUIET)), "no causal check"),
        (
            lambda: attention(model, model.prepare_inputs(**inputs("internvl", worlds=2)), **QUIET),
            "one world at a time, got 2",
        ),
    ):
        with pytest.raises(UsageError, match=why):
            call()
    monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    with pytest.raises(TooBig, match=r"needs [\d,]+ bytes, more than a quarter of the 1,000"):
        attention(model, ready, ["video->last"], **QUIET)


def test_a_recipe_gives_a_result_and_its_causal_check() -> None:
    recipe = from_plain(
        {"kind": "probes.attention.AttentionRecipe", "items": {"sim": "moving_direction", "n": 1, "seed": 1}, "pathways": ["video->last"], "layers": [3, 8]}
    )  # fmt: skip
    found, effect = recipe.run(progress=False)
    assert (
        found.shape == (1, 1, 2, 4)
        and effect.axes == ("item", "pathway", "layer")
        and effect.recipe == recipe.plain()
    )
