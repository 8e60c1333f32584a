"""config.json as published, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from model.config import ConfigError, DiTConfig
from model.dit import CausalDiT

PUBLISHED = {
    "_class_name": "WanModel_S2V",
    "_diffusers_version": "0.33.0",
    "model_type": "s2v",
    "adain_mode": "attn_norm",
    "add_last_motion": True,
    "audio_dim": 1024,
    "audio_inject_layers": [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39],
    "cond_dim": 16,
    "dim": 5120,
    "enable_adain": True,
    "enable_framepack": True,
    "enable_motioner": False,
    "enable_tsm": False,
    "eps": 1e-6,
    "ffn_dim": 13824,
    "framepack_drop_mode": "padd",
    "freq_dim": 256,
    "in_dim": 16,
    "motion_token_num": 1024,
    "num_audio_token": 4,
    "num_heads": 40,
    "num_layers": 40,
    "out_dim": 16,
    "text_len": 512,
    "trainable_token_pos_emb": False,
    "zero_init": True,
    "zero_timestep": True,
}


def test_published_config_makes_16_296_billion_parameters():
    with torch.device("meta"):
        dit = CausalDiT(DiTConfig.from_dict(PUBLISHED))
    assert sum(parameter.numel() for parameter in dit.parameters()) == pytest.approx(16.296e9, abs=0.5e6)


def test_names_and_shapes_are_those_of_the_recorded_checkpoint(golden, config):
    with torch.device("meta"):
        dit = CausalDiT(config)
    recorded = load_file(golden / "dit_weights.safetensors")
    assert {n: t.shape for n, t in dit.state_dict().items()} == {n: t.shape for n, t in recorded.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 5121}, "dim=5121, num_heads=40: heads must be"),
        ({"dim": 40}, "dim=40, num_heads=40: heads must be of one even size"),
        ({"dim": 6, "num_heads": 1}, "dim=6: must be a multiple of 4"),
        ({"freq_dim": 255}, "freq_dim=255: must be even"),
        ({"patch_size": [2, 2, 2]}, "patches must span one latent frame"),
        ({"audio_inject_layers": [4, 0]}, "must increase and lie in 0..39"),
        ({"audio_inject_layers": [0, 40]}, "must increase and lie in 0..39"),
        ({"framepack_zip_frame_buckets": [1, 18]}, "must be three"),
        ({"framepack_zip_frame_buckets": [1, 2, 4]}, "must sum to motion_frames_latent=19"),
        ({"motion_frames_pixel": 72}, "motion_frames_pixel=72: must be the frames that .*=19 stand for, 73"),
        ({"dim": "wide"}, "not the dimensions of a transformer"),
        ({"num_heads": 0}, "not the dimensions of a transformer"),
        ({"enable_motioner": True}, "enable_motioner=True: only False is implemented"),
        ({"framepack_drop_mode": "drop"}, "framepack_drop_mode='drop': only 'padd' is implemented"),
    ],
)
def test_architecture_that_is_not_implemented_is_refused_by_key(change, message):
    with pytest.raises(ConfigError, match=message):
        DiTConfig.from_dict(PUBLISHED | change)


def test_missing_dimension_is_named():
    with pytest.raises(ConfigError, match="missing dim, num_heads"):
        DiTConfig.from_dict({k: v for k, v in PUBLISHED.items() if k not in ("dim", "num_heads")})


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "must hold one JSON object")])
def test_file_that_is_no_config_is_named(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"config.json: {message}"):
        DiTConfig.from_file(path)


def test_config_is_read_from_its_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED))
    config = DiTConfig.from_file(path)
    assert (config.head_dim, config.frames_per_block, config.text_dim) == (128, 12, 4096)
