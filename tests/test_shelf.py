"""The contract of every mechanism: found without a list, NEUTRAL is vanilla, maps stay partitions, and they compose.

The shelf is read from the folder, so a new file is held to all this by being there. Pairs run or are refused by name;
MUST names, by file, those that have to run.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import warnings
from functools import cache

import pytest
import torch

import lab.mechanisms as room
from lab.edges.policy import Policy
from lab.edges.segments import places
from lab.edges.sweeping import decoder_map, sweep
from lab.errors import ConfigError, LabError, UsageError
from lab.mechanisms.streaming import Session, Streaming
from lab.model.answering import target_logits
from lab.model.decoder import decode
from lab.model.door import Door
from lab.model.run import Run
from lab.slots import Mechanism, plan_of
from lab.spans import ROLES
from tests import shelf_models

SHELF = room.shelf()
KNOWN = ("differential_token_drop", "segment_merging", "streaming", "thumbnail_and_sampling")
MUST = {
    frozenset(pair)
    for pair in (
        ("mixture_of_depths", "differential_token_drop"),
        ("mixture_of_depths", "vidkv"),
        ("differential_token_drop", "thumbnail_and_sampling"),
        ("segment_merging", "vidkv"),
        ("streaming", "mixture_of_depths"),
        ("streaming", "differential_token_drop"),
        ("streaming", "vidkv"),
    )
}
# sampled tokens have no neighbour in time that they could be compared with: the second drops nothing
IDLE = {("thumbnail_and_sampling", "differential_token_drop")}
STREAMS = ("mixture_of_depths", "differential_token_drop", "vidkv")
PAIRS = list(itertools.permutations(SHELF, 2))
NAMES = ["+".join(pair) for pair in PAIRS]

# the last position reads nothing but itself: its logits are those of its own token, whatever stands before
ALONE = Policy.from_dict(
    {
        "format": "edge-policy/1",
        "cuts": [{"layers": "all", "q": "last", "k": "*", "where": "pos(k) < pos(q)"}],
    }
)
VIDEO_OFF = Policy.from_dict(
    {"format": "edge-policy/1", "cuts": [{"layers": "all", "q": "after-video+last", "k": "frame"}]}
)  # fmt: skip


def example(name):
    return room.load(name).EXAMPLE


def neutral(name):
    return room.load(name).NEUTRAL


@pytest.fixture(scope="module")
def small():
    return shelf_models.model()


@pytest.fixture(scope="module")
def ready(small):
    return small.prepare(shelf_models.question())


@cache
def words():
    return torch.tensor([[60, 61, 62, 63, 64]])


def close(a, b, atol=1e-5):
    return torch.allclose(a, b, atol=atol, rtol=1e-4)


def check_partition(tokens, before):
    """Every position has one role, and every video token says where it came from; nothing came from nowhere."""
    assert (
        bool((tokens.order.diff() > 0).all())
        and tokens.roles().count("last") == 1
        and tokens.roles()[-1] == "last"
    )
    parts = places(tokens)
    assert bool(
        (sum(p.long() for p in parts.values()) + (tokens.role == ROLES.index("last")).long() == 1).all()
    )
    video = tokens.where(kind="video")
    assert set(tokens.role[video].tolist()) <= {ROLES.index("frame"), ROLES.index("separator")}
    source = tokens.source[video]
    real = source[source >= 0]
    assert len(real.unique()) == len(real) and bool((tokens.source[tokens.where(kind="text")] == -1).all())
    if tokens.parts is not None:
        assert torch.allclose(tokens.parts[video].sum(1), torch.ones(len(video)), atol=1e-5)
        assert float(tokens.parts[tokens.where(kind="text")].abs().sum()) == 0
        local = tokens.parts[video[source >= 0]] > 0
        assert int(local.sum(0).max()) <= 1  # kept, merged into one token, or gone
    words = [r for r in tokens.roles() if r in ("question", "option", "instruction", "last")]
    assert words == [r for r in before.roles() if r in ("question", "option", "instruction", "last")]


# ---- the shelf ----------------------------------------------------------------------------------------------------


def test_the_shelf_finds_every_file():
    assert set(KNOWN) <= set(SHELF) and list(SHELF) == sorted(SHELF)
    with pytest.raises(UsageError, match="closest: streaming"):
        room.load("streeming")


def test_a_new_file_is_found_without_being_registered(tmp_path, monkeypatch):
    (tmp_path / "freshly_written.py").write_text("NEUTRAL = 1\nclass A: ...\nEXAMPLE: int = 2\n")
    (tmp_path / "helper.py").write_text("NEUTRAL = 1\n")
    monkeypatch.setattr(room, "__path__", [*room.__path__, str(tmp_path)])
    room.shelf.cache_clear()
    try:
        assert "freshly_written" in room.shelf() and "helper" not in room.shelf()
        assert room.load("freshly_written").EXAMPLE == 2
    finally:
        room.shelf.cache_clear()
        sys.modules.pop("lab.mechanisms.freshly_written", None)


def test_looking_at_the_shelf_imports_no_mechanism_and_no_torch():
    code = "import sys, lab.mechanisms as m; print(m.shelf(), 'torch' in sys.modules, 'lab.mechanisms.streaming' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("False False") and "streaming" in out


@pytest.mark.parametrize("name", SHELF)
def test_files_keep_the_contract(name):
    module = room.load(name)
    for m in (module.NEUTRAL, module.EXAMPLE):
        assert (
            isinstance(m, Mechanism) and dataclasses.is_dataclass(m) and type(m).__module__ == module.__name__
        )
        with pytest.raises(dataclasses.FrozenInstanceError):
            m.anything = 1
    assert type(module.EXAMPLE).NEUTRAL == module.NEUTRAL and type(module.EXAMPLE).EXAMPLE == module.EXAMPLE
    assert module.NEUTRAL != module.EXAMPLE
    assert "arXiv" in (module.__doc__ or "") and type(module.EXAMPLE).__doc__


@pytest.mark.parametrize("name", SHELF)
def test_config_is_plain_data(name):
    for m in (neutral(name), example(name)):
        data = room.plain(m)
        assert data["mechanism"].startswith(f"{name}.") and room.of_plain(data) == m
    with pytest.raises(ConfigError, match="no field"):
        room.of_plain({**room.plain(example(name)), "no_such_field": 1})


def test_plain_data_that_names_nothing():
    for wrong in (
        {},
        {"mechanism": "os.system"},
        {"mechanism": "streaming.Session"},
        {"mechanism": "streaming.nothing"},
    ):
        with pytest.raises(ConfigError):
            room.of_plain(wrong)
    with pytest.raises(ConfigError, match="theta"):
        room.of_plain({"mechanism": "streaming.Streaming", "theta": "high"})
    with pytest.raises(UsageError, match="no mechanism"):
        room.plain(object())


# ---- one mechanism ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHELF)
def test_neutral_equals_vanilla_bit_for_bit(name, small, ready):
    m = [neutral(name)]
    with torch.no_grad():
        out, plain = small.run(ready, read="all", mechanisms=m), small.run(ready, read="all")
    assert torch.equal(out.logits, plain.logits)
    assert (
        out.maps[0].order.tolist() == plain.maps[0].order.tolist()
        and out.maps[0].roles() == plain.maps[0].roles()
    )
    ids = [small.generate(ready, max_new_tokens=4, stop=[], mechanisms=x).ids for x in (m, [])]
    assert torch.equal(*ids)
    assert torch.equal(
        target_logits(small, ready, words(), mechanisms=m), target_logits(small, ready, words())
    )


@pytest.mark.parametrize("name", SHELF)
def test_the_example_does_something_and_leaves_the_model_clean(name, small, ready):
    clean = small(ready)
    with torch.no_grad():
        out = small.run(ready, read="all", mechanisms=[example(name)])
        first = target_logits(small, ready, words(), mechanisms=[example(name)])
        assert not torch.equal(first, target_logits(small, ready, words()))
        assert torch.equal(small(ready), clean)
    assert out.logits.shape[1] == len(out.maps[0]) and bool(torch.isfinite(out.logits).all())
    check_partition(out.maps[0], ready.tokens)


@pytest.mark.parametrize("name", SHELF)
def test_cached_decoding_equals_one_forward(name, small, ready):
    """Teacher-forced through the cache, and as one longer sequence. A cache that changes keys on purpose is left out."""
    m = example(name)
    plan = m.plan(small.sizes)
    cached = target_logits(small, ready, words(), mechanisms=[m])
    if plan.cache is not None:
        assert bool(torch.isfinite(cached).all())
        return
    from lab.model.preparing import with_sampler

    with torch.no_grad(), small.plan_hooks(plan):
        door, maps = small.arrive(with_sampler(small, ready, plan), plan)
        more = door.then(small.hf.get_input_embeddings()(words()[:, :-1]))
        whole = Door(torch.cat([door.embeds, more.embeds], 1), torch.cat([door.rope, more.rope], -1), None)
        tokens = (maps[0].generated(words()[0, :-1].tolist()),)
        full = small.read(*decode(small, whole, Run(), detours=plan.detours, tokens=tokens), "all")
    assert close(full[:, -5:], cached)


@pytest.mark.parametrize("name", SHELF)
def test_knockouts_mean_the_same(name, small, ready):
    """Planted: a last position that reads only itself says the same with every mechanism. And cuts cut."""
    m = [example(name)]
    with torch.no_grad():
        alone = small(ready, mechanisms=m, policy=ALONE)
        assert close(alone, small(ready, policy=ALONE))
        free = small(ready, mechanisms=m)
        assert not close(alone, free, atol=1e-3)
        assert not close(small(ready, mechanisms=m, policy=VIDEO_OFF), free, atol=1e-4)
        with small.pruned(ALONE):
            assert torch.equal(small(ready, mechanisms=m), alone)
    ids = [small.generate(ready, max_new_tokens=1, stop=[], policy=ALONE, mechanisms=x).ids for x in (m, [])]
    assert torch.equal(*ids)


@pytest.mark.parametrize("name", SHELF)
def test_without_the_video_its_pixels_do_not_matter(name, small):
    """Text cut off from frames in all layers: another video of the same mechanism's choices gives the same answer."""
    item, m = shelf_models.question(), [example(name)]
    if m[0].plan(small.sizes).cache is not None:
        return  # a quantising cache: rows of a group share their scale, text and video alike
    a = small.prepare(item, mechanisms=m)
    with torch.no_grad():
        cut = small(a, policy=VIDEO_OFF)
        texts = small.maps(a)[0]
        scaled = small.run_with_hooks(
            a, fwd_hooks=[("blocks.0.hook_resid_pre", _louder(texts.where(role="frame")))], policy=VIDEO_OFF
        )
        free = small.run_with_hooks(
            a, fwd_hooks=[("blocks.0.hook_resid_pre", _louder(texts.where(role="frame")))]
        )
    assert close(cut, scaled, atol=1e-4) and not close(free, small(a), atol=1e-3)


def _louder(rows):
    def hook(value, hook):
        value = value.clone()
        value[:, rows] += 0.5
        return value

    return hook


@pytest.mark.parametrize("name", SHELF)
def test_lens_and_caches_of_activations(name, small, ready):
    """run_with_cache sees every layer of the shortened stream, and the lens reads it."""
    m = [example(name)]
    with torch.no_grad():
        logits, cache_ = small.run_with_cache(ready, mechanisms=m)
        last = cache_["blocks.7.hook_resid_post"][:, -1:]
        assert close(small.unembed(small.ln_final(last)), logits)
        lens = [small.unembed(small.ln_final(cache_[f"blocks.{i}.hook_resid_post"])) for i in range(8)]
    n = len(small.maps(ready, mechanisms=m)[0])
    assert all(x.shape[1] == n for x in lens)


@pytest.mark.parametrize("name", SHELF)
def test_policy_sweeps(name, small):
    """The fast sweep equals the reference (or says why it takes it), and the cuts are those of the decoder's own map."""
    prepared = small.prepare(shelf_models.question(), mechanisms=[example(name)])
    paths = ["cross-frame", "video->last", "question+option->last"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast, slow = (
            sweep(small, prepared, paths, window=3, executor=e, show_progress=False)
            for e in ("fast", "reference")
        )
    assert abs(fast.values - slow.values).max() < 1e-2 and abs(slow.values).max() > 1e-3
    tokens, _ = decoder_map(small, prepared)
    from lab.edges.dense import dense_edges
    from lab.edges.pathways import cut_mask

    cut = dense_edges(cut_mask(tokens, "video->last"))
    with torch.no_grad():
        clean, hit = (
            small(prepared)[0, -1].softmax(-1),
            small(prepared, edges=dict.fromkeys((2, 3, 4), cut))[0, -1].softmax(-1),
        )
    token = int(clean.argmax())
    want = float((hit[token] - clean[token]) / clean[token] * 100)
    assert slow.values[0, 1, 3] == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("name", SHELF)
def test_answers(name, small, ready):
    assert small.answer(ready, mechanisms=[example(name)]).letter in ("A", "B")
    assert small.answer(shelf_models.question(), mechanisms=[example(name)]).letter in ("A", "B")


# ---- two mechanisms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=NAMES)
def test_pairs_run_or_are_refused_by_name(first, second, small, ready):
    both = [example(first), example(second)]
    must = frozenset((first, second)) in MUST
    try:
        plan_of(both, small.sizes)
        with torch.no_grad():
            out = small.run(ready, read="all", mechanisms=both)
            more = target_logits(small, ready, words(), mechanisms=both)
            alone = small(ready, mechanisms=both, policy=ALONE)
    except LabError as e:
        assert not must, f"{first} + {second} must compose, but: {e}"
        assert first in str(e) and second in str(e)
        return
    check_partition(out.maps[0], ready.tokens)
    assert bool(torch.isfinite(out.logits).all()) and bool(torch.isfinite(more).all())
    assert close(alone, small(ready, policy=ALONE))
    for one in () if (first, second) in IDLE else both:  # neither is left out
        single = target_logits(small, ready, words(), mechanisms=[one])
        assert not torch.equal(more, single), f"{first} + {second} is {one} alone"


@pytest.mark.parametrize("name", SHELF)
def test_a_mechanism_beside_itself_runs_or_names_the_slot(name, small, ready):
    with torch.no_grad():
        try:
            out = small.run(ready, read="all", mechanisms=[example(name), example(name)])
        except LabError as e:
            assert "slot" in str(e) and str(e).count(f"{name}.") == 2 and len(str(e)) < 150
            return
    check_partition(out.maps[0], ready.tokens)
    assert bool(torch.isfinite(out.logits).all())


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=NAMES)
def test_neutral_beside_another_changes_nothing(first, second, small, ready):
    with torch.no_grad():
        try:
            both = target_logits(small, ready, words(), mechanisms=[neutral(first), example(second)])
        except LabError as e:  # two caches, two layouts
            assert "slot" in str(e)
            return
        assert torch.equal(both, target_logits(small, ready, words(), mechanisms=[example(second)]))


@pytest.mark.parametrize("name", [n for n in SHELF if n != "streaming"])
def test_sessions_with_each_mechanism(name, small):
    """In a stream, frame by frame: equal to one forward over the same rows, or refused by name."""
    quiet = Streaming(decide="never", max_new_tokens=3)
    try:
        session = Session(small, quiet, mechanisms=[example(name)])
        log = session.run(shelf_models.clip(10))
        session.ask(shelf_models.question())
        reply = session.flush()[0]
    except LabError as e:
        assert name not in STREAMS, f"streaming + {name} must compose, but: {e}"
        assert name in str(e) or type(example(name)).__name__ in str(e)
        assert "stream" in str(e) or "session" in str(e)
        return
    assert len(log) == 10 and bool(torch.isfinite(reply.first).all())
    plain = Session(small, quiet)
    plain.run(shelf_models.clip(10))
    assert any(a.p_silent != b.p_silent for a, b in zip(log, plain.log, strict=True))
    if session.context.plan.cache is not None:
        return  # a lossy cache: what later rows read is not what one forward computes
    logits, heads = session.context.replay()
    ends = torch.cat([mo.heads["frame_end"] for mo in log if mo.read_at == "frame"], 1)
    assert close(heads["frame_end"], ends)
    fed = len(reply.ids) - reply.capped  # of a capped reply the last token is still to be fed
    assert close(logits[0, -1 - fed], reply.first)


def test_the_table_of_pairs_names_files_of_this_shelf_or_of_the_next():
    names = set().union(*MUST) | set(STREAMS)
    assert names <= {*SHELF, "mixture_of_depths", "vidkv"}
