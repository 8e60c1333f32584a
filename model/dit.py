"""The causal audio-driven video transformer (Wan2.2-S2V as Live Avatar runs it), on one device.

Parameter names are those of the published checkpoint. A call is `embed`, then the layers, then `velocity`;
the layers may be run in pieces. Weights may be bfloat16: embedding of time, modulations, norms, residual
sums, head and audio encoder compute in float32 as upstream does, and hidden states leave a layer in the
dtype of the weights.

Shape suffixes: B batch (always 1), L tokens, N heads, D channels; C, F, H, W of latents.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionBackend
from model.audio import AudioInjector, CausalAudioEncoder, SpeechTokens
from model.config import DiTConfig
from model.framepack import FramePacker
from model.layers import Attention, Linear, linear_float32, modulated_norm, project_patches

VIDEO, REFERENCE, MOTION = 0, 1, 2
"""Rows of `trainable_cond_mask`: what kind of token it is."""

TIME_PERIOD = 10000.0

Exchange = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(layer, q, k, v) of the tokens at hand, not rotated -> rotated q, and all keys and values that it attends.
`model/cache.py` has one for the prefill and one for a cell."""


@dataclass(frozen=True)
class TimeEmbedding:
    """A timestep as the layers take it, float32."""

    embedded: Tensor
    """[D], for the head."""
    projected: Tensor
    """[6, D], for the layers."""


@dataclass(frozen=True)
class Context:
    """What the tokens of one call meet in every layer."""

    time: TimeEmbedding
    text: list[tuple[Tensor, Tensor]]
    """Keys and values of the prompt per layer, from `encode_text`."""
    speech: SpeechTokens | None
    """None in a prefill."""
    exchange: Exchange
    attend: AttentionBackend


class DiTBlock(nn.Module):
    """One layer: self-attention, attention of the text, feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.self_attn = Attention(dim, config.num_heads, config.eps)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.cross_attn = Attention(dim, config.num_heads, config.eps)
        self.ffn = nn.Sequential(
            Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, dim)
        )

    def forward(self, x_BLD: Tensor, layer: int, context: Context) -> Tensor:
        q, k, v = context.exchange(layer, *self.project(x_BLD, context.time))
        attended = context.attend(q, k, v)
        return self.finish(x_BLD, attended, context.time, context.text[layer], context.attend)

    def project(self, x_BLD: Tensor, time: TimeEmbedding) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [1, L, N, D] of the self-attention, not rotated."""
        shift, scale, _, _, _, _ = self._modulation(time)
        normed = modulated_norm(x_BLD, scale, shift, self.eps).to(x_BLD.dtype)
        return self.self_attn.query(normed), *self.self_attn.key_value(normed)

    def finish(
        self,
        x_BLD: Tensor,
        attended_BLND: Tensor,
        time: TimeEmbedding,
        text: tuple[Tensor, Tensor],
        attend: AttentionBackend,
    ) -> Tensor:
        """All that follows the self-attention."""
        dtype = x_BLD.dtype
        _, _, attention_gate, shift, scale, ffn_gate = self._modulation(time)
        x_BLD = x_BLD + self.self_attn.output(attended_BLND) * attention_gate
        queries = self.cross_attn.query(self._norm_text(x_BLD).to(dtype))
        x_BLD = x_BLD + self.cross_attn.output(attend(queries, *text))
        normed = modulated_norm(x_BLD, scale, shift, self.eps).to(dtype)
        return (x_BLD + self.ffn(normed) * ffn_gate).to(dtype)

    def _modulation(self, time: TimeEmbedding) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the self-attention, then of the feed-forward, [D] each."""
        return (self.modulation[0].float() + time.projected).unbind()

    def _norm_text(self, x_BLD: Tensor) -> Tensor:
        """norm3 in float32, whatever the dtype of its weights."""
        weight, bias = self.norm3.weight.float(), self.norm3.bias.float()
        return F.layer_norm(x_BLD.float(), weight.shape, weight, bias, self.eps)


class Head(nn.Module):
    """Hidden states -> patches of velocity, in float32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        rows, columns = config.patch_size[1:]
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.head = Linear(config.dim, rows * columns * config.out_dim)

    def forward(self, x_BLD: Tensor, time: TimeEmbedding) -> Tensor:
        shift, scale = self.modulation[0].float() + time.embedded
        return linear_float32(self.head, modulated_norm(x_BLD, scale, shift, self.eps))


class CausalDiT(nn.Module):
    """The transformer. It keeps nothing from call to call; caches come in with the `Context`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=patch, stride=patch)
        self.cond_encoder = nn.Conv3d(config.cond_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.trainable_cond_mask = nn.Embedding(3, dim)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.casual_audio_encoder = CausalAudioEncoder(config)
        self.audio_injector = AudioInjector(config)
        self.frame_packer = FramePacker(config.in_dim, dim, config.framepack_zip_frame_buckets)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    # What a call needs besides tokens.

    def encode_time(self, timestep: float) -> TimeEmbedding:
        """Sinusoids (cosines first, computed in float64) through two small networks, in float32."""
        half = self.config.freq_dim // 2
        angles = timestep * TIME_PERIOD ** -(torch.arange(half, dtype=torch.float64) / half)
        sinusoid = torch.cat((angles.cos(), angles.sin())).float().to(self.device)
        embedded_D = _sequential_float32(self.time_embedding, sinusoid)
        projected_6D = _sequential_float32(self.time_projection, embedded_D).unflatten(-1, (6, -1))
        return TimeEmbedding(embedded_D, projected_6D)

    def encode_text(self, text_LD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Text encoder output [tokens, text_dim] -> keys and values [1, text_len, N, D] of every layer.

        Filled up with zero rows to `text_len`. There is no mask: biases make the zero rows count. Raises
        ValueError for more tokens than that.
        """
        if len(text_LD) > self.config.text_len:
            raise ValueError(f"text of {len(text_LD)} tokens: must be at most {self.config.text_len}")
        padded = F.pad(text_LD.to(self.dtype), (0, 0, 0, self.config.text_len - len(text_LD)))
        text_BLD = self.text_embedding(padded[None])
        return [block.cross_attn.key_value(text_BLD) for block in cast(Iterable[DiTBlock], self.blocks)]

    def encode_speech(self, speech_LCT: Tensor) -> SpeechTokens:
        """Features [layers, audio_dim, frames of one block] -> what that block hears.

        A block knows nothing of the sound before it: its own first frame is repeated in front instead, and
        the latent steps of the repetition are dropped.
        """
        config = self.config
        before = speech_LCT[:, :, :1].expand(-1, -1, config.motion_frames_pixel)
        whole_TD, local_TKD = self.casual_audio_encoder(torch.cat((before, speech_LCT), dim=2))
        skip = config.motion_frames_latent
        # Copies, so that the dropped steps are freed also where the dtype stays as it is.
        whole_TD, local_TKD = (t[skip:].to(self.dtype, copy=True) for t in (whole_TD, local_TKD))
        return SpeechTokens(whole_TD, local_TKD)

    # The call itself.

    def embed(self, x_CFHW: Tensor, pose_CFHW: Tensor | None = None) -> Tensor:
        """Noisy latents of a block, and its pose latents if any, -> hidden states [1, L, D].

        Without pose the pose encoder still adds its bias, as upstream feeds it zeros.
        """
        x_BLD = project_patches(self.patch_embedding, x_CFHW)
        if pose_CFHW is None:
            assert self.cond_encoder.bias is not None
            pose_BLD = self.cond_encoder.bias
        else:
            pose_BLD = project_patches(self.cond_encoder, pose_CFHW)
        return x_BLD + pose_BLD + self.trainable_cond_mask.weight[VIDEO]

    def embed_condition(self, reference_CFHW: Tensor, motion_CFHW: Tensor) -> Tensor:
        """Reference latent and motion history -> hidden states [1, L, D], reference first."""
        kind = self.trainable_cond_mask.weight
        reference_BLD = project_patches(self.patch_embedding, reference_CFHW) + kind[REFERENCE]
        motion_BLD = self.frame_packer(motion_CFHW) + kind[MOTION]
        return torch.cat((reference_BLD, motion_BLD), dim=1)

    def run_layers(self, x_BLD: Tensor, layers: range, context: Context) -> Tensor:
        """Hidden states through some of the layers, in order."""
        for layer in layers:
            x_BLD = self.blocks[layer](x_BLD, layer, context)
            if context.speech is not None and layer in self.config.audio_inject_layers:
                index = self.config.audio_inject_layers.index(layer)
                x_BLD = self.audio_injector(index, x_BLD, context.speech, context.attend)
        return x_BLD

    def velocity(self, x_BLD: Tensor, height: int, width: int, time: TimeEmbedding) -> Tensor:
        """Hidden states after the last layer -> velocity [C, F, height, width] float32."""
        patches = self.head(x_BLD, time)[0]
        (rows, columns), (_, patch_rows, patch_columns) = (
            self.config.grid(height, width),
            self.config.patch_size,
        )
        patches = patches.view(-1, rows, columns, patch_rows, patch_columns, self.config.out_dim)
        return patches.permute(5, 0, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _sequential_float32(network: nn.Sequential, x: Tensor) -> Tensor:
    for module in network:
        x = linear_float32(module, x) if isinstance(module, nn.Linear) else module(x)
    return x
