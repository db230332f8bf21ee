"""The checks of `lab.bench.gpu`. Each returns rows: what was looked at, what was found, the bound, whether it holds."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab.bench import models
from lab.bench.measuring import median_ratio, paired, peak_bytes, setting
from lab.bench.overhead import is_resid
from lab.errors import LabError
from lab.model.memory import predict
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap
from lab.pixels import normalise
from lab.resample import resize

SMALL = models.Shape(
    d=64, mlp=176, layers=3, heads=4, kv_heads=2, vocab=512, tower_d=32, tower_mlp=64, side=48, patch=6
)
DEAD_ROW = 7  # its keys are all cut in one check
# largest difference over largest logit: the loops are the same, so parity is 0 where kernels are deterministic;
# kernels add up in other orders, which half precision shows
PARITY = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SAME_CUT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
BACKENDS = {
    "sdpa": None,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


@dataclass
class Report:
    """Rows of the table, and numbers kept beside them."""

    rows: list[dict[str, Any]]
    numbers: dict[str, Any]

    def add(self, what: str, found: str, bound: str = "", holds: bool | None = None) -> None:
        """One check. `holds` None: a number, not a check."""
        self.rows.append({"what": what, "found": found, "bound": bound, "holds": holds})

    def compare(self, what: str, found: float, bound: float) -> None:
        """A number that must not pass its bound."""
        self.add(what, f"{found:.2e}", f"<= {bound:.0e}", found <= bound)


@torch.no_grad()
def run(device: str, *, quick: bool, layers: int | None, frames: int, new: int, flex: bool) -> dict[str, Any]:
    """All checks, small model first."""
    report = Report([], {})
    for dtype in (torch.float32, torch.bfloat16):
        parity(report, device, SMALL, dtype, frames=3)
        kernels(report, device, dtype, flex=flex)
    empty_rows(report, device)
    pixels(report, device)
    shape = SMALL if quick else replace(models.SEVEN_B, layers=layers or models.SEVEN_B.layers)
    big = Subject.make(
        report, device, shape, torch.float32 if quick else torch.bfloat16, frames=4 if quick else frames
    )
    chunked(report, big)
    speed(report, big, new=min(new, 8) if quick else new)
    prediction(report, big, frames=4 if quick else frames, new=min(new, 8) if quick else new)
    ratios_of_time(report, big, pairs=3 if quick else 9)
    return setting(device) | {
        "shape": asdict(shape),
        "quick": quick,
        "rows": report.rows,
        "numbers": report.numbers,
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-12))


# ---- the same numbers as transformers ------------------------------------------------------------------------------


def parity(report: Report, device: str, shape: models.Shape, dtype: torch.dtype, *, frames: int) -> None:
    """Logits of all positions and greedy ids against a plain copy of the model."""
    plain = models.build(shape, device=device, dtype=dtype)
    model = wrap(copy.deepcopy(plain))
    x = models.inputs(shape, frames, device=device, dtype=dtype)
    ready = model.prepare_inputs(**x)
    label = f"{name_of(dtype)}, {shape.layers} layers, d {shape.d}"
    report.compare(
        f"logits against transformers ({label})",
        relative(model(ready, read="all"), plain(**x).logits),
        PARITY[dtype],
    )
    ours, theirs = model.generate(ready, max_new_tokens=8, stop=()).ids, hf_ids(plain, x, 8)
    same = int((ours == theirs).sum())
    report.add(f"greedy tokens equal ({label})", f"{same} of {ours.numel()}", "all", same == ours.numel())


def hf_ids(plain: Any, x: dict[str, Tensor], new: int) -> Tensor:
    """`new` greedy ids by transformers, whatever the end token says."""
    out = plain.generate(**x, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
    return out[:, x["input_ids"].shape[1] :].cpu()


# ---- cuts under every kernel ---------------------------------------------------------------------------------------


def across_frames(tokens: Tensor, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Edges kept: all but those between video tokens of different frames. `tokens` [pos]: frame index, -1 for text."""
    frame = tokens.to(device)

    def keep(q: Tensor, k: Tensor) -> Tensor:
        a, b = frame[q][:, None], frame[k][None, :]
        return (a == b) | (a < 0) | (b < 0)

    return keep


def kernels(report: Report, device: str, dtype: torch.dtype, *, flex: bool) -> None:
    """Clean and cut logits under each kernel against scores, softmax and values written out."""
    plain = models.build(SMALL, device=device, dtype=dtype)
    x = models.inputs(SMALL, 4, device=device, dtype=dtype)
    for kernel in implementations(device, dtype, flex):
        try:
            model = wrap(copy.deepcopy(_with(plain, kernel)))
        except (LabError, ImportError, ValueError, RuntimeError) as e:
            report.add(f"{kernel} ({name_of(dtype)})", f"not here: {_line(e)}")
            continue
        for backend, choice in (BACKENDS if kernel == "sdpa" else {kernel: None}).items():
            _under(report, model, x, backend, choice, dtype, device)


def implementations(device: str, dtype: torch.dtype, flex: bool) -> list[str]:
    """transformers' kernels that can run here."""
    found = ["sdpa", "eager"]
    half_on_gpu = torch.device(device).type == "cuda" and dtype != torch.float32
    if half_on_gpu and importlib.util.find_spec("flash_attn"):
        found.append("flash_attention_2")
    return [*found, "flex_attention"] if flex else found


def _with(plain: Any, kernel: str) -> Any:
    plain.set_attn_implementation({"text_config": kernel, "vision_config": "sdpa", "": kernel})
    return plain


def _under(
    report: Report,
    model: VideoLLM,
    x: dict[str, Tensor],
    name: str,
    choice: Any,
    dtype: torch.dtype,
    device: str,
) -> None:
    ready = model.prepare_inputs(**x)
    cut = dict.fromkeys(range(model.cfg.n_layers), across_frames(ready.tokens.frame, device))
    every = range(model.cfg.n_layers)
    clean, cut_out = model(ready, read="all", look=every), model(ready, read="all", edges=cut, look=every)
    if relative(cut_out, clean) < 1e-3:
        report.add(f"{name} ({name_of(dtype)})", "the cut changes nothing: no check", "", False)
    for what, edges, reference in (("clean", None, clean), ("cut", cut, cut_out)):
        label = f"{what} under {name} against explicit ({name_of(dtype)})"
        try:
            with _only(choice):
                got = model(ready, read="all", edges=edges)
        except RuntimeError as e:  # a backend that cannot do this: torch says so, and nothing wrong comes out
            report.add(label, f"refused: {_line(e)}")
            continue
        report.compare(label, relative(got, reference), SAME_CUT[dtype])


@contextlib.contextmanager
def _only(choice: Any) -> Iterator[None]:
    with contextlib.nullcontext() if choice is None else sdpa_kernel([choice]):
        yield


def _line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:80]


def empty_rows(report: Report, device: str) -> None:
    """A row whose keys are all cut gives z = 0, and finite logits."""
    for dtype in (torch.float32, torch.bfloat16):
        model = wrap(models.build(SMALL, device=device, dtype=dtype))
        ready = model.prepare_inputs(**models.inputs(SMALL, 3, device=device, dtype=dtype))
        cut = {1: lambda q, k: (q[:, None] != DEAD_ROW) | (k[None, :] < 0)}
        logits, cache = model.run_with_cache(
            ready, names_filter="blocks.1.attn.hook_z", edges=cut, read="all"
        )
        z = cache["blocks.1.attn.hook_z"]
        dead, alive = float(z[:, DEAD_ROW].abs().max()), float(z[:, DEAD_ROW + 1].abs().max())
        good = dead == 0 and alive > 0 and bool(torch.isfinite(logits).all())
        report.add(f"row without keys, z ({name_of(dtype)})", f"{dead:g} (next row {alive:.2g})", "0", good)


def pixels(report: Report, device: str) -> None:
    """Preprocessing on the device gives the CPU's very numbers (integer arithmetic in float64, table look-ups)."""
    frames = torch.randint(
        0, 256, (2, 3, 123, 217), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    for resample in ("bicubic", "bilinear", "lanczos"):
        here, there = (resize(x, (60, 300), resample) for x in (frames, frames.to(device)))
        report.compare(
            f"resize {resample}, device vs CPU", float((here.int() - there.cpu().int()).abs().max()), 0.0
        )
    a, b = (
        normalise(x, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28), 1 / 255) for x in (frames, frames.to(device))
    )
    report.compare("normalise, device vs CPU", float((a - b.cpu()).abs().max()), 1e-6)


# ---- the big model -------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model of the size in question, its video, and what plain transformers made of it before it was wrapped."""

    model: VideoLLM
    x: dict[str, Tensor]
    device: str
    dtype: torch.dtype
    base: int  # bytes on the device before the model

    @property
    def hf(self) -> Any:
        """transformers' own model inside."""
        return self.model.hf

    @staticmethod
    def make(report: Report, device: str, shape: models.Shape, dtype: torch.dtype, *, frames: int) -> Subject:
        gc.collect()
        base = torch.cuda.memory_allocated() if torch.device(device).type == "cuda" else 0
        hf = models.build(shape, device=device, dtype=dtype)
        x = models.inputs(shape, frames, device=device, dtype=dtype)
        theirs = hf(**x, logits_to_keep=64, use_cache=False).logits
        model = wrap(hf)
        ours = model(model.prepare_inputs(**x), read=list(range(-64, 0)))
        label = f"{name_of(dtype)}, {shape.layers} layers, d {shape.d}, {x['input_ids'].shape[1]:,} positions"
        report.compare(f"logits against transformers ({label})", relative(ours, theirs), PARITY[dtype])
        return Subject(model, x, device, dtype, base)

    def clock(self) -> float:
        """Wall time once the device has finished."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def chunked(report: Report, big: Subject) -> None:
    """Prefill in pieces: the same logits in less memory."""
    ready = big.model.prepare_inputs(**big.x)
    n = ready.n_pos
    chunk = max(32, n // 8)
    whole, pieces = big.model(ready), big.model(ready, chunk=chunk)
    report.compare(
        f"prefill in pieces of {chunk:,} against {n:,} at once", relative(pieces, whole), SAME_CUT[big.dtype]
    )

    def peak(size: int | None) -> int:
        return peak_bytes(lambda: big.model.generate(ready, max_new_tokens=1, chunk=size), big.device)

    once, apart = peak(None), peak(chunk)
    report.add("its peak over weights and door", f"{apart:,} of {once:,} bytes", "less", apart < once)
    report.numbers["chunked"] = {
        "chunk": chunk,
        "positions": n,
        "peak_bytes": apart,
        "peak_bytes_at_once": once,
    }


def speed(report: Report, big: Subject, *, new: int) -> None:
    """Tokens a second at prefill (tower included) and at decoding, and peak memory, beside transformers' own."""
    n = big.x["input_ids"].shape[1]

    def ours(count: int) -> Tensor:
        ready = big.model.prepare_inputs(**big.x)
        return big.model.generate(ready, max_new_tokens=count, stop=()).ids

    def theirs(count: int) -> Tensor:
        return hf_ids(big.hf, big.x, count)

    same = int((ours(new) == theirs(new)).sum())
    # in half precision two loops that add up in another order part at the first near-tie: a number, no check
    exact = same == new if big.dtype == torch.float32 else None
    report.add("greedy tokens equal at this size", f"{same} of {new}", "all in float32", exact)
    found: dict[str, dict[str, float]] = {}
    for who, work in (("lab", ours), ("transformers", theirs)):
        first, all_ = _best(lambda w=work: w(1), big.clock), _best(lambda w=work: w(new), big.clock)
        decode = (new - 1) / max(all_ - first, 1e-9)
        peak = peak_bytes(lambda w=work: w(min(new, 8)), big.device)
        found[who] = {"prefill_tokens_per_s": n / first, "decode_tokens_per_s": decode, "peak_bytes": peak}
        report.add(
            f"{who}: prefill, decode, peak over weights",
            f"{n / first:,.0f}/s, {decode:,.1f}/s, {peak:,} bytes",
        )
    report.numbers["speed"] = {"positions": n, "new_tokens": new, **found}


def _best(work: Callable[[], Any], clock: Callable[[], float], times: int = 3) -> float:
    work()  # warm
    best = float("inf")
    for _ in range(times):
        start = clock()
        work()
        best = min(best, clock() - start)
    return best


def prediction(report: Report, big: Subject, *, frames: int, new: int) -> None:
    """Tensor bytes of a whole answer against the prediction (without what libraries take, which torch cannot see)."""
    ready = big.model.prepare_inputs(**big.x)
    vision = big.hf.config.vision_config
    video = {"n_frames": frames, "width": vision.image_size, "height": vision.image_size, "new_tokens": new}
    said = predict(big.model, device=big.device, dtype=big.dtype, text_tokens=20, **video)
    run_bytes = peak_bytes(lambda: big.model.generate(ready, max_new_tokens=new, stop=()), big.device)
    weights = sum(p.nbytes for p in big.hf.parameters())
    if torch.device(big.device).type == "cuda":
        run_bytes = torch.cuda.max_memory_allocated(big.device) - big.base - weights
    expected = max(said.tower, said.kv + said.activations)
    measured, predicted = weights + run_bytes, said.weights + expected
    ratio = predicted / measured
    report.add(
        "memory predicted / measured",
        f"{ratio:.3f} ({predicted:,} / {measured:,})",
        "within 0.15",
        abs(ratio - 1) <= 0.15,
    )
    report.numbers["memory"] = {
        "predicted": dict(said),
        "measured_weights": weights,
        "measured_run": run_bytes,
    }


def ratios_of_time(report: Report, big: Subject, *, pairs: int) -> None:
    """Forward of the decoder against transformers' own, and with the residual stream of every layer kept."""
    model = big.model
    ready = model.prepare_inputs(**big.x)
    door = model.see(ready)
    inner = {"inputs_embeds": door.embeds, "attention_mask": big.x["attention_mask"], "use_cache": False}
    works: dict[str, Callable[[], Any]] = {
        "hf": lambda: big.hf(**inner, logits_to_keep=1),
        "decoder": lambda: model(ready),
        "resid": lambda: model.run_with_cache(ready, names_filter=is_resid),
    }
    seconds = paired(works, pairs=pairs, clock=big.clock)
    ratios = {f"{a} / {b}": median_ratio(seconds, a, b) for a, b in (("decoder", "hf"), ("resid", "decoder"))}
    for what, ratio in ratios.items():
        report.add(f"time, {what}", f"{ratio:.3f}")
    report.numbers["overhead"] = {"ratios": ratios, "seconds": seconds}
