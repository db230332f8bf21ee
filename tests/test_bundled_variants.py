"""tiny-mod and tiny-live as they lie in the package: of tiny's weights, small, and able to do what they were trained for."""

import json

import pytest
import torch

from lab.learn.narration import measured
from lab.mechanisms import trained_with
from lab.mechanisms.mixture_of_depths import MixtureOfDepths
from lab.mechanisms.streaming import Session, Streaming
from lab.model.zoo import DATA, load, outline, weights_hash
from lab.sim.tasks import draw_items

MOST = 2_000_000  # bytes of a variant


@pytest.mark.parametrize(("name", "kind"), [("tiny-mod", MixtureOfDepths), ("tiny-live", Streaming)])
def test_variants_belong_to_tiny_and_are_small(name, kind):
    model, tiny = load(name, device="cpu"), load("tiny", device="cpu", verify=False)
    (mechanism,) = trained_with(model)
    assert isinstance(mechanism, kind) and trained_with(tiny) == ()
    said = json.loads((DATA / name / "training.json").read_text())
    assert said["base"] == "tiny" and said["base_weights"] == weights_hash("tiny") != weights_hash(name)
    assert sum(f.stat().st_size for f in (DATA / name).iterdir()) < MOST
    assert model.spec is not None and model.spec["name"] == name
    pairs = zip(model.lm.parameters(), tiny.lm.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert outline(name).cfg.n_layers == model.cfg.n_layers


@torch.no_grad()
def test_tiny_mod_answers_with_a_fifth_of_the_tokens():
    model = load("tiny-mod", device="cpu", verify=False)
    on = trained_with(model)
    items = [i for task in ("moving_direction", "scene_transition") for i in draw_items(task, 4, 31)]
    assert all(model.answer(i, mechanisms=on).correct for i in items)
    counts = [model.answer(i, mechanisms=on).correct for i in draw_items("object_count", 24, 31)]
    assert sum(map(bool, counts)) >= 22  # 98 in 100; switched on without training, half
    kept = model.run(model.prepare(items[0]), mechanisms=on).heads["mod.keep"]
    assert kept.shape[0] == 4 and int((~kept[0, 0]).sum()) == 8 * 13


@torch.no_grad()
def test_tiny_live_speaks_when_something_happens():
    model = load("tiny-live", device="cpu", verify=False)
    (config,) = trained_with(model)
    assert measured(model, config, 2, 31)["in_time"] == 1.0
    item = draw_items("scene_transition", 1, 31)[0]
    session = Session(model, config)
    log = [session.see(frame, i / 8) for i, frame in enumerate(item.video)]
    places = item.state.places
    assert [m.triggered for m in log[1:]] == [a != b for a, b in zip(places, places[1:], strict=False)]
    assert session.log[places.index(places[-1])].replies[0].text == f"the scene becomes {places[-1]} ."
