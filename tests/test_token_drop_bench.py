"""The bench of token drop: matched budgets, intervals, one row per variant."""

import pytest

from lab.bench.measuring import wilson
from lab.bench.token_drop import accuracy, seconds, table, variants
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.model.zoo import load
from tests.shelf_models import model, question


def test_wilson_by_hand():
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4) and wilson(0, 0) == (0.0, 1.0)


def test_the_random_control_has_the_same_budget():
    small = model()
    ready = small.prepare(question())
    named = variants(0.8)
    n = {k: len(small.maps(ready, mechanisms=[m])[0]) for k, m in named.items() if m is not None}
    assert n["feature"] == n["pixel"] == n["random"] == n["feature, compact"] < ready.n_pos
    assert (
        n["feature, per frame"] == n["feature"] + 5
    )  # int(16 * 0.8) in each of 7 frames, not int(112 * 0.8)
    drop = DifferentialTokenDrop(ratio=0.8)
    one, again, two = (small.maps(ready, mechanisms=[drop.control(s)])[0].source.tolist() for s in (0, 0, 1))
    assert one == again != two


def test_the_bench_on_tiny():
    tiny, named = load("tiny", verify=False), variants(0.8)
    found = {
        "accuracy": {"moving_direction": accuracy(tiny, "moving_direction", 2, 1, named)},
        "time": {"8": seconds(tiny, 8, named, pairs=1)},
    }
    rows, times = found["accuracy"]["moving_direction"], found["time"]["8"]
    assert list(rows) == list(named) == list(times) and rows["vanilla"]["flips"] == 0
    assert rows["vanilla"]["video_tokens"] == 128 and rows["feature"]["video_tokens"] == 39
    assert times["feature"]["positions"] == times["vanilla"]["positions"] - 89
    assert times["feature"]["kv_bytes"] * times["vanilla"]["positions"] == times["vanilla"]["kv_bytes"] * times["feature"]["positions"]  # fmt: skip
    assert len(table(found).splitlines()) == 2 + 2 * len(named) + 1
