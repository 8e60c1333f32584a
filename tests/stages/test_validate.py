import math
from dataclasses import fields

import pytest
from omegaconf import MISSING

from conf.schema import Settings
from conf.spec import TextEncoderSpec
from stages import validate as rules
from stages.validate import validate
from tests.stages.media import settings


def test_good_settings_break_no_rule():
    assert validate(settings()) == []


def test_missing_settings_are_named():
    broken = validate(settings(size=MISSING, dtype=MISSING))
    assert [(field, rule) for field, _, rule in broken] == [
        ("size", "has no default and must be given"),
        ("dtype", "has no default and must be given"),
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", "704:384"),
        ("size", "0*0"),
        ("size", "99999*99999"),
        ("aspect", "4:3"),
        ("crop", "head"),
        ("crop", "0,0,0,10"),
        ("crop", "-1,0,10,10"),
        ("crop", "1,2,3"),
        ("infer_frames", 50),
        ("infer_frames", 0),
        ("num_clip", 0),
        ("segment_seconds", -1.0),
        ("segment_seconds", math.nan),
        ("audio_context_seconds", math.inf),
        ("lead_frames", 4),
        ("sample_solver", "heun"),
        ("sample_steps", 0),
        ("sample_shift", 0.0),
        ("sample_guide_scale", -1.0),
        ("negative_prompt", "blurry"),
        ("base_seed", -1),
        ("reference", "last"),
        ("continuity", "none"),
        ("crf", 52),
        ("crf", -1),
        ("encoder_preset", "fastest"),
        ("encoder_threads", 0),
        ("audio_bitrate", 192),
        ("loudness", "loud"),
        ("loudness", "nan"),
        ("loudness", "3"),
        ("output_name", "{row}.mp4"),
        ("output_name", "{lesson_id}.mkv"),
        ("output_name", "{lesson_id.mp4"),
        ("device", "gpu"),
        ("dtype", "float16"),
        ("vae_dtype", "half"),
        ("attention_backend", "xformers"),
        ("lora_rank", 0),
        ("num_groups", 0),
        ("threads", 0),
        ("decode_gpus", 1.5),
        ("max_tries", 0),
        ("placement_timeout", 0.0),
        ("max_image_pixels", 0),
    ],
)
def test_bad_value_breaks_a_rule_of_its_own_field(field, value):
    broken = validate(settings(**{field: value}))
    assert [name for name, _, _ in broken][:1] == [field]
    assert all(shown == str(value) and rule for _, shown, rule in broken)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop", "none"),
        ("crop", " 1, 2, 3, 4 "),
        ("aspect", "9:16"),
        ("loudness", "-16"),
        ("segment_seconds", 0.0),
        ("num_clip", None),
        ("output_name", "{x_course}/{lesson_id}.mp4"),
        ("decode_gpus", 2.0),
        ("lead_frames", 3),
    ],
)
def test_good_values_break_none(field, value):
    assert validate(settings(**{field: value})) == []


def test_search_must_be_at_most_a_quarter_of_a_segment():
    assert validate(settings(segment_seconds=19.9, cut_search_seconds=5.0))[0][0] == "cut_search_seconds"
    assert validate(settings(segment_seconds=20.0, cut_search_seconds=5.0)) == []


def test_search_must_meet_a_clip_boundary():
    assert "clip boundary" in validate(settings(cut_search_seconds=0.9))[0][2]
    assert validate(settings(cut_search_seconds=0.9, segment_seconds=0.0)) == []


def test_negative_prompt_is_fine_with_guidance():
    assert validate(settings(negative_prompt="blurry", sample_guide_scale=4.5)) == []


def test_nested_fields_are_checked():
    assert validate(settings(text_encoder=TextEncoderSpec(dtype="int8")))[0][0] == "text_encoder.dtype"


def test_every_number_has_a_rule():
    numbers = {
        field.name for field in fields(Settings) if field.type in (int, float, int | None, float | None)
    }
    assert numbers - set(rules._RANGES) - set(rules._ABOVE_ZERO) == set()
