"""Token maps: every position one role, and frame, row and column of every video token found again by occlusion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lab.carriers import Frames, TokenMap, VideoQA
from lab.errors import PromptError
from lab.model.families.base import Family, find
from lab.model.token_maps import token_maps
from lab.prompt import answer_spans, lay_out, question_spans
from lab.spans import ROLES, Span
from tests import families as tiny

ALL = [*tiny.FAMILIES, *tiny.UNKNOWN]
PATCHED = ("qwen2_5_vl", "qwen3_vl", "video_llama_3")
MOVE = VideoQA(video=None, question="Which way?", options=("left", "right"), answer=0)


def maps_of(name: str, *, tokenizer: bool = False, roles: Any = None, **kwargs: Any) -> tuple[TokenMap, ...]:
    config, x = tiny.config(name), tiny.inputs(name, **kwargs)
    return token_maps(
        find(config), config, x, tokenizer=tiny.tokenizer(name) if tokenizer else None, roles=roles
    )


# ---- partition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_position_has_one_role(name: str) -> None:
    x, config = tiny.inputs(name, worlds=2, pad=3), tiny.config(name)
    for world, tokens in enumerate(token_maps(find(config), config, x)):
        hits = torch.stack([torch.isin(torch.arange(len(tokens)), tokens.where(role=r)) for r in ROLES])
        assert (hits.sum(0) == 1).all()
        assert tokens.last.tolist() == [x["input_ids"].shape[1] - 1]
        assert len(tokens.where(role="pad")) == 3 * world
        video = x["input_ids"][world] == find(config).placeholder(config)
        assert torch.equal(tokens.where(kind="video"), video.nonzero().squeeze(1))
        assert (tokens.frame[tokens.where(role="frame")] >= 0).all()
        assert torch.equal(tokens.ids, x["input_ids"][world])


@pytest.mark.parametrize("name", ALL)
def test_left_padding_only_shifts_the_map(name: str) -> None:
    """The padded world's map equals its map alone, moved."""
    x, config = tiny.inputs(name, worlds=2, pad=3), tiny.config(name)
    padded = token_maps(find(config), config, x)[1]
    alone = tiny.inputs(name, worlds=2, pad=3)
    cut = {**alone, "input_ids": x["input_ids"][1:, 3:], "attention_mask": x["attention_mask"][1:, 3:]}
    cut = {
        k: _last_half(v) if "pixel" in k or "video" in k or k == "second_per_grid_ts" else v
        for k, v in cut.items()
    }
    tokens = token_maps(find(config), config, cut)[0]
    for column in ("ids", "role", "kind", "frame", "row", "col", "weight", "source", "option"):
        assert torch.equal(getattr(padded, column)[3:], getattr(tokens, column)), column
    assert (padded.frame[:3] == -1).all()


def _last_half(v: Tensor) -> Tensor:
    return v[len(v) // 2 :]


def test_roles_told_by_ids() -> None:
    text = {n: "".join(r[0] for r in maps_of(n, tokenizer=True)[0].roles()) for n in ALL}
    assert (
        text["llava_onevision"] == "tttt" + "f" * 27 + "s" + "tttttl"
    )  # the newline token belongs to no frame
    assert text["llava_next_video"] == "tttt" + "f" * 27 + "tttttl"
    assert text["qwen2_5_vl"] == "tttts" + "f" * 12 + "stttttl"
    # the time before the first frame cannot be told from the text before it; between frames it can
    assert text["qwen3_vl"] == text["qwen3_5"] == "tttttttsffffffsssssffffffstttttl"
    assert text["internvl"] == "ttttttsfffffffffsssssfffffffffsssssfffffffffstttttl"
    assert text["smolvlm"] == "tttttttfffffffffsssssfffffffffsssssfffffffffttttttl"
    assert text["video_llama_3"] == "tttttttffffffssssffffffssssffffffttttttl".replace("ttttttl", "tttttl")


def test_marks_without_a_tokenizer() -> None:
    """Ids of the marks are in Qwen's config; InternVL's are only in its tokenizer."""
    assert len(maps_of("qwen2_5_vl")[0].where(role="separator")) == 2
    between = len(maps_of("internvl")[0].where(role="separator"))
    assert len(maps_of("internvl", tokenizer=True)[0].where(role="separator")) == between + 2


def test_pieces() -> None:
    tokens = maps_of("qwen2_5_vl", tokenizer=True)[0]
    assert [p for p, k in zip(tokens.pieces, tokens.kind.tolist(), strict=True) if k] == [""] * 12
    assert tokens.pieces[4] == "<|vision_start|>"
    assert set(maps_of("qwen2_5_vl")[0].pieces) == {""}


def test_tubelets_carry_weight_and_seconds() -> None:
    qwen = maps_of("qwen2_5_vl", frames=4)[0]
    assert qwen.weight[qwen.where(kind="video")].unique().tolist() == [8.0]  # 2 x 2 patches of 2 frames
    assert qwen.seconds[qwen.where(role="frame", frame=1)].unique().tolist() == [
        1.25
    ]  # frames at 1.0 and 1.5
    weights = {n: maps_of(n)[0].weight.max().item() for n in ALL}
    assert weights == {
        "llava_onevision": 4.0, "llava_next_video": 4.0, "qwen2_5_vl": 8.0, "qwen3_vl": 8.0, "internvl": 4.0,
        "video_llama_3": 4.0, "qwen3_5": 8.0, "smolvlm": 1.0,
    }  # fmt: skip
    assert maps_of("llava_onevision")[0].weight[31] == 0.0  # the newline token holds no patch


def test_weights_sum_to_the_towers_patches() -> None:
    """Also where an odd side does not pool evenly."""
    config = tiny.config("llava_onevision", vision_config={"image_size": 20})
    grid = find(config).video_grids(config, {"pixel_values_videos": torch.zeros(1, 2, 3, 20, 20)})[0]
    assert len(grid) == 2 * 9 + 1
    assert grid.weight.sum() == pytest.approx(2 * 25)


def test_rendered_seconds() -> None:
    _, tokens = rendered("qwen3_vl")
    times = tokens.where(kind="time")
    assert "".join(tokens.pieces[i] for i in times) == "<0.2 seconds><1.0 seconds>"
    assert tokens.seconds[times].unique().tolist() == [0.25, 1.0]
    assert tokens.seconds[tokens.where(role="frame", frame=1)].unique().tolist() == [1.0]


# ---- mismatches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_wrong_number_of_placeholders(name: str) -> None:
    x, config = tiny.inputs(name), tiny.config(name)
    placeholder = find(config).placeholder(config)
    n = int((x["input_ids"] == placeholder).sum())
    x["input_ids"][0, (x["input_ids"][0] == placeholder).nonzero()[0]] = tiny.WORDS
    with pytest.raises(PromptError, match=rf"\b{n - 1} video placeholders.*\b{n} video tokens"):
        token_maps(find(config), config, x)


def test_placeholders_without_pixels() -> None:
    config = tiny.config("llava_onevision")
    x = {"input_ids": tiny.inputs("llava_onevision")["input_ids"]}
    with pytest.raises(PromptError, match="28 video placeholders.*make 0 video tokens"):
        token_maps(find(config), config, x)


def test_text_only_prompt() -> None:
    config = tiny.config("qwen2_5_vl")
    tokens = token_maps(find(config), config, {"input_ids": torch.tensor([[30, 31, 32]])})[0]
    assert tokens.roles() == ["text", "text", "last"]


def test_masked_placeholders_and_empty_worlds() -> None:
    config, x = tiny.config("llava_onevision"), tiny.inputs("llava_onevision")
    with pytest.raises(PromptError, match="4 video placeholders are masked"):
        token_maps(find(config), config, {**x, "attention_mask": (torch.arange(38) >= 8).long()[None]})
    with pytest.raises(PromptError, match="no real token"):
        token_maps(find(config), config, {**x, "attention_mask": torch.zeros(1, 38, dtype=torch.long)})


def test_compression_mask_that_does_not_fit() -> None:
    config, x = tiny.config("video_llama_3"), tiny.inputs("video_llama_3")
    with pytest.raises(PromptError, match="17 entries.*18 tokens"):
        token_maps(find(config), config, {**x, "video_compression_mask": x["video_compression_mask"][1:]})


def test_dropped_tokens_leave_the_map() -> None:
    config, x = tiny.config("video_llama_3"), tiny.inputs("video_llama_3")
    x["video_compression_mask"][[7, 8, 17]] = False
    ids = x["input_ids"][0]
    drop = (ids == tiny.VIDEO).nonzero().squeeze(1)[[7, 8, 17]]
    keep = torch.tensor([i for i in range(len(ids)) if i not in drop.tolist()])
    x["input_ids"], x["attention_mask"] = ids[keep][None], torch.ones(1, len(keep), dtype=torch.long)
    tokens = token_maps(find(config), config, x)[0]
    got = tokens.where(role="frame", frame=1)
    assert list(zip(tokens.row[got].tolist(), tokens.col[got].tolist(), strict=True)) == [
        (0, 0),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    with torch.no_grad():
        assert tiny.build("video_llama_3")(**x).logits.isfinite().all()


def test_two_videos_in_one_world() -> None:
    """Frames count on, and the words between two videos stay words."""
    a, b = tiny.inputs("llava_next_video"), tiny.inputs("llava_next_video", seed=1)
    x = {k: torch.cat([a[k], b[k]], 0 if "pixel" in k else 1) for k in a}
    config = tiny.config("llava_next_video")
    tokens = token_maps(find(config), config, x)[0]
    assert tokens.n_frames == 6
    first_end, second_start = tokens.where(frame=2)[-1], tokens.where(frame=3)[0]
    assert set(tokens.roles()[first_end + 1 : second_start]) == {"text"}


# ---- roles= ---------------------------------------------------------------------------------------------------------


def test_roles_by_place() -> None:
    """Places count from the first real token, so one mapping serves a padded batch."""
    roles = {"system": (0, 2), "question": (31, 33), "option": [(33, 34), (34, 35)]}
    for world, tokens in enumerate(maps_of("llava_next_video", worlds=2, pad=2, roles=roles)):
        shift = 2 * world
        assert tokens.where(role="question").tolist() == [31 + shift, 32 + shift]
        assert tokens.where(role="option", option=1).tolist() == [34 + shift]
        assert tokens.where(role="system").tolist() == [shift, 1 + shift]
        assert tokens.where(role="last").tolist() == [len(tokens) - 1]


def test_roles_per_world() -> None:
    roles = [{"question": (31, 32)}, {"question": (32, 34)}]
    maps = maps_of("llava_next_video", worlds=2, roles=roles)
    assert [t.where(role="question").tolist() for t in maps] == [[31], [32, 33]]
    with pytest.raises(PromptError, match="1 mappings for 2 worlds"):
        maps_of("llava_next_video", worlds=2, roles=roles[:1])


def test_roles_by_call() -> None:
    def tell(ids: list[int]) -> list[str | None]:
        return [None] * 31 + ["option", "question", "option", "option"] + [None] * (len(ids) - 35)

    tokens = maps_of("llava_next_video", worlds=2, pad=2, roles=tell)[1]
    assert tokens.where(role="option", option=0).tolist() == [33]
    assert tokens.where(role="option", option=1).tolist() == [35, 36]


def test_whole_map_by_call() -> None:
    """A callable may also say what the ids already say."""
    maps = maps_of("llava_onevision", roles=lambda ids: maps_of("llava_onevision")[0].roles())
    assert maps[0].roles() == maps_of("llava_onevision")[0].roles()


@pytest.mark.parametrize(
    "roles, message",
    [
        ({"question": (0, 2), "system": (1, 3)}, "'question' and 'system' overlap at position 1"),
        ({"option": [(0, 2), (1, 3)]}, "'option' and 'option' overlap"),
        ({"question": (30, 99)}, r"\(30, 99\) does not lie in the 37 positions"),
        ({"question": (3, 3)}, r"\(3, 3\) does not lie"),
        ({"question": 3}, "got 3"),
        ({"question": ("a", "b")}, "give .start, stop."),
        ({"qestion": (0, 2)}, "'qestion'.*known: bos"),
        ({"frame": (0, 2)}, "'frame', which is no role a caller can give"),
        ({"question": (2, 6)}, "position 4 'question', but the ids say it is 'frame'"),
        (lambda ids: ["text"], "1 roles for 37 positions"),
        (lambda ids: ["words"] * len(ids), "'words'"),
        (lambda ids: ["last"] * len(ids), "position 0 'last', but the ids say it is 'text'"),
        (lambda ids: ["frame"] * len(ids), "position 0 'frame', but the ids say it is 'text'"),
    ],
)
def test_roles_that_cannot_be(roles: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        maps_of("llava_next_video", roles=roles)


# ---- occlusion ------------------------------------------------------------------------------------------------------


class AtDoor(Exception):
    """Raised to stop the model at the door of its language model."""


def at_door(hf: Any, x: dict[str, Tensor]) -> Tensor:
    """`inputs_embeds` [world, pos, d] as the language model gets them."""
    got: list[Tensor] = []

    def stop(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        got.append(kwargs["inputs_embeds"])
        raise AtDoor

    lm = hf.model.language_model if hasattr(hf.model, "language_model") else hf.model.text_model
    handle = lm.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), pytest.raises(AtDoor):
            hf(**x)
    finally:
        handle.remove()
    return got[0]


def unmixed(hf: Any) -> Any:
    """The tower without attention: every patch for itself."""
    names = ("out_proj", "projection_layer", "proj")
    for layer in find(hf.config).tower_layers(hf):
        zeroed = 0
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and name.split(".")[-1] in names:
                zeroed += 1
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        assert zeroed == 1
    return hf


def clip_of(name: str, frames: int = 3) -> Frames:
    return tiny.clip(frames, 16 if name in PATCHED else 24, 24)


def rendered(name: str, clip: Frames | None = None) -> tuple[dict[str, Tensor], TokenMap]:
    family, config, clip = find(tiny.config(name)), tiny.config(name), clip or clip_of(name)
    pixels, grid = family.pixels(clip, config, tiny.preprocessor(name))
    spans = family.turn(family.video_spans(clip, grid), question_spans(MOVE), answer_spans(MOVE))
    ids, tokens = lay_out(spans, grid, tiny.tokenizer(name), family.placeholder(config))
    x = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **pixels,
        **family.extra_inputs(ids, config),
    }
    return x, tokens


def occluded(clip: Frames, frame: int, row: int, col: int, size: int = 8) -> Frames:
    """The clip with one region of one frame inverted: the pixels of one merged token."""
    pixels = clip.pixels.clone()
    region = pixels[frame, :, row * size : (row + 1) * size, col * size : (col + 1) * size]
    region.copy_(255 - region)
    return replace(clip, pixels=pixels)


def places(name: str, clip: Frames) -> list[tuple[int, int, int]]:
    rows, cols = clip.pixels.shape[2] // 8, clip.pixels.shape[3] // 8
    return [(f, r, c) for f in range(len(clip)) for r in range(rows) for c in range(cols)]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_occlusion_moves_exactly_the_predicted_tokens(name: str) -> None:
    hf, clip = unmixed(tiny.build(name)), clip_of(name)
    x, tokens = rendered(name, clip)
    clean, seen = at_door(hf, x)[0], set()
    tubelet = 2 if name.startswith("qwen") else 1
    for frame, row, col in places(name, clip):
        moved = at_door(hf, rendered(name, occluded(clip, frame, row, col))[0])[0]
        got = ((moved - clean).abs().amax(-1) > 1e-6).nonzero().squeeze(1)
        want = tokens.where(role="frame", frame=frame // tubelet, row=row, col=col)
        assert len(want) == 1
        assert got.tolist() == want.tolist(), (frame, row, col)
        seen |= set(got.tolist())
    assert seen == set(tokens.where(role="frame").tolist())  # no video token without its pixels


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_occlusion_moves_the_predicted_token_most(name: str) -> None:
    """With attention in the tower all tokens of the frame may move, those of other frames never."""
    hf, clip = tiny.build(name), clip_of(name)
    x, tokens = rendered(name, clip)
    clean = at_door(hf, x)[0]
    tubelet = 2 if name.startswith("qwen") else 1
    for frame, row, col in places(name, clip)[::5]:
        change = (at_door(hf, rendered(name, occluded(clip, frame, row, col))[0])[0] - clean).norm(dim=-1)
        want = tokens.where(role="frame", frame=frame // tubelet, row=row, col=col)
        assert int(change.argmax()) == int(want), (frame, row, col)
        assert set((change > 1e-6).nonzero().squeeze(1).tolist()) <= set(
            tokens.where(frame=frame // tubelet).tolist()
        )


@pytest.mark.parametrize("name", ["qwen3_5", "smolvlm"])
def test_occlusion_in_unknown_families(name: str) -> None:
    """Straight on the processor's tensors: the token the map names moves most."""
    hf, x = tiny.build(name), tiny.inputs(name, worlds=2, pad=2)
    maps = token_maps(find(hf.config), hf.config, x)
    clean = at_door(hf, x)
    for world in (0, 1):
        for frame, row, col in ((0, 0, 0), (1, 1, 2), (1, 0, 1)):
            y = {**x}
            y.update(_changed(name, x, world, frame, row, col))
            change = (at_door(hf, y) - clean).norm(dim=-1)
            where = divmod(int(change.argmax()), change.shape[1])
            assert where == (world, int(maps[world].where(frame=frame, row=row, col=col)))


def _changed(
    name: str, x: dict[str, Tensor], world: int, frame: int, row: int, col: int
) -> dict[str, Tensor]:
    if name == "smolvlm":
        pixels = x["pixel_values"].clone()
        pixels[world, frame, :, row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] += 3.0
        return {"pixel_values": pixels}
    pixels = x["pixel_values_videos"].clone()
    at = ((world * 2 + frame) * 6 + row * 3 + col) * 4
    pixels[at : at + 4] += 3.0
    return {"pixel_values_videos": pixels}


def test_occlusion_in_a_left_padded_world() -> None:
    hf, x = unmixed(tiny.build("llava_onevision")), tiny.inputs("llava_onevision", worlds=2, pad=4)
    tokens = token_maps(find(hf.config), hf.config, x)[1]
    pixels = x["pixel_values_videos"].clone()
    pixels[1, 2, :, 8:16, 16:24] += 1.0
    moved = (at_door(hf, {**x, "pixel_values_videos": pixels}) - at_door(hf, x)).abs().amax(-1) > 1e-6
    assert moved.nonzero().tolist() == [[1, int(tokens.where(frame=2, row=1, col=2))]]


# ---- laying out -----------------------------------------------------------------------------------------------------


def llama_like(scheme: str) -> Any:
    """A tokenizer with sentencepiece's prefix space: before everything, before each text, or as old files have it."""
    words = ["<unk>", "<s>", "\u2581", "\n", "\u2581U", *map(chr, range(33, 127))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [("\u2581", "U")], unk_token="<unk>")
    )
    if scheme == "legacy":
        steps = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
        inner.normalizer = tokenizers.normalizers.Sequence(steps)
    else:
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            "\u2581", prepend_scheme=scheme, split=False
        )
    special = [tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "<video>")]
    inner.add_special_tokens(special)
    add_bos = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.post_processor = add_bos
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize("scheme", ["first", "always", "never", "legacy"])
def test_prefix_space_as_in_one_string(scheme: str) -> None:
    """Prompts are tokenised as processors do: whole, placeholders in place, bos by the tokenizer."""
    tokenizer, config, clip = (
        llama_like(scheme),
        tiny.config("llava_next_video"),
        clip_of("llava_next_video", 2),
    )
    family, placeholder = find(config), tokenizer.convert_tokens_to_ids("<video>")
    _, grid = family.pixels(clip, config, tiny.preprocessor("llava_next_video"))
    spans = family.turn(family.video_spans(clip, grid), question_spans(MOVE), answer_spans(MOVE))
    ids, tokens = lay_out(spans, grid, tokenizer, placeholder)
    text = "".join(s.text if s.rows is None else "<video>" * 9 for s in spans)
    assert ids[0].tolist() == tokenizer(text.removeprefix("<s>"))["input_ids"]
    assert len(tokens.where(role="frame")) == 18
    assert tokens.where(role="bos").tolist() == [0]


def test_text_that_spells_the_placeholder() -> None:
    family, config, clip = find(tiny.config("qwen3_vl")), tiny.config("qwen3_vl"), clip_of("qwen3_vl")
    _, grid = family.pixels(clip, config, tiny.preprocessor("qwen3_vl"))
    spans = family.turn(family.video_spans(clip, grid), [Span("question", "Is <|video_pad|> here?")], [])
    with pytest.raises(PromptError, match="spells the model's video placeholder"):
        lay_out(spans, grid, tiny.tokenizer("qwen3_vl"), tiny.VIDEO)


def test_tokenizer_of_another_model() -> None:
    """Its vocabulary has no such special token: the placeholder falls apart."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "vid": 2}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("i", "isolated")
    other = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    config, clip = tiny.config("llava_next_video"), clip_of("llava_next_video", 1)
    _, grid = find(config).pixels(clip, config, tiny.preprocessor("llava_next_video"))
    with pytest.raises(PromptError, match="3 tokens of the video placeholder 'vid'"):
        lay_out(find(config).video_spans(clip, grid), grid, other, 2)


# ---- two ways to one map --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_rendered_and_read_maps_agree(name: str) -> None:
    """The map made while rendering equals the one read from the finished tensors, where the latter can know."""
    x, made = rendered(name)
    config = tiny.config(name)
    read = token_maps(find(config), config, x, tokenizer=tiny.tokenizer(name))[0]
    for column in ("ids", "kind", "row", "col", "weight", "source"):
        same = getattr(made, column), getattr(read, column)
        assert torch.equal(*(torch.where(made.kind == 2, 0, s) if column == "kind" else s for s in same)), (
            column
        )
    video = made.where(kind="video")
    assert torch.equal(made.frame[video], read.frame[video])
    assert made.pieces == read.pieces
    for a, b in zip(made.roles(), read.roles(), strict=True):
        assert a == b or b == "text", (a, b)


def test_family_base_is_stateless() -> None:
    assert vars(Family()) == {}
