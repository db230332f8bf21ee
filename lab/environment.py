"""What stands here: versions, device, seed, weights. The first cell of a notebook, and what a bug report needs.

Versions are read from the packages' descriptions, so that `vlab --version` loads no torch.
"""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

PACKAGES = (
    "torch", "transformers", "transformer-lens", "nnsight", "captum", "plotly", "anywidget", "ipywidgets", "jupyterlab",
    "accelerate", "safetensors", "av", "numpy", "pydantic",
)  # fmt: skip
SHOWN = ("videollm-lab", "python", "torch", "transformers", "transformer-lens", "nnsight", "captum")


class About(dict[str, Any]):
    """What `about` found, by name. A notebook does not show it again below what was printed."""

    def _ipython_display_(self) -> None:
        return None


def installed(package: str) -> str | None:
    """The version of a package, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of the lab, of Python and of the packages the lab stands on."""
    packages = {p: installed(p) for p in PACKAGES}
    return {"videollm-lab": installed("videollm-lab"), "python": platform.python_version(), **packages}


def about(model: Any = "tiny") -> About:
    """Print what numbers depend on: versions, device, seed, and the hash of the model's weights. Returns them by name.

    model  a loaded model, or what `lab.load` takes: then it is not loaded, only its files are hashed
    weights  hash of the checkpoint's files (as in recipes); None for a hub id. in_memory: of a loaded model, the hash of
           the numbers it holds now, which training or editing changes
    The seed is that of torch's generator; what draws at random in the lab takes a `seed=` of its own.
    Raises ModelError if there is no such model.
    """
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = About(
        versions(), seed=torch.initial_seed(), threads=torch.get_num_threads(), gpu=gpu, **_model(model)
    )
    print("\n".join(f"{name:<17} {_said(found, name)}" for name in (*SHOWN, "device", "seed", "model")))
    return found


def _said(found: About, name: str) -> str:
    match name:
        case "model":
            now = f", {found['in_memory']} in memory" if found["in_memory"] else ""
            return f"{found['model']}, weights {found['weights'] or 'not hashed'}{now}"
        case "device":
            name = f" ({found['gpu']})" if found["gpu"] else ""
            return f"{found['device']}{name}, {found['dtype']}, {found['threads']} threads"
        case _:
            return "not installed" if found[name] is None else str(found[name])


def _model(model: Any) -> dict[str, Any]:
    """Name, device, dtype and hashes of a model; of a mere name, what `lab.load` would choose."""
    from lab.edges.identity import weights_id
    from lab.model.zoo import chosen_device, weights_hash

    if hasattr(model, "cfg"):
        spec = model.spec or {}
        kind, device = str(model.dtype).removeprefix("torch."), str(model.device)
        name, weights = spec.get("name") or model.cfg.model_name, spec.get("weights")
        return {
            "model": name,
            "device": device,
            "dtype": kind,
            "weights": weights,
            "in_memory": weights_id(model),
        }
    device = chosen_device(None)
    kind = "float32" if device.type == "cpu" else "the checkpoint's dtype"
    return {
        "model": str(model),
        "device": str(device),
        "dtype": kind,
        "weights": weights_hash(model),
        "in_memory": None,
    }
