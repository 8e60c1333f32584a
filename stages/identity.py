"""Names of results: the hash of all that determines their bytes.

A segment's identity contains the identity of the segment before it, so that a lesson's identities form a
chain that can be computed without rendering. Which lesson, row, worker or layout a segment belongs to is not
in it; nor is the kind of GPU, which is recorded instead.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from conf.schema import GenerationSettings, Settings, VideoSettings
from stages.types import Picture, Prepared, as_dict

GENERATION_VERSION = 1
"""Raised by hand whenever the same inputs give other segments than before."""

DELIVERY_VERSION = 1
"""Raised by hand whenever the same segments and recording give another finished file than before."""

ARITHMETIC = "single"
"""Layouts that give the same bits share a class: one copy of the transformer, whole or split by step or
layer."""

_MODEL_FIELDS = (
    *("lead_frames", "audio_context_seconds", "lora_alpha", "lora_rank"),
    *("dtype", "vae_dtype", "attention_backend", "vae", "text_encoder", "audio_encoder"),
)


def segment_id(
    *,
    previous: str | None,
    picture: Picture,
    window: np.ndarray,
    window_bounds: tuple[int, int],
    prompt: str,
    blocks: tuple[int, int],
    frames: tuple[int, int],
    settings: Settings,
    weights: str,
) -> str:
    """SHA-256 in hex.

    `previous` is the identity that the segment goes on from, None where it starts from the portrait; `window`
    its float32 16 kHz samples, which are [start, end) `window_bounds` of the lesson; `blocks` and `frames`
    the first and the end of what is rendered and of what is kept of it; `weights` the fingerprint of the
    weights.
    """
    return _hash(
        {
            "version": GENERATION_VERSION,
            "arithmetic": ARITHMETIC,
            "weights": weights,
            "previous": previous,
            "portrait": picture.sha256,
            "size": [picture.width, picture.height],
            "prompt": prompt,
            "sound": hashlib.sha256(window.astype("<f4").tobytes()).hexdigest(),
            "window": window_bounds,
            "blocks": blocks,
            "frames": frames,
            "settings": generation_settings(settings),
        }
    )


def generation_settings(settings: Settings) -> dict[str, Any]:
    """The settings that change a segment's bytes, as plain values."""
    groups = [field.name for group in (GenerationSettings, VideoSettings) for field in fields(group)]
    values = {name: as_dict(getattr(settings, name)) for name in (*groups, *_MODEL_FIELDS)}
    del values["text_encoder"]["device"]  # A place, like `device` itself.
    return values


def delivery_id(prepared: Prepared, settings: Settings) -> str:
    """SHA-256 in hex of all that determines the finished file's bytes: its segments, its sound and how that
    is encoded. Its name is not in it."""
    return _hash(
        {
            "version": DELIVERY_VERSION,
            "segments": [segment.id for segment in prepared.segments],
            "recording": prepared.sound_sha256,
            "seconds": prepared.sound_seconds,
            "audio_bitrate": settings.audio_bitrate,
            "loudness": settings.loudness,
        }
    )


def _hash(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
