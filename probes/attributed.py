"""One attributed answer: the question and its baseline at the decoder's door, and f, the score that is shared out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lab.adapters.captum import SMALL, Forward, refuse_zero
from lab.adapters.captum_players import Coalitions
from lab.errors import UsageError
from lab.model.ready import Ready
from lab.patch.metrics import answers_of
from probes.baselines import base_door

Method = Literal["ig", "gradient_shap", "occlusion", "ablation", "shapley"]
Output = Literal["logit_diff", "logit", "logprob"]
GRADIENTS = ("ig", "gradient_shap")
LAYERED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "pattern")
PLACES = ("embed", "pixels", "connector", *LAYERED)


@dataclass(frozen=True)
class What:
    """What was asked, checked."""

    method: str
    at: str
    layer: int | None
    players: str
    block: tuple[int, ...]
    target: str | None
    output: str | None
    n_steps: int
    n_samples: int
    max_new_tokens: int
    batch: int
    seed: int

    def check(self, model: Any) -> None:
        for name, value, allowed in (("method", self.method, get_args(Method)), ("at", self.at, PLACES), ("output", self.output, (None, *get_args(Output)))):  # fmt: skip
            if value not in allowed:
                raise UsageError(f"{name}={value!r}; use one of {', '.join(str(a) for a in allowed if a)}")
        if (self.at in LAYERED) != (self.layer is not None):
            raise UsageError(
                f"at={self.at!r}, layer={self.layer}: a layer (0-based) goes with {', '.join(LAYERED)} and with nothing else"
            )
        if self.layer is not None and not 0 <= self.layer < model.cfg.n_layers:
            raise UsageError(
                f"no layer {self.layer + 1} (blocks.{self.layer}): the model has layers 1..{model.cfg.n_layers}"
            )
        if self.method not in GRADIENTS and self.at != "embed":
            raise UsageError(
                f"method={self.method!r} replaces pieces at the decoder's door; leave at='embed', or use 'ig'"
            )
        if min(self.n_steps, self.n_samples, self.batch, self.max_new_tokens) < 1:
            raise UsageError("n_steps, n_samples, batch and max_new_tokens must be at least 1")

    @property
    def point(self) -> str:
        """The hook point of `at`."""
        if self.at in ("embed", "connector"):
            return f"{self.at}.hook_out"
        inner = "attn." if self.at in ("z", "pattern") else ""
        return f"blocks.{self.layer}.{inner}hook_{self.at}"


class Case:
    """One item: the question and its baseline at the door, and f."""

    def __init__(self, model: Any, ready: Ready, other: Any, what: What, policy: Any) -> None:
        self.model, self.ready, self.what, self.policy = model, ready, what, policy
        self.other = other if isinstance(other, Ready) else None
        self.said = said_ids(model, ready, what, policy)
        self.forward = Forward(model, ready, policy=policy, said=self.said)
        self.base = base_door(model, ready, other, self.forward)
        refuse_zero(model, self.base.embeds)
        self.tokens = self.forward.maps[0]
        self.score = None if self.said is not None else self._score()
        self.scored = _Scored(self.forward, self.score)

    def _score(self) -> Any:
        with torch.no_grad():
            own, base = (
                self.forward.at(d, torch.zeros(1, dtype=torch.long))[0]
                for d in (self.forward.door, self.base)
            )
        item = self.ready.item
        tokens, letters = answers_of(self.model, item, None if self.other is None else self.other.item)
        token = tokens[0] if tokens else int(own.argmax())
        if tokens is None and letters is not None and item is not None and isinstance(item.answer, int):
            token = letters[item.answer]
        rival = tokens[1] if tokens else int(base.argmax())
        output = self.what.output or ("logit_diff" if rival != token else "logprob")
        if output == "logit_diff" and rival == token:
            raise UsageError(
                f"the baseline answers as the question does ({text_of(self.model, token)!r}); use output='logprob'"
            )
        return AnswerScore(output, token, rival)

    @property
    def output(self) -> str:
        return "logprob" if self.score is None else self.score.output

    def ends(self) -> tuple[float, float]:
        """f(x), f(baseline)."""
        world = torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            return float(self.scored.at(self.forward.door, world)[0]), float(
                self.scored.at(self.base, world)[0]
            )

    def game(self, members: Tensor) -> Coalitions:
        return Coalitions(self.scored, self.forward.door, self.base, members, batch=self.what.batch)


@dataclass(frozen=True)
class AnswerScore:
    """Logits [..., d_vocab] -> f [...]."""

    output: str
    token: int
    rival: int

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        match self.output:
            case "logit":
                return logits[..., self.token]
            case "logprob":
                return logits.log_softmax(-1)[..., self.token]
            case _:
                return logits[..., self.token] - logits[..., self.rival]


class _Scored:
    """`Forward` with one number a row."""

    def __init__(self, forward: Forward, score: Any) -> None:
        self.forward, self.score = forward, score

    def __call__(self, embeds: Tensor, world: Tensor | None = None) -> Tensor:
        out = self.forward(embeds, world)
        return out if self.score is None else self.score(out)

    def at(self, door: Any, world: Tensor) -> Tensor:
        out = self.forward.at(door, world)
        return out if self.score is None else self.score(out)


def said_ids(model: Any, ready: Ready, what: What, policy: Any) -> Tensor | None:
    """Token ids of the answer whose log probability is attributed; None: the answer is a single choice."""
    item = ready.item
    if (
        what.target is None
        and item is not None
        and not item.options
        and isinstance(item.answer, str)
        and model.tokenizer
    ):
        text = item.answer
    else:
        text = what.target
    if text is None:
        return None
    if text == "generated":
        ids = model.generate(ready, max_new_tokens=what.max_new_tokens, policy=policy).ids[0]
    else:
        ids = model.need_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    if not len(ids):
        raise UsageError(f"the target {text!r} has no tokens")
    return ids


def share_off(total: float, wanted: float) -> float:
    return abs(total - wanted) / max(abs(wanted), SMALL)


def text_of(model: Any, token: int) -> str:
    return model.tokenizer.decode([token]) if model.tokenizer is not None else str(token)
