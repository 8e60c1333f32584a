"""Compares our arithmetic with recorded reference data, on any folder laid out like `tests/golden`.

The folder's README is the specification of the data and of the tolerances. Dimensions, numbers of layers,
steps and clips, and distances all come from the files.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

SETS = (
    "dit_block",
    "denoise_loop",
    "audio_encoder",
    "framepack",
    "audio_features",
    "vae",
    "text_encoder",
    "lora",
)
"""Names of the sets; the files of a set begin with its name."""


@dataclass(frozen=True)
class Check:
    """One recorded quantity of one set against ours."""

    set: str
    quantity: str
    difference: float
    """Largest absolute difference."""
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


def compare(set_name: str, quantity: str, ours: Tensor, recorded: Tensor, tolerance: float) -> Check:
    """Raises ValueError if the shapes differ. A NaN on either side is within no tolerance."""
    if ours.shape != recorded.shape:
        raise ValueError(f"{set_name} {quantity}: {list(ours.shape)}, recorded {list(recorded.shape)}")
    difference = (ours.cpu().double() - recorded.cpu().double()).abs().max().item()
    return Check(set_name, quantity, difference, tolerance)


def absent(folder: Path) -> list[str]:
    """Sets that the folder does not hold."""
    return [name for name in SETS if not any(folder.glob(f"{name}*.safetensors"))]


def run(folder: Path, device: str = "cpu") -> list[Check]:
    """Every set that the folder holds, in the order of `SETS`.

    Tolerances are those of float32 on a CPU; with `device="cuda"` the transformer's sets run there, in
    float32 and without TF32. A file that is broken, or missing of a set that is there, is the error of its
    reader.
    """
    from model.golden import dit, encoders

    return dit.checks(folder, device) + encoders.checks(folder)
