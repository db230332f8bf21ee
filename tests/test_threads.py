"""Many threads, copies, pickles, interrupts and gradient checkpointing: numbers stay right, and the model clean."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.errors import RunError
from lab.model.run import CURRENT
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap
from tests.families import FAMILIES, build, inputs

HEADS, LAYER = 4, 3
SCORES = f"blocks.{LAYER}.attn.hook_attn_scores"
POST = "blocks.1.hook_resid_post"


@functools.cache
def model_of(name: str) -> VideoLLM:
    return wrap(build(name))


def away(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


def edges(head: int) -> dict[int, Callable[[Tensor, Tensor], Tensor]]:
    def keep(q: Tensor, k: Tensor) -> Tensor:
        out = torch.ones(HEADS, len(q), len(k), dtype=torch.bool)
        out[head, -4:, 6:18:2] = False
        return out

    return {LAYER: keep}


def cut(value: Tensor, hook: Any) -> Tensor:
    return value.masked_fill(
        ~edges(1)[LAYER](torch.arange(value.shape[2]), torch.arange(value.shape[3])), float("-inf")
    )


def add(value: Tensor, hook: Any) -> Tensor:
    return value + 0.5


def double(value: Tensor, hook: Any) -> Tensor:
    return value * 2.0  # adding a constant would vanish in a LayerNorm


def assert_clean(model: VideoLLM, x: Any, clean: Tensor) -> None:
    assert CURRENT.get() is None
    assert not any(p._forward_hooks or p._backward_hooks for p in model.hook_dict.values())
    assert model.lock._owner is None and not model.lock._readers and not model.lock._depth
    with torch.no_grad():
        assert away(model(x, read="all"), clean) == 0.0


# ---- threads --------------------------------------------------------------------------------------------------------


def kinds(model: VideoLLM, ready: Any) -> list[Callable[[], Tensor]]:
    """Runs of every sort; each returns logits."""
    traced = f"blocks.{LAYER}.attn.hook_z"
    return [
        lambda: model(ready, read="all"),
        lambda: model(ready, edges=edges(0), read="all"),
        lambda: model(ready, edges=edges(2), read="all"),
        lambda: model(ready, look=[LAYER], read="all"),
        lambda: model.run_with_hooks(ready, fwd_hooks=[(SCORES, cut)], read="all"),
        lambda: model.run_with_hooks(ready, fwd_hooks=[(POST, add)], edges=edges(1), read="all"),
        lambda: model.run_with_hooks(ready, fwd_hooks=[("vision.1.hook_resid_post", double)], read="all"),
        lambda: model.run_with_cache(ready, names_filter=traced)[1][traced],
        lambda: model.generate(ready, max_new_tokens=3, edges=edges(1)).ids.float(),
    ]


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_two_hundred_mixed_runs_from_eight_threads(name: str) -> None:
    model = model_of(name)
    ready = model.prepare_inputs(**inputs(name, worlds=2, pad=3))
    runs = kinds(model, ready)
    with torch.no_grad():
        want = [run() for run in runs]
    assert all(away(want[0], want[i]) > 1e-3 for i in (1, 2, 4, 5, 6))
    jobs = [i % len(runs) for i in range(200)]
    random.Random(0).shuffle(jobs)
    before = model.tower_calls

    def work(i: int) -> float:
        with torch.no_grad():
            return away(runs[i](), want[i])

    with ThreadPoolExecutor(8) as pool:
        wrong = [d for d in pool.map(work, jobs) if d != 0.0]
    assert wrong == []
    assert model.tower_calls - before == sum(
        i == 6 for i in jobs
    )  # everybody else shares what stands at the door
    assert_clean(model, ready, want[0])


def test_a_clean_run_waits_for_open_hooks() -> None:
    model, x = model_of("internvl"), inputs("internvl")
    with torch.no_grad():
        clean = model(x, read="all")
    got: list[Tensor] = []

    def other() -> None:
        with torch.no_grad():
            got.append(model(x, read="all"))

    thread = threading.Thread(target=other)
    with torch.no_grad(), model.hooks(fwd_hooks=[(POST, add)]):
        thread.start()
        thread.join(0.3)
        assert got == [] and thread.is_alive()
        assert away(model(x, read="all"), clean) > 1e-2
    thread.join(30)
    assert len(got) == 1 and away(got[0], clean) == 0.0


def test_hooks_cannot_be_opened_in_the_middle_of_a_run() -> None:
    model, x = model_of("internvl"), inputs("internvl")
    with torch.no_grad():
        clean = model(x, read="all")

    def keep(q: Tensor, k: Tensor) -> Tensor:
        with model.hooks(fwd_hooks=[(POST, add)]):
            return torch.ones(len(q), len(k), dtype=torch.bool)

    with torch.no_grad(), pytest.raises(RunError, match="before the run starts"):
        model(x, edges={LAYER: keep})
    assert_clean(model, x, clean)


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_copy_fires_its_own_hooks(name: str) -> None:
    model, x = model_of(name), inputs(name)
    clean, cut_ = model(x, read="all"), model.run_with_hooks(x, fwd_hooks=[(SCORES, cut)], read="all")
    twin = copy.deepcopy(model)
    fired: list[str] = []
    points = (
        "vision.1.hook_resid_post",
        "connector.hook_out",
        SCORES,
        "blocks.2.attn.hook_q",
        "blocks.2.hook_mlp_out",
    )
    hooks: Any = [(p, lambda value, hook: fired.append(hook.name)) for p in points]
    with twin.hooks(fwd_hooks=hooks):
        assert away(model(x, read="all"), clean) == 0.0 and fired == []
        assert away(twin(x, look=[LAYER], read="all"), model(x, look=[LAYER], read="all")) == 0.0
    assert sorted(fired) == sorted(points)
    with model.hooks(fwd_hooks=hooks):
        fired.clear()
        assert away(twin(x, read="all"), clean) == 0.0 and fired == []
    assert away(twin.run_with_hooks(x, fwd_hooks=[(SCORES, cut)], read="all"), cut_) == 0.0
    next(twin.hf.parameters()).add_(1.0)
    assert_clean(model, x, clean)
    hooked = copy.deepcopy(model)
    assert not any(p is q for p, q in zip(hooked.hook_dict.values(), model.hook_dict.values(), strict=True))


FRESH = """
import pickle, sys, torch
torch.set_num_threads(1)
with open(sys.argv[1], "rb") as f:
    held = pickle.load(f)
from lab.model.run import CURRENT
add = ("blocks.1.hook_resid_post", lambda value, hook: value + 0.5)
for model, x, clean, hooked in held:
    with torch.no_grad():
        a = (model(x, read="all") - clean).abs().max()
        b = (model.run_with_hooks(x, fwd_hooks=[add], read="all") - hooked).abs().max()
    print(float(a), float(b), CURRENT.get())
"""


@torch.no_grad()
def test_pickles_work_here_and_in_a_fresh_process(tmp_path: Path) -> None:
    held: list[Any] = []
    for name in ("llava_onevision", "llava_next_video", "qwen3_vl"):
        model, x = model_of(name), inputs(name)
        clean = model(x, read="all")
        hooked = model.run_with_hooks(x, fwd_hooks=[(POST, add)], read="all")
        again = pickle.loads(pickle.dumps(model))
        assert away(again.run_with_hooks(x, fwd_hooks=[(POST, add)], read="all"), hooked) == 0.0
        assert_clean(again, x, clean)
        assert_clean(model, x, clean)
        held.append((model, x, clean, hooked))
    path = tmp_path / "models.pkl"
    path.write_bytes(pickle.dumps(held))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["0.0", "0.0", "None"] * 3, done.stderr


# ---- interrupts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("where", ["layer", "tower", "attention"])
def test_an_interrupt_in_the_middle_of_a_run_leaves_the_model_clean(name: str, where: str) -> None:
    model, x = model_of(name), inputs(name)
    parts = model.parts[LAYER]
    inside = {"layer": parts.mlp, "tower": model.family.tower_layers(model.hf)[1], "attention": parts.o}[
        where
    ]
    with torch.no_grad():
        clean = model(x, read="all")

    def stop(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = inside.register_forward_pre_hook(stop)
    runs: list[Callable[[], Any]] = [
        lambda: model(x), lambda: model(x, edges=edges(1)), lambda: model.generate(x, max_new_tokens=2),
        lambda: model.run_with_hooks(x, fwd_hooks=[(POST, add)]), lambda: model.run_with_cache(x),
        lambda: model.hf(**x),
    ]  # fmt: skip
    for run in runs:
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            run()
    handle.remove()
    assert_clean(model, x, clean)
    with torch.no_grad():
        assert away(model.hf(**x).logits, clean) == 0.0


# ---- gradient checkpointing -----------------------------------------------------------------------------------------


def gradients(model: VideoLLM, x: Any, hooks: list[Any], **kwargs: Any) -> list[Tensor]:
    model.hf.zero_grad()
    with model.hooks(fwd_hooks=hooks):
        model(x, read="all", **kwargs).square().mean().backward()
    assert CURRENT.get() is None  # a recomputation lets go of its layer
    found = [p.grad.clone() for p in model.hf.parameters() if p.grad is not None]
    model.hf.zero_grad()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_gradients(name: str) -> None:
    model, x = wrap(build(name)), inputs(name, worlds=2, pad=3)
    with torch.no_grad():
        clean = model(x, read="all")
    ways: list[tuple[list[Any], dict[str, Any]]] = [
        ([], {}), ([], {"edges": edges(1)}), ([(SCORES, cut)], {}),
        ([(POST, add), (f"blocks.{LAYER}.attn.hook_q", add), (f"blocks.{LAYER}.hook_resid_mid", double)], {"edges": edges(2)}),
    ]  # fmt: skip
    want = [gradients(model, x, hooks, **kwargs) for hooks, kwargs in ways]
    model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.hf.train()
    recomputed: list[int] = []
    count = (f"blocks.{LAYER}.attn.hook_z", lambda value, hook: recomputed.append(1))
    for (hooks, kwargs), grads in zip(ways, want, strict=True):
        recomputed.clear()
        got = gradients(model, x, [*hooks, count], **kwargs)
        assert len(recomputed) == 2  # forward, and again during backward
        assert len(got) == len(grads) > 40
        assert max(away(a, b) for a, b in zip(got, grads, strict=True)) <= 1e-6
    assert max(away(a, b) for a, b in zip(want[0], want[1], strict=True)) > 1e-4
    assert max(away(a, b) for a, b in zip(want[0], want[2], strict=True)) > 1e-4
    with pytest.raises(RunError, match=r"with model\.hooks"):
        model.run_with_hooks(x, fwd_hooks=[(POST, add)])
    model.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.hf.train()
    for kwargs in ({}, {"edges": edges(1)}):
        with pytest.raises(RunError, match="use_reentrant"):
            model(x, **kwargs)
    model.hf.gradient_checkpointing_disable()
    model.hf.eval()
    assert_clean(model, x, clean)
