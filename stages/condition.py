"""condition: prompt -> text embedding, portrait -> latents, speech window -> features at 25 fps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from conf.schema import ModelSettings
from stages.types import DROPPED_FRAMES, FRAMES_PER_BLOCK, SAMPLES_PER_FRAME, PortraitLatents, SegmentJob

if TYPE_CHECKING:
    import torch

    from model.speech import SpeechEncoder
    from model.text import TextEncoder
    from model.vae import Vae

MOTION_FRAMES = 73
"""Pixel frames of motion history; before the first clip they all show the portrait."""


class Encoders:
    """Text, picture and speech encoders of one checkpoint, each loaded when it is first needed."""

    def __init__(self, model: ModelSettings) -> None:
        self._model = model
        self._text: TextEncoder | None = None
        self._vae: Vae | None = None
        self._speech: SpeechEncoder | None = None

    def prompt(self, prompt: str) -> torch.Tensor:
        """Text embedding [tokens, text_dim] on the CPU, without padding."""
        if self._text is None:
            from model.checkpoint import load_text_encoder

            self._text = load_text_encoder(self._model)
        return self._text.encode(prompt).cpu()

    def portrait(self, pixels: np.ndarray) -> PortraitLatents:
        """Latents of the portrait, uint8 [H, W, 3], as a single picture and as 73 frames that all show it."""
        import torch

        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[:, None].float() / 127.5 - 1
        vae = self._loaded_vae()
        return PortraitLatents(
            reference=vae.encode(picture).cpu(),
            motion=vae.encode(picture.expand(-1, MOTION_FRAMES, -1, -1)).cpu(),
        )

    def motion(self, pixels: np.ndarray, clip: np.ndarray) -> torch.Tensor:
        """Motion latents [16, 19, h, w] after the first clip: the last 73 of 73 portraits and the clip's
        frames.

        Args:
            pixels: uint8 [H, W, 3], the portrait.
            clip: uint8 [T, H, W, 3], what the decoder made of the first clip.
        """
        import torch

        portraits = np.broadcast_to(pixels, (MOTION_FRAMES, *pixels.shape))
        video = torch.from_numpy(np.concatenate([portraits, clip])[-MOTION_FRAMES:]).permute(3, 0, 1, 2)
        return self._loaded_vae().encode(video.float() / 127.5 - 1).cpu()

    def speech(self, samples: np.ndarray, job: SegmentJob) -> torch.Tensor:
        """Features [layers, channels, 12 * blocks] of all blocks that are computed for a segment.

        Args:
            samples: float32 mono 16 kHz, the whole recording; only the segment's window of it is heard.
        """
        if self._speech is None:
            from model.checkpoint import load_speech_encoder

            self._speech = load_speech_encoder(self._model)
        segment = job.segment
        decoded = np.arange(job.first_computed_block * FRAMES_PER_BLOCK, segment.end_block * FRAMES_PER_BLOCK)
        frames = frame_of_sound(decoded, job.settings.lead_frames) - segment.window_start // SAMPLES_PER_FRAME
        window = samples[segment.window_start : segment.window_end]
        features = self._speech.features(window, int(frames[-1]) + 1)
        return features[:, :, frames].cpu()

    def _loaded_vae(self) -> Vae:
        if self._vae is None:
            from model.checkpoint import load_vae

            self._vae = load_vae(self._model)
        return self._vae


def frame_of_sound(decoded: np.ndarray, lead_frames: int) -> np.ndarray:
    """Which 640 samples of the recording each decoded frame is driven by.

    Decoded frame j is frame j - 3 of the video, so with `lead_frames` 0 it hears the sound of frame j - 3,
    and with 3, as upstream, that of frame j. The frames before 0 are not shown and hear the first.
    """
    return np.maximum(decoded - DROPPED_FRAMES + lead_frames, 0)
