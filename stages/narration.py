"""The original recording as the finished file has it: its own rate and channels, encoded once as AAC."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import BinaryIO

import av
import av.filter
import numpy as np
import soxr
from av.error import BlockingIOError as NothingYet
from av.error import EOFError as NothingMore

from stages.sound import open_source
from stages.types import RowError

AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
"""Samples per second that AAC can carry."""

_LAYOUTS = ("mono", "stereo", "3.0", "quad", "5.0", "5.1", "6.1", "7.1")
"""What 1 to 8 channels are labelled as, in their own order. AAC carries no more."""

_TRUE_PEAK_CEILING = -1.0
"""dBTP that a gain may not exceed (EBU R 128)."""

_INAUDIBLE = -70.0
"""LUFS of the absolute gate of ITU-R BS.1770: at or below it there is nothing to measure."""


@dataclass(frozen=True)
class Narration:
    """A recording and what it becomes in the finished file."""

    file: BinaryIO
    name: str
    """For messages."""
    seconds: float
    """How much of it is delivered, from its beginning."""
    source_rate: int
    rate: int
    channels: int
    gain: float = 1.0
    warnings: tuple[str, ...] = ()

    @property
    def layout(self) -> str:
        """FFmpeg's name of the channel layout."""
        return _LAYOUTS[self.channels - 1]


def open_narration(file: BinaryIO, name: str, seconds: float, loudness: str) -> Narration:
    """Decide rate and gain. `loudness` is `keep`, or a number (LUFS), for which the whole sound is read once.

    Raises:
        RowError: the recording cannot be read or has more than 8 channels.
    """
    file.seek(0)
    with open_source(file, name) as source:
        source_rate, channels = source.rate, source.channels
    if channels > len(_LAYOUTS):
        raise RowError("audio", name, f"has {channels} channels; AAC carries at most {len(_LAYOUTS)}")
    rate = min(AAC_RATES, key=lambda candidate: abs(candidate - source_rate))
    narration = Narration(file, name, seconds, source_rate, rate, channels)
    warnings = []
    if rate != source_rate:
        warnings.append(f"audio: AAC cannot carry {source_rate} Hz, so the sound is resampled to {rate} Hz")
    if loudness != "keep":
        gain_db, warning = _gain_db(*measure_loudness(narration), float(loudness))
        narration = replace(narration, gain=10 ** (gain_db / 20))
        warnings += [warning] if warning else []
    return replace(narration, warnings=tuple(warnings))


def encode_aac(narration: Narration, stream: av.AudioStream) -> Iterator[av.Packet]:
    """Packets of the whole narration, in order; the first sample is at time 0."""
    for frame in _frames(_at_rate(_chunks(narration), narration), narration.rate, narration.layout):
        yield from stream.encode(frame)
    yield from stream.encode(None)


def measure_loudness(narration: Narration) -> tuple[float, float]:
    """Integrated loudness in LUFS and true peak in dBTP, both by ITU-R BS.1770 (FFmpeg's `ebur128`)."""
    rate = narration.source_rate
    graph = av.filter.Graph()
    source = graph.add_abuffer(
        sample_rate=rate, format="flt", layout=narration.layout, time_base=Fraction(1, rate)
    )
    meter = graph.add("ebur128", "peak=true:metadata=1:framelog=quiet")
    sink = graph.add("abuffersink")
    source.link_to(meter)
    meter.link_to(sink)
    graph.configure()
    found: dict[str, str] = {}
    for frame in _frames(_with_tail(narration), rate, narration.layout):
        source.push(frame)
        while (measured := _pull(sink)) is not None:
            found.update(measured.metadata)
    peak = float(found["lavfi.r128.true_peak"])
    return float(found["lavfi.r128.I"]), 20 * math.log10(peak) if peak > 0 else -math.inf


def _with_tail(narration: Narration) -> Iterator[np.ndarray]:
    """The sound and 0.2 s of silence: the meter works in steps of 0.1 s and forgets a rest."""
    yield from _chunks(narration)
    yield np.zeros((math.ceil(narration.source_rate / 5), narration.channels), np.float32)


def _pull(sink: av.filter.context.FilterContext) -> av.frame.Frame | None:
    try:
        return sink.pull()
    except (NothingYet, NothingMore):
        return None


def _gain_db(lufs: float, peak: float, target: float) -> tuple[float, str | None]:
    """One static gain, and a warning where it is not what reaches the target."""
    if lufs <= _INAUDIBLE:
        return 0.0, f"loudness={target:g}: the sound is too quiet or too short to measure and stays as it is"
    wanted, allowed = target - lufs, max(_TRUE_PEAK_CEILING - peak, 0.0)
    if wanted <= allowed:
        return wanted, None
    rule = f"its peaks of {peak:.1f} dBTP may not pass {_TRUE_PEAK_CEILING:g}"
    return allowed, f"loudness={target:g}: only {lufs + allowed:.1f} LUFS are reached, because {rule}"


def _chunks(narration: Narration) -> Iterator[np.ndarray]:
    """The recording, float32 [n, channels], `gain` applied, cut after `seconds`."""
    left = round(narration.seconds * narration.source_rate)
    narration.file.seek(0)
    with open_source(narration.file, narration.name) as source:
        for chunk in source.chunks:
            if left <= 0:
                return
            yield chunk[:left] * np.float32(narration.gain)
            left -= len(chunk)


def _at_rate(chunks: Iterable[np.ndarray], narration: Narration) -> Iterator[np.ndarray]:
    if narration.rate == narration.source_rate:
        yield from chunks
        return
    resampler = soxr.ResampleStream(
        narration.source_rate, narration.rate, narration.channels, dtype="float32", quality="HQ"
    )
    for chunk in chunks:
        yield resampler.resample_chunk(np.ascontiguousarray(chunk))
    yield resampler.resample_chunk(np.empty((0, narration.channels), np.float32), last=True)


def _frames(chunks: Iterable[np.ndarray], rate: int, layout: str) -> Iterator[av.AudioFrame]:
    position = 0
    for chunk in chunks:
        if len(chunk) == 0:
            continue
        # Packed, since PyAV 18 miscounts the planes of eight planar channels; FFmpeg converts by itself.
        frame = av.AudioFrame.from_ndarray(chunk.reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, position, Fraction(1, rate)
        position += len(chunk)
        yield frame
