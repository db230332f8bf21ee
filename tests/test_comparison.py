"""lab.compare: nothing where nothing changes, planted truths where something does, budgets of controls, journal, files."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from lab.cli.main import main
from lab.comparison import Report, compare
from lab.comparison.alike import cka
from lab.comparison.costing import costs, rows_of
from lab.comparison.flow import centre, pairs
from lab.comparison.page import parts_of
from lab.comparison.shifts import moved, number, shift, written
from lab.comparison.traces import shared, trace
from lab.comparison.variants import Variant, named_mechanisms, variants_of
from lab.edges.mass import segment_mass
from lab.errors import ConfigError, UsageError
from lab.mechanisms import load as on_shelf
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.mechanisms.mixture_of_depths import MixtureOfDepths
from lab.mechanisms.segment_merging import SegmentMerging
from lab.mechanisms.thumbnail_and_sampling import ThumbnailAndSampling
from lab.mechanisms.vidkv import VidKV
from lab.result import Result
from lab.runs import Cancel, Cancelled
from lab.sim import planted
from lab.slots import Plan
from tests import shelf_models

DROPS = DifferentialTokenDrop(ratio=0.7)
MERGES = SegmentMerging(n_segments=2, keep=8, n_global=0)


@pytest.fixture(scope="module")
def small():
    return shelf_models.model(layers=4)


def asked(small, mechanisms, **kw):
    settings = {"rounds": 0, "controls": False, "pathways": (), "new_tokens": 2, "show_progress": False} | kw
    return compare(small, mechanisms, [shelf_models.question()], **settings)


@pytest.fixture(scope="module")
def report(small):
    """Vanilla twice, a routing, a drop, a merging."""
    return asked(
        small, {"again": [], "mod": MixtureOfDepths(), "drop": DROPS, "merge": MERGES}, pathways=("cross-frame", "video->last")
    )  # fmt: skip


# ---- nothing changes ------------------------------------------------------------------------------------------------


def test_vanilla_beside_itself_is_the_same(report):
    for name in ("cosine", "cka"):
        values = report[name].select(variant="again").values
        assert np.nanmax(np.abs(values - 1)) < 1e-12 and np.isfinite(values[0, 0]).all()
    assert report["kl"].select(variant="again").values.max() == 0
    for name in ("flips", "text_flips"):
        assert report[name].select(variant=["vanilla", "again"]).values.max() == 0
    for name in ("mass", "knockout", "centre", "ran", "tokens", "p_right", "depth", "left"):
        one, two = (report[name].select(variant=v).values for v in ("vanilla", "again"))
        assert np.array_equal(one, two, equal_nan=True), name
    assert float(report["kl"].select(variant="mod").values.max()) > 0  # the same numbers can differ from 0


def test_a_neutral_mechanism_changes_nothing(small):
    found = asked(small, {n: on_shelf(n).NEUTRAL for n in ("mixture_of_depths", "segment_merging", "vidkv")})
    assert float(found["kl"].values.max()) < 1e-9 and np.nanmin(found["cosine"].values) > 1 - 1e-6


# ---- planted truths -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turned:
    """Turns the video rows that leave a layer by an angle, in the plane of the row and a fixed direction across it."""

    layer: int
    cosine: float

    def plan(self, cfg):
        return Plan(detours=(self,))

    def __call__(self, layer, step, resid, side):
        resid, side = step(resid, side)
        if layer != self.layer or not side.tokens:
            return resid, side
        rows = side.tokens[0].where(role="video")
        x = resid[:, rows]
        across = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        across = across - (across * x).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True) * x
        across = across * x.norm(dim=-1, keepdim=True) / across.norm(dim=-1, keepdim=True)
        turned = self.cosine * x + (1 - self.cosine**2) ** 0.5 * across
        return resid.index_copy(1, rows, turned), side


def test_a_turned_stream_shows_its_cosine_in_its_layer_and_group(small):
    mean = asked(small, {"turned": Turned(2, 0.6)})["cosine"].mean("item").select(variant="turned")
    video, text = (mean.select(group=g).values for g in ("video", "question"))
    assert video[:2] == pytest.approx(1, abs=1e-6) and video[2] == pytest.approx(0.6, abs=1e-5)
    assert text[:3] == pytest.approx(1, abs=1e-6) and text[3] < 1 - 1e-6


def test_a_planted_circuit_is_cut_where_it_needs_the_video():
    """plain: the options read the video in layer 2 alone. Skipping later layers is nothing; from layer 2 on it is all."""
    model, items = planted.planted_model("plain"), planted.questions(6, seed=1)
    late, soon = MixtureOfDepths.early_exit(2), MixtureOfDepths.early_exit(1)
    found = compare(
        model, {"late": late, "soon": soon}, items, window=1, pathways=("video->option",), rounds=0, controls=False,
        new_tokens=1, show_progress=False,
    )  # fmt: skip
    curve = found["knockout"].mean("item")
    before, after, gone = (
        curve.select(variant=v, pathway="video->option").values for v in ("vanilla", "late", "soon")
    )
    assert int(np.abs(before).argmax()) == 1 and np.abs(np.delete(before, 1)).max() < 1e-3 < abs(before[1])
    assert after == pytest.approx(before, abs=1e-3) and np.nanmax(np.abs(np.nan_to_num(gone))) < 1e-3
    at = found["centre"].select(pathway="video->option").values
    assert at[:, :2] == pytest.approx(2, abs=1e-3)
    right = dict(zip(found.variants, found["accuracy"].values.tolist(), strict=True))
    assert right["vanilla"] == right["late"] == 1.0 > right["soon"]
    assert found["flips"].select(variant="late").values.sum() == 0
    depth = found["depth"].values
    assert [set(d.ravel().tolist()) for d in depth] == [{4.0}, {2.0}, {1.0}]
    assert found["ran"].mean("item").select(variant="soon").values.tolist() == [1.0, 0.0, 0.0, 0.0]
    said = found.words()
    assert any(w.startswith("late: 100 % right") and "0 answers changed" in w for w in said)


def test_what_is_dropped_is_what_the_mechanism_drops(small, report):
    ready = small.prepare(shelf_models.question(), mechanisms=[DROPS])
    tokens, grid = small.maps(ready)[0], ready.grids[0]
    kept = np.zeros(len(grid))
    kept[tokens.source[tokens.where(role="frame")]] = 1
    kept = kept[grid.frame.numpy() >= 0]  # without the newline token at the end
    painted = report["left"].select(variant="drop").values
    assert np.array_equal(painted.ravel(), kept) and 0 < kept.sum() < len(kept)
    assert np.array_equal(report["depth"].select(variant="drop").values.ravel(), 4 * kept)
    assert report["tokens"].select(variant="drop").values.tolist() == [kept.sum()]


def test_merged_tokens_stand_for_the_mean_of_theirs(small):
    """Before the first layer attends, a merged token's place in vanilla is the mean of its members' rows."""
    base, mine = (trace(small, small.prepare(shelf_models.question(), mechanisms=m)) for m in ([], [MERGES]))
    found = shared(base, mine)
    parts = mine.tokens.parts[found.here]
    video = mine.tokens.role[found.here] == mine.tokens.role[mine.tokens.where(role="video")[0]]
    first = base.tokens.where(role="video")[0]
    assert torch.allclose(found.share[video][:, first : first + parts.shape[1]], parts[video].float())
    x = torch.randn(len(base.tokens), 5)
    assert torch.allclose(found.of(x), found.share @ x, atol=1e-6)
    assert len(found.here) == len(
        mine.tokens
    )  # text too: every token of the shorter prompt stands for something


def test_a_thumbnail_stands_for_nothing(small):
    mechanism = ThumbnailAndSampling(n_thumbnail=4, n_samples=16)
    base, mine = (
        trace(small, small.prepare(shelf_models.question(), mechanisms=m)) for m in ([], [mechanism])
    )
    found = shared(base, mine)
    video = mine.tokens.where(role="video")
    here = [p for p in video.tolist() if p in found.here.tolist()]
    assert len(here) == 16 and len(video) == 32
    of = dict(zip(found.here.tolist(), found.share.argmax(1).tolist(), strict=True))
    for p in here:
        same = [(int(t.tokens.row[i]), int(t.tokens.col[i])) for t, i in ((mine, p), (base, of[p]))]
        assert same[0] == same[1] and float(mine.tokens.seconds[p]) == float(base.tokens.seconds[of[p]])


def test_attention_mass_adds_up_and_is_the_segments(small, report):
    mass = report["mass"].select(variant="vanilla").values[0]
    names = pairs()
    for query in ("video", "last"):
        total = sum(mass[i] for i, n in enumerate(names) if n.endswith(f"->{query}"))
        assert np.nan_to_num(total) == pytest.approx(1, abs=1e-5)
    ready = small.prepare(shelf_models.question())
    frames = [f"frame:{i}" for i in range(8)]
    direct = segment_mass(small, ready, [*frames, "last"]).mean[:, :, 8, :8].sum(-1).mean(1)
    assert mass[names.index("video->last")] == pytest.approx(direct.numpy(), abs=1e-6)
    own = segment_mass(small, ready, frames).mean.mean(1).diagonal(dim1=1, dim2=2).mean(-1)
    assert mass[names.index("own frame->video")] == pytest.approx(own.numpy(), abs=1e-6)


def test_attention_to_tokens_of_the_whole_video_is_attention_to_video(small):
    """Global tokens belong to no frame: they are not a frame's own, and what a frame gives them is not lost."""
    found = asked(small, {"m": SegmentMerging(n_segments=2, keep=8, n_global=2)})["mass"]
    mass, names = found.select(variant="m").values[0], pairs()
    for query in ("video", "question", "last"):
        total = sum(np.nan_to_num(mass[i]) for i, n in enumerate(names) if n.endswith(f"->{query}"))
        assert total == pytest.approx(1, abs=1e-5)
    assert (mass[names.index("earlier frames->video")] > 0.05).all()


def test_cka_by_hand():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    q, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
    assert cka(x, 3 * x @ q + 5) == pytest.approx(1, abs=1e-5)  # turning, scaling and shifting are not seen
    other = torch.randn(40, 200, generator=torch.Generator().manual_seed(2))
    assert abs(cka(x, other)) < 0.15  # the biased estimate would say about 0.5 here
    assert np.isnan(cka(x[:3], x[:3])) and np.isnan(cka(x * 0, x))


def test_small_numbers_by_hand():
    assert centre(np.array([0.0, -2.0, 2.0, 0.0])) == 2.5 and np.isnan(centre(np.zeros(3)))


def three(values, axes=("item", "variant"), **more):
    """A Result over three questions and the variants a (vanilla) and b."""
    coords = {"item": ["x", "y", "z"], "variant": ["a", "b"], **more}
    return Result(np.array(values), axes, coords, "%", {}, "R", {"vanilla": "a", "controls": {}})


def test_shifts_are_taken_question_by_question():
    """b is a - 2 in every question: certain, however far the questions are apart."""
    apart = three([[0.0, -2.0], [50.0, 48.0], [-50.0, -52.0]])
    mean = shift(apart).mean("item")
    assert mean.values.tolist() == [0, -2] and (mean.low[1], mean.high[1]) == (-2, -2) and moved(mean, 1)
    assert not moved(shift(three([[0.0, 9.0], [0.0, -9.0], [0.0, 1.0]])).mean("item"), 1)
    assert written(mean, 1, "+.1f") == "-2.0 [-2.0, -2.0]" and mean.unit == "%, minus vanilla's"
    assert (
        number(-0.04, "+.1f") == "+0.0"
        and written(three(np.full((3, 2), np.nan)).mean("item"), 0, ".1f") == "-"
    )


def test_what_a_pathway_carries_and_where_it_does_not(small, report):
    """The mean over layers of its curve; no centre where no cut is felt."""
    cut, carried, at = (report[n].values for n in ("knockout", "carried", "centre"))
    assert np.allclose(carried, cut.mean(-1), equal_nan=True)
    felt = np.abs(np.nan_to_num(cut)).max(-1) >= 1
    assert np.array_equal(np.isfinite(at), felt) and felt.any()
    little = asked(small, {"again": []}, pathways=("last->last",), window=1)
    assert np.abs(little["knockout"].values).max() > 0
    felt = np.abs(little["knockout"].values).max(-1) >= 1
    assert np.array_equal(np.isfinite(little["centre"].values), felt)


def test_controls_stand_beside_their_mechanisms(small):
    found = asked(
        small,
        {"drop": DROPS, "kv": VidKV(key_bits=2, value_bits=2)},
        controls=True,
        pathways=("video->last",),
    )
    parts = parts_of(found.results, found["frames"].values)
    lines = {tuple(s.title for s in p.shown if hasattr(s, "title")): p.lines for p in parts}
    attention = [t for t in lines if t and t[0].startswith("Attention: ")]
    assert [len(t) for t in attention] == [2, 1] and "drop, random minus" in attention[0][1]
    tables = [
        s for p in parts for s in p.shown if getattr(s, "title", "").startswith("What each pathway carries")
    ]
    assert tables[0].columns == ("Variant", "video\n->last") and [
        r[1].count("\n") for r in tables[0].rows
    ] == [0, 1, 1, 1]
    cut = next(t for t in lines if t and t[0].startswith("Knock-out of video->last"))
    assert lines[cut] == [2]
    heat = next(
        s for p in parts for s in p.shown if getattr(s, "title", "").startswith("video->last, with controls")
    )
    assert heat.series == ("vanilla", "drop", "drop, random", "kv") and heat.limits == (
        -heat.limits[1],
        heat.limits[1],
    )
    maps = [s for p in parts for s in p.shown if "cosine with vanilla;" in getattr(s, "title", "")]
    assert len(maps) == 5 and len({m.limits for m in maps}) == 1
    changes = [s for p in parts for s in p.shown if getattr(s, "title", "").startswith("Attention: ")]
    assert len({s.limits for s in changes}) == 1


def test_kl_is_drawn_in_powers_of_ten(report):
    mean = report["kl"].mean("item")
    spec = next(s for p in parts_of(report.results, report["frames"].values) for s in p.shown if "log10" in getattr(s, "title", ""))  # fmt: skip
    assert np.allclose(10.0**spec.values, np.maximum(mean.values, 1e-4)) and spec.limits[0] == -4
    assert spec.reading.startswith("Farthest from -4")


# ---- controls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mechanism",
    [MixtureOfDepths(), DROPS, DifferentialTokenDrop(threshold=0.999), MERGES, ThumbnailAndSampling(n_thumbnail=4, n_samples=20), VidKV(quantise_prefill_attention=True)],
    ids=lambda m: type(m).__name__,
)  # fmt: skip
def test_controls_have_the_same_budget_and_choose_otherwise(small, mechanism):
    item = shelf_models.question()
    _, one, control = variants_of(small, {"m": mechanism}, controls=True, seed=3)
    assert control.control_of == "m" and control.name == "m, random"
    a, b = (trace(small, v.prepared(item, {})) for v in (one, control))
    assert len(a.tokens) == len(b.tokens) and a.ran.sum(1).tolist() == b.ran.sum(1).tolist()
    assert a.kv_bytes == b.kv_bytes
    assert not torch.equal(a.lens, b.lens)
    again = trace(small, control.prepared(item, {}))
    assert torch.equal(again.lens, b.lens)


def test_what_chooses_nothing_has_no_control(small):
    plain = [SegmentMerging(keep=None, n_global=1), VidKV(key_bits=2, value_bits=2), Turned(0, 0.5)]
    assert [v.control_of for v in variants_of(small, plain, controls=True, seed=0)] == [""] * 4
    with pytest.raises(UsageError, match="no random choice has its budget"):
        MixtureOfDepths(threshold=0.5).control()


# ---- costs ----------------------------------------------------------------------------------------------------------


def test_costs_predicted_and_measured(small):
    variants = variants_of(
        small, {"mod": MixtureOfDepths(), "drop": DROPS, "kv": VidKV()}, controls=False, seed=0
    )
    ready = {v.name: v.prepared(shelf_models.question(), {}) for v in variants}
    found = costs(variants, ready, 1)
    for name, (flops, kv, _, peak) in found.items():
        assert flops[1] == pytest.approx(flops[0], rel=0.02), name
        assert kv[1] == pytest.approx(kv[0], rel=0.05 if name == "kv" else 0), name
        assert peak[1] == pytest.approx(peak[0], rel=0.6), name
    assert found["mod"][0][0] < found["vanilla"][0][0] and found["kv"][1][0] < found["vanilla"][1][0] / 2
    dense, routed = (rows_of(v, small.maps(ready[v.name])[0]) for v in variants[:2])
    assert routed[0] == dense[0] > routed[1]
    unknown = Variant("t", small, (MixtureOfDepths(threshold=0.9),))
    assert rows_of(unknown, small.maps(ready["vanilla"])[0]) == [0] * 4


# ---- journal, files, command line -------------------------------------------------------------------------------------


def test_interrupted_and_gone_on_with(small, tmp_path, monkeypatch):
    items = [shelf_models.question(), replace(shelf_models.question(moving=False), id="still")]
    how = {"rounds": 1, "controls": False, "pathways": (), "new_tokens": 1, "show_progress": False}
    whole = compare(small, {"drop": DROPS}, items, **{**how, "rounds": 0})
    cancel, done = Cancel(), list[str]()
    import lab.comparison.running as running

    measure = running.piece

    def counted(variant, base, *args, **kw):
        done.append(f"{base.item.id}/{variant.name}")
        if len(done) == 2:
            cancel.set()
        return measure(variant, base, *args, **kw)

    monkeypatch.setattr(running, "piece", counted)
    with pytest.raises(Cancelled):
        compare(small, {"drop": DROPS}, items, out=tmp_path / "run", cancel=cancel, **how)
    found = compare(small, {"drop": DROPS}, items, out=tmp_path / "run", **how)
    assert len(done) == len(set(done)) == 4
    for name in ("cosine", "kl", "mass", "left", "p_right"):
        assert np.allclose(found[name].values, whole[name].values, atol=1e-6, equal_nan=True)
    with pytest.raises(ConfigError, match="belongs to recipe"):
        compare(small, {"drop": MERGES}, items, out=tmp_path / "run", **how)


def test_saved_loaded_and_shown(report, tmp_path):
    files = report.save(tmp_path)
    again = Report.load(tmp_path)
    assert set(again) == set(report) and all(again[n].same(report[n]) for n in report)
    page = files[-1].read_text()
    assert 'http-equiv="Content-Security-Policy"' in page and "<script src" not in page
    for title in (
        "Depth of every token, mod:",
        "What is left of the video, drop:",
        "Knock-out of cross-frame",
        "CKA with vanilla; video",
    ):
        assert title in page
    assert "What is left of the video, mod" not in page  # the same picture as vanilla's
    assert "Depth of every token, drop" not in page  # what is left of it runs all layers
    assert 'class="line" style="--across:2"' in page
    assert "mod: " in page and again.words() == report.words()
    (tmp_path / "cosine.npz").unlink()
    with pytest.raises(ConfigError, match=r"cosine.npz is missing"):
        Report.load(tmp_path)
    with pytest.raises(UsageError, match="no Result 'cosin'"):
        report["cosin"]


def test_the_command_line_and_its_recipe(tmp_path, capsys):
    line = ["compare", "--items", "sim:moving_direction:1:3", "--mechanism", "half=differential_token_drop:ratio=0.5", "--rounds", "0",
            "--no-controls", "--out", str(tmp_path / "a")]  # fmt: skip
    assert main(line) == 0
    assert "half: " in capsys.readouterr().out
    first = Report.load(tmp_path / "a")
    assert main(["run", str(tmp_path / "a/recipe.yaml"), "--out", str(tmp_path / "b")]) == 0
    second = Report.load(tmp_path / "b")
    assert all(np.allclose(first[n].values, second[n].values, atol=1e-5, equal_nan=True) for n in first)
    capsys.readouterr()
    for wrong, says in (
        (["--mechanism", "mixture_of_depth"], "closest: mixture_of_depths"),
        (["--mechanism", "vidkv:bits=3"], "no field 'bits'"),
        (["--mechanism", "vidkv:key_bits"], "keep=0.2"),
        (["--mechanism", "vidkv:key_bits=3"], "key_bits=3"),
        (["--mechanism", "mixture_of_depths:keep=1.5"], "keep=1.5"),
        (["--mechanism", "mixture_of_depths:keep=.nan"], "keep=nan"),
        (["--mechanism", "vidkv+vidkv"], "two mechanisms fill the cache slot"),
        (["--mechanism", "a=vidkv", "--mechanism", "a=segment_merging"], "is called 'a', as another one"),
        (["--mechanism", "=vidkv"], "no label before the ="),
        ([], "nothing to compare"),
    ):
        assert main([*line[:3], *wrong, "--out", str(tmp_path / "c")]) == 2
        assert says in capsys.readouterr().err


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_makes_no_comparison_is_refused(small):
    item = shelf_models.question()
    for models, mechanisms, items, says in (
        (small, None, item, "compares with nothing"),
        (small, "mixture_of_depths", [], "asks questions"),
        (small, "mixture_of_depths", ["?"], "asks questions"),
        (small, "mixture_of_dept", item, "closest: mixture_of_depths"),
        (small, MixtureOfDepths, item, "is no mechanism"),
        (small, 3, item, "is no mechanism"),
        (3, "vidkv", item, "give a model"),
        ({}, "vidkv", item, "no model"),
        ({"a": (small, MixtureOfDepths())}, "vidkv", item, "without mechanisms"),
        ({"a": small, "b": small}, {"b": []}, item, "two variants are called"),
        ({"a": small, "b": shelf_models.model(layers=2)}, None, item, "one shape"),
        (small, "vidkv", None, "got NoneType"),
        (small, "vidkv", [item, None], "got NoneType"),
        (small, "vidkv", small.prepare(item, mechanisms=[DROPS]), "prepared with mechanisms"),
        (small, {"x": ["vidkv", "vidkv"]}, item, "vidkv.QuantisedCache and vidkv.QuantisedCache"),
    ):
        with pytest.raises(UsageError, match=says):
            compare(models, mechanisms, items, show_progress=False)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"rounds": -1}, "rounds must be"), ({"rounds": float("nan")}, "rounds must be"), ({"window": 0}, "window must be"),
        ({"new_tokens": 0}, "new_tokens must be"), ({"seed": "x"}, "seed must be"), ({"n_frames": 0}, "n_frames"),
        ({"pathways": "nowhere"}, "pathway 'nowhere'"), ({"pathways": ("cross-frame", "video->lasst")}, "lasst"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(small, setting, says):
    with pytest.raises(UsageError, match=says):
        compare(small, "vidkv", shelf_models.question(), **{"rounds": 0, "show_progress": False} | setting)


def test_a_pathway_that_only_some_questions_have_is_nan_in_the_others(small):
    alone = replace(shelf_models.question(), options=(), answer="left", id="open")
    found = asked(small, DROPS, pathways="video->option")
    assert found["knockout"].coords["pathway"] == ["video->option"]
    items = [alone, shelf_models.question()]
    how = {
        "rounds": 0,
        "controls": False,
        "new_tokens": 1,
        "show_progress": False,
        "pathways": ["video->option"],
    }
    cut = compare(small, DROPS, (i for i in items), **how)["knockout"].values
    assert np.isnan(cut[0]).all() and np.isfinite(cut[1]).all()
    with pytest.raises(UsageError, match="option"):
        compare(small, DROPS, alone, **how)


def test_names_of_mechanisms():
    several = named_mechanisms(["vidkv", VidKV(), ["differential token drop", "vidkv"]])
    assert list(several) == ["vidkv", "vidkv #2", "differential token drop + vidkv"]
    assert len(several["differential token drop + vidkv"]) == 2 and named_mechanisms(None) == {}


def test_open_questions_and_other_models(small):
    """Without options the written answer is compared; a second model is a variant of the first."""
    item = replace(shelf_models.question(), options=(), answer="left")
    other = shelf_models.model(layers=4, seed=1)
    found = compare(
        {"first": small, "second": other, "both": (other, DROPS)}, None, item, rounds=0, pathways=(), new_tokens=3,
        show_progress=False,
    )  # fmt: skip
    assert found.variants == ["first", "second", "both", "both, random"]
    assert found["accuracy"].values.tolist() == [0.0] * 4 and np.isnan(found["p_right"].values).all()
    assert "knockout" not in found and "costs" not in found
    assert len(found.words()) == 3
