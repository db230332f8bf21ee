"""Cached generation: token by token what hf.generate gives; sampling seeded; streaming; cuts act in every step."""

import pytest
import torch

from lab.errors import UsageError
from lab.model.zoo import load
from tests.families import FAMILIES, UNKNOWN, inputs

BATCHES = {"one": {}, "two": {"worlds": 2}, "left-padded": {"worlds": 2, "pad": 3}}


def theirs(hf, x, n=20):
    with torch.no_grad():
        return hf.generate(**x, max_new_tokens=n, do_sample=False)[:, x["input_ids"].shape[1] :]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", FAMILIES + UNKNOWN)
def test_greedy_equals_transformers(name, batch, plain, wrapped):
    x = inputs(name, **BATCHES[batch])
    text, ids = wrapped(name).generate(wrapped(name).prepare_inputs(**x), max_new_tokens=20, return_ids=True)
    assert torch.equal(ids, theirs(plain(name), x)) and text.ids is ids


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_bf16_equals_transformers(name, plain, saved):
    x = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(name).items()}
    model = load(saved(name), device="cpu", dtype="bfloat16")
    ours = model.generate(model.prepare_inputs(**x), max_new_tokens=20).ids
    assert torch.equal(ours, theirs(plain(name, dtype=torch.bfloat16), x))


def test_stops_at_the_stop_token_and_pads(wrapped):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**inputs("internvl", worlds=2))
    free = model.generate(ready, max_new_tokens=12, stop=[]).ids
    stop = int(free[0, 3])
    cut = model.generate(ready, max_new_tokens=12, stop=[stop]).ids
    end = (cut[0] == stop).nonzero()[0].item()
    assert torch.equal(cut[0, : end + 1], free[0, : end + 1])
    assert bool((cut[0, end + 1 :] == 0).all())


def test_sampling_is_seeded(wrapped):
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**inputs("llava_onevision"))

    def draw(seed, **kw):
        return model.generate(ready, do_sample=True, seed=seed, max_new_tokens=12, stop=[], **kw).ids

    assert torch.equal(draw(1), draw(1))
    assert any(not torch.equal(draw(1), draw(s)) for s in (2, 3, 4))
    assert torch.equal(draw(5, top_k=1), model.generate(ready, max_new_tokens=12, stop=[]).ids)


def test_callback_streams_every_step(wrapped):
    model = wrapped("qwen3_vl")
    seen = []
    out = model.generate(
        model.prepare_inputs(**inputs("qwen3_vl", worlds=2)),
        max_new_tokens=5,
        stop=[],
        callback=lambda ids, text: seen.append(ids),
    )
    assert torch.tensor(seen).T.tolist() == out.ids.tolist()


NONSENSE = [
    {"max_new_tokens": 0},
    {"temperature": 0.0},
    {"top_p": 0.0},
    {"top_k": -1},
    {"max_new_tokens": 2.5},
    {"max_new_tokens": "3"},
    {"temperature": "warm"},
    {"stop": "a"},
    {"chunk": 2.5},
]


@pytest.mark.parametrize("bad", NONSENSE, ids=str)
def test_nonsense_settings_are_refused(bad, wrapped):
    model = wrapped("internvl")
    with pytest.raises(UsageError):
        model.generate(model.prepare_inputs(**inputs("internvl")), do_sample=True, **bad)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cut_in_generation_equals_full_recompute(name, wrapped):
    """The prompt's last row, and every generated row, do not read the video."""
    model, x = wrapped(name), inputs(name)
    ready = model.prepare_inputs(**x)
    video, n = ready.tokens.where(role="video"), ready.n_pos

    def keep(q, k):
        cut = (q >= n - 1)[:, None] & torch.isin(k, video.to(k.device))[None]
        return ~cut

    edges = dict.fromkeys(range(model.cfg.n_layers), keep)
    out = model.generate(ready, max_new_tokens=6, stop=[], edges=edges).ids
    assert not torch.equal(out, model.generate(ready, max_new_tokens=6, stop=[]).ids), "the cut must matter"
    from lab.model.answering import target_logits
    from lab.model.run import Run

    with torch.no_grad():
        steps = target_logits(model, ready, out, edges=edges)
        door, _ = model.arrive(ready)
        for step in range(6):
            longer = model.hf.get_input_embeddings()(out[:, :step])
            tail = door.then(longer)
            from lab.model.door import Door

            axes = [door.rope.expand(*tail.rope.shape[:-1], -1), tail.rope]
            deep = tuple(torch.cat([d, d.new_zeros(1, step, d.shape[2])], 1) for d in door.deep)
            whole = Door(torch.cat([door.embeds, longer], 1), torch.cat(axes, -1), None, deep)
            logits = model.read(*model.stream(whole, Run(dict(edges))))
            assert int(logits[0, -1].argmax()) == int(out[0, step])
            assert (logits[0, -1] - steps[0, step]).abs().max() < 1e-4
