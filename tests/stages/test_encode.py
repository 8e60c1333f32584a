"""Frames -> H.264: what is in the file, and that it depends on nothing but frames and settings."""

import io
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from stages import encode
from stages.encode import SegmentEncoder

WIDTH, HEIGHT = 96, 64


def moving_picture(frames, seed=0):
    """uint8 [frames, HEIGHT, WIDTH, 3]: smooth waves that drift, so that B-frames and motion are worth it."""
    t = np.arange(frames)[:, None, None]
    y, x = np.linspace(0, 6, HEIGHT)[None, :, None], np.linspace(0, 9, WIDTH)[None, None, :]
    waves = [np.sin(x + t / 5 + seed) + 0 * y, np.cos(y - t / 7) + 0 * x, np.sin(x * y / 4 + t / 3 + seed)]
    return ((np.stack(waves, axis=-1) + 1) * 127).astype(np.uint8)


def encoded(frames_THWC, crf=18, preset="veryfast", threads=1):
    encoder = SegmentEncoder(frames_THWC.shape[2], frames_THWC.shape[1], crf, preset, threads)
    encoder.write(frames_THWC)
    return encoder.finish()


def decoded(data):
    """All pictures of a file, as planes yuv420p."""
    with av.open(io.BytesIO(data), "r") as container:
        return [frame.to_ndarray() for frame in container.decode(video=0)]


@pytest.mark.parametrize("frames", [1, 2, 3, 50])
def test_every_frame_is_in_the_file_at_25_frames_per_second(frames):
    with av.open(io.BytesIO(encoded(moving_picture(frames))), "r") as container:
        times = [frame.time for frame in container.decode(video=0)]
        assert [stream.type for stream in container.streams] == ["video"]
    assert times == pytest.approx([k / 25 for k in range(frames)])


def test_pictures_look_like_the_frames():
    frames = moving_picture(12)
    with av.open(io.BytesIO(encoded(frames, crf=10)), "r") as container:
        for frame, expected in zip(container.decode(video=0), frames, strict=True):
            seen = frame.to_ndarray(format="rgb24", src_colorspace="itu709")
            assert np.abs(seen.astype(int) - expected).mean() < 6


@pytest.mark.parametrize(
    ("rgb", "yuv"),
    [((255, 0, 0), (63, 102, 240)), ((0, 255, 0), (173, 42, 26)), ((255, 255, 255), (235, 128, 128))],
)
def test_colours_are_bt709_in_limited_range(rgb, yuv):
    """Expected values from ITU-R BT.709, section 3 and 4, rounded."""
    frame = np.broadcast_to(np.array(rgb, np.uint8), (1, HEIGHT, WIDTH, 3))
    picture = decoded(encoded(frame, crf=1))[0]
    chroma = picture[HEIGHT:].reshape(2, -1)
    means = picture[:HEIGHT].mean(), chroma[0].mean(), chroma[1].mean()
    assert means == pytest.approx(yuv, abs=1.5)


def test_colours_are_tagged_so_that_players_need_not_guess():
    with av.open(io.BytesIO(encoded(moving_picture(2))), "r") as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_range, context.color_primaries, context.color_trc
        assert (context.name, context.pix_fmt, tags) == ("h264", "yuv420p", (1, 1, 1, 1))


def test_writing_in_pieces_changes_nothing():
    frames = moving_picture(25)
    encoder = SegmentEncoder(WIDTH, HEIGHT, 18, "veryfast", 1)
    for piece in (frames[:1], frames[1:1], frames[1:13], frames[13:]):
        encoder.write(piece)
    assert encoder.finish() == encoded(frames)


@pytest.mark.parametrize("threads", [1, 2])
def test_equal_frames_give_equal_bytes_in_every_process(threads):
    script = (
        "import hashlib\nfrom tests.stages.test_encode import encoded, moving_picture\n"
        f"print(hashlib.sha256(encoded(moving_picture(80), threads={threads})).hexdigest())"
    )
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert len({run.stdout for run in runs}) == 1


def test_processors_without_avx2_leave_the_macroblock_tree_out(monkeypatch):
    monkeypatch.setattr(encode.platform, "machine", lambda: "aarch64")
    frames = moving_picture(30)
    assert encoded(frames) == encoded(frames)
    assert "asm" not in encode.x264_params()


def test_crf_and_preset_reach_the_encoder():
    frames = moving_picture(30)
    assert len(encoded(frames, crf=40)) < len(encoded(frames, crf=10)) / 2
    assert encoded(frames, preset="ultrafast") != encoded(frames, preset="veryfast")


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="frames=0"):
        SegmentEncoder(WIDTH, HEIGHT, 18, "veryfast", 1).finish()


@pytest.mark.parametrize(("width", "height"), [(95, 64), (96, 63), (0, 64)])
def test_odd_or_empty_sizes_are_refused(width, height):
    with pytest.raises(ValueError, match=f"size={width}x{height}"):
        SegmentEncoder(width, height, 18, "veryfast", 1)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, HEIGHT, WIDTH, 3), np.float32),
        np.zeros((1, WIDTH, HEIGHT, 3), np.uint8),
        np.zeros((HEIGHT, WIDTH, 3), np.uint8),
    ],
)
def test_frames_of_another_shape_or_type_are_refused(frames):
    with pytest.raises(ValueError, match="must be uint8"):
        SegmentEncoder(WIDTH, HEIGHT, 18, "veryfast", 1).write(frames)
