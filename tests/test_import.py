"""What `import lab` costs and leaves behind. Each check runs in a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

GUARD = """
import json, socket, sys, time
def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = refuse
"""
HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "nnsight",
    "captum",
    "wandb",
    "datasets",
    "matplotlib",
    "plotly",
)


def fresh(code: str) -> dict[str, object]:
    """Runs code after the network guard in a new interpreter; the code leaves its answer in `out`."""
    done = subprocess.run(
        [sys.executable, "-c", GUARD + code + "\nprint(json.dumps(out))"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_quick_light_and_offline() -> None:
    out = fresh(
        "import lab\nout = {'seconds': time.process_time(), 'modules': sorted(sys.modules),"
        "'save': hasattr(object(), 'save'), 'version': lab.__version__}"
    )
    assert out["seconds"] < 1  # type: ignore[operator]
    assert not set(HEAVY) & set(out["modules"])  # type: ignore[arg-type]
    assert out["save"] is False
    assert out["version"] == "0.1.0"


def test_the_shelf_of_mechanisms_is_at_hand_without_torch() -> None:
    out = fresh("import lab\nout = {'shelf': lab.mechanisms.shelf(), 'torch': 'torch' in sys.modules}")
    assert "mixture_of_depths" in out["shelf"] and not out["torch"]  # type: ignore[operator]


def test_dir_shows_the_surface() -> None:
    out = fresh("import lab\nout = {'dir': dir(lab), 'torch': 'torch' in sys.modules}")
    surface = {
        "load",
        "wrap",
        "VideoQA",
        "VideoLLM",
        "Result",
        "TokenMap",
        "Frames",
        "load_items",
        "about",
        "errors",
        "mechanisms",
        "compare",
    }
    assert surface <= set(out["dir"])  # type: ignore[arg-type]
    assert out["torch"] is False


def test_every_name_of_the_surface_is_there_and_stays_the_same() -> None:
    """Looked up twice: a name that is also a module's would change after the module was imported."""
    out = fresh(
        "import importlib, lab\nfirst = {n: getattr(lab, n) for n in lab.__all__}\n"
        "out = {n: getattr(lab, n) is v and (callable(v) or n in ('edges', 'errors', 'mechanisms', '__version__')) for n, v in first.items()}\n"
        "out['offline'] = not hasattr(object(), 'save') and 'wandb' not in sys.modules"
    )
    assert [n for n, good in out.items() if not good] == []


def test_a_wrong_name_offers_the_closest() -> None:
    import lab

    with pytest.raises(AttributeError, match="closest: load"):
        lab.laod  # type: ignore[attr-defined]  # noqa: B018
