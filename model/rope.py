"""Rotary positions in time, row and column.

Shape suffixes: L tokens, N heads, D head size, C = D / 2 complex channels, H and W token grid of a frame.
A multiplier is stored as (cosine, sine) in the last dimension.
"""

import torch
from torch import Tensor

THETA = 10000.0

REFERENCE_TIME = 30
"""Time position of the reference in a prefill."""


def reference_time(frame: int, distance: int) -> int:
    """Time position of the reference in a call whose first latent frame is `frame`.

    It rests at 30 and then goes on `distance` frames ahead of the video.
    """
    return REFERENCE_TIME + max(0, frame - (REFERENCE_TIME - distance))


def multipliers(positions_L3: Tensor, head_dim: int) -> Tensor:
    """RoPE multipliers [L, C, 2] float32 of integer positions (time, row, column) [L, 3], on the CPU.

    With C = head_dim / 2, the first C - 2 * (C // 3) channels turn with time, then C // 3 with the row and
    C // 3 with the column; frequency i of an axis of c channels is THETA ** (-i / c). As upstream keeps its
    table in half precision, real and imaginary part are rounded from float64 to float16.
    """
    channels = head_dim // 2
    side = channels // 3
    angles = [
        torch.outer(positions_L3[:, axis].double(), _frequencies(count))
        for axis, count in enumerate((channels - 2 * side, side, side))
    ]
    angle_LC = torch.cat(angles, dim=1)
    return torch.stack((angle_LC.cos(), angle_LC.sin()), dim=-1).half().float()


def grid_positions(times: list[int], rows: list[int], columns: list[int]) -> Tensor:
    """Positions [L, 3] of a grid of tokens in token order: time slowest, column fastest."""
    return torch.cartesian_prod(torch.tensor(times), torch.tensor(rows), torch.tensor(columns))


def rotate(x_BLND: Tensor, multipliers_LC2: Tensor) -> Tensor:
    """Turns neighbouring channels (2j, 2j + 1) of every head by their multiplier; keeps the dtype.

    Upstream multiplies in complex128. Multipliers have 11 significant bits, so float32 products of them are
    off by one rounding only, 6e-8 of the value.
    """
    cos_LNC, sin_LNC = multipliers_LC2[:, None, :, 0], multipliers_LC2[:, None, :, 1]
    even, odd = x_BLND.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x_BLND)
    out_even, out_odd = out.unflatten(-1, (-1, 2)).unbind(-1)
    out_even.copy_(even * cos_LNC - odd * sin_LNC)
    out_odd.copy_(even * sin_LNC + odd * cos_LNC)
    return out


class RopeTable:
    """Multipliers of the video frames `first` to `last` (inclusive) of one segment, computed once.

    A frame's multipliers depend on its position in two independent parts, so a table of times and one of the
    places within a frame are enough.
    """

    def __init__(
        self, head_dim: int, grid: tuple[int, int], first: int, last: int, device: torch.device
    ) -> None:
        rows, columns = grid
        times = grid_positions(list(range(first, last + 1)), [0], [0])
        places = grid_positions([0], list(range(rows)), list(range(columns)))
        channels = head_dim // 2
        self.first, self.last = first, last
        self._time_channels = channels - 2 * (channels // 3)
        self._time_FC2 = multipliers(times, head_dim)[:, : self._time_channels].to(device)
        self._place_LC2 = multipliers(places, head_dim)[:, self._time_channels :].to(device)

    def frames(self, first: int, count: int) -> Tensor:
        """[count * H * W, C, 2] of the tokens of `count` frames from time position `first` on."""
        if not self.first <= first <= first + count - 1 <= self.last:
            raise IndexError(f"frames {first}..{first + count - 1} lie outside {self.first}..{self.last}")
        time_FC2 = self._time_FC2[first - self.first : first - self.first + count]
        places = len(self._place_LC2)
        return torch.cat(
            (
                time_FC2[:, None].expand(-1, places, -1, -1).flatten(0, 1),
                self._place_LC2.repeat(count, 1, 1),
            ),
            dim=1,
        )


def _frequencies(count: int) -> Tensor:
    return THETA ** -(torch.arange(count, dtype=torch.float64) / count)
