"""What a policy was made for and on: model, prompt layout, calibration, evidence; and whether a prompt fits it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from pydantic import ConfigDict, Field
from torch import Tensor

from lab.carriers import TokenMap
from lab.edges.segments import members, names
from lab.errors import ConfigError
from lab.recipe import Part
from lab.spans import ROLES

if TYPE_CHECKING:
    from lab.edges.policy import Policy

# roles whose text belongs to the template; of the others only the place counts
_WRITTEN = ("bos", "system", "connector", "instruction", "template", "last")


class _Named(Part):
    model_config = ConfigDict(populate_by_name=True)


class ModelInfo(Part):
    """The model a policy was made for; what is not said may be any."""

    id: str | None = None
    revision: str | None = None
    layers: int | None = Field(default=None, ge=1, le=10_000, strict=True)
    heads: int | None = Field(default=None, ge=1, le=100_000, strict=True)


class LayoutInfo(_Named):
    """The prompt layout a policy was made for. `template_sha` is `template_sha(tokens)`; None: any."""

    schema_: str | None = Field(default=None, alias="schema")
    template_sha: str | None = None
    orphans: Literal["none", "leak"] | None = None


class CountInfo(Part):
    """Counts on a stated layout: system, frames, tokens per frame, text after the video."""

    rule: str | None = None
    kept_paper: float | None = None
    kept_live: float | None = None
    reference_layout: tuple[int, ...] | None = None


class Calibration(Part):
    """The data a search was run on."""

    data_sha: str | None = None
    n: int | None = Field(default=None, ge=0)
    eps_kl: float | None = None
    flip_max: float | None = None


class Evidence(Part):
    """What the policy does to answers, measured on data it was not made on."""

    holdout: str | None = None
    acc_full: float | None = None
    acc_policy: float | None = None
    drop_ci95: tuple[float, float] | None = None
    flips: float | None = None


class Metadata(_Named):
    """The fields of a policy that change no number."""

    name: str | None = None
    notes: str | None = None
    model: ModelInfo = ModelInfo()
    layout: LayoutInfo = LayoutInfo()
    count_: CountInfo = Field(default=CountInfo(), alias="count")
    calibration: Calibration = Calibration()
    evidence: Evidence = Evidence()


def template_sha(tokens: TokenMap) -> str:
    """Fingerprint of a prompt's template: token ids of template, system and instruction, and where the rest stands.

    Question, options, timestamps and video count by their place alone, so all prompts of one template agree.
    """
    said: list[Any] = []
    for role, id_ in zip(tokens.roles(), tokens.ids.tolist(), strict=True):
        if role in _WRITTEN:
            said.append([role, id_])
            continue
        kind = {"frame": "video", "separator": "video"}.get(role, role)
        if kind not in ("pad", "generated") and (not said or said[-1] != kind):
            said.append(kind)
    if "option" in said:  # the number of options is the question's matter
        said = [s for i, s in enumerate(said) if s != "option" or s not in said[:i]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def check_layout(policy: Policy, tokens: TokenMap) -> None:
    """Raises ConfigError if the policy names a template and this prompt has another."""
    want = policy.layout.template_sha
    if want is not None and want != (have := template_sha(tokens)):
        raise ConfigError(
            f"the policy was made for prompts of template {want}, this prompt has {have}; prepare it with the same "
            "chat template and system prompt, or remove layout.template_sha"
        )


def check_sizes(policy: Policy, n_layers: int, n_heads: int) -> None:
    """Raises ConfigError if the policy was made for another number of layers, or of heads that it cuts."""
    info = policy.model
    if info.layers is not None and info.layers != n_layers:
        raise ConfigError(
            f"the policy was made for {info.layers} layers{_of(info)}, this model has {n_layers}; presets scale to "
            "other depths"
        )
    named = any(c.heads != "all" for c in policy.cuts)
    if named and info.heads is not None and info.heads != n_heads:
        raise ConfigError(f"the policy cuts heads out of {info.heads}{_of(info)}, this model has {n_heads}")


def _of(info: ModelInfo) -> str:
    return f" ({info.id})" if info.id else ""


@dataclass(frozen=True)
class Leak:
    """Positions that belong to no segment, [n]; `after_video` of them can read the video and hand it on uncut."""

    positions: Int[Tensor, " n"]
    roles: tuple[str, ...]
    after_video: int

    def __bool__(self) -> bool:
        return len(self.positions) > 0

    def __str__(self) -> str:
        if not self:
            return "no leak: every position belongs to a segment"
        return (
            f"{len(self.positions)} positions belong to no segment ({', '.join(self.roles)}); {self.after_video} of "
            "them stand after the video: they read it, and hand it on, in every layer"
        )


def leaks_of(policy: Policy, tokens: TokenMap) -> Leak:
    """The orphans of paper segmentation. Timestamps are orphans unless a cut names "separator"."""
    known = (tokens.role == ROLES.index("pad")) | (tokens.role == ROLES.index("generated"))
    if policy.segments == "strict":
        known = torch.ones_like(known)
    for name in ("video", "question", "last"):
        known |= members(tokens, name, segments=policy.segments)
    if any("separator" in names(side) for cut in policy.cuts for side in (cut.q, cut.k)):
        known |= tokens.role == ROLES.index("separator")
    at = (~known).nonzero().squeeze(1)
    video = tokens.where(role="frame")
    after = int((at > video[0]).sum()) if len(video) else 0
    roles = tuple(dict.fromkeys(ROLES[int(r)] for r in tokens.role[at]))
    return Leak(at, roles, after)
