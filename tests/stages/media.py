"""Small portraits and recordings for the tests of the first stage."""

import io
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import soundfile
from PIL import Image

from conf.schema import Settings
from stages.types import Lesson

ASTRONAUT = Path(__file__).parents[2] / "examples" / "astronaut.jpg"


def settings(**changes: Any) -> Settings:
    given = {
        "size": "128*128",
        "ckpt_dir": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "vae_dtype": "float32",
    }
    return Settings(**(given | changes))


def lesson(image: Path | str, audio: Path | str, lesson_id: str = "a", **changes: Any) -> Lesson:
    return Lesson(1, lesson_id, str(image), str(audio), "A teacher speaks.", settings(**changes))


def speech(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Noise in syllables, float32."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=time.size)
    return (0.2 * noise * np.abs(np.sin(2 * np.pi * 1.7 * time))).clip(-1, 1).astype(np.float32)


def wav(path: Path, samples: np.ndarray, rate: int = 16_000, **options: Any) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


def encoded(samples: np.ndarray, rate: int, codec: str, container: str) -> bytes:
    """A mono recording as FFmpeg writes it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = cast(av.AudioStream, output.add_stream(codec, rate=rate, layout="mono"))
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(
            stream.codec_context.format, "mono", rate, stream.codec_context.frame_size or 1024
        )
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def plain_picture(path: Path, width: int = 96, height: int = 64, mode: str = "RGB") -> Path:
    """A faceless gradient."""
    ramp = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
    Image.fromarray(ramp).convert(mode).save(path)
    return path
