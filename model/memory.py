"""How many bytes a configuration needs, before anything is allocated.

The transformer's share is a formula of its dimensions. The encoders and the video autoencoder are other
people's code: what they hold is found by running them on the meta device, which takes no memory and no time
to speak of. Neither knows what a device's libraries take for themselves (CUDA's context, workspaces of
convolutions and products), nor what odd products on a CPU are filled up with (`model.layers.linear`); that is
for a reserve to hold.

D is the model's width, F that of its feed-forward, `itemsize` the bytes of one weight or activation (2 for
bfloat16, 4 for float32).
"""

import weakref
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UMT5EncoderModel, Wav2Vec2Model

from model.cache import TokenLayout, token_layout
from model.carry import DenoiseSettings
from model.config import DiTConfig
from model.dit import CausalDiT
from model.framepack import KERNELS
from model.layers import ROW_GRAIN
from model.noise import MAX_DISTANCE
from model.priming import DECODER_HISTORY
from model.rope import reference_time
from model.vae import Vae

FLOAT32 = 4
FLOAT64 = 8


@dataclass(frozen=True)
class DiTParameters:
    """Numbers of parameters of the transformer."""

    layers: int
    """All layers, without the injections between them."""
    audio_injector: int
    audio_encoder: int
    frame_packer: int
    embeddings: int
    """Of patches, pose, text, time and kind of token."""
    head: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class DenoiserMemory:
    """Bytes of a `Denoiser`, which holds all layers and all steps."""

    parameters: int
    rings: int
    """Rolling caches: one per denoising step and prompt."""
    condition: int
    """Keys and values of reference and motion, once per two steps, and the reference's unrotated keys."""
    text: int
    """Keys and values of the prompts."""
    segment: int
    """Latents, positions and timesteps of the open segment."""
    activations: int
    """Most that one call holds besides."""

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True)
class VaeMemory:
    """Bytes of the video autoencoder for one size of picture."""

    encoder: int
    """Parameters."""
    decoder: int
    """Parameters."""
    stream: int
    """What an open decode stream keeps between calls: two frames before each causal convolution."""
    decode: int
    """Most that decoding one latent frame holds besides the streams."""
    encode: int
    """Most that encoding the frames holds."""


@dataclass(frozen=True)
class EncoderMemory:
    """Bytes of a text or speech encoder."""

    parameters: int
    activations: int
    """Most that one call holds besides."""

    @property
    def total(self) -> int:
        return self.parameters + self.activations


class LiveBytes(TorchDispatchMode):
    """Watches the storages that the calls inside make: bytes alive now, and the most that were at once.

    Storages made before do not count, nor does what a kernel allocates and frees within itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = set(_storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for key, storage in _storages(result).items():
            if key not in given:
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _free(self, nbytes: int) -> None:
        self.alive -= nbytes


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage._cdata: storage for storage in storages}


# The transformer.


def dit_parameters(config: DiTConfig) -> DiTParameters:
    """Counted on the meta device."""
    with torch.device("meta"):
        dit = CausalDiT(config)
    counts = {
        "layers": dit.blocks,
        "audio_injector": dit.audio_injector,
        "audio_encoder": dit.casual_audio_encoder,
        "frame_packer": dit.frame_packer,
        "head": dit.head,
    }
    parts = {name: _count(module) for name, module in counts.items()}
    return DiTParameters(embeddings=_count(dit) - sum(parts.values()), **parts)


def key_value_bytes(config: DiTConfig, tokens: int, itemsize: int) -> int:
    """Keys and values of `tokens` tokens in every layer: tokens * 2 D * layers * itemsize."""
    return tokens * 2 * config.dim * config.num_layers * itemsize


def denoiser(
    config: DiTConfig, settings: DenoiseSettings, height: int, width: int, blocks: int, itemsize: int
) -> DenoiserMemory:
    """A `Denoiser` for latents of `height` x `width` and segments of `blocks` blocks.

    Per prompt (two with guidance): `sample_steps` rings of one clip, ceil(sample_steps / 2) conditions with
    as many sets of unrotated reference keys (from the first prefill on there is one set), and `text_len` keys
    and values.
    """
    layout = token_layout(config, height, width, settings.infer_frames // config.frames_per_block)
    prompts = 2 if settings.guided else 1
    steps, pairs = settings.sample_steps, (settings.sample_steps + 1) // 2
    condition = key_value_bytes(config, layout.condition, itemsize)
    reference_keys = key_value_bytes(config, layout.reference, itemsize) // 2
    return DenoiserMemory(
        parameters=dit_parameters(config).total * itemsize,
        rings=prompts * steps * key_value_bytes(config, layout.ring, itemsize),
        condition=prompts * pairs * (condition + reference_keys),
        text=prompts * key_value_bytes(config, config.text_len, itemsize),
        segment=segment_bytes(config, settings, layout, blocks, itemsize),
        activations=max(
            cell_activations(config, layout, itemsize),
            prefill_activations(config, layout, height, width, itemsize),
        ),
    )


def segment_bytes(
    config: DiTConfig, settings: DenoiseSettings, layout: TokenLayout, blocks: int, itemsize: int
) -> int:
    """Bytes that a `Denoiser` and its open segment of `blocks` blocks keep between calls besides caches.

    x before each cell of the last clip, the first block, the decoder's history with the block that it was
    joined with, RoPE multipliers of the condition, of the video's frames and of the places in a frame, and
    the embedding of every timestep and of 0.
    """
    block_values = layout.block * _patch(config)
    inputs = layout.blocks * settings.sample_steps * block_values * itemsize
    history = DECODER_HISTORY * layout.reference * _patch(config)
    latents = FLOAT32 * (history + 2 * block_values)
    times = reference_time(blocks * config.num_frames_per_block, MAX_DISTANCE) + 1
    rope = config.head_dim * (layout.condition + times + layout.reference)
    embedded = (settings.sample_steps + 1) * 7 * config.dim
    return inputs + latents + FLOAT32 * (rope + embedded)


def layer_activations(config: DiTConfig, tokens: int, itemsize: int) -> int:
    """tokens * (D (5 itemsize + 4) + 2 F itemsize), when the feed-forward applies its GELU.

    Alive then are the layer's input, rotated queries, attended values, queries of the text and the normed
    input of the feed-forward, the residual sum in float32, and the GELU's input and output.
    """
    return tokens * (config.dim * (5 * itemsize + FLOAT32) + 2 * config.ffn_dim * itemsize)


def cell_activations(config: DiTConfig, layout: TokenLayout, itemsize: int) -> int:
    """Most that the call of one cell holds: in a layer, or while it encodes the block's speech.

    In a layer there are also the call's RoPE multipliers, its x in float32 and its speech. The speech encoder
    joins the repeated first frame to the block's features and weights them in float32 (twice the features),
    or has the features and a float32 copy of its largest convolution's weights, 3 D / 2 x D.
    """
    rope = FLOAT32 * config.head_dim * (layout.block + layout.reference)
    x = FLOAT32 * layout.block * _patch(config)
    heard = config.num_frames_per_block * (config.num_audio_token + 2) * config.dim * itemsize
    frames = config.motion_frames_pixel + config.frames_per_block
    features = FLOAT32 * config.num_wav2vec_layers * config.audio_dim * frames
    weights = FLOAT32 * 3 * (config.dim // 2) * config.dim if itemsize < FLOAT32 else 0
    in_layer = layer_activations(config, layout.block, itemsize) + rope + heard
    return x + max(in_layer, features + max(features, weights))


def prefill_activations(
    config: DiTConfig, layout: TokenLayout, height: int, width: int, itemsize: int
) -> int:
    """Most that a prefill holds: in a layer, or in the coarsest motion convolution.

    That one is a product in float64: its weights, and its patches in float32 and float64, beside the padded
    history.
    """
    frames, rows, columns = KERNELS["proj_4x"]
    kernel = config.in_dim * frames * rows * columns
    tokens = (config.framepack_zip_frame_buckets[2] // frames) * (height // rows) * (width // columns)
    history = FLOAT32 * config.motion_frames_latent * config.in_dim * height * width
    filled = tokens + -tokens % ROW_GRAIN  # As on a CPU; elsewhere a few rows less.
    packing = kernel * (FLOAT64 * config.dim + FLOAT32 * tokens + FLOAT64 * filled) + history
    return max(layer_activations(config, layout.condition, itemsize), packing)


# The other models, as modules on the meta device in the dtype that they will have.


@torch.inference_mode()
def vae(model: AutoencoderKLWan, height: int, width: int, frames: int) -> VaeMemory:
    """For pictures of `height` x `width` pixels, of which 1 + 4 n = `frames` are encoded at once."""
    on_meta = Vae(model)
    latent = torch.zeros(on_meta.z_dim, 1, *on_meta.latent_hw(height, width), device="meta")
    pixels = torch.zeros(3, frames, height, width, device="meta")
    stream = on_meta.stream()
    with LiveBytes() as decoding:
        for _ in range(3):
            stream.push(latent)
    return VaeMemory(
        encoder=_nbytes(model.encoder) + _nbytes(model.quant_conv),
        decoder=_nbytes(model.decoder) + _nbytes(model.post_quant_conv),
        stream=decoding.alive,
        decode=decoding.peak - decoding.alive,
        encode=peak(lambda: on_meta.encode(pixels)),
    )


@torch.inference_mode()
def text_encoder(model: UMT5EncoderModel, tokens: int) -> EncoderMemory:
    """For prompts of `tokens` tokens."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    return EncoderMemory(_nbytes(model), peak(lambda: model(input_ids=ids)))


@torch.inference_mode()
def speech_encoder(model: Wav2Vec2Model, samples: int) -> EncoderMemory:
    """For a window of `samples` 16 kHz samples; attention reaches over all of it."""
    inputs = torch.zeros(1, samples, dtype=model.dtype, device="meta")
    return EncoderMemory(_nbytes(model), peak(lambda: model(inputs, output_hidden_states=True)))


def peak(call: Callable[[], object]) -> int:
    """Most bytes that are alive at once of those that the call makes."""
    with LiveBytes() as mode:
        call()
    return mode.peak


def _patch(config: DiTConfig) -> int:
    """Latent values of one token."""
    return config.in_dim * config.patch_size[1] * config.patch_size[2]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
