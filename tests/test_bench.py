"""The benches run and say what they measured; models that accelerate placed run as before."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

from lab.bench import gpu, models, overhead, patching, sweep
from lab.bench.measuring import median_ratio, paired, peak_bytes
from lab.bench.memory import BOUND
from lab.model.zoo import load, wrap
from tests import families as fam

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[1]


# ---- how it is measured -------------------------------------------------------------------------------------------


def test_peak_counts_what_is_held_at_once() -> None:
    n = 1000 * 4
    assert peak_bytes(lambda: torch.zeros(1000) + torch.zeros(1000)) == 3 * n
    assert peak_bytes(lambda: [torch.zeros(1000) for _ in range(5)]) == 5 * n

    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(1000)

    assert peak_bytes(one_after_the_other) <= 2 * n


def test_rounds_alternate_and_ratios_pair_neighbours() -> None:
    seen: list[str] = []
    ticks = iter(range(1000))
    seconds = paired(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")},
        pairs=3,
        warm=1,
        clock=lambda: float(next(ticks)),
    )
    assert "".join(seen) in ("abbaabba", "baabbaab")
    assert {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3}
    assert median_ratio({"a": [1.0, 9.0, 2.0], "b": [1.0, 3.0, 4.0]}, "a", "b") == 1.0


# ---- overhead -----------------------------------------------------------------------------------------------------


def test_overhead_measures_the_same_work() -> None:
    """At a small size: logits equal, nothing beyond the kept tensors; the ratios at 2,000 positions are for the bench."""
    shape = models.Shape(d=64, mlp=176, layers=4, vocab=256)
    found = overhead.measure(shape, positions=500, pairs=1)
    assert found["largest_difference_of_logits"] == 0
    assert found["resid_kept_bytes"] == 4 * found["positions"] * 64 * 4
    assert 0 < found["resid_extra_bytes"] <= found["resid_kept_bytes"]
    assert found["peak_bytes"]["pattern"] > found["peak_bytes"]["decoder"] + 8 * found["positions"] ** 2 * 4


def test_overhead_says_what_it_missed() -> None:
    good = {
        "ratios": {"forward / hf": 1.0, "resid / decoder": 1.0}, "resid_extra_bytes": 5, "resid_kept_bytes": 5,
        "largest_difference_of_logits": 0.0,
    }  # fmt: skip
    assert overhead.failures(good) == []
    slow = good | {"ratios": {"forward / hf": 1.2, "resid / decoder": 1.0}, "resid_extra_bytes": 6}
    assert len(overhead.failures(slow)) == 2


@pytest.mark.parametrize(
    "path", sorted((ROOT / "lab" / "bench" / "data").glob("overhead*.json")), ids=lambda p: p.name
)
def test_committed_overhead_meets_its_targets(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert overhead.failures(found) == []
    assert found["positions"] >= 1900 and found["pairs"] >= 9 and found["versions"]["torch"]
    again = {n: median_ratio(found["seconds"], *overhead.RATIOS[n]) for n in overhead.RATIOS}
    assert again == pytest.approx(found["ratios"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "lab" / "bench" / "data").glob("memory*.json")), ids=lambda p: p.name
)
def test_committed_predictions_are_within_bounds(path: Path) -> None:
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert len({name.split()[0] for name in runs}) >= 2
    for name, row in runs.items():
        assert row["ratio"] == pytest.approx(row["predicted"]["total"] / row["measured"]["peak"]), name
        assert abs(row["ratio"] - 1) <= BOUND, name


@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
def test_a_hook_on_plain_transformers_gives_the_same_grid(site: str) -> None:
    """What is timed as naive is the same work; the ratios themselves are for the bench."""
    found = patching.measure("tiny", site, n_naive=4, n_rows=None, rounds=2)
    assert found["max_difference_hf"] <= 1e-4 and found["max_difference"] <= 1e-4 < found["mean_change"]
    assert found["reason"] == "" and 0.1 < found["flops"]["tower"] < 0.4


@pytest.mark.parametrize(("file", "least"), [("patching_cpu", 8), ("patching_2_threads_cpu", 2)])
def test_committed_grids_are_exact(file: str, least: int) -> None:
    found = json.loads((ROOT / f"lab/bench/data/{file}.json").read_text(encoding="utf-8"))["cases"]
    assert len(found) >= least
    for name, row in found.items():
        assert max(row["max_difference"], row["max_difference_hf"]) <= 1e-4, name
        whole = [a + b for a, b in zip(row["fast_s"], row["tower_s"], strict=True)]
        again = patching.ratio(row["naive_s_per_cell"]["hf"], row["cells"], whole)
        assert row["ratio"] == pytest.approx(again, rel=0.01), name


# ---- the GPU bench, on a CPU --------------------------------------------------------------------------------------


def test_gpu_bench_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--quick", "--device", "cpu", "--new", "3", "--out", str(tmp_path)]) == 0, (
        capsys.readouterr().out
    )
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    checked = [r for r in found["rows"] if r["holds"] is not None]
    assert len(checked) >= 20 and all(r["holds"] for r in checked)
    assert found["numbers"]["speed"]["lab"]["decode_tokens_per_s"] > 0
    assert "all checks hold" in capsys.readouterr().out


def test_gpu_sweep_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both dtypes on a small model: numbers agree in float32, and in bfloat16 to within what rounding does."""
    assert gpu.main(["--sweep", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    tables = json.loads((tmp_path / "gpu_sweep.json").read_text(encoding="utf-8"))["tables"]
    assert [k.split(", ")[1] for k in tables] == ["bfloat16", "float32"]
    for name, row in tables.items():
        assert row["text pathways"]["fallbacks"] == row["store_bytes_aside"] == 0
        for found in row["noise"].values():
            assert (
                found["fast - naive"] <= (1e-5 if "float32" in name else found["effect"])
                and found["effect"] > 0.01
            )
    assert "across frames" in capsys.readouterr().out
    assert gpu.main(["--sweep", "--shapes", "gpt", "--device", "cpu"]) == 2
    assert "no gpt; there are llama-7b" in capsys.readouterr().err


def test_gpu_bench_names_the_wheels_it_lacks() -> None:
    code = (
        "import sys, importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'datasets' else find(n, *a)\n"
        "from lab.bench import gpu\nsys.exit(gpu.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.strip() == "missing here: datasets==5.2.0; install them with pip install --no-deps"


# ---- models that accelerate placed --------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=["auto", "whole"])
def test_device_map_is_handed_to_transformers(tmp_path: Path, device_map: Any) -> None:
    hf, x = fam.build("llava_onevision"), fam.inputs("llava_onevision")
    hf.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, device_map=device_map)(x, read="all"), hf(**x).logits)


@pytest.mark.parametrize("how", ["hooks", "offload"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_models_with_accelerate_hooks_give_the_same_numbers(name: str, how: str) -> None:
    """Offloaded weights lie on the meta device until their module runs."""
    hf, x = fam.build(name).requires_grad_(False), fam.inputs(name, worlds=2, pad=3)
    with torch.no_grad():
        plain = hf(**x).logits
        ids = wrap(hf).generate(x, max_new_tokens=4, stop=()).ids
    placed: Any = (
        accelerate.cpu_offload(hf, execution_device=torch.device("cpu"))
        if how == "offload"
        else accelerate.dispatch_model(hf, {"": "cpu"}, force_hooks=True)
    )
    assert hasattr(placed, "_hf_hook")
    model = wrap(placed)
    assert model.device == torch.device("cpu") == model.cfg.device
    with torch.no_grad():
        assert torch.equal(
            model(x, read="all")[x["attention_mask"].bool()], plain[x["attention_mask"].bool()]
        )
        assert torch.equal(model.generate(x, max_new_tokens=4, stop=()).ids, ids)


def test_the_formula_of_a_sweep_counts_whole_runs_and_single_rows() -> None:
    shape = replace(sweep.SHAPE, layers=4)
    n = 100
    whole, last = torch.zeros(n, n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.bool)
    whole[1:, 0] = True  # every row but the first loses an edge, from the first layer on
    last[-1, 3] = True
    assert 1.98 < sweep.by_formula(shape, n, [{0: whole}]) <= 2
    one = sweep.by_formula(shape, n, [{3: last}]) - 1  # one row of 100 in one layer of four
    assert 0.9 / 400 < one < 1.2 / 400
