"""decode: latents of one segment -> frames -> H.264. Pixels never leave it, but for the first clip if
asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from model.priming import PRIMING_LATENTS
from stages.encode import SegmentEncoder
from stages.types import DROPPED_FRAMES, FRAMES_PER_BLOCK, PortraitLatents, SegmentJob

if TYPE_CHECKING:
    import torch

    from model.vae import Vae


def history(portrait: PortraitLatents, carry: bytes | None) -> torch.Tensor:
    """Latents [16, n, h, w] that the decoder has to have seen before a segment.

    Primed with the last 38, its whole receptive field, it goes on as if it had never stopped.
    """
    if carry is None:
        return portrait.motion[:, :PRIMING_LATENTS]
    from model.denoise import Carry

    return Carry.from_bytes(carry).latents


class SegmentDecoder:
    """One segment on its way from latents to H.264: the causal decoder's caches and the encoder's.

    Args:
        vae: shared by the segments of one process; the caches are each segment's own.
        history: latents before the segment, decoded and thrown away; see `history`.
    """

    def __init__(self, vae: Vae, job: SegmentJob, history: torch.Tensor) -> None:
        if job.carried or not job.last:
            vae.require_carried()
        self._segment, self._kept = job.segment, job.segment.frames(job.frames)
        self._next_block = job.segment.first_block
        self._stream = vae.stream()
        self._stream.push(history)
        video, picture = job.settings, job.picture
        self._encoder = SegmentEncoder(
            picture.width, picture.height, video.crf, video.encoder_preset, video.encoder_threads
        )
        self._clip_blocks = job.settings.infer_frames // FRAMES_PER_BLOCK
        self._clip: list[np.ndarray] | None = (
            [] if job.settings.reference == "first_latent_and_motion" else None
        )

    def decode(self, block: int, latents: torch.Tensor) -> int:
        """Decode one block, [16, 3, h, w]; blocks come in order. Returns the segment's frames so far."""
        if block != self._next_block:
            raise ValueError(
                f"block {block} of segment {self._segment.index}: expected block {self._next_block}"
            )
        if not latents.isfinite().all():
            raise ValueError(f"block {block} of segment {self._segment.index}: latents are not all numbers")
        self._next_block += 1
        frames = to_uint8(self._stream.push(latents))
        first = block * FRAMES_PER_BLOCK - DROPPED_FRAMES
        lo, hi = (
            min(max(bound - first, 0), FRAMES_PER_BLOCK) for bound in (self._kept.start, self._kept.stop)
        )
        if lo < hi:
            self._encoder.write(frames[lo:hi])
        if self._clip is not None and len(self._clip) < self._clip_blocks:
            self._clip.append(frames[max(-first, 0) :])
        return max(0, min(first + FRAMES_PER_BLOCK, self._kept.stop) - self._kept.start)

    def first_clip(self) -> np.ndarray:
        """Frames of the first clip, uint8 [T, H, W, 3]; only `first_latent_and_motion` keeps them."""
        if not self._clip:
            raise ValueError("the first clip is kept only for reference=first_latent_and_motion")
        return np.concatenate(self._clip)

    def finish(self) -> bytes:
        """The segment's video, once all of its blocks were decoded."""
        if self._next_block != self._segment.end_block:
            raise ValueError(
                f"segment {self._segment.index} ends with block {self._segment.end_block - 1}, "
                f"but block {self._next_block} was never decoded"
            )
        return self._encoder.finish()


def to_uint8(frames_CTHW: torch.Tensor) -> np.ndarray:
    """Pixels in [-1, 1] as uint8 [T, H, W, 3], rounded to the nearest."""
    pixels = (frames_CTHW.float() + 1).mul_(127.5).round_().clamp_(0, 255)
    return pixels.permute(1, 2, 3, 0).contiguous().byte().cpu().numpy()
