"""Writes a small checkpoint with random weights in exactly the published layout.

It is what Lectern renders with until real weights are given: every file, name and call is what the 14B uses,
the pictures are noise, and a laptop renders it faster than it plays.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from conf.schema import ModelSettings
from conf.spec import TextEncoderSpec, VaeSpec
from model import speech, text, vae
from model.config import DiTConfig
from model.dit import CausalDiT
from model.files import new_folder

VAE = VaeSpec(base_dim=1, num_res_blocks=1)
TEXT_ENCODER = TextEncoderSpec(
    vocab_size=512, dim=32, dim_attn=32, dim_ffn=64, num_heads=4, num_layers=2, dtype="float32", device="cpu"
)
TRANSFORMER: dict[str, Any] = {
    "_class_name": "WanModel_S2V",
    "model_type": "s2v",
    "dim": 64,
    "ffn_dim": 128,
    "freq_dim": 32,
    "num_heads": 4,
    "num_layers": 6,
    "in_dim": 16,
    "out_dim": 16,
    "cond_dim": 16,
    "text_dim": 32,
    "text_len": 64,
    "audio_dim": 32,
    "audio_inject_layers": [0, 2, 4],
    "num_audio_token": 4,
    "num_wav2vec_layers": 5,
    "enable_adain": True,
    "adain_mode": "attn_norm",
    "zero_timestep": True,
    "enable_motioner": False,
    "add_last_motion": True,
    "enable_framepack": True,
    "framepack_drop_mode": "padd",
    "eps": 1e-6,
}
SPEECH_ENCODER: dict[str, Any] = {
    "architectures": ["Wav2Vec2ForCTC"],
    "model_type": "wav2vec2",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [16] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16,
    "vocab_size": 33,
}
FEATURE_EXTRACTOR: dict[str, Any] = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "do_normalize": True,
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": speech.SAMPLE_RATE,
}
SHARD_SIZE = "500KB"
WORDS = """
a an the and of in on at to with for is are man woman person teacher student speaker lecture lesson course
class video portrait face head mouth eyes hands smile smiling talking speaking speaks talks explains teaching
looking looks camera calm clear friendly natural warm soft light studio room office board background front
desk wearing shirt suit glasses dark bright white black blue gentle slow gestures expression voice young old
"""


def settings(folder: Path) -> ModelSettings:
    """How a folder written by `write` is loaded."""
    return ModelSettings(
        model="tiny",
        ckpt_dir=str(folder),
        device="cpu",
        dtype="float32",
        vae_dtype="float32",
        vae=VAE,
        text_encoder=TEXT_ENCODER,
    )


def write(folder: Path, seed: int = 0) -> None:
    """Writes the checkpoint, whole or not at all: the same seed gives the same bytes.

    Raises CheckpointError if the folder is there and not empty.
    """
    with new_folder(folder) as new:
        _write_transformer(new, seed)
        _write_vae(new / VAE.file, seed)
        _write_text_encoder(new, seed)
        _write_speech_encoder(new / ModelSettings.audio_encoder, seed)


def _write_transformer(folder: Path, seed: int) -> None:
    _write_json(folder / "config.json", TRANSFORMER)
    with torch.device("meta"):
        module = CausalDiT(DiTConfig.from_dict(TRANSFORMER))
    save_torch_state_dict(
        _random_state(module, seed),
        folder,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )


def _write_vae(path: Path, seed: int) -> None:
    with torch.device("meta"):
        module = vae.build(VAE)
    state, names = _random_state(module, seed), vae.upstream_names(module)
    torch.save({names[name]: tensor for name, tensor in state.items()}, path)


def _write_text_encoder(folder: Path, seed: int) -> None:
    with torch.device("meta"):
        module = text.build(TEXT_ENCODER)
    state, names = _random_state(module, seed), text.upstream_names(module)
    torch.save({names[name]: state[name] for name in names}, folder / TEXT_ENCODER.file)
    _write_tokenizer(folder / TEXT_ENCODER.tokenizer)


def _write_tokenizer(folder: Path) -> None:
    """A Unigram tokenizer like UMT5's: words, then characters, then bytes, so that it reads any language."""
    special = ["<pad>", "</s>", "<unk>"]
    letters = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
    pieces = [(piece, 0.0) for piece in special]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(letter, -10.0) for letter in letters] + [(f"▁{word}", -5.0) for word in WORDS.split()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(special)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def _write_speech_encoder(folder: Path, seed: int) -> None:
    folder.mkdir()
    _write_json(folder / "config.json", SPEECH_ENCODER)
    _write_json(folder / "preprocessor_config.json", FEATURE_EXTRACTOR)
    with torch.device("meta"):
        module = speech.build(SPEECH_ENCODER)
        head = nn.Linear(SPEECH_ENCODER["hidden_size"], SPEECH_ENCODER["vocab_size"])
    names = speech.file_names(module, present=["wav2vec2.encoder.pos_conv_embed.conv.weight_g"])
    state = {names[name]: tensor for name, tensor in _random_state(module, seed).items()}
    state |= {f"lm_head.{name}": tensor for name, tensor in _random_state(head, seed).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


_ONES = re.compile(r"norm\w*\.weight|gamma|casual_audio_encoder\.weights|original0")


def _random_state(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """A value for every parameter, each a function of (seed, its name) alone.

    Scales of norms are one, and so are the audio encoder's layer weights, by whose sum it divides; biases are
    small; the rest keeps the variance of what it multiplies.
    """
    state = {}
    for name, parameter in module.state_dict().items():
        key = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
        deviation = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
        values = torch.randn(parameter.shape, generator=generator) * deviation
        state[name] = torch.ones(parameter.shape) if _ONES.search(name) else values
    return state


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
