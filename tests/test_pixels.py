"""Preprocessing: Pillow's resize bit for bit, transformers' processors tensor by tensor."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import image_processing_backends, video_processing_utils

from lab.carriers import Frames
from lab.errors import ConfigError, UsageError, VideoError
from lab.pixels import (
    Preprocessor,
    center_crop,
    compression_mask,
    normalise,
    pad_to_square,
    patchify,
    qwen_pixels,
    resize,
    smart_resize,
    smart_resize_3d,
    stack_pixels,
    target_size,
)
from lab.preprocessor import RESAMPLE

ORDER = "auto" if int(PIL.__version__.split(".")[0]) >= 13 else "horizontal"  # see lab/resample.py
SHAPES = [(90, 161), (161, 90), (37, 53), (64, 48), (300, 60), (28, 28)]  # (height, width)
ARRAY_SHAPES = [*SHAPES[:3], (300, 60)]


def noise(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (n, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def frames(n: int, height: int, width: int) -> Frames:
    return Frames(noise(n, height, width), torch.arange(n) / 2, torch.arange(n), 2.0, n / 2, "noise")


def pillow(x: Tensor, size: tuple[int, int], number: int) -> Tensor:
    images = [Image.fromarray(f.permute(1, 2, 0).numpy()).resize(size[::-1], number) for f in x]
    return torch.from_numpy(np.stack([np.asarray(i) for i in images])).movedim(-1, 1)


# -- Pillow -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", RESAMPLE)
def test_resize_is_pillow_bit_for_bit(number: int) -> None:
    rng = random.Random(number)
    sides = [1, 2, 3, 7, 16, 33, 64, 90, 161]
    for seed in range(60):
        high, wide, new_high, new_wide = rng.choices(sides, k=4)
        x = noise(1, high, wide, seed)
        x = x if seed % 3 else (x > 127).to(torch.uint8) * 255  # hard edges overshoot: clipping
        got = resize(x, (new_high, new_wide), RESAMPLE[number], ORDER)
        assert torch.equal(got, pillow(x, (new_high, new_wide), number)), (x.shape, got.shape)


@pytest.mark.parametrize(
    ("shape", "size"), [((720, 1280), (448, 448)), ((1280, 720), (384, 384)), ((100, 133), (700, 508))]
)
def test_resize_at_real_sizes(shape: tuple[int, int], size: tuple[int, int]) -> None:
    x = noise(2, *shape)
    assert torch.equal(resize(x, size, "bicubic", ORDER), pillow(x, size, 3))


def test_pass_order_follows_pillow_13() -> None:
    """Tall frames: the vertical pass first where the height loses more than twice the pixels the width loses."""
    for shape, size, first in [
        ((300, 60), (40, 40), "vertical"),
        ((60, 300), (40, 40), "horizontal"),
        ((90, 90), (50, 70), "horizontal"),
    ]:
        x = noise(1, *shape)
        assert torch.equal(resize(x, size), resize(x, size, first=first))  # type: ignore[arg-type]
    x = noise(1, 300, 60)
    apart = (resize(x, (40, 40)).int() - resize(x, (40, 40), first="horizontal").int()).abs()
    assert 0 < apart.max() <= 3
    assert apart.float().mean() < 0.2


def test_torch_resize_is_near_but_not_equal() -> None:
    """What the documentation says of torchvision, whose resize of bytes is this torch function."""
    x = noise(2, 360, 640)
    torchvision = torch.nn.functional.interpolate(x, (384, 384), mode="bicubic", antialias=True)
    apart = (resize(x, (384, 384)).int() - torchvision.int()).abs()
    assert 0 < apart.max() <= 2
    assert (apart > 0).float().mean() < 0.01


def test_many_frames_equal_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(5, 40, 50)
    together = resize(x, (20, 30))
    assert torch.equal(together, torch.cat([resize(f, (20, 30)) for f in x.split(1)]))
    monkeypatch.setattr("lab.resample.CHUNK", 1)
    assert torch.equal(together, resize(x, (20, 30)))


@pytest.mark.parametrize(
    ("x", "size", "how", "says"),
    [
        (torch.zeros(1, 3, 4, 4), (2, 2), "bicubic", "float32"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), (2, 2), "bicubic", "(3, 4, 4)"),
        (noise(1, 4, 4), (2, 2), "cubist", "unknown resample 'cubist'"),
        (noise(1, 4, 4), (0, 2), "box", "(0, 2)"),
    ],
)
def test_resize_refuses(x: Tensor, size: tuple[int, int], how: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        resize(x, size, how)
    assert says in str(caught.value)


# -- transformers' image processors (Pillow and numpy): 0 difference ----------------------------------------------


def processor(module: str, name: str, **changes: Any) -> Any:
    return getattr(
        importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name
    )(**changes)


def saved(processor: Any, folder: Path) -> Preprocessor:
    """Through the json that transformers itself writes."""
    processor.save_pretrained(folder)
    return Preprocessor.from_folder(folder)


STACKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "square": ("siglip", "SiglipImageProcessorPil", {"size": {"height": 56, "width": 56}}),
    "oblong": ("siglip", "SiglipImageProcessorPil", {"size": {"height": 64, "width": 48}, "resample": 2}),
    "short side and crop": ("clip", "CLIPImageProcessorPil", {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}),
    "crop larger than frame": ("clip", "CLIPImageProcessorPil", {"size": {"shortest_edge": 33}, "crop_size": {"height": 50, "width": 31}}),
    "both edges": ("siglip", "SiglipImageProcessorPil", {"size": {"shortest_edge": 40, "longest_edge": 60}}),
    "edges met": ("siglip", "SiglipImageProcessorPil", {"size": {"shortest_edge": 37, "longest_edge": 60}}),
    "not rescaled": ("siglip", "SiglipImageProcessorPil", {"size": {"height": 30, "width": 40}, "do_rescale": False}),
    "not normalised": ("siglip", "SiglipImageProcessorPil", {"size": {"height": 30, "width": 40}, "do_normalize": False}),
    "other factor": ("siglip", "SiglipImageProcessorPil", {"size": {"height": 30, "width": 40}, "rescale_factor": 1 / 127.5}),
    "not resized": ("clip", "CLIPImageProcessorPil", {"do_resize": False, "crop_size": {"height": 21, "width": 200}}),
}  # fmt: skip


@pytest.fixture
def same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed Pillow's pass order, so that an older Pillow is compared like with like."""
    monkeypatch.setattr("lab.pixels.resize", lambda x, size, how: resize(x, size, how, ORDER))


@pytest.mark.usefixtures("same_order")
@pytest.mark.parametrize("name", STACKS)
def test_stack_equals_image_processor(tmp_path: Path, name: str) -> None:
    module, kind, changes = STACKS[name]
    theirs = processor(module, kind, **changes)
    pre = saved(theirs, tmp_path)
    for shape in SHAPES:
        clip = frames(2, *shape)
        want = theirs(list(clip.pixels.numpy()), input_data_format="channels_first", return_tensors="pt")[
            "pixel_values"
        ]
        assert torch.equal(stack_pixels(clip, pre), want), shape


@pytest.mark.usefixtures("same_order")
def test_llava_onevision_base_image(tmp_path: Path) -> None:
    """The first crop of the image processor is the whole picture resized, as a video frame is."""
    theirs = processor(
        "llava_onevision",
        "LlavaOnevisionImageProcessorPil",
        size={"height": 56, "width": 56},
        image_grid_pinpoints=[[56, 56]],
    )
    pre = saved(theirs, tmp_path)
    for shape in SHAPES:
        clip = frames(1, *shape)
        want = theirs(clip.pixels[0].numpy(), input_data_format="channels_first", return_tensors="pt")[
            "pixel_values"
        ]
        assert torch.equal(stack_pixels(clip, pre), want[0, :1])


@pytest.mark.usefixtures("same_order")
def test_internvl_picture(tmp_path: Path) -> None:
    theirs = processor(
        "got_ocr2", "GotOcr2ImageProcessorPil", size={"height": 56, "width": 56}, crop_to_patches=False
    )
    pre = saved(theirs, tmp_path)
    clip = frames(2, 90, 161)
    want = theirs(list(clip.pixels.numpy()), input_data_format="channels_first", return_tensors="pt")[
        "pixel_values"
    ]
    assert torch.equal(stack_pixels(clip, pre), want)


def test_pad_to_square_equals_llava(tmp_path: Path) -> None:
    theirs = processor("llava_onevision", "LlavaOnevisionImageProcessorPil")
    mean = (0.5, 0.4, 0.3)
    for shape in SHAPES:
        x = noise(2, *shape)
        want = theirs.pad_to_square(x[1].numpy(), tuple(int(m * 255) for m in mean))
        assert torch.equal(pad_to_square(x, mean)[1], torch.from_numpy(want))
    said = {"size": {"height": 8, "width": 8}, "image_mean": mean, "image_std": mean, "do_pad": True}
    pre = Preprocessor.from_folder({**said, "image_processor_type": "LlavaImageProcessor"})
    assert pre.pad_to_square and not Preprocessor.from_folder(said).pad_to_square
    padded = dataclasses.replace(frames(1, 20, 12), pixels=pad_to_square(frames(1, 20, 12).pixels, mean))
    assert torch.equal(
        stack_pixels(frames(1, 20, 12), pre),
        stack_pixels(padded, dataclasses.replace(pre, pad_to_square=False)),
    )


@pytest.mark.usefixtures("same_order")
@pytest.mark.parametrize("temporal", [1, 2])
@pytest.mark.parametrize(
    ("module", "name"),
    [("qwen2_vl", "Qwen2VLImageProcessorPil"), ("video_llama_3", "VideoLlama3ImageProcessorPil")],
)
def test_patches_equal_image_processor(tmp_path: Path, module: str, name: str, temporal: int) -> None:
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 20}
    theirs = processor(module, name, size=size, temporal_patch_size=temporal, merge_size=2)
    pre = saved(theirs, tmp_path)
    for shape in SHAPES:
        clip = frames(1, *shape)
        want = theirs(list(clip.pixels.numpy()), input_data_format="channels_first", return_tensors="pt")
        patches, grid = qwen_pixels(clip, pre)
        assert torch.equal(grid, want["image_grid_thw"])
        assert torch.equal(patches, want["pixel_values"])


# -- transformers' video processors: their own code, with torchvision's primitives played by Pillow and torch ------


def _stand_in() -> types.SimpleNamespace:
    def each(x: Tensor, size: tuple[int, int], number: int) -> Tensor:
        return pillow(x.flatten(0, -4), tuple(size), number).unflatten(0, x.shape[:-3])

    return types.SimpleNamespace(
        resize=lambda x, size, interpolation, antialias: each(x, size, interpolation),
        normalize=lambda x, mean, std, inplace=False: (x - torch.as_tensor(mean)[:, None, None]) / torch.as_tensor(std)[:, None, None],
        crop=lambda x, top, left, height, width: x[..., top : top + height, left : left + width],
        grayscale_to_rgb=lambda x: x,
        InterpolationMode=types.SimpleNamespace(LANCZOS="lanczos", BILINEAR="bilinear"),
    )  # fmt: skip


@pytest.fixture
def video_processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds one of transformers' video processors. torchvision itself has no build that fits every torch."""
    stub = _stand_in()
    parts = ["torchvision", "transforms", "v2", "functional"]
    for i in range(len(parts), 0, -1):
        module: Any = types.ModuleType(".".join(parts[:i]))
        module.__dict__.update(
            vars(stub) if i == len(parts) else {parts[i]: sys.modules[".".join(parts[: i + 1])]}
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for module in (image_processing_backends, video_processing_utils):
        monkeypatch.setattr(module, "tvF", stub, raising=False)
    monkeypatch.setattr(
        image_processing_backends, "pil_torch_interpolation_mapping", {i: i for i in RESAMPLE}, raising=False
    )

    def build(module: str, name: str, **changes: Any) -> Any:
        spec = importlib.util.find_spec(f"transformers.models.{module}.video_processing_{module}")
        assert spec is not None and spec.loader is not None
        built = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, built)  # built on the stand-in: out again after the test
        spec.loader.exec_module(built)
        return getattr(built, name)(do_convert_rgb=False, do_sample_frames=False, **changes)

    return build


def outputs(theirs: Any, clip: Frames) -> Any:
    return theirs(clip.pixels, return_tensors="pt", input_data_format="channels_first", return_metadata=False)


@pytest.mark.usefixtures("same_order")
@pytest.mark.parametrize(
    ("module", "name", "changes"),
    [
        ("llava_onevision", "LlavaOnevisionVideoProcessor", {"size": {"height": 56, "width": 56}}),
        (
            "llava_next_video",
            "LlavaNextVideoVideoProcessor",
            {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}},
        ),
        ("internvl", "InternVLVideoProcessor", {"size": {"height": 56, "width": 56}}),
    ],
)
def test_stack_equals_video_processor(
    tmp_path: Path, video_processor: Any, module: str, name: str, changes: dict[str, Any]
) -> None:
    theirs = video_processor(module, name, **changes)
    pre = saved(theirs, tmp_path)
    for shape in SHAPES:
        clip = frames(3, *shape)
        want = outputs(theirs, clip)["pixel_values_videos"][0]
        # fused scaling and normalising rounds differently there: values up to 2.7, so a few units of the last place
        torch.testing.assert_close(stack_pixels(clip, pre), want, rtol=0, atol=1e-6)


QWENS = {
    "qwen2_5_vl": ("qwen2_vl", "Qwen2VLVideoProcessor", {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 20}, "temporal_patch_size": 2}),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLVideoProcessor", {"size": {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 60}}),
    "qwen3_vl roomy": ("qwen3_vl", "Qwen3VLVideoProcessor", {"size": {"shortest_edge": 32 * 32 * 90, "longest_edge": 32 * 32 * 900}}),
    "video_llama_3": ("video_llama_3", "VideoLlama3VideoProcessor", {"size": {"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 60}}),
}  # fmt: skip


@pytest.mark.usefixtures("same_order")
@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("name", QWENS)
def test_patches_equal_video_processor(tmp_path: Path, video_processor: Any, name: str, n: int) -> None:
    module, kind, changes = QWENS[name]
    theirs = video_processor(module, kind, **changes)
    pre = saved(theirs, tmp_path)
    for shape in ARRAY_SHAPES:
        clip = frames(n, *shape)
        want = outputs(theirs, clip)
        patches, grid = qwen_pixels(clip, pre)
        assert torch.equal(grid, want["video_grid_thw"])
        torch.testing.assert_close(patches, want["pixel_values_videos"], rtol=0, atol=1e-6)
        if "video_compression_mask" in want:
            assert torch.equal(
                compression_mask(patches, grid, pre.merge_size), want["video_compression_mask"]
            )


@pytest.mark.usefixtures("same_order")
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_capped_pixels(tmp_path: Path, video_processor: Any, name: str) -> None:
    module, kind, changes = QWENS[name]
    try:
        theirs = video_processor(module, kind, **changes, cap_pixels_per_frame=True, max_video_tokens=12)
    except TypeError:  # transformers before 5.20 has no such limit, and writes no such field
        assert not Preprocessor.from_folder(
            {**JSON, "patch_size": 14, "size": changes["size"]}
        ).cap_pixels_per_frame
        return
    pre = saved(theirs, tmp_path)
    free = dataclasses.replace(pre, cap_pixels_per_frame=False)
    for n in (2, 5, 9):
        want = outputs(theirs, frames(n, 90, 161))
        assert torch.equal(qwen_pixels(frames(n, 90, 161), pre)[1], want["video_grid_thw"])
    assert any(target_size(pre, n, 90, 161) != target_size(free, n, 90, 161) for n in (2, 5, 9))


def test_compression_keeps_what_moves() -> None:
    still = torch.zeros(3, 8, 5)
    still[1, 4:] = 1.0  # frame 1: the second merged token of two changes, and changes back in frame 2
    mask = compression_mask(still.flatten(0, 1), torch.tensor([[3, 2, 4]]), 2)
    assert mask.tolist() == [True, True, False, True, False, True]
    assert (
        compression_mask(torch.zeros(24, 5), torch.tensor([[3, 2, 4]]), 2).tolist()
        == [True, True] + [True, False] * 2
    )
    assert compression_mask(torch.zeros(8, 5), torch.tensor([[1, 2, 4]]), 2).all()


# -- building blocks ----------------------------------------------------------------------------------------------


def test_patchify_order() -> None:
    """Each pixel holds its own address; a patch must hold the pixels its place says."""
    n, patch, merge, rows, cols = 3, 2, 2, 4, 6
    at = torch.arange(n * 3 * rows * patch * cols * patch).float().reshape(n, 3, rows * patch, cols * patch)
    patches, grid = patchify(at, patch, 2, merge)
    assert grid.tolist() == [[2, rows, cols]]
    assert patches.shape == (2 * rows * cols, 3 * 2 * patch * patch)
    filled = torch.cat([at, at[-1:]])
    k = 0
    for t in range(2):
        for big_row in range(rows // merge):
            for big_col in range(cols // merge):
                for row in range(big_row * merge, (big_row + 1) * merge):
                    for col in range(big_col * merge, (big_col + 1) * merge):
                        want = filled[
                            2 * t : 2 * t + 2,
                            :,
                            row * patch : (row + 1) * patch,
                            col * patch : (col + 1) * patch,
                        ]
                        assert torch.equal(patches[k], want.transpose(0, 1).flatten())
                        k += 1
    with pytest.raises(ConfigError, match="12 x 8 do not divide into 2 x 2 patches of 3"):
        patchify(at, 3, 2, merge)


def test_single_frame_fills_its_tubelet() -> None:
    pre = Preprocessor.from_folder(
        {
            **JSON,
            "patch_size": 16,
            "size": {"shortest_edge": 1024, "longest_edge": 65536},
            "processor_class": "Qwen3VLProcessor",
        }
    )
    assert pre.budget == "video"
    one, grid = qwen_pixels(frames(1, 64, 64), pre)
    twice, grid_of_two = qwen_pixels(
        dataclasses.replace(frames(2, 64, 64), pixels=frames(1, 64, 64).pixels.repeat(2, 1, 1, 1)), pre
    )
    assert torch.equal(one, twice) and torch.equal(grid, grid_of_two)


def test_smart_resize_by_hand() -> None:
    assert smart_resize(100, 200, 28, 56 * 56, 28 * 28 * 1280) == (112, 196)
    assert smart_resize(1080, 1920, 28, 56 * 56, 28 * 28 * 100) == (196, 364)
    assert smart_resize(10, 20, 28, 56 * 56, 28 * 28 * 1280) == (56, 84)
    assert smart_resize_3d(8, 100, 200, 32, 4096, 32 * 32 * 768) == (96, 192)
    with pytest.raises(VideoError, match="aspect ratio 300, at most 200"):
        smart_resize(10, 3000, 28, 1, 10**9)


def test_center_crop_equals_numpy_version() -> None:
    from transformers.image_transforms import center_crop as theirs

    for size in [(3, 4), (9, 9), (20, 5), (5, 20), (13, 11)]:
        x = noise(1, 12, 11)
        want = theirs(x[0].numpy(), size, data_format="channels_first", input_data_format="channels_first")
        assert torch.equal(center_crop(x, size)[0], torch.from_numpy(want)), size


def test_normalise_looks_up_exactly() -> None:
    x = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, :, None]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    scaled = (np.arange(256).astype(np.float64) * (1 / 255)).astype(np.float32)
    want = np.stack([(scaled - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)])
    assert torch.equal(normalise(x, mean, std)[0, :, :, 0], torch.from_numpy(want))
    assert torch.equal(normalise(x, None, None, None), x.float())


def test_target_size_needs_no_pixels() -> None:
    pre = Preprocessor.from_folder({**JSON, "size": {"shortest_edge": 100}})
    assert target_size(pre, 8, 1080, 1920) == (100, 177)
    assert target_size(pre, 8, 1920, 1080) == (177, 100)


# -- the json -----------------------------------------------------------------------------------------------------

JSON: dict[str, Any] = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def test_video_json_wins_over_image_json(tmp_path: Path) -> None:
    def write(name: str, content: Any) -> int:
        (tmp_path / name).write_text(json.dumps(content))
        return Preprocessor.from_folder(tmp_path).size["height"]

    square = lambda side: {**JSON, "size": {"height": side, "width": side}}  # noqa: E731
    assert write("processor_config.json", {"image_processor": square(1)}) == 1
    assert write("preprocessor_config.json", square(2)) == 2
    assert write("video_preprocessor_config.json", square(3)) == 3
    assert write("processor_config.json", {"image_processor": square(1), "video_processor": square(4)}) == 4
    assert write("processor_config.json", {"chat_template": "x"}) == 3
    assert Preprocessor.from_folder(tmp_path / "preprocessor_config.json").size["height"] == 2


def test_forms_of_size() -> None:
    def size(**changes: Any) -> dict[str, int]:
        return Preprocessor.from_folder({**JSON, **changes}).size

    assert size(size=224) == {"height": 224, "width": 224}
    assert size(size=[224, 336]) == {"height": 224, "width": 336}
    assert size(size=224, crop_size=224) == {"shortest_edge": 224}
    assert size(size={"shortest_edge": 9, "longest_edge": None}) == {"shortest_edge": 9}
    edges = {"shortest_edge": 3136, "longest_edge": 12845056}
    for said in (
        {"size": None, "min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"min_pixels": 3136, "max_pixels": 12845056}},
        {"size": edges},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3136, "max_pixels": 12845056},
    ):
        assert size(patch_size=14, **said) == edges


def test_families_are_told_apart() -> None:
    edges = {**JSON, "patch_size": 14, "size": {"shortest_edge": 4, "longest_edge": 400}}
    for kind, budget, temporal in [
        ("Qwen2VLImageProcessor", "frame", 2),
        ("Qwen3VLVideoProcessor", "video", 2),
        ("VideoLlama3ImageProcessor", "share", 1),
    ]:
        pre = Preprocessor.from_folder({**edges, "video_processor_type": kind})
        assert (pre.budget, pre.temporal_patch_size, pre.merge_size) == (budget, temporal, 2)
    assert (
        Preprocessor.from_folder(
            {
                **edges,
                "image_processor_type": "Qwen2VLImageProcessorFast",
                "processor_class": "Qwen3VLProcessor",
            }
        ).budget
        == "video"
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": None}, "size must be given"),
        ({"size": {}}, "size must be positive whole numbers"),
        ({"size": {"height": -8, "width": 8}}, "got {'height': -8, 'width': 8}"),
        ({"size": {"height": 8}}, "size must be given, as height and width"),
        ({"size": {"diagonal": 8}}, "diagonal"),
        ({"size": [1, 2, 3]}, "[1, 2, 3]"),
        ({"size": "big"}, "got 'big'"),
        ({"size": True}, "got True"),
        ({"patch_size": 14}, "found None and None"),
        ({"patch_size": 14, "size": {"shortest_edge": 9, "longest_edge": 4}}, "found 9 and 4"),
        (
            {"patch_size": 0, "size": {"shortest_edge": 1, "longest_edge": 4}},
            "patch_size must be a whole number",
        ),
        ({"patch_size": 14.5, "size": {"shortest_edge": 1, "longest_edge": 4}}, "got 14.5"),
        ({"resample": 9}, "resample must be one of 0 (nearest)"),
        ({"resample": "spline"}, "spline"),
        ({"image_mean": None}, "needs image_mean and image_std"),
        ({"image_mean": [0.5]}, "image_mean must be three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "three positive numbers"),
        ({"rescale_factor": 0}, "rescale_factor must be a positive number"),
        ({"rescale_factor": float("nan")}, "nan"),
        ({"do_resize": "yes"}, "do_resize must be true or false"),
        ({"fps": -1}, "fps must be a positive number"),
        ({"max_frames": "many"}, "max_frames must be a whole number"),
    ],
)
def test_nonsense_in_json(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Preprocessor.from_folder({**JSON, **changes})
    assert says in str(caught.value)


def test_unreadable_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no preprocessor json; looked for processor_config.json"):
        Preprocessor.from_folder(tmp_path)
    for text, says in [("{", "cannot be read as json"), ("[1]", "must hold a json object, holds list")]:
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(ConfigError, match=says):
            Preprocessor.from_folder(tmp_path)


def test_wrong_style_is_refused() -> None:
    patched = Preprocessor.from_folder(
        {**JSON, "patch_size": 14, "size": {"shortest_edge": 4, "longest_edge": 4000}}
    )
    with pytest.raises(ConfigError, match="use qwen_pixels"):
        stack_pixels(frames(1, 8, 8), patched)
    with pytest.raises(ConfigError, match="use stack_pixels"):
        qwen_pixels(frames(1, 8, 8), Preprocessor.from_folder(JSON))
    with pytest.raises(ConfigError, match="no crop_size"):
        stack_pixels(frames(1, 8, 8), Preprocessor.from_folder({**JSON, "do_center_crop": True}))
    empty = dataclasses.replace(
        frames(1, 8, 8),
        pixels=torch.zeros(0, 3, 8, 8, dtype=torch.uint8),
        seconds=torch.zeros(0),
        index=torch.zeros(0),
    )
    with pytest.raises(VideoError, match="no pixels"):
        stack_pixels(empty, Preprocessor.from_folder(JSON))


def test_stays_on_the_device_it_is_given() -> None:
    """On the meta device any silent move to the CPU would raise."""
    clip = dataclasses.replace(frames(2, 30, 40), pixels=frames(2, 30, 40).pixels.to("meta"))
    crop = Preprocessor.from_folder(
        {**JSON, "size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 24}}
    )
    assert stack_pixels(clip, crop).device.type == "meta"
    pre = Preprocessor.from_folder(
        {**JSON, "patch_size": 14, "size": {"shortest_edge": 4, "longest_edge": 4000}}
    )
    patches, grid = qwen_pixels(clip, pre)
    assert patches.device.type == grid.device.type == "meta"
