"""Golden sets 3, 5, 6 and 7, and that wrong arithmetic misses them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import golden as golden_sets
from model import speech
from model.files import CheckpointError
from model.golden import encoders

GOLDEN = Path(__file__).parents[1] / "golden"
torch.set_num_threads(1)


def failed(checks):
    return {check.quantity for check in checks if not check.passed}


def test_all_quantities_of_the_encoder_sets_are_within_tolerance():
    checks = encoders.checks(GOLDEN)
    assert {check.set for check in checks} == {"audio_features", "vae", "text_encoder", "lora"}
    assert len(checks) == 28
    assert not failed(checks)


def test_absent_sets_are_left_out(tmp_path):
    shutil.copy(GOLDEN / "text_encoder.json", tmp_path)
    for file in GOLDEN.glob("text_encoder*.safetensors"):
        shutil.copy(file, tmp_path)
    assert {check.set for check in encoders.checks(tmp_path)} == {"text_encoder"}


@pytest.mark.parametrize(
    ("name", "kept", "missing"),
    [
        ("vae", ["vae.json", "vae_weights.safetensors"], "vae.safetensors"),
        ("lora", ["lora.json", "lora_prefixed.safetensors"], "lora_merged.safetensors"),
        ("audio_features", ["audio_features.safetensors"], "audio_features.json, wav2vec2_tiny"),
    ],
)
def test_set_of_which_a_file_is_missing_fails_by_name(tmp_path, name, kept, missing):
    for file in kept:
        shutil.copy(GOLDEN / file, tmp_path)
    ((found, error),) = golden_sets.run(tmp_path)
    assert (found, str(error)) == (name, f"missing {missing}")
    assert isinstance(error, FileNotFoundError)


def test_last_hidden_state_without_the_final_norm_is_off_by_units(monkeypatch):
    def without_final_norm(self, samples):
        out = self.model(self.normalised(samples), output_hidden_states=True)
        return torch.cat(out.hidden_states)

    monkeypatch.setattr(speech.SpeechEncoder, "hidden_states", torch.no_grad()(without_final_norm))
    checks = {check.quantity: check for check in encoders.audio_features(GOLDEN)}
    assert checks["hidden_states"].difference > 1


def test_waveform_that_is_not_normalised_misses_the_hidden_states(monkeypatch):
    monkeypatch.setattr(
        speech.SpeechEncoder, "normalised", lambda self, samples: torch.from_numpy(samples)[None]
    )
    assert {"input_values", "hidden_states"} <= failed(encoders.audio_features(GOLDEN))


def test_bucketing_that_rounds_down_misses_the_indices(monkeypatch):
    monkeypatch.setattr(speech, "bucket_indices", lambda frames, fps: np.arange(frames) * 30 // fps)
    missed = {"indices_fps25_f48", "embed_fps25_f48", "indices_fps16_f80"}
    assert missed <= failed(encoders.audio_features(GOLDEN))


def test_resampling_without_aligned_corners_misses_the_features(monkeypatch):
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(
        torch.nn.functional,
        "interpolate",
        lambda x, size, mode, align_corners: interpolate(x, size=size, mode=mode, align_corners=False),
    )
    assert "features_30fps" in failed(encoders.audio_features(GOLDEN))


def test_frames_beyond_the_sound_that_repeat_the_last_feature_miss_the_embedding(monkeypatch):
    def repeat_last(features, frames, fps):
        indices = torch.from_numpy(speech.bucket_indices(frames, fps)).clamp(max=features.shape[1] - 1)
        return features[:, indices].transpose(1, 2)

    monkeypatch.setattr(speech, "bucket", repeat_last)
    assert "embed_fps25_f48" in failed(encoders.audio_features(GOLDEN))


def test_vae_without_latent_normalisation_misses_the_latents(monkeypatch):
    original = encoders.load_vae

    def unnormalised(folder, arguments):
        vae = original(folder, arguments)
        vae.std_C = torch.ones_like(vae.std_C)
        return vae

    monkeypatch.setattr(encoders, "load_vae", unnormalised)
    assert {"clip_latents", "decoded", "image_latents_73frames"} <= failed(encoders.autoencoder(GOLDEN))


def test_one_relative_position_table_for_all_layers_misses_the_text(monkeypatch):
    original = encoders.load_text_encoder

    def shared_positions(folder, arguments):
        encoder = original(folder, arguments)
        state = encoder.model.state_dict()
        tables = [name for name in state if "relative_attention_bias" in name]
        encoder.model.load_state_dict(dict.fromkeys(tables, state[tables[0]]), strict=False)
        return encoder

    monkeypatch.setattr(encoders, "load_text_encoder", shared_positions)
    assert len(failed(encoders.text_encoder(GOLDEN))) == 3


def golden_lora(tmp_path):
    for name in (
        "lora.json",
        "lora_prefixed.safetensors",
        "lora_merged.safetensors",
        "dit_weights.safetensors",
    ):
        shutil.copy(GOLDEN / name, tmp_path)
    return tmp_path


def test_lora_scale_of_alpha_alone_misses_the_merge(tmp_path):
    folder = golden_lora(tmp_path)
    arguments = json.loads((folder / "lora.json").read_text())
    (folder / "lora.json").write_text(
        json.dumps(arguments | {"alpha": arguments["alpha"] * arguments["rank"]})
    )
    assert len(failed(encoders.lora_merge(folder))) == 7


def test_lora_that_lacks_a_module_is_noticed(tmp_path):
    folder = golden_lora(tmp_path)
    state = load_file(folder / "lora_prefixed.safetensors")
    save_file(
        {k: v for k, v in state.items() if "blocks.2.ffn.0" not in k}, folder / "lora_prefixed.safetensors"
    )
    assert failed(encoders.lora_merge(folder)) == {"48 modules matched"}


def test_golden_weights_with_a_renamed_tensor_are_refused(tmp_path):
    for name in ("vae.json", "vae.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path)
    state = load_file(GOLDEN / "vae_weights.safetensors")
    state["decoder.conv9.weight"] = state.pop("decoder.conv1.weight")
    save_file(state, tmp_path / "vae_weights.safetensors")
    with pytest.raises(
        CheckpointError, match=r"unexpected: decoder\.conv9\.weight\n.*missing: decoder\.conv1"
    ):
        encoders.checks(tmp_path)
