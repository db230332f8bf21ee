"""TransformerLens's ActivationCache on a wrapped model: what works as it is, what needs DeepStack, what has no meaning here."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformer_lens import ActivationCache

from lab.errors import RunError, TooBig, UsageError

LAZY = ("hook_attn_scores", "hook_pattern")  # L x L each: only for who asks
NamesFilter = None | str | Sequence[str] | Callable[[str], bool]


class LabCache(ActivationCache):
    """ActivationCache whose sums are right for DeepStack models, and whose refusals say what to use."""

    def decompose_resid(
        self, layer: Any = None, mlp_input: bool = False, mode: Any = "all", apply_ln: bool = False,
        pos_slice: Any = None, incl_embeds: bool = True, return_labels: bool = False,
    ) -> Any:  # fmt: skip
        """As TransformerLens; on DeepStack models one more component per injected layer follows at the end."""
        self._need("hook_embed", "embed.hook_out") if incl_embeds else None
        self._no_mixers("decompose_resid")
        parts, labels = super().decompose_resid(
            layer, mlp_input, mode, False, pos_slice, incl_embeds, return_labels=True
        )
        n = self.model.cfg.n_layers if layer in (None, -1) else layer
        if incl_embeds and mode == "all":
            parts, labels = self._plus_deepstack(parts, cast("list[str]", labels), n, pos_slice)
        if apply_ln:
            parts = self.apply_ln_to_stack(parts, n, pos_slice=pos_slice, mlp_input=mlp_input)
        return (parts, labels) if return_labels else parts

    def _plus_deepstack(
        self, parts: Tensor, labels: list[str], n: int, pos_slice: Any
    ) -> tuple[Tensor, list[str]]:
        from transformer_lens.utilities.slice import Slice

        cut = pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
        for i in range(min(self._wrapped.cfg.n_deepstack, n)):
            added = self._after(i) - self[("resid_post", i)]
            parts = torch.cat([parts, cut.apply(added, dim=-2)[None]])
            labels = [*labels, f"{i}_deepstack"]
        return parts, labels

    def _after(self, layer: int) -> Tensor:
        return self[("resid_pre", layer + 1)]

    def _need(self, alias: str, name: str) -> None:
        if alias not in self.cache_dict:
            if name not in self.cache_dict:
                raise RunError(f"this cache has no {name!r}; cache it too, or pass incl_embeds=False")
            self.cache_dict[alias] = self.cache_dict[name]
            self.has_embed = True

    @property
    def _wrapped(self) -> Any:
        return self.model

    def _no_mixers(self, what: str) -> None:
        without = [p.index for p in self._wrapped.parts if p.attn is None]
        if without:
            raise RunError(
                f"{what} needs attn_out in every layer; layers {[i + 1 for i in without]} have no softmax attention: "
                "use accumulated_resid, or the cached mixer.hook_out"
            )

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        self._no_mixers("stack_head_results")
        return super().stack_head_results(*args, **kwargs)

    def logit_attrs(self, residual_stack: Tensor, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens; directions carry the final norm's gain, so attributions sum to the logit."""
        return super().logit_attrs(residual_stack, tokens, *args, **kwargs)

    def _get_cached_ln_scale(
        self, layer: Any, mlp_input: bool, pos_slice: Any, batch_slice: Any = None
    ) -> Tensor:
        if layer not in (None, self.model.cfg.n_layers):
            raise RunError(f"apply_ln is offered at the final norm only (layer=-1), not at layer {layer}")
        if "ln_final.hook_scale" not in self.cache_dict:
            raise RunError(
                "this cache has no 'ln_final.hook_scale'; add it to names_filter to apply the final norm"
            )
        return super()._get_cached_ln_scale(layer, mlp_input, pos_slice, batch_slice)

    def get_neuron_results(self, *args: Any, **kwargs: Any) -> Any:
        raise RunError(
            "neurons are inside the checkpoint's own MLP and are not cached; use decompose_resid(mode='mlp')"
        )

    stack_neuron_results = get_neuron_results
    get_full_resid_decomposition = get_neuron_results


def wanted(names: Sequence[str], names_filter: NamesFilter) -> list[str]:
    """Hook names to cache. None = everything but scores and pattern.

    Raises UsageError if nothing matches, or if a listed name does not exist.
    """
    match names_filter:
        case None:
            chosen = [n for n in names if not n.endswith(LAZY)]
        case str():
            chosen = [n for n in names if n == names_filter]
        case _ if callable(names_filter):
            chosen = [n for n in names if names_filter(n)]
        case _:
            if not isinstance(names_filter, Iterable):
                raise UsageError(
                    f"names_filter is None, a name, names or a function of a name; got {names_filter!r}"
                )
            asked = list(cast("Sequence[str]", names_filter))
            for name in set(asked) - set(names):
                near = difflib.get_close_matches(name, names, n=3)
                raise UsageError(f"no hook point {name!r}; closest: {', '.join(near) or 'none'}")
            chosen = [n for n in names if n in asked]
    if not chosen:
        raise UsageError(
            f"names_filter {names_filter!r} matches none of {len(names)} hook points; see model.hook_dict"
        )
    return chosen


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def guard(cfg: Any, chosen: Sequence[str], worlds: int, pos: int, device: torch.device, kept: bool) -> None:
    """Print what scores and patterns will take; raise TooBig beyond a quarter of free memory.

    kept  True when every layer's map is kept (a cache), False when one layer at a time exists (a hook)
    """
    # maps of the vision tower are counted where their sizes are known: `lab.model.tower`
    lazy = [n for n in chosen if n.endswith(LAZY) and not n.startswith("vision.")]
    if not lazy:
        return
    size = torch.finfo(cfg.dtype).bits // 8
    one = worlds * cfg.n_heads * pos * pos * size
    need, free = one * (len(lazy) if kept else 2), free_bytes(device)
    print(f"{len(lazy)} attention maps of {pos} x {pos}: {need / 2**20:,.1f} MiB", file=sys.stderr)
    if need > free // 4:
        raise TooBig(
            f"{len(lazy)} attention maps need {need:,} bytes, more than a quarter of the {free:,} bytes free; "
            "name fewer layers, or fewer frames"
        )
