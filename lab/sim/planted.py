"""Planted models: small decoders written by hand, wrapped as VideoLLMs, whose circuit is known exactly.

They answer which way a square moves (`questions`), and do it like this (layers 0-based, as in hook names):

    layer 0   video->video      every shown place takes the mean of the places shown so far  (the cross-frame comparison)
              option:i->option:i  every option word takes the letter that stands before it
    layer 1   video->option     option words read "place now minus mean place"; the MLP turns it into "this word fits"
    layer 2   option->last      the last position takes the letter of the option that fits best

and so "plain". Three variants differ from layer 2 on: "leak" sends the answer through a template token that belongs to
no segment of the question, "redundant" through two tokens either of which is enough, "decoy" has a head besides that
looks at the video with all its attention and is read by nobody. Every probe and every search can be held against
`TRUTH[variant]`. The checkpoint is a real LLaVA-OneVision of transformers; only its weights are set by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import cos, sin
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lab.carriers import LETTERS, VideoQA
from lab.errors import UsageError
from lab.model.videollm import VideoLLM
from lab.model.zoo import DATA, wrap
from lab.pixels import Preprocessor
from lab.sim.moving import DIRECTIONS, direction
from lab.sim.shapes import Scene, render

Variant = Literal["plain", "leak", "redundant", "decoy"]
LAYERS, HEADS, D_HEAD, D_MODEL, SIDE, FRAMES, OPTIONS = 4, 4, 16, 64, 32, 8, 4

# ---- what is true -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edge:
    """Attention edges of some heads of one layer (both 0-based), as `probes.pathways` writes them."""

    layer: int
    pathway: str
    heads: tuple[int, ...] = (0,)

    def covers(self, layer: int, keys: str, queries: str) -> bool:
        """Whether the edges from segment `keys` to segment `queries` are among these."""
        mine, _, to = self.pathway.partition("->")
        return layer == self.layer and _within(keys, mine) and _within(queries, to)


@dataclass(frozen=True)
class Truth:
    """The circuit. All edges that are in none of the three lists change nothing, singly or all at once.

    matters    cutting any one of these changes the answer's probability
    redundant  routes: cutting all of one changes nothing as long as the other is whole; cutting both does
    decoys     heads that put nearly all attention there, to no effect
    """

    matters: tuple[Edge, ...]
    redundant: tuple[tuple[Edge, ...], ...] = ()
    decoys: tuple[Edge, ...] = ()

    def irrelevant(self) -> list[Edge]:
        """Every pair of segments in every layer, in all heads, that changes nothing."""
        live = [*self.matters, *(e for route in self.redundant for e in route)]
        pairs = dict.fromkeys((k, q) for i, q in enumerate(SEGMENTS) for k in SEGMENTS[: i + 1])
        return [
            Edge(layer, f"{k}->{q}", tuple(range(HEADS)))
            for layer in range(LAYERS)
            for k, q in pairs
            if not any(e.covers(layer, k, q) for e in live)
        ]


SEGMENTS = (
    "template", *(f"frame:{f}" for f in range(FRAMES)), "separator", "question",
    *(f"option:{i}" for i in range(OPTIONS)), "instruction", "template", "last",
)  # fmt: skip
"""All segments of a prompt, in order; the template stands at both ends, and is one segment."""

_COMPARE = (
    Edge(0, "video->video"), *(Edge(0, f"option:{i}->option:{i}", (1,)) for i in range(OPTIONS)), Edge(1, "video->option"),
)  # fmt: skip
TRUTH: dict[str, Truth] = {
    "plain": Truth((*_COMPARE, Edge(2, "option->last"))),
    "leak": Truth((*_COMPARE, Edge(2, "option->template"), Edge(3, "template->last"))),
    "redundant": Truth(
        _COMPARE,
        (
            (Edge(2, "option->instruction"), Edge(3, "instruction->last")),
            (Edge(2, "option->template"), Edge(3, "template->last")),
        ),
    ),
    "decoy": Truth((*_COMPARE, Edge(2, "option->last")), decoys=(Edge(2, "video->last", (2,)),)),
}


def _within(segment: str, group: str) -> bool:
    whole = {"frame": "video"}.get(segment.partition(":")[0], segment.partition(":")[0])
    return group in (segment, whole)


# ---- questions --------------------------------------------------------------------------------------------------


def questions(n: int, seed: int, *, steady: bool = True) -> list[VideoQA]:
    """A yellow square walks over the four rows or columns of tokens; options shuffled.

    steady  two frames on each token: 16 videos, 384 questions. False: at least one, any of the 35 ways to spend eight
            frames on four tokens: 560 videos, 13,440 questions
    """
    return [_question(np.random.default_rng((seed, i)), f"planted/{seed}/{i}", steady) for i in range(n)]


def _question(rng: np.random.Generator, id: str, steady: bool) -> VideoQA:
    way, lane = DIRECTIONS[rng.integers(4)], 8.0 + 16 * float(rng.integers(4))
    leaves = np.array([2, 4, 6]) if steady else 1 + rng.choice(FRAMES - 1, 3, replace=False)
    along = [8.0 + 16 * int((leaves <= f).sum()) for f in range(FRAMES)]
    along = along[::-1] if way in ("left", "up") else along
    track = tuple((a, lane) if way in ("left", "right") else (lane, a) for a in along)
    options = tuple(str(o) for o in rng.permutation(DIRECTIONS))
    one, back = (
        _asked(Scene("square", "yellow", 8.0, t, (0, 0, 0)), options, id) for t in (track, track[::-1])
    )
    return VideoQA(one.video, one.question, options, one.answer, id, "planted", one.state, back)


def _asked(scene: Scene, options: tuple[str, ...], id: str) -> VideoQA:
    asked = f"Which way does the {scene.colour} {scene.shape} move?"
    return VideoQA(render(scene), asked, options, options.index(direction(scene)), id, "planted", scene)


# ---- the model --------------------------------------------------------------------------------------------------

# Dimensions of the stream. BALLAST is the same large number everywhere, so that RMSNorm divides every position by the same.
BALLAST, BRIGHT, X, Y, MEAN_X, MEAN_Y, STEP_X, STEP_Y = range(8)
WORD = range(8, 12)  # one for each direction
IS_WORD, IS_LETTER, FITS = 12, 13, 14
LETTER, TAKEN, RELAY, OUT = range(16, 20), range(20, 24), range(24, 28), range(28, 32)
IS_RELAY, SPARE_X, SPARE_Y, IS_NEWLINE = 32, 33, 34, 35
HEAVY = 1e4
SURE = 60.0  # a score so much higher than another leaves e^-60 of the attention to the other
AXIS = {"left": (STEP_X, -1.0), "right": (STEP_X, 1.0), "up": (STEP_Y, -1.0), "down": (STEP_Y, 1.0)}


def planted_model(variant: Variant = "plain") -> VideoLLM:
    """A planted model on the CPU, in float32. Raises UsageError for an unknown variant."""
    if variant not in TRUTH:
        raise UsageError(f"no planted model {variant!r}; there are {', '.join(TRUTH)}")
    from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny")
    ids: dict[str, int] = tokenizer.get_vocab()
    hf: Any = LlavaOnevisionForConditionalGeneration(_config(ids)).eval().requires_grad_(False)
    _clear(hf)
    _eyes(hf)
    _words(hf, ids, relays={"leak": ("assistant",), "redundant": ("assistant", "give")}.get(variant, ()))
    _circuit(hf.model.language_model.layers, variant)
    return wrap(hf, tokenizer, preprocessor=Preprocessor.from_folder(str(DATA / "tiny")))


def _config(ids: Mapping[str, int]) -> Any:
    from transformers import LlavaOnevisionConfig

    tower = {
        "model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 1, "image_size": SIDE, "patch_size": 4, "vision_use_head": False,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": len(ids), "hidden_size": D_MODEL, "intermediate_size": 8,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "max_position_embeddings": 1024, "rope_theta": 1e24, "tie_word_embeddings": False, "use_sliding_window": False,
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<pad>"],
    }  # fmt: skip
    return LlavaOnevisionConfig(  # the tower's last but one state: the last goes through a norm in some versions
        vision_config=tower, text_config=text, image_token_index=ids["<image>"], video_token_index=ids["<video>"],
        vision_feature_layer=-2, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=[[SIDE, SIDE]], tie_word_embeddings=False,
    )  # fmt: skip


def _clear(hf: Any) -> None:
    """All weights zero; norms of the decoder give back what they were given."""
    for p in hf.parameters():
        p.zero_()
    lm = hf.model.language_model
    norms = [
        lm.norm,
        *(n for layer in lm.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    for norm in norms:
        norm.weight.fill_(HEAVY * D_MODEL**-0.5)  # the root mean square of a stream that is all ballast
    hf.model.image_newline[[BALLAST, IS_NEWLINE]] = torch.tensor([HEAVY, 1.0])


def _eyes(hf: Any) -> None:
    """Tower and projector: brightness (1: a whole token of the square's yellow, 0: black) and the place, -1..1."""
    embeddings, projector = hf.model.vision_tower.embeddings, hf.model.multi_modal_projector
    yellow = sum((235, 215, 50)) / 3 / 255
    kernel = embeddings.patch_embedding.weight  # [channel, rgb, 4, 4]
    kernel[0] = 0.5 / yellow / kernel[0].numel()  # pixels come as -1..1
    embeddings.patch_embedding.bias[0] = 0.5 / yellow
    at = (torch.arange(SIDE // 4) - 3.5) / 3
    embeddings.position_embedding.weight[:, 1] = at.repeat(SIDE // 4)
    embeddings.position_embedding.weight[:, 2] = at.repeat_interleave(SIDE // 4)
    for i, dim in enumerate((BRIGHT, X, Y)):
        projector.linear_1.weight[i, i] = 1.0
        projector.linear_1.bias[i] = 10.0  # GELU leaves large numbers as they are
        projector.linear_2.weight[dim, i] = 1.0
        projector.linear_2.bias[dim] = -10.0
    projector.linear_2.bias[BALLAST] = HEAVY


def _words(hf: Any, ids: Mapping[str, int], relays: tuple[str, ...]) -> None:
    """Embeddings of direction words and letters; the head speaks the letters."""
    table, head = hf.model.language_model.embed_tokens.weight, hf.lm_head.weight
    table[:, BALLAST] = HEAVY
    for word, dim in zip(DIRECTIONS, WORD, strict=True):
        table[ids[word], [dim, IS_WORD]] = 1.0
    for letter, dim, out in zip(LETTERS, LETTER, OUT, strict=False):
        table[ids[letter], [dim, IS_LETTER]] = 1.0
        head[ids[letter], out] = 12.0
    for word in relays:
        table[ids[word], IS_RELAY] = 1.0


def _circuit(layers: Any, variant: Variant) -> None:
    attend(
        layers[0], 0, {BRIGHT: 30.0}, {X: MEAN_X, Y: MEAN_Y}, asked_by=BRIGHT
    )  # text must not know the mean place
    attend(layers[0], 1, {IS_LETTER: 250.0}, dict(zip(LETTER, TAKEN, strict=True)), back=2)
    attend(layers[1], 0, {BRIGHT: 30.0}, {X: STEP_X, Y: STEP_Y}, minus={MEAN_X: STEP_X, MEAN_Y: STEP_Y})
    _fitting(layers[1].mlp)
    relayed = variant in ("leak", "redundant")
    fits = {IS_WORD: SURE, FITS: 4.0}  # not so sharp that the worst option would not count
    answer = dict(zip(TAKEN, RELAY if relayed else OUT, strict=True))
    attend(layers[2], 0, fits, answer, asked_by=IS_RELAY if relayed else None)
    if relayed:  # a relay that was told nothing is not asked, if there is another
        filled = {IS_RELAY: 3 * SURE, **dict.fromkeys(RELAY, SURE)}
        attend(layers[3], 0, filled, dict(zip(RELAY, OUT, strict=True)))
    if variant == "decoy":
        attend(layers[2], 2, {BRIGHT: SURE}, {X: SPARE_X, Y: SPARE_Y})


def attend(
    layer: Any, head: int, keys: Mapping[int, float], values: Mapping[int, int], *,
    minus: Mapping[int, int] | None = None, back: int | None = None, asked_by: int | None = None,
) -> None:  # fmt: skip
    """Write one head: every query looks for `keys` (dimension -> score) and copies `values` (from -> to dimension).

    minus     dimensions whose values are taken off; back: prefers what lies this many positions before the query
    asked_by  only positions with this dimension look for the keys; the others look at everything alike
    """
    attn, base, root = layer.self_attn, head * D_HEAD, D_HEAD**0.5
    content = base + D_HEAD // 4  # rotated by 1e-12 per position: not at all
    if asked_by is None:
        attn.q_proj.bias[content] = root
    else:
        attn.q_proj.weight[content, asked_by] = root
    for dim, score in keys.items():
        attn.k_proj.weight[content, dim] = score
    if back is not None:  # the first pair of dimensions turns by one radian per position
        near = 200.0 * root
        attn.q_proj.bias[base], attn.q_proj.bias[base + D_HEAD // 2] = near * cos(back), -near * sin(back)
        attn.k_proj.bias[base] = 1.0
    for i, (source, to) in enumerate(values.items()):
        attn.v_proj.weight[base + i, source] = 1.0
        attn.o_proj.weight[to, base + i] = 1.0
        for taken_off in (d for d, t in (minus or {}).items() if t == to):
            attn.v_proj.weight[base + i, taken_off] = -1.0


def _fitting(mlp: Any) -> None:
    """FITS = how far the square went in the direction of this word. SiLU(0) = 0: no other token is touched."""
    gate = 10.0
    for i, (word, dim) in enumerate(zip(DIRECTIONS, WORD, strict=True)):
        axis, sign = AXIS[word]
        mlp.gate_proj.weight[i, dim] = gate
        mlp.up_proj.weight[i, axis] = sign
        mlp.down_proj.weight[FITS, i] = 1 / float(nn.functional.silu(torch.tensor(gate)))


def heads_cut(cut: Tensor, heads: tuple[int, ...]) -> Any:
    """Edges for `model(..., edges={layer: this})` that cut the mask `cut` [q, k] in some heads only."""
    keep = torch.ones(HEADS, *cut.shape, dtype=torch.bool)
    keep[list(heads)] = ~cut
    return lambda q, k: keep[:, q][:, :, k]


def all_edges(truth: Truth) -> Iterator[Edge]:
    """Everything the truth names, one by one."""
    yield from truth.matters
    for route in truth.redundant:
        yield from route
