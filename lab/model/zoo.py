"""`load("tiny" | hub id | folder)` and `wrap(model)`: real checkpoints through transformers, checked when they arrive.

safetensors only, no remote code, no network for local folders.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lab.errors import ModelError, UsageError
from lab.model.families.base import find
from lab.model.verifying import audit
from lab.model.verifying import verify as verify_model
from lab.model.videollm import VideoLLM
from lab.pixels import Preprocessor

DATA = Path(__file__).parents[1] / "data"
BUNDLED = ("tiny", "tiny-image")


def wrap(hf_model: nn.Module, tokenizer: Any = None, *, preprocessor: Any = None) -> VideoLLM:
    """Wrap an instantiated transformers VideoLLM. Downloads nothing; the model stays usable as before.

    tokenizer     without one only `prepare_inputs` works
    preprocessor  a `lab.pixels.Preprocessor`, a parsed preprocessor json, or None (sizes from the config)
    A model may be wrapped more than once; each wrapper has its own hook points.
    Raises ModelError if no decoder made of residual layers can be found.
    """
    if isinstance(hf_model, VideoLLM):
        raise ModelError("this model is wrapped already; use it as it is")
    if not isinstance(hf_model, nn.Module) or not hasattr(hf_model, "config"):
        raise ModelError(f"expected an instantiated transformers model, got {type(hf_model).__name__}")
    family = find(hf_model.config)
    if isinstance(preprocessor, dict):
        preprocessor = Preprocessor.from_folder(preprocessor)
    model = VideoLLM(hf_model, family, tokenizer, preprocessor)
    if not family.model_types:
        verify_model(model)  # nobody wrote a file for this family: prove that the loop is its own
    return model


def load(
    name: str | Path, *, device: Any = None, dtype: Any = None, device_map: Any = None, verify: bool = True,
    revision: str | None = None, attn_implementation: str = "sdpa", trust_remote_code: bool = False,
) -> VideoLLM:  # fmt: skip
    """Load a checkpoint: "tiny" or "tiny-image" (bundled), a local folder, or a hub id. Weights come frozen and in eval mode.

    device       "cpu", "cuda", ...; None takes a GPU if there is one
    dtype        "float32" | "bfloat16" | "float16" | torch dtype; None: the checkpoint's on a GPU, float32 on a CPU
    device_map   handed to transformers (needs accelerate); then `device` must be None
    verify       compare logits with plain transformers' once, and check that every layer is seen
    Raises ModelError with the reason if the checkpoint is missing, damaged or not a VideoLLM.
    """
    folder, where = _locate(name)
    if device is not None and device_map is not None:
        raise UsageError(f"give device or device_map, not both (got {device!r} and {device_map!r})")
    target = _device(device)
    kind = _dtype(dtype, target)
    hf = _from_pretrained(
        folder, where, revision=revision, dtype=kind, attn_implementation=attn_implementation, device_map=device_map,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    hf.eval().requires_grad_(False)
    if device_map is None:
        hf.to(target)
    _finite(hf, where)
    model = wrap(
        hf, _tokenizer(folder, revision, trust_remote_code), preprocessor=_preprocessor(folder, revision)
    )
    model.cfg.model_name = str(name)
    model.spec = _spec(name, kind, device, revision) if device_map is None else None
    if verify:
        verify_model(model)
        audit(model)
    return model


def outline(name: str | Path, *, revision: str | None = None) -> VideoLLM:
    """The model without its weights (on torch's meta device): `prepare` and token maps work, running does not.

    Seconds and megabytes where a checkpoint of 7B takes minutes and gigabytes. Raises ModelError as `load` does.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder, where = _locate(name)
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision)
        with torch.device("meta"):
            hf: Any = AutoModelForImageTextToText.from_config(config)
    except Exception as e:
        raise ModelError(f"{where}: transformers cannot build it: {_first_line(e)}") from e
    return VideoLLM(
        hf.eval(), find(config), _tokenizer(folder, revision, False), _preprocessor(folder, revision)
    )


def weights_files(name: str | Path) -> list[Path]:
    """A local checkpoint's safetensors files, in order; none for hub ids."""
    folder = Path(_locate(name)[0])
    return sorted(folder.glob("*.safetensors")) if folder.is_dir() else []


def weights_hash(name: str | Path) -> str | None:
    """First 12 digits of the sha256 over a local checkpoint's safetensors files; None for hub ids."""
    files = weights_files(name)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:12] if files else None


def _spec(name: str | Path, dtype: Any, device: Any, revision: str | None) -> dict[str, Any]:
    """The model as a recipe names it (`lab.recipe.ModelSpec`). The hash is left out above 2 GB: it would take minutes."""
    text, folder = str(name), Path(_locate(name)[0])
    size = sum(f.stat().st_size for f in weights_files(name))
    return {
        "name": text if text in BUNDLED or not folder.is_dir() else str(folder.resolve()),
        "dtype": "auto" if dtype == "auto" else str(dtype).removeprefix("torch."), "device": "auto" if device is None else str(device),
        "revision": revision, "weights": weights_hash(name) if 0 < size < 2**31 else None,
    }  # fmt: skip


def _locate(name: str | Path) -> tuple[str, str]:
    """(what transformers is given, what messages call it)."""
    text = str(name)
    if text in BUNDLED:
        return str(DATA / text), text
    path = Path(text)
    try:
        path = path.expanduser()
        folder, there = bool(text.strip()) and path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, a zero byte, no such home folder
        text, folder, there = text[:100], False, True
    if folder:
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json: not a transformers checkpoint")
        return str(path), str(path)
    looks_local = path.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1 or there
    if looks_local:
        raise ModelError(
            f"no checkpoint at {text!r}: give 'tiny', a folder with config.json, or a hub id like 'owner/name'"
        )
    return text, text


def _device(device: Any) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()  # the meta device holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        raise UsageError(f"device {device!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return chosen


def _dtype(dtype: Any, device: torch.device) -> Any:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UsageError(f"dtype {dtype!r} is not one of float32, bfloat16, float16, float64")
    return found


def _from_pretrained(folder: str, where: str, *, dtype: Any, device_map: Any, **kw: Any) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    if device_map is not None:
        kw["device_map"] = device_map
    try:
        config = AutoConfig.from_pretrained(
            folder, revision=kw["revision"], trust_remote_code=kw["trust_remote_code"]
        )
        model, report = cast(Any, AutoModelForImageTextToText).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kw,
        )
    except (
        Exception
    ) as e:  # transformers raises many kinds for a bad checkpoint: all mean the same to the user
        raise ModelError(f"{where}: transformers cannot load it: {_first_line(e)}") from e
    _complete(report, where)
    return model


def _complete(report: Any, where: str) -> None:
    """Newly initialised weights would run, and mean nothing."""
    missing, wrong = list(report.get("missing_keys", ())), list(report.get("mismatched_keys", ()))
    if missing or wrong:
        first = (missing + [w if isinstance(w, str) else " ".join(map(str, w)) for w in wrong])[0]
        raise ModelError(
            f"{where}: {len(missing)} weights missing and {len(wrong)} of the wrong shape (first: {first}); "
            "the checkpoint is damaged or belongs to another config"
        )


def _first_line(e: Exception) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # "validation error:", and the reason below
        return " ".join(lines[:2])[:300]
    return lines[0][:300] if lines else type(e).__name__


def _all_finite(weight: torch.Tensor) -> bool:
    """In pieces: the check makes copies, and the embedding of a 7B model has half a billion numbers."""
    return all(bool(torch.isfinite(part).all()) for part in weight.flatten().split(2**22))


def _finite(hf: nn.Module, where: str) -> None:
    bad = [n for n, p in hf.named_parameters() if p.device.type != "meta" and not _all_finite(p)]
    if bad:
        raise ModelError(
            f"{where}: {len(bad)} weights hold nan or infinite values (first: {bad[0]}); the file is damaged"
        )


def _tokenizer(folder: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if (
        Path(folder).is_dir()
        and not any(Path(folder).glob("token*"))
        and not any(Path(folder).glob("vocab*"))
    ):
        return None
    try:
        made = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as e:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {_first_line(e)}") from e
    if not getattr(made, "chat_template", None):
        made.chat_template = _processors_template(folder, revision)
    return made


def _processors_template(folder: str, revision: str | None) -> str | None:
    """The chat template of checkpoints that keep it with the processor (`chat_template.json`), or None."""
    file = _file(folder, "chat_template.json", revision)
    if file is None:
        return None
    try:
        return json.loads(file.read_text()).get("chat_template")
    except (ValueError, AttributeError) as e:
        raise ModelError(f"{file}: not a chat template: {e}") from None


def _file(folder: str, name: str, revision: str | None) -> Path | None:
    """A file of a checkpoint, from its folder or the hub's cache."""
    if Path(folder).is_dir():
        return Path(folder) / name if (Path(folder) / name).exists() else None
    from transformers.utils.hub import cached_file

    found = cached_file(folder, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def _preprocessor(folder: str, revision: str | None) -> Preprocessor | None:
    """The checkpoint's own preprocessor json; None if it brings none. Raises ConfigError if it makes no sense."""
    names = ("video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json")
    found = [f for f in (_file(folder, n, revision) for n in names) if f is not None]
    return Preprocessor.from_folder(str(found[0].parent)) if found else None
