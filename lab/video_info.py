"""What a video is, before any frame of it is read. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video.

    n_frames        frames that can be read; None where only decoding would tell
    fps, duration   frames per second (the mean, if the rate varies) and seconds; 0.0 where the source has no clock
    width, height   in pixels, upright
    codec, container, pixel_format   as ffmpeg names them; "" for arrays and images
    pixel_aspect    width of a pixel over its height. Frames are given as stored, never stretched
    turned          the file says to show it sideways (phones), and it is
    """

    source: str
    n_frames: int | None
    fps: float
    duration: float
    width: int
    height: int
    codec: str = ""
    container: str = ""
    pixel_format: str = ""
    pixel_aspect: float = 1.0
    turned: bool = False
