"""Every probe on every family, plain, under a policy, under Mixture-of-Depths and under differential token drop.

Each must answer with a Result of its axes and at least one number, and leave the model as it was. What a probe finds is
held to planted truths in its own test file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lab.carriers import VideoQA
from lab.edges.policy import Policy
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.mechanisms.mixture_of_depths import MixtureOfDepths
from lab.model.hooking import hooked
from lab.model.zoo import wrap
from probes.attention import attention, entropy, frame_map, heads, rows, sinks
from probes.attribution import attribute
from probes.lens import gen_prob, lens, vocabulary, words
from probes.linear import linear
from probes.patching import attribution_patching, patching, path_patching
from probes.vision import tower_knockout, tower_lens
from tests import families
from tests.families import FAMILIES, clip

CUT = Policy.from_dict({"format": "edge-policy/1", "cuts": [{"layers": "2-3", "q": "last", "k": "video"}]})
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "policy": {"policy": CUT},
    "mod": {"mechanisms": [MixtureOfDepths(keep=0.5, selector="uniform")]},
    "dtd": {"mechanisms": [DifferentialTokenDrop(ratio=0.3)]},
}
LAYERS = 3
HALVES = [1, 3]


@functools.cache
def model_of(name: str) -> Any:
    """A tiny random model of few layers, so that hundreds of questions take seconds."""
    hf = families.build(name, text_config={"num_hidden_layers": LAYERS}).requires_grad_(False)
    return wrap(hf, families.tokenizer(name), preprocessor=families.preprocessor(name))


def questions(n: int = 1) -> list[VideoQA]:
    """Questions about random clips, each with the same question about another clip as its twin."""
    out: list[VideoQA] = []
    for i in range(n):
        twin = VideoQA(clip(4, seed=100 + i), "ab?", ("c", "d"), answer=1, id=f"twin-{i}")
        out.append(replace(twin, video=clip(4, seed=i), answer=i % 2, twin=twin, id=f"q-{i}"))
    return out


Probe = Callable[[Any, dict[str, Any]], Any]
ONE: dict[str, Any] = {"n_frames": 4, "show_progress": False}
PROBES: dict[str, Probe] = {
    "lens": lambda m, how: lens(m, questions(), ["last", "video"], words=["answer"], **ONE, **how),
    "lens by patch": lambda m, how: lens(m, questions(), "video", words=[40], measure="rank", by="patch", **ONE, **how),
    "words": lambda m, how: words(m, questions(), "video", top=2, layers=HALVES, **ONE, **how),
    "vocabulary": lambda m, how: vocabulary(m, questions(), lists={"letters": ["a", "b"]}, **ONE, **how),
    "gen_prob": lambda m, how: gen_prob(m, questions(), **ONE, **how),
    "attention": lambda m, how: attention(m, questions(), ["video->last"], layers=HALVES, **ONE, **how),
    "heads": lambda m, how: heads(m, questions(), "video->last", top=2, **ONE, **how),
    "entropy": lambda m, how: entropy(m, questions(), **ONE, **how),
    "frame_map": lambda m, how: frame_map(m, questions(), layers=HALVES, **ONE, **how),
    "rows": lambda m, how: rows(m, questions()[0], layers=HALVES, n_frames=4, **how),
    "sinks": lambda m, how: sinks(m, questions()[0], above=1.5, layers=HALVES, n_frames=4, **how),
    "patching": lambda m, how: patching(m, questions(), metric="logit_diff", **ONE, **how),
    "patching heads": lambda m, how: patching(m, questions(), by="head", site="z", role="last", metric="logit_diff", **ONE, **how),
    "path_patching": lambda m, how: path_patching(m, questions(), ["video->last"], metric="logit_diff", **ONE, **how),
    "attribution_patching": lambda m, how: attribution_patching(m, questions(), metric="logit_diff", **ONE, **how),
    "shapley": lambda m, how: attribute(m, questions(), output="logprob", **ONE, **how),
    "occlusion": lambda m, how: attribute(m, questions(), method="occlusion", block=(2, 3, 3), output="logprob", **ONE, **how),
    "ig": lambda m, how: attribute(m, questions(), method="ig", output="logprob", n_steps=8, **ONE, **how),
    "linear": lambda m, how: linear(m, questions(6), [0, 1, 0, 1, 0, 1], folds=2, shuffles=1, **ONE, **how),
    "tower_lens": lambda m, how: tower_lens(m, questions(), layers=[2, 4], **ONE, **how),
    "tower_knockout": lambda m, how: tower_knockout(m, questions(), layers=[2], **ONE, **how),
}  # fmt: skip


# random models: first order may well be no guide, and is meant to say so
@pytest.mark.filterwarnings("ignore:these estimates correlate only:lab.errors.LabWarning")
@pytest.mark.parametrize("way", HOW)
@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_probe_answers(name: str, probe: str, way: str) -> None:
    model = model_of(name)
    found = PROBES[probe](model, HOW[way])
    assert found.values.ndim == len(found.axes) and np.isfinite(found.values).any(), found.values
    assert not hooked(model) and not any(p._forward_hooks for p in model.hook_dict.values())
