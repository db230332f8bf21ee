"""Verify: is our loop this checkpoint's own forward? Logits against plain transformers, every layer seen, layers residual."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from lab.carriers import Frames, VideoQA
from lab.errors import LabError, LabWarning, ModelError

BOUND = {
    torch.float32: 1e-4,
    torch.float64: 1e-8,
    torch.bfloat16: 0.05,
    torch.float16: 0.01,
}  # of the largest logit


def verify(model: Any) -> dict[str, float]:
    """Compare one short text prompt with plain transformers'. Returns the measured differences.

    Raises ModelError, with both numbers, if logits differ, or if a layer is not `resid + attn + mlp`.
    """
    ids = _probe_ids(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ready = model.prepare_inputs(**inputs)
    try:
        with torch.no_grad():
            plain = model.hf(**{k: v.to(model.device) for k, v in inputs.items()}).logits
            names = [
                n for n in model.hook_dict if n.startswith("blocks.") and "resid" in n or n.endswith(_SUMS)
            ]
            ours, cache = model.run_with_cache(ready, names_filter=names, read="all")
    except LabError:
        raise
    except Exception as e:  # an unknown decoder may fail anywhere inside
        raise ModelError(f"{model.cfg.model_type}: the lab's loop cannot run this decoder: {e}") from e
    found = {"logits": _relative(plain, ours), "residual": _residual(model, cache)}
    _judge(model, found)
    return found


_SUMS = ("hook_attn_out", "hook_mlp_out", "mixer.hook_out")


def _probe_ids(model: Any) -> Tensor:
    """Eight text ids that are not special."""
    special = {model.family.placeholder(model.hf.config)}
    config = model.hf.config
    special |= {
        v for k, v in vars(config).items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)
    }
    rows = model.hf.get_input_embeddings().weight.shape[0]
    plain = [i for i in range(min(rows, 4096)) if i not in special]
    step = max(1, len(plain) // 8)
    return torch.tensor([plain[::step][:8]])


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp_min(1e-12))


def _residual(model: Any, cache: Any) -> float:
    """Largest relative gap between resid_mid + mlp_out and resid_post over the layers."""
    gaps = [
        _relative(cache[f"blocks.{p.index}.hook_resid_post"], cache[f"blocks.{p.index}.hook_resid_mid"] + cache[f"blocks.{p.index}.hook_mlp_out"])
        for p in model.parts
        if p.mlp is not None
    ]  # fmt: skip
    return max(gaps, default=0.0)


def _judge(model: Any, found: dict[str, float]) -> None:
    bound = BOUND.get(model.dtype, 0.05)
    if not found["logits"] <= bound:
        raise ModelError(
            f"{model.cfg.model_type}: logits differ from plain transformers' by {found['logits']:.2e} of the largest "
            f"logit (bound {bound:.0e}): the lab's loop is not this model's own"
        )
    if not found["residual"] <= max(bound, 1e-3):
        raise ModelError(
            f"{model.cfg.model_type}: resid_mid + mlp_out misses resid_post by {found['residual']:.2e} (bound "
            f"{max(bound, 1e-3):.0e}): its layers are not plain residual layers"
        )


def audit(model: Any) -> None:
    """Is the token map true? Lay out a question over two frames of noise and look at what arrives at the decoder's door.

    Exactly the positions that the map calls video must hold other embeddings than their ids'. Warns (LabWarning) if the
    prompt cannot be rendered: `prepare_inputs` still works. Raises ModelError with both numbers if the map is wrong.
    """
    if model.tokenizer is None:
        return
    pixels = torch.randint(
        0, 256, (2, 3, 112, 112), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    frames = Frames(pixels, torch.tensor([0.0, 1.0]), torch.arange(2), 1.0, 2.0, "noise")
    try:
        ready = model.prepare(VideoQA(frames, "What happens?"), 2)
    except LabError as e:
        warnings.warn(
            f"{model.cfg.model_name}: prompts cannot be rendered ({e}); prepare_inputs works",
            LabWarning,
            stacklevel=3,
        )
        return
    with torch.no_grad():
        door = model.see(ready)
        text = model.hf.get_input_embeddings()(ready.inputs["input_ids"].to(model.device))
    moved = (door.embeds.to(text.device) != text).any(-1)[0].nonzero().squeeze(1).cpu()
    said = ready.tokens.where(kind="video")
    if moved.tolist() != said.tolist():
        raise ModelError(
            f"{model.cfg.model_name}: the map says {len(said)} video positions, {len(moved)} arrive at the decoder; "
            "this checkpoint's layout is not what its family file says"
        )
