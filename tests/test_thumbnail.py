"""TS-LLaVA: the acceptance checks A1-A7 of its spec, and what the mechanism does to prompts and maps."""

import pytest
import torch
import torch.nn.functional as F

from lab.carriers import Frames
from lab.errors import RunError, UsageError
from lab.mechanisms.thumbnail_and_sampling import (
    NEUTRAL,
    ThumbnailAndSampling,
    WithThumbnail,
    of_tile,
    picks,
    thumbnail,
    tiles,
)  # fmt: skip
from lab.model.layout import vision_of
from tests import families
from tests.shelf_models import model, question

TS = ThumbnailAndSampling


@pytest.fixture(scope="module")
def small():
    return model()


def film(frames, cells):
    return torch.arange(frames).repeat_interleave(cells)


def test_a1_counts_and_indices(small):
    at = TS(n_samples=2880).chosen(film(50, 576))
    assert len(at) == 2880 and int(at[0]) == 0 and int(at[-1]) == 50 * 576 - 1 and bool((at.diff() > 0).all())
    for config, n in ((TS(4, 32), 32 + 16), (TS(4, None), 128 + 16), (TS(0, 32), 32)):
        tokens = small.maps(small.prepare(question()), mechanisms=[config])[0]
        assert len(tokens.where(role="frame")) == n
    with pytest.raises(UsageError, match="2880 samples of 128"):
        small.run(small.prepare(question()), mechanisms=[TS()])


def test_a2_every_token_comes_from_one(small):
    ready = small.prepare(question(), mechanisms=[TS(4, 32)])
    tokens = small.maps(ready)[0]
    source = tokens.source[tokens.where(kind="video")]
    assert tokens.parts is None and len(source.unique()) == len(source) and int(source.min()) == 0
    thumb = tokens.where(role="frame", frame=8)
    assert len(thumb) == 16 and bool(tokens.seconds[thumb].isnan().all())
    assert tokens.source[thumb].tolist() == list(range(128, 144))


@pytest.mark.parametrize(("n", "grid"), [(4, (2, 2)), (6, (3, 2)), (8, (4, 2)), (1, (1, 1)), (5, (5, 1))])
def test_a3_tiles_hold_the_shrunk_frames(n, grid):
    assert tiles(n) == grid
    g = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, 3, 60, 60), generator=g, dtype=torch.uint8)
    picture, (rows, cols) = thumbnail(pixels), grid
    h, w = 60 // rows, 60 // cols
    for i in range(n):
        r, c = divmod(i, cols)
        small_one = F.interpolate(pixels[i][None].float(), (h, w), mode="area")[0].round()
        assert torch.equal(picture[:, r * h : (r + 1) * h, c * w : (c + 1) * w].float(), small_one)


def test_a3_frames_chosen_and_odd_sizes():
    assert picks(50, 6).tolist() == [0, 10, 20, 29, 39, 49]
    pixels = torch.zeros(50, 3, 31, 25, dtype=torch.uint8)
    frames = Frames(pixels, torch.arange(50.0), torch.arange(50), 1.0, 50.0, "x")
    out = WithThumbnail(6)(frames, "")
    assert out.pixels.shape == (51, 3, 31, 25) and int(out.index[-1]) == -1 and bool(out.seconds[-1].isnan())
    row, col = torch.arange(6).repeat_interleave(4), torch.arange(4).repeat(6)
    assert of_tile(6, row, col, 6, 4).view(6, 4)[::2, ::2].tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UsageError, match="6 frames, but the video has 4"):
        WithThumbnail(6)(Frames(pixels[:4], torch.arange(4.0), torch.arange(4), 1.0, 4.0, "x"), "")


def test_a4_sampling_commutes_with_a_projection(small):
    ready = small.prepare(question())
    with torch.no_grad():
        vision = vision_of(ready, small.see(ready))
        w = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        stage, other = TS(0, 40), type(vision)(vision.x @ w, vision.grid)
        assert torch.allclose(
            stage(ready.frames, vision, "").x @ w, stage(ready.frames, other, "").x, atol=1e-6
        )


def test_a5_a_constant_video_gives_equal_tokens_at_equal_places(small):
    ready = small.prepare(question(moving=False))
    with torch.no_grad():
        left = TS(0, 50)(ready.frames, vision_of(ready, small.see(ready)), "")
    place = left.grid.row * 4 + left.grid.col
    for p in place[left.grid.frame >= 0].unique().tolist():
        mine = left.x[(place == p) & (left.grid.frame >= 0)]
        assert torch.allclose(mine, mine[:1].expand_as(mine), atol=1e-5)


@pytest.mark.parametrize("stratify", ["none", "random", "even"])
def test_a6_two_runs_are_bit_equal(small, stratify):
    ready = small.prepare(question())
    one, two = (small.run(ready, mechanisms=[TS(4, 32, stratify=stratify)]).logits for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, small(ready))


def test_a7_the_released_stride_meets_one_column_parity():
    frame = film(50, 576)
    odd = {}
    for mode in ("none", "even"):
        at = TS(n_samples=2880, stratify=mode).chosen(frame)
        assert len(at.unique()) == 2880
        odd[mode] = [float((at[frame[at] == f] % 24 % 2).float().mean()) for f in range(50)]
    assert odd["none"][:4] == pytest.approx([0, 0, 0.23, 1], abs=0.01)
    assert sum(o in (0.0, 1.0) for o in odd["none"]) > 30
    assert all(0.25 < o < 0.75 for o in odd["even"])


@pytest.mark.parametrize("stratify", ["random", "even"])
@pytest.mark.parametrize("want", [3, 8, 30, 100, 128])
def test_every_frame_gets_its_share(stratify, want):
    frame = film(8, 16)
    at = TS(n_samples=want, stratify=stratify).chosen(frame)
    counts = frame[at].bincount(minlength=8)
    assert len(at.unique()) == want and bool((at.diff() > 0).all()) and int(counts.max() - counts.min()) <= 1


def test_the_shift_is_a_null_edit_of_the_spacing():
    frame = film(8, 16)
    one, two = (TS(n_samples=32, phase=p).chosen(frame) for p in (0, 1))
    assert len(two.unique()) == 32 and not torch.equal(one, two)


def test_neutral_is_vanilla_bit_for_bit(small):
    ready = small.prepare(question())
    assert torch.equal(small(ready, read="all", mechanisms=[NEUTRAL]), small(ready, read="all"))


def test_thumbnail_first(small):
    ready = small.prepare(question())
    first, last = (
        small.run(ready, mechanisms=[TS(4, 32, order=o)]) for o in ("thumbnail-first", "sampled-first")
    )
    a, b = first.maps[0], last.maps[0]
    assert a.frame[a.where(role="frame")][:16].tolist() == [8] * 16
    assert b.frame[b.where(role="frame")][-16:].tolist() == [8] * 16
    assert not torch.allclose(first.logits, last.logits, atol=1e-3)


def test_given_to_prepare_or_to_run_is_the_same(small):
    plain, mech = small.prepare(question()), TS(4, 32)
    prepared = small.prepare(question(), mechanisms=[mech])
    assert torch.equal(small(plain, mechanisms=[mech]), small(prepared))
    assert small.generate(plain, mechanisms=[mech], max_new_tokens=3, stop=[]) == small.generate(
        prepared, max_new_tokens=3, stop=[]
    )
    calls = small.tower_calls
    small(plain, mechanisms=[TS(4, 20)])
    assert small.tower_calls == calls  # the same thumbnail: nothing is seen again
    with pytest.raises(UsageError, match="sampler slot"):
        small(prepared, mechanisms=[mech])


def test_processor_tensors_are_refused(small):
    ready = small.prepare_inputs(**families.inputs("llava_onevision") | {"pixel_values_videos": torch.zeros(1, 3, 3, 32, 32), "input_ids": torch.tensor([[20, *[families.VIDEO] * 49, 21]]), "attention_mask": torch.ones(1, 51, dtype=torch.long)})  # fmt: skip
    with pytest.raises(RunError, match="came from a processor"):
        small.run(ready, mechanisms=[TS(4, 32)])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_every_family_or_refused(name, wrapped_text):
    m = wrapped_text(name)
    for frames in (4, 5):
        ready = m.prepare(question(frames), n_frames=frames)
        tubelets = name in ("qwen2_5_vl", "qwen3_vl")
        if tubelets and frames == 5:
            with pytest.raises(RunError, match="tubelets"):
                m.run(ready, mechanisms=[TS(4, 8)])
            continue
        tokens = m.run(ready, mechanisms=[TS(4, 8)]).maps[0]
        assert len(tokens.where(role="frame")) == 8 + len(
            tokens.where(role="frame", frame=frames // (1 + tubelets))
        )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n_samples": 0}, "from 1"),
        ({"n_thumbnail": -1}, "from 0"),
        ({"order": "T"}, "sampled-first"),
        ({"phase": 0.5}, "whole"),
    ],
)
def test_wrong_settings_are_named(wrong, says):
    with pytest.raises(UsageError, match=says):
        TS(**wrong)
