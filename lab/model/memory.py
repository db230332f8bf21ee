"""How much memory a model will take, from its config alone: weights, vision tower, key/value cache, activations.

The counts follow what the modules keep alive at their widest moment, found by recording every allocation of the tiny
models of all families. A prediction is the peak of one prompt with a video and some new tokens. On a CPU it is what
the process grows by (resident size); on a GPU what the device holds, with the CUDA context.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.carriers import Frames
from lab.errors import LabError, ModelError, UsageError
from lab.model import anatomy
from lab.model.families.base import Family, find

MIB = 2**20
CPU_OVERHEAD = 40 * MIB  # MKL's and oneDNN's buffers, tokenizer, Python objects: seen 25 to 45 MiB
CUDA_OVERHEAD = (
    600 * MIB
)  # CUDA context (about 500) and cuBLAS workspaces; torch's own counters leave them out
HEAP_BLOCK = (
    32 * MIB
)  # glibc returns larger freed blocks at once; of smaller ones its heap keeps two (trim threshold)
MOST_FRAMES = 100_000  # 14 hours at 2 a second; every frame's tokens are listed
LABEL_CHARS = 3  # characters a token, in labels and timestamps between frames
LINES = ("weights", "inputs", "tower", "kv", "activations", "overhead", "loading", "total")


@dataclass(frozen=True)
class MemoryEstimate(Mapping[str, int]):
    """Predicted bytes, line by line. As a mapping: line -> bytes.

    weights      parameters and buffers, tied ones once
    inputs       the video as frames and as the tower's pixels (on a GPU: the pixels)
    tower        the vision side at its widest; gone when the decoder starts
    kv           keys and values of the prompt and the new tokens
    activations  the decoder at its widest layer, with the state at its door and the logits of one position
    overhead     what libraries take for themselves
    loading      what loading holds beside the weights: mapped pages of a file in another dtype (the system can drop
                 them, but they count as resident), or a piece of a weight while it is checked
    total        weights + overhead + the largest of: loading, inputs + tower, inputs + kv + activations
    positions    length of the prompt; patches: what the tower sees
    notes        one sentence a line; extras: bytes of what may be asked for on top
    """

    weights: int
    inputs: int
    tower: int
    kv: int
    activations: int
    overhead: int
    loading: int
    positions: int
    patches: int
    notes: dict[str, str]
    extras: dict[str, int]

    @property
    def total(self) -> int:
        running = self.inputs + max(self.tower, self.kv + self.activations)
        return self.weights + self.overhead + max(self.loading, running)

    def __getitem__(self, line: str) -> int:
        if line not in LINES:
            raise KeyError(line)
        return int(getattr(self, line))

    def __iter__(self) -> Iterator[str]:
        return iter(LINES)

    def __len__(self) -> int:
        return len(LINES)

    def __str__(self) -> str:
        rows = [f"{name:12} {self[name] / MIB:10,.1f} MiB  {self.notes[name]}" for name in LINES]
        more = [f"{name:12} {n / MIB:10,.1f} MiB  on top, if asked for" for name, n in self.extras.items()]
        return "\n".join([*rows, *more])


def predict(
    model: Any, *, n_frames: int = 8, dtype: Any = None, device: Any = None, width: int = 640, height: int = 360,
    text_tokens: int = 64, new_tokens: int = 64, chunk: int | None = None,
) -> MemoryEstimate:  # fmt: skip
    """Predict the peak memory of loading a model and answering one question about a video.

    model         "tiny", a folder, a hub id, a transformers config, or a loaded VideoLLM; no weights are read
    dtype         of the run; None: the checkpoint's on a GPU, float32 on a CPU (as `lab.load` does)
    device        None: a GPU if there is one
    width, height of the video in pixels; they count where the family keeps the video's own size
    text_tokens   question, options and template; labels between frames are counted apart
    chunk         prefill in pieces of so many positions
    Raises ModelError if there is no such model, UsageError for numbers that make no sense.
    """
    for name, value in (
        ("n_frames", n_frames),
        ("width", width),
        ("height", height),
        ("new_tokens", new_tokens),
    ):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if n_frames > MOST_FRAMES:
        raise UsageError(f"n_frames is {n_frames:,}, predictions end at {MOST_FRAMES:,}; give fewer")
    if chunk is not None and chunk < 1:
        raise UsageError(f"chunk must be at least 1 position, got {chunk}")
    config, preprocessor, where = _config(model)
    kind = _device(device, model)
    held = _held_dtype(model, config)
    run_dtype = _dtype(dtype, kind, held, loaded=hasattr(model, "hf"))
    video = _video(find(config), config, preprocessor, (n_frames, width, height), text_tokens)
    sizes = _Sizes.of(config)
    weights, largest = _weights(model, config, run_dtype, where)
    return _estimate(config, sizes, video, kind, held, run_dtype, weights, largest, new_tokens, chunk)


# ---- what is asked about ------------------------------------------------------------------------------------------


def _config(model: Any) -> tuple[Any, Any, str]:
    """(config, preprocessor or None, what messages call it)."""
    hf = getattr(model, "hf", None)
    if hf is not None:
        return hf.config, model.preprocessor, model.cfg.model_name
    if hasattr(model, "model_type"):
        return model, None, str(model.model_type)
    if not isinstance(model, (str, Path)):
        raise UsageError(f"expected a name, folder, config or loaded model, got {type(model).__name__}")
    from lab.model.zoo import _first_line, _locate, _preprocessor

    folder, where = _locate(model)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return config, _preprocessor(folder, None), where
    except LabError:
        raise
    except Exception as e:  # transformers and the hub raise many kinds; all mean that there is no such config
        raise ModelError(f"{where}: its config cannot be read: {_first_line(e)}") from e


def _device(device: Any, model: Any) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except (RuntimeError, TypeError) as e:
            raise UsageError(f"device {device!r} is unknown: {str(e).splitlines()[0]}") from None
    if hasattr(model, "hf"):
        return model.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _held_dtype(model: Any, config: Any) -> torch.dtype:
    """Dtype of the loaded weights, or of the file as its config says."""
    if hasattr(model, "hf"):
        return model.dtype
    text = getattr(config, "text_config", None)
    found = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found


def _dtype(dtype: Any, device: torch.device, held: torch.dtype, *, loaded: bool) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" and not loaded else held
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype {dtype!r} is not one of float32, bfloat16, float16, float64")
    return found


def _weights(model: Any, config: Any, dtype: torch.dtype, where: str) -> tuple[int, int]:
    """(bytes of all weights, elements of the largest one), from a model without storage."""
    hf = getattr(model, "hf", None) or _skeleton(config, where)
    tensors: list[Tensor] = [*hf.parameters(), *hf.buffers()]
    size = torch.finfo(dtype).bits // 8
    # integer buffers and packed (quantised) weights keep their own width
    total = sum(t.numel() * (size if t.is_floating_point() else t.element_size()) for t in tensors)
    return total, max(t.numel() for t in tensors)


def _skeleton(config: Any, where: str) -> nn.Module:
    """The model on the meta device: every shape, no memory."""
    from transformers import AutoModelForImageTextToText

    from lab.model.zoo import _first_line

    try:
        with torch.device("meta"):
            made = AutoModelForImageTextToText.from_config(config)
        made.tie_weights()
    except Exception as e:  # an unknown or broken config may fail anywhere inside
        raise ModelError(f"{where}: no model can be made from its config: {_first_line(e)}") from e
    return made


# ---- the video ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Video:
    """What the video becomes: bytes of its frames, elements of its pixels, tower patches, prompt positions."""

    frame_bytes: int
    pixels: int
    patches: int
    tokens: int
    positions: int


def _frames(n: int, width: int, height: int, device: str) -> Frames:
    """Frames without content: shapes alone decide where the tokens are."""
    pixels = torch.zeros(n, 3, height, width, dtype=torch.uint8, device=device)
    return Frames(pixels, torch.arange(n) / 2, torch.arange(n), 2.0, n / 2, "predicted")


def _pixels(
    family: Family, config: Any, preprocessor: Any, shape: tuple[int, int, int]
) -> tuple[Frames, Any, Any]:
    """What the family makes of such frames: on the meta device at no cost, on the CPU where it reads its own numbers."""
    try:
        frames = _frames(*shape, "meta")
        return frames, *family.pixels(frames, config, preprocessor)
    except (NotImplementedError, RuntimeError):
        frames = _frames(*shape, "cpu")
        return frames, *family.pixels(frames, config, preprocessor)


def _video(
    family: Family, config: Any, preprocessor: Any, shape: tuple[int, int, int], text_tokens: int
) -> _Video:
    try:
        frames, inputs, grid = _pixels(family, config, preprocessor, shape)
    except UsageError:
        return _unknown_video(config, shape, text_tokens)
    texts = [s.text for s in family.video_spans(frames, grid) if s.text]
    labels = sum(1 if t in family.marks else -(-len(t) // LABEL_CHARS) for t in texts)
    pixels = next(v for k, v in inputs.items() if k.startswith("pixel_values"))
    positions = len(grid) + labels + text_tokens
    return _Video(frames.pixels.nbytes, pixels.numel(), _patches(config, pixels), len(grid), positions)


def _patches(config: Any, pixels: Tensor) -> int:
    """Rows the tower works on: given as patches [patch, feature], or cut from square frames [..., 3, side, side]."""
    if pixels.ndim == 2:
        return pixels.shape[0]
    first = prod(pixels.shape[:-3])
    return first * (
        _square(config.vision_config, pixels.shape[-1]) + 1
    )  # + 1: most square towers have a class token


def _square(vision: Any, side: int) -> int:
    patch = getattr(vision, "patch_size", 14)
    return (side // (patch[0] if isinstance(patch, (list, tuple)) else patch)) ** 2


def _unknown_video(config: Any, shape: tuple[int, int, int], text_tokens: int) -> _Video:
    """Families whose pixels the lab does not know: square frames of the tower's size, merged as the config says."""
    vision = getattr(config, "vision_config", None)
    side = getattr(vision, "image_size", None) or 384
    side = side[0] if isinstance(side, (list, tuple)) else side
    merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None) or 1
    patches = shape[0] * _square(vision, side)
    tokens = patches // int(merge) ** 2
    return _Video(3 * prod(shape), 3 * shape[0] * side * side, patches, tokens, tokens + text_tokens)


# ---- sizes and terms ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    """Widths of decoder and tower."""

    layers: int
    attention_layers: int
    d: int
    mlp: int
    heads: int
    kv_heads: int
    d_head: int
    vocab: int
    deep: int
    tower_d: int
    tower_mlp: int
    tower_gated: bool
    tower_rope: bool

    @staticmethod
    def of(config: Any) -> _Sizes:
        c = config.get_text_config(decoder=True)
        v = getattr(config, "vision_config", None)
        kinds = list(getattr(c, "layer_types", None) or ["full_attention"] * c.num_hidden_layers)
        width = getattr(v, "hidden_size", None) or getattr(v, "embed_dim", 0) or 0
        kind = str(getattr(v, "model_type", ""))
        act = str(getattr(v, "hidden_act", ""))
        return _Sizes(
            layers=c.num_hidden_layers, attention_layers=sum(k.endswith("attention") and k != "linear_attention" for k in kinds),
            d=c.hidden_size, mlp=_mlp_width(c), heads=c.num_attention_heads,
            kv_heads=getattr(c, "num_key_value_heads", None) or c.num_attention_heads, d_head=anatomy.head_size(c),
            vocab=c.vocab_size, deep=len(getattr(v, "deepstack_visual_indexes", None) or ()),
            tower_d=width, tower_mlp=getattr(v, "intermediate_size", 0) or 4 * width,
            # three wide tensors at once: gate, up and product; or quick_gelu's x, sigmoid and product
            tower_gated=kind.startswith("qwen2_5") or act == "quick_gelu", tower_rope=kind.startswith(("qwen", "video_llama")),
        )  # fmt: skip


def _mlp_width(c: Any) -> int:
    """Widest MLP activation of one position; mixtures of experts run `num_experts_per_tok` experts for it."""
    expert = getattr(c, "moe_intermediate_size", 0) or 0
    return max(getattr(c, "intermediate_size", 0) or 0, expert * (getattr(c, "num_experts_per_tok", 1) or 1))


def _tower(s: _Sizes, patches: int, size: int, cpu: bool) -> int:
    """Bytes alive at once in a tower layer: in attention, or in the MLP (earlier layers leave nothing behind).

    Attention: layer input, its norm, q, k, v, the heads' output, its contiguous copy, the projection: 8 widths. Rope is
    computed in float32: rotated and half-turned copies, and in half precision q and k themselves once more.
    MLP: 4 widths of residual stream and 2 or 3 of its own.
    """
    rope = (12 if size == 4 else 20) * s.tower_d if s.tower_rope else 0
    attention = patches * (8 * s.tower_d * size + rope)
    narrow, wide = patches * s.tower_d * size, patches * s.tower_mlp * size
    mlp = 4 * narrow + (3 if s.tower_gated else 2) * wide
    return max(attention, mlp + _left_over(narrow, wide, cpu))


def _left_over(narrow: int, wide: int, cpu: bool) -> int:
    """Freed blocks of attention that stay with the process while the MLP takes blocks of another kind."""
    return 2 * narrow if cpu and narrow <= HEAP_BLOCK < wide else 0


def _connector(s: _Sizes, video: _Video) -> int:
    """Tower output, and the projector's two widest tensors: before any pooling where the tower's patches are more."""
    return video.patches * (2 * s.tower_d) + 2 * max(video.tokens, _unpooled(s, video)) * s.d


def _unpooled(s: _Sizes, video: _Video) -> int:
    # towers with merging project what is merged already; LLaVA's square towers project every patch, then pool
    return 0 if s.tower_rope else video.patches


def _decoder(s: _Sizes, rows: int, size: int, cpu: bool) -> int:
    """Bytes alive at once in a decoder layer over `rows` positions, beside cache and door.

    MLP: gate, up and product; layer input, residual and norm. Attention: layer input and norm, q before and after rope
    and while it is turned, k and v, the heads' output. Both: cos and sin.
    """
    q, kv = s.heads * s.d_head, s.kv_heads * s.d_head
    attention = rows * (2 * s.d + 7 * q // 2 + 3 * kv) * size
    narrow, wide = rows * s.d * size, rows * s.mlp * size
    mlp = 3 * narrow + 3 * wide
    return rows * 2 * s.d_head * size + max(attention, mlp + _left_over(narrow, wide, cpu))


def _masked(s: _Sizes, rows: int, positions: int, size: int) -> int:
    """Bytes a masked layer takes on top: the mask as bool and as bias, keys and values repeated to all heads."""
    return rows * positions * (1 + size) + 2 * positions * s.heads * s.d_head * size


def _estimate(
    config: Any, s: _Sizes, video: _Video, device: torch.device, held: torch.dtype, dtype: torch.dtype, weights: int,
    largest: int, new_tokens: int, chunk: int | None,
) -> MemoryEstimate:  # fmt: skip
    size, n = torch.finfo(dtype).bits // 8, video.positions
    cpu = device.type == "cpu"
    rows = n if chunk is None else min(chunk, n)
    width = 2 * s.kv_heads * s.d_head * size
    # appending a row makes a longer copy of one layer's keys, then of its values
    kv = s.attention_layers * width * (n + new_tokens) + width * (n + new_tokens)
    activations = _decoder(s, rows, size, cpu) + (n * s.d * (1 + s.deep) + 2 * s.vocab) * size
    activations += _masked(s, rows, n, size) if rows < n else 0
    pixels = video.pixels * 4  # made as float32; the tower takes a copy in its own dtype
    tower = max(_tower(s, video.patches, size, cpu), _connector(s, video) * size) + n * s.d * size
    tower += video.pixels * size if not cpu or size != 4 else 0
    inputs = pixels + video.frame_bytes if cpu else pixels
    file = weights // size * (torch.finfo(held).bits // 8) if held != dtype and cpu else 0
    checked = min(largest, 2**22) * (size + 3)  # isfinite, in pieces: a copy and three boolean tensors
    pattern = s.heads * n * n
    extras = {
        "resid": s.layers * n * s.d * size,
        "one pattern": pattern * (2 * size + 4),  # scores, softmax in float32, pattern
        "dense cut": _masked(s, n, n, size),
    }
    made = dict(
        weights=weights, inputs=inputs, tower=tower, kv=kv, activations=activations,
        overhead=CPU_OVERHEAD if cpu else CUDA_OVERHEAD, loading=max(file, checked),
    )  # fmt: skip
    return MemoryEstimate(
        **made, positions=n, patches=video.patches, extras=extras,
        notes=_notes(config, s, video, dtype, file > 0, new_tokens, rows),
    )  # fmt: skip


def _notes(
    config: Any, s: _Sizes, video: _Video, dtype: torch.dtype, converted: bool, new_tokens: int, rows: int
) -> dict[str, str]:
    name = str(dtype).removeprefix("torch.")
    packed = " (as if not quantised)" if getattr(config, "quantization_config", None) else ""
    return {
        "weights": f"every parameter in {name}, tied ones once{packed}",
        "inputs": "the frames, and the tower's pixels in float32",
        "tower": f"{video.patches:,} patches at {s.tower_d} wide; gone before the decoder starts",
        "kv": f"{s.attention_layers} layers x {s.kv_heads} heads x {s.d_head} for {video.positions:,} + {new_tokens} positions",
        "activations": f"the widest decoder layer over {rows:,} positions (MLP {s.mlp} wide)",
        "overhead": "libraries, kernels' workspaces, the CUDA context on a GPU",
        "loading": "the file's own pages while it is converted"
        if converted
        else "a piece of a weight while it is checked",
        "total": "weights + overhead + the largest of loading, inputs + tower, inputs + kv + activations",
    }
