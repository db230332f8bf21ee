"""Training with Mixture-of-Depths: deltas that come off bit for bit, a loss equal to the plain trainer's, variants on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.errors import ConfigError, ModelError, UsageError
from lab.learn.mod import Learner, Variant, accuracy, learn_score, lessons, main, train
from lab.learn.sft import Batch, score
from lab.learn.tiny_data import Batches, Prompts
from lab.mechanisms import plain, trained_with
from lab.mechanisms.mixture_of_depths import NEUTRAL, MixtureOfDepths
from lab.model import lowrank
from lab.model.videollm import VideoLLM
from lab.model.zoo import load
from lab.sim.tasks import draw_items
from tests import families


@cache
def tiny() -> VideoLLM:
    torch.set_num_threads(1)
    return load("tiny", device="cpu", verify=False)


@cache
def batches() -> Batches:
    return Batches(Prompts(tiny().need_tokenizer()), 0)


def small(step: int) -> Batch:
    return batches().video(step, worlds=2, lists=1)


def weights(model: VideoLLM) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.hf.named_parameters()}


def delta_of(model: VideoLLM, rank: int = 2) -> lowrank.Delta:
    g = torch.Generator().manual_seed(1)
    return {
        n: (
            0.1 * torch.randn(rank, m.in_features, generator=g),
            0.1 * torch.randn(m.out_features, rank, generator=g),
        )
        for n, m in lowrank.linears(model.lm).items()
    }


# ---- deltas -----------------------------------------------------------------------------------------------------------


def test_a_delta_is_added_and_taken_off(tmp_path: Path, wrapped: Any) -> None:
    model: VideoLLM = wrapped("llava_onevision")
    ready, before, delta = (
        model.prepare_inputs(**families.inputs("llava_onevision")),
        weights(model),
        delta_of(model),
    )
    clean = model(ready)
    with lowrank.applied(model.lm, delta):
        name = next(iter(delta))
        full = next(n for n in before if n.endswith(f"language_model.{name}.weight"))
        added = lowrank.linears(model.lm)[name].weight - before[full]
        assert torch.allclose(added, delta[name][1] @ delta[name][0], atol=1e-5)
        assert not torch.allclose(model(ready), clean, atol=1e-2)
    assert all(torch.equal(before[n], p) for n, p in model.hf.named_parameters()) and torch.equal(
        model(ready), clean
    )
    again, about = lowrank.load(lowrank.save(delta, tmp_path / "d.safetensors", base="x"))
    assert about == {"base": "x"} and all(
        torch.equal(again[n][i], delta[n][i]) for n in delta for i in (0, 1)
    )


def test_deltas_that_do_not_fit(tmp_path: Path, wrapped: Any) -> None:
    model: VideoLLM = wrapped("llava_onevision")
    before = weights(model)
    for wrong in (
        {"layers.0.nothing": (torch.zeros(2, 64), torch.zeros(64, 2))},
        {"layers.0.mlp.up_proj": (torch.zeros(2, 8), torch.zeros(64, 2))},
    ):
        with pytest.raises(UsageError, match="another model"), lowrank.applied(model.lm, wrong):
            pass
    with pytest.raises(UsageError, match="rank"), lowrank.learning(model.lm, 0):
        pass
    (tmp_path / "no.safetensors").write_text("no")
    with pytest.raises(ConfigError, match="cannot read a delta"):
        lowrank.load(tmp_path / "no.safetensors")
    assert all(torch.equal(before[n], p) for n, p in model.hf.named_parameters())


# ---- the loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "drawn", [small, lambda step: batches().final(step, worlds=2, lists=2)], ids=["video", "text"]
)
def test_loss_of_the_neutral_mechanism_is_the_plain_one(drawn: Any) -> None:
    """Packed worlds through the lab's decoder, cut into blocks by edges = transformers with a block mask."""
    model, batch = tiny(), drawn(1)
    with torch.no_grad():
        want, numbers = score(model.hf, batch)
        got, mine = learn_score(Learner(model, NEUTRAL, {}), batch)
        routed, _ = learn_score(Learner(model, MixtureOfDepths(), {}), batch)
    assert float(got) == pytest.approx(float(want), abs=1e-4) and mine == pytest.approx(numbers, abs=1e-4)
    assert (float(routed) == pytest.approx(float(want), rel=1e-2)) == (batch.pixels is None)


def test_routers_and_deltas_learn_and_the_model_does_not(tmp_path: Path) -> None:
    model = tiny()
    before, item = weights(model), draw_items("moving_direction", 1, 5)[0]
    clean = model(model.prepare(item))
    m = MixtureOfDepths(gate="softmax", keep=0.3, seed=2)
    variant = train(model, m, small, tmp_path, steps=2, peak=0.5, rank=2, aux=0.01)
    assert all(torch.equal(before[n], p) for n, p in model.hf.named_parameters()) and torch.equal(
        model(model.prepare(item)), clean
    )
    assert not any(p.requires_grad for p in model.hf.parameters())
    routers, start = variant.mechanism.routers, m.fresh_routers(model.sizes)
    assert routers is not None
    routers.requires_grad_(False)
    start.requires_grad_(False)
    assert all(
        float((a - b).abs().max()) > 0 for a, b in zip(routers.parameters(), start.parameters(), strict=True)
    )
    assert all(float(b.abs().max()) > 0 for _, b in variant.delta.values()) and len(variant.delta) == 8 * 7
    again = train(model, m, small, tmp_path, steps=2, peak=0.5, rank=2, resume=True)
    assert again.about["steps"] == 2  # nothing left to do
    with pytest.raises(UsageError, match="steps"):
        train(model, m, small, tmp_path, steps=0)


# ---- variants -----------------------------------------------------------------------------------------------------------


def test_variants_on_disk(tmp_path: Path) -> None:
    model, m = tiny(), MixtureOfDepths(keep=0.3)
    trained = replace(m, routers=m.fresh_routers(model.sizes, start="random"))
    item = draw_items("moving_direction", 1, 6)[0]
    variant = Variant(trained, delta_of(model), {"steps": 3})
    folder = variant.save(tmp_path / "v", base="tiny")
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    loaded = Variant.load(folder)
    assert plain(replace(loaded.mechanism, routers=None)) == plain(m)
    ready = model.prepare(item)
    clean = model(ready)
    with loaded.on(model) as mechanism:
        there = model(ready, mechanisms=[mechanism])
    assert torch.equal(model(ready), clean)
    other = load(folder, device="cpu", verify=False)
    assert torch.allclose(other(other.prepare(item), mechanisms=trained_with(other)), there, atol=1e-5)
    assert other.spec is not None and other.spec["name"] == str(folder) and other.spec["weights"]
    assert trained_with(model) == () and load(folder, verify=True).cfg.model_name == str(folder)
    said = json.loads((folder / "variant.json").read_text())
    (folder / "variant.json").write_text(json.dumps({**said, "weights": "0" * 12}))
    with pytest.raises(ConfigError, match="train it again"):
        Variant.load(folder)
    with pytest.raises(ModelError, match="train it again"):
        load(folder, device="cpu")
    with pytest.raises(ConfigError, match="holds no variant"):
        Variant.load(tmp_path)
    with pytest.raises(UsageError, match="keep as a tuple"):
        replace(variant, mechanism=MixtureOfDepths.p_mod()).save(tmp_path / "p", base="tiny")


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lab.learn.mod.lessons", lambda prompts, seed: small)
    out = str(tmp_path / "run")
    assert main(["--out", out, "--steps", "1", "--check", "1", "--items", "2", "--rank", "2"]) == 0
    assert json.loads((tmp_path / "run/variant/variant.json").read_text())["held_out"].keys() == {
        "moving_direction"
    }
    assert main(["--table", out, "--out", str(tmp_path / "table.json"), "--items", "1"]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert list(rows) == ["base", "run, not trained", "run", "run, random choice", "run, uniform choice"]
    assert main(["--table", str(tmp_path), "--out", str(tmp_path / "t.json")]) == 3
    assert "holds no variant" in capsys.readouterr().out


def test_lessons_are_the_recipes_last_stage() -> None:
    drawn: Any = lessons(Prompts(tiny().need_tokenizer()), 0)(3)
    first = drawn[0] if isinstance(drawn, list) else drawn
    assert isinstance(first, Batch) and "letter" in first.groups


def test_accuracy_needs_items() -> None:
    with pytest.raises(UsageError, match="no items"):
        accuracy(tiny(), [])
    assert accuracy(tiny(), draw_items("moving_direction", 2, 1)) == 1.0
