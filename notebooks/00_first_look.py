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
# # A first look into a VideoLLM
#
# We load a small video language model, ask it about a clip, and find out where its answer comes from. Then we do the
# same to a model whose circuit we wrote by hand, to learn when such a picture is true and when it is not.
#
# `tiny` is a real LLaVA-OneVision (SigLIP-style tower, Qwen2 decoder), only small: 1.4 million parameters, trained on
# moving shapes. Everything below runs unchanged on a checkpoint of 7B: put its folder or hub id in place of `"tiny"`.
# The first cell says what the numbers below depend on; keep it in your own notebooks.

# %%
import warnings

import lab
from lab.edges.sweeping import sweep
from lab.sim.clips import FOLDER
from lab.sim.planted import TRUTH, planted_model, questions
from lab.view.draw import show

lab.about()

# %% [markdown]
# ## Ask
#
# `prepare` samples frames and lays the prompt out; it touches no weights. `answer` reads the probability of each option's
# letter at the last position.

# %%
model = lab.load("tiny", device="cpu")
items = lab.load_items(FOLDER / "items.yaml")
item = next(i for i in items if i.id == "left")
ready = model.prepare(item, n_frames=8)
print(item.question)
model.answer(ready).by_option

# %% [markdown]
# ## What is every position?
#
# The token map gives every position exactly one role, by construction: the prompt is rendered from pieces, and each piece
# says what it is. So say positions by role, never by number. The picture shows the frames the model was given, with the
# position of every video token: four rows of four tokens a frame.

# %%
tokens = ready.tokens
print(len(tokens), "positions:", {role: tokens.roles().count(role) for role in dict.fromkeys(tokens.roles())})
print("option 1 stands at", tokens.where(role="option", option=1).tolist())
print("frame 3, row 0 stands at", tokens.where(role="frame", frame=3, row=0).tolist())
show(
    ready.painted(range(len(tokens)), name="Position of every video token", unit="position"),
    frames=ready.frames.pictures,
)

# %% [markdown]
# ## Look inside
#
# Hook points carry TransformerLens's names, and `run_with_cache` gives its `ActivationCache`. Here: how far the stream at
# the last position already points to each letter, from the embedding to the last layer (a logit lens: the final norm and
# the unembedding, applied early). The letter is decided late. Where was the answer before that?

# %%
logits, cache = model.run_with_cache(ready)
stream, labels = cache.accumulated_resid(apply_ln=True, return_labels=True)
letters = [model.to_single_token(letter) for letter in "ABCD"]
lens = (stream[:, 0, int(tokens.last)] @ model.W_U)[:, letters].softmax(-1)
for label, row in zip(labels, lens, strict=True):
    print(
        f"{label:>11}", " ".join(f"{letter} {p:.2f}" for letter, p in zip("ABCD", row.tolist(), strict=True))
    )

# %% [markdown]
# ## Cut, and watch the answer move
#
# Attention knock-out (Map the Flow): for every pathway and every window of three layers, cut the pathway's attention edges
# in all heads and measure how the probability of the answer changes. `a->b` means that positions of b read positions of
# a. Where a curve drops, the answer was passing there. Layers count from 1 in plots, from 0 in code.
#
# The null test belongs beside every probe: a knock-out that cuts nothing must change nothing, exactly.

# %%
assert (sweep(model, item, ["none"], window=3, show_progress=False).values == 0).all()
show(sweep(model, items, window=3, show_progress=False))

# %% [markdown]
# ## Is this picture true?
#
# Nobody knows what `tiny` really does. So put the same question to a model of which it *is* known: `planted_model` is a
# decoder of four layers written by hand. It compares the frames in layer 1, lets the option words read the video in
# layer 2, and the last position fetches the letter from the options in layer 3. `TRUTH` lists these edges.

# %%
planted, asked = planted_model("plain"), questions(8, seed=0)
paths = ["cross-frame", "video->option", "option->last", "video->last", "video->question"]
with warnings.catch_warnings(record=True) as told:
    found = sweep(planted, asked, paths, window=1, show_progress=False)
print(*(w.message for w in told), sep="\n")
print("written into it:", [(edge.pathway, f"layer {edge.layer + 1}") for edge in TRUTH["plain"].matters])
show(found, title="Planted circuit, cut in one layer at a time")

# %% [markdown]
# The knock-out finds every edge that was written and nothing else: pathways that are not in the circuit stay at zero, and
# the lab warns of each that changed nothing at all (here we keep these warnings and print them). That is what one hopes for. Now the same with a circuit that has *two* routes from the options to the answer, one through the
# instruction and one through the template. Either is enough.

# %%
backup = planted_model("redundant")
routes = {
    "through the instruction": "option->instruction",
    "through the template": "option->template",
    "both": ["option->instruction", "option->template"],
}
with warnings.catch_warnings(record=True):
    found_backup = sweep(backup, asked, routes, window=1, show_progress=False)
show(found_backup, title="Two routes, either is enough")

# %% [markdown]
# Cut alone, each route looks as if it did not matter. Read your own picture with that in mind: **a curve that drops is
# evidence; a curve at zero says only that this pathway alone was not needed.** Another may carry the same.
#
# A result carries the recipe that made it: `vlab run recipe.yaml` repeats it anywhere, and every figure redraws from the
# saved result without a model. `lab.explore(model, item)` puts the linked views of one question on one screen.
#
# Next: `10_information_flow` draws the paper's figures, `20_prune_edges` finds the edges a model can do without,
# `30_mod_and_token_drop` switches mechanisms on, `40_lens_and_patching` asks four other probes the same question,
# `50_bring_your_own_model` loads a checkpoint of yours, `60_streaming` watches a video frame by frame.
