"""How many floating-point operations a configuration needs. A multiplication and an addition are two.

Matrix products and attention count; norms, activations and rotations do not, as in
`torch.utils.flop_counter`. A product [L, M] x [M, N] is 2 L M N. Attention of L queries to S keys of width D
is two products, 4 L S D.

Letters: D model width, F width of the feed-forward, L tokens of the call, S keys that they attend, T tokens
of the text.
"""

from dataclasses import astuple, dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from model.cache import TokenLayout
from model.config import DiTConfig
from model.framepack import KERNELS
from model.vae import FRAMES_PER_LATENT, Vae


@dataclass(frozen=True)
class Flops:
    """One call of the transformer, by component. All layers together."""

    projections: int
    """Queries, keys, values and output of the self-attention."""
    self_attention: int
    text: int
    """Cross-attention of the prompt with its projections."""
    ffn: int
    injection: int
    """Attention of the speech with its projections, adaptive norms, and the speech encoder."""
    embeddings: int
    """Tokens from latents and velocity from tokens."""

    @property
    def total(self) -> int:
        return sum(astuple(self))


def cell(config: DiTConfig, layout: TokenLayout, blocks: int, *, text_cached: bool = True) -> Flops:
    """One block at one step when `blocks` slots of the ring are written, this one included.

    text_cached: as here, with the prompt's keys and values at hand; without, as upstream computes them in
    every call. The block's speech, encoded at its first step only, is `speech`.
    """
    tokens = layout.block
    text_key_value = 0 if text_cached else encode_text(config)
    head = _product(tokens, config.dim, config.out_dim * _patch_area(config))
    return Flops(
        **_layers(config, tokens, layout.condition + blocks * layout.block, text_key_value),
        injection=_injection(config, tokens),
        embeddings=_product(tokens, config.in_dim * _patch_area(config), config.dim) + head,
    )


def prefill(config: DiTConfig, layout: TokenLayout, height: int, width: int) -> Flops:
    """Reference and motion of latents of `height` x `width`, attending each other."""
    patch = config.in_dim * _patch_area(config)
    embeddings = _product(layout.reference, patch, config.dim)
    for (frames, rows, columns), count in zip(
        KERNELS.values(), config.framepack_zip_frame_buckets, strict=True
    ):
        tokens = (count // frames) * (height // rows) * (width // columns)
        embeddings += _product(tokens, config.in_dim * frames * rows * columns, config.dim)
    layers = _layers(config, layout.condition, layout.condition, 0)
    return Flops(**layers, injection=0, embeddings=embeddings)


def block(config: DiTConfig, layout: TokenLayout, sample_steps: int) -> int:
    """A block through all steps with a full ring, without guidance."""
    return sample_steps * cell(config, layout, layout.blocks).total + speech(config)


def encode_text(config: DiTConfig) -> int:
    """Once per lesson: 2 T (text_dim D + D^2) and, per layer, 4 T D^2."""
    length, dim = config.text_len, config.dim
    embedding = _product(length, config.text_dim, dim) + _product(length, dim, dim)
    return embedding + config.num_layers * 2 * _product(length, dim, dim)


def speech(config: DiTConfig) -> int:
    """Once per block: three causal convolutions of width 3, the last two of stride 2, for the global vector
    and each local token, and the linear layer of the former."""
    dim, tokens = config.dim, config.num_audio_token
    frames = config.motion_frames_pixel + config.frames_per_block
    half, quarter = -(-frames // 2), -(-frames // 4)
    first = _product(frames, 3 * config.audio_dim, (tokens + 1) * (dim // 4))
    second = _product(half, 3 * (dim // 4), dim // 2)
    third = _product(quarter, 3 * (dim // 2), dim)
    return first + (tokens + 1) * (second + third) + _product(quarter, dim, dim)


@torch.inference_mode()
def vae_decode(model: AutoencoderKLWan, height: int, width: int) -> int:
    """Per video frame of `height` x `width` pixels, in the middle of a stream. `model` on the meta device.

    Counted while diffusers' decoder runs there, so that it holds for every variant of it.
    """
    vae = Vae(model)
    latent = torch.zeros(vae.z_dim, 1, *vae.latent_hw(height, width), device="meta")
    stream = vae.stream()
    stream.push(latent)
    with FlopCounterMode(display=False) as counter:
        stream.push(latent)
    return counter.get_total_flops() // FRAMES_PER_LATENT


def _layers(config: DiTConfig, tokens: int, keys: int, text_key_value: int) -> dict[str, int]:
    """What every layer does: per layer 8 L D^2, 4 L S D, 4 L D^2 + 4 L T D, 4 L D F."""
    dim, layers = config.dim, config.num_layers
    square = _product(tokens, dim, dim)
    return {
        "projections": layers * 4 * square,
        "self_attention": layers * _attention(tokens, keys, dim),
        "text": layers * (2 * square + _attention(tokens, config.text_len, dim)) + text_key_value,
        "ffn": layers * 2 * _product(tokens, dim, config.ffn_dim),
    }


def _injection(config: DiTConfig, tokens: int) -> int:
    """Tokens attend the local tokens of their own latent frame; scale and shift come from the global one."""
    dim, frames, local = config.dim, config.num_frames_per_block, config.num_audio_token + 1
    key_value = 2 * _product(frames * local, dim, dim)
    norm = _product(frames, dim, 2 * dim)
    query_output = 2 * _product(tokens, dim, dim)
    once = norm + query_output + key_value + _attention(tokens, local, dim)
    return len(config.audio_inject_layers) * once


def _product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def _attention(queries: int, keys: int, dim: int) -> int:
    return 4 * queries * keys * dim


def _patch_area(config: DiTConfig) -> int:
    return config.patch_size[1] * config.patch_size[2]
