from pathlib import Path

import numpy as np
import pytest
import torch

from model import speech, tiny
from model.checkpoint import load_speech_encoder

torch.set_num_threads(1)
RATE = speech.SAMPLE_RATE


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    tiny.write(folder)
    return load_speech_encoder(tiny.settings(folder))


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)


def test_features_have_a_column_for_every_frame(encoder):
    assert encoder.features(noise(2 * RATE), 50).shape == (encoder.layers, encoder.dim, 50)


def test_frames_after_the_sound_are_zero_and_those_within_are_not(encoder):
    features = encoder.features(noise(RATE), 40)
    assert features[:, :, :24].abs().amax(dim=(0, 1)).min() > 0
    assert features[:, :, 25:].abs().max() == 0


def test_sound_too_short_for_one_feature_is_all_zeros(encoder):
    assert encoder.features(noise(640), 1).abs().max() == 0


def test_same_sound_gives_the_same_bits_after_another(encoder):
    first = encoder.features(noise(RATE), 25)
    encoder.features(noise(3 * RATE), 75)
    assert torch.equal(encoder.features(noise(RATE), 25), first)


def test_louder_sound_is_normalised(encoder):
    quiet, loud = encoder.features(noise(RATE), 25), encoder.features(10 * noise(RATE), 25)
    assert torch.allclose(quiet, loud, atol=1e-3)


def test_last_state_has_the_final_norm(encoder):
    states = encoder.hidden_states(noise(RATE))
    out = encoder.model(encoder.normalised(noise(RATE)), output_hidden_states=True)
    assert torch.equal(states[-1:], out.last_hidden_state)
    assert not torch.allclose(states[-1:], out.hidden_states[-1])


def test_half_way_points_round_to_even():
    assert speech.bucket_indices(13, 16).tolist() == [0, 2, 4, 6, 8, 9, 11, 13, 15, 17, 19, 21, 22]


def test_upstream_makes_one_more_clip_than_is_full():
    assert speech.clip_count(57, 48, 25) == 1
    assert speech.clip_count(58, 48, 25) == 2


def test_both_ways_to_write_the_weight_norm_are_understood():
    with torch.device("meta"):
        module = speech.build(tiny.SPEECH_ENCODER)
    old = speech.file_names(module, ["wav2vec2.encoder.pos_conv_embed.conv.weight_g"])
    new = speech.file_names(module, ["encoder.pos_conv_embed.conv.parametrizations.weight.original0"])
    assert old["encoder.pos_conv_embed.conv.parametrizations.weight.original1"].endswith("conv.weight_v")
    assert all(name == file_name for name, file_name in new.items())
    assert all(file_name.startswith("wav2vec2.") for file_name in old.values())
