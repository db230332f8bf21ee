"""Video files: which frames there are, when each is shown, and the pixels of the wanted ones.

The file is demuxed once without decoding, which lists every frame's presentation time and keyframe. Wanted frames are
then reached by seeking to their keyframe, so a film of two hours costs a few groups of pictures. Where packets do not
tell which frames will come out, the file is decoded once to list them, keeping no picture.
"""

from __future__ import annotations

import bisect
import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab import video_container as files
from lab.errors import LabWarning, VideoError
from lab.video_info import VideoInfo


class FileSource:
    """One video file. `seconds` has the time of each frame, from the first one; `take` decodes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._failed = 0  # packets that did not decode, since last set to 0
        with files.opened(self.path) as (container, stream):
            first = self._first_frame(container, stream)
            self._size = (first.width, first.height)
            facts, tick, rate = (
                files.facts(container, stream, first),
                float(stream.time_base),
                stream.average_rate,
            )
        self._table = self._list_frames(tick, float(rate or 25))
        start, end = self._table.pts[0], self._table.end
        self.seconds = [(p - start) * tick for p in self._table.pts]
        n, duration = len(self.seconds), (end - start) * tick
        self.info = VideoInfo(str(self.path), n, _rate(rate, n, duration), duration, **facts)

    def _frames(self, container: Any, stream: Any) -> Iterator[Any]:
        """Decoded frames from where the container stands; packets that fail are counted and passed over."""
        av = files.pyav()
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets, None)
                # an empty packet in mid-stream would end the decoder; the one at the end is meant to
                frames = packet.decode() if packet and (packet.size or packet.dts is None) else []
            except av.error.EOFError:  # the decoder has given all it had
                continue
            except (av.error.FFmpegError, ValueError):
                self._failed += 1
                continue
            if packet is None:
                return
            yield from frames

    def _first_frame(self, container: Any, stream: Any) -> Any:
        for frame in self._frames(container, stream):
            return frame
        raise VideoError(
            f"{self.path}: no frame in it can be decoded ({self._failed} packets failed, codec "
            f"{files.codec_of(stream)}); check that it plays, or convert it to mp4"
        )

    def _list_frames(self, tick: float, rate: float) -> files.Table:
        with files.opened(self.path) as (container, stream):
            table = files.demuxed(container, stream)
        with files.opened(self.path) as (container, stream):
            if table is None:
                seen = [(f.pts, f.duration) for f in self._frames(container, stream)]
                table = files.counted(seen, max(1, round(1 / (rate * tick))))
            claim = files.missing_end(table, stream)
        if claim is not None:
            warnings.warn(
                f"{self.path}: only {len(table.pts)} of {claim} frames can be read, the file is cut off or damaged; "
                "what is left is used as if it were the whole video",
                LabWarning,
                stacklevel=6,
            )
        return table

    def take(self, index: Sequence[int]) -> tuple[list[int], Tensor]:
        """(indices really taken, uint8 pixels [n, 3, h, w]) for ascending distinct frame indices.

        A frame that does not decode is replaced by its nearest neighbour that does; the returned indices say so, and
        a LabWarning. Raises VideoError if no frame decodes.
        """
        self._failed = 0
        found = self._by_seeking(index) if self._table.exact else {}
        missing = [i for i in index if i not in found]
        stands_for = self._by_counting(missing, found) if missing else {}
        taken = [stands_for.get(i, i) for i in index]
        moved = sum(i != t for i, t in zip(index, taken, strict=True))
        if moved or self._failed:
            warnings.warn(
                f"{self.path}: damaged, {self._failed} packets do not decode; {moved} of {len(index)} chosen frames "
                "were replaced by their nearest neighbours, others near the damage may look wrong",
                LabWarning,
                stacklevel=4,
            )
        return taken, torch.stack([found[i] for i in taken])

    def _by_seeking(self, index: Sequence[int]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        pts, starts = self._table.pts, self._table.starts
        with files.opened(self.path) as (container, stream):
            for start, group in groupby(index, key=lambda i: starts[pts[i]]):
                wanted = {pts[i]: i for i in group}
                if not _seek(container, stream, start):
                    return found
                self._collect(wanted, self._frames(container, stream), found)
        return found

    def _collect(self, wanted: dict[int, int], frames: Iterator[Any], found: dict[int, Tensor]) -> None:
        last = max(wanted)
        for frame in frames:
            if frame.pts in wanted and not frame.is_corrupt:
                found[wanted.pop(frame.pts)] = self._rgb(frame)
            if not wanted or (frame.pts is not None and frame.pts >= last):
                return

    def _by_counting(self, missing: list[int], found: dict[int, Tensor]) -> dict[int, int]:
        """Decodes from the start, adds to `found`, and tells which frame stands for each missing one."""
        self._failed = 0
        with files.opened(self.path) as (container, stream):
            there = sorted(i for i, _ in self._numbered(container, stream))
        if not there:
            raise VideoError(
                f"{self.path}: none of its {len(self._table.pts)} frames decodes; convert or replace it"
            )
        failed, stands_for = self._failed, {i: self._nearest(there, i) for i in missing}
        wanted = set(stands_for.values()) - found.keys()
        with files.opened(self.path) as (container, stream):
            for i, frame in self._numbered(container, stream):
                if i in wanted:
                    found[i] = self._rgb(frame)
                    wanted.remove(i)
                if not wanted:
                    break
        self._failed = failed
        return stands_for

    def _numbered(self, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
        """(index, frame) for all that decode, from the start."""
        place = {p: i for i, p in enumerate(self._table.pts)}
        for n, frame in enumerate(self._frames(container, stream)):
            i = place.get(frame.pts) if self._table.exact else n
            if i is not None and i < len(place):
                self._failed += bool(frame.is_corrupt)
                yield i, frame

    def _nearest(self, there: list[int], i: int) -> int:
        at = bisect.bisect_left(there, i)
        return min(there[max(at - 1, 0) : at + 1], key=lambda j: abs(self.seconds[j] - self.seconds[i]))

    def _rgb(self, frame: Any) -> Tensor:
        """Upright uint8 [3, h, w]. Transparent parts show white; a frame of another size is scaled to the first's."""
        clear = frame.format.name == "pal8" or any(c.is_alpha for c in frame.format.components)
        width, height = self._size
        array = frame.to_ndarray(format="rgba" if clear else "rgb24", width=width, height=height)
        array = files.upright(on_white(array) if clear else array, files.display_matrix(frame))
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def on_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 4] -> [h, w, 3], transparent parts blended onto white."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _seek(container: Any, stream: Any, ticks: int) -> bool:
    try:
        container.seek(ticks, stream=stream, backward=True)
    except (files.pyav().error.FFmpegError, ValueError, OverflowError):
        return False
    return True


def _rate(stated: Any, n: int, duration: float) -> float:
    """The stated rate where the times bear it out (29.97 stays exact), else frames per second on average."""
    mean = n / duration if duration > 0 else 0.0
    return float(stated) if stated and abs(float(stated) - mean) <= 0.01 * mean else mean
