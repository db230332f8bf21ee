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
# # Four probes, one question: do they agree?
#
# Where does `tiny` know which way the shape moves? A **logit lens** says what the stream would answer if it were read early.
# **Patching** takes one video's activations into another's run and asks whether the answer comes along. **Attribution**
# says what each frame is worth. A **linear probe** says what can be read with a straight cut, whether the model uses it or
# not. They measure different things: readable, decisive, worth, decodable. Where they differ is where one learns.

# %%
import warnings

import numpy as np
from IPython.display import Image, display

import lab
from lab.errors import LabWarning
from lab.sim.tasks import draw_items
from lab.view.draw import show
from lab.view.words import paint
from probes.attribution import attribute
from probes.lens import lens, painted, words
from probes.linear import linear
from probes.patching import attribution_patching, patching

lab.about()

# %% [markdown]
# ## Lens: what would video tokens say?
#
# Norm the stream of every video token as the last layer does, unembed it, and follow the four direction words (mean over
# the tokens). Nobody trained these positions to predict a word. Still, in a model that compares frames, the right word may
# rise above the others there. This is a *raw lens*: a word it reads is a hint, and a word it does not read may be there in
# another basis.

# %%
model = lab.load("tiny", device="cpu")
items = draw_items("moving_direction", 6, seed=11)
item = items[0]
print(item.question, "->", item.options[item.answer])
read = lens(model, item, "video", words=list(item.options), show_progress=False)
show(read.select(role="video"), title="Direction words on video tokens, by layer")

# %% [markdown]
# ## The same, painted on the frames
#
# The best word of every video token, in one layer, over its own patch; faint where the lens is less sure. Look whether
# words of motion stand where the shape is, or everywhere: a decoder spreads what it finds.

# %%
best = painted(words(model, item, "video", top=1, show_progress=False), layer=7)
Image(paint(best, model.prepare(item).frames.pictures, "out/words.png", dpi=80))

# %% [markdown]
# ## Patching: what carries the answer over?
#
# Each simulated clip has a *twin*: the same pixels, with the shape walking the other way. Run both. Then run the clip again
# with the twin's activations at one place, and see how far the answer moves towards the twin's (0: not at all, 1: all the
# way). First all tokens of a role: read upwards, this is the journey of the answer. It begins in the video tokens, and the
# higher the layer, the more of it has moved to whoever read them. Then one frame's tokens at a time: single frames are
# weak, since the others still show the old direction, and late frames have read the earlier ones.

# %%
by_role = patching(model, items, by="role", into="clean", show_progress=False)
by_frame = patching(model, items, by="frame", into="clean", show_progress=False)
print(f"{by_frame.ledger['forwards']:.0f} forwards' worth of work in place of {by_frame.ledger['naive']:.0f}")
display(show(by_role, title="Taking all tokens of a role from the twin"))
show(by_frame, title="Taking one frame's tokens from the twin")

# %% [markdown]
# ## Attribution: what is each frame worth?
#
# Shapley values against the twin: each frame's mean contribution over all 256 ways of mixing frames from clip and twin.
# They add up to the whole difference, exactly, which is checked. And a shortcut, attribution patching: gradients in place
# of patches, held against the exact grid. One step, the classic, tells next to nothing here: the gradient is right for a
# hundredth of the patch, but the twin is far, and attention and answer are saturated where the clip stands. A mean over
# steps on the way does better, and best if each layer's own stream moves (`path="activations"`). Single frames stay hard:
# several frames show one motion, and a gradient does not know that they can stand in for one another. Never use it
# without its number; it warns below 0.5.

# %%
worth = attribute(model, items[:2], method="shapley", show_progress=False)
warnings.simplefilter("ignore", LabWarning)  # the poor ones are wanted here
for steps, path in ((1, "inputs"), (8, "inputs"), (4, "activations")):
    for by in ("role", "frame"):
        cheap = attribution_patching(
            model, item, by=by, into="clean", steps=steps, path=path, show_progress=False
        ).notes["against_exact"]
        print(
            f"{steps} steps, {path:11s} by {by:5s}: correlation {cheap['pearson']:5.2f}, slope {cheap['slope']:5.2f}"
        )
show(worth, title="What each frame is worth (Shapley, against the twin)")

# %% [markdown]
# ## Linear probe: where can it be read at all?
#
# Straight cuts through the mean stream of the video tokens, and through the last position's, held out by video; dashed is
# chance. The same probes are fitted on shuffled labels too, and what is above those is their *selectivity*, used below. A
# probe that reads the direction everywhere says nothing about use: it may be there long before anybody looks.

# %%
decoded = linear(
    model, draw_items("moving_direction", 32, seed=2), "direction", shuffles=2, show_progress=False
)
show(decoded.select(labels="true"), title="Direction of the shape, read linearly")


# %% [markdown]
# ## Do they agree?
#
# Side by side, each probe's answer to the same two questions. Where is it, layer by layer, and from when on does the last
# position have it? Which two frames carry most?


# %%
def since(curve, bar):
    return next((f"from layer {i + 1}" for i, v in enumerate(curve) if v >= bar), "in no layer")


lens_last = lens(model, items, "last", words="right", show_progress=False).mean("item").values[0, :, 0]
selective = decoded.select(labels="selectivity", role="last").values
carried, by_time = by_role.mean("item"), by_frame.mean("item").values[0]
most = np.nan_to_num(carried.values).argmax(1)
print("patching: who carries most, by layer:", [carried.coords["role"][i] for i in most])
print("last position: the lens reads the right letter", since(lens_last, 0.5))
print("last position: direction is linearly readable ", since(selective, 0.5 * selective.max()))
print("last position: a third of the answer moves    ", since(carried.select(role="last").values, 1 / 3))
pick = {"patching": by_time, "Shapley": worth.mean("item").values}
print(
    "frames:",
    {name: sorted(np.argsort(-np.nan_to_num(values))[:2].tolist()) for name, values in pick.items()},
)

# %% [markdown]
# Typical, and worth remembering: the direction is readable on video tokens from the first layers on, the lens shows it
# late, and patching says who carries it for the answer. None is wrong. If a lens is silent, patch before you conclude; if a
# linear probe reads it, patch before you say the model uses it. The figure about Moving Direction in `figures/` asks the
# same of more items; `vlab lens`, `vlab patch`, `vlab attribute` and `vlab probe` are these probes on the command line.
