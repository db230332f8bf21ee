"""VideoLLaMA3: frames patchified and merged 2 x 2; tokens like those of the frame before may be dropped by a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab.carriers import Frames, VideoGrid
from lab.errors import PromptError
from lab.model.families.base import Family
from lab.model.families.chat import chatml
from lab.model.families.geometry import clock, frame_spans, merged_grids, spoken_time, timed, tubelet_times
from lab.pixels import Preprocessor, compression_mask, qwen_pixels
from lab.spans import Span

MERGE = 2  # published video setting; the config does not hold it, the preprocessor json does


class VideoLlama3(Family):
    """All tokens are kept unless the checkpoint's preprocessor json says `use_token_compression`."""

    model_types = ("video_llama_3",)
    needs = ("video_grid_thw", "video_merge_sizes")
    chat = chatml(video=("<|video_pad|>", "<video>"))

    def video_grids(self, config: Any, inputs: dict[str, Tensor]) -> list[VideoGrid]:
        """One grid per row of `video_grid_thw`, without the tokens that `video_compression_mask` drops."""
        if inputs.get("video_grid_thw") is None:
            return []
        rows = zip(inputs["video_grid_thw"], inputs["video_merge_sizes"].tolist(), strict=True)
        grids = [merged_grids(config, row[None], int(merge))[0] for row, merge in rows]
        return _kept(grids, inputs.get("video_compression_mask"))

    def pixels(
        self, frames: Frames, config: Any, preprocessor: Preprocessor | None
    ) -> tuple[dict[str, Tensor], VideoGrid]:
        """Patches, `video_grid_thw`, `video_merge_sizes`, `video_compression_mask` [token], and the kept tokens' grid."""
        pre = preprocessor or Preprocessor(
            size={"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}, merge_size=MERGE
        )
        pre = replace(pre, patch_size=int(config.vision_config.patch_size), budget="share")
        x, grid_thw = qwen_pixels(frames, pre)
        grid = merged_grids(config, grid_thw, pre.merge_size)[0]
        mask = torch.ones(len(grid), dtype=torch.bool, device=x.device)
        if pre.use_token_compression:
            mask = compression_mask(x, grid_thw, pre.merge_size)
        inputs = {"pixel_values_videos": x, "video_grid_thw": grid_thw}
        inputs["video_merge_sizes"] = torch.tensor([pre.merge_size], device=x.device)
        inputs["video_compression_mask"] = mask
        times = tubelet_times(clock(frames), pre.temporal_patch_size)
        return inputs, _kept([timed(grid, times)], mask)[0]

    def video_spans(self, frames: Frames, grid: VideoGrid) -> list[Span]:
        """ "Time 0.0s:" before every frame, a comma between frames."""
        spans: list[Span] = []
        for span in frame_spans(grid):
            text = f"{',' if spans else ''}Time {spoken_time(span):.1f}s:"
            spans += [Span("separator", text, kind="time", frame=span.frame, seconds=span.seconds), span]
        return spans


def _kept(grids: list[VideoGrid], mask: Tensor | None) -> list[VideoGrid]:
    """The grids without the dropped tokens. `source` goes on counting the kept tokens only."""
    if mask is None:
        return grids
    if len(mask) != sum(map(len, grids)):
        raise PromptError(
            f"video_compression_mask has {len(mask)} entries but video_grid_thw makes {sum(map(len, grids))} tokens"
        )
    parts = mask.cpu().split([len(g) for g in grids])
    return [replace(g[m], source=torch.arange(int(m.sum()))) for g, m in zip(grids, parts, strict=True)]
