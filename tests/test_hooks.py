"""Hook points and cuts in every family, against forwards masked by hand in a model the lab never touched."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lab.errors import LabWarning, RunError, UsageError
from lab.model.ready import Ready
from lab.model.run import CURRENT
from lab.model.videollm import VideoLLM
from lab.model.zoo import wrap
from tests.families import FAMILIES, LAYERS, PAD, UNKNOWN, build, inputs

ALL = (*FAMILIES, *UNKNOWN)
HEAD, HEADS, KV, WIDTH = 1, 4, 2, 64
LAYER = 3  # a softmax layer in every family, the hybrid one too
TOL = 1e-5
STEP_TOL = {
    "qwen3_5": 1e-4
}  # its linear layers run transformers' recurrent kernel in cached steps, a chunked one in whole prompts
SCORES = f"blocks.{LAYER}.attn.hook_attn_scores"
PATTERN = f"blocks.{LAYER}.attn.hook_pattern"
NEW = 4  # generated tokens
FEATURE_LAYER = {"llava_next_video": 2}  # the tower layer the connector reads, where it is not the last
BATCHES = pytest.mark.parametrize("worlds, pad", [(1, 0), (2, 3)], ids=["single", "left-padded"])
EACH = pytest.mark.parametrize("name", ALL)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def model_of(name: str) -> VideoLLM:
    return wrap(build(name))


@functools.cache
def plain_of(name: str) -> Any:
    """The same weights, never wrapped, with transformers' eager attention in the decoder (the tower keeps its kernel)."""
    hf = build(name)
    hf.load_state_dict(model_of(name).hf.state_dict())
    hf.set_attn_implementation({"text_config": "eager"})
    assert lm_of(hf).config._attn_implementation == "eager"
    return hf


def lm_of(hf: Any) -> Any:
    return getattr(hf.model, "language_model", None) or hf.model.text_model


def ready_of(name: str, worlds: int = 1, pad: int = 0) -> Ready:
    return model_of(name).prepare_inputs(**inputs(name, worlds=worlds, pad=pad))


def away(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# ---- a forward masked by hand: transformers' eager attention, no code of the lab -----------------------------------


def cut_of(n_prompt: int, n: int) -> Tensor:
    """True = cut, [head, q, k]: in one head the last four prompt rows lose every second key of 6..17.

    Rows after the prompt lose what the prompt's last row lost.
    """
    cut = torch.zeros(HEADS, n, n, dtype=torch.bool)
    cut[HEAD, n_prompt - 4 :, 6:18:2] = True
    return cut


def by_hand(name: str, x: dict[str, Tensor], cut: Tensor) -> Tensor:
    """Logits of all positions with `cut` [head, q, k] hidden from layer LAYER."""
    hf = plain_of(name)

    def hide(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].expand(-1, HEADS, -1, -1)
        return args, {**kwargs, "attention_mask": mask.masked_fill(cut, float("-inf"))}

    handle = lm_of(hf).layers[LAYER].self_attn.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        return hf(**x, use_cache=False).logits
    finally:
        handle.remove()


def longer(x: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """The same inputs with text ids appended."""
    out = {**x, "input_ids": torch.cat([x["input_ids"], new], 1)}
    for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in x:
            out[key] = torch.cat([x[key], torch.full_like(new, fill).to(x[key])], 1)
    return out


# ---- the same cut, as a hook and as edges ---------------------------------------------------------------------------


def cutting_hook(n_prompt: int) -> Callable[..., Tensor]:
    def edit(value: Tensor, hook: Any) -> Tensor:
        q, k = value.shape[-2:]
        return value.masked_fill(cut_of(n_prompt, max(k, n_prompt))[:, k - q : k, :k], float("-inf"))

    return edit


def cutting_edges(n_prompt: int) -> dict[int, Callable[[Tensor, Tensor], Tensor]]:
    def keep(q: Tensor, k: Tensor) -> Tensor:
        n = max(int(k.max()) + 1, n_prompt)
        return ~cut_of(n_prompt, n)[:, q][:, :, k]

    return {LAYER: keep}


def all_true(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(len(q), len(k), dtype=torch.bool)


# ---- a cut is a cut -------------------------------------------------------------------------------------------------


@EACH
@BATCHES
def test_cut_equals_hand_mask(name: str, worlds: int, pad: int) -> None:
    model, x = model_of(name), inputs(name, worlds=worlds, pad=pad)
    ready, n = model.prepare_inputs(**x), x["input_ids"].shape[1]
    real = x["attention_mask"].bool()
    want = by_hand(name, x, cut_of(n, n))[real]
    hooked = model.run_with_hooks(ready, fwd_hooks=[(SCORES, cutting_hook(n))], read="all")[real]
    edges = model(ready, edges=cutting_edges(n), read="all")[real]
    assert away(hooked, want) <= TOL
    assert away(edges, want) <= TOL and away(edges, hooked) <= TOL
    assert away(model(ready, read="all")[real], want) > 100 * TOL  # the cut has an effect to be equal about


def stepwise(name: str, x: dict[str, Tensor], n_new: int) -> tuple[Tensor, Tensor]:
    """Greedy ids [world, new] and logits [world, new, vocab], everything recomputed per step under the hand mask."""
    n, new, logits = x["input_ids"].shape[1], x["input_ids"][:, :0], []
    for i in range(n_new):
        logits.append(by_hand(name, longer(x, new), cut_of(n, n + i))[:, -1])
        new = torch.cat([new, logits[-1].argmax(-1, keepdim=True)], 1)
    return new, torch.stack(logits, 1)


@EACH
@BATCHES
def test_cut_in_cached_generation_equals_recomputing_every_step(name: str, worlds: int, pad: int) -> None:
    model, x = model_of(name), inputs(name, worlds=worlds, pad=pad)
    ready, n = model.prepare_inputs(**x), x["input_ids"].shape[1]
    want_ids, want = stepwise(name, x, NEW)
    shapes: list[tuple[int, ...]] = []
    seen: list[Tensor] = []

    def spy(value: Tensor, hook: Any) -> Tensor:
        shapes.append(tuple(value.shape))
        return cutting_hook(n)(value, hook)

    def keep_last(value: Tensor, hook: Any) -> None:
        seen.append(model.unembed(value[:, -1]))

    last = ("ln_final.hook_normalized", keep_last)
    with model.hooks(fwd_hooks=[(SCORES, spy), last]):
        hooked = model.generate(ready, max_new_tokens=NEW, stop=[PAD], return_ids=True)[1]
    assert hooked.tolist() == want_ids.tolist()
    assert away(torch.stack(seen, 1), want) <= STEP_TOL.get(name, TOL)
    assert shapes == [(worlds, HEADS, n, n)] + [(worlds, HEADS, 1, n + i) for i in range(1, NEW)]
    seen.clear()
    with model.hooks(fwd_hooks=[last]):
        cut = model.generate(ready, max_new_tokens=NEW, stop=[PAD], edges=cutting_edges(n), return_ids=True)[
            1
        ]
    assert cut.tolist() == want_ids.tolist()
    assert away(torch.stack(seen, 1), want) <= STEP_TOL.get(name, TOL)


@EACH
@pytest.mark.parametrize("heads", [slice(None), slice(HEAD, HEAD + 1)], ids=["all heads", "one head"])
def test_fully_cut_row_is_zero_forward_and_backward(name: str, heads: slice) -> None:
    model, row = model_of(name), 20
    ready = ready_of(name)
    keep_z: list[Tensor] = []

    def cut_row(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, heads, row] = float("-inf")
        return value

    def edges(q: Tensor, k: Tensor) -> Tensor:
        keep = torch.ones(HEADS, len(q), len(k), dtype=torch.bool)
        keep[heads, q == row] = False
        return keep

    watch = (f"blocks.{LAYER}.attn.hook_z", lambda value, hook: keep_z.append(value.detach()))
    for hooks, cut in (([(SCORES, cut_row), watch], {}), ([watch], {LAYER: edges})):
        keep_z.clear()
        model.hf.zero_grad()
        with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
            logits = model(ready, edges=cut, read="all")
            logits.square().sum().backward()
        (z,) = keep_z
        assert bool((z[:, row, heads] == 0).all()) and bool(torch.isfinite(logits).all())
        assert bool((z[:, row - 1] != 0).any(-1).all())
        grads = [p.grad for p in lm_of(model.hf).parameters() if p.grad is not None]
        assert len(grads) > 20 and all(bool(torch.isfinite(g).all()) for g in grads)
        model.hf.zero_grad()


def test_a_cut_row_never_reaches_the_kernel_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other devices' kernels make nan of a row without keys, forward or backward; this one says so."""
    model, ready, rows = model_of("internvl"), ready_of("internvl", 2, 3), []
    kernel, clean = ALL_ATTENTION_FUNCTIONS["sdpa"], model(ready, read="all")

    def strict(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **kw: Any) -> Any:
        rows.append(bool((mask if mask.dtype == torch.bool else mask > float("-inf")).any(-1).all()))
        return kernel(module, q, k, v, mask, **kw)

    def none(q: Tensor, k: Tensor) -> Tensor:
        return (q[:, None] != 20).expand(len(q), len(k))

    def bias(q: Tensor, k: Tensor) -> Tensor:
        return torch.zeros(len(q), len(k)).masked_fill(~none(q, k), float("-inf"))

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS["lab_sdpa"], "plain", lambda module: strict)
    cut = [model(ready, edges=dict.fromkeys(range(LAYERS), edge), read="all") for edge in (none, bias)]
    assert rows == [True] * 2 * LAYERS
    assert away(cut[0], cut[1]) <= TOL and away(cut[0], clean) > 1e-3


@EACH
@BATCHES
def test_cutting_nothing_is_nothing(name: str, worlds: int, pad: int) -> None:
    model, ready = model_of(name), ready_of(name, worlds, pad)
    layers = [p.index for p in model.parts if p.attn is not None]
    nothing = dict.fromkeys(layers, all_true)
    assert away(model(ready, edges=nothing, read="all"), model(ready, read="all")) == 0.0
    clean = model(ready, look=layers, read="all")
    assert away(model(ready, look=layers, edges=nothing, read="all"), clean) == 0.0


# ---- every hook point -----------------------------------------------------------------------------------------------


def softmax_layers(model: VideoLLM) -> list[int]:
    return [p.index for p in model.parts if p.attn is not None]


@EACH
@BATCHES
def test_identity_hooks_change_nothing_and_fire_once_with_documented_shapes(
    name: str, worlds: int, pad: int
) -> None:
    model, ready = model_of(name), ready_of(name, worlds, pad)
    fired: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}

    def same(value: Tensor, hook: Any) -> Tensor:
        fired[hook.name] += 1
        shapes[hook.name] = tuple(value.shape)
        return value

    lazy = ("hook_attn_scores", "hook_pattern")
    names = list(model.hook_dict)
    clean = model(ready, read="all")
    with model.hooks(fwd_hooks=[(n, same) for n in names if not n.endswith(lazy)]):
        assert away(model(ready, read="all"), clean) == 0.0
    clean = model(ready, look=softmax_layers(model), read="all")
    fired.clear()
    with model.hooks(fwd_hooks=[(n, same) for n in names]):
        assert away(model(ready, read="all"), clean) == 0.0
    assert fired == Counter(names)
    for n, shape in shapes.items():
        if not n.startswith(("vision", "connector")):
            assert shape == documented(model, n, worlds, ready.n_pos, ready.n_pos), n


def documented(model: VideoLLM, name: str, worlds: int, rows: int, keys: int) -> tuple[int, ...]:
    kind = name.rsplit(".", 1)[1]
    if kind in ("hook_attn_scores", "hook_pattern"):
        return worlds, HEADS, rows, keys
    if kind in ("hook_q", "hook_rot_q", "hook_z"):
        return worlds, rows, HEADS, model.cfg.d_head
    if kind in ("hook_k", "hook_rot_k", "hook_v"):
        return worlds, rows, KV, model.cfg.d_head
    return worlds, rows, 1 if kind == "hook_scale" else WIDTH


@EACH
def test_in_cached_decode_hooks_see_the_new_row_and_all_keys(name: str) -> None:
    model, ready, worlds = model_of(name), ready_of(name, 2, 3), 2
    shapes: dict[str, list[tuple[int, ...]]] = {}

    def note(value: Tensor, hook: Any) -> None:
        shapes.setdefault(hook.name, []).append(tuple(value.shape))

    inner = [n for n in model.hook_dict if n.startswith(("blocks", "ln_final"))]
    with model.hooks(fwd_hooks=[(n, note) for n in inner]):
        model.generate(ready, max_new_tokens=3, stop=[PAD])
    n = ready.n_pos
    for name_ in inner:
        want = [documented(model, name_, worlds, *at) for at in ((n, n), (1, n + 1), (1, n + 2))]
        assert shapes[name_] == want, name_


@EACH
def test_editing_any_hook_point_changes_the_logits(name: str) -> None:
    model, ready = model_of(name), ready_of(name)
    clean = model(ready, read="all")

    def noise(value: Tensor, hook: Any) -> Tensor:
        g = torch.Generator().manual_seed(0)
        return value + 0.5 * torch.randn(value.shape, generator=g)

    unread = FEATURE_LAYER.get(name, LAYERS)
    for point in model.hook_dict:
        effect = away(model.run_with_hooks(ready, fwd_hooks=[(point, noise)], read="all"), clean)
        found = re.match(r"vision\.(\d+)\.", point)
        if found and int(found[1]) > unread:
            assert effect == 0.0, point  # the checkpoint itself reads no output of these layers
        else:
            assert effect > 1e-3, point


@EACH
def test_vision_and_connector_edits_work_before_and_after_a_plain_call(name: str) -> None:
    x = inputs(name)
    hf = build(name)
    before, after = wrap(copy.deepcopy(hf)), hf
    after(**x, output_hidden_states=True)
    after = wrap(after)
    points = (f"vision.{FEATURE_LAYER.get(name, 3)}.hook_resid_post", "connector.hook_out")
    clean = before(before.prepare_inputs(**x), read="all")
    for point in points:
        hooks: Any = [(point, lambda value, hook: torch.zeros_like(value))]
        first = before.run_with_hooks(before.prepare_inputs(**x), fwd_hooks=hooks, read="all")
        second = after.run_with_hooks(after.prepare_inputs(**x), fwd_hooks=hooks, read="all")
        assert away(first, second) == 0.0
        assert away(first, clean) > 1e-2
    before.hf(**x, output_hidden_states=True)  # a plain call of a wrapped model
    again = before.run_with_hooks(before.prepare_inputs(**x), fwd_hooks=hooks, read="all")
    assert away(again, second) == 0.0


# ---- the residual stream --------------------------------------------------------------------------------------------


@EACH
def test_resid_mid_is_writable(name: str) -> None:
    model, ready = model_of(name), ready_of(name, 2, 3)
    delta = torch.randn(2, ready.n_pos, WIDTH, generator=torch.Generator().manual_seed(3))
    edit = (f"blocks.{LAYER}.hook_resid_mid", lambda value, hook: value + delta)
    _, clean = model.run_with_cache(ready)
    _, cache = model.run_with_cache(ready, fwd_hooks=[edit])
    layer = lm_of(model.hf).layers[LAYER]
    mid = clean["resid_mid", LAYER] + delta
    post = mid + layer.mlp(layer.post_attention_layernorm(mid))
    assert away(cache["resid_post", LAYER], post) <= TOL
    assert away(cache["resid_mid", LAYER], mid) <= TOL
    assert away(clean["resid_mid", LAYER], clean["resid_pre", LAYER] + clean["attn_out", LAYER]) == 0.0


def test_deepstack_is_what_lies_between_resid_post_and_resid_pre() -> None:
    hf, model, x = plain_of("qwen3_vl"), model_of("qwen3_vl"), inputs("qwen3_vl", worlds=2, pad=3)
    seen: dict[str, Any] = {}
    handle = hf.model.language_model.register_forward_pre_hook(
        lambda m, a, kw: seen.update(kw), with_kwargs=True
    )
    hf(**x)
    handle.remove()
    _, cache = model.run_with_cache(model.prepare_inputs(**x))
    video = seen["visual_pos_masks"]
    assert len(seen["deepstack_visual_embeds"]) == 3
    for layer, added in enumerate(seen["deepstack_visual_embeds"]):
        between = cache["resid_pre", layer + 1] - cache["resid_post", layer]
        assert away(between[video], added) <= TOL and float(added.abs().max()) > 0.01
        assert float(between[~video].abs().max()) == 0.0


# ---- hooks leave nothing behind -------------------------------------------------------------------------------------


def assert_clean(model: VideoLLM, ready: Ready, clean: Tensor) -> None:
    assert CURRENT.get() is None
    assert not any(p._forward_hooks or p._backward_hooks or p.fwd_hooks for p in model.hook_dict.values())
    assert model.lock._owner is None and not model.lock._readers and not model.lock._depth
    assert away(model(ready, read="all"), clean) == 0.0


@EACH
def test_in_place_hooks_do_not_reach_later_runs(name: str) -> None:
    model, ready = model_of(name), ready_of(name)
    clean = model(ready, read="all").clone()

    def spoil(value: Tensor, hook: Any) -> None:
        value.mul_(0.0).add_(1.0)

    for point in model.hook_dict:
        with model.hooks(fwd_hooks=[(point, spoil)]):
            model(ready)
    assert_clean(model, ready, clean)
    logits, cache = model.run_with_cache(ready, read="all")
    for value in cache.values():
        value.fill_(7.0)  # what a cache hands out belongs to the caller
    assert_clean(model, ready, clean)


POINTS = (
    "vision.1.hook_resid_pre", "vision.1.hook_resid_post", "connector.hook_out", "embed.hook_out",
    "blocks.3.hook_resid_pre", "blocks.3.attn.hook_q", "blocks.3.attn.hook_rot_k", "blocks.3.attn.hook_attn_scores",
    "blocks.3.attn.hook_z", "blocks.3.hook_attn_out", "blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out",
    "blocks.3.hook_resid_post", "ln_final.hook_scale", "ln_final.hook_normalized",
)  # fmt: skip


@EACH
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_raising_hook_leaves_nothing_behind(name: str, kind: type[BaseException]) -> None:
    model, ready = model_of(name), ready_of(name)
    clean = model(ready, read="all").clone()

    def stop(value: Tensor, hook: Any) -> None:
        raise kind("from inside a hook")

    for point in POINTS:
        for run in (model, model.generate):
            with pytest.raises(kind, match="from inside a hook"), model.hooks(fwd_hooks=[(point, stop)]):
                run(ready)
        assert_clean(model, ready, clean)


def test_a_raising_edge_rule_leaves_nothing_behind() -> None:
    model, ready = model_of("qwen3_vl"), ready_of("qwen3_vl")
    clean = model(ready, read="all").clone()

    def stop(q: Tensor, k: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model(ready, edges={LAYER: stop})
    assert_clean(model, ready, clean)


# ---- what hooks say -------------------------------------------------------------------------------------------------


def test_unknown_hook_name_names_the_closest() -> None:
    model, ready = model_of("internvl"), ready_of("internvl")
    with pytest.raises(UsageError, match=r"blocks\.1\.attn\.hook_pattern"):
        model.run_with_hooks(ready, fwd_hooks=[("blocks.1.attn.hook_patern", lambda value, hook: value)])
    with pytest.raises(UsageError, match=r"blocks\.2\.hook_resid_post"):
        model.run_with_cache(ready, fwd_hooks=[("blocks.2.hook_residpost", lambda value, hook: value)])
    with pytest.raises(UsageError, match=f"none of {len(model.hook_dict)} hook points"):
        model.run_with_cache(ready, names_filter="blocks.1.hook_nothing")
    for layer in (-1, LAYERS):
        with pytest.raises(UsageError, match=rf"no layer .*layers 1\.\.{LAYERS}"):
            model(ready, edges={layer: all_true})


def test_hooks_that_did_nothing_warn() -> None:
    model, ready = model_of("internvl"), ready_of("internvl")
    with pytest.warns(LabWarning, match=r"blocks\.2\.hook_resid_pre fired 1 times and changed nothing"):
        model.run_with_hooks(
            ready, fwd_hooks=[("blocks.2.hook_resid_pre", lambda value, hook: value.clone())]
        )
    with pytest.warns(LabWarning, match="<filter> never fired"):
        model.run_with_hooks(ready, fwd_hooks=[(lambda n: n == "nowhere", lambda value, hook: value + 1)])


def test_hooks_that_look_or_edit_in_place_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    model, ready = model_of("internvl"), ready_of("internvl")
    point = "blocks.2.hook_resid_pre"
    model.run_with_hooks(ready, fwd_hooks=[(point, lambda value, hook: None)])
    model.run_with_hooks(ready, fwd_hooks=[(point, lambda value, hook: value.add_(1.0))])
    assert not [w for w in recwarn if issubclass(w.category, LabWarning)]


def test_hooks_by_a_function_of_names() -> None:
    model, ready = model_of("internvl"), ready_of("internvl")
    seen: list[str] = []
    chosen = lambda n: n.startswith("blocks") and n.endswith("hook_resid_post")  # noqa: E731
    model.run_with_hooks(ready, fwd_hooks=[(chosen, lambda value, hook: seen.append(hook.name))])
    assert seen == [f"blocks.{i}.hook_resid_post" for i in range(LAYERS)]


def test_backward_hooks_see_the_gradient() -> None:
    model, ready = model_of("qwen3_vl"), ready_of("qwen3_vl")
    point, seen, kept = "blocks.2.hook_resid_post", [], []

    def keep(value: Tensor, hook: Any) -> None:
        value.retain_grad()
        kept.append(value)

    with torch.enable_grad():
        with model.hooks([(point, keep)], [(point, lambda grad, hook: seen.append(grad.clone()))]):
            model(ready).square().sum().backward()
        assert len(seen) == 1 and away(seen[0], kept[0].grad) == 0.0 and float(seen[0].abs().max()) > 0
        with pytest.raises(UsageError, match="with model.hooks"):
            model.run_with_hooks(ready, bwd_hooks=[(point, lambda grad, hook: None)])
    model.hf.zero_grad()


def test_layers_without_softmax_attention() -> None:
    model, ready = model_of("qwen3_5"), ready_of("qwen3_5")
    linear = [0, 2]
    for layer in range(LAYERS):
        assert (f"blocks.{layer}.mixer.hook_out" in model.hook_dict) == (layer in linear)
        assert (f"blocks.{layer}.attn.hook_attn_scores" in model.hook_dict) == (layer not in linear)
    for ask in ({"look": [0]}, {"edges": {2: all_true}}):
        with pytest.raises(RunError, match=r"layer [13] \(blocks\.[02]\) has no softmax attention"):
            model(ready, **ask)
    with pytest.raises(UsageError, match=r"no softmax attention"):
        model.run_with_hooks(ready, fwd_hooks=[("blocks.0.attn.hook_attn_scores", lambda value, hook: value)])


def test_plain_torch_hooks_before_the_door_are_seen_by_prepared_inputs() -> None:
    model, ready = wrap(build("internvl")), ready_of("internvl")
    clean = model(ready, read="all")
    handle = model.family.connector(model.hf).register_forward_hook(lambda module, args, output: output * 0.0)
    assert away(model(ready, read="all"), clean) > 1e-2
    handle.remove()
    assert away(model(ready, read="all"), clean) == 0.0


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("reply", [True, False], ids=["returned", "not returned"])
def test_resid_mid_written_in_place_counts(inference: bool, reply: bool) -> None:
    model, ready = model_of("qwen3_vl"), ready_of("qwen3_vl")
    point = f"blocks.{LAYER}.hook_resid_mid"

    def zero(value: Tensor, hook: Any) -> Tensor | None:
        value.zero_()
        return value if reply else None

    want = model.run_with_hooks(ready, fwd_hooks=[(point, lambda v, hook: torch.zeros_like(v))], read="all")
    with torch.inference_mode(inference):
        got = model.run_with_hooks(ready, fwd_hooks=[(point, zero)], read="all")
    assert away(got, want) <= TOL < away(got, model(ready, read="all"))


def test_gradient_at_resid_mid_is_that_of_the_stream() -> None:
    model, ready = model_of("llava_onevision"), ready_of("llava_onevision")
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        value.retain_grad()
        seen[hook.name] = value

    last = model.cfg.n_layers - 1
    names = [f"blocks.{last}.{n}" for n in ("hook_resid_mid", "hook_mlp_out", "hook_attn_out")]
    start = ("embed.hook_out", lambda v, hook: v.detach().requires_grad_())
    with torch.enable_grad(), model.hooks(fwd_hooks=[start, *((n, keep) for n in names)]):
        model(ready).sum().backward()
    mid, mlp, attn = (seen[n].grad for n in names)
    assert mid is not None and mlp is not None and attn is not None
    assert float(mid.abs().sum()) > 0 and away(mid, attn) <= TOL < away(mid, mlp)


@pytest.mark.parametrize(
    "hooks, says",
    [
        (["blocks.0.hook_mlp_out"], "pairs"),
        ([("blocks.0.hook_mlp_out", 3)], "pairs"),
        (3, "pairs"),
        ([("blocks.0.hook_mlp_out", lambda v, hook: 3)], "returned int"),
        ([("blocks.0.hook_mlp_out", lambda v, hook: v[:, :2, :3])], r"returned shape \(1, 2, 3\)"),
    ],
)
def test_hooks_that_cannot_be(hooks: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        model_of("internvl").run_with_hooks(ready_of("internvl"), fwd_hooks=hooks)


@pytest.mark.parametrize(
    "edges, says",
    [
        ([len], "edges map a layer"),
        ({0: torch.ones(3, 3)}, "edges map a layer"),
        ({0: lambda q, k: True}, "gave bool"),
        ({0: lambda q, k: torch.ones(3, 3, dtype=torch.bool)}, r"shape \(3, 3\)"),
    ],
)
def test_edges_that_cannot_be(edges: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        model_of("internvl")(ready_of("internvl"), edges=edges)


@pytest.mark.parametrize("read", [None, 1.5, True, {1, 2}, torch.ones(3, dtype=torch.bool), "frame"])
def test_reads_that_name_no_positions(read: Any) -> None:
    """A mask must not be read as positions 0 and 1."""
    with pytest.raises(UsageError, match="read"):
        model_of("internvl")(ready_of("internvl"), read=read)


def test_reads_by_slice_and_small_integers() -> None:
    model, ready = model_of("internvl"), ready_of("internvl")
    every = model(ready, read="all")
    for read in (slice(-3, None), range(ready.n_pos - 3, ready.n_pos), torch.tensor([-3, -2, -1]).int()):
        assert away(model(ready, read=read), every[:, -3:]) <= TOL


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_may_be_small_integers(name: str) -> None:
    x = inputs(name)
    small = model_of(name).prepare_inputs(**{**x, "input_ids": x["input_ids"].int()})
    assert torch.equal(model_of(name)(small, read="all"), model_of(name)(ready_of(name), read="all"))


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    x = inputs("internvl")
    with pytest.raises(UsageError, match="attention_mask must be a tensor"):
        model_of("internvl").prepare_inputs(**{**x, "attention_mask": x["attention_mask"].tolist()})


def test_a_names_filter_that_is_none_of_the_kinds() -> None:
    with pytest.raises(UsageError, match="names_filter"):
        model_of("internvl").run_with_cache(ready_of("internvl"), names_filter=42)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("how", ["in place", "replaced", "another ready"])
def test_inputs_edited_after_a_run_count(how: str) -> None:
    model, x = model_of("qwen3_vl"), inputs("qwen3_vl")
    ready = model.prepare_inputs(**{k: v.clone() for k, v in x.items()})
    before = model(ready, read="all")
    pixels = "pixel_values_videos"
    if how == "in place":
        ready.inputs[pixels].mul_(2)
    elif how == "replaced":
        ready.inputs[pixels] = 2 * ready.inputs[pixels]
    else:
        ready = dataclasses.replace(ready, inputs={**ready.inputs, pixels: 2 * ready.inputs[pixels]})
    want = model(model.prepare_inputs(**{**x, pixels: 2 * x[pixels]}), read="all")
    assert torch.equal(model(ready, read="all"), want) and away(want, before) > 1e-2
