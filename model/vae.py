"""The video autoencoder: diffusers' `AutoencoderKLWan` with a decoder that can be fed bit by bit.

Shapes: C channels, T pixel frames, H x W pixels; latents are [z, T', h, w] with T' = 1 + (T - 1) / 4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify
from torch import Tensor

from conf.spec import VaeSpec
from model.priming import DECODER_HISTORY

FRAMES_PER_LATENT = 4
"""Pixel frames of every latent frame but the first, which gives one."""


def build(spec: VaeSpec) -> AutoencoderKLWan:
    """The autoencoder that `spec` describes; on the default device, with torch's initial weights."""
    return AutoencoderKLWan(
        base_dim=spec.base_dim,
        z_dim=spec.z_dim,
        dim_mult=list(spec.dim_mult),
        num_res_blocks=spec.num_res_blocks,
        temperal_downsample=list(spec.temperal_downsample),
    )


def receptive_field(config: Mapping[str, Any]) -> int:
    """Latent frames before the current one that the decoder of an `AutoencoderKLWan` config depends on.

    Every causal convolution of width 3 looks 2 frames back at its own frame rate, which doubles with each
    temporal upsampling: conv_in, two residual blocks in the middle, then per level `num_res_blocks` + 1
    residual blocks of two convolutions and the upsampling's own.
    """
    reach, rate = 2.0 + 2 * 4, 1
    levels = [*reversed(config["temperal_downsample"]), False]
    for upsamples in levels:
        reach += 4 * (config["num_res_blocks"] + 1) / rate
        if upsamples:
            reach += 2 / rate
            rate *= 2
    return math.ceil(reach + 2 / rate)


def upstream_names(model: AutoencoderKLWan) -> dict[str, str]:
    """Parameter name in diffusers -> name in `Wan2.1_VAE.pth`.

    diffusers' own converter knows two residual blocks per level only; for those the two agree.
    """
    per_level = model.config["num_res_blocks"] + 2
    return {name: _upstream_name(name, per_level) for name in model.state_dict()}


_BLOCK_NAMES = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def _upstream_name(name: str, per_level: int) -> str:
    def level(match: re.Match[str]) -> str:
        block, kind, index = int(match[1]), match[2], int(match[3])
        within = index if kind == "resnets" else per_level - 1
        return f"decoder.upsamples.{block * per_level + within}."

    name = re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", level, name)
    name = re.sub(r"^encoder\.down_blocks\.", "encoder.downsamples.", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda m: f".middle.{2 * int(m[1])}.", name)
    name = name.replace(".mid_block.attentions.0.", ".middle.1.")
    name = re.sub(r"\.(norm1|conv1|norm2|conv2|conv_shortcut)\.", lambda m: f".{_BLOCK_NAMES[m[1]]}.", name)
    name = re.sub(r"^quant_conv\.", "conv1.", name)
    name = re.sub(r"^post_quant_conv\.", "conv2.", name)
    name = name.replace(".norm_out.", ".head.0.").replace(".conv_out.", ".head.2.")
    return name.replace(".conv_in.", ".conv1.")


class Vae:
    """A loaded autoencoder, in normalised latents: (z - mean) / std with its constants per channel."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        self.model = model
        config = model.config
        self.z_dim: int = config["z_dim"]
        self.spatial_compression: int = 2 ** (len(config["dim_mult"]) - 1) * (config["patch_size"] or 1)
        weight = model.post_quant_conv.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.mean_C = torch.tensor(config["latents_mean"], device=self.device).view(-1, 1, 1, 1)
        self.std_C = torch.tensor(config["latents_std"], device=self.device).view(-1, 1, 1, 1)

    def latent_hw(self, height: int, width: int) -> tuple[int, int]:
        """Size of a picture's latents. Raises ValueError if the compression does not divide a side."""
        if height % self.spatial_compression or width % self.spatial_compression:
            raise ValueError(f"{width}x{height}: both sides must be multiples of {self.spatial_compression}")
        return height // self.spatial_compression, width // self.spatial_compression

    @torch.inference_mode()
    def encode(self, pixels_CTHW: Tensor) -> Tensor:
        """Pixels [3, 1 + 4 n, H, W] in [-1, 1] -> latents [z, 1 + n, h, w], float32, on the VAE's device.

        The posterior's mode: nothing is drawn. Raises ValueError for another number of frames or odd sides.
        """
        _, frames, height, width = pixels_CTHW.shape
        self.latent_hw(height, width)
        if frames % FRAMES_PER_LATENT != 1:
            raise ValueError(f"{frames} frames: the VAE encodes 1 + {FRAMES_PER_LATENT} n frames")
        pixels_BCTHW = pixels_CTHW[None].to(self.device, self.dtype)
        z_CTHW = self.model.encode(pixels_BCTHW).latent_dist.mode()[0].float()
        return (z_CTHW - self.mean_C) / self.std_C

    def require_carried(self) -> None:
        """Raises ValueError if the decoder looks further back than the latents that a carry holds: it can
        decode a video as a whole only.
        """
        if (reach := receptive_field(self.model.config)) > DECODER_HISTORY:
            raise ValueError(
                f"vae.num_res_blocks={self.model.config['num_res_blocks']}: its decoder looks {reach} latent "
                f"frames back, and a segment hands on {DECODER_HISTORY}; segment_seconds=0 never cuts"
            )

    def stream(self) -> DecodeStream:
        """A decoder at its first frame. Any number may be open at once, each with its own caches."""
        return DecodeStream(self)


class DecodeStream:
    """Decodes one video, a few latents at a time, exactly as if all had been given at once."""

    def __init__(self, vae: Vae) -> None:
        self._vae = vae
        convolutions = sum(isinstance(m, WanCausalConv3d) for m in vae.model.decoder.modules())
        self._feat_cache: list[Any] = [None] * convolutions
        self._first = True

    @torch.inference_mode()
    def push(self, latents_CTHW: Tensor) -> Tensor:
        """Normalised latents [z, n, h, w] -> pixels [3, frames, H, W] in [-1, 1], float32, VAE's device.

        Every latent frame gives 4 frames, the first of the stream 1. One decoder call per latent frame, so
        that the bits do not depend on how a video is split into pushes.
        """
        vae = self._vae
        z_CTHW = (latents_CTHW.to(vae.device, torch.float32) * vae.std_C + vae.mean_C).to(vae.dtype)
        return torch.cat([self._decode(z_C1HW) for z_C1HW in z_CTHW.split(1, dim=1)], dim=1)

    def _decode(self, z_C1HW: Tensor) -> Tensor:
        model = self._vae.model
        x_BCTHW = model.decoder(
            model.post_quant_conv(z_C1HW[None]),
            feat_cache=self._feat_cache,
            feat_idx=[0],
            first_chunk=self._first,
        )
        self._first = False
        if patch_size := model.config["patch_size"]:
            x_BCTHW = unpatchify(x_BCTHW, patch_size)
        return x_BCTHW[0].float().clamp_(-1.0, 1.0)
