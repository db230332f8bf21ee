"""`vlab doctor`: what is installed, what the machine has, what is in the way, and how much memory a run will take."""

from __future__ import annotations

import importlib.machinery
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab.cli.output import Reply, gigabytes, table

OURS = ("lab", "probes", "figures")


@dataclass(frozen=True)
class Finding:
    """One thing looked at. A "problem" makes `vlab doctor` return 1; a "note" does not."""

    what: str
    state: Literal["ok", "note", "problem"]
    says: str


def check(model: str | None, frames: int, dtype: str | None, device: str | None) -> Reply:
    """All findings, and with a model the memory predicted for `frames` frames."""
    from lab.environment import versions as read_versions

    versions = read_versions()
    findings = [*_packages(versions), *_machine(), _video(), *_widgets(), _shadows(sys.path)]
    data: dict[str, Any] = {"versions": versions, "findings": [vars(f) for f in findings]}
    text = table(("", "looked at", "found"), [row for f in findings for row in _rows(f)])
    if model is not None:
        data["memory"], more = _memory(model, frames, dtype, device)
        text += f"\n\n{more}"
    return Reply(data, text, int(any(f.state == "problem" for f in findings)))


def _rows(f: Finding) -> list[tuple[str, str, str]]:
    first, *more = textwrap.wrap(f.says, 96, break_long_words=False, break_on_hyphens=False)
    return [(f.state, f.what, first), *(("", "", line) for line in more)]


def _packages(versions: dict[str, Any]) -> list[Finding]:
    missing = [name for name, version in versions.items() if version is None]
    have = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    found = [Finding("versions", "ok", have)]
    if missing:
        found.append(
            Finding("missing", "problem", f"{', '.join(missing)}; run `make setup`, or pip install them")
        )
    return found


def _machine() -> list[Finding]:
    import psutil
    import torch

    free = psutil.virtual_memory().available
    found = [Finding("memory", "ok", f"{gigabytes(free)} free, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        left, total = torch.cuda.mem_get_info(i)
        found.append(
            Finding(
                f"cuda:{i}",
                "ok",
                f"{torch.cuda.get_device_name(i)}, {gigabytes(left)} of {gigabytes(total)} free",
            )
        )
    if not torch.cuda.is_available():
        found.append(
            Finding("gpu", "note", f"none that torch {torch.__version__} can use; models run on the CPU")
        )
    return found


def _video() -> Finding:
    try:
        import av

        missing = [c for c in ("h264", "hevc", "vp9", "av1") if c not in av.codecs_available]
    except ImportError as e:
        return Finding("video", "problem", f"PyAV cannot be imported: {e}")
    if missing:
        return Finding("video", "note", f"PyAV has no decoder for {', '.join(missing)}")
    return Finding("video", "ok", "h264, hevc, vp9 and av1 can be read")


def _widgets() -> list[Finding]:
    """Notebook widgets need their JavaScript beside the Python package."""
    folder = Path(sys.prefix) / "share" / "jupyter" / "labextensions"
    for package, extension in (
        ("ipywidgets", "@jupyter-widgets/jupyterlab-manager"),
        ("anywidget", "anywidget"),
    ):
        if not (folder / extension / "package.json").exists():
            return [
                Finding(
                    "widgets",
                    "note",
                    f"{package}'s JupyterLab extension is not in {folder}; figures stay still pictures",
                )
            ]
    return [Finding("widgets", "ok", "JupyterLab extensions of ipywidgets and anywidget are there")]


def _shadows(path: list[str]) -> Finding:
    """Another package with one of our names would be imported in place of ours, or ours in place of it."""
    ours = Path(__file__).resolve().parents[2]
    foreign: list[str] = []
    for entry in dict.fromkeys(path):
        for name in OURS:
            spec = importlib.machinery.PathFinder.find_spec(name, [entry or "."])
            origin = spec.origin if spec else None
            if origin and not Path(origin).resolve().is_relative_to(ours / name):
                foreign.append(f"{name} at {origin}")
    if foreign:
        return Finding(
            "names",
            "problem",
            f"foreign packages share our names: {'; '.join(foreign)}; remove them from the path",
        )
    return Finding("names", "ok", f"no foreign package named {', '.join(OURS)} on the path")


def _memory(model: str, frames: int, dtype: str | None, device: str | None) -> tuple[dict[str, Any], str]:
    from lab.model.memory import predict

    found = predict(model, n_frames=frames, dtype=dtype, device=device)
    head = f"{model}, {frames} frames, {found.positions} positions: {gigabytes(found.total)} at the peak"
    return {**found, "positions": found.positions, "extras": found.extras}, f"{head}\n{found}"
