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
# # Switch a mechanism on, and look inside
#
# Papers that make VideoLLMs cheaper report scores and seconds. This notebook switches two of them on, *without* training,
# and asks what they do to the inside of the model: which tokens still run, whether the stream is the same, whether the
# answer still takes the same way.
#
# - **Mixture-of-Depths** (VideoLLM-MoD, arXiv 2408.16730): in every other layer, only the best-scored share of each
#   frame's tokens goes through; the rest skip it.
# - **Differential token drop** (TimeChat-Online, arXiv 2504.17343): tokens whose patch hardly changed since the frame
#   before are dropped in front of the decoder.

# %%
import torch
from IPython.display import display

import lab
from lab.mechanisms.differential_token_drop import DifferentialTokenDrop
from lab.mechanisms.mixture_of_depths import MixtureOfDepths
from lab.sim.tasks import draw_items
from lab.view.draw import show

lab.about()

# %% [markdown]
# ## A mechanism is a value
#
# Its fields are its settings, and what a recipe stores. It is handed to a run; the model is not changed. The routers here
# are untrained, so `selector="norm"` lets the tokens with the largest stream through, and `gate="none"` leaves out the
# factor that is only there to train routers. `run` returns the logits with what the mechanism decided.

# %%
model = lab.load("tiny", device="cpu")
items = draw_items("moving_direction", 4, seed=3) + draw_items("action_sequence", 4, seed=3)
depths = MixtureOfDepths(keep=0.2, selector="norm", gate="none")
drop = DifferentialTokenDrop(ratio=0.8, space="pixel")
ready = model.prepare(items[0])
frames = ready.frames.pictures
out = model.run(ready, mechanisms=[depths])
n = model.cfg.n_layers
print(items[0].question, "->", items[0].options[items[0].answer])
print(f"routed layers: {[int(i) + 1 for i in out.heads['mod.layers']]} of {n}; the others run every token")
show(ready.painted(out.heads["mod.depth"][0], name="Layers that updated each token", unit="layers"),
     frames=frames, limits=(0, n))  # fmt: skip

# %% [markdown]
# Where is the mechanism looking? A good router would spend its layers on the shape that moves. The largest stream need not
# be the moving shape: that is what routers are trained for.
#
# Token drop decides by change, and keeps the first frame whole. Grey places have been dropped: the decoder never reads
# them, and the token map says so. Compared as *pixels*, what is kept follows the shape: the places it came to and those it
# left. Compared as *features* of the vision tower, as the paper prefers, it may be whole frames: in this small tower every
# patch sees every other, so a move in one corner changes the features of all.

# %%
for space in ("pixel", "feature"):
    kept = model.maps(ready, mechanisms=[DifferentialTokenDrop(ratio=0.8, space=space)])[0]
    title = f"Compared by {space}: {len(kept)} of {len(ready.tokens)} positions are left"
    read = ready.painted(torch.ones(len(kept)), name=title, unit="read by the decoder", tokens=kept)
    display(show(read, frames=frames, limits=(0, 1)))

# %% [markdown]
# ## Compare the insides
#
# `lab.compare` runs questions through the model as it is and with each mechanism, and puts them side by side: answers,
# stream, attention, knock-outs. It also runs **random choices of the same budget**: if dropping *random* tokens does no
# worse, the mechanism's choice is not what keeps the answer. The words below are made from the numbers.

# %%
what = {"depths": depths, "token drop": drop}
report = lab.compare(model, what, items, window=3, pathways=["cross-frame", "video->question+option"],
                     rounds=0, new_tokens=1, show_progress=False)  # fmt: skip
print(*report.words(), sep="\n\n")

# %% [markdown]
# Eight questions are few: look at the intervals before you believe a difference of answers. `tiny`'s clips are easy on
# purpose, a shape covers several tokens, so much can be dropped before an answer falls. The score alone would say that
# nothing happened. The stream says otherwise:

# %%
cosine = report.results["cosine"].mean("item").select(group="video")
display(show(cosine, title="Is the stream of the video tokens still vanilla's?"))
show(
    report.results["kl"], title="Is the last position still on its way to the same answer? (KL from vanilla)"
)

# %% [markdown]
# ## Does the answer still take the same way?
#
# The knock-out profile of every variant: how much of the answer's probability hangs on frames reading earlier frames. A
# mechanism may keep the answer and move the place where it is computed. Each curve follows the variant's own answer.

# %%
show(report.results["knockout"].select(pathway="cross-frame"), title="Frames may not read earlier frames")

# %% [markdown]
# ## The null test, and both at once
#
# Every mechanism on the shelf has a neutral setting that changes nothing; that is tested for all of them, and can be seen
# here. And mechanisms add: what is dropped first is not routed later.

# %%
same = model(ready, mechanisms=[MixtureOfDepths.NEUTRAL, DifferentialTokenDrop.NEUTRAL])
assert (same == model(ready)).all()
both = model.run(ready, mechanisms=[drop, depths])
print(f"{len(both.maps[0])} of {len(ready.tokens)} positions enter the decoder,", end=" ")
print(
    f"a video token runs {both.heads['mod.depth'][0][both.maps[0].where(role='video')].float().mean():.1f} of {n} layers"
)
print("vanilla", model.answer(ready).by_option)
print("both   ", model.answer(ready, mechanisms=[drop, depths]).by_option)

# %% [markdown]
# `report.save("out/compare")` writes all of it as a page, with costs (rows, FLOPs, bytes of keys and values, time) if
# `rounds` is left at its default; `vlab compare` does the same from the command line. Routers become good by training:
# `python -m lab.learn.mod --out runs/mod`. More mechanisms stand in `lab/mechanisms/`, one paper a file.
