"""Tiny random models of every family the lab knows, and of two it does not, with inputs as a processor gives them.

All share one small vocabulary: ids 0-10 are the special tokens below, ids 20 and up are words. No download, no
processor: `inputs` writes the tensors that transformers' forward takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from lab.carriers import Frames
from lab.preprocessor import Preprocessor

FAMILIES = ("llava_onevision", "llava_next_video", "qwen2_5_vl", "qwen3_vl", "internvl", "video_llama_3")
UNKNOWN = ("qwen3_5", "smolvlm")

PAD, BOS, EOS, IMAGE, VIDEO, VISION_START, VISION_END, IM_START, IM_END, IMG_START, IMG_END = range(11)
WORDS = 20  # first id of a plain word
VOCAB = 256
LAYERS = 5

_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_MARKS = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}


# ---- configs ----------------------------------------------------------------------------------------------------


def _text(model_type: str, **extra: Any) -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 4096,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **extra,
    }  # fmt: skip


def _mrope(section: list[int], **extra: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **extra}


def _square_tower(model_type: str, **extra: Any) -> dict[str, Any]:
    return {
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "image_size": 24, "patch_size": 4, **extra,
    }  # fmt: skip


def _qwen_tower(**extra: Any) -> dict[str, Any]:
    return {
        "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "in_channels": 3,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 64, **extra,
    }  # fmt: skip


def _llava_onevision() -> dict[str, Any]:
    tower = _square_tower("siglip_vision_model", vision_use_head=False)
    grids = {"image_grid_pinpoints": [[24, 24]], "vision_aspect_ratio": "anyres_max_9"}
    return {"text_config": _text("qwen2"), "vision_config": tower, **_IDS, **grids}


def _llava_next_video() -> dict[str, Any]:
    tower = _square_tower("clip_vision_model", projection_dim=32)
    ids = {"image_token_index": IMAGE, "video_token_index": VIDEO, "image_grid_pinpoints": [[24, 24]]}
    return {"text_config": _text("llama"), "vision_config": tower, **ids}


def _qwen2_5_vl() -> dict[str, Any]:
    text = _text("qwen2_5_vl_text", rope_parameters=_mrope([2, 3, 3]))
    # windows of 2 x 2 merged tokens, so that windowed and full layers differ
    tower = _qwen_tower(window_size=16, fullatt_block_indexes=[1, 3])
    return {"text_config": text, "vision_config": tower, **_IDS, **_MARKS}


def _qwen3_vl() -> dict[str, Any]:
    text = _text("qwen3_vl_text", head_dim=16, rope_parameters=_mrope([4, 2, 2], mrope_interleaved=True))
    tower = _qwen_tower(num_position_embeddings=64, deepstack_visual_indexes=[0, 1, 2])
    return {"text_config": text, "vision_config": tower, **_IDS, **_MARKS}


def _internvl() -> dict[str, Any]:
    tower = _square_tower(
        "internvl_vision", image_size=[24, 24], patch_size=[4, 4], layer_scale_init_value=1.0
    )
    return {
        "text_config": _text("qwen2"),
        "vision_config": tower,
        "image_token_id": IMAGE,
        "image_seq_length": 9,
    }


def _video_llama_3() -> dict[str, Any]:
    tower = _square_tower("video_llama_3_vision")
    tower.pop("image_size")
    return {"text_config": _text("qwen2"), "vision_config": tower, **_IDS}


def _qwen3_5() -> dict[str, Any]:
    linear = {
        "linear_conv_kernel_dim": 3, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }  # fmt: skip
    rope = _mrope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5)
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention", "full_attention"]
    text = _text("qwen3_5_text", head_dim=16, rope_parameters=rope, layer_types=kinds, **linear)
    return {"text_config": text, "vision_config": _qwen_tower(num_position_embeddings=64), **_IDS, **_MARKS}


def _smolvlm() -> dict[str, Any]:
    tower = _square_tower("smolvlm_vision")
    return {"text_config": _text("llama"), "vision_config": tower, "image_token_id": IMAGE, "scale_factor": 2}


_CONFIGS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "llava_onevision": ("LlavaOnevision", _llava_onevision),
    "llava_next_video": ("LlavaNextVideo", _llava_next_video),
    "qwen2_5_vl": ("Qwen2_5_VL", _qwen2_5_vl),
    "qwen3_vl": ("Qwen3VL", _qwen3_vl),
    "internvl": ("InternVL", _internvl),
    "video_llama_3": ("VideoLlama3", _video_llama_3),
    "qwen3_5": ("Qwen3_5", _qwen3_5),
    "smolvlm": ("SmolVLM", _smolvlm),
}


def config(name: str, **overrides: Any) -> Any:
    """The tiny config of one family. `overrides` with a dict value are merged into that sub-config."""
    prefix, make = _CONFIGS[name]
    fields = make()
    for key, value in overrides.items():
        fields[key] = {**fields[key], **value} if isinstance(value, dict) and key in fields else value
    return getattr(transformers, f"{prefix}Config")(**fields)


def build(name: str, *, seed: int = 0, std: float = 0.1, **overrides: Any) -> Any:
    """A tiny random model in fp32 eval mode under SDPA: 5 layers, d 64, 4 heads over 2 KV heads, 4 tower layers.

    Weights are drawn afresh with `std`, large enough that every edge and every video token moves the logits.
    """
    prefix, _ = _CONFIGS[name]
    made = config(name, **overrides)
    made._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # transformers draws some vectors (image_newline) itself
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(made).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(std * noise if p.ndim > 1 else p + 0.05 * noise)
    return model


# ---- tokenizers and videos ------------------------------------------------------------------------------------------

_SPECIAL = {
    IMAGE: "<image>", VIDEO: "<video>", VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>",
    IM_START: "<|im_start|>", IM_END: "<|im_end|>", IMG_START: "<img>", IMG_END: "</img>",
}  # fmt: skip


def tokenizer(name: str, chat_template: str | None = None) -> Any:
    """A tokenizer of single characters with the family's special tokens at the ids the tiny configs name."""
    special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", **_SPECIAL}
    if name.startswith("qwen") or name == "video_llama_3":
        special |= {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
    if name == "internvl":
        special[IMAGE] = "<IMG_CONTEXT>"
    letters = ["<unk>", "\n", *map(chr, range(32, 127))]
    vocab = {text: id_ for id_, text in special.items()} | {c: WORDS + i for i, c in enumerate(letters)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    inner.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in special.values()]
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = chat_template
    return made


def clip(frames: int = 3, height: int = 24, width: int = 24, *, fps: float = 2.0, seed: int = 0) -> Frames:
    """Random frames as if every frame of a video of `fps` had been sampled."""
    g = torch.Generator().manual_seed(seed)
    index = torch.arange(frames)
    pixels = torch.randint(0, 256, (frames, 3, height, width), generator=g, dtype=torch.uint8)
    return Frames(pixels, index / fps, index, fps, frames / fps, "random")


def preprocessor(name: str) -> Preprocessor:
    """What the tiny model's checkpoint would ask for; leaves a clip of the tower's size (24 x 24, or any 8k x 8l) unscaled."""
    if name.startswith("qwen") or name == "video_llama_3":
        tubelet = 1 if name == "video_llama_3" else 2
        size = {"shortest_edge": 64, "longest_edge": 10**6}
        return Preprocessor(size=size, patch_size=4, merge_size=2, temporal_patch_size=tubelet)
    return Preprocessor(size={"height": 24, "width": 24})


# ---- inputs -----------------------------------------------------------------------------------------------------


def inputs(name: str, *, worlds: int = 1, pad: int = 0, frames: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """What a processor would hand to `hf(**x)`: different random videos and texts per world.

    The last world is left-padded by `pad`: the other worlds have that many more words after the video.
    """
    g = torch.Generator().manual_seed(seed + 1)
    rows = []
    for world in range(worlds):
        padded = pad and world == worlds - 1
        tail = _words(6 if padded else 6 + pad, g)
        rows.append([PAD] * (pad if padded else 0) + _words(4, g) + _video_ids(name, frames, g) + tail)
    ids = torch.tensor(rows)
    mask = torch.ones_like(ids)
    if pad:
        mask[-1, :pad] = 0
    x = {"input_ids": ids, "attention_mask": mask, **_pixels(name, worlds, frames, g)}
    if name.startswith("qwen"):
        x["mm_token_type_ids"] = 2 * (ids == VIDEO).int() + (ids == IMAGE).int()
    return x


def _words(n: int, g: torch.Generator) -> list[int]:
    return torch.randint(WORDS, VOCAB, (n,), generator=g).tolist()


def _video_ids(name: str, frames: int, g: torch.Generator) -> list[int]:
    """One video as ids: placeholders with the family's marks, labels and timestamps (random words) round them."""
    tubelets = -(-frames // 2)
    if name == "llava_onevision":
        return [VIDEO] * (9 * frames + 1)
    if name == "llava_next_video":
        return [VIDEO] * (9 * frames)
    if name == "qwen2_5_vl":
        return [VISION_START] + [VIDEO] * (6 * tubelets) + [VISION_END]
    groups: list[int] = []
    for i in range(tubelets if name.startswith("qwen3") else frames):
        if name.startswith("qwen3"):
            groups += [*_words(3, g), VISION_START, *[VIDEO] * 6, VISION_END]
        elif name == "video_llama_3":
            groups += [*_words(3 if i == 0 else 4, g), *[VIDEO] * 6]
        else:
            groups += [*_words(2 if i == 0 else 3, g), IMG_START, *[IMAGE] * 9, IMG_END]
    return groups


def _pixels(name: str, worlds: int, frames: int, g: torch.Generator) -> dict[str, Tensor]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    if name.startswith("llava"):
        return {"pixel_values_videos": noise(worlds, frames, 3, 24, 24)}
    if name == "internvl":
        return {"pixel_values": noise(worlds * frames, 3, 24, 24)}
    if name == "smolvlm":
        return {"pixel_values": noise(worlds, frames, 3, 24, 24)}
    # the rest patchify: a grid of 4 x 6 patches a frame, merged 2 x 2 into 2 x 3 tokens
    depth, per_patch = (frames, 3 * 16) if name == "video_llama_3" else (-(-frames // 2), 3 * 2 * 16)
    grid = torch.tensor([[depth, 4, 6]] * worlds)
    x = {"pixel_values_videos": noise(worlds * depth * 24, per_patch), "video_grid_thw": grid}
    if name == "video_llama_3":
        x["video_merge_sizes"] = torch.full((worlds,), 2)
        x["video_compression_mask"] = torch.ones(worlds * depth * 6, dtype=torch.bool)
    if name == "qwen2_5_vl":
        x["second_per_grid_ts"] = torch.full((worlds,), 1.0)
    return x
