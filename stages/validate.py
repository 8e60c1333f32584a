"""The rules that every setting's value must keep. No file is looked at."""

import math
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from omegaconf import MISSING

from conf.schema import Settings
from stages.framing import parse_aspect, parse_crop
from stages.size import parse_size
from stages.types import FPS, FRAMES_PER_BLOCK, RowError

_PLACE = re.compile(r"lesson_id|x_[^.\[\]{}]+")
"""What may stand between braces in `output_name`: a column as it is, nothing that Python would evaluate."""

Violation = tuple[str, str, str]
"""Field, value, rule."""

_WORDS: dict[str, tuple[str, ...]] = {
    "sample_solver": ("euler", "unipc", "dpm++"),
    "reference": ("first_latent", "keep", "first_latent_and_motion"),
    "continuity": ("carry", "independent"),
    "encoder_preset": (
        *("ultrafast", "superfast", "veryfast", "faster", "fast"),
        *("medium", "slow", "slower", "veryslow", "placebo"),
    ),
    "device": ("cuda", "cpu"),
    "dtype": ("bfloat16", "float32"),
    "vae_dtype": ("bfloat16", "float32"),
    "attention_backend": ("sdpa", "flash", "cudnn", "sage"),
    "text_encoder.dtype": ("bfloat16", "float32"),
    "text_encoder.device": ("cuda", "cpu"),
}

_RANGES: dict[str, tuple[float, float]] = {
    "max_image_pixels": (4096, math.inf),
    "num_clip": (1, math.inf),
    "segment_seconds": (0, 86_400),
    "cut_search_seconds": (0, 86_400),
    "audio_context_seconds": (0, 86_400),
    "lead_frames": (0, 3),
    "infer_frames": (FRAMES_PER_BLOCK, math.inf),
    "sample_steps": (1, 1000),
    "sample_guide_scale": (0, 100),
    "base_seed": (0, 2**63 - 1),
    "crf": (0, 51),
    "encoder_threads": (1, 128),
    "audio_bitrate": (8_000, 512_000),
    "lora_rank": (1, math.inf),
    "num_groups": (1, math.inf),
    "num_decoders": (1, math.inf),
    "num_conditioners": (1, math.inf),
    "prepare_workers": (1, math.inf),
    "decode_slots": (1, math.inf),
    "window_blocks": (1, math.inf),
    "threads": (1, math.inf),
    "denoise_cpus": (0, math.inf),
    "decode_cpus": (0, math.inf),
    "condition_cpus": (0, math.inf),
    "prepare_cpus": (0, math.inf),
    "denoise_gpus": (0, math.inf),
    "decode_gpus": (0, math.inf),
    "condition_gpus": (0, math.inf),
    "max_tries": (1, math.inf),
}

_MUCH = 1e6

_ABOVE_ZERO = ("sample_shift", "lora_alpha", "placement_timeout", "progress_seconds")


def validate(settings: Settings) -> list[Violation]:
    """All rules that these settings break, none if they are fine."""
    missing = [field.name for field in fields(settings) if getattr(settings, field.name) == MISSING]
    broken = [(name, "", "has no default and must be given") for name in missing]
    rules = (_words, _ranges, _parsed, _sound_rules, _generation_rules, _run_rules, _delivery_rules)
    return broken + [item for rule in rules for item in rule(settings) if item[0] not in missing]


def _words(settings: Settings) -> Iterator[Violation]:
    for name, words in _WORDS.items():
        if (value := _value(settings, name)) not in words:
            yield name, str(value), f"must be one of {', '.join(words)}"


def _ranges(settings: Settings) -> Iterator[Violation]:
    for name, (low, high) in _RANGES.items():
        value = _value(settings, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            rule = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            yield name, str(value), f"must be {rule}"
    for name in _ABOVE_ZERO:
        if not 0 < (value := _value(settings, name)) < _MUCH:
            yield name, str(value), f"must be above 0 and below {_MUCH:g}"


def _parsed(settings: Settings) -> Iterator[Violation]:
    parsers: dict[str, Callable[[str], Any]] = {
        "size": parse_size,
        "crop": parse_crop,
        "aspect": parse_aspect,
    }
    for name, parse in parsers.items():
        try:
            parse(_value(settings, name))
        except RowError as error:
            yield error.field, error.value, error.rule


def _sound_rules(settings: Settings) -> Iterator[Violation]:
    search, segment = settings.cut_search_seconds, settings.segment_seconds
    if not 0 < segment < math.inf:
        return
    if search > segment / 4:
        yield "cut_search_seconds", str(search), f"must be at most a quarter of segment_seconds={segment}"
    if not 2 * search >= settings.infer_frames / FPS:
        yield (
            "cut_search_seconds",
            str(search),
            f"must be at least half a clip ({settings.infer_frames / FPS / 2} s at "
            f"infer_frames={settings.infer_frames}), so that every search meets a clip boundary",
        )


def _generation_rules(settings: Settings) -> Iterator[Violation]:
    if settings.infer_frames % FRAMES_PER_BLOCK:
        yield "infer_frames", str(settings.infer_frames), f"must be a multiple of {FRAMES_PER_BLOCK}"
    if 0 < settings.sample_guide_scale <= 1:
        scale = str(settings.sample_guide_scale)
        yield (
            "sample_guide_scale",
            scale,
            "must be 0, which is off, or above 1; up to 1 nothing changes",
        )
    if settings.negative_prompt and settings.sample_guide_scale == 0:
        yield "negative_prompt", settings.negative_prompt, "has no effect with sample_guide_scale=0"


def _run_rules(settings: Settings) -> Iterator[Violation]:
    if settings.attention_backend != "sdpa" and settings.device != "cuda":
        yield "attention_backend", settings.attention_backend, "needs device=cuda; a CPU has sdpa"
    for name in ("denoise_gpus", "decode_gpus", "condition_gpus"):
        value = _value(settings, name)
        if settings.device == "cuda" and not value:
            yield (
                name,
                str(value),
                "must be above 0 with device=cuda: Ray hides all GPUs otherwise",
            )
        if value > 1 and value % 1:
            yield name, str(value), "must be a whole number above 1; only one GPU can be shared"


def _delivery_rules(settings: Settings) -> Iterator[Violation]:
    if settings.loudness != "keep" and not _is_lufs(settings.loudness):
        yield "loudness", settings.loudness, "must be keep, or LUFS from -70 to 0 such as -16"
    if rule := _name_rule(settings.output_name):
        yield "output_name", settings.output_name, rule


def _is_lufs(text: str) -> bool:
    try:
        return -70 < float(text) <= 0
    except ValueError:
        return False


def _name_rule(pattern: str) -> str | None:
    try:
        fields = [part[1:] for part in string.Formatter().parse(pattern)]
    except ValueError as error:
        return f"is not a name pattern ({error})"
    for name, form, conversion in fields:
        if name is not None and (not _PLACE.fullmatch(name) or form or conversion):
            return f"may hold {{lesson_id}} and {{x_...}} only, not {{{name}...}}"
    return None if pattern.endswith(".mp4") else "must end in .mp4"


def _value(settings: Settings, name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    return value
