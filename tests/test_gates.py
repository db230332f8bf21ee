"""Trained gates: rows by hand, the same model where all are open, the planted heads and no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lab.edges.gates import AXES, Gated, gated_rows, search_gates, train_gates
from lab.edges.policy import Policy
from lab.errors import RunError, UsageError
from lab.model.decoder import decode
from lab.model.run import Run
from lab.result import Result
from lab.sim.planted import planted_model, questions

# (layer, head, key, query) of `lab.sim.planted.TRUTH["plain"]`, 0-based
PLANTED = {
    (0, 0, "video", "video"),
    (0, 1, "option", "option"),
    (1, 0, "video", "option"),
    (2, 0, "option", "last"),
}


@pytest.fixture(scope="module")
def planted() -> Any:
    model, drawn = planted_model("plain"), questions(20, 0)
    return model, [next(q for q in drawn if q.answer == i) for i in range(4)]


@pytest.fixture(scope="module")
def trained(planted: Any) -> Result:
    model, items = planted
    return train_gates(model, items, steps=40, batch=4, lr=0.3, show_progress=False)


def test_a_row_by_hand() -> None:
    """Three segments with shares 0.5, 0.3, 0.2 of attention, values 1, 2, 3."""
    mass = torch.tensor([0.5, 0.3, 0.2])
    read = mass[:, None] * torch.tensor([[1.0], [2.0], [3.0]])
    relaxed = torch.ones(3, requires_grad=True)
    open_ = gated_rows(mass, read, torch.ones(3), relaxed)
    assert open_.item() == pytest.approx(1.7)
    open_.backward()
    without = torch.tensor([(0.6 + 0.6) / 0.5, (0.5 + 0.6) / 0.7, (0.5 + 0.6) / 0.8])
    assert relaxed.grad is not None and torch.allclose(relaxed.grad, 1.7 - without)
    one = torch.tensor([0.0, 1.0, 0.0])
    relaxed = one.clone().requires_grad_(True)
    alone = gated_rows(mass, read, one, relaxed)
    alone.backward()
    assert alone.item() == pytest.approx(2.0) and relaxed.grad is not None
    wanted = [
        (0.5 + 0.6) / 0.8 - 2,
        2.0,
        (0.6 + 0.6) / 0.5 - 2,
    ]  # the only one open: without it the row is zero
    assert torch.allclose(relaxed.grad, torch.tensor(wanted))
    assert gated_rows(mass, read, torch.zeros(3), torch.zeros(3)).item() == 0.0


def test_thrown_gates_are_the_policy_that_cuts_them(planted: Any) -> None:
    """Open gates are the model; closed ones what a policy with the same cuts gives."""
    model, items = planted
    ready = model.prepare(items[0])
    names = ["video", "option", "last"]
    other = torch.full((len(ready.tokens),), len(names))
    for i, name in enumerate(names):
        other[ready.tokens.where(role={"video": "frame"}.get(name, name))] = i
    thrown = torch.ones(4, 4, 4, 4)

    def run() -> torch.Tensor:
        with torch.no_grad(), model.lock.shared():
            attend = Gated(thrown, thrown, other[None], [0])
            resid, side = decode(model, model.arrive(ready)[0], Run(attend=attend))
            return model.read(resid, side, "last")[0, 0]

    with torch.no_grad():
        assert float((run() - model(ready)[0, -1]).abs().max()) <= 1e-4
        thrown[1, 2, 1, 0] = thrown[2, 0, 2, 1] = 0.0
        cuts = [
            {"layers": "2", "heads": [2], "q": "option", "k": "frame"},
            {"layers": "3", "heads": [0], "q": "last", "k": "option"},
        ]
        policy = Policy.from_dict({"format": "edge-policy/1", "cuts": cuts})
        wanted = model(ready, policy=policy)[0, -1]
    assert float((run() - wanted).abs().max()) <= 1e-4 < 1 < float((wanted - model(ready)[0, -1]).abs().max())


def test_the_planted_heads_stay_open_and_no_others_are_kept(planted: Any, trained: Result) -> None:
    model, items = planted
    assert trained.axes == AXES
    open_ = {
        (a[0], a[1], trained.coords["key"][a[3]], trained.coords["query"][a[2]])
        for a in np.argwhere(np.nan_to_num(trained.values) > 0.5).tolist()
    }
    # besides the planted ones a few that matter when one of those happens to be shut; of 464 gates
    assert open_ >= PLANTED and len(open_) <= 12 and np.isfinite(trained.values).sum() > 400
    policy, trail = search_gates(model, items, trained, budget={"flips": 0.6}, show_progress=False)
    kept = {(layer - 1, head, k, q) for layer, q, k, head in trail.notes["kept"]}
    assert kept == PLANTED and trail.select(measure="accepted").values.min() == 0.0
    with torch.no_grad():
        for item in items:
            ready = model.prepare(item)
            assert int(model(ready, policy=policy)[0, -1].argmax()) == int(model(ready)[0, -1].argmax())


def test_the_same_seed_gives_the_same_gates(planted: Any) -> None:
    model, items = planted
    one, same, other = (
        train_gates(model, items, steps=3, batch=2, seed=s, show_progress=False).values for s in (1, 1, 2)
    )
    assert np.array_equal(one, same, equal_nan=True) and not np.array_equal(one, other, equal_nan=True)
    assert all(p.grad is None for p in model.hf.parameters())


def test_prompts_of_different_lengths_share_a_batch(planted: Any) -> None:
    """Padding plays no part: two items together have the KL that each has alone."""
    from lab.edges.gates import _Trainer

    model, items = planted
    readies = [model.prepare(items[0]), model.prepare(items[1], 6)]
    assert len(readies[0].tokens) != len(readies[1].tokens)
    work = _Trainer(model, readies, 1.0, "all", 0)
    thrown = (torch.rand(work.odds.shape, generator=torch.Generator().manual_seed(3)) > 0.1).float()
    with torch.no_grad():
        both = work._run([0, 1], thrown, thrown)
        alone = torch.cat([work._run([i], thrown, thrown) for i in (0, 1)])
    assert float((both - alone).abs().max()) <= 1e-4


def test_what_makes_no_sense_is_refused(planted: Any, trained: Result) -> None:
    model, items = planted
    for bad in ({"steps": 0}, {"price": float("nan")}, {"lr": -1.0}, {"batch": True}):
        with pytest.raises(UsageError, match="must be above 0"):
            train_gates(model, items, show_progress=False, **bad)
    with pytest.raises(UsageError, match="train them on this model"):
        search_gates(model, items, trained.select(layer=[1, 2]), show_progress=False)
    from lab.mechanisms.mixture_of_depths import MixtureOfDepths

    with pytest.raises(RunError, match="without mechanisms"):
        train_gates(
            model, [model.prepare(items[0], mechanisms=[MixtureOfDepths.EXAMPLE])], show_progress=False
        )
