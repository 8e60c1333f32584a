"""Compares our arithmetic with recorded reference data, on any folder laid out like `tests/golden`.

The folder's README is the specification of the data and of the tolerances. Dimensions, numbers of layers,
steps and clips, and distances all come from the files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

SETS = {
    "dit_block": ("dit_block.json", "dit_block.safetensors"),
    "denoise_loop": ("denoise_loop.json", "denoise_loop.safetensors"),
    "audio_encoder": ("audio_encoder.json", "audio_encoder.safetensors"),
    "framepack": ("framepack.json", "framepack.safetensors"),
    "audio_features": ("audio_features.json", "audio_features.safetensors", "wav2vec2_tiny"),
    "vae": ("vae.json", "vae.safetensors", "vae_weights.safetensors"),
    "text_encoder": ("text_encoder.json", "text_encoder.safetensors", "text_encoder_weights.safetensors"),
    "lora": ("lora.json", "lora_merged.safetensors", "lora_prefixed.safetensors"),
}
"""Names of the sets, and the files that belong to each alone."""


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


def present(folder: Path) -> list[str]:
    """Sets of which the folder holds anything."""
    return [name for name, files in SETS.items() if any((folder / file).exists() for file in files)]


def absent(folder: Path) -> list[str]:
    """Sets of which the folder holds nothing."""
    return [name for name in SETS if name not in present(folder)]


def run(folder: Path, device: str = "cpu") -> Iterator[tuple[str, list[Check] | Exception]]:
    """Every set that is present, with its checks or with the error that kept it from being compared.

    Tolerances are those of float32 on a CPU; with `device="cuda"` the transformer's sets run there, in
    float32 and without TF32.
    """
    for name in present(folder):
        try:
            yield name, _checks(name, folder, device)
        except Exception as error:  # Whatever a reader finds wrong with one set, the others are compared.
            yield name, error


def _checks(name: str, folder: Path, device: str) -> list[Check]:
    if missing := [file for file in SETS[name] if not (folder / file).exists()]:
        raise FileNotFoundError(f"missing {', '.join(missing)}")
    from model.golden import dit, encoders

    return dit.run_set(name, folder, device) if name in dit.SETS else encoders.SETS[name](folder)
