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
# # Which attention edges does a model need?
#
# An *edge* is one position reading another in one layer and head. A prompt of a few thousand tokens has billions of them,
# most without any use for the answer. This notebook scores all edges at once, checks the scores against real cuts,
# searches the smallest set that keeps the answers, judges what was found on other questions, and takes it out of the lab
# as a file that a plain transformers model obeys.

# %%
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

import lab
from lab.model.zoo import DATA
from lab.sim.tasks import draw_items
from lab.view.draw import show
from probes.prune import prune
from probes.scores import unit_map

lab.about()

# %% [markdown]
# ## Score every edge from one backward pass
#
# What would cutting do? For every layer, head and pair of segments, the change of the row's output if the pair is cut is
# known in closed form; times the gradient it predicts the change of the answer's margin (its logit against the other
# options'). One forward and one backward pass per question. Negative: cutting hurts.
#
# The map adds the scores up over heads and frames: blue or orange says how much of the margin hangs on that kind of pair.

# %%
model = lab.load("tiny", device="cpu")
calibration = draw_items("moving_direction", 12, seed=1)
scored = lab.edges.scores(model, calibration[:8], show_progress=False)
show(unit_map(scored), title="Predicted change of the margin if a kind of pair is cut (sum over heads)")

# %% [markdown]
# ## Are the scores right?
#
# They are first order: what later layers make of a change is linearised. So they are held against real cuts before
# anything is decided by them. Look at three numbers. *spearman*: is the order right? *recall*: of the edges that matter
# most, how many are among the top of the scores? *additivity gap*: how far the sum of parts is from cutting the parts
# together, which no first-order score can know. (A real check takes some hundred cells; 60 fit into a notebook.)

# %%
scored = lab.edges.validate_scores(
    model, calibration[:8], scored, n=60, subsets=4, windows=4, show_progress=False
)
told = scored.notes["validation"]
print(f"spearman {told['measurable']['spearman']:.2f} over {told['measurable']['n']} measured cuts")
print(
    f"recall   {told['recall_at_2k']:.2f} of the {told['k']} largest are among the {2 * told['k']} with the largest scores"
)
print(
    f"gap      {told['additivity']['gap']:.2f} between windows of layers and the sum of their layers (0: additive)"
)
for weak in told["weak"][:4]:
    print(f"weak     {weak['pair']}: {weak['why']}")

# %% [markdown]
# ## Search with real cuts
#
# Because parts do not add up, the search never trusts a score alone: every trial is a real, exact cut on all calibration
# questions, run from stored clean runs. It goes from the last layer to the first, cuts a layer's units together, and
# halves where that is too much. The budget says how far answers may move: the mean KL of the answer's distribution and
# the share of changed answers, with their one-sided bounds, and how many forwards the search may cost per question.
#
# `roles="portable"` uses only what any prompt has (video, text, separators, the last position), so that the policy also
# works on prompts that were not rendered here. The picture: which share of each pair's edges is kept in which layer.

# %%
held_out = draw_items("moving_direction", 24, seed=9)
budget = {"kl": 0.05, "flips": 0.05, "forwards": 10}
pruned = prune(model, calibration, held_out, budget=budget, roles="portable", finer=["distance"],
               baselines=["exit", "mass"], show_progress=False)  # fmt: skip
print(
    f"{pruned.trail.notes['forwards_per_item']:.1f} forwards per question; stopped: {pruned.trail.notes['stopped']}"
)
show(pruned.pictures["units"])

# %% [markdown]
# ## The evidence
#
# On 24 questions that the search never saw, beside baselines that any policy must beat: letting nobody read the video
# after layer N (`video-exit/N`), and keeping the edges with the most attention (`attention-mass`). `drop` comes with a
# one-sided 95 % bound. A policy that looks good on its own calibration questions can still fall here: 12 questions are
# few. If yours does, calibrate on more, or step back along the search's own trail (`lab.edges.ladder`).

# %%
table = pruned.evaluation.select(task="all")
measures = ["accuracy", "drop_bound", "flips", "kept", "kept_video"]
print(f"{'':<16}", *(f"{m:>11}" for m in measures))
for name in [n for n in table.coords["policy"] if not n.startswith("search/")]:
    print(f"{name:<16}", *(f"{float(table.select(policy=name, measure=m).values):>11.1%}" for m in measures))
show(pruned.pictures["curve"])

# %% [markdown]
# The curve asks the whole question: how good can a family of policies be if it may keep at most so many edges? Left is
# cheap. "search" is the trail of the search before and beyond the policy, "video-exit" the exits, "attention-mass" shows
# that **what is looked at most is not what is needed**: the same number of edges, chosen by attention, keeps far fewer
# answers.
#
# ## A policy is a file
#
# It says predicates, never positions: roles, frame distances, layers. So it applies to other lengths and frame counts, or
# is refused with the reason. The evidence travels inside.

# %%
path = Path("out/policy.yaml")
path.parent.mkdir(exist_ok=True)
pruned.policy.save(path)
policy = lab.edges.Policy.load(path)
print("\n".join(path.read_text().splitlines()[:34]))

# %% [markdown]
# ## Outside the lab
#
# `lab.apply` makes a plain transformers model obey the file, in calls and in its own `generate`, until the `with` ends.
# The same numbers as in the lab; afterwards the model is as it was. (`model.materialise(policy)` goes further and saves
# what is cut: rows that nobody reads leave the stream and write no keys and values.)

# %%
hf = AutoModelForImageTextToText.from_pretrained(DATA / "tiny")
ready = model.prepare(held_out[0])
with torch.no_grad():
    clean = hf(**ready.inputs).logits[0, -1]
    with lab.apply(hf, policy):
        cut = hf(**ready.inputs).logits[0, -1]
    torch.testing.assert_close(cut, model(ready, policy=policy)[0, -1], atol=1e-4, rtol=1e-4)
    assert torch.equal(hf(**ready.inputs).logits[0, -1], clean)
count = policy.count(ready.tokens, model.cfg.n_layers)
print(f"{count.kept_fraction:.1%} of all edges kept, {count.kept_live_fraction:.1%} of those that can matter")
print("p of every option, clean ", model.answer(ready).by_option)
print("p of every option, pruned", model.answer(ready, policy=policy).by_option)

# %% [markdown]
# A real run: `vlab prune --items FILE --out out/prune` with 160 calibration questions and a budget of 80 forwards each,
# then `vlab eval out/prune/policy.yaml --items OTHERS`. Both can be interrupted and go on where they stopped.
