"""What `size` means: an area, from which every portrait gets its own true size."""

import math
import re

from stages.types import RowError

MULTIPLE = 64
"""Both sides of a video are multiples of this: 8 of the autoencoder times 8 of the coarsest motion tokens."""

MAX_AREA = 1920 * 1088
"""Pixels of the largest video that is accepted; the published model was trained up to 1280*720."""

_TRIES = 100
_SIZE = re.compile(r"\s*([0-9]{1,9})\s*[*xX]\s*([0-9]{1,9})\s*")


def parse_size(text: str) -> tuple[int, int]:
    """`704*384`, `704x384`, `704 X 384` -> (704, 384). Raises RowError for anything else."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise RowError("size", text, "must be two whole numbers such as 704*384 (also 704x384)")
    width, height = int(match[1]), int(match[2])
    if min(width, height) < MULTIPLE:
        raise RowError("size", text, f"both sides must be at least {MULTIPLE} pixels")
    if width * height > MAX_AREA:
        raise RowError("size", text, f"must be at most {MAX_AREA} pixels in all (1920*1088)")
    return width, height


def true_size(width: int, height: int, area: int) -> tuple[int, int]:
    """(width, height) of the video for a picture of `width` x `height`: the rule of Wan2.2's speech-to-video.

    Scales are tried from large to small, starting from 1 or from where the picture has the area; sides are
    rounded down to pixels and up to multiples of 64; the first that fits the area is taken. So a picture
    smaller than the area is not enlarged beyond the next multiples. Raises ValueError if none fits (an
    extremely long picture).
    """
    largest, smallest = _scales(width, height, area)
    for i in range(_TRIES):
        scale = largest - (largest - smallest) * i / _TRIES
        w, h = _round_up(int(width * scale)), _round_up(int(height * scale))
        if w * h <= area:
            return w, h
    raise ValueError(f"no multiples of {MULTIPLE} in the shape of {width}x{height} fit {area} pixels")


def _scales(width: int, height: int, area: int) -> tuple[float, float]:
    """The largest and the smallest scale to try. The smallest decides on the spacing of the tries and so on
    the result: it is upstream's, whose quadratic formula has a 2 where one expects a 4."""
    pixels = width * height
    if pixels <= area:
        return 1.0, 0.1
    pad = MULTIPLE - 1
    b = pad * (width + height)
    return math.sqrt(area / pixels), (math.sqrt(b**2 - 2 * pixels * (pad**2 - area)) - b) / (2 * pixels)


def _round_up(side: int) -> int:
    return max(1, math.ceil(side / MULTIPLE)) * MULTIPLE
