"""Edge scores: against autograd, brute force and real runs on every family; on planted models they find the circuit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lab.edges import tapping
from lab.edges.cuts import Cut
from lab.edges.pairs import segments_of
from lab.edges.policy import Policy
from lab.edges.scoring import scalars, scores
from lab.edges.subsets import row_scores, unit_scores
from lab.errors import LabWarning, RunError, UsageError
from lab.model.zoo import wrap
from lab.sim.planted import SEGMENTS, TRUTH, planted_model, questions
from lab.slots import Plan
from tests import edgecases, families

QUIET = {"show_progress": False}


@pytest.fixture(scope="module")
def exact():
    """name -> an fp64 model of a family and a prompt."""
    made = {}

    def get(name):
        if name not in made:
            model = wrap(edgecases.exact(families.build(name)))
            made[name] = model, model.prepare_inputs(**edgecases.inputs(name, torch.float64))
        return made[name]

    return get


@pytest.fixture(scope="module")
def planted():
    made = {}

    def get(variant):
        if variant not in made:
            model = planted_model(variant)
            made[variant] = model, [model.prepare(q) for q in questions(2, seed=4)]
        return made[variant]

    return get


def top_two(model, ready, **kw):
    """The tokens the margin of a prompt without options is between, and the margin."""
    with torch.no_grad():
        clean = model(ready)[0, -1]
        a, b = clean.topk(2).indices.tolist()
        found = model(ready, **kw)[0, -1] if kw else clean
    return a, b, float(found[a] - found[b])


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.FAMILIES)
def test_gates_against_autograd(name, exact):
    """A zero bias on the scores of every pair of segments, given to the model as edges, in its own kernel."""
    model, ready = exact(name)
    at = segments_of(ready.tokens, "strict")
    hot = torch.zeros(ready.n_pos, len(at), dtype=torch.float64)
    for i, positions in enumerate(at.values()):
        hot[positions, i] = 1.0
    size = (model.cfg.n_heads, len(at), len(at))
    gates = [torch.zeros(size, dtype=torch.float64, requires_grad=True) for _ in model.parts]
    logits = model(ready, edges={i: (lambda q, k, g=g: hot[q] @ g @ hot[k].T) for i, g in enumerate(gates)})
    a, b, margin = top_two(model, ready)
    told = torch.stack(torch.autograd.grad(logits[0, -1, a] - logits[0, -1, b], gates))
    found = scores(model, ready, form="gate", **QUIET)
    assert found.coords["query"] == found.coords["key"] == list(at)
    assert np.abs(found.values[0] + told.numpy()).max() <= 1e-12 < np.abs(found.values).max()
    assert list(found.notes["clean"].values()) == [pytest.approx(margin, abs=1e-12)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_knockouts_against_the_rows_own_softmax(kv_heads):
    """Scores, values and gradients taken with hooks; every pair of segments cut from the softmax of one layer."""
    model = wrap(edgecases.exact(families.build("qwen3_vl", text_config={"num_key_value_heads": kv_heads})))
    ready = model.prepare_inputs(**edgecases.inputs("qwen3_vl", torch.float64))
    layer, kept = 2, {}
    point = f"blocks.{layer}.attn"

    def keep(value, hook):
        kept[hook.name.rpartition(".")[2]] = value
        if hook.name.endswith("hook_z"):
            value.retain_grad()

    a, b, _ = top_two(model, ready)
    ready.memo.clear()
    model.hf.requires_grad_(True)
    with model.hooks(fwd_hooks=[(f"{point}.hook_{x}", keep) for x in ("attn_scores", "v", "z")]):
        logits = model(ready)[0, -1]
        (logits[a] - logits[b]).backward()
    g, raw, v = (
        kept["hook_z"].grad[0].transpose(0, 1),
        kept["hook_attn_scores"][0].detach(),
        kept["hook_v"][0].transpose(0, 1),
    )
    worth = g @ v.detach().repeat_interleave(4 // kv_heads, 0).transpose(1, 2)
    at = segments_of(ready.tokens, "strict")
    found, rows = scores(model, ready, **QUIET).values[0, layer], row_scores(model, ready)

    def total(masked):
        pattern = masked.masked_fill((masked == -torch.inf).all(-1, keepdim=True), 0.0).softmax(-1)
        return (pattern.masked_fill(masked == -torch.inf, 0.0) * worth).sum(-1)

    for i, q in enumerate(at.values()):
        for j, k in enumerate(at.values()):
            change = (total(raw.index_fill(-1, k, -torch.inf)) - total(raw))[:, q].sum(-1)
            assert np.abs(found[:, i, j] - change.numpy()).max() <= 1e-7  # its softmax is in fp32
    some = ["frame:0", "separator"]
    gone = torch.cat([at[n] for n in some])
    change = (total(raw.index_fill(-1, gone, -torch.inf)) - total(raw))[[1, 3]][:, at["last"]].sum()
    assert rows.effect(layer + 1, ["last"], some, heads=[1, 3]) == pytest.approx(float(change), abs=1e-7)


def test_units_are_what_pairs_and_rows_say(exact):
    model, ready = exact("internvl")
    units = [
        Cut(q="last", k="frame:1"), Cut(q="video", k="video", where="frame(q) > frame(k)"),
        Cut(q="last", k="frame:0+frame:1", heads=[2]), Cut(q="*", k="*"),
    ]  # fmt: skip
    found = unit_scores(model, ready, units, **QUIET)
    assert found.coords["unit"][1] == "video<-video [frame(q) > frame(k)]"
    pairs, rows = scores(model, ready, **QUIET), row_scores(model, ready)
    one = pairs.select(query="last", key="frame:1").values[0]
    assert np.abs(found.values[0, :, :, 0] - one).max() <= 1e-12
    for layer in range(1, model.cfg.n_layers + 1):
        cross = sum(rows.effect(layer, [f"frame:{f}"], [f"frame:{e}" for e in range(f)]) for f in (1, 2))
        assert found.values[0, layer - 1, :, 1].sum() == pytest.approx(cross, abs=1e-12)
        two = rows.effect(layer, ["last"], ["frame:0", "frame:1"], heads=[2])
        assert found.values[0, layer - 1, :, 2].tolist() == pytest.approx([0, 0, two, 0], abs=1e-12)
    everything = -scalars(model, ready, **QUIET).select(scalar="contribution").values.sum((-1, -2))
    assert np.abs(found.values[..., 3] - everything).max() <= 1e-12


def test_masses_are_the_patterns(exact):
    model, ready = exact("video_llama_3")
    found = scalars(model, ready, **QUIET).select(scalar="mass").values[0]
    _, cache = model.run_with_cache(ready, names_filter=lambda n: n.endswith("hook_pattern"))
    at = list(segments_of(ready.tokens, "strict").values())
    for layer in range(model.cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0].double()
        told = torch.stack(
            [torch.stack([pattern[:, q][:, :, k].sum(-1).mean(-1) for k in at], -1) for q in at], 1
        )
        assert np.abs(found[layer] - told.numpy()).max() <= 1e-6
    assert np.abs(found.sum(-1) - 1).max() <= 1e-12


@pytest.mark.parametrize("name", families.FAMILIES)
def test_batches_and_padding_change_nothing(name, exact):
    """A shorter prompt, and a Ready of two worlds one of which is padded, in one batch with others."""
    model, ready = exact(name)
    two = model.prepare_inputs(**edgecases.inputs(name, torch.float64, worlds=2, pad=3, frames=4))
    together = scores(model, [ready, two], **QUIET)
    assert together.coords["item"] == ["item:1", "item:2/1", "item:2/2"]
    alone = scores(model, ready, **QUIET)
    part = together.select(item=["item:1"], query=alone.coords["query"], key=alone.coords["key"])
    assert np.abs(part.values - alone.values).max() <= 1e-12
    one_by_one = scores(model, [ready, two], batch=1, **QUIET)
    assert np.allclose(together.values, one_by_one.values, rtol=0, atol=1e-12, equal_nan=True)
    absent = [s for s in together.coords["key"] if s not in alone.coords["key"]]
    assert (
        bool(absent) == bool(np.isnan(together.values[0]).any()) and not np.isnan(together.values[1:]).any()
    )


def test_sliding_windows_and_layers_without_attention():
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model = wrap(edgecases.exact(families.build("internvl", text_config=sliding)))
    ready = model.prepare_inputs(**edgecases.inputs("internvl", torch.float64))
    found = scores(model, ready, **QUIET)
    assert found.notes["clean"]["item:1"] == pytest.approx(top_two(model, ready)[2], abs=1e-12)
    windowed = [p.index for p in model.parts if p.window]
    far = scalars(model, ready, **QUIET).select(scalar="mass", query="last", key="frame:0").values[0]
    assert windowed and not far[windowed].any() and far[: windowed[0]].all()
    hybrid = wrap(families.build("qwen3_5"))
    found = scores(hybrid, hybrid.prepare_inputs(**families.inputs("qwen3_5")), **QUIET)
    none = [p.attn is None for p in hybrid.parts]
    assert np.isnan(found.values[0]).all((1, 2, 3)).tolist() == none and any(none)
    assert found.notes["no_edges"] == [i + 1 for i, no in enumerate(none) if no]


def test_blocks_of_rows_give_the_same_and_bound_memory(exact, monkeypatch):
    """Nothing of positions x positions x heads is made, forwards or backwards."""
    model, _ = exact("llava_onevision")
    ready = model.prepare_inputs(**edgecases.inputs("llava_onevision", torch.float64, frames=24))
    whole = scores(model, ready, **QUIET)
    n, heads = ready.n_pos, model.cfg.n_heads
    monkeypatch.setattr(tapping, "CELLS", 16 * heads * n)
    with torch.no_grad():
        model(ready)  # the tower has its own attention
    biggest = Biggest()
    with biggest:
        blocks = scores(model, ready, **QUIET)
    assert np.nanmax(np.abs(whole.values - blocks.values)) <= 1e-12
    assert heads * 16 * n <= biggest.numel < heads * n * n / 4


class Biggest(TorchDispatchMode):
    """The largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, list | tuple) else (out,)
        self.numel = max(
            [self.numel, *(t.numel() for t in made if isinstance(t, torch.Tensor) and t.is_floating_point())]
        )
        return out


# ---- policies, paths, dropped layers --------------------------------------------------------------------------------


def test_under_a_policy_scores_are_those_of_the_pruned_model(exact):
    model, ready = exact("qwen2_5_vl")
    policy = Policy(
        cuts=[Cut(layers="2-3", q="last", k="video"), Cut(layers="4", q="text", k="frame:0", gate=-1.5)]
    )
    found = scores(model, ready, policy=policy, **QUIET)
    a, b, _ = top_two(model, ready)
    with torch.no_grad():
        logits = model(ready, policy=policy)[0, -1]
    assert found.notes["clean"]["item:1"] == pytest.approx(float(logits[a] - logits[b]), abs=1e-12)
    gone = found.select(query="last", layer=[2, 3], key=["frame:0", "frame:1"]).values
    assert not gone.any() and found.select(query="last", layer=1, key="frame:0").values.all()
    with model.pruned(policy):
        again = scores(model, ready, **QUIET)
    assert again.same(found) and found.notes["policy"] == policy.to_dict()


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "video_llama_3"])
def test_integrated_scores_add_up_to_what_the_path_does(name, exact):
    model, ready = exact(name)
    path = Policy(
        cuts=[
            Cut(q="video", k="video", where="frame(q) > frame(k)"),
            Cut(q="last", k="frame:1", layers="1-2"),
        ]
    )
    found = scores(model, ready, form="integrated", path=path, points=9, **QUIET)
    clean, closed = found.notes["clean"]["item:1"], found.notes["closed"]["item:1"]
    assert clean == pytest.approx(top_two(model, ready)[2], abs=1e-12)
    assert closed == pytest.approx(top_two(model, ready, policy=path)[2], abs=1e-12)
    assert abs(closed - clean) > 1e-3 and np.nansum(found.values) == pytest.approx(closed - clean, rel=0.01)
    off = found.select(query="frame:0").values
    assert not off.any() and not found.select(layer=3, query="last").values.any()
    assert found.ledger["forwards"] == 2 * 9 + 3


def test_the_path_and_the_form_belong_together(exact):
    model, ready = exact("llava_onevision")
    path = Policy(cuts=[Cut(q="last", k="video")])
    for kw in ({"form": "integrated"}, {"path": path}):
        with pytest.raises(UsageError, match="'integrated' needs path="):
            scores(model, ready, **kw, **QUIET)
    with pytest.raises(UsageError, match="path cuts no edge of item:1"):
        scores(model, ready, form="integrated", path=Policy(cuts=[Cut(q="frame:0", k="last")]), **QUIET)


def test_dropped_layers_are_detached_layers(exact):
    """Each pass equals a run whose attention and MLP of one layer are detached: same values, no gradient."""
    model, ready = exact("llava_next_video")
    n = model.cfg.n_layers
    each = []
    for layer in range(n):
        cut = [
            (f"blocks.{layer}.hook_{x}", lambda value, hook: value.detach()) for x in ("attn_out", "mlp_out")
        ]
        with model.hooks(fwd_hooks=cut):
            each.append(scores(model, ready, **QUIET).values)
    told = np.sign(sum(each)) * np.abs(each).sum(0) / (n - 1)
    found = scores(model, ready, drop=True, **QUIET)
    assert np.abs(found.values - told).max() <= 1e-12 and found.ledger["forwards"] == 2 + n
    assert np.abs(found.values - scores(model, ready, **QUIET).values).max() > 1e-3


def test_dropping_undoes_a_cancellation(exact):
    """The last MLP takes back, to first order, all that reached it: plain scores are 0, those with layers dropped are not."""
    model, ready = exact("llava_onevision")
    held = {}

    def back(value, hook):
        return -(held["mid"] - held["mid"].detach()) + value.detach()

    hooks = [("blocks.4.hook_resid_mid", lambda v, hook: held.update(mid=v)), ("blocks.4.hook_mlp_out", back)]
    with model.hooks(fwd_hooks=hooks):
        with pytest.warns(LabWarning, match="no gradient"):
            plain = scores(model, ready, **QUIET)
        dropped = scores(model, ready, drop=True, **QUIET)
    assert np.abs(plain.values).max() <= 1e-12 and np.abs(dropped.values).max() > 1e-2


# ---- segments and metrics -------------------------------------------------------------------------------------------


def test_segments_partition_or_say_what_is_wrong(planted):
    model, ready = planted("plain")
    tokens, item = ready[0].tokens, ready[0].item
    strict = segments_of(tokens, "strict")
    assert torch.cat(list(strict.values())).sort().values.tolist() == list(range(len(tokens)))
    assert {"frame:7", "option:3", "last", "template"} <= set(strict)
    paper = segments_of(tokens, "paper")
    assert set(paper) == {
        *(f"frame:{f}" for f in range(8)),
        *(f"option:{o}" for o in range(4)),
        "separator",
        "stem",
        "last",
    }
    assert sum(map(len, paper.values())) < len(tokens)
    assert list(segments_of(tokens, ("last", "true-option", "video"), item)) == [
        "video",
        "true-option",
        "last",
    ]
    for grid, said in [
        ("strikt", "use 'strict'"), ((), "names of segments"), (("video", "frame:1"), "share positions"),
        (("vidio",), "closest: video"), (("generated",), "has none of"), (("last", "last"), "named twice"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=said):
            scores(model, ready[0], segmentation=grid, **QUIET)


def test_keys_of_no_segment_are_read_all_the_same(planted):
    """Coarse segments give what the fine ones add up to in contributions, and the same totals."""
    model, ready = planted("plain")
    fine = scalars(model, ready[0], **QUIET).select(scalar="contribution").values[0]
    some = scalars(model, ready[0], segmentation=("option:1", "last"), **QUIET).select(scalar="contribution")
    names = list(segments_of(ready[0].tokens, "strict"))
    at = [names.index("option:1"), names.index("last")]
    assert np.abs(some.values[0] - fine[:, :, at][..., at]).max() <= 1e-5
    few = scores(model, ready[0], segmentation=("option:1", "last"), **QUIET).values[0]
    all_ = scores(model, ready[0], **QUIET).values[0][:, :, at][..., at]
    assert np.abs(few - all_).max() <= 1e-5 < np.abs(few).max()


def test_kl_is_refused_with_the_reason(planted):
    model, ready = planted("plain")
    for metric in ("kl", "KL-to-clean", "kl_divergence"):
        with pytest.raises(UsageError, match="gradient at the clean run is 0"):
            scores(model, ready[0], metric=metric, **QUIET)

    def kl(logits):
        p = ready[0].memo.setdefault("p", logits.detach().log_softmax(-1))
        return (p.exp() * (p - logits.log_softmax(-1))).sum()

    found = scores(model, ready[0], metric=kl, **QUIET)
    assert np.abs(found.values).max() <= 1e-4, "and that is true (the margin's scores reach 10)"


def test_metrics(planted):
    model, ready = planted("plain")
    ids = [model.to_single_token(x) for x in "ABCD"]
    with torch.no_grad():
        letters = model(ready[0])[0, -1, ids]
    best = int(letters.argmax())
    rest = torch.cat([letters[:best], letters[best + 1 :]]).logsumexp(0)
    found = scores(model, ready[0], **QUIET)
    assert found.notes["clean"][ready[0].item.id] == pytest.approx(float(letters[best] - rest), rel=1e-5)
    assert found.notes["choice"][ready[0].item.id] == "ABCD"[best]
    own = scores(
        model,
        ready[0],
        metric=lambda z: z[ids][best] - torch.cat([z[ids][:best], z[ids][best + 1 :]]).logsumexp(0),
        **QUIET,
    )
    assert np.abs(own.values - found.values).max() <= 1e-4 and own.notes["metric"] == "function"
    with pytest.raises(UsageError, match="use one of margin, margin-right"):
        scores(model, ready[0], metric="accuracy", **QUIET)
    with pytest.warns(LabWarning, match="no gradient"):
        scores(model, ready[0], metric=lambda z: (z * 0).sum(), **QUIET)
    for metric, said in [
        (lambda z: z, "not a tensor of one number"), (lambda z: 1.0, "gave float"), (lambda z: z[0] * torch.nan, "gave nan"),
        (lambda z: z[0].detach(), "does not depend on"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=said):
            scores(model, ready[0], metric=metric, **QUIET)
    plain = wrap(families.build("qwen2_5_vl"))
    with pytest.raises(UsageError, match="needs items with options"):
        scores(plain, plain.prepare_inputs(**families.inputs("qwen2_5_vl")), metric="margin-right", **QUIET)


def test_wrong_requests_are_one_line(planted, exact):
    model, ready = planted("plain")
    for kw, said in [
        ({"form": "ig"}, "use one of knockout"), ({"batch": 0}, "at least 1 prompt"), ({"policy": "p.yaml"}, "a policy has"),
        ({"form": "integrated", "path": "video"}, "must be a lab.edges.Policy"),
        ({"form": "integrated", "path": Policy(cuts=[Cut(q="last", k="video")]), "points": 0}, "points must be"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=said):
            scores(model, ready[0], **kw, **QUIET)
    with pytest.raises(UsageError, match="nothing to do"):
        scores(model, [], **QUIET)
    for units in ([], ["last"], Cut(q="last", k="video")):
        with pytest.raises(UsageError, match="list of lab.edges.Cut"):
            unit_scores(model, ready[0], units, **QUIET)
    with pytest.raises(UsageError, match="one prompt, got 2"):
        row_scores(model, ready)
    rows = row_scores(model, ready[0], segmentation=("video", "last"))
    for asked, said in [
        ((1, ["last"], ["vidio"]), "vidio"),
        ((9, ["last"], ["video"]), "layers 1-4"),
        ((1, [], ["video"]), "none"),
    ]:
        with pytest.raises(UsageError, match=said):
            rows.effect(*asked)
    small, prompt = exact("internvl")
    small.hf.train()
    try:
        with pytest.raises(RunError, match="training mode"):
            scores(small, prompt, **QUIET)
    finally:
        small.hf.eval()
    held, prompt.plan = prompt.plan, Plan(detours=(lambda layer, step, resid, side: step(resid, side),))
    try:
        with pytest.raises(RunError, match="score it without"):
            scores(small, prompt, **QUIET)
    finally:
        prompt.plan = held


def test_the_model_is_left_as_it_was(planted):
    model, ready = planted("plain")
    with torch.no_grad():
        before, _ = (model(r) for r in ready)
    weights = [p.clone() for p in model.hf.parameters()]
    found = scores(model, ready, drop=True, **QUIET)
    with torch.no_grad():
        assert torch.equal(model(ready[0]), before)
    assert all(
        torch.equal(a, b) and b.grad is None for a, b in zip(weights, model.hf.parameters(), strict=True)
    )
    assert not any(p._forward_hooks for p in model.hook_dict.values())
    assert found.ledger == {
        "forwards": 2 * (2.0 + 4),
        "naive": pytest.approx(found.ledger["naive"]),
        "tower_calls": 0,
    }


# ---- planted truth --------------------------------------------------------------------------------------------------


def planted_sizes(model, ready, truth):
    """Mean size of the predicted effect of every edge the truth names, and of every one it calls irrelevant."""
    edges = list(truth.matters), truth.irrelevant()
    ways = list(dict.fromkeys(e.pathway for some in edges for e in some))
    units = [Cut(q=w.partition("->")[2], k=w.partition("->")[0]) for w in ways]
    size = np.abs(unit_scores(model, ready, units, **QUIET).values).mean(0)  # [layer, head, unit]
    return [[size[e.layer, list(e.heads), ways.index(e.pathway)].sum() for e in some] for some in edges]


@pytest.mark.parametrize("variant", TRUTH)
def test_the_planted_circuit_is_ranked_first(variant, planted):
    """All of it before any of the more than 400 sets of edges that do nothing."""
    named, others = planted_sizes(*planted(variant), TRUTH[variant])
    assert len(others) > 400 and min(named) > 100 * max(others)


def test_pairs_of_segments_find_it_too(planted):
    model, ready = planted("plain")
    found = scores(model, ready, **QUIET)
    size = np.abs(found.values).mean(0)
    segments = found.coords["query"]
    assert set(segments) == set(SEGMENTS)
    covered = np.zeros(size.shape, dtype=bool)
    for e in TRUTH["plain"].matters:
        for i, q in enumerate(segments):
            for j, k in enumerate(segments):
                if e.covers(e.layer, k, q):
                    covered[e.layer, list(e.heads), i, j] = True
    best = np.argsort(-size.ravel())[:30]
    assert covered.ravel()[best].all() and size[~covered].max() < 1e-3 * size.max()


def test_the_leak_is_seen(planted):
    """What a paper's segments would leave out carries the answer: the template reads the options, last the template."""
    model, ready = planted("leak")
    size = np.abs(scores(model, ready, **QUIET).values).mean(0).sum(1)  # [layer, query, key]
    names = list(segments_of(ready[0].tokens, "strict"))
    options = [i for i, n in enumerate(names) if n.startswith("option")]
    template, last = names.index("template"), names.index("last")
    largest = [tuple(np.unravel_index(i, size.shape)) for i in np.argsort(-size.ravel())[:4]]
    assert (3, last, template) in largest and any((2, template, o) in largest for o in options)
    assert size[2:, last][:, options].max() < 1e-3


def test_attention_is_fooled_by_the_decoy_and_scores_are_not(planted):
    model, ready = planted("decoy")
    (decoy,) = TRUTH["decoy"].decoys
    cuts = [Cut(q="last", k="video"), Cut(q="last", k="option")]
    video, option = unit_scores(model, ready, cuts, **QUIET).values.transpose(3, 0, 1, 2)
    mass = scalars(model, ready, segmentation=("video", "option", "last"), **QUIET).select(
        scalar="mass", query="last"
    )
    by_mass = {k: mass.select(key=k).values.mean(0)[2] for k in ("video", "option")}
    head = decoy.heads[0]
    assert by_mass["video"][head] > 0.99 and by_mass["video"][head] >= by_mass["option"].max() - 1e-6
    assert np.abs(video[:, decoy.layer, head]).max() < 1e-5 < 1.0 < np.abs(option[:, decoy.layer, 0]).min()


def test_one_of_two_routes_scores_nothing_until_the_path_cuts_both(planted):
    """At layer 4 either relay is enough: single scores are 0 there, and so are real single cuts. Together they matter."""
    model, ready = planted("redundant")
    some = ["instruction", "template"]
    single = scores(model, ready, **QUIET).select(layer=4, query="last", key=some)
    assert np.abs(single.values).max() < 1e-3
    path = Policy(cuts=[Cut(layers="4", q="last", k=k) for k in some])
    found = scores(model, ready, form="integrated", path=path, **QUIET)
    joint = [found.notes["closed"][k] - found.notes["clean"][k] for k in found.coords["item"]]
    share = found.select(layer=4, query="last", key=some).values.sum(1)
    assert max(joint) < -5 and np.allclose(share.sum(-1), joint, rtol=1e-3)
    assert np.allclose(share[:, 0], share[:, 1], rtol=1e-3) and not found.select(layer=3).values.any()
