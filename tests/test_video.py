"""Video in: the right frames at the right times, or a clear error."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lab import video as lab_video
from lab.carriers import Frames
from lab.errors import LabError, LabWarning, TooBig, UsageError, VideoError
from lab.video import probe, read, uniform
from lab.video_container import demuxed, opened
from lab.video_files import FileSource
from tests import clips

VFR = [100 * i + i * i % 70 for i in range(40)]  # ms
FILES: dict[str, dict[str, Any]] = {
    "plain.mp4": {"codec": "libx264", "options": clips.X264},
    "b_frames.mp4": {"codec": "libx264", "options": clips.B_FRAMES},
    "open_gop.mkv": {"codec": "libx264", "options": clips.OPEN_GOP},
    "open_gop.mp4": {"codec": "libx264", "options": clips.OPEN_GOP},
    "variable.mp4": {"codec": "libx264", "options": clips.B_FRAMES, "times": VFR},
    "variable.mkv": {"codec": "libx264", "options": clips.B_FRAMES, "times": VFR},
    "stream.ts": {"codec": "libx264", "options": clips.B_FRAMES},
    "b_frames.avi": {"codec": "libx264", "options": clips.B_FRAMES},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "q": "2"}},
    "motion.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": clips.VP9},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "12", "deadline": "realtime", "b": "500k"}},
    "refresh.mkv": {
        "codec": "libx264",
        "options": {**clips.X264, "x264-params": "intra-refresh=1:keyint=12"},
    },
    "program.mpg": {"codec": "mpeg1video", "fps": 25, "options": {"g": "12", "b": "900k"}},
    "loop.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "odd.mkv": {"codec": "ffv1", "pix_fmt": "bgr0", "size": (63, 47)},
    "ten_bit.mp4": {"codec": "libx264", "pix_fmt": "yuv420p10le", "options": clips.B_FRAMES},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips")
    for name, how in FILES.items():
        clips.make(path / name, **how)
    return path


@pytest.fixture
def clip(folder: Path, tmp_path: Path) -> Path:
    """A copy of an mp4 that the test may spoil."""
    return Path(shutil.copy(folder / "b_frames.mp4", tmp_path / "clip.mp4"))


def decoded(path: Path) -> Tensor:
    """Every frame, the obvious way."""
    with av.open(str(path)) as container:
        arrays = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    return torch.from_numpy(np.stack(arrays)).movedim(-1, 1)


def array(n: int = 5, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, height, width, 3), np.uint8)


# -- files: same frames as decoding everything ------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_chosen_frames_equal_full_decode(folder: Path, name: str) -> None:
    everything = decoded(folder / name)
    assert len(everything) == 40
    for index in (uniform(8, 40), [39], [11, 12, 13], [30, 2, 2, 24], list(range(40))):
        frames = read(folder / name, index=index)
        assert torch.equal(frames.pixels, everything[index]), index
        assert frames.index.tolist() == index
        assert clips.numbers(frames.pixels) == index


def test_seeking_needs_no_full_decode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = 0

    def counted(self: FileSource, frame: Any, rgb: Any = FileSource._rgb) -> Tensor:
        nonlocal decodes
        decodes += 1
        return rgb(self, frame)

    monkeypatch.setattr(FileSource, "_rgb", counted)
    monkeypatch.delattr(FileSource, "_by_counting")  # every frame must be reached by seeking
    # counted instead: no times in avi and mpg, hidden frames in vp8; h264 with intra refresh has no clean keyframes
    for name in set(FILES) - {"b_frames.avi", "program.mpg", "vp8.webm", "refresh.mkv"}:
        for index in ([3, 20, 38], range(40)):
            decodes = 0
            assert clips.numbers(read(folder / name, index=index).pixels) == list(index), name
            assert decodes == len(index), name


def test_leading_frames_are_sought_one_keyframe_earlier(folder: Path) -> None:
    """Open groups of pictures: frames stored behind a keyframe, shown before it, and needing what lies before it."""
    with opened(folder / "open_gop.mp4") as (container, stream):
        packets = [(p.pts, p.dts, p.is_keyframe) for p in container.demux(stream) if p.size]
    with opened(folder / "open_gop.mp4") as (container, stream):
        table = demuxed(container, stream)
    assert table is not None
    key = leading = 0
    seek = packets[0][1]
    for pts, dts, is_key in packets:
        if is_key:
            key, before, seek = pts, seek, dts
        elif pts < key:
            leading += 1
            assert table.starts[pts] == before
        else:
            assert table.starts[pts] == seek
    assert leading > 3


@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
def test_seconds_are_presentation_times(folder: Path, name: str) -> None:
    frames = read(folder / name, index=range(40))
    assert torch.allclose(frames.seconds, torch.tensor(VFR) / 1000, atol=1e-3)
    assert frames.duration == pytest.approx(VFR[-1] / 1000 + 0.1, abs=0.06)


@pytest.mark.parametrize("name", ["stream.ts", "b_frames.avi", "loop.gif", "vp9.webm"])
def test_seconds_start_at_the_first_frame(folder: Path, name: str) -> None:
    frames = read(folder / name, n_frames=4)
    assert torch.allclose(frames.seconds, torch.tensor([0.0, 1.3, 2.6, 3.9]))
    assert (frames.fps, frames.duration) == (pytest.approx(10), pytest.approx(4.0))


def test_probe(folder: Path) -> None:
    info = probe(folder / "odd.mkv")
    assert (info.n_frames, info.width, info.height, info.codec) == (40, 63, 47, "ffv1")
    assert (info.fps, info.duration, info.pixel_aspect) == (pytest.approx(10), pytest.approx(4.0), 1.0)
    assert probe(folder / "variable.mp4").fps == pytest.approx(40 / 4.06, abs=0.1)
    assert "10" in probe(folder / "ten_bit.mp4").pixel_format
    assert probe(folder / "b_frames.avi").n_frames == 40


def test_ten_bit_close_to_eight_bit(folder: Path) -> None:
    eight, ten = (read(folder / f"{n}.mp4").pixels.float() for n in ("b_frames", "ten_bit"))
    assert (eight - ten).abs().mean() < 2


def test_non_square_pixels_are_noted_not_stretched(tmp_path: Path) -> None:
    path = clips.make(tmp_path / "wide.mp4", "libx264", 4, options=clips.X264, aspect=Fraction(4, 3))
    assert probe(path).pixel_aspect == pytest.approx(4 / 3)
    assert read(path, n_frames=2).pixels.shape == (2, 3, 48, 64)


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((0, 1, -1, 0), lambda x: x.rot90(-1, (2, 3))),  # a phone held upright: shown a quarter clockwise
        ((0, -1, 1, 0), lambda x: x.rot90(1, (2, 3))),
        ((-1, 0, 0, -1), lambda x: x.rot90(2, (2, 3))),
        ((-1, 0, 0, 1), lambda x: x.flip(3)),
        ((1, 0, 0, -1), lambda x: x.flip(2)),
        ((0, 1, 1, 0), lambda x: x.transpose(2, 3)),
    ],
)
def test_display_matrix(
    folder: Path, clip: Path, matrix: tuple[int, ...], upright: Callable[[Tensor], Tensor]
) -> None:
    plain = read(folder / "b_frames.mp4", n_frames=3).pixels
    clips.turn(clip, matrix)
    turned = read(clip, n_frames=3)
    assert torch.equal(turned.pixels, upright(plain))
    assert (probe(clip).height, probe(clip).width) == tuple(turned.pixels.shape[2:])
    with av.open(str(clip)) as container:  # PyAV's own reading of the matrix: degrees counter-clockwise
        rotation = next(container.decode(video=0)).rotation
    if matrix[0] * matrix[3] - matrix[1] * matrix[2] == 1:
        assert torch.equal(turned.pixels, plain.rot90(rotation // 90, (2, 3)))


def test_transparent_gif_shows_white(tmp_path: Path) -> None:
    still = Image.new("P", (16, 12), 0)
    still.putpalette([10, 20, 30, 200, 0, 0])
    still.paste(1, (8, 0, 16, 12))
    still.save(tmp_path / "clear.gif", transparency=0)
    pixels = read(tmp_path / "clear.gif", index=[0]).pixels[0]
    assert pixels[:, 6, 3].tolist() == [255, 255, 255]
    assert pixels[:, 6, 12].tolist() == [200, 0, 0]


def test_transparent_video_shows_white(tmp_path: Path) -> None:
    picture = np.zeros((12, 16, 4), np.uint8)
    picture[:, 8:] = (200, 0, 0, 255)
    with av.open(str(tmp_path / "clear.mov"), "w") as out:
        stream: Any = out.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 12, "rgba"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        out.mux(stream.encode(None))
    pixels = read(tmp_path / "clear.mov", index=[0]).pixels[0]
    assert pixels[:, 6, 3].tolist() == [255, 255, 255]
    assert pixels[:, 6, 12].tolist() == [200, 0, 0]


def test_change_of_size_in_mid_stream(tmp_path: Path) -> None:
    """Two h264 pieces of different size, one behind the other, as a conference recording has them."""
    pieces = [
        clips.make(tmp_path / f"{i}.ts", "libx264", 10, size=s, options=clips.X264)
        for i, s in enumerate([(64, 48), (96, 64)])
    ]
    joined = tmp_path / "joined.h264"
    with joined.open("wb") as out:
        for piece in pieces:
            with av.open(str(piece)) as container:
                for packet in container.demux(video=0):
                    out.write(bytes(packet))
    frames = read(joined, index=[0, 9, 10, 19])
    assert frames.pixels.shape == (4, 3, 48, 64)
    assert clips.numbers(frames.pixels) == [0, 9, 0, 9]


def test_odd_names_are_files_not_protocols(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "ünï codé %d.mp4", "subfile,,start,0,end,0,,:x.mp4", "-i.mp4"):
        shutil.copy(folder / "plain.mp4", name)
        assert clips.numbers(read(name, index=[7]).pixels) == [7]


# -- which frames -----------------------------------------------------------------------------------------------


def test_uniform_spread() -> None:
    assert uniform(8, 40) == np.linspace(0, 39, 8).round().astype(int).tolist()
    assert uniform(1, 40) == [0]
    assert uniform(3, 3) == [0, 1, 2]
    assert uniform(4, 2) == [0, 0, 1, 1]


def test_default_is_eight() -> None:
    assert read(array(20)).index.tolist() == uniform(8, 20)


def test_fps_takes_the_frame_on_screen(folder: Path) -> None:
    shown = np.array(VFR) / 1000
    frames = read(folder / "variable.mp4", fps=3)
    want = [int(np.flatnonzero(shown <= t + 1e-3)[-1]) for t in np.arange(len(frames)) / 3]
    assert frames.index.tolist() == want
    assert len(frames) == 13  # 0, 1/3 ... 4 s of 4.06
    assert read(folder / "plain.mp4", fps=10).index.tolist() == list(range(40))
    assert read(folder / "plain.mp4", fps=20).index.tolist() == [i // 2 for i in range(80)]
    assert read(folder / "plain.mp4", fps=0.01).index.tolist() == [0]


def test_max_frames(folder: Path) -> None:
    assert read(folder / "plain.mp4", fps=10, max_frames=5).index.tolist() == uniform(5, 40)
    assert read(folder / "plain.mp4", fps=2, max_frames=100).index.tolist() == list(range(0, 40, 5))
    assert read(folder / "plain.mp4", n_frames=20, max_frames=4).index.tolist() == uniform(4, 40)


def test_more_than_there_are_repeats_and_warns(tmp_path: Path) -> None:
    with pytest.warns(LabWarning, match="8 frames asked, it has 3"):
        assert read(array(3), n_frames=8).index.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    path = clips.make(tmp_path / "one.mp4", "libx264", 1, options=clips.X264)
    with pytest.warns(LabWarning, match="it has 1"):
        frames = read(path, n_frames=4)
    assert frames.index.tolist() == [0, 0, 0, 0]
    assert (frames.pixels == frames.pixels[0]).all()
    assert read(path, n_frames=1).index.tolist() == [0]


# -- other sources ----------------------------------------------------------------------------------------------


def test_arrays_and_tensors() -> None:
    x = array(6)
    want = torch.from_numpy(x).movedim(-1, 1)
    for given in (x, torch.from_numpy(x), want, want.numpy(), x[:, ::-1][:, ::-1], list(x), list(want)):
        assert torch.equal(read(given, n_frames=6).pixels, want)
    assert torch.equal(read(x[0], n_frames=1).pixels, want[:1])
    assert read(x[..., :1], n_frames=6).pixels[:, 2].equal(want[:, 0])
    assert read(x, n_frames=2).seconds.isnan().all()


def test_alpha_array_on_white() -> None:
    x = np.zeros((1, 4, 4, 4), np.uint8)
    x[:, :, 2:, 3] = 255
    assert read(x, n_frames=1).pixels[0, 0, 0].tolist() == [255, 255, 0, 0]


def test_image_folder_in_natural_order(tmp_path: Path) -> None:
    for i in (1, 2, 10, 9, 100):
        Image.fromarray(clips.picture(i)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "._frame1.png").write_bytes(b"junk of another system")
    frames = read(tmp_path, n_frames=5)
    assert clips.numbers(frames.pixels) == [1, 2, 9, 10, 100]
    assert frames.seconds.isnan().all()
    assert probe(tmp_path).n_frames == 5


def test_images_of_every_kind(tmp_path: Path) -> None:
    rgb = Image.fromarray(clips.picture(77))
    grey16 = Image.fromarray(np.full((48, 64), 0x8040, np.uint16))
    clear = Image.new("RGBA", (64, 48), (9, 9, 9, 0))
    images = {
        "a.png": rgb,
        "b.bmp": rgb,
        "c.png": rgb.convert("L"),
        "d.png": rgb.quantize(),
        "e.png": grey16,
        "f.png": clear,
    }
    for name, image in images.items():
        image.save(tmp_path / name)
    frames = read([tmp_path / n for n in images] + [rgb], index=range(7))
    assert clips.numbers(frames.pixels[:4]) == [77] * 4
    assert torch.equal(frames.pixels[0], frames.pixels[6])
    assert (frames.pixels[4] == 0x80).all()
    assert (frames.pixels[5] == 255).all()


def test_image_turned_by_exif(tmp_path: Path) -> None:
    image = Image.fromarray(clips.picture(5))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "phone.png", exif=exif)
    frames = read(tmp_path / "phone.png", n_frames=1)
    assert torch.equal(frames.pixels[0], torch.from_numpy(clips.picture(5)).movedim(-1, 0).rot90(-1, (1, 2)))
    assert (probe(tmp_path / "phone.png").width, probe(tmp_path / "phone.png").height) == (48, 64)


def test_frames_sampled_again(folder: Path) -> None:
    first = read(folder / "plain.mp4", fps=5)
    again = read(first, n_frames=3)
    assert again.index.tolist() == [0, 20, 38] == first.index[[0, 10, 19]].tolist()
    assert torch.equal(again.seconds, first.seconds[[0, 10, 19]])
    assert read(first, fps=1).index.tolist() == [0, 10, 20, 30]
    assert read(first, n_frames=20).pixels is first.pixels


# -- what is wrong with it --------------------------------------------------------------------------------------


def hostile(folder: Path) -> dict[str, Any]:
    """name -> a video that cannot be read."""
    copy = lambda name: Path(shutil.copy(folder / "plain.mp4", folder / name))  # noqa: E731
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n" * 99)
    (folder / "text.txt").write_text("not a video\n" * 99)
    (folder / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
    )
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for name in ("bare", "mixed", "texts"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "texts" / "a.txt").write_text("x")
    Image.new("RGB", (8, 8)).save(folder / "mixed" / "1.png")
    Image.new("RGB", (9, 8)).save(folder / "mixed" / "2.png")
    still = Image.new("RGB", (8, 8))
    still.save(
        folder / "moving.webp", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")], duration=100
    )
    return {
        "missing": folder / "nothing.mp4", "empty file": folder / "empty.mp4", "text": folder / "text.mp4",
        "text file": folder / "text.txt", "playlist": folder / "list.m3u8", "no index": clips.without_index(copy("cut.mp4")),
        "no frames": clips.no_frames(folder / "none.mp4"), "no frames in avi": clips.no_frames(folder / "none.avi"),
        "audio only": clips.audio_only(folder / "sound.m4a"), "all damaged": clips.damage(copy("wreck.mp4"), 0, 1),
        "bare folder": folder / "bare", "folder of texts": folder / "texts", "mixed sizes": folder / "mixed",
        "bad image": folder / "bad.png", "missing image": [folder / "no.png"], "animation": folder / "moving.webp",
        "http": "http://127.0.0.1:9/a.mp4", "https": "https://127.0.0.1:9/a.mp4", "device": Path("/dev/null"),
        "empty list": [], "empty array": array(0), "empty frames": array(3)[:, :0],
        "float": array().astype(np.float32) / 255, "nan": np.full((2, 4, 4, 3), np.nan), "int": array().astype(np.int64),
        "bool": array() > 9, "two-dimensional": array()[0, :, :, 0], "channels": np.zeros((2, 5, 6, 7), np.uint8),
        "number": 7, "none": None, "list of numbers": [1, 2], "half": torch.zeros(2, 3, 4, 4, dtype=torch.float16),
    }  # fmt: skip


SAYS = {
    "missing": "no such file", "empty file": "is empty (0 bytes)", "text": "cannot be read as a video",
    "text file": "not a video", "no index": "moov box", "no frames": "no frame", "no frames in avi": "no frame",
    "audio only": "only audio", "all damaged": "no frame in it can be decoded", "bare folder": "found nothing",
    "folder of texts": "found a.txt", "mixed sizes": "9 x 8, image 0 is 8 x 8", "bad image": "cannot be read as an image",
    "missing image": "no such image", "animation": "animated WEBP", "http": "download it first", "https": "download it first",
    "device": "not a regular file", "empty list": "no images", "empty array": "no frames", "empty frames": "no frames",
    "float": "float32 with values 0..1 and 0 not finite; convert it: (x * 255)", "nan": "96 not finite", "int": "int64",
    "bool": "bool", "two-dimensional": "[12, 16]", "channels": "[2, 5, 6, 7]", "number": "got int", "none": "got NoneType",
    "list of numbers": "got int", "half": "float16", "playlist": "list.m3u8",
}  # fmt: skip


@pytest.mark.parametrize("name", SAYS)
def test_hostile_sources(tmp_path: Path, folder: Path, name: str) -> None:
    shutil.copy(folder / "plain.mp4", tmp_path)
    video = hostile(tmp_path)[name]
    with pytest.raises(LabError) as caught:
        read(video, n_frames=2)
    first, *rest = str(caught.value).splitlines()
    assert SAYS[name] in first
    assert not rest
    assert caught.value.__suppress_context__ or caught.value.__context__ is None  # nothing of PyAV's shows
    if isinstance(video, Path):
        assert isinstance(caught.value, VideoError)
        assert str(video) in first


def test_every_hostile_source_is_tested(tmp_path: Path, folder: Path) -> None:
    shutil.copy(folder / "plain.mp4", tmp_path)
    assert set(hostile(tmp_path)) == set(SAYS)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"n_frames": 0}, "n_frames must be at least 1, got 0"),
        ({"n_frames": -3}, "at least 1, got -3"),
        ({"n_frames": 2.5}, "whole number, got 2.5"),
        ({"n_frames": True}, "got True"),
        ({"max_frames": 0}, "max_frames must be at least 1"),
        ({"fps": 0}, "fps must be a finite number above 0, got 0"),
        ({"fps": -1.0}, "got -1.0"),
        ({"fps": float("nan")}, "got nan"),
        ({"fps": float("inf")}, "got inf"),
        ({"fps": "2"}, "got '2'"),
        ({"fps": 1.0}, "does not say; use n_frames"),
        ({"index": [0, 5]}, "frame 5 asked, the video has 5 frames; use 0..4"),
        ({"index": [-1]}, "frame -1 asked"),
        ({"index": []}, "index is empty"),
        ({"index": [0.5]}, "whole numbers"),
        ({"index": 3}, "whole numbers"),
        ({"index": [0, 1, 2], "max_frames": 2}, "names 3 frames, max_frames is 2"),
        ({"n_frames": 4, "fps": 2.0}, "n_frames=4 and fps=2.0 contradict"),
        ({"n_frames": 4, "index": [1]}, "n_frames=4 and index=[1] contradict"),
    ],
)
def test_hostile_arguments(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(array(5), **asked)
    assert says in str(caught.value)


def test_too_big_names_both_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_video, "free_bytes", lambda: 4 * 5 * 3 * 64 * 48)  # a quarter holds five frames
    assert len(read(folder / "plain.mp4", n_frames=5)) == 5
    for asked in ({"n_frames": 6}, {"fps": 2}, {"index": list(range(6))}, {"n_frames": 10**12}):
        with pytest.raises(TooBig, match="46,080"):
            read(folder / "plain.mp4", **asked)
    with pytest.raises(TooBig, match="6 frames of 64 x 48 need 55,296 bytes"):
        read(folder / "plain.mp4", n_frames=6)


def test_free_bytes_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    with_psutil = lab_video.free_bytes()
    monkeypatch.setitem(__import__("sys").modules, "psutil", None)
    assert 0 < lab_video.free_bytes() < 64 * with_psutil


def test_cut_in_mid_stream(folder: Path, tmp_path: Path) -> None:
    how = {**FILES["b_frames.mp4"], "container": {"movflags": "faststart"}}
    path = clips.cut(clips.make(tmp_path / "cut.mp4", **how), 0.6)
    with pytest.warns(LabWarning, match=r"only \d+ of 40 frames can be read"):
        left = probe(path).n_frames
    assert left is not None
    assert 10 < left < 30
    with pytest.warns(LabWarning):
        frames = read(path, n_frames=4)
    assert int(frames.index[-1]) <= left - 1
    assert clips.numbers(frames.pixels) == [round(10 * s) for s in frames.seconds.tolist()]
    path = Path(shutil.copy(folder / "open_gop.mkv", tmp_path))
    with pytest.warns(LabWarning, match=r"only \d+ of about \d+ frames"):
        frames = read(clips.cut(path, 0.6), n_frames=4)
    assert clips.numbers(frames.pixels) == [round(10 * s) for s in frames.seconds.tolist()]


def test_broadcast_joined_late(folder: Path, tmp_path: Path) -> None:
    """A transport stream that begins between two keyframes: frames count from the first that can be shown."""
    data = (folder / "stream.ts").read_bytes()
    path = tmp_path / "late.ts"
    path.write_bytes(data[len(data) // 188 // 4 * 188 :])
    everything = clips.numbers(decoded(path))
    frames = read(path, index=range(probe(path).n_frames or 0))
    assert 20 <= len(frames) < 40
    assert clips.numbers(frames.pixels) == everything[-len(frames) :]
    assert frames.seconds.tolist() == pytest.approx([i / 10 for i in range(len(frames))])


def test_damage_in_the_middle(clip: Path) -> None:
    clips.damage(clip, 0.4, 0.5)
    with pytest.warns(LabWarning, match=r"packets do not decode; [1-9]\d* of 40 chosen frames were replaced"):
        frames = read(clip, index=range(40))
    taken = frames.index.tolist()
    assert taken == sorted(taken)
    assert taken[:5] == [0, 1, 2, 3, 4] and taken[-12:] == list(range(28, 40))
    assert clips.numbers(frames.pixels[-12:]) == list(range(28, 40))
    assert frames.seconds.tolist() == pytest.approx([i / 10 for i in taken])
    assert read(clip, index=[0, 39]).index.tolist() == [0, 39]  # away from the damage nothing is said


def test_frames_that_are_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeking that fails (no index, odd timestamps) falls back to decoding from the start: same frames, no warning."""
    monkeypatch.setattr("lab.video_files._seek", lambda *_: False)
    frames = read(folder / "b_frames.mp4", index=[3, 17, 39])
    assert clips.numbers(frames.pixels) == [3, 17, 39]


def test_without_pyav(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(VideoError, match="pip install av"):
        read(folder / "plain.mp4")
    assert isinstance(read(array(8)), Frames)
