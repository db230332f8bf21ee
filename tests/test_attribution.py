"""Attribution: known answers in closed form, completeness, no silent zeros, no further tower runs."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from lab.adapters.captum import Forward, arrived, layer_integrated_gradients
from lab.adapters.captum_pixels import Pixels, llm_attribution, video_frames
from lab.adapters.captum_players import Coalitions, ablation, infidelity, shapley
from lab.edges.policy import Policy
from lab.errors import UsageError
from lab.model.door import Door
from lab.model.zoo import wrap
from lab.sim.planted import planted_model, questions
from lab.view.overlay import overlay
from probes.attribution import attribute
from probes.video_grid import object_boxes, players_of, pooled
from tests.families import FAMILIES, build, inputs, tokenizer

TOL = 1e-5
quiet = functools.partial(attribute, show_progress=False)


@functools.cache
def model_of(name: str) -> Any:
    model = wrap(build(name), tokenizer(name))
    model.hf.requires_grad_(False)
    return model


@functools.cache
def planted() -> Any:
    return planted_model("plain")


class Linear:
    """f = w . embeds: a decoder whose attributions are known in closed form."""

    def __init__(self, weight: torch.Tensor, door: Door) -> None:
        self.weight, self.door = weight, door

    def __call__(self, embeds: torch.Tensor, world: Any = None) -> torch.Tensor:
        return (embeds * self.weight).sum((1, 2))

    def at(self, door: Door, world: torch.Tensor) -> torch.Tensor:
        return self(door.embeds)


def linear_game(n: int = 4, d: int = 3) -> tuple[Coalitions, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    x, base, weight = (torch.randn(1, 3 * n + 2, d, generator=dice) for _ in range(3))
    rope = torch.arange(3 * n + 2)[None]
    linear = Linear(weight, Door(x, rope, None))
    members = torch.zeros(n, 3 * n + 2, dtype=torch.bool)
    for i in range(n):
        members[i, 3 * i : 3 * i + 3] = True
    known = ((x - base) * weight).sum(-1)[0]
    return Coalitions(linear, linear.door, Door(base, rope, None), members, batch=5), (members * known).sum(1)


def test_a_linear_model_in_closed_form() -> None:
    """Every player's value is w . (x - baseline) over its tokens, by every method, captum's sampling included."""
    from captum.attr import ShapleyValues

    game, known = linear_game()
    exact, is_exact = shapley(game, n_samples=1)
    sampled, _ = shapley(game, n_samples=2, exact=1)
    theirs = ShapleyValues(game).attribute(torch.ones(1, 4), torch.zeros(1, 4))[0]
    assert is_exact and game.runs == 16, "every coalition once"
    for values in (exact, sampled, theirs, ablation(game)):
        assert float((values - known).abs().max()) <= 1e-4, values
    assert infidelity(game, known)["share"] <= 1e-8 < 0.5 < infidelity(game, -known)["share"]


def test_exact_shapley_equals_captums_on_a_real_decoder() -> None:
    from captum.attr import ShapleyValues

    model = model_of("internvl")
    ready, other = (model.prepare_inputs(**inputs("internvl", seed=s)) for s in (0, 3))
    forward = Forward(model, ready, said=torch.tensor([40, 50]))
    members = players_of(forward.maps[0], "frames", (), None)[1]
    game = Coalitions(forward, forward.door, arrived(model, other)[0], members)
    ours, _ = shapley(game, n_samples=1)
    theirs = ShapleyValues(game).attribute(torch.ones(1, 3), torch.zeros(1, 3))[0]
    assert float((ours - theirs).abs().max()) <= TOL < 1e-3 < float(ours.abs().max())
    with torch.no_grad():  # what a coalition is, by hand
        mixed = forward.embeds.clone()
        mixed[:, ~members[1]] = torch.where(
            members.any(0)[~members[1], None], game.base.embeds[:, ~members[1]], mixed[:, ~members[1]]
        )
        assert abs(float(forward(mixed)[0]) - float(game(torch.tensor([[0.0, 1.0, 0.0]]))[0])) <= TOL


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_every_way(name: str) -> None:
    """Sums are f(x) - f(baseline) where they should be; the tower runs for question and baseline only."""
    model, x = model_of(name), inputs(name)
    ways: list[dict[str, Any]] = [
        {}, {"against": "blank"}, {"against": "mean"}, {"method": "ig", "n_steps": 8},
        {"method": "ig", "at": "resid_pre", "layer": 2, "n_steps": 8}, {"method": "ig", "at": "pixels", "n_steps": 12},
        {"method": "ig", "at": "connector", "n_steps": 8}, {"method": "gradient_shap", "n_samples": 3},
    ]  # fmt: skip
    for how in ways:
        if how.get("at") == "pixels" or (name == "qwen3_vl" and how.get("at") == "connector"):
            continue
        found = quiet(model, x, **how)
        notes = found.notes["items"]["item:1"]
        assert np.isfinite(found.values).all() and np.abs(found.values).max() > 1e-5, how
        if how.get("method") != "gradient_shap":
            assert notes["completeness_error"] <= 0.01, (how, notes)
        if how.get("at") != "connector":
            assert notes["tower_calls"] <= 2, (how, notes)
        if not how:
            total = notes["f"] - notes["f_baseline"]
            assert abs(found.values.sum() - total) <= TOL and found.axes == ("item", "frame")
    assert all(not p._forward_hooks for p in model.hook_dict.values())


def test_z_and_patterns_have_no_completeness() -> None:
    for at in ("z", "pattern"):
        notes = quiet(
            model_of("llava_onevision"), inputs("llava_onevision"), method="ig", at=at, layer=1, n_steps=4
        ).notes
        assert notes["items"]["item:1"]["completeness"] == "not applicable"
        assert notes["items"]["item:1"]["completeness_error"] is None


def test_pixels_are_complete_and_lie_over_their_tokens() -> None:
    for name in ("llava_onevision", "qwen2_5_vl"):
        found = quiet(model_of(name), inputs(name), method="ig", at="pixels", n_steps=24)
        notes = found.notes["items"]["item:1"]
        assert (
            notes["completeness_error"] <= 0.01
            and abs(found.values.sum() - notes["total"]) <= 0.01 * abs(notes["total"]) + TOL
        )
    ones = torch.ones(2, 3, 6, 6)
    assert pooled(ones, (2, 3, 3), channels="first").unique().tolist() == [12.0]


# ---- captum's traps -------------------------------------------------------------------------------------------------


def test_the_raw_library_drops_the_video_and_ours_does_not() -> None:
    """LLMAttribution with its defaults: all zeros. Ours: what the slow, uncached way of the library gives."""
    from captum.attr import FeatureAblation, LLMAttribution

    model = model_of("llava_onevision")
    ready, base = (model.prepare_inputs(**inputs("llava_onevision", seed=s)) for s in (0, 3))
    given = video_frames(ready, base)

    class Raw(LLMAttribution):
        SUPPORTED_INPUTS = (*LLMAttribution.SUPPORTED_INPUTS, type(given))

    target = torch.tensor([40, 50])
    with torch.no_grad():
        raw = Raw(FeatureAblation(model.hf), model.tokenizer).attribute(given, target=target)
        slow = Raw(FeatureAblation(model.hf), model.tokenizer).attribute(
            given, target=target, use_cached_outputs=False
        )
        ours = llm_attribution(model, FeatureAblation(model.hf)).attribute(given, target=target)
    assert float(raw.seq_attr.abs().max()) == 0.0, "if this fails, captum was mended: the adapter may go"
    assert float(slow.seq_attr.abs().min()) > 1e-4
    assert float((ours.seq_attr - slow.seq_attr).abs().max()) <= TOL
    assert float((ours.token_attr - slow.token_attr).abs().max()) <= TOL


def test_the_raw_library_expands_pixels_alone_and_ours_runs() -> None:
    from captum.attr import IntegratedGradients

    model, x = model_of("llava_onevision"), inputs("llava_onevision")
    rest = {k: v for k, v in x.items() if k != "pixel_values_videos"}
    score = lambda logits: logits[..., 40]  # noqa: E731
    raw = lambda pixels: score(model.hf(**rest, pixel_values_videos=pixels).logits[:, -1])  # noqa: E731
    pixels = x["pixel_values_videos"]
    with pytest.raises(ValueError):
        IntegratedGradients(raw).attribute(pixels, pixels.flip(1), n_steps=4)
    one_by_one = IntegratedGradients(raw).attribute(pixels, pixels.flip(1), n_steps=4, internal_batch_size=1)
    run = Pixels(model, model.prepare_inputs(**x), score)
    ours = IntegratedGradients(run).attribute(run.value, run.value.flip(1), n_steps=4)
    assert float((ours - one_by_one).abs().max()) <= TOL and float(ours.abs().max()) > 1e-5


# ---- answers, players, policies -------------------------------------------------------------------------------------


def test_said_answers_are_the_models_log_probability() -> None:
    for name in ("qwen2_5_vl", "qwen3_vl", "internvl"):
        model = model_of(name)
        ready = model.prepare_inputs(**inputs(name))
        ids = model.generate(ready, max_new_tokens=3, stop=[]).ids[0]
        from lab.model.answering import target_logits

        with torch.no_grad():
            logits = target_logits(model, ready, ids[None])
            wanted = logits.float().log_softmax(-1).gather(-1, ids[None, :, None]).sum()
            forward = Forward(model, ready, said=ids)
            assert abs(float(forward(forward.embeds)[0] - wanted)) <= TOL
            twice = forward(forward.embeds.expand(2, -1, -1), torch.zeros(2, dtype=torch.long))
        assert float((twice - wanted).abs().max()) <= TOL
    found = quiet(model_of("internvl"), inputs("internvl"), target="generated", max_new_tokens=3)
    notes = found.notes["items"]["item:1"]
    assert notes["output"] == "logprob" and notes["completeness_error"] <= 1e-4


def test_the_planted_models_frames_and_objects() -> None:
    """The answer hangs on where the square is, early and late; nothing outside video tokens counts."""
    item = questions(1, seed=4)[0]
    frames = quiet(planted(), item)
    notes = frames.notes["items"][item.id]
    assert (
        notes["decoder_rows"] == 256
        and notes["tower_calls"] == 2
        and notes["exact"]
        and notes["completeness_error"] <= 1e-5
    )
    worth = frames.values[0]
    assert {int(worth.argmax())} <= {0, 1, 6, 7} and abs(worth[[2, 3, 4]]).max() < 0.1 * worth.max()
    objects = quiet(planted(), item, players="objects")
    assert objects.axes == ("item", "player") and objects.coords["player"] == ["yellow square", "background"]
    cut = Policy.from_dict(
        {"format": "edge-policy/1", "cuts": [{"layers": "2", "q": "option", "k": "video"}]}
    )
    assert abs(quiet(planted(), item, policy=cut, output="logprob").values).max() < 1e-3, (
        "the video reaches nobody"
    )
    blocks = quiet(planted(), item, players="tubelets", block=(4, 4, 4))
    assert blocks.values.shape == (1, 8, 4, 4) and len(np.unique(blocks.values.round(6))) == 2
    total = notes["f"] - notes["f_baseline"]
    assert abs(blocks.values.sum() - total) <= 1e-3
    assert len(object_boxes(item.state)["yellow square"]) == 8


def test_ig_needs_no_more_steps_than_completeness_asks_for() -> None:
    item = questions(1, seed=4)[0]
    found = quiet(planted(), item, method="ig", n_steps=8)
    assert found.notes["items"][item.id]["completeness_error"] <= 0.01
    few = layer_integrated_gradients(
        planted(),
        planted().prepare(item),
        "embed.hook_out",
        baseline=planted().prepare(item.twin),
        target=6,
        n_steps=8,
    )
    assert few.fails, "eight steps alone are too few here"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"method": "lime"}, "method='lime'; use one of ig"),
        ({"at": "resid"}, "at='resid'; use one of embed"),
        ({"at": "z", "method": "ig"}, "a layer .0-based. goes with"),
        ({"at": "resid_pre", "layer": 9, "method": "ig"}, r"no layer 10 \(blocks\.9\)"),
        ({"at": "pixels"}, "leave at='embed'"),
        ({"players": "patches"}, "players='patches'; use 'frames'"),
        ({"players": "objects"}, "needs a simulated video"),
        ({"players": "tubelets", "block": (0, 1, 1)}, "at least 1 token"),
        ({"against": "zero"}, "zero baseline breaks integrated gradients under RMSNorm"),
        ({"against": "noise"}, "noise is no baseline"),
        ({"against": "twin"}, "has no twin"),
        ({"against": "tvin"}, "against='tvin'; use one of twin"),
        ({"against": [1, 2]}, "2 baselines for 1 items"),
        ({"method": "ig", "at": "pixels", "against": "mean"}, "pixels have no mean embedding"),
        ({"n_steps": 0}, "must be at least 1"),
        ({"output": "prob"}, "output='prob'; use one of logit_diff"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(how: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        quiet(model_of("internvl"), inputs("internvl"), **how)
    with pytest.raises(UsageError, match="no items"):
        quiet(model_of("internvl"), [])


def test_overlays() -> None:
    frames = np.full((4, 8, 8, 3), 128, np.uint8)
    values = np.zeros((2, 2, 2))
    values[0, 0, 0], values[1, 1, 1] = 3.0, -3.0
    shown = overlay(values, frames)
    assert (shown[:2, :4, :4] != 128).any() and (shown[:2, 4:] == 128).all() and (shown[0] == shown[1]).all()
    assert (shown[0, 0, 0] != shown[2, 7, 7]).any() and (overlay(values * np.nan, frames) == 128).all()
    with pytest.raises(UsageError, match="5 frames of values for 4 pictures"):
        overlay(np.zeros(5), frames)
