"""Memory: what is predicted from a config against what is allocated and what a process grows by; chunked prefill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lab.bench import models
from lab.bench.measuring import peak_bytes
from lab.bench.memory import BOUND, SIZES, compare
from lab.errors import ModelError, RunError, UsageError
from lab.model.memory import LINES, predict
from lab.model.zoo import wrap
from tests import families as fam

torch.set_num_threads(1)
FRAMES = 32


def wide(name: str, dtype: torch.dtype) -> Any:
    """A tiny model whose widths stand apart, so that one term cannot hide behind another."""
    tower = {"hidden_size": 96, "intermediate_size": 384}
    model = wrap(
        fam.build(name, vision_config=tower, text_config={"intermediate_size": 384})
        .to(dtype)
        .requires_grad_(False)
    )
    model.preprocessor = fam.preprocessor(name)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", fam.FAMILIES)
def test_terms_follow_what_is_allocated(name: str, dtype: torch.dtype) -> None:
    """Tower within 15 %, decoder with its cache within 10 %, weights within buffers' rounding."""
    model = wide(name, dtype)
    x = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fam.inputs(name, frames=FRAMES).items()}
    ready = model.prepare_inputs(**x)
    # 24 x 16 pixels are the 4 x 6 patches of `fam.inputs`
    video = {"n_frames": FRAMES, "width": 24, "height": 16, "new_tokens": 4, "device": "cpu"}
    short = predict(model, text_tokens=8, **video)
    said = predict(model, text_tokens=8 + ready.n_pos - short.positions, **video)
    with torch.no_grad():
        tower = peak_bytes(lambda: (ready.memo.clear(), model.see(ready)))
        decoder = peak_bytes(lambda: model.generate(ready, max_new_tokens=4, stop=()))
    door = ready.n_pos * model.cfg.d_model * model.dtype.itemsize  # was there before
    weights = sum(p.nbytes for p in model.hf.parameters())
    assert said.tower == pytest.approx(tower, rel=0.15)
    assert said.kv + said.activations - door == pytest.approx(decoder, rel=0.10)
    assert said.weights == pytest.approx(weights, rel=0.001)


@pytest.mark.parametrize("size", ["small", "135M"])
def test_prediction_is_what_a_process_grows_by(size: str) -> None:
    """Load, 64 frames, generate, in a process of its own. In "small" activations weigh more than weights do."""
    found = compare(SIZES[size], frames=64)
    assert abs(found["ratio"] - 1) <= BOUND, found


def test_a_prediction_is_a_table_of_bytes(tmp_path: Path) -> None:
    models.build(models.Shape()).save_pretrained(tmp_path)
    said = predict(tmp_path, n_frames=4, device="cpu")
    assert tuple(dict(said)) == LINES
    running = said.inputs + max(said.tower, said.kv + said.activations)
    assert said["total"] == said.weights + said.overhead + max(said.loading, running)
    assert f"{said.positions:,} + 64 positions" in str(said)
    assert predict(models.config(models.Shape()), n_frames=4, device="cpu").weights == said.weights


def test_what_grows_and_what_does_not() -> None:
    config = models.config(models.Shape())
    few, many = (predict(config, n_frames=n, device="cpu") for n in (8, 64))
    assert many.weights == few.weights and many.kv > few.kv
    assert many.tower == pytest.approx(8 * few.tower, rel=0.02)
    half = predict(config, n_frames=64, dtype="bfloat16", device="cpu")
    assert half.kv * 2 == many.kv and half.loading == pytest.approx(2 * half.weights, rel=0.001)
    pieces = predict(config, n_frames=64, device="cpu", chunk=128)
    assert pieces.activations < many.activations / 2 and pieces.kv == many.kv


def test_a_7b_at_64_frames_is_what_its_sizes_say() -> None:
    """Qwen2-7B (7.62e9) and SigLIP so400m without its head (0.41e9) in two bytes each, 64 x 196 + 1 video tokens."""
    said = predict(
        models.config(models.SEVEN_B), n_frames=64, dtype="bfloat16", device="cuda", text_tokens=64
    )
    assert said.weights == pytest.approx(2 * 8.03e9, rel=0.005)
    assert said.positions == 64 * 196 + 1 + 64
    assert said.kv == pytest.approx(28 * 2 * 4 * 128 * 2 * said.positions, rel=0.05)


@pytest.mark.parametrize(
    ("what", "kw", "error", "says"),
    [
        ("/nowhere/at/all", {}, ModelError, "no checkpoint at"),
        (7, {}, UsageError, "got int"),
        (None, {"n_frames": 0}, UsageError, "n_frames must be at least 1, got 0"),
        (None, {"chunk": 0}, UsageError, "chunk must be at least 1"),
        (None, {"dtype": "int8"}, UsageError, "'int8' is not one of"),
    ],
)
def test_wrong_questions_are_refused(
    what: Any, kw: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        predict(models.config(models.Shape()) if what is None else what, **kw)


# ---- long videos: prefill in pieces ------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("name", fam.FAMILIES + fam.UNKNOWN)
def test_chunked_prefill_reads_the_same(name: str, pad: int) -> None:
    """Logits within 1e-5 and the same ids, two worlds, the second left-padded."""
    model = wrap(fam.build(name).requires_grad_(False))
    ready = model.prepare_inputs(**fam.inputs(name, worlds=2, pad=pad))
    with torch.no_grad():
        whole = model(ready)
        ids = model.generate(ready, max_new_tokens=6, stop=()).ids
        for chunk in (2, 7, 1000):
            torch.testing.assert_close(model(ready, chunk=chunk), whole, rtol=0, atol=1e-5)
            assert torch.equal(model.generate(ready, max_new_tokens=6, stop=(), chunk=chunk).ids, ids)


def test_chunked_prefill_takes_less_memory() -> None:
    shape = models.Shape(layers=2)
    model = wrap(models.build(shape))
    ready = model.prepare_inputs(**models.inputs(shape, 20))
    with torch.no_grad():
        model(ready)
        whole, pieces = (
            peak_bytes(lambda c=c: model.generate(ready, max_new_tokens=1, chunk=c)) for c in (None, 64)
        )
    assert pieces < whole / 2


def test_pieces_that_would_mean_something_else_are_refused() -> None:
    model = wrap(fam.build("qwen3_5").requires_grad_(False))
    ready = model.prepare_inputs(**fam.inputs("qwen3_5", worlds=2, pad=5))
    with pytest.raises(RunError, match="chunk=2 or more"):
        model(ready, chunk=1)
    with pytest.raises(UsageError, match="chunk must be at least 1"):
        model(ready, chunk=0)
    with pytest.raises(RunError, match="drop chunk="):
        model.run_with_cache(ready, names_filter="blocks.1.hook_resid_pre", chunk=4)
