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
# # Watching a video as it comes
#
# A streaming VideoLLM does not wait for the end of the video: it reads frame by frame, keeps keys and values, and decides
# after each frame whether there is something to say (LIVE, VideoLLM-online, arXiv 2406.11816). `Session` is that loop, for
# any model here. This notebook watches a clip, shows that streaming computes the same as reading the whole video at once,
# and follows what the model would answer, frame by frame.

# %%
import numpy as np
import torch

import lab
from lab.mechanisms.streaming import Session, Streaming
from lab.model.answering import letter_ids
from lab.result import Result
from lab.sim.tasks import draw_items
from lab.view.draw import show

lab.about()

# %% [markdown]
# ## The loop
#
# `Streaming` holds the texts round the stream. LIVE's own are the default; here they are those of the prompt that `tiny`
# was trained on. `see` reads one frame: only its new rows are computed, every layer's cache grows by so many. `decide="never"`
# keeps it silent until it is asked.

# %%
model = lab.load("tiny", device="cpu")
prompt_texts = dict(
    system="<|im_start|>user ",
    open="\n",
    close="\n",
    user="\n",
    assistant="<|im_end|><|im_start|>assistant\n",
)
quiet = Streaming(decide="never", max_new_tokens=1, **prompt_texts)
item = draw_items("moving_direction", 1, seed=3)[0]
ready = model.prepare(item, n_frames=8)
frames = ready.frames
session = Session(model, quiet)
for picture in frames.pictures:
    moment = session.see(picture)  # at quiet.fps; a second argument says another time
    print(
        f"frame {moment.frame} at {moment.seconds:.1f} s: {moment.kept} tokens read, {moment.rows[0]} rows in every layer"
    )

# %% [markdown]
# ## Streaming equals offline
#
# Ask now, and compare with one forward pass over the whole video, laid out as the same stream. That is the reason why every
# instrument of the lab (hooks, cuts, sweeps, lenses) says something about the streaming model too: they run on the offline
# layout, `model.prepare(item, mechanisms=[quiet])`.

# %%
before = session.snapshot()
session.ask(item)
reply = session.flush()[0]
with torch.no_grad():
    offline = model.run(ready, mechanisms=[quiet])
gap = float((offline.logits[0, -1] - reply.first).abs().max())
print(f"{len(offline.maps[0])} positions offline, largest difference of the logits {gap:.1e}")
assert gap < 1e-3

# %% [markdown]
# ## Back in time
#
# A snapshot holds where the stream stands: the cache is never written in place, so it costs nothing. Restored, the model
# has never heard the question. That makes it cheap to ask "what would you answer now?" after every frame.

# %%
session.restore(before)
print(f"{moment.rows[0]} rows in every layer before the question, {session.rows[0]} after going back")
session.ask(item)
again = session.flush()[0]
assert torch.equal(again.first, reply.first)
session.restore(before)


# %% [markdown]
# ## When does it know?
#
# After each frame: snapshot, ask, read the options' probabilities, restore. A clip that moves cannot be answered from its
# first frame; look where the right answer takes over, and whether it stays. (`tiny` was trained on whole clips of 8 frames:
# what it says after two frames is a guess about a video it thinks is over.)


# %%
def options_now(session, item):
    """Probability of every option if the question came now; the stream goes on as if it had not."""
    state = session.snapshot()
    session.ask(item)
    first = session.flush()[0].first
    session.restore(state)
    return first[letter_ids(model.tokenizer, len(item.options))].softmax(-1).tolist()


def timeline(item):
    session, frames = Session(model, quiet), model.prepare(item, n_frames=8).frames
    rows = []
    for picture in frames.pictures:
        session.see(picture)
        rows.append(options_now(session, item))
    return np.array(rows).T, [moment.seconds for moment in session.log]


values, seconds = timeline(item)
print(item.question, "->", item.options[item.answer])
coords = {"option": list(item.options), "seconds": seconds}
show(
    Result(values, ("option", "seconds"), coords, "probability", {}, name="What it would answer, by time"),
    limits=(0, 1),
)

# %% [markdown]
# The same for one question of each kind, the right option only. Events need their moment: a curve cannot rise before the
# thing that decides has happened.

# %%
tasks = ("moving_direction", "action_antonym", "action_sequence", "object_count", "scene_transition")
asked = {task: draw_items(task, 1, seed=5)[0] for task in tasks}
curves = np.array([timeline(i)[0][i.answer] for i in asked.values()])
right = Result(curves, ("task", "frame"), {"task": list(asked), "frame": list(range(8))}, "probability of the right option", {},
               name="When the right answer is known")  # fmt: skip
show(right, limits=(0, 1))

# %% [markdown]
# ## Speak, or be silent
#
# LIVE decides by one token: after each frame, if "silence" is less likely than `theta`, it is ruled out, and the model
# speaks. Nobody taught `tiny` to be silent (`lab.learn.live` does), so we let its end-of-text token stand for silence, as
# LIVE's first version did, and only look at the rule: theta 0 is plain argmax, above 1 it always speaks.

# %%
for theta in (0.0, 0.25, 0.5, 0.725, 0.9, 1.1):
    watching = Session(
        model, Streaming(theta=theta, interval=None, max_new_tokens=1, forget_replies=True, **prompt_texts)
    )
    log = watching.run(frames)
    print(f"theta {theta:<5} speaks at frames {[m.frame for m in log if m.triggered]}")
print("p(silence) by frame:", [round(m.p_silent, 2) for m in log])

# %% [markdown]
# A session takes every mechanism that can stream: `Session(model, config, mechanisms=[DifferentialTokenDrop(threshold=0.9)])`
# drops tokens as frames come, `VidKV` keeps the cache in few bits, and `decide="scene"` speaks where the scene changes.
# `session.run(video, questions=[(2.0, "What happened?")])` does it all at once; `session.result()` is p(silence) as a Result.
