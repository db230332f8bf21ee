"""Patching: nothing patched is clean, everything patched is the other world, stored runs equal whole forwards, and other
people's libraries patch to the same numbers."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lab.adapters.nnsight import tracing
from lab.adapters.transformer_lens import bridge
from lab.edges import packed
from lab.edges.policy import Policy
from lab.errors import UsageError
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.model.zoo import wrap
from lab.patch import Worlds, mean, noise, take
from lab.patch.gradients import attribution_patch
from lab.patch.metrics import Score
from lab.patch.paths import head_path, token_path
from lab.runs import Ledger
from lab.slots import Plan
from tests import shelf_models
from tests.families import FAMILIES, LAYERS, build, inputs
from tests.test_slots import Filling, Route

TOL = 1e-5
WAY = "clean -> corrupted"


@functools.cache
def model_of(name: str) -> Any:
    model = wrap(build(name))
    model.hf.requires_grad_(False)  # as lab.load leaves them
    return model


def two(name: str, small: float = 0.0) -> dict[str, Any]:
    """A question, and the same with other pixels."""
    x = inputs(name)
    pixels = "pixel_values" if "pixel_values" in x else "pixel_values_videos"
    other = x[pixels].flip(1 if x[pixels].ndim == 5 else 0)
    if small:
        other = x[pixels] + small * torch.randn(x[pixels].shape, generator=torch.Generator().manual_seed(1))
    return {"clean": x, "corrupted": {**x, pixels: other}}


@functools.cache
def worlds_of(name: str) -> Worlds:
    return Worlds.of(model_of(name), **two(name))


def away(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# ---- null and whole -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_patched_is_clean_and_everything_is_the_other_world(name: str) -> None:
    worlds, model = worlds_of(name), model_of(name)
    with torch.no_grad():
        alone = torch.cat([model(worlds.ready[w].inputs, read="all") for w in worlds.names])
    clean = worlds.run(read="all")
    assert away(clean, alone) == 0.0 and away(clean[0], clean[1]) > 0.1
    for edit in (
        take(WAY, site="embed"),
        *(take(WAY, layers=layer) for layer in range(LAYERS)),
        take(WAY, site="resid_post", layers=2),
    ):
        got = worlds.run([edit], read="all")
        assert away(got[0], clean[0]) == 0.0 and away(got[1], clean[0]) == 0.0, edit
    clean = worlds.run()
    both = worlds.run([take(WAY, layers=2), take("corrupted -> clean", layers=2)])
    assert away(both, clean.flip(0)) == 0.0, "worlds change places"
    assert away(worlds.run([take(WAY, role="before-video")]), clean) == 0.0
    for executor in ("fast", "reference"):
        got = worlds.evaluate([[], [take(WAY, layers=0)]], into="corrupted", executor=executor)
        assert away(got[0], clean[1, -1]) == 0.0 and away(got[1], clean[0, -1]) <= TOL


def random_cells(seed: int, n: int) -> list[list[Any]]:
    dice = random.Random(seed)
    sites = (
        "resid_pre",
        "resid_post",
        "attn_out",
        "resid_mid",
        "mlp_out",
        "z",
        "q",
        "rot_q",
        "k",
        "rot_k",
        "v",
        "embed",
    )
    cells: list[list[Any]] = [
        [noise("corrupted", layers=2, role="video")],
        [mean("corrupted", site="z", layers=3, head=1)],
    ]
    for _ in range(n):
        edits = []
        for _ in range(dice.randint(1, 2)):
            site = dice.choice(sites)
            layers = None if site == "embed" else sorted(dice.sample(range(LAYERS), dice.randint(1, 2)))
            heads = dice.choice([None, 0, [0, 1]]) if site in ("z", "q", "rot_q", "k", "rot_k", "v") else None
            rows = dice.choice(
                [
                    {"role": "video", "frame": 1},
                    {"role": "last"},
                    {"role": "text+last"},
                    {"positions": [3, 9]},
                ]
            )
            edits.append(take(WAY, site=site, layers=layers, head=heads, **rows))
        cells.append(edits)
    return cells


@pytest.mark.parametrize(
    ("name", "joined"), [*((name, packed.JOINED) for name in FAMILIES), ("internvl", 0), ("qwen3_vl", 0)]
)
def test_stored_runs_equal_whole_forwards(name: str, joined: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any site, heads, rows and layers; also under a policy, which the stored runs obey; with many keys and few."""
    monkeypatch.setattr(packed, "JOINED", joined)
    policy = Policy.from_dict(
        {
            "format": "edge-policy/1",
            "cuts": [
                {"layers": "2-3", "q": "last", "k": "video"},
                {"layers": "4", "heads": [1], "q": "video", "k": "video", "where": "frame(q) > frame(k)"},
            ],
        }
    )
    for some in (None, policy):
        worlds = Worlds.of(model_of(name), policy=some, **two(name))
        cells = random_cells(len(name), 8 if some is None else 4)
        fast = worlds.evaluate(cells, into="corrupted", n_rows=100)
        assert worlds.reason == ""
        slow = worlds.evaluate(cells, into="corrupted", executor="reference")
        assert away(fast, slow) <= TOL
        assert float((slow - worlds.run()[1]).abs().amax(1).max()) > 1e-2
        batched = torch.stack([worlds.run(c)[1, -1] for c in cells[:5]])
        assert away(batched, slow[:5]) <= TOL, "one batched pass"
    plain = Worlds.of(model_of(name), **two(name))
    assert away(worlds.run(), plain.run()) > 1e-3, "the policy acts"


def test_only_the_suffix_is_computed() -> None:
    worlds = Worlds.of(model_of("internvl"), **two("internvl"))
    late = [take(WAY, layers=LAYERS - 2, role="video", frame=2)]
    worlds.evaluate([late] * 10, into="corrupted")
    # two stored runs, and of ten cells the last frame's rows and those after it, in two of five layers
    assert worlds.ledger.forwards < 2 + 10 * 0.25 and worlds.ledger.naive == 11
    worlds.evaluate([[take(WAY, site="resid_post", layers=LAYERS - 1, role="video")]], into="corrupted")
    assert worlds.ledger.forwards < 4.1 + 10 * 0.25, "nobody reads the video after the last layer"


@dataclass(frozen=True)
class _Half:
    def plan(self, cfg: Any) -> Plan:
        return Plan(hooks=(("blocks.1.hook_mlp_out", lambda value, hook: value / 2),))


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_mechanisms_take_worlds_one_by_one(name: str) -> None:
    model, given = model_of(name), two(name)
    n = given["clean"]["input_ids"].shape[1]
    route = Filling(Plan(detours=(Route(torch.arange(0, n, 2)),)))
    for mechanism in (route, _Half()):
        worlds = Worlds.of(model, mechanisms=[mechanism], **given)
        clean = worlds.run()
        with torch.no_grad():
            alone = torch.cat([model.run(given[w], mechanisms=[mechanism]).logits for w in given])
        assert away(clean, alone) == 0.0 and away(clean, worlds_of(name).run()) > 1e-3
        assert away(worlds.run([take(WAY, layers=1)])[1], clean[0]) <= TOL
        cells = [[take(WAY, layers=2, role="video", frame=1)], []]
        got = worlds.evaluate(cells, into="corrupted")
        assert worlds.reason and away(got[1], clean[1, -1]) == 0.0 < away(got[0], clean[1, -1])
        changed = worlds.run([take(WAY, layers=0), take("corrupted -> clean", layers=0)])
        assert away(changed, clean.flip(0)) <= TOL, "worlds change places"
    worlds = Worlds.of(model, mechanisms=[route], **given)
    dropped = worlds.run([take(WAY, site="mlp_out", layers=1, positions=[1])])
    assert away(dropped, worlds.run()) == 0.0, "layer 2 never saw that row"


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_worlds_that_take_from_each_other_one_by_one(name: str) -> None:
    """A detour that takes all rows through changes nothing but that worlds run one at a time: the numbers are the same."""
    given = two(name)
    given["shadow"] = given["corrupted"]
    whole = Filling(Plan(detours=(Route(torch.arange(given["clean"]["input_ids"].shape[1])),)))
    batched = Worlds.of(model_of(name), **given)
    parted = Worlds.of(model_of(name), mechanisms=[whole], **given)
    assert parted.one_by_one and not batched.one_by_one
    path = token_path(WAY, "video", "last", layers=[1, 2, 3])
    assert away(parted.run(path), batched.run(path)) <= TOL < away(batched.run(path), batched.run())


def test_tokens_dropped_by_content_are_dropped_in_both_worlds() -> None:
    """The first world's choice: everything taken is then the other world on the same tokens; alone they cannot be carried."""
    model, drop = shelf_models.model(layers=3), DifferentialTokenDrop(ratio=0.4)
    item = shelf_models.question()
    twin = shelf_models.question(seed=1, moving=False)
    worlds = Worlds.of(model, clean=item, corrupted=twin, mechanisms=[drop])
    maps = [worlds.arrive(w)[1] for w in worlds.names]
    assert torch.equal(maps[0].source, maps[1].source) and len(maps[0]) < len(worlds.tokens("clean"))
    own = model.prepare(twin, mechanisms=[drop])
    assert not torch.equal(model.arrive(own)[1][0].source, maps[0].source), "it would have chosen others"
    clean = worlds.run()
    with torch.no_grad():
        alone = model(model.prepare(item, mechanisms=[drop]))
    assert away(clean[0], alone[0]) == 0.0 < away(clean[1], clean[0])
    assert away(worlds.run([take(WAY, layers=0)])[1], clean[0]) <= TOL
    cells = [[take(WAY, layers=1, role="video", frame=f)] for f in range(3)]
    fast, slow = (worlds.evaluate(cells, into="corrupted", executor=e) for e in ("fast", "reference"))
    assert worlds.reason == "" and away(fast, slow) <= TOL


def test_values_that_are_the_same_in_both_worlds_cost_nothing() -> None:
    worlds = Worlds.of(model_of("internvl"), **two("internvl"))
    text = [[take(WAY, layers=layer, role="before-video")] for layer in range(LAYERS)]
    got = worlds.evaluate(text, into="corrupted")
    assert away(got, worlds.run()[1]) <= TOL and worlds.ledger.forwards == 2, "the stored runs alone"
    later = [
        take(WAY, layers=0, role="video", frame=0),
        take(WAY, layers=2, role="before-video+video", frame=1),
    ]
    fast, slow = (worlds.evaluate([later], into="corrupted", executor=e) for e in ("fast", "reference"))
    assert away(fast, slow) <= TOL


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_taken_with_all_before_them_are_the_other_worlds_from_then_on(name: str) -> None:
    """They are not run again, and what is read of them is the other world's; the numbers are the reference's."""
    worlds = Worlds.of(model_of(name), **two(name))
    n = len(worlds.tokens("clean"))
    end = int(worlds.tokens("clean").where(role="video").max()) + 1
    cells = [
        [take(WAY, layers=2, positions=range(end))],
        [take(WAY, site="resid_post", layers=1, role="video")],
        [take(WAY, layers=1, role="video", frame=0), take(WAY, layers=3, role="video")],
        [take(WAY, layers=[1, 2], role="video", frame=[0, 1]), take(WAY, site="resid_post", layers=3, role="last")],
        [take(WAY, layers=1, role="video"), take(WAY, site="v", layers=3, role="video", frame=1)],
        [take(WAY, layers=2)],
    ]  # fmt: skip
    fast, slow = (worlds.evaluate(cells, into="corrupted", executor=e) for e in ("fast", "reference"))
    assert worlds.reason == "" and away(fast, slow) <= TOL < away(slow[0], slow[2])
    clean = worlds.run()
    assert away(fast[-1], clean[0, -1]) <= TOL < away(fast[0], clean[1, -1])
    policy = Policy.from_dict(
        {"format": "edge-policy/1", "cuts": [{"layers": "3", "q": "last", "k": "video"}]}
    )
    cut = Worlds.of(model_of(name), policy=policy, **two(name))
    fast, slow = (cut.evaluate(cells, into="corrupted", executor=e) for e in ("fast", "reference"))
    assert cut.reason == "" and away(fast, slow) <= TOL
    if name == "qwen3_vl":  # DeepStack adds to them on the way
        return
    assert away(fast[-1], cut.run()[0, -1]) <= TOL
    worlds.ledger = Ledger()
    worlds.evaluate(cells[:1], into="corrupted")
    assert worlds.ledger.forwards == pytest.approx(2 + (n - end) * (LAYERS - 2) / (n * LAYERS))
    worlds.evaluate(cells[-1:] * 3, into="corrupted")
    assert worlds.ledger.forwards == pytest.approx(4 + (n - end) * (LAYERS - 2) / (n * LAYERS))


def test_leaving_a_layer_comes_before_entering_the_next() -> None:
    """In whichever order the edits are given; and taken at either place alone the cost and the numbers are the same."""
    given = two("internvl")
    pixels = given["clean"]["pixel_values"]
    given["third"] = {**given["clean"], "pixel_values": pixels.roll(1, 0)}
    worlds = Worlds.of(model_of("internvl"), **given)
    rows = {"role": "video", "frame": 1}
    leaving = take(WAY, site="resid_post", layers=1, **rows)
    entering = take("third -> corrupted", layers=2, **rows)
    cells = [[leaving, entering], [entering, leaving], [entering], [leaving]]
    for executor in ("fast", "reference"):
        got = worlds.evaluate(cells, into="corrupted", executor=executor)
        assert away(got[0], got[1]) <= TOL and away(got[1], got[2]) <= TOL < away(got[2], got[3]), executor
    spent = []
    for edit in (leaving, take(WAY, layers=2, **rows)):
        worlds.ledger = Ledger()
        spent.append((worlds.evaluate([[edit]], into="corrupted"), worlds.ledger))
    assert away(spent[0][0], spent[1][0]) == 0.0 and spent[0][1] == spent[1][1]


def test_stored_runs_are_kept_inside_storing_and_nowhere_else() -> None:
    worlds, cell = (
        Worlds.of(model_of("internvl"), **two("internvl")),
        [take(WAY, layers=LAYERS - 1, role="last")],
    )
    plain = worlds.run()[:, -1]
    with worlds.storing():
        for _ in range(2):
            assert away(torch.stack(list(worlds.logits().values())), plain) <= TOL
            assert worlds.ledger == Ledger(2, 2), "asked again, nothing is run"
        inside = worlds.evaluate([cell], into="corrupted")
        assert 2 < worlds.ledger.forwards < 2.1 and worlds.ledger.naive == 3
    assert worlds.kept is None and away(worlds.evaluate([cell], into="corrupted"), inside) == 0.0
    assert worlds.ledger.forwards > 4
    assert away(torch.stack(list(worlds.logits("reference").values())), plain) == 0.0


# ---- other values ---------------------------------------------------------------------------------------------------


def test_noise_and_means_by_hand() -> None:
    model, worlds = model_of("internvl"), worlds_of("internvl")
    rows = worlds.tokens("corrupted").where(role="video")
    name = "blocks.2.hook_resid_pre"
    x = worlds.ready["corrupted"]
    with torch.no_grad():
        _, cache = model.run_with_cache(x, names_filter=name)
        value = cache[name]
        drawn = torch.randn(value[0, rows].shape, generator=torch.Generator().manual_seed(5))
        wanted = {
            "noise": value[0, rows] + 2 * value.std() * drawn,
            "mean": value[0, rows].mean(0).expand(len(rows), -1),
            "of": torch.ones(64).expand(len(rows), -1),
        }
        edits = {
            "noise": noise("corrupted", sd=2.0, seed=5, layers=2, role="video"),
            "mean": mean("corrupted", layers=2, role="video"),
            "of": mean("corrupted", of=torch.ones(64), layers=2, role="video"),
        }
        for how, new in wanted.items():
            put = lambda v, hook, new=new: v.index_copy(1, rows, new[None])  # noqa: E731
            by_hand = model.run_with_hooks(x, fwd_hooks=[(name, put)])
            assert away(worlds.run([edits[how]])[1], by_hand[0]) <= TOL < away(by_hand[0], worlds.run()[1])
    standing = Worlds.of(model, standing=[noise("corrupted", site="embed", role="video")], **two("internvl"))
    got = standing.run()
    assert away(got[0], worlds.run()[0]) == 0.0 < away(got[1], worlds.run()[1])
    again = standing.evaluate([[], [take(WAY, layers=0)]], into="corrupted")
    assert away(again[0], got[1, -1]) == 0.0 and away(again[1], got[0, -1]) <= TOL


def test_single_heads_and_patterns() -> None:
    """All heads one by one in one set are the whole site; a pattern row taken is the other world's."""
    worlds = worlds_of("llava_onevision")
    whole = worlds.run([take(WAY, site="z", layers=1)])
    assert away(worlds.run([take(WAY, site="z", layers=1, head=h) for h in range(4)]), whole) == 0.0
    assert away(worlds.run([take(WAY, site="z", layers=1, head=0)]), whole) > 1e-5
    both = [take(WAY, site="pattern", layers=1), take(WAY, site="v", layers=1)]
    assert away(worlds.run(both)[1], whole[1]) <= TOL, "pattern and values together make z"
    assert away(worlds.run(both[:1])[1], worlds.run()[1]) > 1e-6


# ---- other people's code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_nnsight_patches_to_the_same_numbers(name: str) -> None:
    model, worlds = model_of(name), worlds_of(name)
    rows = worlds.tokens("clean").where(role="video", frame=1)
    clean, corrupted = worlds.ready["clean"], worlds.ready["corrupted"]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter="blocks.2.hook_resid_pre")
        value = cache["blocks.2.hook_resid_pre"][:, rows]
        with tracing(model) as n, n.trace(corrupted):
            stream = n.blocks[2].hook_resid_pre.output.clone()
            stream[:, rows] = value
            n.blocks[2].hook_resid_pre.output = stream
            theirs = n.output.save()
    ours = worlds.evaluate([[take(WAY, layers=2, role="video", frame=1)]], into="corrupted")
    assert away(ours[0], theirs[0, -1]) <= TOL < 1e-3 < away(theirs[0, -1], worlds.run()[1, -1])


def test_the_bridge_patches_to_the_same_numbers() -> None:
    worlds = worlds_of("llava_onevision")
    rows = worlds.tokens("clean").where(role="video", frame=1)
    made = bridge(model_of("llava_onevision"))
    asked = {w: dict(worlds.ready[w].inputs) for w in worlds.names}
    ids = {w: x.pop("input_ids") for w, x in asked.items()}
    name = "blocks.2.attn.hook_z"
    with torch.no_grad():
        _, cache = made.run_with_cache(
            ids["clean"], names_filter=lambda n: n == name, output_attentions=False, **asked["clean"]
        )

        def put(value: torch.Tensor, hook: Any) -> torch.Tensor:
            value = value.clone()
            value[:, rows, 1] = cache[name][:, rows, 1]
            return value

        theirs = made.run_with_hooks(
            ids["corrupted"], fwd_hooks=[(name, put)], output_attentions=False, **asked["corrupted"]
        )
    ours = worlds.evaluate([[take(WAY, site="z", layers=2, role="video", frame=1, head=1)]], into="corrupted")
    assert away(ours[0], theirs[0, -1]) <= TOL and away(theirs[0, -1], worlds.run()[1, -1]) > 1e-4


# ---- paths ----------------------------------------------------------------------------------------------------------


def three(name: str) -> Worlds:
    given = two(name)
    return Worlds.of(model_of(name), **given, shadow=given["corrupted"])


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_a_token_path_is_one_edge_set_by_hand(name: str) -> None:
    """1 a run whose sender keys and values are the other world's, for its z  2 that z at the receiver rows alone."""
    worlds, layer = three(name), 2
    got = worlds.run(token_path(WAY, "frame:1", "text+last", layers=[layer]))
    first = [take(WAY, site=s, layers=layer, role="frame:1") for s in ("rot_k", "v")]
    order = Worlds.of(model_of(name), **{k: worlds.ready[k].inputs for k in ("clean", "corrupted")})
    held: Any = {}
    with torch.no_grad():
        z = f"blocks.{layer}.attn.hook_z"
        order.forward(["clean", "corrupted"], first, held, "last", {z: ["corrupted"]})
        rows = worlds.tokens("clean").where(role=["text", "last"])
        new = held[(z, "corrupted")].own[rows]
        put = lambda v, hook: v.index_copy(1, rows, new[None])  # noqa: E731
        by_hand = model_of(name).run_with_hooks(order.ready["corrupted"], fwd_hooks=[(z, put)])
    assert away(got[1], by_hand[0]) <= TOL < away(by_hand[0], order.run()[1])
    none = worlds.run(token_path("clean -> corrupted", "before-video", "last", layers=[layer]))
    assert away(none, worlds.run()) <= TOL, "text before the video is alike in both worlds"


def test_a_head_path_leaves_everything_else_alone() -> None:
    worlds, name = three("llava_onevision"), "llava_onevision"
    last = LAYERS - 1
    direct = worlds.run(head_path(WAY, (last, 1), None, n_layers=LAYERS))
    assert away(direct[1], worlds.run([take(WAY, site="z", layers=last, head=1)])[1]) == 0.0
    frozen = worlds.run(head_path(WAY, (1, 0), None, n_layers=LAYERS, freeze_mlps=True))
    whole = worlds.run([take(WAY, site="z", layers=1, head=0)])
    assert away(frozen[1], worlds.run()[1]) > 0 and away(frozen[1], whole[1]) > 1e-5
    with torch.no_grad():  # by hand: the head's change of the stream, carried to the end
        model, z = model_of(name), "blocks.1.attn.hook_z"
        z_of = {
            w: model.run_with_cache(worlds.ready[w], names_filter=z)[1][z][0, :, 0]
            for w in ("clean", "corrupted")
        }
        delta = (z_of["clean"] - z_of["corrupted"]) @ model.blocks[1].attn.W_O[0]
        add = lambda v, hook: v + delta[None]  # noqa: E731
        by_hand = model.run_with_hooks(
            worlds.ready["corrupted"], fwd_hooks=[(f"blocks.{last}.hook_resid_post", add)]
        )
    assert away(frozen[1], by_hand[0]) <= TOL
    queries = worlds.run(head_path(WAY, (1, 0), (3, "q", 2), n_layers=LAYERS))
    assert 0 < away(queries[1], worlds.run()[1]) < away(whole[1], worlds.run()[1])
    with pytest.raises(UsageError, match="later layer"):
        head_path(WAY, (3, 0), (3, "q", 2), n_layers=LAYERS)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_small_steps_are_estimated_right(name: str) -> None:
    """Between worlds that hardly differ the first order is all there is; DeepStack's additions come along."""
    worlds = Worlds.of(model_of(name), **two(name, small=2e-3))
    logits = worlds.run()[:, -1]
    score = Score.between(logits[0], logits[1], "logit_diff", (30, 40), None)
    rows = worlds.tokens("clean").where(role="video", frame=1)
    for site in ("resid_pre", "v", "mlp_out"):
        found = attribution_patch(worlds, "clean", "corrupted", score, site=site)
        cells = [[take(WAY, site=site, layers=i, positions=rows)] for i in range(LAYERS)]
        exact = score(worlds.evaluate(cells, into="corrupted")) - score.start
        est = torch.stack([found[i][rows].sum() for i in range(LAYERS)])
        assert away(est, exact) <= 0.1 * float(exact.abs().max()) + 2e-6, (site, est, exact)
        assert float(exact.abs().max()) > 2e-5
    assert not model_of(name).hf.training and all(p.grad is None for p in model_of(name).hf.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_on_the_way_a_layers_rows_sum_to_the_whole_difference(name: str) -> None:
    """Completeness of integrated gradients, at every layer's stream; DeepStack's additions move along."""
    worlds = Worlds.of(model_of(name), **two(name))
    logits = worlds.run()[:, -1]
    score = Score.between(logits[0], logits[1], "logit_diff", (30, 40), None)
    whole = score.end - score.start
    assert abs(whole) > 1e-3
    for site in ("resid_pre", "resid_post"):
        found = attribution_patch(
            worlds, "clean", "corrupted", score, site=site, steps=16, path="activations"
        )
        sums = torch.stack([found[i].sum() for i in range(LAYERS)])
        assert away(sums, torch.full_like(sums, whole)) <= 0.02 * abs(whole), (site, sums, whole)
    door = attribution_patch(worlds, "clean", "corrupted", score, site="embed", steps=16)
    assert abs(float(door[0].sum()) - whole) <= 0.02 * abs(whole)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_worlds_that_do_not_correspond_are_refused_with_the_reason() -> None:
    model = model_of("llava_onevision")
    x, longer = inputs("llava_onevision"), inputs("llava_onevision", frames=4)
    with pytest.raises(
        UsageError, match=r"'clean' has 38 positions and 'corrupted' has 47 \(frame: 27 against 36\)"
    ):
        Worlds.of(model, clean=x, corrupted=longer)
    other = model.prepare_inputs(roles={"question": (33, 35)}, **x)
    with pytest.raises(UsageError, match="position 33 is text in one and question in the other"):
        Worlds.of(model, clean=x, corrupted=other)
    with pytest.raises(UsageError, match="at least two worlds, got 1"):
        Worlds.of(model, clean=x)
    with pytest.raises(UsageError, match="one prompt, got 2"):
        Worlds.of(model, clean=inputs("llava_onevision", worlds=2), corrupted=x)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: take("clean"), "from one world to another"),
        (lambda: take("a -> a"), "from one world to another"),
        (lambda: take(WAY, site="resid"), "no site 'resid'; closest: resid_"),
        (lambda: take(WAY, layers="0-2"), "need 1 <= first"),
        (lambda: take(WAY, layers=[]), "layers must be"),
        (lambda: take(WAY, frame="x"), "frame must be a whole number"),
        (lambda: take(WAY, head=-1), "head counts from 0"),
        (lambda: noise("corrupted", sd=0), "sd above 0"),
        (lambda: noise("corrupted", sd=float("nan")), "sd above 0"),
        (lambda: mean("corrupted", site="pattern"), "would not be attention"),
        (lambda: take("clean -> twin"), "no world 'twin'; there are clean, corrupted"),
        (lambda: take(WAY, layers=9), r"no layer 10 \(blocks\.9\): the model has layers 1\.\.5"),
        (lambda: take(WAY, role="frames"), "no role 'frames'"),
        (lambda: take(WAY, role="option"), "has no token of 'option'"),
        (lambda: take(WAY, role="video", frame=7), r"lies in frame \[7\]"),
        (lambda: take(WAY, positions=[99]), "positions 0..37"),
        (lambda: take(WAY, site="resid_pre", head=0), "has no heads"),
        (lambda: take(WAY, site="v", head=2), r"heads 0\.\.1"),
        (lambda: take(WAY, site="embed", layers=1), "lies before all layers"),
        (lambda: mean("corrupted", of=torch.ones(3)), "the mean given has shape"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make: Any, said: str) -> None:
    worlds = worlds_of("llava_onevision")
    for run in (worlds.run, lambda edits: worlds.evaluate([edits], into="corrupted")):
        with pytest.raises(UsageError, match=said):
            run([make()])
    assert not any(p._forward_hooks for p in model_of("llava_onevision").hook_dict.values())


def test_evaluate_refuses_other_worlds_and_nothing() -> None:
    worlds = worlds_of("llava_onevision")
    with pytest.raises(UsageError, match="an edit goes into 'clean'"):
        worlds.evaluate([[take("corrupted -> clean")]], into="corrupted")
    with pytest.raises(UsageError, match="no sets of edits"):
        worlds.evaluate([], into="corrupted")
    with pytest.raises(UsageError, match="use 'fast' or 'reference'"):
        worlds.evaluate([[]], into="corrupted", executor="slow")
    got = worlds.evaluate([[take(WAY, site="pattern", layers=1)]], into="corrupted")
    assert worlds.reason == "scores and patterns are edited" and got.shape == (1, 256)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl"])
def test_a_whole_grid_in_double_precision(name: str) -> None:
    """Layers x frames from stored runs against one whole forward a cell."""
    model = wrap(build(name).double())
    model.hf.requires_grad_(False)
    given = {
        w: {k: v.double() if v.is_floating_point() else v for k, v in x.items()} for w, x in two(name).items()
    }
    worlds = Worlds.of(model, **given)
    frames = range(worlds.tokens("clean").n_frames)
    for site in ("resid_pre", "resid_post"):
        cells = [
            [take(WAY, site=site, layers=i, role="video", frame=f)] for i in range(LAYERS) for f in frames
        ]
        fast, slow = (worlds.evaluate(cells, into="corrupted", executor=e) for e in ("fast", "reference"))
        assert worlds.reason == "" and fast.dtype == torch.float64
        assert away(fast, slow) <= 1e-12 < 1e-3 < away(slow, worlds.run()[1])
