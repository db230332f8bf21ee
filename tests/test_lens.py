"""Logit lens: equal to what others compute, to the model's own answer at the end, and to planted truth in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lab.adapters.nnsight import tracing
from lab.adapters.transformer_lens import bridge
from lab.edges.policy import Policy
from lab.errors import ConfigError, UsageError
from lab.model.zoo import load, wrap
from lab.recipe import from_plain
from lab.result import Result
from lab.sim.planted import planted_model, questions
from lab.sim.tasks import draw_items
from lab.slots import Plan
from lab.view.panels import panels
from lab.view.words import paint, shown
from probes import unembedding
from probes.lens import gen_prob, lens, painted, vocabulary, words
from probes.tuned_lens import TunedLens, tune
from probes.unembedding import chunk_rows, said_by
from probes.wordlists import groups_of
from tests import families
from tests.families import FAMILIES, LAYERS, VOCAB, inputs
from tests.test_slots import Filling, Shorten

EACH = pytest.mark.parametrize("name", FAMILIES)
QUIET: dict[str, Any] = {"show_progress": False}
CUT = Policy.from_dict({"format": "edge-policy/1", "cuts": [{"layers": "1-5", "q": "*", "k": "video"}]})


def by_hand(model: Any, ready: Any, layer: int, **how: Any) -> torch.Tensor:
    """Log probabilities at a layer's resid_post, [pos, d_vocab], from a cache."""
    name = f"blocks.{layer}.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(ready, names_filter=name, **how)
        return model.unembed(model.ln_final(cache[name]))[0].log_softmax(-1)


# ---- the same numbers as elsewhere ----------------------------------------------------------------------------------


@EACH
def test_the_last_layer_says_what_the_model_says(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    for policy in (None, CUT):
        with torch.no_grad():
            p = model(ready, policy=policy)[0, -1].softmax(-1)
        clean = int(model(ready)[0, -1].argmax())
        found = lens(model, ready, policy=policy, **QUIET)
        assert found.axes == ("item", "word", "layer", "role") and found.shape == (1, 1, LAYERS, 1)
        assert found.values[0, 0, -1, 0] == pytest.approx(float(p[clean]), rel=1e-5)


@EACH
def test_every_token_of_every_layer_against_a_cache(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    token, tokens = 33, ready.tokens
    found = lens(model, ready, "video", words=[token], measure="logp", by="patch", **QUIET)
    ranks = lens(model, ready, "video", words=[token], measure="rank", by="patch", **QUIET)
    frames = lens(model, ready, "video", words=[token], measure="logp", by="frame", **QUIET)
    for layer in (0, LAYERS - 1):
        logp = by_hand(model, ready, layer)
        for f, r, c in ((0, 0, 0), (1, 1, 2)):
            at = int(tokens.where(frame=f, row=r, col=c))
            assert found.values[0, 0, layer, f, r, c] == pytest.approx(float(logp[at, token]), abs=1e-4)
            assert ranks.values[0, 0, layer, f, r, c] == int((logp[at] > logp[at, token]).sum()) + 1
        mean = logp[tokens.where(role="frame", frame=1), token].mean()
        assert frames.values[0, 0, layer, 1] == pytest.approx(float(mean), abs=1e-4)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_nnsight_reads_the_same(name: str) -> None:
    model = wrap(families.build(name))
    ready, token = model.prepare_inputs(**inputs(name)), 33
    found = lens(model, ready, "video", words=[token], by="patch", **QUIET).values[0, 0]
    at, saved = ready.tokens.where(role="frame"), []
    with tracing(model) as n, torch.no_grad(), n.trace(ready):
        for i in range(LAYERS):
            saved.append(n.blocks[i].hook_resid_post.output.save())
    with torch.no_grad():
        norm, head = model.lm.norm, model.hf.lm_head
        theirs = torch.stack([head(norm(x))[0, at].softmax(-1)[:, token] for x in saved])
    assert np.abs(found.reshape(LAYERS, -1) - theirs.numpy()).max() <= 1e-5


def test_the_bridge_reads_the_same(wrapped: Any) -> None:
    model, token = wrapped("llava_onevision"), 33
    x = inputs("llava_onevision")
    ours = lens(model, model.prepare_inputs(**x), "*", words=[token], **QUIET).values[0, 0, :, 0]
    theirs, rest = bridge(model), {k: v for k, v in x.items() if k != "input_ids"}
    names = [f"blocks.{i}.hook_resid_post" for i in range(LAYERS)]
    with torch.no_grad():
        _, cache = theirs.run_with_cache(
            x["input_ids"], names_filter=lambda n: n in names, output_attentions=False, **rest
        )
        p = [theirs.unembed(theirs.ln_final(cache[n]))[0].softmax(-1)[:, token].mean() for n in names]
    assert np.abs(ours - torch.stack(p).numpy()).max() <= 1e-5


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out"])
def test_other_sites_are_those_of_the_hooks(site: str, wrapped: Any) -> None:
    model = wrapped("qwen2_5_vl")
    ready = model.prepare_inputs(**inputs("qwen2_5_vl"))
    name = f"blocks.2.hook_{site}"
    with torch.no_grad():
        _, cache = model.run_with_cache(ready, names_filter=name)
        p = model.unembed(model.ln_final(cache[name]))[0, -1].softmax(-1)[33]
    assert lens(model, ready, words=[33], site=site, layers=[3], **QUIET).values.item() == pytest.approx(
        float(p), rel=1e-4
    )


def test_modes_without_the_norm_are_labelled_and_are_what_they_say(wrapped: Any) -> None:
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**inputs("llava_onevision"))
    name = "blocks.1.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(ready, names_filter=name)
        row = cache[name][0, -1]
        weights = {"raw": model.hf.lm_head.weight, "paper": model.hf.get_input_embeddings().weight}
        want = {mode: float((w @ row).softmax(-1)[33]) for mode, w in weights.items()}
    assert want["raw"] != want["paper"]
    normed = lens(model, ready, words=[33], **QUIET)
    for mode, p in want.items():
        found = lens(model, ready, words=[33], mode=mode, **QUIET)
        assert found.values[0, 0, 1, 0] == pytest.approx(p, rel=1e-4)
        assert (
            "raw" in found.unit
            and found.notes["mode"].startswith("raw:")
            and normed.notes["mode"] == "normed"
        )
    raw = lens(model, ready, words=[33], mode="raw", **QUIET)
    assert raw.values[0, 0, -1, 0] == normed.values[0, 0, -1, 0] != raw.values[0, 0, 1, 0]


# ---- what a run edits -----------------------------------------------------------------------------------------------


def test_dropped_tokens_are_missing_from_there_on(wrapped: Any) -> None:
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**inputs("llava_onevision"))
    kept = torch.tensor([i for i in range(ready.n_pos) if i % 2 or i == ready.n_pos - 1])
    drop = Filling(Plan(detours=(Shorten(2, kept),)))
    found = lens(model, ready, "video", words=[33], by="patch", mechanisms=[drop], **QUIET).values[0, 0]
    clean = lens(model, ready, "video", words=[33], by="patch", **QUIET).values[0, 0]
    at = ready.tokens.where(role="frame")
    gone = ~np.isin(at.numpy(), kept.numpy()).reshape(clean.shape[1:])
    assert (found[:2] == clean[:2]).all() and gone.any()
    assert np.isnan(found[2:, gone]).all() and np.isfinite(found[2:, ~gone]).all()
    role = lens(model, ready, "last", words=[33], mechanisms=[drop], **QUIET).values[0, 0, -1, 0]
    with torch.no_grad():
        assert role == pytest.approx(float(model(ready, mechanisms=[drop])[0, -1].softmax(-1)[33]), rel=1e-5)


def test_a_mechanisms_hooks_are_seen_edited(wrapped: Any) -> None:
    model = wrapped("internvl")
    ready = model.prepare_inputs(**inputs("internvl"))
    edit = Filling(Plan(hooks=(("blocks.1.hook_resid_post", lambda value, hook: value * 0 + 1),)))
    found = lens(model, ready, words=[33], mechanisms=[edit], layers=[2], **QUIET).values.item()
    with torch.no_grad():
        want = model.unembed(model.ln_final(torch.ones(1, model.cfg.d_model))).softmax(-1)[0, 33]
    assert found == pytest.approx(float(want), rel=1e-5)
    assert lens(model, ready, words=[33], layers=[2], **QUIET).values.item() != found


# ---- planted truth --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "there"), [("plain", 3), ("redundant", 4), ("leak", 4)])
def test_the_planted_answer_appears_where_it_is_planted(variant: Any, there: int) -> None:
    model, items = planted_model(variant), questions(3, 0)
    found = gen_prob(model, [*items, *(i.twin for i in items)], **QUIET)
    right, others = found.values[:, 0], found.values[:, 1]
    early, late = right[:, : there - 1], right[:, there - 1 :]
    assert (late > 0.9).all() and (abs(early - others[:, : there - 1]) < 1e-6).all()


def test_twins_are_read_like_any_item() -> None:
    model, item = planted_model(), questions(1, 0)[0]
    pair = lens(model, [item, item.twin], words=["right"], **QUIET)
    assert len(set(pair.coords["item"])) == 2 and (pair.values[:, 0, -1, 0] > 0.9).all()
    assert pair.notes["said"][pair.coords["item"][0]] != pair.notes["said"][pair.coords["item"][1]]


# ---- words ----------------------------------------------------------------------------------------------------------


def test_words_are_the_best_and_lie_on_their_patches() -> None:
    model, item = load("tiny", device="cpu", dtype="float32"), draw_items("moving_direction", 1, 3)[0]
    ready = model.prepare(item, 8)
    found = words(model, ready, "video", top=3, layers=[2, 8], **QUIET)
    logp = by_hand(model, ready, 7)
    at = int(ready.tokens.where(frame=2, row=1, col=3))
    best = logp[at].topk(3)
    shown_words = painted(found, layer=8).notes["words"]
    assert shown_words[2][1][3] == model.tokenizer.decode([int(best.indices[0])])
    pos = found.notes["where"][0]["position"].index(at)
    assert found.notes["words"][0][1][pos] == [model.tokenizer.decode([int(i)]) for i in best.indices]
    assert np.allclose(found.values[0, 1, pos], best.values.exp(), rtol=1e-4)
    with pytest.raises(UsageError, match="no places in frames"):
        painted(words(model, ready, "last", layers=[8], **QUIET), layer=8)


def test_painting_gives_the_same_bytes_and_refuses_what_does_not_fit(tmp_path: Any) -> None:
    grid = {"frame": [0, 1], "row": [0, 1], "col": [0, 1]}
    text = [[["left", "<|im_end|>"], [" ", "\n"]], [["", "a"], ["b", "c"]]]
    result = Result(np.full((2, 2, 2), 0.5), ("frame", "row", "col"), grid, "p", {}, "w", {"words": text})
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    one, two = (paint(result, pictures, tmp_path / n).read_bytes() for n in ("a.png", "b.png"))
    blank = Result(result.values, result.axes, grid, "p", {}, "w", {"words": [[["", ""]] * 2] * 2})
    assert one == two != paint(blank, pictures, tmp_path / "c.png").read_bytes()
    assert shown("\n") == "\\n" and shown(" ") == "·" and shown("abcdefghijkl") == "abcdefgh…"
    for bad, why in ((pictures[:3], "3 pictures for 2"), (pictures.astype(float), "uint8")):
        with pytest.raises(UsageError, match=why):
            paint(result, bad, tmp_path / "x.png")
    with pytest.raises(UsageError, match="words are painted"):
        paint(Result(result.values, result.axes, grid, "p", {}), pictures, tmp_path / "x.png")


def test_vocabulary_counts_what_a_cache_says() -> None:
    model, item = load("tiny", device="cpu", dtype="float32"), draw_items("moving_direction", 1, 3)[0]
    ready = model.prepare(item, 8)
    lists = {"ways": ["left", "right", "Up"], "colours": ["red", "blue"]}
    found = vocabulary(model, ready, lists, top=4, layers=[5], **QUIET)
    best = by_hand(model, ready, 4)[ready.tokens.where(role="frame")].topk(4).indices
    for i, name in enumerate(lists):
        said = [w.lower() for w in lists[name]]
        hits = sum(model.tokenizer.decode([t]).strip().lower() in said for t in best.flatten().tolist())
        assert found.values[0, i, 0] == pytest.approx(hits / best.numel())
    assert groups_of(model.tokenizer, model.cfg.d_vocab, lists)["ways"] == {
        model.to_single_token(w) for w in ("left", "right", "up")
    }
    with pytest.raises(UsageError, match="none of the words of list 'x'"):
        vocabulary(model, ready, {"x": ["zyzzyva"]}, **QUIET)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_logits_of_many_rows_never_stand_together() -> None:
    wide, rows = 150_000, torch.randn(130, 4)
    weight, most = torch.randn(wide, 4), []

    def logits(layer: int, x: torch.Tensor) -> torch.Tensor:
        out = x @ weight.T
        most.append(out.numel() * 4)
        return out

    said = said_by(logits, 0, rows, [7, 149_999], 3, wide)
    assert max(most) <= unembedding.CHUNK_BYTES < 4 * wide * len(rows) and len(most) == -(
        -len(rows) // chunk_rows(wide)
    )
    whole = (rows[-3:] @ weight.T).softmax(-1)
    assert torch.allclose(said.followed[-3:], whole[:, [7, 149_999]], rtol=1e-4)
    assert torch.equal(said.ids[-3:], whole.topk(3).indices)
    assert torch.allclose(said.entropy[-3:], -(whole * whole.log()).sum(-1), rtol=1e-4)


def test_small_pieces_say_what_large_ones_say(wrapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("qwen3_vl")
    ready = model.prepare_inputs(**inputs("qwen3_vl"))
    whole = lens(model, ready, "video", words=[33], by="patch", measure="logp", **QUIET)
    monkeypatch.setattr(unembedding, "CHUNK_BYTES", 4 * VOCAB * 2)
    pieces = lens(model, ready, "video", words=[33], by="patch", measure="logp", **QUIET)
    assert np.abs(whole.values - pieces.values).max() < 1e-5


# ---- tuned lens -----------------------------------------------------------------------------------------------------


def test_the_tuned_lens_beats_the_plain_one_on_other_videos(tmp_path: Any) -> None:
    model, items = load("tiny", device="cpu", dtype="float32"), draw_items("moving_direction", 8, 0)
    made = tune(model, items, tokens="option", epochs=4, rows=200, **QUIET)
    plain, tuned = made.report.values
    assert (
        made.report.notes["held_out_items"] == 2
        and (tuned[:5] < plain[:5]).all()
        and tuned.sum() < 0.8 * plain.sum()
    )
    again = TunedLens.load(made.save(tmp_path / "lens.safetensors"))
    a, b = (lens(model, items[0], "option", tuned=t, **QUIET) for t in (made, again))
    assert (a.values == b.values).all() and a.name == "tuned lens"
    last = lens(model, items[0], "option", layers=[8], **QUIET)
    assert (a.values[:, :, -1] == last.values[:, :, -1]).all()
    with pytest.raises(ConfigError, match="no tuned lens"):
        TunedLens.load(tmp_path / "lens.npz")


def test_twins_never_stand_on_both_sides() -> None:
    model, item = planted_model(), questions(1, 0)[0]
    with pytest.raises(UsageError, match="2 items of 1 videos"):
        tune(model, [item, item.twin], **QUIET)


# ---- recipes, panels, refusals --------------------------------------------------------------------------------------


def test_a_recipe_gives_the_same_numbers() -> None:
    recipe = from_plain(
        {"kind": "probes.lens.LensRecipe", "items": {"sim": "moving_direction", "n": 2, "seed": 1}, "tokens": ["last", "option"], "layers": [4, 8],
         "policy": CUT.to_dict()}
    )  # fmt: skip
    (found,) = recipe.run(progress=False)
    model = load("tiny", device="cpu", dtype="float32")
    again = lens(
        model, draw_items("moving_direction", 2, 1), ["last", "option"], layers=[4, 8], policy=CUT, **QUIET
    )
    assert (found.values == again.values).all() and found.recipe == recipe.plain()
    assert [p.axes for p in panels(found)] == [("layer", "role")]


def test_panels_have_two_axes_or_a_strip() -> None:
    n = {"item": ["a", "b"], "word": ["x"], "layer": [1, 2, 3], "frame": [0, 1], "row": [0], "col": [0, 1]}
    values = np.arange(24.0).reshape(2, 1, 3, 2, 1, 2)
    made = panels(Result(values, tuple(n), n, "p", {}, "lens"))
    assert [p.axes for p in made] == [("frame", "row", "col")] * 3 and made[0].name == "lens, layer 1"
    assert (made[2].values == values.mean(0)[0, 2]).all() and len(panels(made[0], 1)) == 1
    flat = Result(values[:, 0, :, 0, 0, 0], ("item", "layer"), {k: n[k] for k in ("item", "layer")}, "p", {})
    assert panels(flat) == [flat]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"tokens": "vidoe"}, "closest: video"), ({"tokens": []}, "0 token sets"), ({"words": []}, "0 words"),
        ({"words": ["no such word"]}, "not one"), ({"words": [10**6]}, "token id 1000000"), ({"measure": "q"}, "measure='q'"),
        ({"by": "pixel"}, "by='pixel'"), ({"site": "resid_pots"}, "closest: resid_post"), ({"mode": "paperr"}, "no mode"),
        ({"layers": [0]}, "layers 1..8"), ({"layers": []}, "layers 1..8"), ({"by": "patch"}, "none of these tokens lies in a frame"), ({"tokens": ["video", "last"], "by": "frame"}, "one set of tokens"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_named(asked: dict[str, Any], why: str) -> None:
    model, item = load("tiny", device="cpu", dtype="float32"), draw_items("moving_direction", 1, 3)[0]
    with pytest.raises(UsageError, match=why):
        lens(model, item, **{"tokens": "last", **asked, **QUIET})


def test_items_without_options_have_no_right_letter(wrapped: Any) -> None:
    model = wrapped("llava_onevision")
    with pytest.raises(UsageError, match="items with options"):
        gen_prob(model, model.prepare_inputs(**inputs("llava_onevision")), **QUIET)
    with pytest.raises(UsageError, match="0 items"):
        lens(model, [], **QUIET)


def test_layers_without_attention_have_no_attn_out() -> None:
    model = wrap(families.build("qwen3_5"))
    ready = model.prepare_inputs(**inputs("qwen3_5"))
    with pytest.raises(UsageError, match=r"no blocks\.0\.hook_attn_out; use site='resid_post'"):
        lens(model, ready, words=[33], site="attn_out", **QUIET)
    with torch.no_grad():
        p = model(ready)[0, -1].softmax(-1)[33]
    assert lens(model, ready, words=[33], **QUIET).values[0, 0, -1, 0] == pytest.approx(float(p), rel=1e-5)
