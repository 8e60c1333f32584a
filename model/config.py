"""Dimensions of the transformer, read from a checkpoint's `config.json` in upstream's keys. No torch here."""

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from model.errors import CheckpointError

REQUIRED_VALUES: dict[str, Any] = {
    "model_type": "s2v",
    "enable_adain": True,
    "adain_mode": "attn_norm",
    "zero_timestep": True,
    "enable_motioner": False,
    "enable_tsm": False,
    "trainable_token_pos_emb": False,
    "slide_motion_frames": False,
    "add_last_motion": True,
    "enable_framepack": True,
    "framepack_drop_mode": "padd",
    "qk_norm": True,
    "cross_attn_norm": True,
    "window_size": [-1, -1],
    "local_attn_size": -1,
}
"""Keys of upstream's constructor that select another architecture: where present they must have these
values."""


class ConfigError(CheckpointError, ValueError):
    """A `config.json` that this transformer cannot be built from."""


@dataclass(frozen=True)
class DiTConfig:
    """Constructor arguments of the causal S2V transformer, upstream's names.

    Fields with a default are those that the published `config.json` leaves out.
    """

    dim: int
    ffn_dim: int
    freq_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    cond_dim: int
    audio_dim: int
    audio_inject_layers: tuple[int, ...]
    num_audio_token: int = 4
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_wav2vec_layers: int = 25
    framepack_zip_frame_buckets: tuple[int, ...] = (1, 2, 16)
    """Latent frames of the motion history per compression, newest first."""
    num_frames_per_block: int = 3
    motion_frames_pixel: int = 73
    """Copies of a block's first speech frame that are put before it."""
    motion_frames_latent: int = 19

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ConfigError(f"dim={self.dim}, num_heads={self.num_heads}: heads must be of one even size")
        if self.dim % 4:
            raise ConfigError(f"dim={self.dim}: must be a multiple of 4 for the audio encoder")
        if self.freq_dim % 2:
            raise ConfigError(f"freq_dim={self.freq_dim}: must be even")
        if self.patch_size[0] != 1:
            raise ConfigError(f"patch_size={self.patch_size}: patches must span one latent frame")
        layers = self.audio_inject_layers
        if list(layers) != sorted(set(layers)) or not all(0 <= i < self.num_layers for i in layers):
            raise ConfigError(
                f"audio_inject_layers={layers}: must increase and lie in 0..{self.num_layers - 1}"
            )
        if len(self.framepack_zip_frame_buckets) != 3:
            raise ConfigError(
                f"framepack_zip_frame_buckets={self.framepack_zip_frame_buckets}: must be three"
            )
        if sum(self.framepack_zip_frame_buckets) != self.motion_frames_latent:
            raise ConfigError(
                f"framepack_zip_frame_buckets={self.framepack_zip_frame_buckets}: "
                f"must sum to motion_frames_latent={self.motion_frames_latent}"
            )
        if self.motion_frames_pixel != 4 * self.motion_frames_latent - 3:
            raise ConfigError(
                f"motion_frames_pixel={self.motion_frames_pixel}: must be the frames that "
                f"motion_frames_latent={self.motion_frames_latent} stand for, "
                f"{4 * self.motion_frames_latent - 3}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def frames_per_block(self) -> int:
        """Video frames of a block: the autoencoder makes 4 of each latent frame."""
        return 4 * self.num_frames_per_block

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame of `height` x `width`."""
        return height // self.patch_size[1], width // self.patch_size[2]

    @classmethod
    def from_file(cls, path: Path) -> "DiTConfig":
        """Reads a `config.json`. Raises ConfigError with the file, the key, its value and the rule.

        Keys that are unknown here are left aside: what they could add to the architecture are tensors, and
        the strict load of the checkpoint names every tensor that has no place.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: must hold one JSON object")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DiTConfig":
        """As `from_file`, from the parsed object."""
        for key, required in REQUIRED_VALUES.items():
            if values.get(key, required) != required:
                raise ConfigError(f"{key}={values[key]!r}: only {required!r} is implemented")
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ConfigError(f"missing {', '.join(missing)}")
        given = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        try:
            return cls(**arguments)
        except (TypeError, ZeroDivisionError) as error:
            raise ConfigError(f"not the dimensions of a transformer ({error})") from error
