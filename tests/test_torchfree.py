"""Redrawing a figure, reading a recipe and `--help` must not wait for torch: these modules import without it."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import lab.cli
import lab.view

FREE = ["lab.errors", "lab.spans", "lab.result", "lab.recipe", "lab.yamlfile", "lab.runs"]
ROOMS = [
    *(f"lab.view.{m.name}" for m in pkgutil.iter_modules(lab.view.__path__)),
    *(f"lab.cli.{m.name}" for m in pkgutil.iter_modules(lab.cli.__path__)),
]

CODE = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "transformer_lens", "nnsight", "captum"}:
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, NoTorch())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name)
"""


def test_the_torch_free_half_imports_without_torch() -> None:
    wanted = FREE + ROOMS
    assert "lab.view.draw" in wanted
    done = subprocess.run([sys.executable, "-c", CODE, *wanted], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-600:]
    assert done.stdout.split() == wanted


def test_the_block_would_notice() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "lab.carriers"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and "blocked: torch" in done.stderr
