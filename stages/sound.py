"""A recording's file -> the 16 kHz mono sound that the model hears."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
import soundfile
import soxr
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError

from stages.headers import is_cut_short, mp3_counts_frames
from stages.paths import open_input
from stages.types import SAMPLE_RATE, SAMPLES_PER_FRAME, RowError

MAX_CHANNELS = 8
"""What AAC can carry in the finished file."""

SILENCE = 10 ** (-60 / 20)
"""A recording whose mono sum never reaches this peak (-60 dBFS) is silent."""

LOUDEST = 100.0
"""A sample beyond this, 40 dB over full scale, is a mistake of scale, and no encoder takes it."""

_MATROSKA_DURATION = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
"""The tag by which MKV and WebM with several streams tell the length of each."""

_EXACT_CODECS = ("pcm_", "flac")
_LIBSNDFILE_BLOCK = 1 << 16


@dataclass(frozen=True)
class Recording:
    """A recording as it was read from beginning to end."""

    rate: int
    channels: int
    seconds: float
    """Length at its own rate."""
    sha256: str
    """Of the file's bytes."""
    speech: np.ndarray
    """float32 [samples], 16 kHz, the mean of all channels."""

    @property
    def warnings(self) -> list[str]:
        if self.rate >= SAMPLE_RATE:
            return []
        return [
            f"audio: {self.rate} Hz recording; with nothing above {self.rate // 2} Hz lips are less exact"
        ]


@dataclass(frozen=True)
class Source:
    """An open recording at its own rate."""

    rate: int
    channels: int
    declared_seconds: float | None
    """What its header says, if that can be relied on."""
    tolerance: float
    """Seconds by which a whole recording may fall short of that."""
    chunks: Iterator[np.ndarray]
    """float32 [samples, channels], from beginning to end, to be read once."""


def read(path: str) -> Recording:
    """Decodes a recording of any format, holding only its 16 kHz mono.

    Raises RowError for files that are missing, empty, without sound, damaged or cut short, and for sound that
    is silent throughout, shorter than one frame, of too many channels, or not a number.
    """
    with open_input("audio", path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        if is_cut_short(file):
            raise RowError("audio", path, "is cut short: its last part is missing")
        with open_source(file, path) as source:
            if source.channels > MAX_CHANNELS:
                rule = f"has {source.channels} channels; the finished file can carry {MAX_CHANNELS}"
                raise RowError("audio", path, rule)
            samples, speech = _resample(source, path)
    seconds = samples / source.rate
    declared = source.declared_seconds
    if declared is not None and seconds < declared - source.tolerance:
        rule = f"is cut short: {seconds:.2f} s of the {declared:.2f} s that its header declares"
        raise RowError("audio", path, rule)
    if len(speech) < SAMPLES_PER_FRAME:
        raise RowError(
            "audio", path, f"is shorter than one frame ({seconds:.5f} s; at least 0.04 s are needed)"
        )
    if max(speech.max(), -speech.min()) < SILENCE:
        raise RowError("audio", path, "is silent throughout: the mean of its channels stays below -60 dBFS")
    return Recording(source.rate, source.channels, seconds, sha256, speech)


@contextmanager
def open_source(file: BinaryIO, path: str) -> Iterator[Source]:
    """Opens the first sound of a file with FFmpeg, or with libsndfile where FFmpeg does not know the format.
    `path` is for messages. Raises RowError, also while chunks are read."""
    file.seek(0)
    container = _open_ffmpeg(file, path)
    if container is None:
        with _open_libsndfile(file, path) as sound:
            yield _libsndfile_source(sound, path)
    else:
        with container:
            yield _ffmpeg_source(container, file, path)


def _open_ffmpeg(file: BinaryIO, path: str) -> InputContainer | None:
    """None if FFmpeg does not know the format."""
    try:
        # A playlist may name other files and servers; nothing but the file itself is opened.
        return av.open(file, mode="r", options={"protocol_whitelist": "none"})
    except InvalidDataError:
        return None
    except FFmpegError as error:
        raise RowError("audio", path, f"cannot be read as sound ({error.strerror})") from None


def _ffmpeg_source(container: InputContainer, file: BinaryIO, path: str) -> Source:
    if not container.streams.audio:
        raise RowError("audio", path, "holds no sound")
    stream = container.streams.audio[0]
    declared = _declared_seconds(container, stream)
    if container.format.name == "mp3":
        position = file.tell()
        if not mp3_counts_frames(file):
            declared = None
        file.seek(position)
    exact = stream.codec_context.name.startswith(_EXACT_CODECS)
    return Source(
        rate=stream.codec_context.sample_rate,
        channels=stream.codec_context.layout.nb_channels,
        declared_seconds=declared,
        # Encoders' delays, and what containers round.
        tolerance=0.001 if exact else 0.1 + 0.001 * (declared or 0),
        chunks=_ffmpeg_chunks(container, stream, path),
    )


def _ffmpeg_chunks(container: InputContainer, stream: av.AudioStream, path: str) -> Iterator[np.ndarray]:
    context = stream.codec_context
    shape = context.sample_rate, context.layout.nb_channels
    # Packed and not planar: PyAV miscounts the planes of eight channels and crashes.
    to_float = av.AudioResampler(format="flt")
    samples = 0
    try:
        for frame in container.decode(stream):
            if (frame.sample_rate, frame.layout.nb_channels) != shape:
                raise RowError("audio", path, "changes its rate or number of channels on the way")
            for packed in to_float.resample(frame):
                samples += packed.samples
                yield packed.to_ndarray().reshape(-1, shape[1])
    except FFmpegError as error:
        seconds = samples / context.sample_rate
        raise RowError(
            "audio", path, f"is damaged or cut short at {seconds:.2f} s ({error.strerror})"
        ) from None


def _open_libsndfile(file: BinaryIO, path: str) -> soundfile.SoundFile:
    file.seek(0)
    try:
        return soundfile.SoundFile(file)
    except soundfile.LibsndfileError:
        raise RowError("audio", path, "is not a recording that FFmpeg or libsndfile reads") from None


def _libsndfile_source(sound: soundfile.SoundFile, path: str) -> Source:
    def chunks() -> Iterator[np.ndarray]:
        try:
            yield from sound.blocks(_LIBSNDFILE_BLOCK, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise RowError("audio", path, f"is damaged ({error})") from None

    return Source(sound.samplerate, sound.channels, sound.frames / sound.samplerate, 0.001, chunks())


def _declared_seconds(container: InputContainer, stream: av.AudioStream) -> float | None:
    """None where FFmpeg only guesses, or where the length is another stream's."""
    if container.format.name == "aac":
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    if tag := _MATROSKA_DURATION.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, tag.groups())
        return 3600 * hours + 60 * minutes + seconds
    return None


def _resample(source: Source, path: str) -> tuple[int, np.ndarray]:
    """(samples at the source's rate, 16 kHz mono).

    Channels are averaged in numpy: FFmpeg's own float downmix is 3 dB louder.
    """
    resampler = soxr.ResampleStream(source.rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ")
    samples, speech = 0, bytearray()
    for chunk in source.chunks:
        if not np.isfinite(chunk).all():
            at = f"near {samples / source.rate:.1f} s"
            raise RowError("audio", path, f"holds samples that are not numbers (NaN or infinite) {at}")
        if len(chunk) and (peak := float(np.abs(chunk).max())) > LOUDEST:
            rule = f"holds samples up to {peak:g}, where full scale is 1; export it again"
            raise RowError("audio", path, rule)
        samples += len(chunk)
        mono = chunk.mean(axis=1, dtype=np.float64).astype(np.float32)
        speech += resampler.resample_chunk(mono).tobytes()
    speech += resampler.resample_chunk(np.empty(0, np.float32), last=True).tobytes()
    return samples, np.frombuffer(speech, np.float32)
