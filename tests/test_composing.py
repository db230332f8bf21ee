"""Pairs of mechanisms by value: each pair equals a run that does the same in another way (hidden keys, copied rows, codes
put in by hand), not only "runs". The oracle never uses the second mechanism's own code path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lab.edges.policy import Policy
from lab.edges.sweeping import sweep
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.mechanisms.mixture_of_depths import MixtureOfDepths
from lab.mechanisms.segment_merging import SegmentMerging
from lab.mechanisms.streaming import Session, Streaming
from lab.mechanisms.thumbnail_and_sampling import ThumbnailAndSampling
from lab.mechanisms.vidkv import Keys, QuantisedCache, Values, VidKV
from lab.model.answering import target_logits
from lab.model.cache import KVCache
from lab.slots import Plan
from tests import shelf_models

LAYERS = 4
MOD = MixtureOfDepths(keep=0.3, gate="none", seed=3)
DROP = DifferentialTokenDrop(ratio=0.4)
MERGE = SegmentMerging(n_segments=2, keep=6, n_global=2)
CODES = VidKV(group=8, residual=16, compat="corrected")  # the prompt itself is read exactly
QUIET = Streaming(decide="never", system="be brief", max_new_tokens=4)
LAST_BLIND = {"layers": "2-3", "q": "last", "k": "frame"}


@pytest.fixture(scope="module")
def small() -> Any:
    return shelf_models.model(layers=LAYERS)


@pytest.fixture(scope="module")
def ready(small: Any) -> Any:
    return small.prepare(shelf_models.question())


class Given:
    """A mechanism whose plan is given."""

    def __init__(self, **slots: Any) -> None:
        self.slots = slots

    def plan(self, cfg: Any) -> Plan:
        return Plan(**self.slots)


def words() -> Tensor:
    return torch.tensor([[60, 61, 62, 63, 64]])


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def gone(n: int, kept: Tensor) -> Tensor:
    """The positions of 0..n-1 that are not among those kept."""
    return torch.tensor(sorted(set(range(n)) - set(kept.tolist())))


def hiding(hidden: Tensor) -> Any:
    """Edges without the keys that are hidden; a hidden row keeps itself, so that no row is empty."""
    return lambda q, k: ~torch.isin(k, hidden)[None] | (q[:, None] == k[None])


def both(one: Any, other: Any) -> Any:
    return lambda q, k: one(q, k) & other(q, k)


def skipping(keep: Tensor, layers: Sequence[int], order: Tensor, n: int) -> tuple[list[Any], dict[int, Any]]:
    """Hooks and edges that do by hand, over all n rows, what routing did over the rows `order`: keep [layer, row]."""
    hooks: list[Any] = []
    edges: dict[int, Any] = {}
    for i, layer in enumerate(layers):
        through = torch.zeros(n, dtype=torch.bool)
        through[order] = keep[i]
        held: list[Tensor] = []
        hooks.append((f"blocks.{layer}.hook_resid_pre", lambda v, hook, h=held: h.append(v)))
        hooks.append(
            (f"blocks.{layer}.hook_resid_post", lambda v, hook, t=through, h=held: torch.where(t[None, :, None], v, h[-1]))
        )  # fmt: skip
        edges[layer] = hiding((~through).nonzero().squeeze(1))
    return hooks, edges


# ---- a drop, then routing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["drop first", "routing first"])
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "internvl"])
def test_routing_after_a_drop_is_hidden_keys_and_copied_rows(
    name: str, order: str, wrapped_text: Any
) -> None:
    model = wrapped_text(name)
    ready = model.prepare(shelf_models.question(6), n_frames=6)
    mechanisms = [DROP, MOD] if order == "drop first" else [MOD, DROP]
    points = [f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)]
    with torch.no_grad():
        out = model.run(ready, mechanisms=mechanisms)
        _, mine = model.run_with_cache(ready, names_filter=points, mechanisms=mechanisms)
    kept, layers = out.maps[0].order, out.heads["mod.layers"].tolist()
    n, keep = ready.n_pos, out.heads["mod.keep"][:, 0]
    assert len(gone(n, kept)) > 4 and int((~keep).sum()) > 4
    hooks, edges = skipping(keep, layers, kept, n)
    dropped = hiding(gone(n, kept))
    edges = {i: both(dropped, edges[i]) if i in edges else dropped for i in range(model.cfg.n_layers)}
    seen: dict[str, Tensor] = {}
    looks = [(p, lambda v, hook, p=p: seen.__setitem__(p, v.clone())) for p in points]
    with torch.no_grad():
        logits = model.run_with_hooks(ready, fwd_hooks=[*hooks, *looks], edges=edges)
    for p in points:
        assert close(mine[p], seen[p][:, kept]), p
    assert close(out.logits, logits)
    budget = [MOD.rows(out.maps[0], model.cfg.n_layers)[i] for i in layers]
    assert keep.sum(1).tolist() == budget  # of what is left of every frame


# ---- with knock-outs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", [DROP, MERGE], ids=["drop", "merging"])
def test_a_cut_after_a_stage_is_the_cut_of_its_own_rows(mechanism: Any, small: Any, ready: Any) -> None:
    """By the policy, and by positions that are looked up by hand in the map the decoder reads."""
    policy = Policy.from_dict({"format": "edge-policy/1", "cuts": [LAST_BLIND]})
    tokens = small.maps(ready, mechanisms=[mechanism])[0]
    video, last = (tokens.where(role=r) for r in ("frame", "last"))
    cut = lambda q, k: ~(torch.isin(q, last)[:, None] & torch.isin(k, video)[None])  # noqa: E731
    with torch.no_grad():
        by_policy = small(ready, mechanisms=[mechanism], policy=policy, read="all")
        by_hand = small(ready, mechanisms=[mechanism], edges={1: cut, 2: cut}, read="all")
        free = small(ready, mechanisms=[mechanism], read="all")
    assert torch.equal(by_policy, by_hand)
    assert torch.equal(by_policy[:, :-1], free[:, :-1]) and not close(by_policy[:, -1], free[:, -1])


def test_a_knock_out_after_a_drop_is_that_of_the_whole_prompt_with_the_dropped_keys_hidden(
    small: Any, ready: Any
) -> None:
    policy = Policy.from_dict({"format": "edge-policy/1", "cuts": [LAST_BLIND]})
    with torch.no_grad():
        mine = small(ready, mechanisms=[DROP], policy=policy)
        kept = small.maps(ready, mechanisms=[DROP])[0].order
        hidden = dict.fromkeys(range(LAYERS), hiding(gone(ready.n_pos, kept)))
        twin = small(ready, policy=policy, edges=hidden)
        assert close(mine, twin) and not close(mine, small(ready, edges=hidden))


@pytest.mark.parametrize(
    "mechanisms", [[DROP], [MERGE], [MOD], [DROP, MOD], [QUIET], [ThumbnailAndSampling(4, 40)]], ids=str
)
def test_every_point_of_a_sweep_is_one_run_with_that_cut(mechanisms: list[Any], small: Any) -> None:
    prepared = small.prepare(shelf_models.question(), mechanisms=mechanisms)
    swept = sweep(small, prepared, ["video->last"], window=1, show_progress=False)
    tokens = small.maps(prepared)[0]
    video, last = (tokens.where(role=r) for r in ("frame", "last"))
    cut = lambda q, k: ~(torch.isin(q, last)[:, None] & torch.isin(k, video)[None])  # noqa: E731
    with torch.no_grad():
        clean = small(prepared)[0, -1].softmax(-1)
        token = int(clean.argmax())
        for layer in range(LAYERS):
            hit = small(prepared, edges={layer: cut})[0, -1].softmax(-1)
            want = float((hit[token] - clean[token]) / clean[token] * 100)
            assert swept.values[0, 0, layer] == pytest.approx(want, abs=2e-3)
    assert abs(swept.values).max() > 1e-2


# ---- a drop and a thumbnail -----------------------------------------------------------------------------------------


def test_a_drop_before_a_thumbnail_is_its_own_drop_and_the_thumbnail_whole(small: Any, ready: Any) -> None:
    thumbnail = ThumbnailAndSampling(4, None, positions="preserve")
    with torch.no_grad():
        alone = small.maps(ready, mechanisms=[DROP])[0]
        pair = small.run(ready, mechanisms=[thumbnail, DROP], read="all")
        whole = small.run(ready, mechanisms=[thumbnail], read="all")
    tokens, n = pair.maps[0], len(whole.maps[0])
    sources = [t.source[t.where(role="frame")] for t in (tokens, alone)]
    of_video = sources[0][sources[0] < 128]
    assert torch.equal(of_video, sources[1]) and len(sources[0]) - len(of_video) == 16
    kept = tokens.source[tokens.where(kind="video")]
    rows = whole.maps[0].where(kind="video")
    left = torch.isin(whole.maps[0].source[rows], kept)
    order = torch.cat([rows[left], gone(n, rows)]).sort().values
    hidden = dict.fromkeys(range(LAYERS), hiding(gone(n, order)))
    with torch.no_grad():  # the thumbnail's own run, without the keys that were dropped
        twin = small(ready, mechanisms=[thumbnail], edges=hidden, read="all")
    assert len(order) == len(tokens) < n - 30 and close(pair.logits, twin[:, order])


def test_a_thumbnail_before_a_drop_is_sampled_from_all_and_idle(small: Any, ready: Any) -> None:
    """Sampled tokens of neighbouring frames stand in other cells, so the drop has nothing to compare: it is only idle."""
    sampled = ThumbnailAndSampling(4, 16)
    with torch.no_grad():
        one, two = (small.run(ready, mechanisms=m, read="all") for m in ([sampled], [sampled, DROP]))
    cells = one.maps[0].row * 4 + one.maps[0].col
    frames = one.maps[0].where(role="frame")[:16]
    later = [int(c) for f, c in zip(one.maps[0].frame[frames], cells[frames], strict=True) if int(f) > 0]
    assert len(later) > 8
    assert torch.equal(one.logits, two.logits)


# ---- quantised caches -------------------------------------------------------------------------------------------------


def coded(k: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first n rows as codes and back, the rest as they are; n in whole groups."""
    what = CODES.settled()
    keys = Keys.of(k[:, :, :n], what).values(k.shape[1], k.shape[3])
    values = Values.of(v[:, :, :n], None, what).values()
    return torch.cat([keys, k[:, :, n:]], 2), torch.cat([values, v[:, :, n:]], 2)


class AfterPrompt:
    """A plain cache whose prompt rows are replaced by their codes, layer by layer, once the prompt has been read."""

    def __init__(self) -> None:
        self.inner, self.n = KVCache(), dict[int, int]()

    def update(self, layer: int, k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if layer not in self.n:
            self.n[layer] = k.shape[2]
            keys, values = coded(k, v, k.shape[2] - k.shape[2] % CODES.group)
            self.inner.update(layer, keys, values, order)
            return k, v, order
        return self.inner.update(layer, k, v, order)


@pytest.mark.parametrize(
    "other",
    [MOD, DROP, MERGE, ThumbnailAndSampling(4, 40), Streaming(layout="stream")],
    ids=lambda m: type(m).__name__,
)
def test_codes_beside_another_are_the_codes_of_its_own_rows(other: Any, small: Any, ready: Any) -> None:
    """Keys and values of a run with the other mechanism alone, put into codes by hand, and read by the next tokens."""
    with torch.no_grad():
        alone = target_logits(small, ready, words(), mechanisms=[other])
        by_hand = target_logits(small, ready, words(), mechanisms=[other, Given(cache=AfterPrompt)])
        for pair in ([other, CODES], [CODES, other]):
            mine = target_logits(small, ready, words(), mechanisms=pair)
            assert torch.equal(mine[:, 0], alone[:, 0])  # the prompt is read exactly
            assert close(mine, by_hand) and not torch.allclose(mine[:, 1:], alone[:, 1:], atol=1e-3)
        exact = replace(CODES, key_bits=16, value_bits=16)
        assert close(target_logits(small, ready, words(), mechanisms=[other, exact]), alone)


def test_codes_of_routed_layers_take_the_bytes_of_their_own_rows(small: Any, ready: Any) -> None:
    heads = small.run(ready, mechanisms=[MOD, CODES]).heads
    rows = MOD.rows(ready.tokens, LAYERS)
    assert heads["vidkv.rows"].tolist() == [[n - n % 8, n % 8] for n in rows] and len(set(rows)) == 2
    plain = small.run(ready, mechanisms=[CODES]).heads["vidkv.bytes"]
    assert torch.equal(heads["vidkv.bytes"][::2], plain[::2]) and bool(
        (heads["vidkv.bytes"] < plain)[1::2].all()
    )


# ---- merging, and what reads it ---------------------------------------------------------------------------------------


def test_merged_rows_in_the_cache_of_activations_and_under_the_lens(small: Any, ready: Any) -> None:
    """At the door a merged row is the mean of its members' rows; the lens reads every layer's own last row."""
    from probes.lens import lens

    with torch.no_grad():
        logits, cache = small.run_with_cache(ready, mechanisms=[MERGE])
        _, plain = small.run_with_cache(ready, names_filter="blocks.0.hook_resid_pre")
    tokens = small.maps(ready, mechanisms=[MERGE])[0]
    rows, had = tokens.where(role="frame"), ready.tokens.where(kind="video")
    means = tokens.parts[rows] @ plain["blocks.0.hook_resid_pre"][0, had]
    assert close(cache["blocks.0.hook_resid_pre"][0, rows], means)
    found = lens(small, shelf_models.question(), ("last", "video"), mechanisms=[MERGE], show_progress=False)
    token, every = int(logits[0, -1].argmax()), tokens.where(role="video")
    with torch.no_grad():
        for layer in range(LAYERS):
            p = small.unembed(small.ln_final(cache[f"blocks.{layer}.hook_resid_post"]))[0].softmax(-1)[
                :, token
            ]
            want = [float(p[-1]), float(p[every].mean())]
            assert found.values[0, 0, layer].tolist() == pytest.approx(want, rel=1e-4)
    assert found.values[0, 0, -1, 0] == pytest.approx(float(logits[0, -1].softmax(-1)[token]), rel=1e-5)


# ---- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanisms", [[MOD], [replace(MOD, gate="tanh1", selector="norm")], [replace(DROP, scope="frame"), MOD]], ids=["routing", "by norm", "drop and routing"])  # fmt: skip
def test_a_session_reads_what_one_prompt_over_the_whole_stream_reads(
    mechanisms: list[Any], small: Any
) -> None:
    """Frame by frame with ragged caches; and the whole video laid out as that stream, tokenised as one text."""
    item = shelf_models.question(6)
    session = Session(small, QUIET, mechanisms=mechanisms)
    session.run(shelf_models.clip(6))
    session.ask(item)
    reply = session.flush()[0]
    with torch.no_grad():
        out = small.run(small.prepare(item, n_frames=6), mechanisms=[QUIET, *mechanisms])
        without = small.run(small.prepare(item, n_frames=6), mechanisms=[QUIET])
    assert close(out.logits[0, -1], reply.first) and not close(without.logits[0, -1], reply.first)
    ends = torch.cat([mo.heads["frame_end"] for mo in session.log], 1)
    assert close(out.heads["frame_end"], ends)
    rows = session.rows
    assert rows[1] < rows[0] == rows[2]


class PerPiece:
    """What a stream reads with codes: own rows exact, everything before as its codes. Written with two plain lists."""

    def __init__(self) -> None:
        self.k: dict[int, list[Tensor]] = {}
        self.v: dict[int, list[Tensor]] = {}
        self.waiting: dict[int, int] = {}
        self.order: dict[int, Tensor] = {}

    def update(self, layer: int, k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first = layer not in self.k
        for held, new in ((self.k, k), (self.v, v)):
            held.setdefault(layer, []).append(new)
        self.order[layer] = order if first else torch.cat([self.order[layer], order])
        read = torch.cat(self.k[layer], 2), torch.cat(self.v[layer], 2), self.order[layer]
        self._code(layer, first)
        return read

    def _code(self, layer: int, first: bool) -> None:
        """Whole groups of the rows that wait: at once after the first piece, later when 16 wait."""
        k, v = (torch.cat(held[layer], 2) for held in (self.k, self.v))
        done = self.waiting.get(layer, 0)  # rows that are codes
        n = k.shape[2] - done
        due = n - n % CODES.group if first or n >= CODES.residual else 0
        keys, values = (
            coded(k[:, :, done : done + due], v[:, :, done : done + due], due)
            if due
            else (k[:, :, :0], v[:, :, :0])
        )
        self.k[layer] = [k[:, :, :done], keys, k[:, :, done + due :]]
        self.v[layer] = [v[:, :, :done], values, v[:, :, done + due :]]
        self.waiting[layer] = done + due


def test_a_stream_with_codes_reads_earlier_frames_as_their_codes(small: Any) -> None:
    def watched(mechanisms: list[Any]) -> tuple[list[Any], Any]:
        session = Session(small, QUIET, mechanisms=mechanisms)
        log = session.run(shelf_models.clip(6))
        return [mo.p_silent for mo in log], session

    (mine, session), (by_hand, _), (plain, _) = (
        watched([CODES]),
        watched([Given(cache=PerPiece)]),
        watched([]),
    )
    assert mine == pytest.approx(by_hand, rel=1e-5) and mine[0] == pytest.approx(plain[0], rel=1e-6)
    assert max(abs(a - b) / b for a, b in zip(mine[1:], plain[1:], strict=True)) > 1e-3
    store: QuantisedCache = session.context.cache.store
    assert store.nbytes() == sum(map(store.predicted, range(LAYERS)))
    exact, _ = watched([replace(CODES, key_bits=16, value_bits=16)])
    assert exact == pytest.approx(plain, rel=1e-6)


def test_replies_that_are_forgotten_leave_no_trace_in_codes(small: Any) -> None:
    """More tokens than wait are said and taken back: the blocks they made are gone too."""
    loud = Session(small, Streaming(theta=2.0, forget_replies=True, max_new_tokens=20), mechanisms=[CODES])
    quiet = Session(small, Streaming(decide="never"), mechanisms=[CODES])
    for session in (loud, quiet):
        session.run(shelf_models.clip(4))
    assert max(len(r.ids) for r in loud.replies) >= 16
    for layer in range(LAYERS):
        held = [s.context.cache.store.layers[layer].read() for s in (loud, quiet)]
        assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))
    assert [mo.p_silent for mo in loud.log] == [mo.p_silent for mo in quiet.log]


def test_sessions_side_by_side_and_again_after_reset(small: Any) -> None:
    """Two streams on one model, frame by frame in turn, are two streams alone; and a session that was reset is a new one."""
    mechanisms = [replace(DROP, scope="frame", reference="kept"), MOD, CODES]
    clips = [shelf_models.clip(5, seed=s) for s in (0, 7)]

    def alone(clip: Any) -> list[Any]:
        return [mo.p_silent for mo in Session(small, QUIET, mechanisms=mechanisms).run(clip)]

    want = [alone(c) for c in clips]
    assert want[0] != want[1]
    turn = [Session(small, QUIET, mechanisms=mechanisms) for _ in clips]
    for frame in range(5):
        for session, clip in zip(turn, clips, strict=True):
            session.see(clip.pixels[frame].permute(1, 2, 0), float(clip.seconds[frame]))
    assert [[mo.p_silent for mo in s.log] for s in turn] == want
    turn[0].reset()
    assert [mo.p_silent for mo in turn[0].run(clips[1])] == want[1]
