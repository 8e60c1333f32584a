"""What one segment hands to the next, so that the picture goes on without a seam."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields

import safetensors.torch
import torch
from torch import Tensor

from model.conditions import check_tensor
from model.config import DiTConfig
from model.priming import DECODER_HISTORY, PRIMING_LATENTS

SCHEMA = 1
"""Version of the fields below and of what they mean."""

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

    @property
    def guided(self) -> bool:
        """Whether there is a negative branch. Up to a scale of 1 there is none, as upstream; at exactly 1 the
        formula would give the plain result anyway."""
        return self.sample_guide_scale > 1

    @property
    def caches(self) -> tuple[int, int, bool]:
        """What decides about number and size of the caches; segments that differ in the rest share them."""
        return self.infer_frames, self.sample_steps, self.guided


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
    """[C, 1, h, w] float32, in force for the blocks of the last clip."""
    motion: Tensor
    """[C, 19, h, w] float32, likewise."""
    next_reference: Tensor
    """[C, 1, h, w] float32, in force from `first_block` on: another than `reference` only after the first
    clip."""
    next_motion: Tensor
    """[C, 19, h, w] float32, likewise."""
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

    def check(self, config: DiTConfig, block_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raises CarryError unless the tensors are those of a transformer that computes in `dtype`, for
        blocks of `block_shape` [C, F, h, w]."""
        channels, frames, height, width = block_shape
        clip = self.settings.infer_frames // config.frames_per_block
        blocks = self.first_block - self.origin_block
        if self.origin_block < 0 or blocks < clip or blocks % clip:
            raise CarryError(
                f"origin_block={self.origin_block}: must lie whole clips of {clip} blocks before "
                f"first_block={self.first_block}"
            )
        latents = min(DECODER_HISTORY, PRIMING_LATENTS + blocks * frames)
        lengths = {"reference": 1, "next_reference": 1, "latents": latents}
        lengths |= {"motion": config.motion_frames_latent, "next_motion": config.motion_frames_latent}
        try:
            check_tensor("inputs", self.inputs, (clip, self.settings.sample_steps, *block_shape), dtype)
            for name, length in lengths.items():
                shape = channels, length, height, width
                check_tensor(name, getattr(self, name), shape, torch.float32)
        except ValueError as error:
            raise CarryError(f"carry: {error}") from error

    def to_bytes(self) -> bytes:
        # The format refuses tensors that share memory, as a reference that stays and the next one do.
        copies = {name: getattr(self, name).clone() for name in _TENSORS}
        tensors = {name: tensor.contiguous() for name, tensor in copies.items()}
        values = {
            "schema": SCHEMA,
            "settings": asdict(self.settings),
            "first_block": self.first_block,
            "origin_block": self.origin_block,
        }
        return safetensors.torch.save(tensors, metadata={"carry": json.dumps(values)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Carry":
        """Raises CarryError if `data` is torn, is no carry, has another schema version, or lacks or adds
        anything."""
        try:
            tensors = safetensors.torch.load(data)
            values = json.loads(_metadata(data)["carry"])
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CarryError(f"not a carry: {error!r}") from error
        if isinstance(values, dict) and values.get("schema") != SCHEMA:
            raise CarryError(f"schema={values.get('schema')!r}: this version reads {SCHEMA}")
        _require_names("metadata", values, ("schema", "settings", "first_block", "origin_block"))
        _require_names("settings", values["settings"], [field.name for field in fields(DenoiseSettings)])
        _require_names("tensors", tensors, _TENSORS)
        if wrong := [name for name in ("first_block", "origin_block") if type(values[name]) is not int]:
            raise CarryError(f"{wrong[0]}={values[wrong[0]]!r}: must be a whole number")
        try:
            settings = DenoiseSettings(**values["settings"])
        except (ValueError, TypeError) as error:
            raise CarryError(f"settings: {error}") from error
        return cls(settings, values["first_block"], values["origin_block"], **tensors)


_TENSORS = tuple(field.name for field in fields(Carry) if field.type in (Tensor, "Tensor"))


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of length, then JSON. The library's `load` drops it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]


def _require_names(what: str, given: object, wanted: Collection[str]) -> None:
    """Raises CarryError that says what is missing or surplus."""
    if not isinstance(given, dict):
        raise CarryError(f"not a carry: its {what} are no mapping")
    differences = {"missing": set(wanted) - given.keys(), "unexpected": given.keys() - set(wanted)}
    if problems := [f"{kind} {', '.join(sorted(names))}" for kind, names in differences.items() if names]:
        raise CarryError(f"{what}: {'; '.join(problems)}")


def extend_history(latents_CFHW: Tensor, block_CFHW: Tensor) -> Tensor:
    """`latents` with a clean block behind, no longer than the decoder needs."""
    return torch.cat((latents_CFHW, block_CFHW), dim=1)[:, -DECODER_HISTORY:]
