"""The released method of Map the Flow, written anew from its description, against the lab's sweep: the same numbers.

Nothing of the lab is used on its side but the prompt's ids and pixels: plain transformers models under eager attention;
rectangles of a lower-triangular mask, finfo.min where blocked, handed to the layers of a window by a wrapper of
`self_attn.forward`; one full forward for every window; segments found by searching the decoded prompt. Curves: across
frames; video, question and last into question and last; stem and options into last; video and stem into the true option.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lab.carriers import VideoQA
from lab.edges.sweeping import sweep
from lab.model.zoo import wrap
from tests import edgecases, families

WINDOW = 3  # of 5 layers; the paper's 9 of 32
STEM, OPTIONS, TRUE = "Which way does it move?", ("left", "right", "up"), 1
FRAMES = 4
# the paper's curve -> what the lab calls it. Its "question" is stem and options together.
CURVES = {
    "cross-frame": "cross-frame",
    "video->question": "video->question+option", "video->last": "video->last",
    "question->last": "question+option->last", "last->last": "last->last",
    "stem->last": "question->last", "true option->last": "true-option->last", "false options->last": "false-options->last",
    "video->stem": "video->question", "stem->true option": "question->true-option",
    "video->true option": "video->true-option",
}  # fmt: skip


# ---- segments: search the decoded prompt ------------------------------------------------------------------------------


def find_token_range(pieces: Sequence[str], text: str) -> list[int]:
    """Positions of the first place where `text` stands, spaces left out on both sides."""
    bare = [p.replace(" ", "") for p in pieces]
    needle = text.replace(" ", "")
    start = "".join(bare).index(needle)
    inside, at = [], 0
    for i, piece in enumerate(bare):
        if piece and at < start + len(needle) and at + len(piece) > start:
            inside.append(i)
        at += len(piece)
    return list(range(inside[0], inside[-1] + 1))


def segments(ids: Tensor, tokenizer: Any, video_id: int) -> dict[str, Any]:
    """Positions by name, `frames` a list of them. The placeholders of the video stand side by side."""
    video = (ids == video_id).nonzero().squeeze(1).tolist()
    assert video == list(range(video[0], video[-1] + 1))
    pieces = ["" if i == video_id else tokenizer.decode([i]) for i in ids.tolist()]
    options = [find_token_range(pieces, f"\n({'ABC'[i]}) {text}") for i, text in enumerate(OPTIONS)]
    stem = find_token_range(pieces, f"Question: {STEM}\nOptions:")
    false = [p for i, o in enumerate(options) if i != TRUE for p in o]
    return {
        "video": video, "frames": np.array_split(video, len(video) // per_frame(video)), "stem": stem,
        "question": stem + sum(options, []), "true option": options[TRUE], "false options": false, "last": [len(ids) - 1],
    }  # fmt: skip


def per_frame(video: Sequence[int]) -> int:
    """LLaVA-NeXT-Video has 9 tokens for each frame; Qwen2.5-VL 9 for two frames of 24 x 24."""
    return 9


# ---- masks and injection ----------------------------------------------------------------------------------------------


def blocked_mask(
    n: int, rectangles: Sequence[tuple[Sequence[int], Sequence[int]]], dtype: torch.dtype
) -> Tensor:
    """(1 - m) * finfo.min, m the lower triangle with the rectangles (queries, keys) set to zero: [1, 1, n, n]."""
    m = torch.ones(n, n, dtype=dtype).tril()
    for queries, keys in rectangles:
        m[torch.tensor(queries)[:, None], torch.tensor(keys)[None, :]] = 0
    return ((1 - m) * torch.finfo(dtype).min)[None, None]


def window(centre: int, k: int, n_layers: int) -> range:
    return range(max(0, centre - k // 2), min(n_layers, centre - (-k // 2)))


@contextmanager
def blocked(hf: Any, layers: Sequence[int], mask: Tensor) -> Iterator[None]:
    """The layers' self-attention is given `mask` instead of its own."""

    def wrapper(inner: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs["attention_mask"] = mask
            return inner(*args, **kwargs)

        return forward

    attentions = [hf.model.language_model.layers[i].self_attn for i in layers]
    try:
        for a in attentions:
            a.forward = wrapper(a.forward)
        yield
    finally:
        for a in attentions:
            del a.forward


def rectangles_of(curve: str, at: dict[str, Any]) -> list[tuple[Sequence[int], Sequence[int]]]:
    if curve == "cross-frame":
        frames = [f.tolist() for f in at["frames"]]
        return [(f, sum(frames[:i], [])) for i, f in enumerate(frames) if i]
    keys, queries = curve.split("->")
    return [(at[queries], at[keys])]


def released_sweep(hf: Any, inputs: dict[str, Any], tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(p, percent change of p) of every curve and centre layer [curve, layer], and p clean [], of the clean argmax."""
    ids = inputs["input_ids"][0]
    at = segments(ids, tokenizer, families.VIDEO)
    n_layers = len(hf.model.language_model.layers)

    def p(layers: Sequence[int] = (), mask: Tensor | None = None) -> Tensor:
        with torch.no_grad(), blocked(hf, layers, mask if mask is not None else torch.empty(0)):
            return hf(**inputs, use_cache=False).logits[0, -1].softmax(-1)

    clean = p()
    token = int(clean.argmax())
    rows = []
    for curve in CURVES:
        mask = blocked_mask(len(ids), rectangles_of(curve, at), hf.dtype)
        rows.append(torch.stack([p(window(c, WINDOW, n_layers), mask)[token] for c in range(n_layers)]))
    found = torch.stack(rows)
    return found, (found - clean[token]) * 100 / clean[token], clean[token]


# ---- side by side -------------------------------------------------------------------------------------------------------


@functools.cache
def both(name: str, dtype: torch.dtype) -> tuple[Any, Any, Any, dict[str, Any]]:
    """A plain model under eager attention, the same one wrapped by the lab, and the prompt."""

    def build() -> Any:
        hf = families.build(name)
        return edgecases.exact(hf) if dtype == torch.float64 else hf

    plain, tokenizer = build(), families.tokenizer(name)
    plain.set_attn_implementation("eager")
    model = wrap(build(), tokenizer, preprocessor=families.preprocessor(name))
    pixels = np.random.default_rng(0).integers(0, 255, (FRAMES, 24, 24, 3), dtype=np.uint8)
    ready = model.prepare(VideoQA(pixels, STEM, OPTIONS, answer=TRUE), n_frames=FRAMES)
    ready.inputs = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and "pixel" in k else v
        for k, v in ready.inputs.items()
    }
    return plain, model, ready, dict(ready.inputs)


@functools.cache
def theirs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    plain, model, _, inputs = both(name, dtype)
    return released_sweep(plain, inputs, model.tokenizer)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("executor", ["fast", "reference"])
@pytest.mark.parametrize("name", ["llava_next_video", "qwen2_5_vl"])
def test_every_number_of_the_eleven_curves(name, executor, dtype, bound):
    """Probabilities and relative changes. With double weights too, transformers' eager softmax stays in single."""
    _, model, ready, _ = both(name, dtype)
    p, percent, clean = theirs(name, dtype)
    result = sweep(model, ready, list(CURVES.values()), window=WINDOW, executor=executor, show_progress=False)
    ours = torch.tensor(result.values.reshape(p.shape)).double()
    ours_clean = next(iter(result.notes["p_clean"].values()))
    assert abs(ours_clean - float(clean)) <= bound
    assert ((ours - percent) / 100).abs().max() <= bound
    assert ((1 + ours / 100) * ours_clean - p).abs().max() <= bound
    # every curve says something, so that agreement is not about zeros
    assert (percent.abs().amax(1) > 0.01).all() and percent.std() > 1


def test_the_search_finds_what_the_map_says():
    """Segments by search in the text, and by construction: the same positions."""
    for name in ("llava_next_video", "qwen2_5_vl"):
        _, model, ready, inputs = both(name, torch.float32)
        at, tokens = segments(inputs["input_ids"][0], model.tokenizer, families.VIDEO), ready.tokens
        assert at["video"] == tokens.where(role="video").tolist()
        assert [f.tolist() for f in at["frames"]] == [
            tokens.where(role="frame", frame=i).tolist() for i in range(tokens.n_frames)
        ]
        assert at["stem"] == tokens.where(role="question").tolist() and at["last"] == tokens.last.tolist()
        assert at["true option"] == tokens.where(role="option", option=TRUE).tolist()


def test_the_method_notices_a_difference():
    """The comparison can fail: another window, or one edge more, is far outside the bound."""
    (_, model, ready, _), (_, percent, _) = (f("llava_next_video", torch.float32) for f in (both, theirs))
    other = sweep(model, ready, list(CURVES.values()), window=1, show_progress=False)
    wider = sweep(model, ready, ["video->question+option+instruction"], window=WINDOW, show_progress=False)
    assert (
        abs(other.values[0] - percent.numpy()).max() > 1
        and abs(wider.values[0, 0] - percent[1].numpy()).max() > 0.01
    )
