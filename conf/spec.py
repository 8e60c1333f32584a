"""What the published checkpoint files do not say about themselves."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class VaeSpec:
    """The video autoencoder. Defaults are Wan2.1's, as `Wan2.1_VAE.pth` holds only tensors."""

    file: str = "Wan2.1_VAE.pth"
    """File inside `ckpt_dir` with upstream's names, or a folder in diffusers' format (then its `config.json`
    rules and the fields below are not used)."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_res_blocks: int = 2
    temperal_downsample: list[bool] = field(default_factory=lambda: [False, True, True])


@dataclass(frozen=True)
class TextEncoderSpec:
    """The UMT5 encoder. Defaults are UMT5-XXL's, as the published `.pth` holds only tensors."""

    file: str = "models_t5_umt5-xxl-enc-bf16.pth"
    tokenizer: str = "google/umt5-xxl"
    """Folder of the tokenizer inside `ckpt_dir`."""

    vocab_size: int = 256_384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10_240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    dtype: str = "bfloat16"
    device: str = "cpu"
    """Where prompts are encoded: 11.4 GB that are used for a second per prompt, so a CPU by default."""
