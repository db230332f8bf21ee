"""What is installed here. Torch-free: versions are read from the packages' descriptions."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

PACKAGES = (
    "torch", "transformers", "transformer-lens", "nnsight", "captum", "plotly", "anywidget", "ipywidgets", "jupyterlab",
    "accelerate", "safetensors", "av", "numpy", "pydantic",
)  # fmt: skip


def installed(package: str) -> str | None:
    """The version of a package, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def about() -> dict[str, Any]:
    """Versions of the lab, of Python and of the packages the lab stands on: say these in a bug report."""
    packages = {p: installed(p) for p in PACKAGES}
    return {"videollm-lab": installed("videollm-lab"), "python": platform.python_version(), **packages}
