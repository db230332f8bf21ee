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
# # Where does the answer travel?
#
# The figures of *Map the Flow* (arXiv 2510.13251), on your model. The paper asks of a VideoLLM: in which layers do frames
# talk to each other, in which does the question read the video, in which does the last position fetch the answer? It cuts
# attention edges, a few layers at a time, and watches the probability of the answer.
#
# Change `MODEL`, and `items` below, and run it on a checkpoint of yours. For a 7B model on a GPU take 50 items or more:
# the bands show how far so few can be trusted.

# %%
import lab
from lab.result import stack
from lab.sim.tasks import TEMPORAL, draw_items
from lab.view.draw import panel, show
from probes.lens import gen_prob
from probes.pathways import PANEL, PATHWAYS

lab.about()

# %% [markdown]
# ## Questions that need more than one frame
#
# Five tasks of simulated clips, four questions each: no single frame tells the answer. `tiny` learned them. `tiny-image` is
# its twin that never saw two different frames, so it can read a frame but not compare two: it guesses. Only questions that
# are answered right say where the *right* answer travels, so we look at the model's score first.

# %%
MODEL = "tiny"
model, image_twin = lab.load(MODEL, device="cpu"), lab.load("tiny-image", device="cpu")
items = [item for task in TEMPORAL for item in draw_items(task, 4, seed=5)]
for name, one in ((MODEL, model), ("tiny-image", image_twin)):
    print(f"{name:<12} answers {sum(bool(one.answer(i).correct) for i in items)} of {len(items)} right")

# %% [markdown]
# ## Pathways by layer
#
# `sweep` cuts every pathway in a window of three layers round each layer. It runs the model once per question and computes
# the cuts from what that run left behind, exactly; the ledger says what was saved against one full run per point.
#
# How to read the panel: one column a task, one row a question of the paper. Row 1: frames read earlier frames. Row 2: the
# question and the last position are told. Row 3: from which words the last position fetches the answer. Row 4: how the
# right option learns that it is right. The deeper a curve, the more of the answer's probability was lost.

# %%
curves = lab.edges.sweep(model, items, [p for row in PANEL.values() for p in row], window=3)
ledger = curves.ledger
print(f"{ledger['forwards']:.0f} forwards' worth of work in place of {ledger['naive']:.0f}")
by_task = curves.split("correct").mean_by("task")
show(panel(by_task, PANEL, title=f"Map the Flow: {MODEL}"))

# %% [markdown]
# The paper's story is: frames are compared early, the question reads the video in the middle, the answer is fetched late,
# and the last position never reads the video itself. Check each sentence against your panel, task by task. Where a model
# differs, it is often because it is small: counting, for one, keeps several layers busy.
#
# ## The same, in a model that never saw motion
#
# If the curve across frames is about understanding time, the twin that cannot compare frames should not need it. Its
# questions are the same, its answers are guesses: the curves follow whatever it answers.

# %%
of_twin = lab.edges.sweep(image_twin, items, ["cross-frame", "video->last"], window=3)
across = {MODEL: curves.select(pathway="cross-frame"), "tiny-image": of_twin.select(pathway="cross-frame")}
show(stack(across, "model"), title="Frames may not read earlier frames")

# %% [markdown]
# ## When is the answer known?
#
# The paper's generation probability: read the last position at every layer as if it were the last one (final norm, then
# unembedding). It stays near chance while the answer is still on its way through video and question tokens, and rises
# where the last position fetches it: compare with the layer in which `question+option->last` fell above.

# %%
known = {name: gen_prob(one, items, show_progress=False).select(answer="right") for name, one in
         ((MODEL, model), ("tiny-image", image_twin))}  # fmt: skip
show(stack(known, "model"), title="Probability of the right letter at the last position", limits=(0, 1))

# %% [markdown]
# ## Are the effective pathways enough?
#
# The paper's last step turns the argument round: keep each pathway only in the layers where cutting it hurt, cut it
# everywhere else, all at once, and see whether the answers stand. `effective` writes that policy from the curves. It is
# judged on other questions than those it was made from, beside the paper's own policy for a 7B model scaled to this depth,
# an early exit of the video, and no video at all.

# %%
policy = lab.edges.effective(curves.select(pathway=list(PATHWAYS)), at_least=5)
n = model.cfg.n_layers
others = {
    "paper's, scaled": lab.edges.presets.paper("7b", "strict", n),
    f"video exits after {n // 2}": lab.edges.presets.video_exit(n // 2, n),
}
held_out = [item for task in TEMPORAL for item in draw_items(task, 6, seed=9)]
table = lab.edges.evaluate(model, policy, held_out, others, show_progress=False).select(task="all")
for cut in policy.cuts:
    print(f"{cut.reason:<24} is cut in layers {cut.layers}")

# %%
measures = {
    "accuracy": "right",
    "flips": "answers changed",
    "kept": "edges kept",
    "kept_video": "video edges kept",
}
print(f"{'':<20}", *(f"{words:>18}" for words in measures.values()))
for name in table.coords["policy"]:
    print(f"{name:<20}", *(f"{float(table.select(policy=name, measure=m).values):>18.0%}" for m in measures))

# %% [markdown]
# Three things to take away. A policy made from single curves is nearly, not exactly, enough: curves do not see pathways
# that stand in for each other (`20_prune_edges` searches with all cuts in place, and does better). The paper's layers do
# not carry over to another model by scaling; the method does. And a score alone hides changes: "answers changed" counts
# wrong answers that became other wrong answers too.
#
# On the command line: `vlab sweep --items sim:moving_direction:8 --panel`.
