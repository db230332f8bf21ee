"""captum on pixels, and captum's LLMAttribution on VideoLLMs, without the two traps that captum 0.9 has there.

batch expansion   integrated gradients repeat the pixels and not the token ids (ValueError), and read a family's flat
                  patches as a batch; `Pixels` takes any number of rows and runs them one by one
silent zeros      LLMAttribution asks transformers 5 for inputs in a way that drops the pixels, so that every attribution
                  is 0 without a word; `llm_attribution` runs the wrapped model instead
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lab.errors import UsageError
from lab.model.answering import target_logits
from lab.model.ready import Ready
from lab.model.videollm import VideoLLM

PIXELS = ("pixel_values_videos", "pixel_values")


class Pixels:
    """(pixels [row, ...]) -> output [row]. Each row is a whole video as the model is given it, the tower included.

    score   logits [..., d_vocab] -> [...]: what is attributed; said: an answer's token ids, then their log probability
    value   the question's pixels with a row axis in front, [1, ...]: captum's input
    """

    def __init__(
        self, model: VideoLLM, ready: Ready, score: Callable[[Tensor], Tensor], *, policy: Any = None, said: Tensor | None = None,
    ) -> None:  # fmt: skip
        name = next((n for n in PIXELS if isinstance(ready.inputs.get(n), Tensor)), None)
        if name is None or ready.n_worlds != 1:
            raise UsageError(
                f"attribution to pixels needs one question with a video, got inputs {', '.join(ready.inputs)}"
            )
        self.model, self.ready, self.score, self.policy, self.said = model, ready, score, policy, said
        self.name, self.rows = name, 0
        self.has_world = (
            ready.inputs[name].ndim == 5
        )  # [world, frame, 3, y, x]; else frames or patches come first
        self.value: Tensor = self.of(ready)

    def of(self, ready: Ready) -> Tensor:
        """The pixels of a prepared question as captum gets them."""
        pixels = ready.inputs[self.name].float().to(self.model.device)
        return pixels if self.has_world else pixels[None]

    def __call__(self, pixels: Float[Tensor, "row ..."]) -> Float[Tensor, " row"]:
        return torch.cat([self._one(row[None] if self.has_world else row) for row in pixels])

    def _one(self, pixels: Tensor) -> Tensor:
        self.rows += 1
        given = self.ready.inputs[self.name]
        ready = replace(self.ready, inputs={**self.ready.inputs, self.name: pixels.to(given.dtype)}, memo={})
        if self.said is None:
            return self.score(self.model(ready, policy=self.policy)[:, -1])
        logits = target_logits(self.model, ready, self.said[None].to(self.model.device), policy=self.policy)
        return (
            logits.float().log_softmax(-1).gather(-1, self.said.to(logits.device)[None, :, None]).sum((1, 2))
        )


def llm_attribution(model: VideoLLM, method: Any, tokenizer: Any = None) -> Any:
    """captum's LLMAttribution around a perturbation method, right for VideoLLMs: the pixels are in every run.

    method  an instance such as FeatureAblation(model.hf); its inputs are `video_frames(...)` or captum's own
    """
    from captum.attr import LLMAttribution

    class VideoLLMAttribution(LLMAttribution):
        SUPPORTED_INPUTS = (*LLMAttribution.SUPPORTED_INPUTS, _frames_class())

        def _forward_func(
            self, perturbed_tensor: Any, inp: Any, target_tokens: Tensor, *rest: Any, **kw: Any
        ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            ready = model.prepare_inputs(**inp.to_model_input(perturbed_tensor))
            with torch.no_grad():
                logits = target_logits(model, ready, target_tokens[None].to(model.device))
            each = (
                logits[0].float().log_softmax(-1).gather(-1, target_tokens.to(logits.device)[:, None])[:, 0]
            )
            out = torch.cat([each.sum()[None], each])[None] if self.include_per_token_attr else each.sum()
            return out if self.attr_target == "log_prob" else out.exp()

    return VideoLLMAttribution(method, tokenizer or model.need_tokenizer())


def video_frames(ready: Ready, base: Ready) -> Any:
    """A captum InterpretableInput whose features are the frames of a prepared video; a frame left out is `base`'s."""
    return _frames_class()(ready, base)


@functools.cache
def _frames_class() -> Any:
    """Made at first use: captum is imported only then."""
    from captum.attr import InterpretableInput

    class VideoFrames(InterpretableInput):
        def __init__(self, ready: Ready, base: Ready) -> None:
            self.name = next(n for n in PIXELS if n in ready.inputs)
            self.inputs, self.base = dict(ready.inputs), base.inputs[self.name]
            self.n_itp_features = ready.maps[0].n_frames
            self.values = [f"frame {i}" for i in range(self.n_itp_features)]

        def to_tensor(self) -> Tensor:
            return torch.ones(1, self.n_itp_features)

        def to_model_input(self, perturbed_tensor: Tensor | None = None) -> dict[str, Any]:
            if perturbed_tensor is None:
                return dict(self.inputs)
            return {**self.inputs, self.name: self._mixed(perturbed_tensor[0])}

        def _mixed(self, keep: Tensor) -> Tensor:
            own = self.inputs[self.name]
            frames = self.n_itp_features
            shaped = (
                own[0] if own.ndim == 5 else own.reshape(frames, -1, *own.shape[1:]) if own.ndim == 2 else own
            )
            other = self.base.reshape(shaped.shape)
            share = keep.to(shaped).reshape(-1, *[1] * (shaped.ndim - 1))
            return (shaped * share + other * (1 - share)).reshape(own.shape)

        def format_attr(self, itp_attr: Tensor) -> Tensor:
            return itp_attr

    return VideoFrames
