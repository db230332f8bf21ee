# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   lab:
#     budget_seconds: 60
# ---

# %% [markdown]
# # Bring your own model
#
# Any LLaVA-OneVision, LLaVA-NeXT-Video, Qwen2.5-VL, Qwen3-VL, InternVL3 or VideoLLaMA3 checkpoint in transformers' format:
# a folder or a hub id. Here we build such a folder ourselves, a random Qwen2.5-VL of a third of a million weights, so that this
# notebook runs anywhere without a download. **To use your own, skip the next two code cells and set `MODEL` to your folder
# or hub id**; everything after them stays as it is.

# %%
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import lab
from lab.cli.health import check
from lab.model.memory import predict
from lab.model.zoo import DATA
from lab.sim.tasks import draw_items
from lab.view.draw import show

lab.about()

# %% [markdown]
# ## A checkpoint is a folder
#
# `config.json`, weights as `.safetensors`, a tokenizer, and the preprocessor's settings. We write these four: the
# architecture is transformers' own, only small, and the tokenizer is `tiny`'s with Qwen's video marks added. The lab reads
# safetensors only, runs no code that a checkpoint brings, and asks no network for a folder.

# %%
tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny")
tokenizer.chat_template = None  # the family's published one is used
marks = ["<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]
tokenizer.add_special_tokens({"additional_special_tokens": marks})
names = ("vision_start_token_id", "vision_end_token_id", "video_token_id", "image_token_id")
text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]})  # fmt: skip
tower = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=8, out_hidden_size=64, window_size=32,
             fullatt_block_indexes=[1])  # fmt: skip
config = Qwen2_5_VLConfig(
    text_config=text,
    vision_config=tower,
    **dict(zip(names, map(tokenizer.convert_tokens_to_ids, marks), strict=True)),
)

# %%
MODEL = "out/my-qwen"
torch.manual_seed(0)
Qwen2_5_VLForConditionalGeneration(config).save_pretrained(MODEL)
tokenizer.save_pretrained(MODEL)
settings = {"size": {"shortest_edge": 4096, "longest_edge": 10**6}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
            "patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}  # fmt: skip
(Path(MODEL) / "video_preprocessor_config.json").write_text(json.dumps(settings))
sorted(file.name for file in Path(MODEL).iterdir())

# %% [markdown]
# ## Will it fit?
#
# Before anything is loaded: the memory a run will take, from the config alone. `vlab doctor MODEL --frames N` prints this,
# with what is installed and what is in the way (for a video of 640 x 360). Look at three lines: `weights`, which bfloat16
# halves; `kv` and `activations`, which grow with the frames; and `one pattern`, the attention of one layer in full, which
# breaks first. That is why patterns exist only for layers you name, and shares of attention are summed without them.

# %%
print(check(MODEL, 16, None, None).text.partition("\n\n")[2])
decoder = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
seven_b = Qwen2_5_VLConfig(
    text_config=decoder, vision_config=dict(hidden_size=1280, intermediate_size=3420, out_hidden_size=3584)
)
for frames in (8, 64):
    big = predict(seven_b, n_frames=frames, dtype="bfloat16", device="cuda")
    print(
        f"Qwen2.5-VL 7B, {frames} frames: {big.positions:,} positions, {big.total / 1e9:.0f} GB of GPU memory"
    )

# %% [markdown]
# ## Load it
#
# `lab.load` wraps the model and checks it on arrival: its logits against plain transformers' on one prompt, that every layer
# is seen, and that the token map says what arrives at the decoder. If something does not fit, it says what. On a GPU:
# `lab.load(MODEL, dtype="bfloat16")`, or `device_map="auto"` for more than one.

# %%
model = lab.load(MODEL)
c = model.cfg
print(
    f"{c.n_layers} layers, {c.n_heads} heads over {c.n_key_value_heads} of keys, d_model {c.d_model}, on {model.device}"
)
lab.about(model)

# %% [markdown]
# ## Look at its tokens
#
# Families differ most in what a video becomes. Qwen2.5-VL merges two frames to a tubelet and 2 x 2 patches to a token; the
# lab's `frame` is then a tubelet. The prompt was rendered by the family's own template; every position has one role.

# %%
items = draw_items("moving_direction", 2, seed=4)
ready = model.prepare(items[0], n_frames=8)
tokens, grid = ready.tokens, ready.grids[0]
print(len(tokens), "positions:", {role: tokens.roles().count(role) for role in dict.fromkeys(tokens.roles())})
print(
    f"{tokens.n_frames} tubelets of {int(grid.row.max()) + 1} x {int(grid.col.max()) + 1} tokens, {grid.weight[0]:.0f} patches each"
)
print(repr(ready.prompt[:200]))

# %% [markdown]
# ## Every instrument works
#
# The same sweep as for `tiny`. The curves of a random model mean nothing, but they are there: hooks, cuts and the fast
# executor run on your architecture. The check that counts is exactness: the fast sweep gives the numbers of one full,
# masked run per point.

# %%
fast = lab.edges.sweep(model, items, window=2, show_progress=False)
plain = lab.edges.sweep(model, items, window=2, executor="reference", show_progress=False)
print(f"largest difference between fast and reference: {abs(fast.values - plain.values).max():.1e} %")
show(fast, title=f"{MODEL}: any checkpoint, the same sweep")

# %% [markdown]
# On a GPU: start with 8 frames and 10 questions, look at the ledger, then more. Half precision rounds: effects as small as
# its noise are compared with a clean run through the same path, and `lab.edges.sweep(..., out="out/sweep")` keeps a journal
# so that an interrupted sweep goes on. A family the lab does not know is one file in `lab/model/families/` (see
# CONTRIBUTING); until then `lab.wrap(model)` with `prepare_inputs(**processor(...))` already gives hooks, cuts and sweeps.
