"""The first trace: nothing cut = baseline, an independent implementation agrees, planted truths are found."""

import numpy as np
import pytest
import torch

from lab.errors import LabWarning, UsageError
from lab.runs import Cancel, Cancelled
from probes.knockout import dense_edges, knockout, layers_of
from probes.pathways import cut_mask
from tests.edgecases import attention_only_in
from tests.families import FAMILIES, inputs


def test_the_window_is_clipped_not_shifted():
    assert list(layers_of(0, 9, 32)) == [0, 1, 2, 3, 4]
    assert list(layers_of(10, 9, 32)) == list(range(6, 15))
    assert list(layers_of(31, 9, 32)) == [27, 28, 29, 30, 31]
    assert list(layers_of(3, 4, 8)) == [1, 2, 3, 4] and list(layers_of(5, 1, 8)) == [5]


@pytest.mark.parametrize("name", FAMILIES)
def test_cutting_nothing_is_the_baseline(name, wrapped):
    model = wrapped(name)
    result = knockout(model, model.prepare_inputs(**inputs(name)), ["none"], show_progress=False)
    assert (result.values == 0.0).all() and result.values.shape == (1, 1, model.cfg.n_layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_all_true_mask_is_the_clean_run(name, wrapped):
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    everything = dict.fromkeys(
        range(model.cfg.n_layers), lambda q, k: torch.ones(len(q), len(k), dtype=torch.bool)
    )
    with torch.no_grad():
        assert torch.equal(model(ready, read="all", edges=everything), model(ready, read="all"))


@pytest.mark.parametrize(
    "pathway", ["cross-frame", "video->text", "video->last", "text->last", "last->last", "frame:1->last"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_against_an_independent_masked_eager_forward(name, pathway, plain, wrapped):
    """transformers' own eager attention, its mask overwritten layer by layer by a pre-hook on self_attn."""
    model, x = wrapped(name), inputs(name)
    ready = model.prepare_inputs(**x)
    window, n = 3, ready.n_pos
    ours = knockout(model, ready, [pathway], window=window, show_progress=False).values[0, 0]

    roles, frame = ready.tokens.roles(), ready.tokens.frame.tolist()
    keys, _, queries = pathway.partition("->")
    pick = {
        "video": [i for i in range(n) if roles[i] == "frame"], "text": [i for i in range(n) if roles[i] == "text"],
        "last": [n - 1], "frame:1": [i for i in range(n) if frame[i] == 1 and roles[i] == "frame"],
    }  # fmt: skip
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)
    if pathway == "cross-frame":
        pairs = [(i, j) for i in pick["video"] for j in pick["video"] if frame[j] < frame[i]]
    else:
        pairs = [(i, j) for i in pick[queries] for j in pick[keys] if j <= i]
    for i, j in pairs:
        mask[i, j] = torch.finfo(torch.float32).min
    hf = plain(name, attn_implementation="eager")
    with torch.no_grad():
        base = hf(**x).logits[0, -1].softmax(-1)
        token = int(base.argmax())
        for centre in range(model.cfg.n_layers):
            handles = [
                hf.model.language_model.layers[i].self_attn.register_forward_pre_hook(
                    lambda m, a, kw: (a, {**kw, "attention_mask": mask[None, None]}), with_kwargs=True
                )
                for i in layers_of(centre, window, model.cfg.n_layers)
            ]
            p = hf(**x).logits[0, -1].softmax(-1)[token]
            for h in handles:
                h.remove()
            expected = float((p - base[token]) * 100 / base[token])
            assert abs(ours[centre] - expected) < 2e-3, (centre, ours[centre], expected)
    assert np.abs(ours).max() > 1e-3, "on random weights every one of these cuts must do something"


def test_a_planted_route_is_found(wrapped):
    """All attention of the model is switched off but one edge set in one layer; the sweep must point there alone."""
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**inputs("llava_onevision"))
    with attention_only_in(model, 2), pytest.warns(LabWarning, match="cross-frame.*changed nothing"):
        result = knockout(model, ready, ["video->last", "cross-frame"], window=1, show_progress=False)
    flow = np.abs(result.select(pathway="video->last").values[0])
    assert flow[2] > 1e-2 and np.delete(flow, 2).max() == 0.0
    # with attention in one layer only, what video rows read of each other can never reach the last row
    assert np.abs(result.select(pathway="cross-frame").values).max() == 0.0


def test_generated_rows_follow_the_last_prompt_row(wrapped):
    model = wrapped("llava_onevision")
    tokens = model.prepare_inputs(**inputs("llava_onevision")).tokens
    keep = dense_edges(cut_mask(tokens, "video->last"))
    n = len(tokens)
    got = keep(torch.tensor([n - 2, n - 1, n, n + 3]), torch.arange(n + 4))
    video = tokens.where(role="video")
    assert got[0].all()
    for row in got[1:]:
        assert not row[video].any() and row[n:].all() and int((~row).sum()) == len(video)


@pytest.mark.parametrize(
    ("pathway", "message"),
    [
        ("video>last", "is not 'keys->queries'"), ("vidoe->last", "closest: video"), ("frame:x->last", "take a number"),
        ("question->last", "no token of 'question'"), ("frame:99->last", "no token of 'frame:99'"),
        ("true-option->last", "needs an item"), ("", "is not 'keys->queries'"),
    ],
)  # fmt: skip
def test_bad_pathways_say_what_is_wrong(pathway, message, wrapped):
    model = wrapped("internvl")
    with pytest.raises(UsageError, match=message):
        knockout(model, model.prepare_inputs(**inputs("internvl")), [pathway], show_progress=False)


def test_a_cut_without_effect_warns(wrapped):
    model = wrapped("internvl")
    with pytest.warns(LabWarning, match="changed nothing"):
        knockout(model, model.prepare_inputs(**inputs("internvl")), ["last->video"], show_progress=False)


def test_worlds_and_windows_are_checked(wrapped):
    model = wrapped("internvl")
    with pytest.raises(UsageError, match="2"):
        knockout(
            model, model.prepare_inputs(**inputs("internvl", worlds=2)), ["video->last"], show_progress=False
        )
    with pytest.raises(UsageError, match="window"):
        knockout(model, model.prepare_inputs(**inputs("internvl")), ["video->last"], window=0)
    with pytest.raises(UsageError, match="option"):
        knockout(
            model,
            model.prepare_inputs(**inputs("internvl")),
            ["video->last"],
            metric="answer",
            show_progress=False,
        )


def test_a_cancelled_sweep_leaves_the_model_clean(wrapped):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**inputs("internvl"))
    with torch.no_grad():
        clean = model(ready)
    cancel = Cancel()
    cancel.set()
    with pytest.raises(Cancelled):
        knockout(model, ready, ["video->last"], cancel=cancel, show_progress=False)
    with torch.no_grad():
        assert torch.equal(model(ready), clean)


def test_hybrid_decoders_are_cut_where_they_have_edges(wrapped):
    model = wrapped("qwen3_5")
    result = knockout(
        model, model.prepare_inputs(**inputs("qwen3_5")), ["video->last"], window=1, show_progress=False
    )
    without = [i - 1 for i in result.notes["no_edges"]]
    assert without and (result.values[0, 0, without] == 0).all() and np.abs(result.values).max() > 0


def test_the_usual_pathways_fit_the_prompt(wrapped):
    """Without roles for the question: the portable ones; no cross-frame curve for one frame."""
    model = wrapped("internvl")
    result = knockout(model, model.prepare_inputs(**inputs("internvl")), window=2, show_progress=False)
    assert result.coords["pathway"] == [
        "cross-frame",
        "video->text",
        "video->last",
        "text->last",
        "last->last",
    ]
    one = knockout(model, model.prepare_inputs(**inputs("internvl", frames=1)), window=2, show_progress=False)
    assert one.coords["pathway"] == ["video->text", "video->last", "text->last", "last->last"]
