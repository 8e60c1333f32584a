"""What crosses a process boundary: small frozen dataclasses of plain values, numpy arrays and CPU tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.schema import Settings

if TYPE_CHECKING:
    import torch

FPS = 25
"""Frames per second of every video."""

SAMPLE_RATE = 16_000
"""Samples per second of the sound that the model hears."""

SAMPLES_PER_FRAME = SAMPLE_RATE // FPS
"""Frame k belongs to samples 640 k to 640 k + 639."""

FRAMES_PER_BLOCK = 12
"""Video frames of a block; 3 latent frames."""

DROPPED_FRAMES = 3
"""Frames that the decoder makes before frame 0 of the video: decoded frame j is video frame j - 3."""


def kept_frames(first_block: int, end_block: int, total: int) -> range:
    """Frames of a video of `total` frames that come out of these blocks."""
    first, end = (block * FRAMES_PER_BLOCK - DROPPED_FRAMES for block in (first_block, end_block))
    return range(max(first, 0), min(end, total))


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be rendered. `str()` is the line that the user sees."""

    row: int
    """Number of the row, counted from 1 for the first lesson; 0 for the manifest as a whole."""
    lesson_id: str
    field: str
    value: str
    rule: str

    def __str__(self) -> str:
        where = f"row {self.row}" if self.row else "manifest"
        who = f" ({self.lesson_id})" if self.lesson_id else ""
        return f"{where}{who}: {self.field}={self.value!r}: {self.rule}"


class RowError(Exception):
    """A row's input is bad. Knows the field, its value and the rule; the caller knows the row."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(field, str(value), rule)
        self.field, self.value, self.rule = field, str(value), rule

    def __str__(self) -> str:
        return f"{self.field}={self.value!r}: {self.rule}"

    def problem(self, row: int, lesson_id: str) -> Problem:
        return Problem(row, lesson_id, self.field, self.value, self.rule)


@dataclass(frozen=True)
class Row:
    """One line of the manifest as it stands there, every value a string."""

    number: int
    values: dict[str, str]
    """Column -> value; empty values are left out."""


@dataclass(frozen=True)
class Lesson:
    """One row, checked and complete: what is to be rendered and how."""

    number: int
    lesson_id: str
    image: str
    """Path or URI, absolute."""
    audio: str
    """Path or URI, absolute."""
    prompt: str
    settings: Settings
    extras: dict[str, str] = field(default_factory=dict)
    """The row's `x_` columns, echoed in the results."""


@dataclass(frozen=True)
class Picture:
    """How the portrait is cut and scaled."""

    width: int
    height: int
    crop: tuple[int, int, int, int]
    """x, y, width, height in pixels of the upright source."""
    source_width: int
    source_height: int
    cut_away: float
    """Share of the source picture that is not seen, 0 to 1."""
    sha256: str
    """Of the cropped and scaled RGB bytes."""


@dataclass(frozen=True)
class Segment:
    """A piece of a lesson that is rendered, kept and retried as one."""

    index: int
    first_block: int
    end_block: int
    """One past the last block."""
    window_start: int
    """First 16 kHz sample of the sound window that its speech features are computed from."""
    window_end: int
    id: str
    """Identity: hash of all that determines its bytes (`stages/identity.py`)."""

    def frames(self, total: int) -> range:
        """Frames of the finished video, of `total`, that the segment contributes."""
        return kept_frames(self.first_block, self.end_block, total)


@dataclass(frozen=True)
class Prepared:
    """All that is known of a lesson without a model: cheap to keep, enough to plan, resume and render."""

    picture: Picture
    samples: int
    """16 kHz samples that are rendered (after `num_clip`)."""
    frames: int
    """ceil(samples / 640): frames of the finished video."""
    source_rate: int
    source_channels: int
    source_seconds: float
    """Length of the whole recording."""
    sound_seconds: float
    """Length of the sound in the finished file: the recording, or less if `num_clip` shortened it."""
    sound_sha256: str
    """Of the recording's bytes, for the finished file's identity."""
    segments: tuple[Segment, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SegmentJob:
    """One segment with what every stage has to know of its lesson."""

    lesson_id: str
    settings: Settings
    picture: Picture
    segment: Segment
    frames: int
    """Frames of the whole lesson."""
    carried: bool
    """Whether it goes on from the segment before."""
    last: bool
    """Whether nothing goes on from it."""

    @property
    def first_computed_block(self) -> int:
        """The first block that the transformer computes: with a carry, the replay begins a clip earlier."""
        clip = self.settings.infer_frames // FRAMES_PER_BLOCK
        return max(0, self.segment.first_block - clip) if self.carried else self.segment.first_block


@dataclass(frozen=True)
class PortraitLatents:
    """The portrait as the transformer sees it."""

    reference: torch.Tensor
    """[16, 1, h, w], normalised latent of the single picture."""
    motion: torch.Tensor
    """[16, 19, h, w], normalised latents of the picture repeated 73 times."""


@dataclass(frozen=True)
class Measured:
    """What the finished file turned out to be, read back from its own streams."""

    codec: str
    width: int
    height: int
    frames: int
    video_seconds: float
    sound_seconds: float
    audio_codec: str
    audio_rate: int
    audio_channels: int
    bytes: int
    sha256: str
    warnings: tuple[str, ...] = ()
    """What mux did to the sound that nobody asked for: resampled it, or stopped a gain short of clipping."""


def as_dict(obj: Any) -> Any:
    """A dataclass as plain JSON values (tuples become lists)."""
    import dataclasses

    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: as_dict(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, dict):
        return {k: as_dict(v) for k, v in obj.items()}
    if isinstance(obj, tuple | list):
        return [as_dict(v) for v in obj]
    return obj.item() if isinstance(obj, np.generic) else obj
