"""The six slots: neutral fillings change nothing (0.0); dropping, routing and ragged caches mean what they say."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from lab.carriers import VideoQA, VisionTokens
from lab.errors import RunError, UsageError
from lab.model.cache import KVCache
from lab.slots import Cache, Detour, Head, Layout, Mechanism, ModelSizes, Plan, Stage
from tests.families import FAMILIES, inputs


@dataclass(frozen=True)
class Filling:
    """A mechanism whose plan is given."""

    what: Plan = Plan()

    def plan(self, cfg: ModelSizes) -> Plan:
        return self.what


Filling.NEUTRAL = Filling()
Filling.EXAMPLE = Filling()


class SameStage:
    def __call__(self, frames, vision, query):
        return vision


class SameDetour:
    def __call__(self, layer, step, resid, side):
        return step(resid, side)


class Loud(KVCache):
    """A cache of another name."""

    def __init__(self, loud):
        super().__init__()
        self.loud = loud


class MeanHead:
    def __call__(self, resid, side):
        return {"mean": resid.mean((1, 2))}


class Route:
    """Every second layer computes only the given rows; the others pass by."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, layer, step, resid, side):
        if layer % 2 == 0:
            return step(resid, side)
        rows = self.rows[torch.isin(self.rows, side.order)]
        if side.order[0] > 0:  # decoding: every new row is computed
            return step(resid, side)
        some, _ = step(resid[:, rows], side.only(rows))
        return resid.index_copy(1, rows, some), side


class Shorten:
    """From a layer on, only the given rows go on."""

    def __init__(self, at, rows):
        self.at, self.rows = at, rows

    def __call__(self, layer, step, resid, side):
        if layer == self.at and side.order[0] == 0:
            resid, side = resid[:, self.rows], side.only(self.rows)
        return step(resid, side)


def question(model, name):
    """A Ready with item and frames, as `prepare` makes it, from processor tensors."""
    from lab.carriers import Frames

    ready = model.prepare_inputs(**inputs(name))
    frames = Frames(
        torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.arange(3.0), torch.arange(3), 1.0, 3.0, "test"
    )
    return replace(ready, item=VideoQA(frames, "?"), frames=frames)


def test_fillings_are_what_the_protocols_ask():
    assert (
        isinstance(SameStage(), Stage) and isinstance(SameDetour(), Detour) and isinstance(MeanHead(), Head)
    )
    assert (
        isinstance(KVCache(), Cache)
        and isinstance(Filling(), Mechanism)
        and isinstance(lambda i, f, v: [], Layout)
    )


def test_plans_add_and_name_what_clashes():
    one = Plan(stages=(SameStage(),), cache=KVCache)
    assert len((one + Plan(stages=(SameStage(),))).stages) == 2
    with pytest.raises(
        UsageError, match=r"fill the cache slot: test_slots.Loud and cache.KVCache; choose one"
    ):
        _ = Plan(cache=partial(Loud, loud=1)) + Plan(cache=KVCache)


def test_what_is_no_list_of_mechanisms_is_refused(wrapped):
    model = wrapped("llava_onevision")
    ready = question(model, "llava_onevision")
    for given, says in (
        ("mixture_of_depths", "takes a list"), (Filling(), "takes a list"), (None, "takes a list"),
        (["mixture_of_depths"], "is no mechanism"), ([Filling], "is no mechanism"), ([3], "is no mechanism"),
    ):  # fmt: skip
        for run in (model.run, model.generate, model.answer):
            with pytest.raises(UsageError, match=says):
                run(ready, mechanisms=given)
        with pytest.raises(UsageError, match=says):
            model.prepare(ready.item, mechanisms=given)


@pytest.mark.parametrize("name", FAMILIES)
def test_neutral_fillings_change_nothing(name, wrapped):
    model = wrapped(name)
    ready = question(model, name)
    with torch.no_grad():
        clean = model(ready, read="all")
        for plan in (
            Plan(detours=(SameDetour(), SameDetour())),
            Plan(cache=KVCache),
            Plan(stages=(SameStage(),)),
            Plan(heads=(MeanHead(),)),
        ):
            out = model.run(ready, read="all", mechanisms=[Filling(plan)])
            assert torch.equal(out.logits, clean), plan
        _, cache = model.run_with_cache(ready, names_filter="ln_final.hook_normalized")
    mean = cache["ln_final.hook_normalized"].mean((1, 2))
    assert torch.allclose(out.heads["mean"], mean) and mean.abs().max() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_dropping_video_tokens_follows_the_map(name, wrapped):
    """A stage that drops tokens = the same prompt with those rows taken out at the door, rope positions kept."""
    model = wrapped(name)
    ready = question(model, name)
    n = len(ready.grids[0])
    kept = torch.arange(0, n, 2)

    def drop(frames, vision: VisionTokens, query):
        return vision[kept.to(vision.x.device)]

    with torch.no_grad():
        out = model.run(ready, read="all", mechanisms=[Filling(Plan(stages=(drop,)))])
        video = ready.tokens.where(kind="video")
        gone = video[~torch.isin(torch.arange(n), kept)]
        rows = torch.tensor([i for i in range(ready.n_pos) if i not in set(gone.tolist())])
        keep = lambda q, k: ~torch.isin(k, gone)[None].expand(len(q), -1)  # noqa: E731
        oracle = model(ready, read="all", edges=dict.fromkeys(range(model.cfg.n_layers), keep))[:, rows]
    assert len(out.maps[0]) == len(rows) and out.maps[0].order.tolist() == rows.tolist()
    assert (out.logits - oracle).abs().max() < 1e-4
    assert not torch.allclose(out.logits[:, -1], model(ready)[:, -1], atol=1e-3)


@pytest.mark.parametrize("batch", [{}, {"worlds": 2, "pad": 3}], ids=["one", "left-padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_routing_equals_hiding_unrouted_keys(name, batch, wrapped):
    """Rows that skip a layer leave no key there. Oracle: hide those keys, and copy those rows' residual through."""
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name, **batch))
    text = torch.arange(0, ready.n_pos, 2)
    text = torch.cat([text, torch.tensor([ready.n_pos - 1])]).unique()
    others = torch.tensor([i for i in range(ready.n_pos) if i not in set(text.tolist())])
    keep = lambda q, k: torch.isin(k, text)[None].expand(len(q), -1)  # noqa: E731
    odd = range(1, model.cfg.n_layers, 2)

    with torch.no_grad():
        routed = model.run(ready, read="all", mechanisms=[Filling(Plan(detours=(Route(text),)))]).logits
        saved = {}

        def remember(value, hook):
            saved[hook.layer()] = value

        def restore(value, hook):
            value = value.clone()
            value[:, others] = saved[hook.layer()][:, others]
            return value

        hooks = [(f"blocks.{i}.hook_resid_pre", remember) for i in odd] + [
            (f"blocks.{i}.hook_resid_post", restore) for i in odd
        ]
        oracle = model.run_with_hooks(ready, fwd_hooks=hooks, read="all", edges=dict.fromkeys(odd, keep))
        clean = model(ready, read="all")
    real = ready.inputs["attention_mask"].bool()
    assert (routed - oracle)[real].abs().max() < 1e-4
    assert (routed - clean)[real].abs().max() > 1e-3


@pytest.mark.parametrize("batch", [{}, {"worlds": 2, "pad": 3}], ids=["one", "left-padded"])
def test_generation_with_a_ragged_cache(batch, wrapped):
    """Layers hold different rows; decoding equals a full recompute under the same routing."""
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**inputs("llava_onevision", **batch))
    rows = torch.arange(ready.n_pos // 2, ready.n_pos)
    caches = []

    def cache():
        caches.append(KVCache())
        return caches[-1]

    plan = Plan(detours=(Route(rows),), cache=cache)
    out = model.generate(ready, max_new_tokens=6, stop=[], mechanisms=[Filling(plan)]).ids
    assert caches[-1].lengths()[:2] == [ready.n_pos + 5, len(rows) + 5]
    with torch.no_grad():
        for step in range(1, 6):
            inp = dict(ready.inputs)
            inp["input_ids"] = torch.cat([inp["input_ids"], out[:, :step]], 1)
            inp["attention_mask"] = torch.cat([inp["attention_mask"], torch.ones_like(out[:, :step])], 1)
            longer = model.prepare_inputs(**inp)
            plan = Plan(detours=(Route(torch.arange(ready.n_pos // 2, longer.n_pos)),))
            again = model(longer, mechanisms=[Filling(plan)])
            assert again[:, -1].argmax(-1).tolist() == out[:, step].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shortening_detour(name, wrapped):
    """Rows dropped after a layer are read by nobody later; the map says who is left."""
    model = wrapped(name)
    ready = model.prepare_inputs(**inputs(name))
    last = ready.n_pos - 1
    rows = torch.tensor([i for i in range(ready.n_pos) if i % 3 or i == last])
    gone = torch.tensor([i for i in range(ready.n_pos) if not (i % 3 or i == last)])
    keep = lambda q, k: ~torch.isin(k, gone)[None].expand(len(q), -1)  # noqa: E731
    with torch.no_grad():
        out = model.run(ready, mechanisms=[Filling(Plan(detours=(Shorten(2, rows),)))])
        oracle = model(ready, edges=dict.fromkeys(range(2, model.cfg.n_layers), keep))
    assert out.maps[0].order.tolist() == rows.tolist()
    assert (out.logits - oracle).abs().max() < 1e-4


def test_stages_over_processor_batches_are_refused(wrapped):
    model = wrapped("internvl")
    with pytest.raises(RunError, match="2 worlds"):
        model.run(
            model.prepare_inputs(**inputs("internvl", worlds=2)),
            mechanisms=[Filling(Plan(stages=(SameStage(),)))],
        )


def test_hooks_of_a_plan(wrapped):
    """They act in runs and in generation, and are gone afterwards."""
    model = wrapped("llava_onevision")
    ready = model.prepare_inputs(**inputs("llava_onevision"))
    seen = []

    def half(value, hook):
        seen.append(value.shape[1])
        return value / 2

    plan = Plan(hooks=(("blocks.1.hook_mlp_out", half),))
    with torch.no_grad():
        clean = model(ready)
        assert not torch.equal(model.run(ready, mechanisms=[Filling(plan)]).logits, clean)
        model.generate(ready, max_new_tokens=3, stop=[], mechanisms=[Filling(plan)])
        assert seen == [ready.n_pos, ready.n_pos, 1, 1]
        assert torch.equal(model(ready), clean)
