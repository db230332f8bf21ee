"""Does the lab hold on a GPU: parity, cuts under every kernel, speed, memory, long videos.

    python -m lab.bench.gpu --out DIR                          7B shapes, random weights, made on the device
    python -m lab.bench.gpu --quick --device cpu --out DIR     the same checks on a small model: a smoke test
    python -m lab.bench.gpu --sweep --out DIR                  the cost of knock-out sweeps instead (`lab.bench.gpu_sweep`)

Runs where there is only torch and transformers (5.17 and newer, with numpy, pyarrow, pandas, jaxtyping, psutil, as CUDA
images bring them). Beside them it needs these wheels, all pure Python but xxhash, installed without their requirements:
transformer-lens, datasets, multiprocess, dill, xxhash. (transformer-lens imports datasets, datasets the rest.)
Writes gpu.json (gpu_sweep.json) and prints a table.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WHEELS = {
    "transformer_lens": "transformer-lens==4.3.0",
    "datasets": "datasets==5.2.0",
    "multiprocess": "multiprocess==0.70.19",
    "dill": "dill==0.4.1",
    "xxhash": "xxhash==4.1.0",
    "jaxtyping": "jaxtyping==0.3.11",
}


def missing() -> list[str]:
    """Requirements of the wheels to carry, of those that cannot be imported here."""
    return [wheel for module, wheel in WHEELS.items() if importlib.util.find_spec(module) is None]


def main(args: Sequence[str] | None = None) -> int:
    """Run all checks; 0 if all hold, 1 if one does not, 2 if something is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.bench.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", help="folder for gpu.json")
    parser.add_argument("--device", default=None, help="default: cuda")
    parser.add_argument("--quick", action="store_true", help="a small model in place of 7B shapes")
    parser.add_argument(
        "--layers", type=int, default=None, help="decoder layers of the 7B shape (default 28)"
    )
    parser.add_argument("--frames", type=int, default=32, help="frames of the long video (default 32)")
    parser.add_argument("--new", type=int, default=64, help="new tokens that are timed (default 64)")
    parser.add_argument("--flex", action="store_true", help="also try flex_attention (compiles for minutes)")
    sweeps = parser.add_argument_group("with --sweep")
    sweeps.add_argument("--sweep", action="store_true", help="time knock-out sweeps, and nothing else")
    sweeps.add_argument("--shapes", nargs="*", default=[], help="llama-7b, qwen2.5-vl-7b (default both)")
    sweeps.add_argument(
        "--lengths", nargs="*", type=int, default=[], help="1267, 3251, 6387, 12659 (default all)"
    )
    sweeps.add_argument("--dtypes", nargs="*", default=[], help="bfloat16, float32 (default both)")
    given = parser.parse_args(args)
    wheels = missing()
    if wheels:
        print(f"missing here: {' '.join(wheels)}; install them with pip install --no-deps", file=sys.stderr)
        return 2
    return _run(given)


def _run(given: argparse.Namespace) -> int:
    import torch

    from lab.bench import gpu_checks
    from lab.bench.measuring import write

    device = given.device or "cuda"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device; give --device cpu --quick", file=sys.stderr)
        return 2
    if given.sweep:
        return _sweep(device, given)
    result = gpu_checks.run(
        device, quick=given.quick, layers=given.layers, frames=given.frames, new=given.new, flex=given.flex
    )
    if given.out:
        write(Path(given.out) / "gpu.json", result)
    print(table(result["rows"]))
    bad = [r for r in result["rows"] if r["holds"] is False]
    print(f"{len(bad)} of {len(result['rows'])} checks failed" if bad else "all checks hold")
    return int(bool(bad))


def _sweep(device: str, given: argparse.Namespace) -> int:
    from lab.bench import gpu_sweep

    kinds = (("--shapes", given.shapes, gpu_sweep.SHAPES), ("--lengths", given.lengths, gpu_sweep.LENGTHS), ("--dtypes", given.dtypes, gpu_sweep.DTYPES))  # fmt: skip
    for flag, asked, known in kinds:
        wrong = [str(a) for a in asked if a not in known]
        if wrong:
            print(f"{flag}: no {', '.join(wrong)}; there are {', '.join(map(str, known))}", file=sys.stderr)
            return 2
    found = gpu_sweep.run(
        device, given.out, quick=given.quick, shapes=given.shapes, lengths=given.lengths, dtypes=given.dtypes
    )
    return int(any("no room" in row for row in found.values()))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The checks in columns: what, found, bound, verdict."""
    verdict = {True: "ok", False: "FAILED", None: ""}
    cells = [(r["what"], r["found"], r["bound"], verdict[r["holds"]]) for r in rows]
    widths = [max(len(c[i]) for c in cells) for i in range(4)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )


if __name__ == "__main__":
    raise SystemExit(main())
