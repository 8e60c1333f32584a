"""Where a lesson is cut into segments, and which sound each of them hears. Pure arithmetic.

Boundaries count blocks; a cut before block b is heard at the video frame 12 b - 3, since the decoder makes
three frames before the video's first.
"""

import math

import numpy as np

from conf.schema import Settings
from stages.types import DROPPED_FRAMES, FPS, FRAMES_PER_BLOCK, SAMPLE_RATE, SAMPLES_PER_FRAME

_LOUDNESS_SAMPLES = SAMPLE_RATE // 5
"""200 ms: what has to be quiet around a cut."""

_FEATURE_PERIOD = 5
"""Frames after which the pattern repeats in which speech features at 50, 30 and 25 Hz fall together."""

_SHORTEST_REST_MARGIN = 2.0
"""Seconds by which a last segment must be longer than a search window, so that no cut is ever made whose
window was not wholly there."""


def frames_of(samples: int) -> int:
    """Video frames that show `samples` of 16 kHz."""
    return math.ceil(samples / SAMPLES_PER_FRAME)


def blocks_of(frames: int) -> int:
    """Blocks from which `frames` of video are decoded."""
    return math.ceil((frames + DROPPED_FRAMES) / FRAMES_PER_BLOCK)


def samples_of_clips(clips: int, infer_frames: int) -> int:
    """The most samples whose video fits `clips` clips."""
    return (clips * infer_frames - DROPPED_FRAMES) * SAMPLES_PER_FRAME


def cut(speech: np.ndarray, settings: Settings) -> list[int]:
    """Boundaries in blocks, from 0 to the lesson's last block, for float32 `speech` [samples] at 16 kHz.

    From left to right, each cut is the quietest clip boundary within `cut_search_seconds` of the last cut +
    `segment_seconds`; no sound beyond that window is looked at, and a rest shorter than twice
    `cut_search_seconds` + 2 s joins the segment before it. So appended sound moves no cut.
    """
    end = blocks_of(frames_of(len(speech)))
    if not settings.segment_seconds:
        return [0, end]
    search = round(settings.cut_search_seconds * SAMPLE_RATE)
    last_cut = len(speech) - 2 * search - round(_SHORTEST_REST_MARGIN * SAMPLE_RATE)
    bounds = [0]
    while True:
        target = _sample_of(bounds[-1]) + round(settings.segment_seconds * SAMPLE_RATE)
        if target - search > last_cut:
            return [*bounds, end]
        quietest = _quietest(speech, target - search, target + search, settings.infer_frames)
        if _sample_of(quietest) > last_cut:
            return [*bounds, end]
        bounds.append(quietest)


def sound_window(first_block: int, end_block: int, samples: int, settings: Settings) -> tuple[int, int]:
    """(start, end) of the 16 kHz samples that a segment's speech features are computed from.

    They are the sound of its frames and of the clip that is replayed before them, and `audio_context_seconds`
    on both sides, as far as the recording goes; so a lesson of one segment is heard whole. The window starts
    on a fifth of a second, so that its features fall on the same places as those of the uncut recording.
    """
    replayed = settings.infer_frames if first_block and settings.continuity == "carry" else 0
    shift = settings.lead_frames - DROPPED_FRAMES
    context = round(settings.audio_context_seconds * FPS)
    first = first_block * FRAMES_PER_BLOCK - replayed + shift
    end = end_block * FRAMES_PER_BLOCK + shift
    start = max(0, first - context) // _FEATURE_PERIOD * _FEATURE_PERIOD
    return start * SAMPLES_PER_FRAME, min(samples, (end + context) * SAMPLES_PER_FRAME)


def _quietest(speech: np.ndarray, start: int, end: int, infer_frames: int) -> int:
    """The clip boundary, in blocks, with the least energy around it, from sample `start` to `end`."""
    clip = infer_frames * SAMPLES_PER_FRAME
    dropped = DROPPED_FRAMES * SAMPLES_PER_FRAME
    clips = range(math.ceil((start + dropped) / clip), (end + dropped) // clip + 1)

    def energy(clip_number: int) -> float:
        middle = clip_number * clip - dropped
        half = _LOUDNESS_SAMPLES // 2
        around = speech[max(start, middle - half) : min(end, middle + half)]
        return float(np.mean(np.square(around, dtype=np.float64)))

    return min(clips, key=energy) * infer_frames // FRAMES_PER_BLOCK


def _sample_of(block: int) -> int:
    return max(0, block * FRAMES_PER_BLOCK - DROPPED_FRAMES) * SAMPLES_PER_FRAME
