"""Modules that hold HookPoints and nothing else: they own no weights, so a wrapped model's state_dict stays the checkpoint's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from lab.errors import RunError
from lab.model.run import LayerParts, watched


class Points(nn.Module):
    """A group of HookPoints under one name."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, HookPoint())


class AttnPoints(Points):
    """Points of one softmax attention. `W_O` [head, d_head, d_model] is a view of the checkpoint's weight."""

    def __init__(self, parts: LayerParts) -> None:
        pre = [n for n, m in (("hook_q", parts.q), ("hook_k", parts.k)) if m is not None]
        super().__init__(
            *pre, "hook_rot_q", "hook_rot_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z"
        )
        self.parts = parts

    @property
    def W_O(self) -> Tensor:  # noqa: N802 (TransformerLens's name)
        if self.parts.o is None:
            raise RunError(
                f"layer {self.parts.index + 1} has no output projection we know; use hook_attn_out"
            )
        weight: Any = self.parts.o.weight
        return weight.T.reshape(self.parts.n_heads, self.parts.d_head, -1)


class Block(Points):
    """Points of one decoder layer, under TransformerLens's names."""

    def __init__(self, parts: LayerParts) -> None:
        out = ["hook_attn_out"] if parts.attn is not None else []
        super().__init__("hook_resid_pre", *out, "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
        self.parts = parts
        if parts.attn is not None:
            self.attn = AttnPoints(parts)
        else:
            self.mixer = Points("hook_out")


class FinalNorm(Points):
    """`ln_final`: calling it applies the checkpoint's own final norm (TransformerLens's ActivationCache does)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__("hook_scale", "hook_normalized")
        self.norm = (norm,)  # a tuple, so that the checkpoint's module is not registered twice

    def forward(self, resid: Tensor) -> Tensor:
        return self.norm[0](resid)

    def normalise(self, resid: Tensor) -> Tensor:
        """The final norm, with hook_scale for whoever looks: dividing by an edited scale is what the edit does."""
        normed, hook = self(resid), cast(Any, self).hook_scale
        if not watched(hook):
            return normed
        scale = self.scale(resid)
        factor = scale / hook(scale.clone())
        bias = getattr(self.norm[0], "bias", None)
        shift = 0.0 if bias is None else bias
        return normed if bool((factor == 1).all()) else ((normed - shift) * factor + shift).to(normed.dtype)

    def scale(self, resid: Tensor) -> Tensor:
        """The RMS (or standard deviation) the norm divides by, [world, pos, 1]."""
        norm = self.norm[0]
        eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)) or 0.0)
        x = resid.float()
        if isinstance(norm, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    @property
    def weight(self) -> Tensor:
        """Gain of the norm, [d_model]."""
        norm: Any = self.norm[0]
        # Gemma- and Qwen3.5-style norms multiply by (1 + weight): ask the module instead of its parameter
        probe = torch.ones(1, 1, norm.weight.shape[0], device=norm.weight.device, dtype=torch.float32)
        with torch.no_grad():
            unit = norm(probe.to(norm.weight.dtype)).float()
        return (unit * self.scale(probe)).reshape(-1)
