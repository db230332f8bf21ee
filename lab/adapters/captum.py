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
    edges   cuts that hold during attribution, as in `model(ready, edges=...)`; policy: those of a policy, in place of
            that of an open `model.pruned`
    said    [token]: ids of an answer. With them the output is one number a row, the log probability that the model says
            them after the prompt (teacher-forced): what is attributed for generated answers

    The video's DeepStack additions (Qwen3-VL) stay those of `ready` whatever the embeds are.
    """

    def __init__(
        self, model: VideoLLM, ready: Ready | Mapping[str, Any], edges: Mapping[int, Edges] | None = None, *,
        policy: Any = None, said: Int[Tensor, " token"] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.policy, self.said = model, policy, said
        self.ready = ready if isinstance(ready, Ready) else model.prepare_inputs(**ready)
        self.edges = dict(edges or {})
        self.door, self.maps = arrived(model, self.ready)
        self.world: Int[Tensor, " world"] = torch.arange(len(self.embeds), device=self.embeds.device)

    @property
    def embeds(self) -> Float[Tensor, "world pos d_model"]:
        return self.door.embeds

    def __call__(self, embeds: Tensor, world: Tensor | None = None) -> Float[Tensor, "row d_vocab"]:
        world = self._rows(embeds, world)
        return self.at(self._door(embeds, world), world)

    def at(self, door: Door, world: Tensor) -> Tensor:
        """The output for rows that stand at the door as given (`world`: which world each is)."""
        maps = tuple(self.maps[int(w)] for w in world)
        with self.model.plan_hooks(self.ready.plan), self.model.lock.shared():
            embeds = self.model.embed.get_submodule("hook_out")(door.embeds)
            door = Door(embeds, door.rope, door.pad, door.deep)
            run = Run(self._edges(world, maps))
            more = door if self.said is None else self._followed(door, self.said[:-1])
            resid, side = self.model.stream(more, run, plan=self.ready.plan, tokens=maps)
            if self.said is None:
                return self.model.read(resid, side)[:, -1]
            return self._said(self.model.read(resid, side, range(-len(self.said), 0)))

    def _followed(self, door: Door, ids: Tensor) -> Door:
        """The door with the answer's tokens after the prompt."""
        if not len(ids):
            return door
        embedding: Any = cast(Any, self.model.hf).get_input_embeddings()
        more = door.then(embedding(ids.to(door.embeds.device))[None].expand(len(door.embeds), -1, -1))
        rope = (
            door.rope
            if door.rope.shape[-2] == more.rope.shape[-2]
            else door.rope.expand(*more.rope.shape[:-1], -1)
        )
        deep = tuple(torch.cat([x, torch.zeros_like(more.embeds)], 1) for x in door.deep)
        return Door(
            torch.cat([door.embeds, more.embeds], 1), torch.cat([rope, more.rope], -1), more.pad, deep
        )

    def _said(self, logits: Tensor) -> Float[Tensor, " row"]:
        assert self.said is not None
        ids = self.said.to(logits.device).expand(len(logits), -1)[..., None]
        return logits.float().log_softmax(-1).gather(-1, ids).sum((1, 2))

    def _edges(self, world: Tensor, maps: tuple[Any, ...]) -> dict[int, Edges]:
        """The cuts, with those of a policy that is open (`model.pruned`)."""
        policy = self.model.pruning.chosen(self.policy)
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
    """The state at the door, before `embed.hook_out`, and the token maps."""
    with model.plan_hooks(ready.plan), model.lock.shared():
        return lay_out(model, ready, model.see(ready), ready.plan)


COMPLETE = 0.01  # completeness error that is accepted, as a share of f(x) - f(baseline)
SMALL = 1e-3  # below so much of a difference, rounding decides about shares
MOST_STEPS = 512
PASSED_BY = (
    "hook_z",
    "hook_pattern",
    "hook_attn_scores",
    "hook_v",
    "hook_q",
    "hook_k",
    "hook_attn_out",
    "hook_mlp_out",
)


@dataclass(frozen=True)
class Attribution:
    """Integrated gradients at one hook point.

    values  attributions, the shape of the point's value
    total   f(x) - f(baseline) per world: what the attributions should sum to
    error   |sum of values - total| / |total| per world (completeness; 0.01 is 1 %)
    complete  whether completeness is to be expected: False at points that the skip path goes round (z, pattern, ...)
    n_steps   steps of the integral
    """

    values: Tensor
    total: Float[Tensor, " world"]
    error: Float[Tensor, " world"]
    complete: bool = True
    n_steps: int = 0

    @property
    def fails(self) -> bool:
        """Whether completeness is to be expected and missed by more than 1 %."""
        return self.complete and bool((self.error > COMPLETE).any())


def layer_integrated_gradients(
    model: VideoLLM, ready: Ready | Mapping[str, Any], point: str, *, baseline: Baseline, target: int | Tensor | None,
    n_steps: int = 32, internal_batch_size: int | None = None, edges: Mapping[int, Edges] | None = None,
    policy: Any = None, said: Int[Tensor, " token"] | None = None, forward: Callable[..., Tensor] | None = None,
) -> Attribution:  # fmt: skip
    """captum's LayerIntegratedGradients at a hook point of the residual stream, for the logit of `target` (a token id).

    baseline  another question with the same layout (a twin: Ready or processor tensors), "mean" (every position holds
              the mean over this world's positions), or a tensor [world, pos, d_model] at the decoder's door.
    internal_batch_size  rows run at once; None runs all n_steps * worlds rows in one batch
    policy, said         see `Forward`; with `said` (a generated answer) target is None
    forward              a scalar function of the rows in place of `Forward`'s logits (then target is None)

    Complete (see `Attribution.error`) only where everything passes: `embed.hook_out` and `blocks.{l}.hook_resid_*`.
    Raises UsageError for a zero baseline on a model with RMSNorm (the model is all but constant along a * resid, so
    gradients there say nothing), for a twin of another shape, and for an unknown hook point.
    """
    from captum.attr import LayerIntegratedGradients

    check_name(model, point)
    made = Forward(model, ready, edges, policy=policy, said=said)
    base = baseline_of(model, made, baseline)
    run: Callable[..., Tensor] = made if forward is None else forward
    with model.alone():
        method = LayerIntegratedGradients(run, model.hook_dict[point])
        values = method.attribute(
            made.embeds, base, target=target, additional_forward_args=(made.world,), n_steps=n_steps,
            internal_batch_size=internal_batch_size,
        )  # fmt: skip
        total = at_target(run, made.embeds, target) - at_target(run, base, target)
    values = cast(Tensor, values[0] if isinstance(values, tuple) else values).detach()
    missing = values.flatten(1).sum(1).to(total) - total
    error = missing.abs() / total.abs().clamp_min(SMALL)
    return Attribution(values, total, error, not point.endswith(PASSED_BY), n_steps)


def complete_gradients(
    model: VideoLLM, ready: Any, point: str, *, n_steps: int = 32, **how: Any
) -> Attribution:
    """`layer_integrated_gradients` with as many steps as completeness needs: doubled until the sum is within 1 %.

    Raises RunError if 512 steps are not enough, with both numbers.
    """
    found = layer_integrated_gradients(model, ready, point, n_steps=n_steps, **how)
    while found.fails and n_steps * 2 <= MOST_STEPS:
        n_steps *= 2
        found = layer_integrated_gradients(model, ready, point, n_steps=n_steps, **how)
    if found.fails:
        worst = int(found.error.argmax())
        raise RunError(
            f"integrated gradients at {point} miss f(x) - f(baseline) = {float(found.total[worst]):.4g} by "
            f"{100 * float(found.error[worst]):.1f} % after {n_steps} steps (1 % is accepted); choose a baseline nearer to "
            "the question, or use method='shapley'"
        )
    return found


@torch.no_grad()
def at_target(forward: Callable[[Tensor], Tensor], embeds: Tensor, target: int | Tensor | None) -> Tensor:
    """The output that is attributed: the target's logit of every row, or the row's one number."""
    out = forward(embeds).float()
    if target is None:
        return out
    index = torch.as_tensor(target, device=out.device).expand(len(out))
    return out.gather(1, index[:, None])[:, 0]


def baseline_of(model: VideoLLM, forward: Forward, baseline: Baseline) -> Tensor:
    """The baseline at the door, [world, pos, d_model]. Raises UsageError for one that does not fit, or is all zero."""
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
    refuse_zero(model, base)
    return base


def refuse_zero(model: VideoLLM, base: Tensor) -> None:
    """Raises UsageError for rows of zeros in front of RMSNorm: a zero row has no direction that scaling could reach."""
    if isinstance(model.ln_final.norm[0], nn.LayerNorm):
        return
    if not bool(base.any()):
        raise UsageError(
            "a zero baseline breaks integrated gradients under RMSNorm: the model is all but constant along "
            "a * resid except at a ~ 0; use a twin question, a blank video, or 'mean'"
        )


def _mean(door: Door) -> Tensor:
    """Every position holds the mean over the unpadded positions of its world."""
    real = torch.ones_like(door.embeds[..., :1]) if door.pad is None else door.pad[..., None].to(door.embeds)
    mean = (door.embeds * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
    return mean.expand_as(door.embeds).contiguous()
