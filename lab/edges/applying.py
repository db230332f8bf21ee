"""Apply: a policy on a plain transformers model. Its own `generate()` obeys it, without the lab's loop; undone after.

    with lab.apply(hf, policy) as pruned:            # or: pruned = lab.apply(hf, policy); ...; pruned.undo()
        pruned.generate(**processor(...))

1 before every forward of a new prompt, its token map is made from the inputs and the policy is bound to it   2 the
decoder's attention asks that binding which edges are kept, for the prompt and for every token generated after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lab.edges.policy import Policy
from lab.edges.reference import edges_of
from lab.edges.segments import ALL, PLACES, names
from lab.edges.templates import places
from lab.errors import ConfigError, PromptError, RunError, UsageError
from lab.model import anatomy
from lab.model.families.base import find
from lab.model.run import Edges
from lab.model.token_maps import token_maps

NAME = "lab_applied"
NEG = float("-inf")
PORTABLE = ("frame", "video", "separator", "text", "last", "generated", *ALL, *PLACES)
# attention module -> the policy on its model; modules of models no policy is applied to are not there
_OPEN: dict[int, Applied] = {}


def apply(hf: nn.Module, policy: Policy, *, roles: Any = None, tokenizer: Any = None) -> Applied:
    """Have a transformers VideoLLM obey a policy in everything it runs, until `undo()` or the end of a `with`.

    roles      for policies that name more than any prompt has (question, option, template ...): a callable (ids of one
               prompt without padding -> a role or None for each, or a mapping role -> places), or a template with slots
               (`lab.edges.templates`), which needs `tokenizer`
    Returns what stands for the model: `generate`, calls and all its attributes; in a `with`, the model itself.
    Attention of the decoder runs under SDPA meanwhile. Raises UsageError for roles that are missing or a policy that is
    none, ConfigError where the policy was made for another model or prompt; both at the prompt where it shows.
    """
    if not isinstance(policy, Policy):
        raise UsageError(
            f"apply takes a lab.edges.Policy, got {type(policy).__name__}; use Policy.load(path)"
        )
    if isinstance(roles, str) and tokenizer is None:
        raise UsageError("a template of roles is matched against text: give tokenizer= too")
    if getattr(hf, "hf", None) is not None:
        raise UsageError("this is a model of the lab: use `with model.pruned(policy)`, or apply to its .hf")
    return Applied(hf, policy, roles, tokenizer)


class Applied:
    """A policy at work on a transformers model. Everything else is the model's own."""

    def __init__(self, hf: nn.Module, policy: Policy, roles: Any, tokenizer: Any) -> None:
        self.model, self.policy, self.roles, self.tokenizer = hf, policy, roles, tokenizer
        self.family, lm = find(hf.config), anatomy.language_model(hf)
        self.parts = anatomy.layer_parts(lm)
        self.edges: dict[int, Edges] = {}
        self.length = 0  # tokens in the model's cache after the forward that runs now
        self.reached: set[int] = set()
        self._signature = inspect.signature(hf.forward)
        self._layer = {id(p.attn): p.index for p in self.parts if p.attn is not None}
        taken = [a for a in self._layer if a in _OPEN]
        if taken:
            raise UsageError("a policy is applied to this model already; undo it first")
        self._before = _use(hf, None)
        _use(hf, _registered())
        self._handles = [
            hf.register_forward_pre_hook(self._arrive, with_kwargs=True),
            hf.register_forward_hook(self._leave),
        ]
        # newer versions encode the video before the forward, which then has no pixels: what generate is given is kept
        self._asked: dict[str, Any] | None = None
        self._generate: Callable[..., Any] = hf.generate  # type: ignore[assignment]
        object.__setattr__(hf, "generate", self.generate)
        _OPEN.update(dict.fromkeys(self._layer, self))

    def generate(self, inputs: Any = None, **kwargs: Any) -> Any:
        """The model's own `generate`, under the policy."""
        given = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
        self._asked = given if inputs is None else {**given, "input_ids": inputs}
        try:
            return self._generate(inputs, **kwargs)
        finally:
            self._asked = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __enter__(self) -> Any:
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.undo()

    def undo(self) -> None:
        """Give the model back as it was. Twice is once."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _use(self.model, self._before)
            self.model.__dict__.pop("generate", None)
        self._handles = []
        for attn in self._layer:
            _OPEN.pop(attn, None)

    # ---- one forward ------------------------------------------------------------------------------------------------

    def _arrive(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        held = 0 if cache is None else int(cache.get_seq_length())
        new = ids if ids is not None else given.get("inputs_embeds")
        if new is None:
            raise UsageError("the model was called without input_ids; a policy needs to know the prompt")
        self.reached.clear()
        self.length = held + new.shape[1]
        if held == 0:
            if ids is None:
                raise UsageError(
                    "a policy is bound to token ids: call the model with input_ids, not inputs_embeds"
                )
            self.edges = self._bound(given)
        elif new.shape[1] > 1:
            raise RunError(
                "the prompt comes in pieces (chunked prefill or assisted generation); a policy needs it whole"
            )

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        missing = sorted(set(self._layer.values()) - self.reached)
        if missing:
            raise RunError(
                f"attention of layers {[i + 1 for i in missing]} never asked the policy: something replaced this model's "
                "attention implementation after it was applied; apply it again"
            )

    def _bound(self, given: dict[str, Any]) -> dict[int, Edges]:
        """The policy's edges on the prompts of this forward."""
        ids: Tensor = given["input_ids"]
        asked = self._asked if self._asked is not None and "input_ids" in self._asked else given
        inputs = {k: v for k, v in asked.items() if v is not None}
        inputs["input_ids"] = inputs["input_ids"].long()
        copies, rest = divmod(
            len(ids), len(inputs["input_ids"])
        )  # beams and several answers repeat every prompt
        if rest or not torch.equal(inputs["input_ids"].repeat_interleave(copies, 0).to(ids), ids):
            raise RunError(
                "generate runs other prompts than it was given; call the model itself under the policy"
            )
        config, roles = self.model.config, self.roles
        if roles is not None:
            roles = self._told(inputs, config)
        maps = token_maps(self.family, config, inputs, tokenizer=self.tokenizer, roles=roles)
        self._check_roles(maps)
        c = anatomy.text_config(anatomy.language_model(self.model))
        try:
            bounds = [self.policy.bind(m, len(self.parts), c.num_attention_heads) for m in maps]
            return edges_of([b for b in bounds for _ in range(copies)])
        except ConfigError as e:
            raise ConfigError(
                f"{e}; prompts rendered elsewhere may need roles=, or search(roles='portable')"
            ) from None

    def _told(self, inputs: dict[str, Any], config: Any) -> Any:
        """What the caller says about every prompt, as `token_maps` takes it."""
        ids, mask = inputs["input_ids"].cpu(), inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
        rows = [row[keep] for row, keep in zip(ids, real, strict=True)]
        if isinstance(self.roles, str):
            video = self.family.placeholder(config)
            return [places(self.roles, self.tokenizer, r.tolist(), (r == video).tolist()) for r in rows]
        if not callable(self.roles):
            return self.roles
        said = [self.roles(r.tolist()) for r in rows]
        return said if all(isinstance(s, Mapping) for s in said) else self.roles

    def _check_roles(self, maps: Any) -> None:
        """Raises UsageError for segments the policy names that only a caller could have told us of, and did not."""
        named = {n.partition(":")[0] for c in self.policy.cuts for side in (c.q, c.k) for n in names(side)}
        if self.roles is None and (unknown := sorted(named - set(PORTABLE))):
            raise UsageError(
                f"the policy names {', '.join(unknown)}, which a prompt rendered elsewhere does not tell: give roles= "
                "(a callable, or a template with {question} and {options}), or use a policy of search(roles='portable')"
            )
        for m in maps:
            if self.roles is not None and not set(m.roles()) - {"pad", "frame", "separator", "text", "last"}:
                raise PromptError("roles= gave no role to any token of a prompt")

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kw: dict[str, Any]
    ) -> Any:
        """SDPA under the policy: z and no weights."""
        layer, kernel = self._layer[id(module)], ALL_ATTENTION_FUNCTIONS["sdpa"]
        self.reached.add(layer)
        edges = self.edges.get(layer)
        if edges is None:
            return kernel(module, q, k, v, mask, **kw)
        n_q, n_k = q.shape[2], k.shape[2]
        if n_k != self.length:
            raise RunError(
                f"layer {layer + 1} holds {n_k} keys of {self.length} tokens: static, sliding and compressed caches lose "
                "the positions a policy needs; generate with the default dynamic cache"
            )
        order = torch.arange(self.length, device=q.device)
        found = edges(order[-n_q:], order)
        found = found.reshape((1,) * (4 - found.ndim) + tuple(found.shape))
        return _masked(kernel, module, (q, k, v), _base(mask, order, n_q), found, kw)


def _base(mask: Any, order: Tensor, n_q: int) -> Tensor:
    """What the model itself lets each query read, bool [world | 1, 1, q, k]; transformers leaves plain causality out."""
    if mask is None:
        return (order[None, :] <= order[-n_q:, None])[None, None]
    mask = mask[..., : len(order)]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _masked(
    kernel: Callable[..., Any], module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], base: Tensor, found: Tensor,
    kw: dict[str, Any],
) -> Any:  # fmt: skip
    """Rows without a key read nothing: they are shown all keys, and zeroed after (kernels differ in such rows)."""
    keep = base & (found if found.dtype == torch.bool else found > NEG)
    dead = ~keep.any(-1, keepdim=True)
    mask: Tensor = keep | dead
    if found.dtype != torch.bool:
        mask = found.to(qkv[0].dtype).masked_fill(~keep, NEG).masked_fill(dead, 0.0)
    z, _ = kernel(module, *qkv, mask, **{**kw, "is_causal": False})
    return z.masked_fill(dead.transpose(1, 2), 0.0), None


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any) -> Any:
    """What transformers calls: the policy's attention where one is applied, plain SDPA elsewhere."""
    applied = _OPEN.get(id(module))
    if applied is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kw)
    return applied.attend(module, query, key, value, mask, kw)


def _registered() -> str:
    """Registers the attention and its mask function: without the second transformers makes no mask at all."""
    if NAME not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return NAME


def _use(hf: Any, kernel: Any) -> str:
    """Set the decoder's attention, the tower keeps its own; returns the one before. None only asks."""
    text = anatomy.text_config(anatomy.language_model(hf))
    before = str(text._attn_implementation)
    if kernel is not None:
        parts = [s for s in hf.config.sub_configs if getattr(hf.config, s, None) is not None]
        keep = {s: getattr(hf.config, s)._attn_implementation for s in parts}
        hf.set_attn_implementation({**keep, "text_config": kernel})
    return before
