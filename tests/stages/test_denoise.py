"""denoise: which caches are shared, where states wait, what is refused before anything is loaded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.schema import Settings
from model.attention import BackendError
from model.denoise import Denoiser
from model.tiny import settings as tiny
from stages.denoise import Denoise
from stages.types import Picture, PortraitLatents, Segment, SegmentJob

PICTURE = Picture(64, 64, (0, 0, 64, 64), 64, 64, 0.0, "")


@pytest.fixture(scope="module")
def settings(weights: Path) -> Settings:
    torch.set_num_threads(1)
    return Settings(**vars(tiny(weights)))


@pytest.fixture(scope="module")
def denoise(settings: Settings) -> Denoise:
    return Denoise(settings, lambda done, total: None)


def normal(*shape: int) -> torch.Tensor:
    draw = np.random.default_rng(0)
    return torch.from_numpy(draw.standard_normal(shape).astype(np.float32))


def begin(denoise: Denoise, settings: Settings, negative: torch.Tensor | None = None) -> Denoiser:
    """Opens a segment of two blocks; the denoiser that renders it."""
    job = SegmentJob("a", settings, PICTURE, Segment(0, 0, 2, 0, 0, "id"), 20, carried=False, last=True)
    config = denoise._dit.config
    speech = normal(config.num_wav2vec_layers, config.audio_dim, 24)
    portrait = PortraitLatents(normal(16, 1, 8, 8), normal(16, 19, 8, 8))
    denoise.open(job, normal(7, config.text_dim), negative, portrait, speech, None)
    return denoise._open()


def block(denoise: Denoise, number: int = 0) -> torch.Tensor:
    results = [denoise.cell(number, step, None) for step in range(4)]
    assert results[:3] == [None] * 3
    assert results[3] is not None
    return results[3].x


def test_a_state_waits_for_its_next_step_and_comes_back_after_the_last(denoise, settings):
    begin(denoise, settings)
    clean = block(denoise)
    other = begin(denoise, settings)
    state = None
    for step in range(4):
        state = other.cell(0, step, state)
    assert state is not None
    assert torch.equal(clean, state.x)


def test_states_of_blocks_whose_steps_interleave_are_kept_apart(denoise, settings):
    begin(denoise, settings)
    expected = [block(denoise, 0), block(denoise, 1)]
    begin(denoise, settings)
    results = [denoise.cell(b, wave - b, None) for wave in range(5) for b in (0, 1) if 0 <= wave - b < 4]
    clean = [state.x for state in results if state is not None]
    assert all(torch.equal(x, y) for x, y in zip(clean, expected, strict=True))


def test_a_state_of_the_segment_before_is_forgotten(denoise, settings):
    begin(denoise, settings)
    denoise.cell(0, 0, None)
    begin(denoise, settings)
    with pytest.raises(ValueError, match="only step 0 goes without a state"):
        denoise.cell(0, 1, None)


@pytest.mark.parametrize(
    "change",
    [{"base_seed": 7}, {"reference": "keep"}, {"sample_shift": 5.0}, {"sample_solver": "unipc"}],
    ids=str,
)
def test_settings_that_need_no_other_caches_share_them(denoise, settings, change):
    first = begin(denoise, settings)
    plain, changed = block(denoise), replace(settings, **change)
    assert begin(denoise, changed) is first
    ours = block(denoise)
    fresh = Denoise(changed, lambda done, total: None)
    begin(fresh, changed)
    assert torch.equal(ours, block(fresh))
    assert torch.equal(ours, plain) == ("reference" in change)


@pytest.mark.parametrize(
    "change", [{"sample_steps": 3}, {"infer_frames": 24}, {"sample_guide_scale": 2.0}], ids=str
)
def test_settings_that_need_other_caches_get_them(denoise, settings, change):
    first = begin(denoise, settings)
    negative = normal(5, denoise._dit.config.text_dim) if "sample_guide_scale" in change else None
    assert begin(denoise, replace(settings, **change), negative) is not first


def test_negative_prompt_without_effect_is_left_out(denoise, settings):
    begin(denoise, replace(settings, sample_guide_scale=1.0), normal(5, denoise._dit.config.text_dim))
    guided = block(denoise)
    begin(denoise, settings)
    assert torch.equal(guided, block(denoise))


def test_missing_attention_backend_is_an_error_before_the_weights_are_read(settings, monkeypatch):
    monkeypatch.setattr("stages.denoise.load_dit", lambda *arguments: pytest.fail("weights were read"))
    with pytest.raises(BackendError, match="attention_backend='flash'"):
        Denoise(replace(settings, attention_backend="flash"), lambda done, total: None)
