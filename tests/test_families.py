"""Families: found by model type, chat turns as published, pixels that fit, and the hooks into the vision side."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.video_utils import VideoMetadata

from lab.carriers import VideoGrid, VideoQA
from lab.errors import ModelError, PromptError, UsageError
from lab.model.families.base import Family, find
from lab.model.families.geometry import clock, frame_spans, join, share_out, temporal_patch, tubelet_times
from lab.model.families.qwen2_5_vl import sampled_fps
from lab.prompt import answer_spans, lay_out, question_spans
from lab.spans import Span
from tests import families as tiny

# What the published templates write for one video and one text, as far as public code shows them: conversion scripts of
# transformers (InternVL, LLaVA-NeXT-Video) and publicly quoted templates (Qwen, VideoLLaMA3, LLaVA-OneVision).
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for c in m.content %}"
    "{% if c.type == 'video' %}VIDEO{% else %}{{ c.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
MARKED = "<|vision_start|><|video_pad|><|vision_end|>"
TEMPLATES = {
    "llava_onevision": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}{% for c in m.content if c.type == 'video' %}<video>"
        "{% endfor %}{% for c in m.content if c.type == 'text' %}{{ '\n' + c.text }}{% endfor %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llava_next_video": (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}{% for c in m.content %}"
        "{% if c.type == 'video' %}{{ '<video>\n' }}{% else %}{{ c.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "qwen2_5_vl": DEFAULT_SYSTEM + CHATML.replace("VIDEO", MARKED),
    "qwen3_vl": CHATML.replace("VIDEO", MARKED),
    "internvl": CHATML.replace("VIDEO", "{{ '<video>\n' }}"),
    "video_llama_3": CHATML.replace("VIDEO", "{{ '<|video_pad|>\n' }}"),
}
WRITTEN = {
    "qwen2_5_vl": MARKED,
    "qwen3_vl": MARKED,
    "video_llama_3": "<|video_pad|>",
}  # for the rest: <video>
PLAIN = (  # a template that knows only text
    "{% for m in messages %}[{{ m.role }}] {{ m.content + '' }} {% endfor %}{% if add_generation_prompt %}[bot] {% endif %}"
)
MOVE = VideoQA(video=None, question="Which way?", options=("left", "right"), answer=0)


def messages(system: str | None = None) -> list[dict[str, Any]]:
    user = [{"type": "video"}, {"type": "text", "text": "".join(s.text for s in question_spans(MOVE))}]
    head = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    return [*head, {"role": "user", "content": user}]


def frames_of(name: str, frames: int = 3, **more: Any) -> Any:
    return tiny.clip(frames, 16 if name.startswith("qwen") or name == "video_llama_3" else 24, 24, **more)


def prepared(name: str, frames: int = 3) -> tuple[Family, Any, dict[str, Any], VideoGrid, list[Span]]:
    family, config, clip = find(tiny.config(name)), tiny.config(name), frames_of(name, frames)
    pixels, grid = family.pixels(clip, config, tiny.preprocessor(name))
    return family, config, pixels, grid, family.video_spans(clip, grid)


def written(spans: list[Span], name: str) -> str:
    """The turn as text, the whole video as the one text the template writes for it."""
    out, inside = [], False
    for s in spans:
        video = s.rows is not None or s.role == "separator"
        out.append(WRITTEN.get(name, "<video>") if video and not inside else "" if video else s.text)
        inside = video
    return "".join(out)


# ---- discovery ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_find_known(name: str) -> None:
    family = find(tiny.config(name))
    assert type(family) is not Family
    assert name in family.model_types


@pytest.mark.parametrize("name", tiny.UNKNOWN)
def test_find_unknown_gives_the_base_family(name: str) -> None:
    assert type(find(tiny.config(name))) is Family


@pytest.mark.parametrize("name", [*tiny.FAMILIES, *tiny.UNKNOWN])
def test_tower_and_connector(name: str) -> None:
    hf = tiny.build(name)
    family = find(hf.config)
    assert len(family.tower_layers(hf)) == 4
    connector = family.connector(hf)
    assert connector is not None
    widths = []
    connector.register_forward_hook(lambda _m, _a, out: widths.append(out.shape[-1]))
    with torch.no_grad():
        hf(**tiny.inputs(name))
    assert 64 in widths  # it runs, and reaches the decoder's width


def test_no_tower_no_connector() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert list(Family().tower_layers(model)) == []
    assert Family().connector(model) is None


def test_placeholder() -> None:
    assert find(tiny.config("internvl")).placeholder(tiny.config("internvl")) == tiny.IMAGE
    assert find(tiny.config("llava_next_video")).placeholder(tiny.config("llava_next_video")) == tiny.VIDEO
    with pytest.raises(ModelError, match="names no video token"):
        Family().placeholder(SimpleNamespace(model_type="text_only"))


# ---- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_mm_token_type_ids(name: str) -> None:
    x, config = tiny.inputs(name, worlds=2, pad=2), tiny.config(name)
    family = find(config)
    made = family.extra_inputs(x["input_ids"], config)
    assert torch.equal(made["mm_token_type_ids"], x["mm_token_type_ids"])
    assert family.missing_inputs(x, config) == []
    del x["mm_token_type_ids"]
    assert family.missing_inputs(x, config) == ["mm_token_type_ids"]


def test_missing_inputs_of_video_llama_3() -> None:
    x, config = tiny.inputs("video_llama_3"), tiny.config("video_llama_3")
    del x["video_merge_sizes"]
    assert find(config).missing_inputs(x, config) == ["video_merge_sizes"]
    assert find(config).extra_inputs(x["input_ids"], config) == {}
    assert find(config).missing_inputs({"input_ids": x["input_ids"]}, config) == []  # a prompt without video


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_pixels_fit_the_model(name: str, frames: int) -> None:
    """The grid of `pixels` is the number of placeholders the model wants, and `grids` reads the same from the tensors."""
    family, config, pixels, grid, video = prepared(name, frames)
    spans = family.turn(video, question_spans(MOVE), answer_spans(MOVE))
    ids, tokens = lay_out(spans, grid, tiny.tokenizer(name), family.placeholder(config))
    x = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **pixels,
        **family.extra_inputs(ids, config),
    }
    assert int((ids == family.placeholder(config)).sum()) == len(grid)
    read = family.grids(config, x)[0]
    for column in ("frame", "row", "col", "weight", "source"):
        assert torch.equal(getattr(read, column), getattr(grid, column)), column
    with torch.no_grad():
        assert tiny.build(name)(**x).logits.isfinite().all()  # get_placeholder_mask accepts it
    assert tokens.n_frames == (-(-frames // 2) if name.startswith("qwen") else frames)


@pytest.mark.parametrize(
    "name", [n for n in tiny.FAMILIES if not n.startswith("qwen") and n != "video_llama_3"]
)
def test_pixels_without_a_preprocessor(name: str) -> None:
    config = tiny.config(name)
    pixels, grid = find(config).pixels(tiny.clip(2, 40, 56), config, None)
    assert next(iter(pixels.values())).shape[-2:] == (24, 24)
    assert grid.frame.max() == 1


def test_patchified_without_a_preprocessor_keep_the_published_budget() -> None:
    for name, at_least in (("qwen2_5_vl", 128 * 28 * 28), ("video_llama_3", 128 * 28 * 28)):
        config = tiny.config(name)
        pixels, grid = find(config).pixels(tiny.clip(2, 16, 24), config, None)
        _, rows, cols = pixels["video_grid_thw"][0].tolist()
        assert rows * cols * 16 >= at_least  # patches of 4 x 4 pixels
        assert len(grid) * 4 == pixels["video_grid_thw"].prod()


def test_wrong_preprocessor_is_refused() -> None:
    wrong = replace(tiny.preprocessor("llava_onevision"), size={"height": 32, "width": 32})
    for name in ("llava_onevision", "llava_next_video", "internvl"):
        with pytest.raises(ModelError, match="32 x 32.*24 x 24"):
            find(tiny.config(name)).pixels(tiny.clip(2), tiny.config(name), wrong)


def test_unknown_family_has_no_pixels() -> None:
    with pytest.raises(UsageError, match="prepare_inputs"):
        Family().pixels(tiny.clip(2), tiny.config("smolvlm"), None)


def test_compression_drops_still_frames() -> None:
    """VideoLLaMA3: a frame equal to the one before keeps one token; the grid follows the mask."""
    config, clip = tiny.config("video_llama_3"), frames_of("video_llama_3", 3)
    still = replace(clip, pixels=clip.pixels[[0, 0, 2]])
    family, pre = find(config), tiny.preprocessor("video_llama_3")
    _, whole = family.pixels(still, config, pre)
    x, grid = family.pixels(still, config, replace(pre, use_token_compression=True))
    assert (len(whole), len(grid), int(x["video_compression_mask"].sum())) == (18, 13, 13)
    assert grid.frame.tolist() == [0] * 6 + [1] + [2] * 6
    assert grid.source.tolist() == list(range(13))
    assert [s.rows for s in family.video_spans(still, grid) if s.rows] == [(0, 6), (6, 7), (7, 13)]


# ---- how a video is written -----------------------------------------------------------------------------------------


def texts(name: str, frames: int = 3) -> list[str]:
    return [s.text if s.rows is None else "*" for s in prepared(name, frames)[4]]


def test_video_spans() -> None:
    start, end = "<|vision_start|>", "<|vision_end|>"
    assert texts("llava_onevision") == ["*"] * 4  # three frames and the newline token
    assert texts("llava_next_video") == ["*"] * 3
    assert texts("qwen2_5_vl") == [start, "*", "*", end]
    assert texts("qwen3_vl") == ["<0.2 seconds>", start, "*", end, "<1.0 seconds>", start, "*", end]
    assert "".join(texts("internvl")) == "Frame1: <img>*</img>\nFrame2: <img>*</img>\nFrame3: <img>*</img>"
    assert texts("video_llama_3") == ["Time 0.0s:", "*", ",Time 0.5s:", "*", ",Time 1.0s:", "*"]


def test_roles_and_kinds_of_what_is_written() -> None:
    for name in tiny.FAMILIES:
        for span in prepared(name)[4]:
            assert span.role == ("frame" if span.rows and span.frame is not None else "separator"), (
                name,
                span,
            )
    assert {s.kind for s in prepared("qwen3_vl")[4]} == {"time", "text", "video"}
    assert {s.kind for s in prepared("internvl")[4]} == {"text", "video"}
    assert [s.frame for s in prepared("video_llama_3")[4]] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "index, fps", [([4, 5], 10.0), ([0, 15, 30, 45], 30.0), ([3, 4, 6, 9], 10.0), ([1, 2, 3], 29.97)]
)
def test_qwen3_times_as_the_processor_writes_them(index: list[int], fps: float) -> None:
    """Equal to transformers' `_calculate_timestamps` for the same frame indices and rate."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    want = Qwen3VLProcessor._calculate_timestamps(None, list(index), fps, 2)  # type: ignore[arg-type]
    at = torch.tensor(index)
    clip = replace(frames_of("qwen3_vl", len(index)), index=at, seconds=at / fps, fps=fps)
    _, grid = find(tiny.config("qwen3_vl")).pixels(
        clip, tiny.config("qwen3_vl"), tiny.preprocessor("qwen3_vl")
    )
    spans = find(tiny.config("qwen3_vl")).video_spans(clip, grid)
    assert [s.text for s in spans if s.kind == "time"] == [f"<{t:.1f} seconds>" for t in want]


def processor_text(name: str, clip: Any, x: dict[str, Any]) -> str:
    """What transformers' own processor puts in the place of one video, by its `replace_video_token`."""
    module = importlib.import_module(f"transformers.models.{name}.processing_{name}")
    kind = next(k for n, k in vars(module).items() if n.endswith("Processor") and n != "ProcessorMixin")
    tokenizer, config = tiny.tokenizer(name), tiny.config(name)
    metadata = VideoMetadata(int(clip.index[-1]) + 1, clip.fps, frames_indices=clip.index.tolist())
    me = SimpleNamespace(
        image_token=tokenizer.decode([tiny.IMAGE]), video_token=tokenizer.decode([tiny.VIDEO]), num_image_tokens=36,
        patch_size=4, image_seq_length=9, start_image_token="<img>", end_image_token="</img>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=temporal_patch(config)),
    )  # fmt: skip
    me._calculate_timestamps = lambda *a: kind._calculate_timestamps(me, *a)
    whole = {"pixel_values_videos": x["pixel_values"][None]} if name == "internvl" else x
    return kind.replace_video_token(me, {**whole, "video_metadata": [metadata]}, video_idx=0)


@pytest.mark.parametrize("frames", [2, 5])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_video_is_written_as_the_processor_writes_it(name: str, frames: int) -> None:
    """Times, labels, marks, commas and the number of placeholders, against transformers' own code."""
    config, clip = tiny.config(name), frames_of(name, frames)
    clip = replace(clip, index=7 * clip.index + 2, seconds=(7 * clip.index + 2) / 29.97, fps=29.97)
    family, placeholder = find(config), tiny.tokenizer(name).decode([find(config).placeholder(config)])
    x, grid = family.pixels(clip, config, tiny.preprocessor(name))
    spans = family.video_spans(clip, grid)
    got = "".join(s.text if s.rows is None else placeholder * (s.rows[1] - s.rows[0]) for s in spans)
    want = processor_text(name, clip, x)
    # Qwen2.5-VL: the marks are the chat template's, not the processor's
    assert got == (f"<|vision_start|>{want}<|vision_end|>" if name == "qwen2_5_vl" else want)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_whole_prompt_is_the_processors(name: str) -> None:
    """Template rendered, video expanded by transformers' processor, tokenised: the ids of `lay_out`."""
    tokenizer, clip, config = tiny.tokenizer(name, TEMPLATES[name]), frames_of(name), tiny.config(name)
    family, (x, grid) = find(config), find(config).pixels(clip, config, tiny.preprocessor(name))
    video = family.video_spans(clip, grid)
    spans = family.turn_for(tokenizer, video, question_spans(MOVE), [])
    ids, _ = lay_out(spans, grid, tokenizer, family.placeholder(config))
    text = tokenizer.apply_chat_template(messages(), tokenize=False, add_generation_prompt=True)
    # Qwen3-VL as released: the template's marks go with the placeholder (transformers 5.10 and later keep them)
    mark = {"qwen2_5_vl": "<|video_pad|>"}.get(name, WRITTEN.get(name, "<video>"))
    want = text.replace(mark, processor_text(name, clip, x))
    assert ids[0].tolist() == tokenizer(want)["input_ids"]


def test_clock() -> None:
    clip = tiny.clip(3, fps=10.0)
    assert clock(clip) == [0.0, 0.1, 0.2]  # double precision: not 0.10000000149
    late = replace(clip, seconds=clip.seconds + 0.3)  # variable rate: the file's own times win
    assert clock(late) == pytest.approx([0.3, 0.4, 0.5])
    assert clock(replace(clip, fps=0.0)) == pytest.approx([0.0, 0.1, 0.2])
    assert tubelet_times([0.0, 1.0, 2.0], 2) == [0.5, 2.0]


def test_sampled_fps() -> None:
    clip = replace(tiny.clip(4, fps=30.0), duration=2.0)
    assert sampled_fps(clip) == pytest.approx(2.0)  # 4 of 60 frames at 30 a second
    assert sampled_fps(replace(clip, duration=0.0)) == pytest.approx(30.0)  # from the times
    assert sampled_fps(replace(clip, duration=0.0, seconds=torch.zeros(4))) == 0.0
    x, _ = find(tiny.config("qwen2_5_vl")).pixels(
        clip, tiny.config("qwen2_5_vl"), tiny.preprocessor("qwen2_5_vl")
    )
    assert x["second_per_grid_ts"].tolist() == [1.0]


# ---- chat turns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("own_template", [False, True])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_turn_is_the_chat_template(name: str, own_template: bool, system: str | None) -> None:
    """Built-in pieces and pieces cut from the template both spell what `apply_chat_template` spells."""
    tokenizer = tiny.tokenizer(name, TEMPLATES[name])
    want = tokenizer.apply_chat_template(messages(system), tokenize=False, add_generation_prompt=True)
    family, video = find(tiny.config(name)), prepared(name)[4]
    user = question_spans(MOVE)
    if own_template:
        spans = family.turn_from_template(tokenizer, video, user, [], system)
    else:
        spans = family.turn(video, user, [], system)
    got = written(spans, name)
    assert got.removeprefix("<s>") == want
    assert got.startswith("<s>") == (name == "llava_next_video" and not own_template)
    assert [s for s in spans if s.rows] == [s for s in video if s.rows]
    wanted_system = system or ("You are a helpful assistant." if name == "qwen2_5_vl" else None)
    assert [s.text for s in spans if s.role == "system"] == [wanted_system] * (wanted_system is not None)


def test_llava_onevision_turn_to_the_letter() -> None:
    family, video = find(tiny.config("llava_onevision")), prepared("llava_onevision")[4]
    spans = family.turn(video, [Span("question", "TEXT")], [])
    assert (
        written(spans, "llava_onevision") == "<|im_start|>user <video>\nTEXT<|im_end|><|im_start|>assistant\n"
    )
    assert [s.role for s in spans if s.rows is None] == ["template", "connector", "question", "template"]


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_connector_lies_between_video_and_question(name: str) -> None:
    tokenizer = tiny.tokenizer(name, TEMPLATES[name])
    family, video = find(tiny.config(name)), prepared(name)[4]
    for spans in (
        family.turn(video, question_spans(MOVE), answer_spans(MOVE)),
        family.turn_for(tokenizer, video, question_spans(MOVE), answer_spans(MOVE)),
    ):
        end_of_video = max(i for i, s in enumerate(spans) if s.rows is not None or s.role == "separator")
        first_user = [s.role for s in spans].index("question")
        between = [(s.role, s.text) for s in spans[end_of_video + 1 : first_user]]
        assert between == ([] if name.startswith("qwen") else [("connector", "\n")])
        assert spans[-1].text == answer_spans(MOVE)[0].text


def test_answer_is_parted_from_a_word() -> None:
    family = find(tiny.config("llava_next_video"))
    spans = family.turn([], [Span("question", "Why?")], [Span("template", "Because")])
    assert "".join(s.text for s in spans) == "<s>USER: Why? ASSISTANT: Because"


def test_no_system_prompt_on_demand() -> None:
    family = find(tiny.config("qwen2_5_vl"))
    assert not [s for s in family.turn([], [Span("question", "Why?")], [], "") if s.role == "system"]


def test_template_that_knows_only_text() -> None:
    """The video then stands in front of the user's text, with the family's own text between them."""
    tokenizer = tiny.tokenizer("qwen3_vl", PLAIN)
    family, video = find(tiny.config("qwen3_vl")), prepared("qwen3_vl")[4]
    spans = family.turn_for(tokenizer, video, [Span("question", "Why?")], [Span("template", "So")], "Hm.")
    assert written(spans, "qwen3_vl") == f"[system] Hm. [user] {MARKED}Why? [bot] So"


def test_bos_as_the_tokenizer_would_add_it() -> None:
    """Processors let the tokenizer add bos unless the template wrote it; so do we, once."""
    from tokenizers.processors import TemplateProcessing

    name = "llava_next_video"
    for template, adds in (
        (TEMPLATES[name], True),
        ("{{ bos_token }}" + TEMPLATES[name], True),
        (TEMPLATES[name], False),
    ):
        tokenizer = tiny.tokenizer(name, template)
        if adds:
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", tiny.BOS)]
            )
        spans = find(tiny.config(name)).turn_for(tokenizer, prepared(name)[4], question_spans(MOVE), [])
        assert [s.role for s in spans].count("bos") == adds
        assert written(spans, name).count("<s>") == adds


@pytest.mark.parametrize(
    "template, message",
    [
        (TEMPLATES["qwen3_vl"].replace("{{ c.text }}", "{{ c.text + c.text }}"), "2 user texts"),
        (TEMPLATES["qwen3_vl"].replace("{{ c.text }}", ""), "0 user texts"),
        (TEMPLATES["qwen3_vl"].replace(MARKED, MARKED * 2), "writes the video 2 times"),
        ("{{ raise_exception('no videos here') }}", "no videos here"),
        ("{% if %}", "cannot write a user turn"),
    ],
)
def test_templates_that_cannot_be_used(template: str, message: str) -> None:
    tokenizer = tiny.tokenizer("qwen3_vl", template)
    family, video = find(tiny.config("qwen3_vl")), prepared("qwen3_vl")[4]
    with pytest.raises(PromptError, match=message):
        family.turn_from_template(tokenizer, video, question_spans(MOVE), [])


def test_template_without_system_prompt_refuses_one() -> None:
    template = TEMPLATES["qwen3_vl"].replace(
        "{% for m in messages %}", "{% for m in messages if m.role == 'user' %}"
    )
    tokenizer = tiny.tokenizer("qwen3_vl", template)
    with pytest.raises(PromptError, match="system prompt 0 times"):
        find(tiny.config("qwen3_vl")).turn_from_template(
            tokenizer, [], [Span("question", "Why?")], [], "Be brief."
        )


def test_private_characters_are_refused() -> None:
    for family, system in (
        (find(tiny.config("qwen3_vl")), None),
        (find(tiny.config("llava_onevision")), "\ue0f1"),
    ):
        with pytest.raises(PromptError, match="private-use"):
            family.turn([], [Span("question", "Why\ue0f0?" if system is None else "Why?")], [], system)


def test_user_text_may_look_like_the_template() -> None:
    """A question that spells a video mark is the user's text, not a second video."""
    tokenizer = tiny.tokenizer("qwen3_vl", TEMPLATES["qwen3_vl"])
    family, video = find(tiny.config("qwen3_vl")), prepared("qwen3_vl")[4]
    spans = family.turn_for(tokenizer, video, [Span("question", f"What is {MARKED}?")], [])
    assert sum(s.rows is not None for s in spans) == 2
    assert [s.text for s in spans if s.role == "question"] == [f"What is {MARKED}?"]


# ---- geometry -------------------------------------------------------------------------------------------------------


def test_join_counts_on() -> None:
    a = VideoGrid.regular(2, 1, 2, seconds=torch.tensor([0.0, 1.0]), weight=4).plus_newline()
    both = join([a, a])
    assert both.frame.tolist() == [0, 0, 1, 1, -1, 2, 2, 3, 3, -1]
    assert both.source.tolist() == list(range(10))
    assert len(join([])) == 0


def test_share_out() -> None:
    a, b = (VideoGrid.regular(n, 1, 2, seconds=None, weight=1) for n in (1, 2))
    assert [[len(g) for g in world] for world in share_out([a, b, a], [6, 0, 2])] == [[2, 4], [], [2]]
    with pytest.raises(PromptError, match="world 1: 3 video placeholders.*make 4"):
        share_out([a, b], [2, 3])
    with pytest.raises(PromptError, match="world 0: 5 .* make 2"):
        share_out([a], [5])
    with pytest.raises(PromptError, match="2 video placeholders.*make 6"):
        share_out([a, b], [2])


def test_frame_spans_of_dropped_tokens() -> None:
    grid = VideoGrid.regular(3, 1, 2, seconds=torch.tensor([0.0, 1.0, 2.0]), weight=1).plus_newline()
    spans = frame_spans(grid[torch.tensor([0, 1, 4, 6])])
    assert [(s.role, s.rows, s.frame, s.seconds) for s in spans] == [
        ("frame", (0, 2), 0, 0.0), ("frame", (2, 3), 2, 2.0), ("separator", (3, 4), None, None),
    ]  # fmt: skip
    assert frame_spans(grid[:0]) == []
