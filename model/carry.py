"""What one segment hands to the next, so that the picture goes on without a seam."""

import json
from dataclasses import asdict, dataclass, fields

import safetensors.torch
import torch
from torch import Tensor

SCHEMA = 1
"""Version of the fields below and of what they mean."""

DECODER_HISTORY = 38
"""Latent frames before a cut that the video decoder is primed with: its whole receptive field."""

REFERENCES = ("first_latent", "keep", "first_latent_and_motion")


class CarryError(ValueError):
    """A carry that this segment cannot go on from."""


@dataclass(frozen=True)
class DenoiseSettings:
    """Settings of the transformer's loop; names and meaning as in `conf.schema.GenerationSettings`."""

    infer_frames: int
    sample_steps: int
    sample_solver: str
    sample_shift: float
    sample_guide_scale: float
    base_seed: int
    reference: str

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise ValueError(f"reference={self.reference!r}: must be one of {', '.join(REFERENCES)}")
        if self.sample_guide_scale < 0:
            raise ValueError(f"sample_guide_scale={self.sample_guide_scale}: must not be negative")


@dataclass(frozen=True)
class Carry:
    """CPU tensors. No caches: the next segment makes its own by running the last clip's cells again."""

    settings: DenoiseSettings
    first_block: int
    """The block that comes next, counted over the whole lesson."""
    origin_block: int
    """The block at which positions and clips of the video begin."""
    inputs: Tensor
    """[blocks, steps, C, F, h, w] in the transformer's dtype: x before each step of the last clip's
    blocks."""
    reference: Tensor
    """[C, 1, h, w], in force for the next block."""
    motion: Tensor
    """[C, 19, h, w], in force for the next block."""
    latents: Tensor
    """[C, up to 38, h, w] float32: the last clean latents. Where there were fewer, the motion latents that
    the decoder was primed with at the start of the video stand in front."""

    def require(self, settings: DenoiseSettings, first_block: int) -> None:
        """Raises CarryError unless this was made with `settings`, for a segment from `first_block` on."""
        for field in fields(DenoiseSettings):
            mine, other = getattr(self.settings, field.name), getattr(settings, field.name)
            if mine != other:
                raise CarryError(f"{field.name}={other!r}: the segment before was made with {mine!r}")
        if first_block != self.first_block:
            raise CarryError(f"first_block={first_block}: the carry goes on at block {self.first_block}")

    def to_bytes(self) -> bytes:
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        values = {
            "schema": SCHEMA,
            "settings": asdict(self.settings),
            "first_block": self.first_block,
            "origin_block": self.origin_block,
        }
        return safetensors.torch.save(tensors, metadata={"carry": json.dumps(values)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Carry":
        """Raises CarryError if `data` is torn, is no carry, or has another schema version."""
        try:
            tensors = safetensors.torch.load(data)
            values = json.loads(_metadata(data)["carry"])
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise CarryError(f"not a carry: {error!r}") from error
        if values.get("schema") != SCHEMA:
            raise CarryError(f"schema={values.get('schema')!r}: this version reads {SCHEMA}")
        settings = DenoiseSettings(**values["settings"])
        return cls(settings, values["first_block"], values["origin_block"], **tensors)


_TENSORS = tuple(field.name for field in fields(Carry) if field.type in (Tensor, "Tensor"))


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of length, then JSON. The library's `load` drops it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]


def extend_history(latents_CFHW: Tensor, block_CFHW: Tensor) -> Tensor:
    """`latents` with a clean block behind, no longer than the decoder needs."""
    return torch.cat((latents_CFHW, block_CFHW), dim=1)[:, -DECODER_HISTORY:]
