"""The explorer: linked views of one model and one item on one screen.

    lab.explore(model, item)

`session` asks the model, `worker` runs it in a thread, `explorer` ties both to the views of `lab.view`.
"""

from __future__ import annotations

from lab.app.explorer import Explorer, explore

__all__ = ["Explorer", "explore"]
