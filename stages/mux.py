"""Segments and the original recording become one verified MP4."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from heapq import merge
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

import av

from stages.measure import measure
from stages.narration import Narration, encode_aac, open_narration
from stages.paths import open_input
from stages.publish import published
from stages.types import FPS, Measured

MediaSource = str | os.PathLike[str] | BinaryIO
"""A path, or a file that can seek."""

_FRAME = Fraction(1, FPS)


class MuxError(ValueError):
    """The parts do not make the file that was asked for. Nothing was published."""


def mux(
    segments: Iterable[MediaSource],
    audio: MediaSource,
    out_path: Path,
    *,
    width: int,
    height: int,
    frames: int,
    sound_seconds: float,
    audio_bitrate: int,
    loudness: str,
) -> Measured:
    """Join segments by stream copy, encode the recording once, publish the verified file as `out_path`.

    Segments are opened one after the other, so an iterator that fetches each when asked holds one at a time.
    Sound and video are never in memory as a whole. Equal input gives equal bytes. An existing file is
    replaced in one step, and stays as it is if anything fails.

    Args:
        segments: video-only files of `SegmentEncoder` with equal settings, in order; paths or seekable files.
        audio: the original recording, a path, URI or file that can seek. Its rate and channels are kept.
        width, height: pixels that the video must have.
        frames: number of frames that the video must have.
        sound_seconds: how much of the recording is delivered.
        audio_bitrate: bits per second of the AAC stream; FFmpeg takes less where AAC's frames cannot hold it
            (6 bits per sample and channel).
        loudness: `keep`, or the LUFS that one static gain brings the sound to.

    Raises:
        MuxError: no segments, segments that differ, or a finished file that is not what was asked for.
        RowError: the recording cannot be read or has more than 8 channels.
        OSError: a file cannot be read or written.
    """
    with _open_audio(audio) as (file, name), published(out_path) as part:
        narration = open_narration(file, name, sound_seconds, loudness)
        _write(part, segments, narration, audio_bitrate)
        measured = measure(part)
        _check(measured, out_path.name, width, height, frames)
    return replace(measured, warnings=narration.warnings)


@contextmanager
def _open_audio(audio: MediaSource) -> Iterator[tuple[BinaryIO, str]]:
    """The recording's file and a name for messages. Only a file that is opened here is closed here."""
    if isinstance(audio, str | os.PathLike):
        name = os.fspath(audio)
        with open_input("audio", name) as file:
            yield file, name
    else:
        yield audio, str(getattr(audio, "name", audio))


def _open_segment(source: MediaSource) -> av.container.InputContainer:
    if isinstance(source, str | os.PathLike):
        return av.open(os.fspath(source), "r")
    source.seek(0)
    return av.open(source, "r")


def _write(part: Path, segments: Iterable[MediaSource], narration: Narration, audio_bitrate: int) -> None:
    rest = iter(segments)
    first = next(rest, None)
    if first is None:
        raise MuxError("segments=0: a lesson needs at least one")
    with av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        with _open_segment(first) as template:
            video = container.add_stream_from_template(template.streams.video[0])
        audio = container.add_stream(
            "aac", rate=narration.rate, layout=narration.layout, bit_rate=audio_bitrate
        )
        pictures, sound = _join(chain([first], rest), video), encode_aac(narration, audio)
        for packet in merge(pictures, sound, key=_decode_time):
            container.mux_one(packet)


def _join(segments: Iterable[MediaSource], video: av.VideoStream) -> Iterator[av.Packet]:
    """Packets of all segments in decoding order, on one clock that counts frames from 0.

    Each segment starts with a keyframe and refers to nothing outside itself, so its packets are copied as
    they are. Decoding times are counted anew: packet n of the lesson is decoded at n less the encoder's
    reordering delay, which also holds for segments that are shorter than that delay.
    """
    expected = None
    decoded = 0
    for index, source in enumerate(segments):
        with _open_segment(source) as container:
            stream = container.streams.video[0]
            parameters = _parameters(stream)
            expected = expected or parameters
            if parameters != expected:
                raise MuxError(f"segment {index}: encoded as {parameters}, but segment 0 as {expected}")
            start = stream.start_time or 0
            first_frame, last_frame = decoded, decoded - 1
            for packet in container.demux(stream):
                if packet.pts is None:  # the empty packet that ends demuxing
                    continue
                if decoded == first_frame and not packet.is_keyframe:
                    raise MuxError(f"segment {index}: does not start with a keyframe")
                shown = first_frame + round((packet.pts - start) * packet.time_base / _FRAME)
                packet.pts, packet.dts = shown, decoded - stream.codec_context.reorder_depth
                packet.duration, packet.time_base, packet.stream = 1, _FRAME, video
                last_frame = max(last_frame, shown)
                decoded += 1
                yield packet
            if last_frame + 1 != decoded:
                length = last_frame + 1 - first_frame
                raise MuxError(f"segment {index}: {decoded - first_frame} frames on a clock of {length}")


def _parameters(stream: av.VideoStream) -> tuple[str, int, int, str | None, str]:
    """All that must be equal for segments to be decoded with one header."""
    context = stream.codec_context
    return context.name, context.width, context.height, context.pix_fmt, (context.extradata or b"").hex()


def _decode_time(packet: av.Packet) -> Fraction:
    return cast(int, packet.dts) * packet.time_base


def _check(measured: Measured, name: str, width: int, height: int, frames: int) -> None:
    """The finished file is what was asked for, or MuxError with all that is wrong."""
    wrong = []
    if (measured.width, measured.height) != (width, height):
        wrong.append(f"size={measured.width}x{measured.height}: must be {width}x{height}")
    if measured.frames != frames:
        wrong.append(f"frames={measured.frames}: must be {frames}")
    apart = abs(measured.video_seconds - measured.sound_seconds)
    if round(apart, 6) > float(_FRAME):
        ends = f"video ends at {measured.video_seconds:.3f} s, sound at {measured.sound_seconds:.3f} s"
        wrong.append(f"{ends}: must be within {float(_FRAME) * 1000:g} ms")
    if wrong:
        raise MuxError(f"{name}: " + "; ".join(wrong))
