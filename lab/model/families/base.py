"""Family: all that differs between VideoLLM families, and nothing else. The base class serves families nobody wrote a file for.

A family says where its video tokens are (grids), how it wants its pixels, how it writes a video and a chat turn, and
where its vision tower and connector hang. The loop, the attention function and the prompt code know no family.
`find(config)` looks through this package: a new family is a new file, nothing is registered.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lab.carriers import Frames, VideoGrid
from lab.errors import ModelError, UsageError
from lab.model.families.chat import ChatMarks, spans_from_template
from lab.model.families.geometry import frame_spans, join, merged_grids, run_grid, run_lengths, share_out
from lab.pixels import Preprocessor
from lab.spans import Span

_PLACEHOLDERS = ("video_token_id", "video_token_index", "image_token_id", "image_token_index")
_TOWERS = ("vision_tower", "visual", "vision_model")
_CONNECTORS = (
    "multi_modal_projector",
    "projector",
    "connector",
    "merger",
    "visual.merger",
    "vision_model.merger",
)


class Family:
    """One family of VideoLLMs. Stateless; a subclass overrides what differs.

    model_types       values of `config.model_type` that this family serves
    chat              the published chat template as pieces; used where the tokenizer brings no template of its own
    marks             texts of the special tokens round the video, to be called separators in prompts we did not render
    frames_are_images every entry of the vision input is one frame (not one video)
    needs             inputs without which transformers gives wrong logits or an obscure error
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    chat: ClassVar[ChatMarks] = ChatMarks()
    marks: ClassVar[tuple[str, ...]] = ()
    frames_are_images: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    # ---- where things hang ------------------------------------------------------------------------------------

    def placeholder(self, config: Any) -> int:
        """Token id that stands for one video token. Raises ModelError if the config names none."""
        for name in _PLACEHOLDERS:
            found = getattr(config, name, None)
            if found is not None:
                return int(found)
        raise ModelError(
            f"config of {config.model_type!r} names no video token; looked for {', '.join(_PLACEHOLDERS)}"
        )

    def tower_layers(self, hf: nn.Module) -> Sequence[nn.Module]:
        """The vision tower's layers in order: its longest module list; empty without a tower."""
        tower = _first(getattr(hf, "model", hf), _TOWERS)
        lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList)] if tower is not None else []
        return list(max(lists, key=len)) if lists else []

    def connector(self, hf: nn.Module) -> nn.Module | None:
        """The module whose output enters the language model's width; None if no known name is found."""
        return _first(getattr(hf, "model", hf), _CONNECTORS)

    # ---- where the video tokens are ---------------------------------------------------------------------------

    def grids(self, config: Any, inputs: dict[str, Tensor]) -> list[VideoGrid]:
        """Where the video tokens of every world lie, from a processor's own tensors. Touches no weights.

        Several videos in one world are joined, frames counted on. Raises PromptError with both numbers if the prompt
        has other than the model's number of placeholders.
        """
        return [join(videos) for videos in self.videos_by_world(config, inputs)]

    def videos_by_world(self, config: Any, inputs: dict[str, Tensor]) -> list[list[VideoGrid]]:
        """The grids of every world's videos, in order. A video given as separate images counts as one video."""
        wanted = [int(n) for n in (inputs["input_ids"] == self.placeholder(config)).sum(1)]
        shared = share_out(self.video_grids(config, inputs), wanted)
        guessed = type(self).video_grids is Family.video_grids and _grid_thw(inputs) is None
        if not (self.frames_are_images or guessed):
            return shared
        return [[join(frames)] if frames else [] for frames in shared]

    def video_grids(self, config: Any, inputs: dict[str, Tensor]) -> list[VideoGrid]:
        """One grid per entry of the vision input, over all worlds.

        Unknown families: `video_grid_thw` (or `image_grid_thw`) is believed where it is there. Otherwise every
        unbroken run of placeholders is called one frame: right where frames are images with text between them,
        one frame 0 for a video written in one run, whose inner order we cannot know. A run whose length is a square
        is read row by row; else row and col are -1. Seconds are unknown and every token weighs 1.
        """
        grid_thw = _grid_thw(inputs)
        if grid_thw is not None:
            return merged_grids(config, grid_thw, int(getattr(config.vision_config, "spatial_merge_size", 1)))
        lengths = [n for row in inputs["input_ids"] == self.placeholder(config) for n in run_lengths(row)]
        return [run_grid(n) for n in lengths]

    # ---- pixels -----------------------------------------------------------------------------------------------

    def pixels(
        self, frames: Frames, config: Any, preprocessor: Preprocessor | None
    ) -> tuple[dict[str, Tensor], VideoGrid]:
        """The vision tower's inputs for one video, and where its tokens will be; on `frames.pixels.device`.

        Every returned tensor is joined over worlds along axis 0. Without a preprocessor the sizes come from config.
        """
        raise UsageError(
            f"pixels of model type {config.model_type!r} are not known to the lab; run the checkpoint's own processor "
            "and pass its tensors to prepare_inputs"
        )

    # ---- prompt -----------------------------------------------------------------------------------------------

    def video_spans(self, frames: Frames, grid: VideoGrid) -> list[Span]:
        """How the family writes a video: one video span per frame, in the grid's order, with the marks round them."""
        return frame_spans(grid)

    def turn(
        self, video: Sequence[Span], user: Sequence[Span], answer: Sequence[Span], system: str | None = None
    ) -> list[Span]:
        """The family's published chat turn. `system` None: the template's own system prompt; "": no system prompt."""
        return self.chat.turn(video, user, answer, system)

    def turn_from_template(
        self,
        tokenizer: Any,
        video: Sequence[Span],
        user: Sequence[Span],
        answer: Sequence[Span],
        system: str | None = None,
    ) -> list[Span]:
        """The turn as the tokenizer's own chat template writes it. Raises PromptError if the template cannot be used."""
        return spans_from_template(self.chat, tokenizer, video, user, answer, system)

    def turn_for(
        self,
        tokenizer: Any,
        video: Sequence[Span],
        user: Sequence[Span],
        answer: Sequence[Span],
        system: str | None = None,
    ) -> list[Span]:
        """The tokenizer's own chat template if it brings one, else the family's."""
        if getattr(tokenizer, "chat_template", None):
            return self.turn_from_template(tokenizer, video, user, answer, system)
        return self.turn(video, user, answer, system)

    # ---- further inputs ---------------------------------------------------------------------------------------

    def extra_inputs(self, input_ids: Tensor, config: Any) -> dict[str, Tensor]:
        """Inputs beside ids, mask and pixels: `mm_token_type_ids` [world, pos] (0 text, 1 image, 2 video) for M-RoPE."""
        if not uses_mrope(config):
            return {}
        video, image = getattr(config, "video_token_id", None), getattr(config, "image_token_id", None)
        kinds = torch.zeros_like(input_ids, dtype=torch.int32)
        kinds[input_ids == (-1 if image is None else image)] = 1
        kinds[input_ids == (-1 if video is None else video)] = 2
        return {"mm_token_type_ids": kinds}

    def missing_inputs(self, inputs: dict[str, Tensor], config: Any = None) -> list[str]:
        """Names that must be there but are not. Without `mm_token_type_ids` some versions of transformers compute
        other rope positions without a word."""
        if not any(name.startswith("pixel_values") for name in inputs):
            return []
        needs = list(self.needs)
        if config is not None and _grid_thw(inputs) is not None and uses_mrope(config):
            needs.append("mm_token_type_ids")
        return [name for name in dict.fromkeys(needs) if inputs.get(name) is None]


# ---- finding a family -----------------------------------------------------------------------------------------------


def find(config: Any) -> Family:
    """The family that serves `config.model_type`; the base `Family` where no file does."""
    return _families().get(config.model_type, Family)()


@functools.cache
def _families() -> dict[str, type[Family]]:
    package = importlib.import_module("lab.model.families")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return {kind: family for family in _subclasses(Family) for kind in family.model_types}


def _subclasses(kind: type[Family]) -> list[type[Family]]:
    """Children after their parents, so that a child may take over a model type."""
    return [f for child in kind.__subclasses__() for f in (child, *_subclasses(child))]


def _first(root: Any, paths: Sequence[str]) -> nn.Module | None:
    """The first of the dotted `paths` that exists below `root`."""
    for path in paths:
        found = functools.reduce(lambda at, name: getattr(at, name, None), path.split("."), root)
        if isinstance(found, nn.Module):
            return found
    return None


def _grid_thw(inputs: dict[str, Tensor]) -> Tensor | None:
    video = inputs.get("video_grid_thw")
    return inputs.get("image_grid_thw") if video is None else video


def uses_mrope(config: Any) -> bool:
    """Whether the decoder has rope positions on several axes (time, height, width)."""
    text = getattr(config, "text_config", config)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return "mrope_section" in rope
