"""Frames become H.264: one video-only file per segment, made in memory."""

from __future__ import annotations

import io
import platform
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    Interpolation,
    VideoReformatter,
)

from stages.types import FPS

_SWSCALE = (
    Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INP | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
)


def x264_params() -> str:
    """What makes x264's bytes depend on nothing but frames and settings, and segments fit together.

    `stitchable` keeps content out of the headers. Left alone on an AVX-512 machine, rate control by
    macroblock tree gives one of several files by chance. Pinning AVX2 cures that, costs a tenth of the speed
    and serves every x86 processor since 2013; elsewhere the tree is off, which costs a quarter more bytes at
    equal PSNR.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return "stitchable=1:" + ("asm=AVX2" if x86 else "mbtree=0")


class SegmentEncoder:
    """Encodes the frames of one segment as they come.

    H.264 at 25 frames per second, yuv420p, limited range, BT.709 throughout and tagged so, in a QuickTime
    container. Equal frames and settings give equal bytes; `encoder_threads` is one of those settings.
    """

    def __init__(self, width: int, height: int, crf: int, encoder_preset: str, encoder_threads: int) -> None:
        """Width and height in pixels, both even (4:2:0 chroma); otherwise ValueError."""
        if width <= 0 or height <= 0 or width % 2 or height % 2:
            raise ValueError(f"size={width}x{height}: both sides must be even and above 0 for 4:2:0 video")
        self.width, self.height = width, height
        self.frames = 0
        self._file = io.BytesIO()
        self._container = av.open(self._file, "w", format="mov")
        self._stream = self._container.add_stream(
            "libx264",
            rate=FPS,
            options={"crf": str(crf), "preset": encoder_preset, "x264-params": x264_params()},
        )
        context = self._stream.codec_context
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.thread_count = encoder_threads
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._reformatter = VideoReformatter()

    def write(self, frames_THWC: np.ndarray) -> None:
        """Encode T frames, uint8 RGB [T, height, width, 3]; anything else is a ValueError."""
        expected = (self.height, self.width, 3)
        if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[1:] != expected:
            got = f"{frames_THWC.dtype} {list(frames_THWC.shape)}"
            raise ValueError(f"frames={got}: must be uint8 [T, {self.height}, {self.width}, 3]")
        for frame_HWC in frames_THWC:
            self._container.mux(self._stream.encode(self._to_yuv(frame_HWC)))

    def finish(self) -> bytes:
        """The complete file. ValueError if no frame was written."""
        if self.frames == 0:
            raise ValueError("frames=0: a segment without frames cannot be encoded")
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._file.getvalue()

    def _to_yuv(self, frame_HWC: np.ndarray) -> av.VideoFrame:
        yuv = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            dst_color_primaries=ColorPrimaries.BT709,
            dst_color_trc=ColorTrc.BT709,
            interpolation=_SWSCALE,
            threads=1,
        )
        yuv.pts, yuv.time_base = self.frames, Fraction(1, FPS)
        self.frames += 1
        return yuv
