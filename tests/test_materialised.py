"""A materialised policy answers as the masked one does, and saves what it predicts."""

from __future__ import annotations

import pytest
import torch

from lab.edges import presets
from lab.edges.cuts import Cut
from lab.edges.materialised import live_rows
from lab.edges.policy import Policy
from lab.errors import UsageError
from lab.model.zoo import wrap
from tests import families

N = families.LAYERS
MIXED = Policy(
    cuts=(
        Cut(layers="2-4", heads=[1], q="video", k="video", where="frame(q) - frame(k) >= 1"),
        Cut(layers="3", q="text", k="*"),
        Cut(layers="4-5", q="*", k="video"),
    )
)
POLICIES = {
    "exit": presets.video_exit(2, N), "local": presets.frame_local(3, N, [2, 3, 4]),
    "paper": presets.paper("7b", "strict", N), "mixed": MIXED, "nothing": presets.nothing(),
    "everything": Policy(cuts=(Cut(q="*", k="*"),)),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(name):
        if name not in made:
            model = wrap(families.build(name).requires_grad_(False))
            made[name] = model, model.prepare_inputs(**families.inputs(name))
        return made[name]

    return get


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_same_answers_as_the_masked_policy(models, family, name):
    (model, ready), policy = models(family), POLICIES[name]
    saved = model.materialise(policy)
    torch.testing.assert_close(saved(ready), model(ready, policy=policy), atol=2e-5, rtol=1e-4)
    bytes_ = saved.kv_bytes(ready)
    assert saved.kv_measured(ready) == bytes_["predicted"] <= bytes_["full"]
    assert (bytes_["predicted"] < bytes_["full"]) == (name in ("exit", "paper", "mixed", "everything"))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
@pytest.mark.parametrize("inherit", ["last", "none"])
@torch.no_grad()
def test_same_generation(models, family, inherit):
    model, ready = models(family)
    policy = Policy.from_dict({**MIXED.to_dict(), "generated_rows": {"inherit": inherit}})
    want = model.generate(ready, policy=policy, max_new_tokens=4, stop=[]).ids
    assert torch.equal(model.materialise(policy).generate(ready, max_new_tokens=4, stop=[]).ids, want)


@torch.no_grad()
def test_generated_tokens_keep_what_they_read_alive(models):
    """Tokens that inherit nothing read all of the prompt in every layer, so nothing of it may go."""
    model, ready = models("llava_onevision")
    policy = Policy.from_dict({**presets.video_exit(2, N).to_dict(), "generated_rows": {"inherit": "none"}})
    assert all(bool(rows.all()) for rows in live_rows(policy, model, ready))
    assert not all(bool(rows.all()) for rows in live_rows(presets.video_exit(2, N), model, ready))


def test_an_exit_drops_just_the_video(models):
    model, ready = models("llava_onevision")
    kept = live_rows(presets.video_exit(2, N), model, ready)
    video = torch.zeros(ready.n_pos, dtype=torch.bool)
    video[ready.tokens.where(role="video")] = True
    assert all(bool(rows.all()) for rows in kept[:2]) and all(
        not rows[video].any() and rows[~video].all() for rows in kept[2:]
    )
    row = 2 * model.cfg.n_key_value_heads * model.cfg.d_head * 4
    text = ready.n_pos - int(video.sum())
    # in the last layer only rows that `last` reads are there: all text
    assert model.materialise(presets.video_exit(2, N)).kv_bytes(ready)["predicted"] == row * (
        2 * ready.n_pos + 3 * text
    )


def test_the_model_is_clean_afterwards(models):
    model, ready = models("llava_onevision")
    with torch.no_grad():
        before = model(ready)
        model.materialise(POLICIES["exit"])(ready)
        assert torch.equal(model(ready), before)


def test_refusals(models):
    model, ready = models("llava_onevision")
    with pytest.raises(UsageError, match="gates add"):
        model.materialise(Policy(cuts=(Cut(q="last", k="video", gate=-1.0),)))
    with pytest.raises(UsageError, match="cannot be materialised"):
        model.materialise(presets.random_pairs(0.5))
    two = model.prepare_inputs(**families.inputs("llava_onevision", worlds=2, pad=2))
    with pytest.raises(UsageError, match="one prompt at a time"):
        model.materialise(POLICIES["exit"])(two)
    windowed = wrap(families.build("llava_onevision", text_config={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}))  # fmt: skip
    with pytest.raises(UsageError, match="plain causal attention"):
        windowed.materialise(POLICIES["exit"])
