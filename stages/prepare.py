"""The first step of a lesson: check its inputs, decide size and cuts, and name its segments. No model is
needed."""

import hashlib
from contextlib import suppress
from itertools import pairwise

import numpy as np

from conf.schema import Settings
from model.files import CheckpointError
from model.prompt import unused_tokens
from stages import portrait, sound
from stages.cuts import cut, frames_of, samples_of_clips, sound_window
from stages.identity import segment_id
from stages.paths import open_input
from stages.types import SAMPLE_RATE, Lesson, Picture, Prepared, RowError, Segment, kept_frames
from stages.validate import validate

PREPARE_VERSION = 1
"""Raised by hand whenever the same inputs give another `Prepared` than before."""


def check(lesson: Lesson, weights: str) -> Prepared:
    """Reads portrait and recording once and plans the lesson. `weights` is the fingerprint of the weights,
    empty where a plan is made before they are there.

    Raises RowError for whatever is wrong with the row's files or settings.
    """
    for field, value, rule in validate(lesson.settings):
        raise RowError(field, value, rule)
    picture, picture_notes = portrait.prepare(lesson.image, lesson.settings)
    recording = sound.read(lesson.audio)
    speech = recording.speech[: _limit(lesson.settings)]
    shortened = len(speech) < len(recording.speech)
    sound_seconds = len(speech) / SAMPLE_RATE if shortened else recording.seconds
    notes = picture_notes + recording.warnings + _notes(lesson)
    if shortened:
        notes.append(
            f"audio: num_clip={lesson.settings.num_clip} renders {sound_seconds:.2f} of "
            f"{recording.seconds:.2f} s, and the sound ends there too"
        )
    return Prepared(
        picture=picture,
        samples=len(speech),
        frames=frames_of(len(speech)),
        source_rate=recording.rate,
        source_channels=recording.channels,
        source_seconds=recording.seconds,
        sound_seconds=sound_seconds,
        sound_sha256=recording.sha256,
        segments=_segments(lesson, picture, speech, weights),
        warnings=tuple(notes),
    )


def load_portrait(lesson: Lesson, prepared: Prepared) -> np.ndarray:
    """The picture that `check` has hashed, [H, W, 3] uint8. Raises RowError if the file has changed since."""
    return portrait.load(lesson.image, prepared.picture, lesson.settings.max_image_pixels)


def load_speech(lesson: Lesson, prepared: Prepared) -> np.ndarray:
    """The sound that `check` has hashed, float32 [prepared.samples], 16 kHz mono.

    Raises RowError if the file has changed since.
    """
    recording = sound.read(lesson.audio)
    _require_same(lesson, prepared, recording.sha256)
    return recording.speech[: prepared.samples]


def require_unchanged(lesson: Lesson, prepared: Prepared) -> None:
    """Raises RowError if the recording is not, or no longer, the one that `check` has seen."""
    with open_input("audio", lesson.audio) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    _require_same(lesson, prepared, sha256)


def _require_same(lesson: Lesson, prepared: Prepared, sha256: str) -> None:
    if sha256 != prepared.sound_sha256:
        raise RowError("audio", lesson.audio, "has changed since it was checked; run again")


def _notes(lesson: Lesson) -> list[str]:
    """What is allowed and yet will surprise."""
    notes = []
    with suppress(CheckpointError):  # a plan may be made before the weights are there
        if unused := unused_tokens(lesson.settings, lesson.prompt):
            notes.append(f"prompt: its last {unused} tokens are not used; the model takes no more")
    if lesson.settings.sample_guide_scale and lesson.settings.lora_path_dmd:
        notes.append(
            "sample_guide_scale: doubles time and caches, and a distilled LoRA does not want guidance"
        )
    return notes


def _limit(settings: Settings) -> int | None:
    return None if settings.num_clip is None else samples_of_clips(settings.num_clip, settings.infer_frames)


def _segments(lesson: Lesson, picture: Picture, speech: np.ndarray, weights: str) -> tuple[Segment, ...]:
    settings = lesson.settings
    bounds = cut(speech, settings)
    segments: list[Segment] = []
    for first, end in pairwise(bounds):
        window = sound_window(first, end, len(speech), settings)
        carried = segments and settings.continuity == "carry"
        kept = kept_frames(first, end, frames_of(len(speech)))
        name = segment_id(
            previous=segments[-1].id if carried else None,
            picture=picture,
            window=speech[slice(*window)],
            window_bounds=window,
            prompt=lesson.prompt,
            blocks=(first, end),
            frames=(kept.start, kept.stop),
            settings=settings,
            weights=weights,
        )
        segments.append(Segment(len(segments), first, end, *window, name))
    return tuple(segments)
