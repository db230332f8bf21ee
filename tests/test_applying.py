"""A policy on a plain transformers model: the same numbers as in the lab, in a fresh process too, and undone after."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lab.edges import presets
from lab.edges.applying import apply
from lab.edges.cuts import Cut
from lab.edges.fingerprints import template_sha
from lab.edges.policy import Policy
from lab.edges.templates import places
from lab.errors import ConfigError, PromptError, RunError, UsageError
from lab.model.token_maps import token_maps
from lab.model.zoo import DATA, load, wrap
from lab.sim.moving import items
from lab.sim.tasks import draw_items
from tests import families

N = families.LAYERS
PORTABLE = Policy(
    cuts=(
        Cut(layers="4-5", heads=[0, 3], q="text+last", k="video"),
        *presets.frame_local(3, N, [1, 2, 3]).cuts,
    )
)
TEMPLATE = (
    "<|im_start|>user{question}{options}{instruction:Only give the best option.}<|im_end|><|im_start|>assistant "
    "Best option: ("
)
FULL_ROLES = Policy(
    cuts=(
        Cut(layers="2-6", q="question+instruction", k="video"), Cut(layers="4", q="option:1", k="question"),
        Cut(layers="6-8", q="last", k="template"),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    made = {}

    def get(name):
        if name not in made:
            hf = families.build(name).requires_grad_(False)
            made[name] = hf, wrap(families.build(name).requires_grad_(False)), families.inputs(name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", device="cpu")


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("policy", [PORTABLE, presets.video_exit(2, N), presets.paper("7b", "strict", N)], ids=["portable", "exit", "paper"])  # fmt: skip
@torch.no_grad()
def test_same_numbers_as_in_the_lab(pairs, family, policy):
    hf, model, x = pairs(family)
    clean = hf(**x).logits[:, -1]
    with apply(hf, policy) as pruned:
        cut = pruned(**x).logits[:, -1]
    torch.testing.assert_close(
        cut, model(model.prepare_inputs(**x), policy=policy)[:, -1], atol=1e-4, rtol=1e-4
    )
    assert float((cut - clean).abs().max()) > 1e-3
    assert torch.equal(hf(**x).logits[:, -1], clean)  # undone


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
@torch.no_grad()
def test_generate_obeys(pairs, family):
    hf, model, x = pairs(family)
    want = model.generate(model.prepare_inputs(**x), policy=PORTABLE, max_new_tokens=5, stop=[]).ids
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with apply(hf, PORTABLE) as pruned:
        got = pruned.generate(**x, **how)[:, x["input_ids"].shape[1] :]
        beams = pruned.generate(**x, **how, num_beams=2)
    assert torch.equal(got, want) and beams.shape[1] == x["input_ids"].shape[1] + 5
    assert "generate" not in hf.__dict__


@torch.no_grad()
def test_padded_worlds(pairs):
    hf, model, _ = pairs("llava_onevision")
    x = families.inputs("llava_onevision", worlds=2, pad=3)
    with apply(hf, PORTABLE) as pruned:
        both = pruned(**x).logits[:, -1]
    want = model(model.prepare_inputs(**x), policy=PORTABLE)[:, -1]
    torch.testing.assert_close(both, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_template_gives_the_roles_the_lab_gives(tiny):
    ready = tiny.prepare(items(1, seed=3)[0])
    ids, video = ready.inputs["input_ids"][0], tiny.family.placeholder(tiny.hf.config)
    told = places(TEMPLATE, tiny.tokenizer, ids.tolist(), (ids == video).tolist())
    tokens = token_maps(tiny.family, tiny.hf.config, ready.inputs, tokenizer=tiny.tokenizer, roles=[told])[0]
    assert tokens.roles() == ready.tokens.roles() and torch.equal(tokens.option, ready.tokens.option)
    assert template_sha(tokens) == template_sha(ready.tokens)
    hf = AutoModelForImageTextToText.from_pretrained(DATA / "tiny")
    want = tiny(ready, policy=FULL_ROLES)[0, -1]
    with apply(hf, FULL_ROLES, roles=TEMPLATE, tokenizer=tiny.tokenizer) as pruned:
        torch.testing.assert_close(pruned(**ready.inputs).logits[0, -1], want, atol=1e-4, rtol=1e-4)
    with apply(hf, FULL_ROLES, roles=lambda ids: told) as pruned:
        torch.testing.assert_close(pruned(**ready.inputs).logits[0, -1], want, atol=1e-4, rtol=1e-4)


FRESH = """
import sys, torch
from lab.edges.applying import apply
from lab.edges.policy import Policy
from transformers import AutoModelForImageTextToText
inputs = torch.load(sys.argv[1], weights_only=True)
hf = AutoModelForImageTextToText.from_pretrained(sys.argv[3])
with apply(hf, Policy.load(sys.argv[2])) as pruned:
    for x in inputs:
        print(pruned.generate(**x, max_new_tokens=1, do_sample=False)[0, -1].item())
"""


def test_a_fresh_process_answers_item_by_item_as_the_lab_does(tiny, tmp_path):
    policy = Policy(cuts=(*presets.video_exit(5, 8).cuts, Cut(layers="1-3", heads=[1], q="video", k="video", where="frame(q) - frame(k) >= 2")))  # fmt: skip
    policy.save(tmp_path / "policy.yaml")
    # 8 frames, and as the file says nothing of lengths, 12 and 16 too
    readies = [
        tiny.prepare(i, f) for f in (8, 12, 16) for i in draw_items("moving_direction", 2, f, frames=f)
    ]
    torch.save([r.inputs for r in readies], tmp_path / "inputs.pt")
    args = [
        sys.executable,
        "-c",
        FRESH,
        str(tmp_path / "inputs.pt"),
        str(tmp_path / "policy.yaml"),
        str(DATA / "tiny"),
    ]
    out = subprocess.run(args, capture_output=True, text=True, check=True).stdout.split()
    assert [int(o) for o in out] == [int(tiny(r, policy=policy)[0, -1].argmax()) for r in readies]


def test_a_handle_stands_for_the_model_until_undone(pairs):
    hf, _, x = pairs("llava_onevision")
    before = hf.config.text_config._attn_implementation
    pruned = apply(hf, PORTABLE)
    assert pruned.config is hf.config and pruned.device == hf.device
    with pytest.raises(UsageError, match="applied to this model already"):
        apply(hf, PORTABLE)
    pruned.undo()
    pruned.undo()
    assert hf.config.text_config._attn_implementation == before
    assert not hf._forward_pre_hooks or all("Applied" not in repr(h) for h in hf._forward_pre_hooks.values())


def test_what_a_foreign_prompt_does_not_tell_is_asked_for(pairs):
    hf, _, x = pairs("llava_onevision")
    with (
        apply(hf, Policy(cuts=(Cut(q="last", k="question"),))) as pruned,
        pytest.raises(UsageError, match="give roles="),
    ):
        pruned(**x)
    made = Policy.from_dict({**PORTABLE.to_dict(), "layout": {"template_sha": "0" * 16}})
    with apply(hf, made) as pruned, pytest.raises(ConfigError, match="roles="):
        pruned(**x)
    with apply(hf, PORTABLE) as pruned, pytest.raises(UsageError, match="input_ids"):
        pruned(inputs_embeds=torch.zeros(1, 3, 64))
    with apply(hf, presets.video_exit(2, 9)) as pruned, pytest.raises(ConfigError, match="9 layers"):
        pruned(**x)


def test_static_caches_and_pieces_are_refused(pairs):
    hf, _, x = pairs("llava_onevision")
    with apply(hf, PORTABLE) as pruned:
        with pytest.raises(RunError, match="dynamic cache"):
            pruned.generate(**x, max_new_tokens=2, cache_implementation="static")
        with pytest.raises((RunError, PromptError)):
            pruned.generate(**x, max_new_tokens=2, prefill_chunk_size=5)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("Question: {question} nowhere", "in 0 places"), ("o{question}", "it must in 1"), ("{question}", "begins with text"),
        ("a{foo}", "no slot"), ("a{question}b{question}", "stands twice"), ("a{question", "slots are"), ("plain", "has slots"),
    ],
)  # fmt: skip
def test_templates_that_do_not_fit_are_refused(tiny, template, says):
    ids = tiny.tokenizer("Question : Which way does it move ? Only the best option .")["input_ids"]
    with pytest.raises(PromptError, match=says):
        places(template, tiny.tokenizer, ids, [False] * len(ids))


def test_no_policy_and_a_lab_model_are_refused(tiny, pairs):
    with pytest.raises(UsageError, match="Policy.load"):
        apply(pairs("llava_onevision")[0], "policy.yaml")
    with pytest.raises(UsageError, match="model.pruned"):
        apply(tiny, PORTABLE)
    with pytest.raises(UsageError, match="tokenizer="):
        apply(pairs("llava_onevision")[0], PORTABLE, roles="a{question}")
