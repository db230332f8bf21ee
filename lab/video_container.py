"""What PyAV tells about a container: opening it safely, the table of its frames, the turn it asks for.

Private to `lab.video_files`. PyAV is imported on first use; its errors are turned into VideoErrors by `opened`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import VideoError

# text and playlists, which ffmpeg would gladly draw or follow
NOT_VIDEO = {"tty", "hls", "concat", "dash", "sdp", "rtsp", "ffmetadata", "imf", "bin", "xbin", "adf", "idf"}
# containers whose packets carry the time their frame is shown. Not: program streams (.mpg), raw streams, old formats
TIMED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv", "gif", "avi"}
HIDDEN_FRAMES = {"vp8"}  # codecs with packets that show nothing


@dataclass(frozen=True)
class Table:
    """The frames of a file in presentation order.

    pts      presentation time in ticks; rises
    end      when the last frame ends, in ticks
    starts   pts -> where to seek to reach that frame; empty for a table made by decoding
    packets  packets read, of frames shown and not shown
    exact    made from packets: these pts are the ones that decoding gives. Else frames are reached by counting
    """

    pts: list[int]
    end: int
    starts: dict[int, int]
    packets: int

    @property
    def exact(self) -> bool:
        return bool(self.starts)


def pyav() -> Any:
    """The av module. Raises VideoError where it is not installed."""
    try:
        import av
    except ImportError:
        raise VideoError(
            "video files need PyAV: pip install av (arrays and folders of images work without)"
        ) from None
    return av


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The open container and its picture stream. PyAV's errors, also later ones, become VideoErrors."""
    av = pyav()
    _check_file(path)
    # "file:" and the whitelist keep odd names and playlists from opening anything but this file
    url, options = f"file:{path.absolute()}", {"protocol_whitelist": "file"}
    try:
        with av.open(url, metadata_errors="replace", options=options) as container:
            yield container, _picture_stream(container, path)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise VideoError(_explain(path, error)) from None


def _check_file(path: Path) -> None:
    if not path.exists():
        raise VideoError(f"{path}: no such file; check the path (working folder: {Path.cwd()})")
    if not path.is_file():
        raise VideoError(f"{path}: not a regular file; give a video file, an image or a folder of images")
    if not os.access(path, os.R_OK):
        raise VideoError(f"{path}: no permission to read it; change its permissions or copy it")
    if path.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes); get it again")


def _picture_stream(container: Any, path: Path) -> Any:
    kind = container.format.name
    if kind in NOT_VIDEO:
        raise VideoError(f"{path}: a {kind} file, not a video; give the video file itself")
    cover = pyav().stream.Disposition.attached_pic  # album art is no video
    pictures = [s for s in container.streams.video if not s.disposition & cover]
    if not pictures:
        other = sorted({s.type for s in container.streams} - {"video"})
        raise VideoError(f"{path}: no pictures in it, only {' and '.join(other) or 'nothing'}; give a video")
    if pictures[0].codec_context is None:
        raise VideoError(f"{path}: this PyAV does not know its codec; convert it to mp4 (h264)")
    pictures[0].thread_type = "AUTO"
    return pictures[0]


def _explain(path: Path, error: Exception) -> str:
    if path.is_file() and {b"ftyp"} <= (boxes := _boxes(path)) and b"moov" not in boxes:
        return f"{path}: an mp4 without its index (moov box): it was cut off on the way; get it again"
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{path}: cannot be read as a video ({why}); check that it plays, or convert it to mp4"


def _boxes(path: Path) -> set[bytes]:
    """Names of the top-level boxes of an mp4; something short for any other file."""
    names: set[bytes] = set()
    with path.open("rb") as file:
        while len(head := file.read(16)) >= 8 and head[4:8].isalnum():
            names.add(head[4:8])
            size, long = int.from_bytes(head[:4], "big"), int.from_bytes(head[8:], "big")
            length = long if size == 1 else size
            if length < 8:  # 0: reaches to the end of the file
                break
            file.seek(length - len(head), os.SEEK_CUR)
    return names


def demuxed(container: Any, stream: Any) -> Table | None:
    """The table from packets alone, without decoding; None where packets do not tell which frames come out."""
    kind = container.format.name
    if kind not in TIMED or codec_of(stream) in HIDDEN_FRAMES:
        return None
    if kind == "avi" and stream.codec_context.has_b_frames:
        return None  # avi knows no presentation times: where frames are reordered, those of its packets are guesses
    keys: list[tuple[int, int]] = []  # keyframes so far: pts, and where to seek
    starts: dict[int, int] = {}
    packets = end = 0
    for packet in _packets(container, stream):
        packets += 1
        if packet.pts is None or packet.pts in starts:
            return None
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts)))
        # a frame may be shown before the keyframe that precedes it in the file: it hangs on the keyframe before
        start = next((seek for pts, seek in reversed(keys) if pts <= packet.pts), None)
        if start is not None and not packet.is_discard:
            starts[packet.pts] = start
            end = max(end, packet.pts + (packet.duration or 0))
    pts = sorted(starts)
    if not pts:
        return None
    return Table(pts, max(end, pts[-1] + _last_step(pts)), starts, packets)


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    av = pyav()
    try:
        yield from (p for p in container.demux(stream) if p.size)
    except (av.error.FFmpegError, ValueError):
        return  # what cannot be read is not there; `missing_end` tells


def counted(seen: Sequence[tuple[int | None, int | None]], step: int) -> Table:
    """The table from decoded frames' (pts, duration): their own times if these rise, else one every `step` ticks."""
    pts = [p for p, _ in seen if p is not None]
    if len(pts) < len(seen) or any(a >= b for a, b in zip(pts, pts[1:], strict=False)):
        return Table([i * step for i in range(len(seen))], len(seen) * step, {}, len(seen))
    return Table(pts, pts[-1] + (seen[-1][1] or _last_step(pts)), {}, len(seen))


def _last_step(pts: list[int]) -> int:
    return pts[-1] - pts[-2] if len(pts) > 1 else 0


def missing_end(table: Table, stream: Any) -> str | None:
    """How many frames the file claims to have, if it has clearly fewer; else None.

    The claim is the number in the header, or the duration of the pictures (Matroska keeps that in a tag).
    """
    if stream.frames:
        return str(stream.frames) if table.packets < 0.99 * stream.frames - 1 else None
    steps = sorted(b - a for a, b in zip(table.pts, table.pts[1:], strict=False))
    claimed = _tag_seconds(str(stream.metadata.get("DURATION", "")))
    if claimed is None or not steps:
        return None
    step, missing = steps[len(steps) // 2], claimed / float(stream.time_base) - table.end
    if missing < 2 * step:
        return None
    return f"about {len(table.pts) + round(missing / step)}"


def _tag_seconds(tag: str) -> float | None:
    try:
        hours, minutes, seconds = (float(p) for p in tag.split(":"))
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds


def codec_of(stream: Any) -> str:
    return str(stream.codec_context.codec.canonical_name)


def facts(container: Any, stream: Any, frame: Any) -> dict[str, Any]:
    """The fields of VideoInfo that container, stream and first frame tell."""
    aspect = stream.codec_context.sample_aspect_ratio
    turned = is_sideways(display_matrix(frame))
    width, height = (frame.height, frame.width) if turned else (frame.width, frame.height)
    return {
        "width": width, "height": height, "codec": codec_of(stream), "container": container.format.name,
        "pixel_format": frame.format.name, "pixel_aspect": float(aspect) if aspect else 1.0, "turned": turned,
    }  # fmt: skip


Matrix = tuple[int, int, int, int]


def display_matrix(frame: Any) -> Matrix:
    """(a, b, c, d): the pixel at (x, y), y downwards, is to be shown at (a x + c y, b x + d y)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0, 0, 1)
    m = np.frombuffer(bytes(data), np.int32)
    return (int(m[0]), int(m[1]), int(m[3]), int(m[4]))


def is_sideways(matrix: Matrix) -> bool:
    a, b, c, d = matrix
    return abs(b) + abs(c) > abs(a) + abs(d)


def upright(array: np.ndarray, matrix: Matrix) -> np.ndarray:
    """[h, w, c] turned and mirrored as the matrix says, to the nearest right angle."""
    across, down = matrix[0], matrix[3]
    if is_sideways(matrix):
        array, across, down = array.swapaxes(0, 1), matrix[2], matrix[1]
    array = array[:, ::-1] if across < 0 else array
    return array[::-1] if down < 0 else array
