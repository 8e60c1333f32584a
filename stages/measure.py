"""What a finished file is, read back from its own packets and not from what its headers claim."""

from __future__ import annotations

import hashlib
from pathlib import Path

import av

from stages.types import Measured


def measure(path: Path) -> Measured:
    """Demux the whole file. Durations run from 0 to the end of each stream's last packet, in seconds.

    Raises:
        ValueError: the file does not hold exactly one video and one audio stream.
        OSError: it cannot be read (av's own errors for damaged files are ValueErrors or OSErrors).
    """
    with av.open(str(path)) as container:
        if len(container.streams.video) != 1 or len(container.streams.audio) != 1:
            raise ValueError(
                f"{path}: must hold one video and one audio stream, holds {len(container.streams)}"
            )
        video, audio = container.streams.video[0], container.streams.audio[0]
        packets, end = {video.index: 0, audio.index: 0}, {video.index: 0.0, audio.index: 0.0}
        for packet in container.demux():
            if packet.pts is None:  # the empty packets that end demuxing
                continue
            index = packet.stream.index
            packets[index] += 1
            end[index] = max(end[index], float((packet.pts + (packet.duration or 0)) * packet.time_base))
        return Measured(
            codec=video.codec_context.name,
            width=video.codec_context.width,
            height=video.codec_context.height,
            frames=packets[video.index],
            video_seconds=end[video.index],
            sound_seconds=end[audio.index],
            audio_codec=audio.codec_context.name,
            audio_rate=audio.codec_context.sample_rate,
            audio_channels=audio.codec_context.layout.nb_channels,
            bytes=path.stat().st_size,
            sha256=sha256_of(path),
        )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
