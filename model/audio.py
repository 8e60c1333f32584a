"""Speech inside the transformer: the causal audio encoder and the injection of its tokens into the video.

Shape suffixes: T time steps, K local tokens of a time step, S tokens of a latent frame, D model width.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionBackend
from model.config import DiTConfig
from model.layers import Attention, Linear, linear, linear_float32

ENCODER_EPS = 1e-6
ADAPTIVE_NORM_EPS = 1e-5
INJECTOR_EPS = 1e-6
"""Of the injector's query and key norms whatever the config's `eps`: upstream's AudioInjector_WAN builds its
cross-attentions without passing one on, so that they keep the default of WanCrossAttention.
"""


@dataclass(frozen=True)
class SpeechTokens:
    """What one block hears: a time step per latent frame, in the transformer's dtype."""

    whole: Tensor
    """[T, D]: one vector for the adaptive norm."""
    local: Tensor
    """[T, K, D]: tokens that the video attends."""


class CausalConv1d(nn.Module):
    """Convolution over time that sees the past only; before the start the first value is repeated.

    In float32, and as a matrix product: libraries cut convolutions among threads so that it shows in the
    bits.
    """

    def __init__(self, in_dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel_size=3, stride=stride)

    def forward(self, x_BTC: Tensor) -> Tensor:
        weight, bias = self.conv.weight.float(), self.conv.bias
        assert bias is not None
        padded_BTC = torch.cat((x_BTC[:, :1].expand(-1, 2, -1), x_BTC), dim=1)
        windows_BTK = padded_BTC.unfold(1, 3, self.conv.stride[0]).flatten(2)
        return linear(windows_BTK, weight.flatten(1), bias.float())


class MotionEncoder(nn.Module):
    """Speech features at video rate -> tokens at latent rate (a quarter), one kind local and one global."""

    def __init__(self, in_dim: int, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.conv1_local = CausalConv1d(in_dim, num_tokens * dim // 4, stride=1)
        self.conv1_global = CausalConv1d(in_dim, dim // 4, stride=1)
        self.conv2 = CausalConv1d(dim // 4, dim // 2, stride=2)
        self.conv3 = CausalConv1d(dim // 2, dim, stride=2)
        self.final_linear = Linear(dim, dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.num_tokens = num_tokens

    def forward(self, x_TC: Tensor) -> tuple[Tensor, Tensor]:
        """[T, audio_dim] float32 -> global [T / 4, D], local [T / 4, num_tokens + 1, D], rounded up."""
        local_TKC = self.conv1_local(x_TC[None])[0].unflatten(-1, (self.num_tokens, -1))
        local_TKD = self._compress(local_TKC.transpose(0, 1)).transpose(0, 1)
        padding_TKD = self.padding_tokens[0].float().expand(len(local_TKD), -1, -1)
        whole_TD = self._compress(self.conv1_global(x_TC[None]))[0]
        return linear_float32(self.final_linear, whole_TD), torch.cat((local_TKD, padding_TKD), dim=1)

    def _compress(self, x_BTC: Tensor) -> Tensor:
        """Both kinds of token go through the same two convolutions."""
        x_BTC = _norm_silu(x_BTC)
        x_BTC = _norm_silu(self.conv2(x_BTC))
        return _norm_silu(self.conv3(x_BTC))


class CausalAudioEncoder(nn.Module):
    """Mixes the layers of the speech model and encodes them in time, in float32 whatever the weights are."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(1, config.num_wav2vec_layers, 1, 1))
        self.encoder = MotionEncoder(config.audio_dim, config.dim, config.num_audio_token)

    def forward(self, speech_LCT: Tensor) -> tuple[Tensor, Tensor]:
        """Features [layers, audio_dim, T] -> global [T / 4, D], local [T / 4, K, D], both float32."""
        mix_L11 = F.silu(self.weights[0].float())
        mixed_CT = (mix_L11 * speech_LCT.float()).sum(dim=0) / mix_L11.sum()
        return self.encoder(mixed_CT.T)


class AdaptiveNorm(nn.Module):
    """LayerNorm whose scale and shift come from the global speech vector of the token's latent frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = Linear(dim, 2 * dim)

    def forward(self, x_TSD: Tensor, whole_TD: Tensor) -> Tensor:
        shift_TD, scale_TD = self.linear(F.silu(whole_TD)).float().chunk(2, dim=-1)
        normed_TSD = F.layer_norm(x_TSD.float(), x_TSD.shape[-1:], eps=ADAPTIVE_NORM_EPS)
        return (normed_TSD * (1 + scale_TD[:, None]) + shift_TD[:, None]).to(x_TSD.dtype)


class AudioInjector(nn.Module):
    """Adds speech to the video tokens after some of the transformer's layers."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        injections = range(len(config.audio_inject_layers))
        self.injector = nn.ModuleList(
            Attention(config.dim, config.num_heads, INJECTOR_EPS) for _ in injections
        )
        self.injector_adain_layers = nn.ModuleList(AdaptiveNorm(config.dim) for _ in injections)

    def forward(self, index: int, x_BLD: Tensor, speech: SpeechTokens, attend: AttentionBackend) -> Tensor:
        """Injection number `index` (in the order of the layers) into the tokens [1, L, D] of a block."""
        x_TSD = x_BLD.reshape(len(speech.whole), -1, x_BLD.shape[-1])
        normed_TSD = self.injector_adain_layers[index](x_TSD, speech.whole)
        attention = cast(Attention, self.injector[index])
        keys, values = attention.key_value(speech.local)
        heard_TSD = attention.output(attend(attention.query(normed_TSD), keys, values))
        return x_BLD + heard_TSD.reshape(x_BLD.shape)


def _norm_silu(x: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x, x.shape[-1:], eps=ENCODER_EPS))
