"""captum on a wrapped model. captum's Layer* methods take any HookPoint as their layer; what they need besides is a
forward function that stays right when captum repeats its inputs along the batch axis: `Forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lab.errors import RunError, UsageError
from lab.model.door import Door
from lab.model.hooking import check_name
from lab.model.layout import lay_out
from lab.model.pruning import pruned_edges
from lab.model.ready import Ready
from lab.model.run import Edges, Run
from lab.model.videollm import VideoLLM

Baseline = Ready | Mapping[str, Any] | Tensor | str


class Forward:
    """The decoder from its door, as captum wants it: (embeds, world) -> logits [row, d_vocab] at the last position.

    embeds  what stands at the door, [world, pos, d_model]: the inputs to attribute
    world   [world]: which world each row of the batch is. Hand it over as `additional_forward_args`; captum repeats and
            slices it along with the embeds, so that rope, padding and DeepStack additions follow every row.
    edges   cuts that hold during attribution, as in `model(ready, edges=...)`

    The video's DeepStack additions (Qwen3-VL) stay those of `ready` whatever the embeds are.
    """

    def __init__(
        self, model: VideoLLM, ready: Ready | Mapping[str, Any], edges: Mapping[int, Edges] | None = None
    ) -> None:
        self.model = model
        self.ready = ready if isinstance(ready, Ready) else model.prepare_inputs(**ready)
        self.edges = dict(edges or {})
        self.door, self.maps = arrived(model, self.ready)
        self.world: Int[Tensor, " world"] = torch.arange(len(self.embeds), device=self.embeds.device)

    @property
    def embeds(self) -> Float[Tensor, "world pos d_model"]:
        return self.door.embeds

    def __call__(self, embeds: Tensor, world: Tensor | None = None) -> Float[Tensor, "row d_vocab"]:
        world = self._rows(embeds, world)
        door = self._door(embeds, world)
        maps = tuple(self.maps[int(w)] for w in world)
        with self.model.lock.shared():
            embeds = self.model.embed.get_submodule("hook_out")(door.embeds)
            door = Door(embeds, door.rope, door.pad, door.deep)
            run = Run(self._edges(world, maps))
            resid, side = self.model.stream(door, run, plan=self.ready.plan, tokens=maps)
            return self.model.read(resid, side)[:, -1]

    def _edges(self, world: Tensor, maps: tuple[Any, ...]) -> dict[int, Edges]:
        """The cuts, with those of a policy that is open (`model.pruned`)."""
        policy = self.model.pruning.chosen(None)
        if policy is None:
            return self.edges
        maps = maps[:1] if len(world.unique()) == 1 else maps
        return pruned_edges(policy, maps, self.model.reach, self.ready.item, self.edges)

    def _rows(self, embeds: Tensor, world: Tensor | None) -> Tensor:
        if world is not None:
            return world.to(self.world.device)
        if len(self.world) > 1 and len(embeds) != len(self.world):
            raise UsageError(
                f"{len(embeds)} rows for {len(self.world)} worlds: give captum additional_forward_args=(forward.world,)"
            )
        return self.world if len(embeds) == len(self.world) else self.world.expand(len(embeds))

    def _door(self, embeds: Tensor, world: Tensor) -> Door:
        d = self.door
        rope = d.rope if d.rope.shape[-2] == 1 else d.rope.index_select(-2, world.to(d.rope.device))
        pad = None if d.pad is None else d.pad[world.to(d.pad.device)]
        return Door(embeds, rope, pad, tuple(x[world.to(x.device)] for x in d.deep))


@torch.no_grad()
def arrived(model: VideoLLM, ready: Ready) -> tuple[Door, tuple[Any, ...]]:
    """The state at the door, before `embed.hook_out`, and the token maps. Raises RunError for plans with hooks."""
    if ready.plan.hooks:
        raise RunError(
            "captum runs the decoder many times: open the mechanism's hooks yourself with model.hooks(...)"
        )
    with model.lock.shared():
        return lay_out(model, ready, model.see(ready), ready.plan)


@dataclass(frozen=True)
class Attribution:
    """Integrated gradients at one hook point.

    values  attributions, the shape of the point's value
    total   f(x) - f(baseline) per world: what the attributions should sum to
    error   |sum of values - total| / |total| per world (completeness; 0.01 is 1 %)
    """

    values: Tensor
    total: Float[Tensor, " world"]
    error: Float[Tensor, " world"]


def layer_integrated_gradients(
    model: VideoLLM, ready: Ready | Mapping[str, Any], point: str, *, baseline: Baseline, target: int | Tensor,
    n_steps: int = 32, internal_batch_size: int | None = None, edges: Mapping[int, Edges] | None = None,
) -> Attribution:  # fmt: skip
    """captum's LayerIntegratedGradients at a hook point of the residual stream, for the logit of `target` (a token id).

    baseline  another question with the same layout (a twin: Ready or processor tensors), "mean" (every position holds
              the mean over this world's positions), or a tensor [world, pos, d_model] at the decoder's door.
    internal_batch_size  rows run at once; None runs all n_steps * worlds rows in one batch

    Complete (see `Attribution.error`) only where everything passes: `embed.hook_out` and `blocks.{l}.hook_resid_*`.
    Raises UsageError for a zero baseline on a model with RMSNorm (the model is all but constant along a * resid, so
    gradients there say nothing), for a twin of another shape, and for an unknown hook point.
    """
    from captum.attr import LayerIntegratedGradients

    check_name(model, point)
    forward = Forward(model, ready, edges)
    base = _baseline(model, forward, baseline)
    with model.alone():
        method = LayerIntegratedGradients(forward, model.hook_dict[point])
        values = method.attribute(
            forward.embeds, base, target=target, additional_forward_args=(forward.world,), n_steps=n_steps,
            internal_batch_size=internal_batch_size,
        )  # fmt: skip
        total = _at(forward, forward.embeds, target) - _at(forward, base, target)
    values = cast(Tensor, values[0] if isinstance(values, tuple) else values).detach()
    missing = values.flatten(1).sum(1).to(total) - total
    return Attribution(values, total, missing.abs() / total.abs().clamp_min(torch.finfo(total.dtype).tiny))


@torch.no_grad()
def _at(forward: Callable[[Tensor], Tensor], embeds: Tensor, target: int | Tensor) -> Tensor:
    logits = forward(embeds).float()
    index = torch.as_tensor(target, device=logits.device).expand(len(logits))
    return logits.gather(1, index[:, None])[:, 0]


def _baseline(model: VideoLLM, forward: Forward, baseline: Baseline) -> Tensor:
    match baseline:
        case "mean":
            base = _mean(forward.door)
        case Tensor():
            base = baseline.to(forward.embeds).expand_as(forward.embeds)
        case str():
            raise UsageError(f"baseline={baseline!r}; use a twin question, 'mean', or a tensor")
        case _:
            base = arrived(
                model, baseline if isinstance(baseline, Ready) else model.prepare_inputs(**baseline)
            )[0].embeds
    if base.shape != forward.embeds.shape:
        raise UsageError(
            f"the baseline is {tuple(base.shape)} at the door, the question {tuple(forward.embeds.shape)}"
        )
    if not bool(base.any()) and not isinstance(model.ln_final.norm[0], nn.LayerNorm):
        raise UsageError(
            "a zero baseline breaks integrated gradients under RMSNorm: the model is all but constant along "
            "a * resid except at a ~ 0; use a twin question, a blank video, or 'mean'"
        )
    return base


def _mean(door: Door) -> Tensor:
    """Every position holds the mean over the unpadded positions of its world."""
    real = torch.ones_like(door.embeds[..., :1]) if door.pad is None else door.pad[..., None].to(door.embeds)
    mean = (door.embeds * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
    return mean.expand_as(door.embeds).contiguous()
