"""kill -9 at random points of a sweep over 50 items: the same Result bit for bit, and no item run twice."""

import json
import random

from lab.model.zoo import wrap
from tests import families
from tests.killing import FAMILY, ITEMS, Forked, kill_often, records, sweep_into


def test_a_killed_sweep_loses_nothing_and_repeats_nothing(tmp_path):
    model = wrap(families.build(FAMILY))
    kills = kill_often(lambda: Forked(lambda: sweep_into(tmp_path, model)), tmp_path, 4, random.Random(0))
    assert kills == 4 and 0 < records(tmp_path) < ITEMS
    result = sweep_into(tmp_path, model)
    assert result.same(
        sweep_into(None, model)
    )  # values, notes and the ledger of all pieces: nothing counted twice
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()][1:]
    assert [r["key"] for r in lines] == [f"item:{n}" for n in range(1, ITEMS + 1)]
    begun = (tmp_path / "begun").read_text().split()
    assert ITEMS <= len(begun) <= ITEMS + kills  # only what a kill fell into is begun again
    assert result.ledger["tower_calls"] == ITEMS == sum(r["spent"]["tower_calls"] for r in lines)
