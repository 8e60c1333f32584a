"""Everything random about a video, as functions of its seed and of a place in it.

Drawn on the CPU, so that it does not depend on the device, on what was drawn before, or on the order of
calls.
"""

import hashlib

import torch
from torch import Tensor

MIN_DISTANCE, MAX_DISTANCE = 4, 30
"""Range in which upstream draws the reference's distance."""


def block_noise(seed: int, block: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of a block (counted over the whole video), float32 on the CPU."""
    generator = torch.Generator().manual_seed(_hash("noise", seed, block))
    return torch.randn(shape, generator=generator)


def relative_distance(seed: int, block: int, step: int) -> int:
    """How many latent frames the reference is ahead of a block at a denoising step: uniform in 4..30.

    Upstream draws it anew for every call from a generator without a seed.
    """
    return MIN_DISTANCE + _hash("distance", seed, block, step) % (MAX_DISTANCE - MIN_DISTANCE + 1)


def _hash(*parts: str | int) -> int:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little")
