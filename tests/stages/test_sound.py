import io
import struct
import tracemalloc
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import soxr

from stages import sound
from stages.types import RowError
from tests.stages.media import encoded, speech, wav


def read(path):
    return sound.read(str(path))


def rule_of(path):
    with pytest.raises(RowError) as caught:
        read(path)
    assert caught.value.field == "audio"
    return caught.value.rule


CONTAINERS = {
    "mp3": ("libmp3lame", "mp3", 44_100),
    "m4a": ("aac", "ipod", 44_100),
    "mp4": ("aac", "mp4", 48_000),
    "mov": ("pcm_s16le", "mov", 48_000),
    "mka": ("aac", "matroska", 48_000),
    "webm": ("libopus", "webm", 48_000),
    "opus": ("libopus", "ogg", 48_000),
    "flac": ("flac", "flac", 44_100),
    "aac": ("aac", "adts", 44_100),
    "aiff": ("pcm_s16be", "aiff", 44_100),
    "wav": ("pcm_s24le", "wav", 22_050),
}


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_usual_format_is_read_whole(tmp_path, suffix):
    codec, container, rate = CONTAINERS[suffix]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encoded(speech(2.0, rate), rate, codec, container))
    recording = read(path)
    assert (recording.rate, recording.channels) == (rate, 1)
    assert recording.seconds == pytest.approx(2.0, abs=0.06)
    assert recording.speech.dtype == np.float32
    assert len(recording.speech) == pytest.approx(recording.seconds * 16_000, abs=2)


@pytest.mark.parametrize("suffix", set(CONTAINERS) - {"aac"})
def test_truncated_recording_is_a_row_error(tmp_path, suffix):
    codec, container, rate = CONTAINERS[suffix]
    data = encoded(speech(2.0, rate), rate, codec, container)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data[: int(len(data) * 0.7)])
    rule = rule_of(path)
    assert "cut short" in rule or (suffix in ("m4a", "mp4", "mov") and "not a recording" in rule)


def test_truncated_vorbis_is_a_row_error(tmp_path):
    path = wav(tmp_path / "a.ogg", speech(3.0), subtype="VORBIS", format="OGG")
    assert read(path).seconds == 3.0
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut short" in rule_of(path)


@pytest.mark.parametrize("missing", [2, 1000])
def test_wav_with_less_data_than_its_header_says_is_a_row_error(tmp_path, missing):
    path = wav(tmp_path / "a.wav", speech(1.0))
    path.write_bytes(path.read_bytes()[:-missing])
    assert rule_of(path) == "is cut short: its last part is missing"


@pytest.mark.parametrize("size", [0, 0x7FFFF024, 0xFFFFFFFF])
def test_wav_from_a_pipe_does_not_know_its_length_and_is_read(tmp_path, size):
    path = wav(tmp_path / "a.wav", speech(1.0))
    data = bytearray(path.read_bytes())
    at = data.find(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    path.write_bytes(data)
    assert read(path).seconds == 1.0


def test_mp3_without_a_frame_count_is_read_and_not_measured_against_a_guess(tmp_path):
    path = tmp_path / "a.mp3"
    data = encoded(speech(2.0, 44_100), 44_100, "libmp3lame", "mp3")
    path.write_bytes(data.replace(b"Xing", b"    ").replace(b"Info", b"    "))
    assert read(path).seconds == pytest.approx(2.0, abs=0.1)


def test_what_only_libsndfile_reads_is_read(tmp_path):
    path = wav(tmp_path / "a.mat", speech(1.0), format="MAT5", subtype="FLOAT")
    recording = read(path)
    assert (recording.rate, recording.seconds) == (16_000, 1.0)
    np.testing.assert_array_equal(recording.speech, speech(1.0))


def test_sound_at_16_khz_is_taken_as_it_is(tmp_path):
    path = wav(tmp_path / "a.wav", speech(1.0), subtype="FLOAT")
    np.testing.assert_array_equal(read(path).speech, speech(1.0))


def test_channels_are_averaged_and_not_summed(tmp_path):
    one, other = speech(1.0, seed=1), speech(1.0, seed=2)
    path = wav(tmp_path / "a.wav", np.stack([one, other, one], 1), subtype="FLOAT")
    np.testing.assert_allclose(read(path).speech, (2 * one + other) / 3, atol=1e-7)


def test_streaming_resampler_equals_whole_file_soxr(tmp_path):
    samples = speech(3.0, 44_100)
    path = wav(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    np.testing.assert_array_equal(read(path).speech, soxr.resample(samples, 44_100, 16_000, quality="HQ"))


def test_reading_twice_gives_the_same_bits(tmp_path):
    path = tmp_path / "a.m4a"
    path.write_bytes(encoded(speech(2.0, 44_100), 44_100, "aac", "ipod"))
    one, other = read(path), read(path)
    assert one.sha256 == other.sha256
    np.testing.assert_array_equal(one.speech, other.speech)


def test_telephone_sound_is_warned_about(tmp_path):
    assert "8000 Hz" in read(wav(tmp_path / "a.wav", speech(1.0, 8000), 8000)).warnings[0]
    assert read(wav(tmp_path / "b.wav", speech(1.0))).warnings == []


def test_missing_empty_and_wrong_recordings_are_row_errors(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is not sound")
    assert rule_of(tmp_path / "no.wav") == "no such file"
    assert rule_of(tmp_path / "empty.wav") == "is an empty file"
    assert rule_of(tmp_path / "text.wav") == "is not a recording that FFmpeg or libsndfile reads"


def test_file_without_an_audio_stream_is_a_row_error(tmp_path):
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        output.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        output.mux(stream.encode(None))
    (tmp_path / "a.mp4").write_bytes(buffer.getvalue())
    assert rule_of(tmp_path / "a.mp4") == "holds no sound"


@pytest.mark.parametrize("kind", ["m3u8", "ffconcat"])
def test_playlist_does_not_open_other_files(tmp_path, kind):
    other = wav(tmp_path / "secret.wav", speech(1.0))
    text = {
        "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{other}\n#EXT-X-ENDLIST\n",
        "ffconcat": "ffconcat version 1.0\nfile secret.wav\n",
    }[kind]
    (tmp_path / f"a.{kind}").write_text(text)
    assert "read" in rule_of(tmp_path / f"a.{kind}")


@pytest.mark.parametrize("samples", [np.zeros(16_000), np.full(16_000, 1e-4)])
def test_silence_throughout_is_a_row_error(tmp_path, samples):
    assert "silent throughout" in rule_of(wav(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_channels_that_cancel_are_silent(tmp_path):
    samples = speech(1.0)
    assert "mean of its channels" in rule_of(wav(tmp_path / "a.wav", np.stack([samples, -samples], 1)))


@pytest.mark.parametrize(("samples", "rate"), [(639, 16_000), (1, 48_000)])
def test_less_than_one_frame_of_sound_is_a_row_error(tmp_path, samples, rate):
    assert "shorter than one frame" in rule_of(wav(tmp_path / "a.wav", np.full(samples, 0.5), rate))


def test_more_channels_than_can_be_delivered_are_a_row_error(tmp_path):
    path = wav(tmp_path / "a.wav", np.tile(speech(1.0)[:, None], (1, 9)))
    assert rule_of(path) == "has 9 channels; the finished file can carry 8"


def test_one_frame_of_sound_is_enough(tmp_path):
    assert len(read(wav(tmp_path / "a.wav", np.full(640, 0.5))).speech) == 640


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers_are_a_row_error(tmp_path, bad):
    samples = speech(1.0)
    samples[5000] = bad
    assert "not numbers" in rule_of(wav(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_recording_is_not_held_at_its_own_rate(tmp_path):
    seconds, rate, channels = 30, 96_000, 4
    path = wav(tmp_path / "a.wav", np.tile(speech(seconds, rate)[:, None], (1, channels)), rate)
    tracemalloc.start()
    try:
        recording = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < recording.speech.nbytes * 4
    assert peak < seconds * rate * channels * 4 / 6


def test_soundfile_and_ffmpeg_agree(tmp_path):
    path = wav(tmp_path / "a.flac", speech(1.0))
    np.testing.assert_array_equal(read(path).speech, soundfile.read(path, dtype="float32")[0])


@pytest.mark.parametrize("container", ["matroska", "webm", "avi"])
def test_cut_short_sound_of_a_video_file_is_a_row_error(tmp_path, container):
    codecs = {"matroska": ("mpeg4", "aac"), "webm": ("libvpx", "libopus"), "avi": ("mpeg4", "mp3")}
    path = tmp_path / "a.video"
    with av.open(str(path), "w", format=container) as output:
        picture: Any = output.add_stream(
            codecs[container][0], rate=25, width=64, height=64, pix_fmt="yuv420p"
        )
        heard_as: Any = output.add_stream(codecs[container][1], rate=48_000, layout="mono")
        for number in range(100):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number, np.uint8), format="rgb24")
            output.mux(picture.encode(frame))
            heard = av.AudioFrame.from_ndarray(speech(0.04, 48_000, seed=number)[None], "fltp", "mono")
            heard.sample_rate, heard.pts = 48_000, 1920 * number
            output.mux(heard_as.encode(heard))
        output.mux(picture.encode())
        output.mux(heard_as.encode())
    assert sound.read(str(path)).seconds == pytest.approx(4, abs=0.1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(RowError, match="cut short"):
        sound.read(str(path))


@pytest.mark.parametrize("form", ["W64", "CAF"])
def test_cut_short_w64_and_caf_are_row_errors(tmp_path, form):
    path = wav(tmp_path / "a.bin", speech(2), format=form, subtype="PCM_16")
    assert sound.read(str(path)).seconds == 2
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(RowError, match="cut short"):
        sound.read(str(path))


def test_samples_far_beyond_full_scale_are_a_row_error(tmp_path):
    samples = speech(1)
    samples[100] = 1e30
    path = wav(tmp_path / "a.wav", samples, subtype="FLOAT")
    with pytest.raises(RowError, match="full scale is 1"):
        sound.read(str(path))
