"""What a run's bits depend on beside its settings: recorded with every run, part of no identity."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

_PACKAGES = ("av", "diffusers", "numpy", "ray", "soxr", "torch", "transformers")


def versions() -> dict[str, str]:
    """Versions of what computes the frames, and of the system under it."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "system": platform.platform(), **found}


def hardware(device: str) -> str:
    """Name of the GPU, with its driver's CUDA, or of the CPU that a worker computes on."""
    if device == "cuda":
        import torch

        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
