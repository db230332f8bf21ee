"""The bundled model: its folder loads like any checkpoint, its tokenizer keeps letters apart, its numbers are true."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaOnevisionForConditionalGeneration

from lab.carriers import VideoQA
from lab.learn import vocabulary
from lab.learn.sft import Part, Stage, Trainer, pack
from lab.learn.tiny_checks import answers, right, through_mp4
from lab.learn.tiny_data import FRAMES, VIDEO, Batches, Prompts, shrink, to_pixels
from lab.learn.tiny_model import config
from lab.model.zoo import load
from lab.sim.moving import DIRECTIONS, items
from lab.video import read

FOLDER = Path(__file__).parent.parent / "lab" / "data" / "tiny"
CLIPS = FOLDER.parent / "clips"


@cache
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True).eval()


@cache
def prompts() -> Prompts:
    return Prompts(AutoTokenizer.from_pretrained(FOLDER, local_files_only=True))


def test_folder_is_a_small_checkpoint() -> None:
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 8e6
    assert not [f.name for f in FOLDER.iterdir() if f.suffix in (".bin", ".pt", ".pkl", ".py")]
    cfg = model().config
    assert cfg.model_type == "llava_onevision" and cfg.text_config.num_hidden_layers >= 8
    assert cfg.text_config.num_key_value_heads < cfg.text_config.num_attention_heads


def test_tokenizer_on_disk_is_the_one_the_code_builds(tmp_path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (vocabulary.save(tmp_path) / name).read_text() == (FOLDER / name).read_text()


def test_letters_are_single_tokens_and_case_of_words_is_free() -> None:
    tokenizer = prompts().tokenizer
    letters = tokenizer("(A) (B) (C) (D)", add_special_tokens=False)["input_ids"]
    assert len(letters) == 12 and len(set(letters)) == 6
    upper, lower = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("Which Way", "which way"))
    assert upper == lower and tokenizer.unk_token_id not in upper


def test_offsets_are_those_of_the_text_as_written() -> None:
    text = "Question: Which way\n(A) Left?"
    coded = prompts().tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pieces = [text[a:b] for a, b in coded["offset_mapping"]]
    assert pieces == ["Question", ":", "Which", "way", "(", "A", ")", "Left", "?"]


def test_chat_template_gives_the_prompt_training_used() -> None:
    item = items(1, seed=1)[0]
    text = f"Question: {item.question}\nOptions:"
    text += (
        "".join(f"\n({c}) {o}" for c, o in zip("ABCD", item.options, strict=True))
        + "\nOnly give the best option."
    )
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}
    tokenizer = prompts().tokenizer
    written = (
        tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        + "Best option: ("
    )
    ids = tokenizer(written.replace("<video>", "<video>" * VIDEO), add_special_tokens=False)["input_ids"]
    assert ids == prompts().whole(item)[0].tolist()


def test_video_pairs_are_more_than_half_of_all_pairs() -> None:
    length = prompts().whole(items(1, seed=1)[0]).shape[1]
    assert length - VIDEO <= 50 and 0.5 * length**2 < (VIDEO - 1) ** 2


def test_packed_lists_see_what_they_would_see_alone() -> None:
    batch = Batches(prompts(), seed=0).video(3, worlds=2, lists=3)
    assert batch.pixels is not None
    with torch.no_grad():
        packed = model().model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            pixel_values_videos=batch.pixels,
        )
        for at in batch.at.tolist():
            rows = batch.mask[0, 0, at].nonzero()[:, 0]
            alone = model().model(input_ids=batch.ids[:, rows], pixel_values_videos=batch.pixels)
            gap = (packed.last_hidden_state[:, at] - alone.last_hidden_state[:, -1]).abs().max()
            assert gap < 1e-4


def test_blocks_do_not_see_each_other() -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    want = torch.zeros(1, dtype=torch.long)
    batch = pack([Part(ids), Part(ids, 0, (("x", 1, want),)), Part(ids, 0, (("y", 0, want),))])
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3]]
    assert batch.mask[0, 0, 5].tolist() == [True, True, False, False, True, True]
    assert batch.mask[0, 0, 3].tolist() == [True, True, True, True, False, False]
    assert batch.at.tolist() == [3, 4] and batch.groups == ("x", "y")


def test_same_step_same_batch() -> None:
    first, second = (Batches(prompts(), seed=0).video(7, worlds=2, lists=1) for _ in range(2))
    assert first.pixels is not None and second.pixels is not None
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.ids, second.ids)


def test_resumed_training_gives_the_weights_of_an_uninterrupted_one(tmp_path) -> None:
    def trainer(folder: str, steps: int) -> Trainer:
        torch.manual_seed(0)
        hf = LlavaOnevisionForConditionalGeneration(config())
        batches = Batches(prompts(), seed=0)
        stage = Stage("short", lambda step: batches.short(step, worlds=2), ("short_acc", 2.0), steps)
        return Trainer(hf, [stage], tmp_path / folder, check=lambda hf: {})

    whole = trainer("whole", 4)
    whole.run()
    trainer("parts", 2).run()
    rest = trainer("parts", 4)
    assert rest.resume() and rest.progress.step == 2
    rest.progress.stage, rest.progress.stage_step = 0, 2
    rest.run()
    ours, theirs = whole.hf.state_dict(), rest.hf.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "journal.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "ends" in line] == [2, 4]


def test_rate_falls_only_with_decay() -> None:
    stage = Stage("x", lambda step: pack([]), ("x_acc", 0.5), 100, peak=1.0)
    assert stage.rate(0) == 0.02 and stage.rate(60) == 1.0
    assert replace(stage, decay=True).rate(100) == pytest.approx(0.1)


def test_answers_fresh_clips_after_mp4(tmp_path) -> None:
    asked = items(24, seed=31337, frames=24)
    clips = np.stack([through_mp4(item, tmp_path) for item in asked])
    assert right(model(), prompts(), asked, clips)["letter"] >= 0.9


def test_backwards_gives_the_twins_answer_and_blank_gives_none() -> None:
    asked = items(24, seed=4242)
    clips = np.stack([shrink(item.video) for item in asked])
    twins = [item.twin for item in asked if item.twin]
    assert right(model(), prompts(), twins, clips[:, ::-1].copy())["letter"] >= 0.9
    assert right(model(), prompts(), asked, np.full_like(clips, 128))["letter"] <= 0.6


def test_letter_follows_the_option_not_its_place() -> None:
    item = items(1, seed=99)[0]
    clip = shrink(item.video)[None].repeat(4, 0)
    word = item.options[item.answer]
    turned = [item.options[k:] + item.options[:k] for k in range(4)]
    asked = [VideoQA(item.video, item.question, o, o.index(word)) for o in turned]
    letters, _ = answers(model(), prompts(), asked, clip)
    assert letters.tolist() == prompts().word([a.letter or "" for a in asked]).tolist()


def _says(way: str, options: tuple[str, ...]) -> str:
    item = VideoQA(str(CLIPS / f"{way}.mp4"), "Which way does it move?", options)
    frames = read(item.video, n_frames=FRAMES).pixels.permute(0, 2, 3, 1).numpy()
    ids = prompts().whole(item)
    out = model().generate(
        input_ids=ids, pixel_values_videos=to_pixels(shrink(frames)[None]), max_new_tokens=6, do_sample=False
    )
    return prompts().tokenizer.decode(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("way", DIRECTIONS)
def test_says_the_answer_and_stops(way: str) -> None:
    assert _says(way, ()) == f"{way} <|im_end|>"
    options = ("down", "left", "up", "right")
    assert _says(way, options) == f"{'ABCD'[options.index(way)]} ) {way} <|im_end|>"


def test_family_lays_out_the_prompt_training_used() -> None:
    item = VideoQA(str(CLIPS / "left.mp4"), "Which way does the red square move?", DIRECTIONS)
    ready = load(str(FOLDER), verify=False).prepare(item, n_frames=FRAMES)
    assert ready.tokens.ids.tolist() == prompts().whole(item)[0].tolist()


def test_recorded_numbers_and_architecture_match_the_recipe() -> None:
    report = json.loads((FOLDER / "training.json").read_text())
    assert report["parameters"] == sum(p.numel() for p in model().parameters())
    assert report["held_out"]["mp4_letter"] >= 0.9
    mine, theirs = config().text_config, model().config.text_config
    assert (mine.hidden_size, mine.vocab_size, mine.num_hidden_layers) == (
        theirs.hidden_size, theirs.vocab_size, theirs.num_hidden_layers,
    )  # fmt: skip
