"""Memory of the logit lens at the size of a real model: all layers, 4,000 video tokens, a vocabulary of 150,000.

    python -m lab.bench.lens_memory                     # prints a JSON document; exits with 1 beyond the limit
    python -m lab.bench.lens_memory --layers 4          # fewer layers: the peak does not depend on their number

Random weights, narrow (d_model 64): what the lens needs beside the forward is logits, and those are as wide as the
vocabulary whatever d_model is. Measured is the process's resident memory while the lens runs, above the largest it had
in a plain forward of the same prompt.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from lab.bench.measuring import setting, write
from lab.bench.models import Shape, build, inputs
from lab.model.zoo import wrap
from probes.lens import words

LIMIT = 2 * 10**9  # bytes
EVERY = 0.01  # seconds between two looks at the process


def peak_of(work: Callable[[], Any]) -> int:
    """Largest resident memory while `work` runs, bytes."""
    me, done, seen = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], me.memory_info().rss)
            time.sleep(EVERY)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return seen[0]


def measure(layers: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Peaks of a plain forward and of the lens (ten best words of every video token at every layer)."""
    shape = Shape(
        d=64, mlp=128, layers=layers, heads=4, kv_heads=2, vocab=vocabulary, tower_d=32, tower_mlp=64
    )
    model = wrap(build(shape))
    ready = model.prepare_inputs(**inputs(shape, -(-tokens // shape.tokens_per_frame)))
    with torch.no_grad():
        forward = peak_of(lambda: model(ready))
    n = len(ready.tokens.where(role="video"))
    start = time.perf_counter()
    lens = peak_of(lambda: words(model, ready, "video", top=10, show_progress=False))
    return {
        "layers": layers, "video_tokens": n, "vocabulary": vocabulary, "peak_forward": forward, "peak_lens": lens,
        "extra": lens - forward, "limit": LIMIT, "all_logits_would_be": 4 * layers * n * vocabulary,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--out", help="json file; standard output if absent")
    asked = vars(parser.parse_args())
    out = asked.pop("out")
    found = measure(**asked)
    write(out, {"setting": setting(), **found})
    return int(found["extra"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
