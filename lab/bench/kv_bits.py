"""What VidKV stores, and what it does to the first and to later tokens of an answer.

    python -m lab.bench.kv_bits --out kv_bits.json

Bytes: keys and values of one layer of a 7B decoder (4 heads of 128, bfloat16 rows of noise), stored by the cache and given
by the formula, as released and as corrected, with the relative errors of that storage. Tokens: `tiny` answers simulated
questions in full (`B) right`), teacher-forced; KL to the unquantised model at each token of the answer. With the released
life cycle the prompt is computed with exact keys, so the first token differs by 0.0: one letter measures nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lab.bench.measuring import setting, write
from lab.carriers import LETTERS, VideoQA
from lab.mechanisms.vidkv import QuantisedCache, VidKV
from lab.model.answering import target_logits
from lab.model.videollm import VideoLLM
from lab.model.zoo import load
from lab.sim.tasks import draw_items

SETTINGS: dict[str, VidKV] = {
    "released 2 / 2": VidKV(key_bits=2, value_bits=2),
    "released 1.5 / 2": VidKV(value_bits=2),
    "released 1.5 / 1.58": VidKV(),
    "released 1.25 / 1.58": VidKV(key_bits=1.25),
    "corrected 2 / 2": VidKV(key_bits=2, value_bits=2, compat="corrected"),
    "corrected 1.5 / 1.58": VidKV(compat="corrected"),
}


def stored(what: VidKV, rows: int, seed: int = 0) -> dict[str, Any]:
    """Bytes and errors of one layer of noise. Keys have channels of unequal width, values a spread of 0.3."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, 4, rows, 128, generator=g) for _ in range(2))
    k, v = (k * torch.linspace(0.3, 3.0, 128)).bfloat16(), (0.3 * v).bfloat16()
    cache = QuantisedCache(what)
    cache.update(0, k, v, torch.arange(rows))
    back = cache.layers[0].read()
    exact = k.nbytes + v.nbytes
    return {
        "bits_formula": what.bits(128), "bytes_stored": cache.nbytes(), "bytes_formula": cache.predicted(0),
        "share_of_exact": cache.nbytes() / exact,
        "key_error": _error(back[0], k), "value_error": _error(back[1], v),
    }  # fmt: skip


def _error(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def said(item: VideoQA) -> str:
    """The whole answer as tiny was taught to give it."""
    assert isinstance(item.answer, int)
    return f"{LETTERS[item.answer]}) {item.options[item.answer]}"


@torch.no_grad()
def divergence(model: VideoLLM, items: Sequence[VideoQA], what: VidKV) -> list[float]:
    """Mean KL, nats, from the unquantised model's prediction to the quantised one's, at each token of the answer."""
    rows: list[Tensor] = []
    for item in items:
        ready = model.prepare(item)
        ids = model.need_tokenizer()(said(item), add_special_tokens=False, return_tensors="pt")["input_ids"]
        p, q = (
            target_logits(model, ready, ids, mechanisms=m)[0].float().log_softmax(-1) for m in ([], [what])
        )
        rows.append((p.exp() * (p - q)).sum(-1))
    n = min(map(len, rows))
    return torch.stack([r[:n] for r in rows]).mean(0).tolist()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print; 1 if stored bytes are not the formula's, or a first token moved."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.bench.kv_bits", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", help="json file; standard output without it")
    parser.add_argument("--rows", type=int, default=3200)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--task", default="moving_direction")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    model, items = load("tiny", device="cpu"), draw_items(given.task, given.items, 99)
    found: dict[str, Any] = {}
    for name, what in SETTINGS.items():
        found[name] = stored(what, given.rows) | {"kl_by_token": divergence(model, items, what)}
    write(
        given.out,
        setting() | {"rows": given.rows, "items": given.items, "task": given.task, "settings": found},
    )
    for name, row in found.items() if given.out else ():
        kl = " ".join(f"{x:.2g}" for x in row["kl_by_token"])
        print(
            f"{name:22} {row['share_of_exact']:.1%} of bf16, errors {row['key_error']:.2f} {row['value_error']:.2f}, KL by token {kl}"
        )
    wrong = [
        n for n, r in found.items() if r["bytes_stored"] != r["bytes_formula"] or r["kl_by_token"][0] != 0.0
    ]
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
