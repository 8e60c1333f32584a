"""Motion history as tokens: the further back, the coarser.

Shape suffixes: C channels, F latent frames, L tokens, D model width.
"""

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import project_patches
from model.rope import grid_positions

KERNELS = {"proj": (1, 2, 2), "proj_2x": (2, 4, 4), "proj_4x": (4, 8, 8)}
"""Kernel and stride (frames, rows, columns) of each convolution, newest frames first."""


class FramePacker(nn.Module):
    """Compresses `sum(buckets)` latent frames with one convolution per bucket, newest bucket first."""

    def __init__(self, in_dim: int, dim: int, buckets: tuple[int, ...]) -> None:
        super().__init__()
        self.buckets = buckets
        for name, kernel in KERNELS.items():
            self.add_module(name, nn.Conv3d(in_dim, dim, kernel_size=kernel, stride=kernel))

    def forward(self, motion_CFHW: Tensor) -> Tensor:
        """Latents [C, F, h, w] -> tokens [1, L, D] in the order of `motion_positions`.

        Of more frames than the buckets hold the last are taken; fewer are filled up with zeros in front.
        """
        frames = sum(self.buckets)
        missing = max(0, frames - motion_CFHW.shape[1])
        motion_CFHW = F.pad(motion_CFHW[:, -frames:], (0, 0, 0, 0, missing, 0))
        oldest_first = motion_CFHW.split(self.buckets[::-1], dim=1)
        tokens = [
            project_patches(cast(nn.Conv3d, self.get_submodule(name)), part)
            for name, part in zip(KERNELS, reversed(oldest_first), strict=True)
        ]
        return torch.cat(tokens, dim=1)


def motion_positions(height: int, width: int, buckets: tuple[int, ...]) -> Tensor:
    """RoPE positions (time, row, column) [L, 3] of the motion tokens of latents of `height` x `width`.

    Times are negative, counted back from the first frame of the video. A coarse token takes one of the
    positions of the finest grid that it covers: equally spaced over the whole range and truncated, as
    upstream computes them.
    """
    parts, newest = [], 1
    for (kernel_frames, kernel_rows, kernel_columns), count in zip(KERNELS.values(), buckets, strict=True):
        oldest = newest + count - 1
        times = _spread(oldest, newest, count // kernel_frames)
        rows = _spread(0, height // 2 - 1, height // kernel_rows)
        columns = _spread(0, width // 2 - 1, width // kernel_columns)
        parts.append(grid_positions([-time for time in times], rows, columns))
        newest = oldest + 1
    return torch.cat(parts)


def _spread(start: int, end: int, count: int) -> list[int]:
    """`count` positions from `start` to `end`. NumPy's linspace, whose rounding the truncation depends on."""
    return np.linspace(start, end, count).astype(int).tolist()
