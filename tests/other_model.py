"""Every figure's recipe on another model: a tiny random Qwen2.5-VL, by `vlab run RECIPE --set model=FOLDER` and few items.

    python -m tests.other_model [NAME ...]

Prints one line a recipe; exit code 1 if any fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from figures.shelf import Entry, find, shelf
from lab.cli.main import main as vlab
from tests import families

# fewer items and sizes than the recipe's, so that all of them take minutes; the model is the only other change
FEWER = {
    "effective_pathways": ("items.n=1", "holdout.n=1", "forwards=4"), "scaling": ("frames=[8,16]", "depths=[1,2]", "windows=[1,2]", "timed=2"),
    "cost": ("rounds=1",), "house": (), "information_flow": ("items.n=1",),
}  # fmt: skip


def checkpoint(folder: Path) -> Path:
    """A random Qwen2.5-VL with tokenizer and preprocessor, as a folder."""
    families.build("qwen2_5_vl").save_pretrained(folder)
    families.tokenizer("qwen2_5_vl").save_pretrained(folder)
    sizes = {
        "size": {"shortest_edge": 64, "longest_edge": 10**6},
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    does = {
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    kind = {"image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes | does | kind))
    return folder


def command(entry: Entry, model: Path, out: Path) -> list[str]:
    """`vlab run` with nothing changed but the model, and fewer items."""
    changes = (f"model={model}", *FEWER.get(entry.name, ("items.n=2",)))
    return ["run", str(entry.recipe_file), *(a for c in changes for a in ("--set", c)), "--out", str(out)]


def main(names: Sequence[str]) -> int:
    """Runs the recipes of the figures named (none: all)."""
    failed = 0
    with tempfile.TemporaryDirectory() as root:
        model = checkpoint(Path(root) / "qwen")
        for entry in [find(n) for n in names] or shelf():
            start, said = time.monotonic(), io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                code = vlab(command(entry, model, Path(root) / entry.name))
            failed += code != 0
            lines = said.getvalue().strip().splitlines()
            print(
                f"{entry.name}: code {code}, {time.monotonic() - start:.0f} s{': ' + lines[-1] if code else ''}",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
