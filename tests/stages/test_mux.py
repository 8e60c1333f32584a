"""Segments and a recording -> one MP4: exact, whole or not there, and the same every time."""

import contextlib
import io
import resource

import av
import numpy as np
import pytest
import soundfile
from pyarrow import fs

from stages import narration
from stages.measure import measure
from stages.mux import MuxError, mux
from stages.narration import measure_loudness, open_narration
from stages.publish import publish, published
from stages.sound import Source
from stages.types import RowError
from tests.stages.test_encode import HEIGHT, WIDTH, decoded, encoded, moving_picture


def tone(seconds, rate=16_000, channels=1, level=0.1):
    """float32 [samples, channels]; channel c is a sine of 200 (c + 1) Hz."""
    t = np.arange(round(seconds * rate)) / rate
    waves = [np.sin(2 * np.pi * 200 * (c + 1) * t) for c in range(channels)]
    return (level * np.stack(waves, axis=1)).astype(np.float32)


def recording(path, seconds, rate=16_000, channels=1, level=0.1, subtype=None):
    soundfile.write(path, tone(seconds, rate, channels, level), rate, subtype=subtype)
    return path


def segments_of(lengths):
    return [io.BytesIO(encoded(moving_picture(length, seed=k))) for k, length in enumerate(lengths)]


def join(folder, lengths, audio, name="lesson.mp4", segments=None, **changes):
    frames = sum(lengths)
    asked = {
        "width": WIDTH,
        "height": HEIGHT,
        "frames": frames,
        "sound_seconds": frames / 25,
        "audio_bitrate": 96_000,
        "loudness": "keep",
    }
    return mux(segments or segments_of(lengths), audio, folder / name, **{**asked, **changes})


def sound_of(path):
    """float32 [samples, channels] of a finished file, without the encoder's padding at the end."""
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray().T for frame in container.decode(audio=0)]
    return np.concatenate(parts)


def loudness_of(path, seconds):
    with path.open("rb") as file:
        return measure_loudness(open_narration(file, path.name, seconds, "keep"))


# ---------------------------------------------------------------- video


def test_ten_seconds_measure_ten_seconds_in_video_sound_and_container(tmp_path):
    measured = join(tmp_path, [100, 150], recording(tmp_path / "a.wav", 10.0))
    assert (measured.video_seconds, measured.sound_seconds, measured.frames) == (10.0, 10.0, 250)
    with av.open(str(tmp_path / "lesson.mp4")) as container:
        assert container.duration == 10_000_000
        assert [stream.start_time for stream in container.streams] == [0, 0]


@pytest.mark.parametrize("lengths", [[1], [25], [1, 1, 1], [30, 1, 2, 3, 4], [1, 2, 40], [48, 48, 7]])
def test_joined_video_is_every_picture_of_every_segment(tmp_path, lengths):
    segments = segments_of(lengths)
    audio = recording(tmp_path / "a.wav", sum(lengths) / 25)
    join(tmp_path, lengths, audio, segments=segments)
    joined = tmp_path / "lesson.mp4"
    expected = [picture for segment in segments for picture in decoded(segment.getvalue())]
    found = decoded(joined.read_bytes())
    assert len(found) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    with av.open(str(joined)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([k / 25 for k in range(len(expected))])


def test_segments_may_be_paths_or_fetched_one_by_one(tmp_path):
    files = segments_of([10, 15])
    paths = [tmp_path / f"{k}.mov" for k in range(2)]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file.getvalue())
    audio = recording(tmp_path / "a.wav", 1.0)
    from_paths = join(tmp_path, [10, 15], audio, segments=paths)
    fetched = (io.BytesIO(path.read_bytes()) for path in paths)
    assert join(tmp_path, [10, 15], audio, segments=fetched).sha256 == from_paths.sha256


def test_equal_input_gives_equal_bytes(tmp_path):
    audio = recording(tmp_path / "a.wav", 2.0, rate=44_100, channels=2)
    first = join(tmp_path, [20, 30], audio, "first.mp4", loudness="-16")
    second = join(tmp_path, [20, 30], audio, "second.mp4", loudness="-16")
    assert first == second
    assert (tmp_path / "first.mp4").read_bytes() == (tmp_path / "second.mp4").read_bytes()


def test_index_comes_before_the_media_so_that_playback_starts_at_once(tmp_path):
    join(tmp_path, [25], recording(tmp_path / "a.wav", 1.0))
    data = (tmp_path / "lesson.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


# ---------------------------------------------------------------- sound


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("a.wav", 8_000, 1, "ULAW"),
        ("a.wav", 11_025, 1, "PCM_U8"),
        ("a.wav", 44_100, 2, "PCM_24"),
        ("a.wav", 48_000, 2, "FLOAT"),
        ("a.wav", 96_000, 1, "DOUBLE"),
        ("a.flac", 44_100, 2, "PCM_16"),
        ("a.ogg", 22_050, 1, "VORBIS"),
        ("a.wav", 16_000, 4, "PCM_16"),
        ("a.wav", 48_000, 7, "PCM_32"),
    ],
)
def test_recording_keeps_its_own_rate_and_channels(tmp_path, name, rate, channels, subtype):
    audio = recording(tmp_path / name, 2.0, rate, channels, subtype=subtype)
    measured = join(tmp_path, [50], audio)
    assert (measured.audio_codec, measured.audio_rate, measured.audio_channels) == ("aac", rate, channels)
    assert measured.sound_seconds == pytest.approx(2.0, abs=0.001)
    assert measured.warnings == ()


def test_eight_channels_are_carried(tmp_path, monkeypatch):
    """On their own, because PyAV 18 cannot hand out eight planar channels."""

    @contextlib.contextmanager
    def eight_channels(file, path):
        yield Source(48_000, 8, 1.0, 0.0, iter([tone(1.0, 48_000, 8)]))

    monkeypatch.setattr(narration, "open_source", eight_channels)
    measured = join(tmp_path, [25], io.BytesIO())
    assert (measured.audio_channels, measured.sound_seconds) == (8, 1.0)


def test_every_channel_carries_its_own_sound(tmp_path):
    join(tmp_path, [50], recording(tmp_path / "a.wav", 2.0, 48_000, channels=6), audio_bitrate=384_000)
    spectrum = np.abs(np.fft.rfft(sound_of(tmp_path / "lesson.mp4")[24_000:72_000], axis=0))
    loudest_hz = spectrum.argmax(axis=0)  # 48 000 samples at 48 kHz: one bin per Hz
    assert sorted(loudest_hz[[0, 1, 2, 4, 5]]) == [200, 400, 600, 1000, 1200]


@pytest.mark.parametrize(("codec", "name"), [("libmp3lame", "a.mp3"), ("aac", "a.m4a")])
def test_compressed_recordings_are_delivered_whole(tmp_path, codec, name):
    samples = tone(3.0, 44_100, 2)
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=44_100, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), "fltp", "stereo")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    measured = join(tmp_path, [75], tmp_path / name)
    assert (measured.audio_rate, measured.audio_channels) == (44_100, 2)
    assert measured.sound_seconds == pytest.approx(3.0, abs=0.001)


def test_sound_stays_with_the_picture(tmp_path):
    """A click at 1.0 s of the recording is at 1.0 s of the file: AAC's delay is in the edit list."""
    samples = np.zeros(32_000, np.float32)
    samples[16_000] = 0.9
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    join(tmp_path, [50], tmp_path / "a.wav")
    assert abs(int(np.abs(sound_of(tmp_path / "lesson.mp4")[:, 0]).argmax()) - 16_000) <= 1


def test_sound_that_ends_inside_the_last_frame_is_not_padded(tmp_path):
    measured = join(tmp_path, [25], recording(tmp_path / "a.wav", 0.97), sound_seconds=0.97)
    assert (measured.video_seconds, measured.sound_seconds) == (1.0, 0.97)


def test_num_clip_cuts_the_sound_with_the_video(tmp_path):
    measured = join(tmp_path, [48], recording(tmp_path / "a.wav", 10.0), sound_seconds=1.92)
    assert measured.sound_seconds == 1.92


@pytest.mark.parametrize(("rate", "carried"), [(192_000, 96_000), (10_000, 11_025), (50_000, 48_000)])
def test_rate_that_aac_cannot_carry_is_resampled_with_a_warning(tmp_path, rate, carried):
    measured = join(tmp_path, [50], recording(tmp_path / "a.wav", 2.0, rate))
    assert measured.audio_rate == carried
    assert measured.sound_seconds == pytest.approx(2.0, abs=1 / carried)
    assert measured.warnings == (
        f"audio: AAC cannot carry {rate} Hz, so the sound is resampled to {carried} Hz",
    )
    heard = sound_of(tmp_path / "lesson.mp4")[carried // 2 : carried * 3 // 2, 0]
    assert np.abs(np.fft.rfft(heard)).argmax() == pytest.approx(200, abs=1)


def test_more_than_8_channels_are_a_row_error(tmp_path):
    with pytest.raises(RowError, match="has 9 channels; AAC carries at most 8"):
        join(tmp_path, [25], recording(tmp_path / "a.wav", 1.0, channels=9))


def test_missing_recording_is_a_row_error(tmp_path):
    with pytest.raises(RowError, match="no such file"):
        join(tmp_path, [25], tmp_path / "missing.wav")


# ---------------------------------------------------------------- loudness


def test_kept_loudness_is_the_recordings(tmp_path):
    audio = recording(tmp_path / "a.wav", 4.0)
    join(tmp_path, [100], audio)
    expected = loudness_of(audio, 4.0)[0]
    assert loudness_of(tmp_path / "lesson.mp4", 4.0)[0] == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("target", [-16.0, -30.0])
def test_one_static_gain_reaches_the_asked_loudness(tmp_path, target):
    measured = join(tmp_path, [100], recording(tmp_path / "a.wav", 4.0), loudness=str(target))
    assert loudness_of(tmp_path / "lesson.mp4", 4.0)[0] == pytest.approx(target, abs=0.2)
    assert measured.warnings == ()


def test_gain_stops_short_of_clipping_and_says_so(tmp_path):
    samples = tone(3.98, level=0.05)
    samples[-200] = 0.6  # in what is left after the last whole tenth of a second
    soundfile.write(tmp_path / "a.wav", samples, 16_000)
    measured = join(tmp_path, [100], tmp_path / "a.wav", loudness="-16", sound_seconds=3.98)
    assert len(measured.warnings) == 1
    assert "peaks of -4." in measured.warnings[0]
    assert np.abs(sound_of(tmp_path / "lesson.mp4")).max() < 1


def test_silence_has_no_loudness_to_change(tmp_path):
    measured = join(tmp_path, [25], recording(tmp_path / "a.wav", 1.0, level=0.0), loudness="-16")
    assert "too quiet or too short to measure" in measured.warnings[0]


# ---------------------------------------------------------------- refused


def test_wrong_frame_count_is_refused(tmp_path):
    with pytest.raises(MuxError, match="frames=25: must be 26"):
        join(tmp_path, [25], recording(tmp_path / "a.wav", 1.0), frames=26)
    assert not (tmp_path / "lesson.mp4").exists()


def test_wrong_size_is_refused(tmp_path):
    with pytest.raises(MuxError, match="size=96x64: must be 96x96"):
        join(tmp_path, [25], recording(tmp_path / "a.wav", 1.0), height=96)


@pytest.mark.parametrize(("seconds", "frames"), [(0.95, 25), (1.05, 25)])
def test_video_and_sound_that_end_apart_are_refused(tmp_path, seconds, frames):
    audio = recording(tmp_path / "a.wav", seconds)
    with pytest.raises(MuxError, match=f"sound at {seconds:.3f} s: must be within 40 ms"):
        join(tmp_path, [frames], audio, sound_seconds=seconds)


def test_no_segments_are_refused(tmp_path):
    with pytest.raises(MuxError, match="segments=0"):
        join(tmp_path, [], recording(tmp_path / "a.wav", 1.0))


@pytest.mark.parametrize(("preset", "height"), [("ultrafast", HEIGHT), ("veryfast", HEIGHT // 2)])
def test_segments_of_differing_parameters_are_refused(tmp_path, preset, height):
    other = encoded(moving_picture(25)[:, :height], preset=preset)
    segments = [*segments_of([25]), io.BytesIO(other)]
    with pytest.raises(MuxError, match="segment 1: encoded as"):
        join(tmp_path, [25, 25], recording(tmp_path / "a.wav", 2.0), segments=segments)


def test_segment_with_a_missing_frame_is_refused(tmp_path):
    whole, short = io.BytesIO(encoded(moving_picture(25))), io.BytesIO()
    with av.open(whole, "r") as source, av.open(short, "w", format="mov") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(source.demux(video=0)):
            if packet.pts is not None and index != 10:
                packet.stream = stream
                target.mux(packet)
    with pytest.raises(MuxError, match="segment 0: 24 frames on a clock of 25"):
        join(tmp_path, [25], recording(tmp_path / "a.wav", 1.0), segments=[short])


def test_damaged_segment_is_refused(tmp_path):
    damaged = io.BytesIO(encoded(moving_picture(25))[:300])
    with pytest.raises((ValueError, OSError)):
        join(tmp_path, [25], recording(tmp_path / "a.wav", 1.0), segments=[damaged])
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


# ---------------------------------------------------------------- published whole


@contextlib.contextmanager
def full_disk(room):
    """No file may grow beyond `room` bytes. Not a fixture: pytest itself writes to a file before it ends
    those."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 5_000])
def test_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, room):
    audio, segments = recording(tmp_path / "a.wav", 2.0), segments_of([50])
    out = tmp_path / "out"
    join(out, [50], audio, segments=segments)
    before = (out / "lesson.mp4").read_bytes()
    with pytest.raises(OSError, match="too large"), full_disk(room):
        join(out, [50], audio, segments=segments, audio_bitrate=64_000)
    assert [path.name for path in out.iterdir()] == ["lesson.mp4"]
    assert (out / "lesson.mp4").read_bytes() == before


def test_output_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        join(tmp_path / "file", [25], recording(tmp_path / "a.wav", 1.0))


def test_existing_output_is_replaced_in_one_step(tmp_path):
    audio, out = recording(tmp_path / "a.wav", 1.0), tmp_path / "数学 第一课.mp4"
    join(tmp_path, [25], audio, out.name)
    with out.open("rb") as reader:
        old = out.read_bytes()
        join(tmp_path, [25], audio, out.name, loudness="-30")
        assert reader.read() == old
    assert out.read_bytes() != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", out.name]


def test_published_file_can_be_read_by_others(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with published(tmp_path / "new") as part:
        part.write_bytes(b"1")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_upload_arrives_whole_on_any_filesystem(tmp_path):
    (tmp_path / "local").write_bytes(b"lesson" * 100_000)
    for filesystem in (fs.LocalFileSystem(), fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())):
        path = f"{tmp_path}/copy" if filesystem.type_name == "local" else "copy"
        publish(tmp_path / "local", filesystem, path)
        assert (tmp_path / "copy").read_bytes() == (tmp_path / "local").read_bytes()
        (tmp_path / "copy").unlink()


@pytest.mark.parametrize("subtree", [False, True])
def test_failed_upload_leaves_nothing_under_the_name(tmp_path, subtree):
    (tmp_path / "local").write_bytes(b"lesson" * 1_000)
    filesystem = fs.SubTreeFileSystem("/", fs.LocalFileSystem()) if subtree else fs.LocalFileSystem()
    with pytest.raises(OSError, match="too large"), full_disk(1_000):
        publish(tmp_path / "local", filesystem, f"{tmp_path}/copy")
    assert [path.name for path in tmp_path.iterdir()] == ["local"]


def test_measured_is_what_an_independent_look_finds(tmp_path):
    measured = join(tmp_path, [25], recording(tmp_path / "a.wav", 1.0))
    assert measured == measure(tmp_path / "lesson.mp4")
