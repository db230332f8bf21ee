"""The fast executor equals the reference for random cuts, on every family, in fp32 and fp64, and counts what it computes."""

import random

import pytest
import torch

from lab.edges import packed
from lab.edges.closure import closure_of
from lab.edges.dense import run_dense
from lab.edges.fast import run_cut
from lab.edges.packed import _explicit, attention, merge
from lab.edges.policy import Policy
from lab.edges.store import Store
from lab.errors import RunError, UsageError
from lab.model.zoo import wrap
from lab.slots import Plan
from tests import edgecases, families

CUTS = 42  # per family and dtype


def cases(model, ready, n, seed):
    dice = random.Random(seed)
    return [
        edgecases.random_cuts(dice, ready.tokens, model.cfg.n_layers, model.cfg.n_heads) for _ in range(n)
    ]


def both(model, ready, cuts, read="last", **kw):
    store = Store.of(model, ready)
    fast = run_cut(model, store, cuts, read, **kw)
    return store, fast, torch.stack([run_dense(model, ready, c, read)[0] for c in cuts])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_random_cuts_equal_the_reference(name, dtype, bound):
    hf = families.build(name)
    model = wrap(edgecases.exact(hf) if dtype == torch.float64 else hf)
    ready = model.prepare_inputs(**edgecases.inputs(name, dtype))
    cuts = cases(model, ready, CUTS, seed=len(name))
    store, fast, slow = both(model, ready, cuts, read=[ready.n_pos // 2, -1])
    assert (fast - slow).abs().max() <= bound
    assert ((slow - store.clean(model, [ready.n_pos // 2, -1])).abs().amax((1, 2)) > 1e-3).sum() > CUTS // 2
    assert store.work.fallbacks == 0 and store.reason == ""


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_grouped_heads(kv_heads):
    """8 heads over 8, 4, 2 and 1 of keys, with cuts that differ by head."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": kv_heads}
    model = wrap(families.build("llava_onevision", text_config=sizes))
    ready = model.prepare_inputs(**families.inputs("llava_onevision"))
    _, fast, slow = both(model, ready, cases(model, ready, 30, seed=kv_heads))
    assert (fast - slow).abs().max() <= 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_windows_that_share_one_mask_by_head(kv_heads):
    """Worlds with the same rows and mask are served by one call: heads and worlds must not be mixed up."""
    sizes = {"num_key_value_heads": kv_heads}
    model = wrap(families.build("llava_onevision", text_config=sizes))
    ready = model.prepare_inputs(**families.inputs("llava_onevision"))
    dice = random.Random(kv_heads)
    for _ in range(6):
        shared = edgecases.by_head(dice, ready.tokens, 4)
        windows = [dict.fromkeys(range(a, b), shared) for a in range(5) for b in range(a + 1, 6)]
        _, fast, slow = both(model, ready, windows)
        assert (fast - slow).abs().max() <= 1e-5


@pytest.mark.parametrize("name", families.FAMILIES)
def test_cutting_nothing_is_the_clean_run_itself(name, wrapped):
    model = wrapped(name)
    ready = model.prepare_inputs(**families.inputs(name))
    store = Store.of(model, ready)
    n = ready.n_pos
    never = torch.ones(n, n, dtype=torch.bool).triu(1)  # keys after the query
    unread = edgecases.rectangle(torch.tensor([3]), torch.tensor([0]), n)
    got = run_cut(model, store, [{}, {0: never}, {model.cfg.n_layers - 1: unread}])
    with torch.no_grad():
        clean = model(ready)
    assert all(torch.equal(g, clean[0]) for g in got)
    assert store.work.row_layers == n * model.cfg.n_layers and store.ledger.forwards == 1.0


def test_one_by_one_and_in_any_company_the_numbers_are_the_same(wrapped):
    model = wrapped("qwen3_vl")
    ready = model.prepare_inputs(**families.inputs("qwen3_vl"))
    store = Store.of(model, ready)
    cuts = cases(model, ready, 20, seed=1)
    together = run_cut(model, store, cuts)
    for n_rows in (1, 40):
        assert (run_cut(model, store, cuts, n_rows=n_rows) - together).abs().max() <= 1e-5
    backwards = run_cut(model, store, cuts[::-1]).flip(0)
    assert (backwards - together).abs().max() <= 1e-5


def test_the_ledger_counts_the_rows_that_went_through_a_layer(wrapped):
    """Counted independently: by hooks on the layers' MLPs."""
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    store = Store.of(model, ready)
    seen = []
    handles = [p.mlp.register_forward_hook(lambda m, a, out: seen.append(out.shape[1])) for p in model.parts]
    cuts = cases(model, ready, 15, seed=2)
    try:
        run_cut(model, store, cuts, n_rows=100)
    finally:
        for h in handles:
            h.remove()
    n, layers = store.n_pos, store.n_layers
    assert store.work.row_layers == n * layers + sum(seen)
    bound = sum(closure_of(c, n, layers, [n - 1]).row_layers for c in cuts)
    assert sum(seen) == bound < 15 * n * layers
    assert store.ledger.naive == 16 and store.ledger.forwards == pytest.approx(1 + bound / (n * layers))


def test_a_window_on_the_last_row_costs_one_row_a_layer(wrapped):
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**families.inputs("llava_onevision"))
    store, n = Store.of(model, ready), ready.n_pos
    cut = edgecases.rectangle(torch.tensor([n - 1]), ready.tokens.where(role="video"), n)
    run_cut(model, store, [{1: cut, 2: cut}])
    assert store.work.row_layers - n * store.n_layers == store.n_layers - 1


def test_reading_all_positions(wrapped):
    model = wrapped("qwen2_5_vl")
    ready = model.prepare_inputs(**families.inputs("qwen2_5_vl"))
    _, fast, slow = both(model, ready, cases(model, ready, 10, seed=3), read="all")
    assert fast.shape == slow.shape and (fast - slow).abs().max() <= 1e-5


POLICIES = (
    [{"layers": "all", "q": "last", "k": "video"}],
    [{"layers": "2-3", "q": "video", "k": "video", "where": "frame(q) > frame(k)"}],
    [{"layers": "1,4", "heads": [0, 2], "q": "*", "k": "video"}, {"layers": "5", "q": "last", "k": "*"}],
    [],
)


@pytest.mark.parametrize("cuts", POLICIES)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_policies_by_either_executor(name, cuts, wrapped):
    model = wrapped(name)
    ready = model.prepare_inputs(**families.inputs(name))
    policy = Policy.from_dict({"format": "edge-policy/1", "cuts": cuts})
    with torch.no_grad():
        slow = model(ready, policy=policy, read=[-1, -3])
        fast = model(ready, policy=policy, read=[-1, -3], executor="fast")
        assert (fast - slow).abs().max() <= (1e-5 if cuts else 0.0)
        assert ((slow - model(ready, read=[-1, -3])).abs().max() > 1e-3) == bool(cuts)


def test_an_open_policy_does_not_leak_into_runs_that_name_their_cuts(wrapped):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    policy = Policy.from_dict({"format": "edge-policy/1", "cuts": POLICIES[0]})
    cuts = cases(model, ready, 3, seed=7)
    _, fast, slow = both(model, ready, cuts)
    with model.pruned(policy):
        _, inside, dense = both(model, ready, cuts)
        assert torch.equal(inside, fast) and torch.equal(dense, slow)
        with torch.no_grad():
            assert (model(ready, executor="fast") - model(ready)).abs().max() <= 1e-5


def test_gates_and_batches_take_the_reference_path(wrapped):
    model = wrapped("internvl")
    gate = {"layers": "all", "q": "last", "k": "video", "gate": -1.0}
    policy = Policy.from_dict({"format": "edge-policy/1", "cuts": [gate]})
    hard = Policy.from_dict({"format": "edge-policy/1", "cuts": POLICIES[0]})
    one, two = (model.prepare_inputs(**families.inputs("internvl", worlds=w)) for w in (1, 2))
    with torch.no_grad():
        for ready, p in ((one, policy), (two, hard)):
            assert torch.equal(model(ready, policy=p, executor="fast"), model(ready, policy=p))


# ---- where the closure's rules do not hold ---------------------------------------------------------------------------


def _fallback(model, x, reason):
    ready = model.prepare_inputs(**x)
    n = ready.n_pos
    layer = max(p.index for p in model.parts if p.attn is not None)
    cut = edgecases.rectangle(torch.tensor([n - 1]), torch.arange(n - 6, n - 1), n)
    store, fast, slow = both(model, ready, [{layer: cut}, {}])
    assert reason in store.reason and torch.equal(fast, slow)
    assert store.work.fallbacks == 1 and store.ledger.forwards == 2.0
    assert not torch.equal(fast[0], fast[1])


def test_hybrid_decoders_take_the_reference_path(wrapped):
    _fallback(wrapped("qwen3_5"), families.inputs("qwen3_5"), "layer 1 (blocks.0) has no softmax attention")


def test_padded_prompts_take_the_reference_path(wrapped):
    x = families.inputs("llava_onevision", worlds=2, pad=3)
    alone = {k: v[1:] for k, v in x.items()}
    _fallback(wrapped("llava_onevision"), alone, "padded")


def test_sliding_windows_take_the_reference_path():
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    model = wrap(families.build("internvl", text_config=sliding))
    assert any(p.window for p in model.parts)
    _fallback(model, families.inputs("internvl"), "sliding window of 8")


def test_mechanisms_with_detours_take_the_reference_path(wrapped):
    """A detour that halves the stream once; what the plan asks for holds in every run."""
    model, ready = wrapped("internvl"), wrapped("internvl").prepare_inputs(**families.inputs("internvl"))
    plain = run_dense(model, ready, {})

    def halve(layer, step, resid, side):
        return step(resid * (0.5 if layer == 2 else 1.0), side)

    ready.plan = Plan(detours=(halve,))
    store, fast, slow = both(model, ready, [*cases(model, ready, 3, seed=4), {}])
    assert "detours" in store.reason and torch.equal(fast, slow) and not torch.equal(fast[-1], plain[0])


def test_open_hooks_are_seen_and_obeyed(wrapped):
    model = wrapped("internvl")
    ready = model.prepare_inputs(**families.inputs("internvl"))
    store, cuts = Store.of(model, ready), cases(model, ready, 4, seed=9)
    with model.hooks([("blocks.1.hook_resid_post", lambda x, hook: x * 0.5)]):
        fast = run_cut(model, Store.of(model, ready), cuts)
        slow = torch.stack([run_dense(model, ready, c)[0] for c in cuts])
        with pytest.raises(RunError, match="open hooks"):
            run_cut(model, store, cuts)
    assert torch.equal(fast, slow)
    assert (run_cut(model, store, cuts) - slow).abs().max() > 1e-3


def test_changed_weights_and_several_worlds_are_refused(wrapped):
    model = wrap(families.build("internvl"))
    ready = model.prepare_inputs(**families.inputs("internvl"))
    store = Store.of(model, ready)
    with torch.no_grad():
        model.parts[0].o.weight.mul_(2.0)
    with pytest.raises(RunError, match="weights"):
        run_cut(model, store, [{}])
    with pytest.raises(UsageError, match="no sets of cuts"):
        run_cut(model, Store.of(model, ready), [])
    with pytest.raises(UsageError, match="one world, got 2"):
        Store.of(model, model.prepare_inputs(**families.inputs("internvl", worlds=2)))


@pytest.mark.parametrize("cells", [None, 64])
def test_no_tensor_of_positions_by_positions(cells, wrapped, monkeypatch):
    """4,096 positions, rows from the middle on: nothing as large as a quarter of L x L comes to be; blocks are exact."""
    model, length = wrapped("qwen3_vl"), 4096 if cells is None else 48
    if cells:
        monkeypatch.setattr(packed, "MASK_CELLS", cells)
    x = families.inputs("qwen3_vl")
    more = torch.randint(families.WORDS, families.VOCAB, (1, length - x["input_ids"].shape[1]))
    x["input_ids"] = torch.cat([x["input_ids"], more], 1)
    x["attention_mask"] = torch.ones_like(x["input_ids"])
    x["mm_token_type_ids"] = 2 * (x["input_ids"] == families.VIDEO).int()
    ready = model.prepare_inputs(**x)
    half = torch.arange(length // 2, length)
    cut = edgecases.rectangle(half, torch.arange(0, length // 2, 2), length)
    store = Store.of(model, ready)
    with edgecases.Largest() as largest:
        fast = run_cut(model, store, [{1: cut, 2: cut}])
    if cells is None:
        assert length < largest.numel < length * length / 4
    assert (fast[0] - run_dense(model, ready, {1: cut, 2: cut})[0]).abs().max() <= 1e-5


# ---- the building blocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, 3])
def test_two_parts_merge_to_the_whole(dtype, heads):
    """Attention over two disjoint key sets, merged, equals softmax over both; rows without keys give zero."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g, dtype=dtype) for h, n in ((heads, 5), (1, 9), (1, 9)))
    keep = torch.rand(1, 1, 5, 9, generator=g) < 0.5
    keep[..., 2, :] = False  # nothing at all
    keep[..., 3, :4] = False  # nothing in the first part
    keep[..., 4, 4:] = False
    a = attention(q, k[:, :, :4], v[:, :, :4], keep[..., :4], 0.3)
    b = attention(q, k[:, :, 4:], v[:, :, 4:], keep[..., 4:], 0.3)
    scores = (q @ k.transpose(2, 3) * 0.3).masked_fill(~keep, float("-inf"))
    whole = scores.softmax(-1).nan_to_num() @ v
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert (merge(*a, *b) - whole).abs().max() <= tolerance and (merge(*a, *b)[..., 2, :] == 0).all()


def test_written_out_attention_says_what_the_kernel_says(monkeypatch):
    monkeypatch.setattr(packed, "SCORE_CELLS", 2 * 3 * 11 * 2)  # two rows at a time
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, h, n, 16, generator=g) for h, n in ((3, 7), (1, 11), (1, 11)))
    keep = torch.rand(2, 1, 7, 11, generator=g) < 0.4
    keep[..., 1, :] = False
    for mask in (keep, None):
        (z, lse), (z2, lse2) = attention(q, k, v, mask, 0.25), _explicit(q, k, v, mask, 0.25)
        assert (z - z2).abs().max() <= 1e-6
        real = lse2 > float("-inf")
        assert torch.equal(lse > float("-inf"), real) and (lse[real] - lse2[real]).abs().max() <= 1e-5


def test_rows_side_by_side_read_causally_with_and_without_the_kernel(monkeypatch):
    g = torch.Generator().manual_seed(3)
    q = torch.randn(2, 3, 70, 8, generator=g)
    k, v = (torch.randn(2, 70, 8, generator=g) for _ in range(2))
    scores = (q @ k[:, None].transpose(2, 3) * 0.25).masked_fill(
        ~torch.ones(70, 70).tril().bool(), -torch.inf
    )
    wanted, wanted_lse = scores.softmax(-1) @ v[:, None], scores.logsumexp(-1)
    for kernel in (packed._CPU_KERNEL, None):
        monkeypatch.setattr(packed, "_CPU_KERNEL", kernel)
        for cells in (packed.SCORE_CELLS, 70 * 6 * 16):  # whole, and in blocks of 16 rows
            monkeypatch.setattr(packed, "SCORE_CELLS", cells)
            z, lse = packed.causal(q, k, v, 0.25)
            assert float((z - wanted).abs().max()) <= 1e-5 and float((lse - wanted_lse).abs().max()) <= 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("kv", [1, 2, 6])
@pytest.mark.parametrize("rows", [1, 7, 31, 32, 70, 90])
def test_last_rows_read_all_keys_up_to_their_own(rows, kv, dtype, bound):
    """By softmax written out; 90 keys, so that 90 rows have none stored before them. Blocks with and without a rest."""
    g = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(2, h, n, 8, generator=g, dtype=dtype) for h, n in ((6, rows), (kv, 90), (kv, 90)))
    unread = torch.ones(rows, 90).tril(90 - rows) == 0
    keys, values = (t.repeat_interleave(6 // kv, 1) for t in (k, v))
    wanted = (q @ keys.transpose(2, 3) * 0.25).masked_fill(unread, -torch.inf).softmax(-1) @ values
    assert float((packed.last_rows(q, k, v, 0.25) - wanted).abs().max()) <= bound
