"""What a sweep can measure and cut: metrics by hand, texts as answers, heads, pairs of frames, triangles, own pathways."""

import json

import numpy as np
import pytest
import torch

from lab.carriers import VideoQA
from lab.edges import sweeping
from lab.edges.dense import run_dense
from lab.edges.metrics import METRICS, UNITS, changes
from lab.edges.pathways import cut_mask, listed, name_of, usual_pathways
from lab.edges.sweeping import Sweep, sweep
from lab.errors import LabWarning, UsageError
from lab.model.answering import letter_ids, target_logits
from lab.model.zoo import wrap
from lab.result import Result
from probes.knockout import KnockoutRecipe
from tests import families
from tests.families import FAMILIES, inputs

QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def asking():
    """name -> a wrapped tiny model with a tokenizer and preprocessor."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = wrap(
                families.build(name), families.tokenizer(name), preprocessor=families.preprocessor(name)
            )
        return made[name]

    return get


@pytest.fixture(scope="module")
def video():
    return np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), dtype=np.uint8)


def choice(video, **kw):
    return VideoQA(
        video, "which ?", **{"options": ("left", "right", "up"), "answer": 1, "id": "q", "task": "t", **kw}
    )


# ---- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["fast", "reference"])
def test_every_metric_by_hand(executor, asking, video):
    model = asking("llava_onevision")
    ready = model.prepare(choice(video), 4)
    found = sweep(model, ready, ["video->last"], window=2, metrics=METRICS, executor=executor, **QUIET)
    assert found.axes == ("metric", "item", "pathway", "layer") and found.coords["metric"] == list(METRICS)
    cut, ids = cut_mask(ready.tokens, "video->last"), letter_ids(model.tokenizer, 3)
    clean = run_dense(model, ready, {})[0, -1].double()
    top, chosen = int(clean.argmax()), int(clean[ids].argmax())
    for centre in range(5):
        layers = Sweep(("video->last",), 2).layers(centre, 5)
        z = run_dense(model, ready, dict.fromkeys(layers, cut))[0, -1].double()
        p, q = clean.softmax(-1), z.softmax(-1)
        po, qo = clean[ids].softmax(-1), z[ids].softmax(-1)
        odds = [float(torch.log(o[chosen] / (1 - o[chosen]))) for o in (po, qo)]
        right = float((q[ids[1]] - p[ids[1]]) / p[ids[1]] * 100)
        expected = {
            "argmax": float((q[top] - p[top]) / p[top] * 100), "answer": right, "target": right,
            "logprob": float(q[ids[1]].log() - p[ids[1]].log()), "option_p": 100 * float(qo[chosen] - po[chosen]),
            "margin": odds[1] - odds[0], "flip": float(int(z[ids].argmax()) != chosen),
            "kl": float((po * (po.log() - qo.log())).sum()),
        }  # fmt: skip
        for metric, value in expected.items():
            got = found.select(metric=metric).values[0, 0, centre]
            assert abs(got - value) <= 1e-3 * max(1, abs(value)), (metric, centre, got, value)
    assert found.select(metric="kl").values.max() > 1e-4
    assert found.select(metric="margin").unit == UNITS["margin"] and "own unit" in found.unit


def test_one_metric_keeps_the_shape_and_several_agree_with_it(asking, video):
    model = asking("internvl")
    ready = model.prepare(choice(video), 4)
    both = sweep(model, ready, ["video->last"], metrics=["argmax", "flip"], **QUIET)
    one = sweep(model, ready, ["video->last"], **QUIET)
    assert one.axes == ("item", "pathway", "layer") and one.unit == "% change in probability"
    assert np.array_equal(both.select(metric="argmax").values, one.values)
    assert set(np.unique(both.select(metric="flip").values)) <= {0.0, 1.0}


def test_percent_of_nothing_is_nan_and_said(asking, video, monkeypatch):
    """softmax underflows to 0 for an answer far below the others; that is no change of minus nothing."""
    change = changes("answer", np.array([0.1, 0.0]), np.array([0.2, 0.0]))
    assert change[0] == -50.0 and np.isnan(change[1])
    model = asking("internvl")
    bias = torch.zeros(model.cfg.d_vocab)
    bias[letter_ids(model.tokenizer, 3)[1]] = -1e4
    unembed = type(model).unembed
    monkeypatch.setattr(type(model), "unembed", lambda self, x: unembed(self, x) + bias)
    with pytest.warns(LabWarning, match="1 of 1 items"):
        found = sweep(model, model.prepare(choice(video), 4), ["video->last"], metric="answer", **QUIET)
    assert np.isnan(found.values).all()


def test_a_tokenizer_without_letters_can_still_be_swept(asking, video, monkeypatch):
    model = asking("internvl")
    ready = model.prepare(choice(video), 4)

    def none(*args):
        raise UsageError("the tokenizer has no single token for option letter 'A'")

    monkeypatch.setattr(sweeping, "letters_of", none)
    found = sweep(model, ready, ["video->last"], **QUIET)
    assert found.notes["correct"] == {"q": None} and np.abs(found.values).max() > 0
    with pytest.raises(UsageError, match="option letter"):
        sweep(model, ready, ["video->last"], metric="kl", **QUIET)


# ---- texts as answers ---------------------------------------------------------------------------------------------------


def teacher_forced(model, ready, text, cut, layers):
    """log p of every token of `text`, by cached decoding, `cut` over prompt and response rows in some layers."""

    def keep(q, k):
        return ~cut[q][:, k]

    ids = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = target_logits(model, ready, ids, edges=dict.fromkeys(layers, keep))
    return logits.log_softmax(-1).gather(-1, ids[..., None])[0, :, 0].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_target_equals_cached_teacher_forcing(name, asking, video):
    """Per token and summed, for cuts of the prompt and of the response, on an open question."""
    model, text = asking(name), "to the left"
    item = VideoQA(video, "which way ?", answer=text, id="open")
    ready = model.prepare(item, 4)
    ways = ["video->last", "video->response", "question->response", "response->response", "cross-frame"]
    each = sweep(model, ready, ways, window=2, metric="logprob", per_token=True, **QUIET)
    both = sweep(model, ready, ways, window=2, metrics=["logprob", "answer"], **QUIET)
    slow = sweep(model, ready, ways, window=2, metric="logprob", executor="reference", **QUIET)
    assert each.axes == ("item", "pathway", "layer", "token") and each.shape[-1] == len(text)
    summed, changed = (both.select(metric=m).values for m in ("logprob", "answer"))
    assert np.abs(summed - each.values.sum(-1)).max() <= 1e-5 and np.abs(summed - slow.values).max() <= 1e-5
    assert np.abs(changed - (np.exp(summed) - 1) * 100).max() <= 1e-4  # p of all tokens
    ids = tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = ready.tokens.generated(ids)
    clean = teacher_forced(model, ready, text, torch.zeros(len(tokens), len(tokens), dtype=torch.bool), [0])
    for w, way in enumerate(ways):
        cut = cut_mask(tokens, way, item)
        for centre in (0, 3):
            cutting = teacher_forced(model, ready, text, cut, Sweep(("none",), 2).layers(centre, 5))
            assert np.abs(each.values[0, w, centre] - (cutting - clean)).max() <= 2e-5, (
                way,
                centre,
            )
    assert (each.values[0, 1, :, 0] == 0).all(), (
        "the first token is foretold by the prompt, whatever the response reads"
    )
    assert np.abs(each.values[0, 1, :, 1:]).max() > 1e-3 and each.notes["target"] == {"open": list(text)}
    assert each.ledger["naive"] == 1 + len(ways) * 5 and each.ledger["forwards"] < each.ledger["naive"] / 1.5


def test_a_target_beside_options_and_one_for_each_item(asking, video):
    model = asking("qwen2_5_vl")
    items = [choice(video, id="a"), choice(video, id="b", answer=0)]
    found = sweep(
        model, items, ["video->last+response"], target=["A) left", "B"], per_token=True, n_frames=4, **QUIET
    )
    assert found.shape == (2, 1, 5, 7) and np.isnan(found.values[1, ..., 1:]).all()
    assert np.isfinite(found.values[0]).all() and found.notes["token"] == {"a": "A) left", "b": "B"}
    letter = sweep(
        model, items[1], ["video->last"], target="A", n_frames=4, **QUIET
    )  # a text of one token: the letter
    same = sweep(model, items[1], ["video->last"], metric="answer", n_frames=4, **QUIET)
    assert np.abs(letter.values - same.values).max() <= 1e-2


def test_prepared_inputs_take_a_target_and_padding_does_not(asking):
    model = asking("qwen3_vl")
    ready = model.prepare_inputs(**inputs("qwen3_vl"))
    found = sweep(model, ready, None, target="left", window=3, **QUIET)
    assert (
        found.coords["pathway"][-2:] == ["video->response", "text->response"]
        and np.abs(found.values).max() > 0.1
    )
    assert found.ledger["tower_calls"] == 1
    one = model.prepare_inputs(**{k: v[-1:] if k != "pixel_values_videos" else v[len(v) // 2 :] for k, v in inputs("qwen3_vl", worlds=2, pad=2).items()})  # fmt: skip
    with pytest.raises(UsageError, match="padding"):
        sweep(model, one, ["video->response"], target="left", **QUIET)


def test_correctness_of_open_answers_is_greedy_decoding(asking, video):
    model = asking("internvl")
    open_ = VideoQA(video, "which way ?", id="o")
    ids = model.generate(model.prepare(open_, 4), max_new_tokens=3, return_ids=True)[1][0].tolist()
    said = model.tokenizer.decode(ids)
    if model.tokenizer(said, add_special_tokens=False)["input_ids"] != ids:
        said = said.strip() or "x"
    for answer in (said, "left"):
        found = sweep(model, VideoQA(video, "which way ?", answer=answer, id="o"), ["none"], metric="answer", n_frames=4, **QUIET)  # fmt: skip
        forced = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
        greedy = model.generate(
            model.prepare(open_, 4), max_new_tokens=len(forced), stop=[], return_ids=True
        )[1][0].tolist()
        assert found.notes["correct"] == {"o": greedy == forced}


# ---- what is cut --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_next_video", "qwen3_vl"])
def test_heads_and_pairs_of_frames_by_hand(name, wrapped):
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name, frames=6))
    n = ready.tokens.n_frames
    found = sweep(model, ready, ["cross-frame"], window=2, heads="each", frame_pairs="each", **QUIET)
    slow = sweep(
        model,
        ready,
        ["cross-frame"],
        window=2,
        heads=[2],
        frame_pairs=[(0, n - 1)],
        executor="reference",
        **QUIET,
    )
    assert found.axes == ("item", "pathway", "head", "key_frame", "query_frame", "layer")
    assert found.coords["head"] == [0, 1, 2, 3] and found.coords["key_frame"] == list(range(n - 1))
    assert np.isnan(found.values[0, 0, 0, 1, 0]).all() and np.isfinite(found.values[0, 0, :, 0]).all()
    frame = torch.where(ready.tokens.role == 3, ready.tokens.frame, -1)
    cut = torch.zeros(4, len(frame), len(frame), dtype=torch.bool)
    cut[2] = (frame[:, None] == n - 1) & (frame[None, :] == 0)
    clean = run_dense(model, ready, {})[0, -1].softmax(-1)
    token, p = int(clean.argmax()), float(clean.max())
    for centre in range(5):
        layers = Sweep(("none",), 2).layers(centre, 5)
        expected = (
            (float(run_dense(model, ready, dict.fromkeys(layers, cut))[0, -1].softmax(-1)[token]) - p)
            / p
            * 100
        )
        assert abs(found.values[0, 0, 2, 0, -1, centre] - expected) <= 1e-2
        assert abs(slow.values[0, 0, 0, 0, 0, centre] - expected) <= 1e-2
    assert found.ledger["naive"] == 1 + 4 * (n * (n - 1) // 2) * 5


def test_a_triangle_cuts_from_every_layer_to_every_later_one(wrapped):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**inputs("internvl"))
    found = sweep(model, ready, ["video->text"], style="triangle", **QUIET)
    assert found.axes == ("item", "pathway", "first", "last") and np.isnan(found.values[0, 0, 3, 1])
    down, up = (
        sweep(model, ready, ["video->text"], style=s, **QUIET).values[0, 0] for s in ("top_down", "bottom_up")
    )
    one = sweep(model, ready, ["video->text"], window=1, **QUIET).values[0, 0]
    square = found.values[0, 0]
    assert np.abs(square[:, -1] - down).max() <= 1e-3 and np.abs(square[0] - up).max() <= 1e-3
    assert np.abs(np.diag(square) - one).max() <= 1e-3 and np.isfinite(square).sum() == 15
    assert Sweep(("none",), style="triangle").style == "triangle"


def test_own_pathways(wrapped):
    model = wrapped("llava_next_video")
    ready = model.prepare_inputs(**inputs("llava_next_video", frames=4))
    mine = {"near": "video->video where frame(q) - frame(k) == 1", "both": ["video->last", "text->last"]}
    found = sweep(model, ready, mine, window=2, **QUIET)
    assert found.coords["pathway"] == ["near", "both"]
    frame = torch.where(ready.tokens.role == 3, ready.tokens.frame, -9)
    near = (frame[:, None] - frame[None, :] == 1) & (frame[None, :] >= 0)
    assert torch.equal(cut_mask(ready.tokens, "near = " + mine["near"]), near)
    union = cut_mask(ready.tokens, "video->last") | cut_mask(ready.tokens, "text->last")
    assert torch.equal(cut_mask(ready.tokens, "video->last; text->last"), union)
    same = sweep(model, ready, ["video+text->last"], window=2, **QUIET)
    assert np.abs(found.values[:, 1] - same.values[:, 0]).max() <= 1e-3
    assert listed(mine) == ("near = " + mine["near"], "both = video->last; text->last")
    assert name_of("a->b where frame(q) == 1") == "a->b where frame(q) == 1"


def test_usual_pathways_with_a_response(asking, video):
    tokens = asking("internvl").prepare(choice(video), 4).tokens
    assert usual_pathways(tokens.generated([5])) == (
        *usual_pathways(tokens),
        "video->response",
        "question+option->response",
    )


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"metrics": ["best"]}, "metric='best'"), ({"metrics": []}, "at least one"), ({"metrics": ["kl", "kl"]}, "different names"),
        ({"metric": "kl", "metrics": ["kl"]}, "choose one"), ({"metrics": ["kl"]}, "at least 2 options"),
        ({"metric": "logprob"}, "or target="), ({"target": ""}, "no tokens"), ({"target": ["a", "b"]}, "2 texts for 1 items"),
        ({"target": "a", "metric": "answer"}, "use 'target'"), ({"per_token": True}, "no value per token"),
        ({"target": "x" * 5000}, "shorten it"), ({"heads": [4]}, "0-3"), ({"heads": []}, "whole numbers"), ({"heads": "all"}, "whole numbers"),
        ({"heads": [1, 1]}, "different heads"), ({"frame_pairs": [(2, 1)]}, "earlier ones"), ({"frame_pairs": [(0, 9)]}, "0-2"),
        ({"frame_pairs": [(0,)]}, "pairs"), ({"frame_pairs": "all"}, "pairs"), ({"frame_pairs": []}, "none"),
        ({"frame_pairs": "each"}, "no edge between"), ({"style": "square"}, "triangle"),
        ({"pathways": ["video->response"]}, "no token of 'response'"), ({"pathways": ["a = video->last", "a = text->last"]}, "2 times"),
        ({"pathways": ["video->last where frame(q) >"]}, "cannot be read"), ({"pathways": {"": "video->last"}}, "plain name"),
        ({"pathways": ["video->last;"]}, "is not 'keys->queries'"), ({"pathways": [3]}, "are texts"), ({"pathways": {"a": []}}, "plain name"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_says_so(keywords, message, asking):
    model = asking("internvl")
    with pytest.raises(UsageError, match=message):
        sweep(
            model,
            model.prepare_inputs(**inputs("internvl")),
            **{"pathways": ["video->last"], **QUIET, **keywords},
        )


# ---- Result: splits, videos, units ----------------------------------------------------------------------------------------


def table(notes, values=None):
    values = np.arange(8.0).reshape(4, 2) if values is None else values
    return Result(values, ("item", "layer"), {"item": list("abcd"), "layer": [1, 2]}, "u", {}, notes=notes)


def test_intervals_draw_videos_not_questions():
    """Ten copies of one question about one video say no more than one."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=(6, 1))
    names = [f"{v}{i}" for v in range(6) for i in range(10)]
    copies = Result(
        np.repeat(one, 10, 0), ("item", "layer"), {"item": names, "layer": [1]}, "u", {},
        notes={"groups": {"item": {n: n[0] for n in names}}},
    )  # fmt: skip
    single = Result(one, ("item", "layer"), {"item": list("012345"), "layer": [1]}, "u", {})
    a, b = copies.mean("item"), single.mean("item")
    assert np.allclose(a.values, b.values) and np.allclose(a.low, b.low) and np.allclose(a.high, b.high)
    assert a.low is not None and a.low[0] < a.values[0] < a.high[0] and a.notes["n"] == {"item": 60}
    apart = Result(np.repeat(one, 10, 0), ("item", "layer"), {"item": names, "layer": [1]}, "u", {}).mean(
        "item"
    )
    assert apart.high[0] - apart.low[0] < 0.5 * (a.high[0] - a.low[0])
    alone = table({"groups": {"item": dict.fromkeys("abcd", "v")}}).mean("item")
    assert alone.low is None and alone.values.tolist() == [3, 4]


def test_splits_by_the_clean_answer():
    r = table({"correct": {"a": True, "b": False, "c": True, "d": None}})
    assert r.split("correct").coords["item"] == ["a", "c"] and r.split("wrong").coords["item"] == ["b"]
    assert r.split("all") is r and r.split("wrong").notes["split"] == "wrong"
    with pytest.raises(UsageError, match="use 'correct'"):
        r.split("right")
    with pytest.raises(UsageError, match="none of 4 items is answered wrong.*1 have"):
        table({"correct": {"a": True}}).split("wrong")


def test_means_by_task():
    r = table({"task": {"a": "s", "b": "t", "c": "t", "d": "t"}}).mean_by("task")
    assert r.axes == ("task", "layer") and r.coords["task"] == ["s", "t"]
    assert r.values.tolist() == [[0, 1], [4, 5]] and r.notes["n"] == {"item": {"s": 1, "t": 3}}
    assert np.isnan(r.low[0]).all() and r.low[1, 0] < 4 < r.high[1, 0]
    with pytest.raises(UsageError, match="a label"):
        table({"task": {"a": "s"}}).mean_by("task")


def test_a_sweep_notes_answers_videos_and_tasks(asking, video):
    model = asking("internvl")
    other = video[::-1].copy()
    items = [choice(video, id="a"), choice(other, id="b"), choice(video, id="c", answer=0)]
    found = sweep(model, items, ["video->last"], n_frames=4, **QUIET)
    videos = found.notes["groups"]["item"]
    assert videos["a"] == videos["c"] != videos["b"] and found.notes["task"] == dict.fromkeys("abc", "t")
    letters = {i.id: model.answer(i, n_frames=4).correct for i in items}
    assert found.notes["correct"] == letters


def test_a_recipe_carries_all_of_it():
    fields = {
        "kind": "probes.knockout.KnockoutRecipe", "items": {"sim": "moving_direction"}, "metrics": ["argmax", "kl"],
        "heads": [0, 1], "frame_pairs": "each", "style": "triangle", "target": "left", "pathways": ["a = video->last"],
    }  # fmt: skip
    recipe = KnockoutRecipe.model_validate_json(json.dumps(fields), strict=True)
    assert recipe.metrics == ("argmax", "kl") and recipe.heads == (0, 1)
