import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from stages import prepare
from stages.identity import delivery_id
from stages.types import RowError
from tests.stages.media import ASTRONAUT, lesson, plain_picture, speech, wav

SHORT: dict[str, Any] = {
    "segment_seconds": 8.0,
    "cut_search_seconds": 1.5,
    "audio_context_seconds": 2.0,
    "crop": "none",
}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return plain_picture(tmp_path_factory.mktemp("portrait") / "a.png", 128, 128)


@pytest.fixture
def ids(picture, tmp_path):
    """Identities of a lesson's segments."""

    def ids(samples=None, weights="w", **changes):
        path = wav(tmp_path / "a.wav", speech(20) if samples is None else samples, subtype="FLOAT")
        return [
            segment.id
            for segment in prepare.check(lesson(picture, path, **SHORT | changes), weights).segments
        ]

    return ids


def test_a_lesson_from_files_to_what_is_rendered(tmp_path):
    audio = wav(tmp_path / "a.wav", speech(3.0, 44_100), 44_100)
    row = lesson(ASTRONAUT, audio)
    prepared = prepare.check(row, "w")
    assert (prepared.samples, prepared.frames) == (48_000, 75)
    assert (prepared.source_rate, prepared.source_channels, prepared.source_seconds) == (44_100, 1, 3.0)
    assert prepared.sound_seconds == 3.0
    (segment,) = prepared.segments
    assert (segment.first_block, segment.end_block) == (0, 7)
    assert (segment.window_start, segment.window_end) == (0, 48_000)
    assert prepared.warnings == ()
    assert prepare.load_portrait(row, prepared).shape == (128, 128, 3)
    assert prepare.load_speech(row, prepared).shape == (48_000,)


def test_frames_are_those_of_the_16_khz_clock(picture, tmp_path):
    for samples, frames in ((640, 1), (641, 2), (16_000, 25), (16_001, 26)):
        audio = wav(tmp_path / "a.wav", np.full(samples, 0.5))
        assert prepare.check(lesson(picture, audio, **SHORT), "w").frames == frames


def test_num_clip_shortens_picture_and_sound_and_says_so(picture, tmp_path):
    audio = wav(tmp_path / "a.wav", speech(10.0))
    row = lesson(picture, audio, **SHORT | {"num_clip": 2})
    prepared = prepare.check(row, "w")
    assert (prepared.frames, prepared.samples) == (93, 93 * 640)
    assert prepared.segments[-1].end_block == 8
    assert (prepared.source_seconds, prepared.sound_seconds) == (10.0, 93 / 25)
    assert "num_clip=2 renders 3.72 of 10.00 s" in prepared.warnings[0]
    assert len(prepare.load_speech(row, prepared)) == prepared.samples


def test_num_clip_beyond_the_recording_changes_nothing(picture, tmp_path):
    audio = wav(tmp_path / "a.wav", speech(3.0))
    whole = prepare.check(lesson(picture, audio, **SHORT), "w")
    assert prepare.check(lesson(picture, audio, **SHORT | {"num_clip": 99}), "w") == whole


def test_warnings_of_both_files_are_collected(tmp_path):
    small = plain_picture(tmp_path / "a.png", 100, 100)
    audio = wav(tmp_path / "a.wav", speech(1.0, 8000), 8000)
    notes = prepare.check(lesson(small, audio, crop="none"), "w").warnings
    assert [note.split(":")[0] for note in notes] == ["image", "audio"]


def test_broken_setting_is_a_row_error(picture, tmp_path):
    audio = wav(tmp_path / "a.wav", speech(1.0))
    with pytest.raises(RowError) as caught:
        prepare.check(lesson(picture, audio, infer_frames=50), "w")
    assert (caught.value.field, caught.value.value) == ("infer_frames", "50")


def test_recording_that_changed_after_the_check_is_a_row_error(picture, tmp_path):
    row = lesson(picture, wav(tmp_path / "a.wav", speech(1.0)), **SHORT)
    prepared = prepare.check(row, "w")
    wav(tmp_path / "a.wav", speech(1.0, seed=1))
    with pytest.raises(RowError, match="has changed"):
        prepare.load_speech(row, prepared)


def test_long_lesson_is_cut_into_chained_segments(ids):
    chain = ids()
    assert len(set(chain)) == len(chain) >= 2
    assert ids() == chain


@given(st.floats(6, 30), st.floats(0.05, 20), st.integers(0, 9))
@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_appended_sound_changes_only_the_last_segment(ids, seconds, more, seed):
    whole = speech(seconds + more, seed=seed)
    before, after = ids(whole[: round(seconds * 16_000)]), ids(whole)
    assert after[: len(before) - 1] == before[:-1]
    assert before[-1] not in after


def test_change_in_the_beginning_changes_the_whole_chain(ids):
    samples = speech(20)
    before = ids(samples)
    samples[100] += 0.1
    assert not set(before) & set(ids(samples))


def test_independent_segments_know_nothing_of_those_before(ids):
    samples = speech(30)
    before = ids(samples, continuity="independent")
    samples[100] += 0.1
    after = ids(samples, continuity="independent")
    assert before[0] != after[0]
    assert before[2:] == after[2:] != []


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "other"},
        {"base_seed": 1},
        {"sample_steps": 3},
        {"crf": 20},
        {"encoder_threads": 2},
        {"reference": "keep"},
        {"lead_frames": 3},
        {"audio_context_seconds": 2.5},
        {"dtype": "bfloat16"},
        {"vae_dtype": "bfloat16"},
        {"attention_backend": "flash", "device": "cuda"},
        {"audio_encoder": "other"},
        {"lora_alpha": 32.0},
        {"size": "64*64"},
    ],
)
def test_identity_changes_with_what_determines_the_bytes(ids, change):
    assert not set(ids()) & set(ids(**change))


@pytest.mark.parametrize(
    "change",
    [{"num_groups": 2}, {"threads": 4}, {"device": "cuda"}, {"output_name": "x.mp4"}, {"loudness": "-16"}],
)
def test_identity_does_not_change_with_what_does_not(ids, change):
    assert ids() == ids(**change)


def test_identity_knows_prompt_and_portrait_but_not_lesson_and_row(picture, tmp_path):
    row = lesson(picture, wav(tmp_path / "a.wav", speech(2.0)), **SHORT)
    other_picture = plain_picture(tmp_path / "b.png", 130, 128)

    def first_id(row):
        return prepare.check(row, "w").segments[0].id

    assert first_id(replace(row, lesson_id="b", number=7, extras={"x_a": "1"})) == first_id(row)
    assert first_id(replace(row, prompt="Another.")) != first_id(row)
    assert first_id(replace(row, image=str(other_picture))) != first_id(row)


def test_delivery_knows_sound_settings_but_not_its_name(picture, tmp_path):
    row = lesson(picture, wav(tmp_path / "a.wav", speech(2.0)), **SHORT)
    prepared = prepare.check(row, "w")

    def delivered(**changes):
        return delivery_id(prepared, replace(row.settings, **changes))

    assert delivered(output_name="other.mp4", num_groups=3) == delivered()
    assert len({delivered(), delivered(loudness="-16"), delivered(audio_bitrate=96_000)}) == 3
    assert delivery_id(replace(prepared, sound_sha256="0"), row.settings) != delivered()


def test_preparing_imports_no_torch():
    code = (
        "import sys, stages.prepare, stages.manifest; print({'torch', 'ray', 'diffusers'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_prompt_longer_than_the_model_takes_is_a_warning(tmp_path, weights):
    long = replace(lesson(ASTRONAUT, wav(tmp_path / "a.wav", speech(1))), prompt="studio " * 300)
    long = replace(long, settings=replace(long.settings, ckpt_dir=str(weights)))
    (warning,) = prepare.check(long, "w").warnings
    assert "prompt: its last 237 tokens are not used" in warning


def test_guidance_with_a_distilled_lora_is_a_warning(tmp_path):
    chosen = lesson(
        ASTRONAUT, wav(tmp_path / "a.wav", speech(1)), sample_guide_scale=2.0, lora_path_dmd="lora"
    )
    assert any("does not want guidance" in warning for warning in prepare.check(chosen, "w").warnings)
