"""Activation patching: worlds (runs of prompts with one layout), and edits that carry values from one world to another.

    worlds = Worlds.of(model, clean=item, corrupted=item.twin)
    logits = worlds.run([take("clean -> corrupted", site="resid_pre", layers="3-5", frame=2)])

`Worlds.run` is one batched pass over all worlds; `Worlds.evaluate` runs many sets of edits of one world, from stored
runs where that is exact. Code inside the project imports from the modules themselves.
"""

from lab.patch.edits import Edit, mean, noise, take
from lab.patch.worlds import Worlds

__all__ = ["Edit", "Worlds", "mean", "noise", "take"]
