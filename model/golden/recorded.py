"""What the transformer's sets share: the recorded model, the files of a set, tolerances."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.config import DiTConfig
from model.dit import CausalDiT

VELOCITY = CACHES = TOKENS = 2e-5
AUDIO_ENCODER = 1e-5
ROPE = 1e-7
TIMESTEPS = 1e-4
SIGMAS = 1e-7


Recorded = dict[str, Tensor]


def load_dit(folder: Path, device: str) -> CausalDiT:
    """The recorded transformer in float32."""
    with torch.device("meta"):
        dit = CausalDiT(DiTConfig.from_file(folder / "dit_config.json"))
    dit.load_state_dict(load_file(folder / "dit_weights.safetensors"), strict=True, assign=True)
    return dit.to(device).eval()


def read(folder: Path, name: str) -> tuple[dict[str, Any], Recorded]:
    """Scalar arguments and tensors of a set."""
    values = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return values, load_file(folder / f"{name}.safetensors")
