"""Reading a finished file back: nothing is believed that is not in its packets."""

import hashlib
from fractions import Fraction

import av
import numpy as np
import pytest

from stages.measure import measure
from tests.stages.test_encode import HEIGHT, WIDTH, moving_picture


def write_file(path, frames, samples, rate=16_000, layout="mono"):
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=25, width=WIDTH, height=HEIGHT, pix_fmt="yuv420p")
        audio = container.add_stream("aac", rate=rate, layout=layout) if samples else None
        for picture in moving_picture(frames):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            channels = audio.codec_context.layout.nb_channels
            frame = av.AudioFrame.from_ndarray(np.zeros((channels, samples), np.float32), "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def test_every_value_is_the_files_own(tmp_path):
    path = write_file(tmp_path / "课.mp4", 50, 22_050, rate=11_025, layout="stereo")
    measured = measure(path)
    assert (measured.codec, measured.width, measured.height) == ("h264", WIDTH, HEIGHT)
    assert (measured.frames, measured.video_seconds, measured.sound_seconds) == (50, 2.0, 2.0)
    assert (measured.audio_codec, measured.audio_rate, measured.audio_channels) == ("aac", 11_025, 2)
    assert measured.bytes == path.stat().st_size
    assert measured.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("samples", [1, 1023, 1024, 1025, 15_999])
def test_sound_is_measured_to_the_sample(tmp_path, samples):
    assert measure(write_file(tmp_path / "a.mp4", 1, samples)).sound_seconds == samples / 16_000


def test_video_without_sound_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one video and one audio stream, holds 1"):
        measure(write_file(tmp_path / "a.mp4", 5, 0))


def test_truncated_file_is_refused(tmp_path):
    path = write_file(tmp_path / "a.mp4", 50, 32_000)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises((ValueError, OSError)):
        measure(path)
