"""Loading and wrapping: from disk, checked on arrival; damaged or foreign checkpoints are refused in one clear line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lab.errors import LabError, LabWarning, ModelError, UsageError
from lab.model import verifying
from lab.model.zoo import load, weights_hash, wrap
from tests import families
from tests.families import FAMILIES, UNKNOWN, inputs


@pytest.fixture
def copied(saved, tmp_path):
    def copy(name):
        return shutil.copytree(saved(name), tmp_path / name)

    return copy


def _with_tokenizer(name, folder):
    families.tokenizer(name).save_pretrained(folder)
    pre = families.preprocessor(name)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "size": dict(pre.size), "patch_size": pre.patch_size, "merge_size": pre.merge_size,
        "temporal_patch_size": pre.temporal_patch_size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }))  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES + UNKNOWN)
def test_verify_measures_the_difference(name, wrapped):
    found = verifying.verify(wrapped(name))
    assert found["logits"] == 0.0 and found["residual"] < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_with_tokenizer_and_preprocessor_asks(name, copied, recwarn):
    """As a user's checkpoint lies on disk: config, weights, tokenizer, preprocessor json."""
    folder = copied(name)
    _with_tokenizer(name, folder)
    model = load(folder, device="cpu")
    assert model.preprocessor is not None and not [w for w in recwarn if w.category is LabWarning]
    from lab.carriers import VideoQA

    answer = model.answer(VideoQA(families.clip(4), "which?", ("a", "b"), 0), n_frames=4)
    assert answer.letter in "AB" and not any(p.requires_grad for p in model.hf.parameters())
    assert model.spec["weights"] == weights_hash(folder)


def test_the_audit_sees_a_wrong_map(copied, monkeypatch):
    folder = copied("llava_onevision")
    families.tokenizer("llava_onevision").save_pretrained(folder)
    model = load(folder, device="cpu")
    true = model.see
    monkeypatch.setattr(model, "see", lambda ready: _one_video_row_lost(true(ready), ready, model))
    with pytest.raises(ModelError, match="video positions"):
        verifying.audit(model)


def _one_video_row_lost(door, ready, model):
    at = int(ready.tokens.where(kind="video")[0])
    door.embeds[:, at] = model.hf.get_input_embeddings()(ready.inputs["input_ids"])[:, at]
    return door


def test_verify_sees_another_loop(plain, monkeypatch):
    """If our loop were not the model's own (here: the final norm is lost), loading must fail with both numbers."""
    model = wrap(plain("llava_onevision"))
    monkeypatch.setattr(type(model.ln_final), "forward", lambda self, resid: resid)
    with pytest.raises(ModelError, match=r"differ from plain transformers' by .*bound"):
        verifying.verify(model)


def test_a_second_wrapper_has_its_own_points(plain):
    hf = plain("internvl")
    one, two = wrap(hf), wrap(hf)
    ready = one.prepare_inputs(**inputs("internvl"))
    with torch.no_grad():
        clean = one(ready)
        hooked = one.run_with_hooks(ready, fwd_hooks=[("blocks.1.hook_mlp_out", lambda v, hook: v * 2)])
        with one.hooks([("blocks.1.hook_mlp_out", lambda v, hook: v * 2)]):
            assert torch.equal(two(two.prepare_inputs(**inputs("internvl"))), clean)
    assert not torch.equal(hooked, clean)
    expected = one.run_with_hooks(ready, fwd_hooks=[("blocks.1.hook_mlp_out", lambda v, hook: v * 2)])
    assert torch.equal(hooked, expected)


def _nan(folder):
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _lost(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(k for k in weights if "q_proj.weight" in k))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _cut_short(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _no_config(folder):
    (folder / "config.json").unlink()


def _bad_config(folder):
    (folder / "config.json").write_text("{not json")


def _text_model(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


def _unknown_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _pickle_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04K\x01.")


def _other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE = {
    _nan: "nan or infinite", _lost: "weights missing", _cut_short: "cannot load", _no_config: "no config.json",
    _bad_config: "cannot load", _text_model: "cannot load", _unknown_type: "cannot load", _no_weights: "cannot load",
    _pickle_only: "cannot load", _other_sizes: "cannot load|wrong shape",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_checkpoints(damage, copied):
    folder = copied("llava_onevision")
    damage(folder)
    with pytest.raises(ModelError, match=DAMAGE[damage]) as e:
        load(folder, device="cpu")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"name": "no/such/folder"}, "no checkpoint at"), ({"name": "tinny"}, "no checkpoint at"),
        ({"device": "gpu"}, "cannot be used"), ({"device": "cuda:99"}, "cannot be used"), ({"dtype": "int8"}, "not one of"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
    ],
)  # fmt: skip
def test_wrong_requests(kw, message, saved):
    with pytest.raises(LabError, match=message):
        load(**{"name": saved("internvl"), **kw})


@pytest.mark.parametrize("what", [None, "model", torch.nn.Linear(2, 2)], ids=["none", "text", "linear"])
def test_what_cannot_be_wrapped(what):
    with pytest.raises(ModelError, match="expected an instantiated transformers model"):
        wrap(what)


def test_a_text_model_cannot_be_wrapped():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ModelError, match="no language model we can find"):
        wrap(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, "input_ids must be"), (lambda x: {**x, "input_ids": x["input_ids"][0]}, "input_ids must be"),
        (lambda x: {**x, "input_ids": x["input_ids"] + 10**6}, "the model has"),
        (lambda x: {**x, "attention_mask": x["attention_mask"][:, 1:]}, "does not fit"),
        (lambda x: {**x, "pixel_values_videos": x["pixel_values_videos"] * float("nan")}, "nan or infinite"),
        (lambda x: {k: v for k, v in x.items() if k != "mm_token_type_ids"}, "mm_token_type_ids missing"),
        (lambda x: {**x, "input_ids": x["input_ids"][:, :-40], "attention_mask": x["attention_mask"][:, :-40],
                    "mm_token_type_ids": x["mm_token_type_ids"][:, :-40]}, r"\d+"),
        (lambda x: {**x, "input_ids": torch.zeros(1, 0, dtype=torch.long)}, "empty"),
    ],
)  # fmt: skip
def test_processor_tensors_that_do_not_fit(change, message, wrapped):
    model = wrapped("qwen2_5_vl")
    with pytest.raises(LabError, match=message):
        model.prepare_inputs(**change(inputs("qwen2_5_vl")))


def test_unknown_hub_names_are_not_fetched_in_tests():
    with pytest.raises(ModelError, match="cannot load"):
        load("nobody/no-such-model", device="cpu")
    with pytest.raises(UsageError, match="not one of"):
        load("nobody/no-such-model", device="cpu", dtype="float3")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_outline_prepares_without_weights(name, copied):
    from lab.carriers import VideoQA
    from lab.model.zoo import outline

    folder = copied(name)
    _with_tokenizer(name, folder)
    item = VideoQA(families.clip(4), "which?", ("a", "b"), 0)
    bare, full = outline(folder), load(folder, device="cpu", verify=False)
    assert all(p.device.type == "meta" for p in bare.hf.parameters())
    ours, theirs = bare.prepare(item, 4), full.prepare(item, 4)
    assert ours.tokens.roles() == theirs.tokens.roles()
    assert all(torch.equal(ours.inputs[k], theirs.inputs[k]) for k in theirs.inputs)


def test_a_template_kept_with_the_processor(copied):
    """Older checkpoints keep the chat template in chat_template.json, which tokenizers do not read."""
    folder = copied("llava_onevision")
    _with_tokenizer("llava_onevision", folder)
    template = "{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'video' %}<video>{% else %}\n{{ c.text }}{% endif %}{% endfor %} BOT:{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    from lab.carriers import VideoQA

    model = load(folder, device="cpu")
    assert model.prepare(VideoQA(families.clip(4), "which?"), 4).prompt.endswith("which? BOT:")
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(ModelError, match="not a chat template"):
        load(folder, device="cpu")
