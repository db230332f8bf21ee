"""How the cost of knock-out sweeps grows with length, layers and windows; and what one knock-out costs elsewhere.

    python -m lab.bench.scaling --out scaling.json          (small, on any model: `vlab figures run scaling cost`)

The decoder of `lab.bench.sweep` (8 heads, 2 of keys, MLP of 4 d; --d gives its width) and its ten text pathways. Fast is the stored
clean run and all points from it; naive one SDPA forward with a dense mask per point, of which some are timed in the same
run and scaled. `pieces` names what grows; everything else stays as `BASE` says. CPU time of one thread.

`others` is one knock-out of video->question in the middle third of the layers, each tool its own way, over a clean SDPA
forward of the same round, tower left out where the tool lets us (TransformerLens and the tower column include it):
eager attention with an additive mask (the released method), TransformerLens's bridge with a hook on the scores, nnsight
editing the scores of our points, our reference executor, and our fast one with and without a store.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lab.adapters.nnsight import tracing
from lab.adapters.transformer_lens import bridge
from lab.bench import models
from lab.bench.measuring import median_ratio, paired, setting, write
from lab.bench.sweep import PATHWAYS, SHAPE, compared, prompt
from lab.edges.closure import Cuts
from lab.edges.cutrows import rows_of
from lab.edges.dense import run_dense
from lab.edges.fast import ROWS, run_cut
from lab.edges.pathrows import path_rows
from lab.edges.store import Store
from lab.edges.sweeping import layers_of
from lab.model.ready import Ready
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap

NEG = float("-inf")
# frames of 144 tokens, layers, windows of a third of the layers at so many centres
BASE = {"frames": 4, "layers": 8, "windows": 8}
PIECES: dict[str, tuple[int, ...]] = {
    "frames": (1, 2, 4, 8, 16), "layers": (4, 8, 16, 32), "windows": (1, 2, 4, 8),
}  # fmt: skip


def grown(what: str, value: int, *, shape: models.Shape, n_naive: int) -> dict[str, Any]:
    """One point of the figure."""
    sizes = {**BASE, what: value}
    layers = sizes["layers"]
    windows = layers if what == "layers" else sizes["windows"]
    model = wrap(models.build(replace(shape, layers=layers)))
    ready = prompt(model, shape, sizes["frames"])
    model.see(ready)  # the tower runs once for either
    centres = torch.linspace(0, layers - 1, windows).round().long().unique().tolist()
    found = compared(model, ready, _cuts(ready, layers, centres), n_naive=n_naive, n_rows=ROWS)
    return {"at": value, **sizes, "windows": len(centres), **found}


def _cuts(ready: Ready, layers: int, centres: Sequence[int]) -> list[Cuts]:
    width = max(1, layers // 3)
    cuts: list[Cuts] = []
    for pathway in PATHWAYS:
        cut = path_rows(ready.tokens, pathway, ready.item)
        cuts += [dict.fromkeys(layers_of(c, width, layers), cut) for c in centres]
    return cuts


# ---- one knock-out, by others ---------------------------------------------------------------------------------------------


def others(shape: models.Shape, frames: int, *, pairs: int) -> dict[str, Any]:
    """Seconds of one knock-out by each tool over a clean forward's, and how far each one's logits lie from ours."""
    plain = models.build(shape)
    eager = copy.deepcopy(plain)
    eager.set_attn_implementation({"text_config": "eager"})
    model = wrap(copy.deepcopy(plain))
    ready = prompt(model, shape, frames)
    door = model.see(ready)
    inner = {
        "inputs_embeds": door.embeds,
        "attention_mask": ready.inputs["attention_mask"],
        "use_cache": False,
    }
    layers = list(layers_of(shape.layers // 2, max(1, shape.layers // 3), shape.layers))
    cut = path_rows(ready.tokens, "video->question+option", ready.item)
    mask = rows_of(cut, torch.arange(ready.n_pos))[0]
    store, cuts = Store.of(model, ready), [dict.fromkeys(layers, cut)]
    works: dict[str, Callable[[], Tensor]] = {
        "clean, sdpa": lambda: plain(**inner, logits_to_keep=1).logits,
        "clean with its tower": lambda: plain(**ready.inputs, use_cache=False, logits_to_keep=1).logits,
        "clean, eager": lambda: eager(**inner, logits_to_keep=1).logits,
        "eager with a mask": lambda: _eager(eager, inner, layers, mask),
        "TransformerLens": _transformer_lens(model, ready, layers, mask),
        "nnsight": lambda: _nnsight(model, ready, layers, mask),
        "ours, reference": lambda: run_dense(model, ready, cuts[0]),
        "ours, fast, no store": lambda: run_cut(model, Store.of(model, ready), cuts)[0],
        "ours, fast, stored": lambda: run_cut(model, store, cuts)[0],
    }
    reference = works["ours, reference"]()[..., -1, :].reshape(-1)
    apart = {
        name: float((work()[..., -1, :].reshape(-1) - reference).abs().max()) for name, work in works.items()
    }
    took = paired(works, pairs=pairs, warm=0)
    return {
        "positions": ready.n_pos, "layers": shape.layers, "cut_layers": len(layers), "pairs": pairs, "seconds": took,
        "ratios": {name: round(median_ratio(took, name, "clean, sdpa"), 4) for name in works},
        "difference_to_ours": apart,
    }  # fmt: skip


def _eager(hf: Any, inner: dict[str, Any], layers: Sequence[int], cut: Tensor) -> Tensor:
    """The released method: an additive mask of finfo.min handed to the layers by a wrapper of self_attn.forward."""
    dtype = inner["inputs_embeds"].dtype
    open_ = torch.ones_like(cut).tril() & ~cut
    mask = ((~open_).to(dtype) * torch.finfo(dtype).min)[None, None]
    attentions = [hf.model.language_model.layers[i].self_attn for i in layers]
    for a in attentions:
        a.forward = _handed(a.forward, mask)
    try:
        return hf(**inner, logits_to_keep=1).logits
    finally:
        for a in attentions:
            del a.forward


def _handed(forward: Callable[..., Any], mask: Tensor) -> Callable[..., Any]:
    def handed(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{**kwargs, "attention_mask": mask})

    return handed


def _transformer_lens(
    model: VideoLLM, ready: Ready, layers: Sequence[int], cut: Tensor
) -> Callable[[], Tensor]:
    made, given = bridge(model), dict(ready.inputs)
    ids = given.pop("input_ids")

    def hide(scores: Tensor, hook: Any) -> Tensor:
        return scores.masked_fill(cut, torch.finfo(scores.dtype).min)

    hooks = [(f"blocks.{i}.attn.hook_attn_scores", hide) for i in layers]
    return lambda: made.run_with_hooks(ids, fwd_hooks=hooks, output_attentions=False, **given)


def _nnsight(model: VideoLLM, ready: Ready, layers: Sequence[int], cut: Tensor) -> Tensor:
    with torch.no_grad(), tracing(model) as n, n.trace(ready, look=list(layers)):
        for i in layers:
            point = n.blocks[i].attn.hook_attn_scores
            point.output = point.output.masked_fill(cut, NEG)
        logits = n.output.save()
    return logits


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Cost of knock-outs as prompts, models and sweeps grow.")
    parser.add_argument("--naive", type=int, default=3, help="how many of the naive points are timed")
    parser.add_argument("--pairs", type=int, default=3, help="rounds of the comparison with other tools")
    parser.add_argument("--d", type=int, default=SHAPE.d, help="width of the decoder, a multiple of 64")
    parser.add_argument("--out", help="json file; standard output if absent")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shape = replace(SHAPE, d=args.d, mlp=4 * args.d)
    with torch.no_grad():
        pieces = {w: [grown(w, v, shape=shape, n_naive=args.naive) for v in at] for w, at in PIECES.items()}
        elsewhere = others(replace(shape, layers=6), 8, pairs=args.pairs)
    write(
        args.out,
        {"setting": setting(), "shape": asdict(shape), "base": BASE, "pieces": pieces, "others": elsewhere},
    )


if __name__ == "__main__":
    main()
