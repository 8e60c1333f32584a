"""Dimensions of the published models, and of models small enough for a test."""

from typing import Any

from conf.spec import VaeSpec
from model.config import DiTConfig

WAN_14B = DiTConfig(
    dim=5120,
    ffn_dim=13824,
    freq_dim=256,
    num_heads=40,
    num_layers=40,
    in_dim=16,
    out_dim=16,
    cond_dim=16,
    audio_dim=1024,
    audio_inject_layers=(0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
)
"""Wan2.2-S2V-14B."""

WAV2VEC2_LARGE: dict[str, Any] = {
    "model_type": "wav2vec2",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "num_conv_pos_embedding_groups": 16,
    "num_conv_pos_embeddings": 128,
    "vocab_size": 33,
}
"""wav2vec2-large-xlsr-53-english."""

TINY = DiTConfig(
    dim=64,
    ffn_dim=160,
    freq_dim=32,
    num_heads=4,
    num_layers=3,
    in_dim=16,
    out_dim=16,
    cond_dim=16,
    audio_dim=32,
    audio_inject_layers=(0, 2),
    text_dim=32,
    text_len=16,
    num_wav2vec_layers=5,
)

TINY_VAE = VaeSpec(base_dim=4, num_res_blocks=1)
