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
# ---

# %% [markdown]
# # A first look into a VideoLLM
#
# We load a small video language model, ask it about a clip, and find out where its answer comes from. The bundled model
# `tiny` is a real LLaVA-OneVision (SigLIP-style tower, Qwen2 decoder), only small: 1.4 M parameters, trained on moving
# shapes. Everything below runs unchanged on a checkpoint of 7B: put its folder or hub id in place of `"tiny"`.

# %%
from pathlib import Path

import lab
from lab.view.draw import show
from probes.knockout import knockout

model = lab.load("tiny", device="cpu")
items = lab.load_items(Path(lab.__file__).parent / "data" / "clips" / "items.yaml")
item = items[0]
item

# %% [markdown]
# ## Ask
#
# `prepare` samples frames and lays the prompt out; it touches no weights. `answer` reads the probability of each option's
# letter at the last position.

# %%
ready = model.prepare(item, n_frames=8)
answer = model.answer(ready)
dict(zip(item.options, answer.option_probs.round(decimals=3).tolist(), strict=True))

# %% [markdown]
# ## What is every position?
#
# The token map gives every position exactly one role, by construction: nothing is searched for in the text. Say positions
# by role, never by number.

# %%
tokens = ready.tokens
print(
    len(tokens), "positions;", len(tokens.where(role="video")), "of them video, in", tokens.n_frames, "frames"
)
print("option 1 stands at", tokens.where(role="option", option=1).tolist())
print("frame 3, row 0 stands at", tokens.where(role="frame", frame=3, row=0).tolist())
print("the answer is read at", int(tokens.last))

# %% [markdown]
# ## Look inside
#
# Hook points carry TransformerLens's names, and `run_with_cache` gives its `ActivationCache`. Here: how far the residual
# stream of the last position already points to the right letter, layer by layer (a logit lens through the final norm).

# %%
logits, cache = model.run_with_cache(ready)
stream, labels = cache.accumulated_resid(apply_ln=True, return_labels=True)
letters = [model.to_single_token(letter) for letter in "ABCD"]
lens = (stream[:, 0, int(tokens.last)] @ model.W_U)[:, letters].softmax(-1)
for label, row in zip(labels, lens, strict=True):
    print(f"{label:>11}", " ".join(f"{p:.2f}" for p in row.tolist()))

# %% [markdown]
# ## Cut, and watch the answer move
#
# Attention knock-out: for every pathway and every window of three layers, cut the pathway's attention edges in all heads
# and measure how the probability of the answer changes. Where a curve drops, the answer was passing. A curve near zero
# says only that this pathway alone was not needed there: another one may carry the same.

# %%
result = knockout(model, items, window=3, show_progress=False)
show(result)

# %% [markdown]
# The null test belongs beside every probe: a knock-out that cuts nothing must change nothing.

# %%
assert (knockout(model, item, ["none"], window=3, show_progress=False).values == 0).all()

# %% [markdown]
# ## Do it again, anywhere
#
# A result carries the recipe that made it. `vlab run recipe.yaml` gives the same numbers again, and every figure redraws
# from the saved result without a model.

# %%
result.recipe["kind"], result.recipe["pathways"], result.recipe["window"]
