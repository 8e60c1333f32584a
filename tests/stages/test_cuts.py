from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from stages.cuts import blocks_of, cut, frames_of, samples_of_clips, sound_window
from stages.types import kept_frames
from tests.stages.media import settings

SHORT = {"segment_seconds": 8.0, "cut_search_seconds": 1.5, "audio_context_seconds": 2.0}
RATE = 16_000
SHORTEST_REST = 2 * 1.5 + 2


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)


def sample_of(block: int) -> int:
    return max(0, 12 * block - 3) * 640


def test_frames_and_blocks_cover_the_sound_and_no_more():
    assert [frames_of(n) for n in (640, 641, 1280)] == [1, 2, 2]
    assert [blocks_of(n) for n in (1, 9, 10, 21, 22)] == [1, 1, 2, 2, 3]


def test_clips_cover_three_frames_less_than_they_decode():
    samples = samples_of_clips(2, infer_frames=48)
    assert blocks_of(frames_of(samples)) == 8
    assert blocks_of(frames_of(samples + 1)) == 9


def test_zero_never_cuts():
    assert cut(noise(300), settings(segment_seconds=0)) == [0, blocks_of(frames_of(300 * RATE))]


def test_defaults_cut_about_every_minute_at_clip_boundaries():
    speech = noise(250)
    bounds = cut(speech, settings())
    assert 4 <= len(bounds) <= 6
    for before, after in pairwise(bounds[:-1]):
        assert after % 4 == 0
        assert abs(sample_of(after) - sample_of(before) - 60 * RATE) <= 5 * RATE


def test_cut_is_the_quietest_boundary_of_the_window():
    speech = noise(20)
    quiet = 4 * 4
    assert 6.5 * RATE <= sample_of(quiet) <= 9.5 * RATE
    speech[sample_of(quiet) - 1600 : sample_of(quiet) + 1600] *= 0.1
    assert cut(speech, settings(**SHORT))[1] == quiet


def test_no_sound_beyond_the_search_window_is_looked_at():
    speech = noise(20)
    bounds = cut(speech, settings(**SHORT))
    louder = speech.copy()
    louder[round(9.5 * RATE) :] *= 5
    louder[: round(6.5 * RATE)] *= 7
    assert cut(louder, settings(**SHORT))[1] == bounds[1]


@pytest.mark.parametrize("rest", [SHORTEST_REST - 0.1, SHORTEST_REST + 0.1])
def test_short_rest_joins_the_last_segment(rest):
    first = cut(noise(60), settings(**SHORT))[1]
    bounds = cut(noise(60)[: sample_of(first) + round(rest * RATE)], settings(**SHORT))
    assert len(bounds) == (2 if rest < SHORTEST_REST else 3)


@given(st.floats(0.04, 40), st.floats(0.01, 30), st.integers(0, 99))
@hypothesis_settings(max_examples=60, deadline=None)
def test_appended_sound_moves_no_cut(seconds, more, seed):
    whole = noise(seconds + more, seed)
    before = cut(whole[: round(seconds * RATE)], settings(**SHORT))
    after = cut(whole, settings(**SHORT))
    assert after[: len(before) - 1] == before[:-1]
    assert after[-1] == blocks_of(frames_of(len(whole)))


@pytest.mark.parametrize(("lead", "first_heard", "end_heard"), [(0, 384 - 51, 573), (3, 384 - 48, 576)])
def test_window_holds_the_replayed_clip_its_frames_and_context(lead, first_heard, end_heard):
    chosen = settings(lead_frames=lead, audio_context_seconds=2)
    window = sound_window(32, 48, 10**9, chosen)
    assert window == ((first_heard - 50) // 5 * 5 * 640, (end_heard + 50) * 640)


def test_window_without_carry_does_not_hold_the_clip_before():
    chosen = settings(continuity="independent", audio_context_seconds=0)
    assert sound_window(32, 48, 10**9, chosen) == (380 * 640, 573 * 640)


def test_window_is_clipped_to_the_recording():
    assert sound_window(0, 8, 10_000, settings()) == (0, 10_000)


def test_kept_frames_follow_each_other_and_end_with_the_lesson():
    assert kept_frames(0, 8, 150) == range(0, 93)
    assert kept_frames(8, 13, 150) == range(93, 150)
