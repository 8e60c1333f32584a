"""The text encoder: UMT5 from transformers, read from upstream's names."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from conf.spec import TextEncoderSpec
from model.prompt import clean


def build(spec: TextEncoderSpec) -> UMT5EncoderModel:
    """The encoder that `spec` describes; on the default device, with the library's initial weights."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=spec.vocab_size,
            d_model=spec.dim,
            d_kv=spec.dim_attn // spec.num_heads,
            d_ff=spec.dim_ffn,
            num_layers=spec.num_layers,
            num_heads=spec.num_heads,
            relative_attention_num_buckets=spec.num_buckets,
            feed_forward_proj="gated-gelu",
        )
    )


_LAYER_NAMES = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}


def upstream_names(model: UMT5EncoderModel) -> dict[str, str]:
    """Parameter name in transformers -> name in `models_t5_umt5-xxl-enc-bf16.pth`.

    Tied parameters stand under one of their names, as in `named_parameters`.
    """
    return {name: _upstream_name(name) for name, _ in model.named_parameters()}


def _upstream_name(name: str) -> str:
    for ours, upstream in _LAYER_NAMES.items():
        name = name.replace(f".{ours}.", f".{upstream}.")
    name = name.replace("encoder.block.", "blocks.").replace("encoder.final_layer_norm.", "norm.")
    return name.replace("shared.", "token_embedding.")


class TextEncoder:
    """A loaded UMT5 encoder with its tokenizer. `text_len` is the most tokens that the transformer takes."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: Tokenizer, text_len: int) -> None:
        model.tie_weights()
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len

    def encode(self, prompt: str) -> Tensor:
        """Prompt -> [tokens, text_dim] float32 on the encoder's device, unpadded.

        A prompt of more than `text_len` tokens is cut there, end token kept, as upstream does.
        """
        ids = self.tokenizer.encode(clean(prompt)).ids
        if len(ids) > self.text_len:
            ids = [*ids[: self.text_len - 1], ids[-1]]
        return self.encode_ids(torch.tensor(ids))

    @torch.inference_mode()
    def encode_ids(self, ids_L: Tensor) -> Tensor:
        """Token ids [tokens] -> [tokens, text_dim] float32."""
        return self.model(input_ids=ids_L[None].to(self.model.device)).last_hidden_state[0].float()
