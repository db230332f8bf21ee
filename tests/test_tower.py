"""Inside the vision tower: points with documented shapes, cuts against transformers' own masks, patches where they lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lab.carriers import VideoQA
from lab.errors import LabWarning, TooBig, UsageError
from lab.model import tower
from lab.model.tower import attention_of, frame_lengths, tower_map
from lab.model.zoo import wrap
from lab.sim.planted import planted_model, questions
from probes.lens import lens
from probes.vision import tower_knockout, tower_lens
from tests import families
from tests.families import FAMILIES, inputs

PACKED = ("qwen2_5_vl", "qwen3_vl", "video_llama_3")
LAYER = 1  # full attention in all six; read by all six
HEADS, D_HEAD = 4, 8
TOL = 3e-5
EACH = pytest.mark.parametrize("name", FAMILIES)


def away(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def look(model: Any, ready: Any, *points: str, layer: int = LAYER) -> list[torch.Tensor]:
    names = [f"vision.{layer}.attn.hook_{p}" for p in points]
    with torch.no_grad():
        _, cache = model.run_with_cache(ready, names_filter=names)
    return [cache[n] for n in names]


@EACH
@pytest.mark.parametrize("worlds", [1, 2])
def test_points_have_the_documented_shapes_and_fit_together(name: str, worlds: int, wrapped: Any) -> None:
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name, worlds=worlds))
    frames, patches = tower_map(model, ready).frame.shape
    q, k, v, z, scores, pattern = look(model, ready, "rot_q", "rot_k", "v", "z", "attn_scores", "pattern")
    assert {tuple(x.shape) for x in (q, k, v, z)} == {(frames, patches, HEADS, D_HEAD)}
    assert scores.shape == pattern.shape == (frames, HEADS, patches, patches)
    by_hand = torch.einsum("fqhd,fkhd->fhqk", q, k) * D_HEAD**-0.5
    assert away(scores, by_hand) < TOL and away(pattern, by_hand.softmax(-1)) < TOL
    assert away(z, torch.einsum("fhqk,fkhd->fqhd", pattern, v)) < TOL


@EACH
def test_queries_before_the_rotary_turn_are_the_projections(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    q, k, rot_q = look(model, ready, "q", "k", "rot_q")
    assert q.shape == k.shape == rot_q.shape
    # a turn leaves lengths as they are; towers without one leave everything
    assert away(q.norm(dim=-1), rot_q.norm(dim=-1)) < TOL
    assert (away(q, rot_q) == 0.0) == (name not in PACKED)


def test_windows_are_closed_to_each_other(wrapped: Any) -> None:
    model = wrapped("qwen2_5_vl")
    ready = model.prepare_inputs(**inputs("qwen2_5_vl"))
    (windowed,), (full,) = (look(model, ready, "attn_scores", layer=i) for i in (0, 1))
    assert bool((windowed == float("-inf")).any()) and bool(full.isfinite().all())
    places = tower_map(model, ready)
    window = places.row // 4 * 100 + places.col // 4  # 16 pixels are 4 x 4 patches
    same = window[:, None, :, None] == window[:, None, None, :]
    assert torch.equal(windowed.isfinite(), same.expand_as(windowed))


def halves(model: Any, ready: Any) -> torch.Tensor:
    """Edges between the first and the second half of a frame's patches, [q, k]."""
    n = tower_map(model, ready).frame.shape[1]
    first = torch.arange(n) < n // 2
    return first[:, None] != first[None, :]


def hand_masked(hf: Any, family: Any, x: dict[str, Any], cut: torch.Tensor) -> torch.Tensor:
    """transformers alone: its own mask argument, or its own borders, say the same."""

    def pre(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if "cu_seqlens" in kwargs:
            cu = kwargs["cu_seqlens"]
            middles = (cu[:-1] + cu[1:]) // 2
            return args, {**kwargs, "cu_seqlens": torch.cat([cu, middles]).sort().values}
        mask = torch.zeros(1, 1, *cut.shape).masked_fill(cut, float("-inf"))
        return args[:1], {**kwargs, "attention_mask": mask}

    module = attention_of(family.tower_layers(hf)[LAYER])
    assert module is not None
    handle = module.register_forward_pre_hook(pre, with_kwargs=True)
    try:
        with torch.no_grad():
            return hf(**x).logits[:, -1:]
    finally:
        handle.remove()


@EACH
def test_cuts_equal_transformers_own_masks(name: str, plain: Any, wrapped: Any) -> None:
    model, x = wrapped(name), inputs(name, worlds=2)
    ready = model.prepare_inputs(**x)
    cut = halves(model, ready)

    def edit(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        return scores.masked_fill(cut, float("-inf"))

    with torch.no_grad():
        clean = model(ready)
        ours = model.run_with_hooks(ready, fwd_hooks=[(f"vision.{LAYER}.attn.hook_attn_scores", edit)])
    theirs = hand_masked(plain(name), model.family, x, cut)
    assert away(ours, theirs) < TOL < 1e-3 < away(ours, clean)
    with torch.no_grad():
        assert away(model(ready), clean) == 0.0  # nothing is left behind


@EACH
def test_patches_lie_where_the_map_says(name: str) -> None:
    """Change one patch of the picture: the tower's first layer must receive a change in that row and in no other."""
    model = wrap(families.build(name), families.tokenizer(name), preprocessor=families.preprocessor(name))
    clip = families.clip(4, 24, 24)
    frame, row, col = 1, 3, 4
    dark = clip.pixels.clone()
    first = 2 * frame if name.startswith("qwen") else frame  # tubelets of two frames
    dark[
        first : first + 2 if name.startswith("qwen") else first + 1,
        :,
        4 * row : 4 * row + 4,
        4 * col : 4 * col + 4,
    ] ^= 255
    seen = []
    for one in (clip, replace(clip, pixels=dark)):
        ready = model.prepare(VideoQA(one, "what?", ("a", "b")), 4)
        with torch.no_grad():
            _, cache = model.run_with_cache(ready, names_filter="vision.0.hook_resid_pre")
        seen.append(cache["vision.0.hook_resid_pre"].flatten(0, -2))
    places = tower_map(model, ready)
    hit = (places.frame == frame) & (places.row == row) & (places.col == col)
    assert hit.sum() == 1
    assert torch.equal((seen[0] != seen[1]).any(-1), hit.flatten())


def test_frames_of_different_size_share_one_entry(wrapped: Any) -> None:
    model = wrapped("qwen3_vl")
    small, large = (inputs("qwen3_vl", frames=2, seed=s) for s in (0, 1))
    grid = torch.tensor([[1, 4, 6], [1, 8, 6]])
    pixels = torch.cat(
        [small["pixel_values_videos"], large["pixel_values_videos"], large["pixel_values_videos"]]
    )
    words = torch.tensor([[30]])
    ids = torch.cat([small["input_ids"][:, :-1], *[large["input_ids"][:, 4:-1]], words], 1)
    video = families.VIDEO
    block = (ids[0] == video).nonzero().flatten()
    second = block[block > block[5]]
    ids = torch.cat([ids[:, : int(second[0])], torch.full((1, 6), video), ids[:, int(second[0]) :]], 1)
    x = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": pixels,
        "video_grid_thw": grid,
    }
    ready = model.prepare_inputs(**x, mm_token_type_ids=2 * (ids == video).int())
    assert frame_lengths(ready.inputs) == (24, 48)
    (pattern,) = look(model, ready, "pattern")
    assert pattern.shape == (1, HEADS, 72, 72)
    assert (
        float(pattern[..., :24, 24:].max()) == 0.0 and away(pattern.sum(-1), torch.ones(1, HEADS, 72)) < TOL
    )


def test_too_big_names_both_numbers(wrapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("internvl")
    ready = model.prepare_inputs(**inputs("internvl"))
    monkeypatch.setattr(tower, "free_bytes", lambda device: 1000)
    with pytest.raises(TooBig, match=r"need [\d,]+ bytes, more than a quarter of the 1,000 bytes"):
        look(model, ready, "pattern")


def test_nnsight_sees_the_tower() -> None:
    from lab.adapters.nnsight import tracing

    model = wrap(families.build("qwen2_5_vl"))
    ready = model.prepare_inputs(**inputs("qwen2_5_vl"))
    (ours,) = look(model, ready, "z")
    with tracing(model) as n, torch.no_grad(), n.trace(ready):
        theirs = n.vision[LAYER].attn.hook_z.output.save()
    assert away(ours, theirs) == 0.0


# ---- probes ---------------------------------------------------------------------------------------------------------


@EACH
def test_cutting_nothing_is_nothing_and_cutting_something_is_not(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    result = tower_knockout(
        model, ready, ["none", "between-patches", "within-frame:1"], layers=[1, 2], show_progress=False
    )
    assert (result.values[0, 0] == 0.0).all() and (abs(result.values[0, 1:]) > 0).all()


def test_knockout_equals_the_same_cut_by_hand(wrapped: Any) -> None:
    model = wrapped("qwen3_vl")
    ready = model.prepare_inputs(**inputs("qwen3_vl"))
    cut = halves(model, ready)
    found = tower_knockout(model, ready, [lambda m: cut[None]], layers=[LAYER + 1], show_progress=False)

    def edit(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        return scores.masked_fill(cut, float("-inf"))

    with torch.no_grad():
        clean = model(ready)[0, -1].softmax(-1)
        after = model.run_with_hooks(ready, fwd_hooks=[(f"vision.{LAYER}.attn.hook_attn_scores", edit)])[
            0, -1
        ].softmax(-1)
    token = clean.argmax()
    assert found.values[0, 0, 0] == pytest.approx(float((after[token] - clean[token]) * 100 / clean[token]))


@EACH
def test_frames_that_never_see_each_other_cannot_be_parted(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    with pytest.raises(UsageError, match="frames never see each other"):
        tower_knockout(model, ready, "between-frames", layers=[1], show_progress=False)


def test_frames_of_a_mixing_tower_can_be_parted() -> None:
    """A tower told of one long sequence mixes frames; parted again, it says what it said with its own borders."""
    hf = families.build("qwen3_vl")
    parted = wrap(hf)
    x = inputs("qwen3_vl", frames=4)
    with torch.no_grad():
        clean = parted(parted.prepare_inputs(**x))
    layers = parted.family.tower_layers(hf)

    def mix(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "cu_seqlens": kwargs["cu_seqlens"][[0, -1]]}

    for layer in layers:
        layer.register_forward_pre_hook(mix, with_kwargs=True)
    ready = parted.prepare_inputs(**x)
    with torch.no_grad():
        mixed = parted(ready)
    assert away(mixed, clean) > 1e-3
    (pattern,) = look(parted, ready, "pattern")
    assert pattern.shape == (1, HEADS, 48, 48) and float(pattern[..., :24, 24:].min()) > 0
    result = tower_knockout(
        parted, ready, "between-frames", window=len(layers) * 2, layers=[2], show_progress=False
    )
    before, after = mixed[0, -1].softmax(-1), clean[0, -1].softmax(-1)
    token = before.argmax()
    assert result.values[0, 0, 0] == pytest.approx(
        float((after[token] - before[token]) * 100 / before[token]), abs=1e-3
    )


def test_the_planted_tower_mixes_nothing() -> None:
    model, item = planted_model(), questions(1, 0)[0]
    with pytest.warns(LabWarning, match="changed nothing"):
        result = tower_knockout(model, [item, item.twin], "between-patches", show_progress=False)
    assert (result.values == 0.0).all()


@pytest.mark.parametrize("bad", ["between-patche", "beyond:x", "within-frame:"])
def test_unknown_pathways_are_named(bad: str, wrapped: Any) -> None:
    model = wrapped("internvl")
    with pytest.raises(UsageError, match=f"no pathway '{bad}'"):
        tower_knockout(model, model.prepare_inputs(**inputs("internvl")), bad, show_progress=False)


@EACH
def test_leaving_the_tower_after_its_last_layer_is_not_leaving_it(name: str, wrapped: Any) -> None:
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    found = tower_lens(model, ready, words=[33], measure="logp", show_progress=False)
    plain = lens(
        model,
        ready,
        "video",
        words=[33],
        by="patch",
        site="resid_pre",
        layers=[1],
        measure="logp",
        show_progress=False,
    )
    assert found.axes == ("item", "word", "layer", "frame", "row", "col")
    assert (found.values[:, :, -1] == plain.values[:, :, 0]).all()
    assert abs(found.values[:, :, 0] - plain.values[:, :, 0]).max() > 1e-3
