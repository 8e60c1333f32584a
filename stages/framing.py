"""Which rectangle of a portrait is seen. Pure arithmetic on pixels."""

import re
from typing import NamedTuple

from stages.faces import Box
from stages.types import RowError

ASPECTS = {"16:9": (16, 9), "9:16": (9, 16), "1:1": (1, 1)}

_RECTANGLE = re.compile(r"\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*")
_FACE_HEIGHT = 0.42
"""Where the middle of the face goes, as a share of the picture's height from its top."""
_HAIR = 0.4
"""Head above the forehead, as a share of the face's height."""
_NECK = 0.15
"""Room below the chin, as a share of the face's height."""


class Rectangle(NamedTuple):
    x: int
    y: int
    width: int
    height: int


def parse_crop(text: str) -> Rectangle | None:
    """`x,y,w,h` -> the rectangle; None for `face` and `none`. Raises RowError for anything else."""
    if text in ("face", "none"):
        return None
    match = _RECTANGLE.fullmatch(text)
    rectangle = Rectangle(*map(int, match.groups())) if match else None
    if rectangle is None or not rectangle.width or not rectangle.height:
        raise RowError("crop", text, "must be face, none, or x,y,w,h in pixels such as 40,0,640,360")
    return rectangle


def parse_aspect(text: str) -> tuple[int, int] | None:
    """`16:9` -> (16, 9); None for `keep`. Raises RowError for anything else."""
    if text == "keep":
        return None
    if text not in ASPECTS:
        raise RowError("aspect", text, f"must be keep, {', '.join(ASPECTS)}")
    return ASPECTS[text]


def largest(width: int, height: int, aspect: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) of this aspect inside `width` x `height`, to the pixel."""
    a, b = aspect
    if width * b > height * a:
        return max(1, round(height * a / b)), height
    return width, max(1, round(width * b / a))


def centred(area: Rectangle, width: int, height: int) -> Rectangle:
    """`width` x `height` around the middle of `area`."""
    return Rectangle(area.x + (area.width - width) // 2, area.y + (area.height - height) // 2, width, height)


def around_face(area: Rectangle, width: int, height: int, face: Box) -> Rectangle:
    """`width` x `height` inside `area` with the face in the middle and a little above half height.

    Hair is kept before the wished height is, the chin before hair, and the picture's border limits all.
    """
    x = face.x + face.width / 2 - width / 2
    y = face.y + face.height / 2 - _FACE_HEIGHT * height
    y = min(y, face.y - _HAIR * face.height)
    y = max(y, face.y + (1 + _NECK) * face.height - height)
    return Rectangle(
        _clamp(round(x), area.x, area.x + area.width - width),
        _clamp(round(y), area.y, area.y + area.height - height),
        width,
        height,
    )


def cuts_face(crop: Rectangle, face: Box) -> bool:
    """Whether a tenth of the face or more, in either direction, lies outside the crop."""
    left, right = crop.x - face.x, face.x + face.width - crop.x - crop.width
    above, below = crop.y - face.y, face.y + face.height - crop.y - crop.height
    return max(left, right) > 0.1 * face.width or max(above, below) > 0.1 * face.height


def _clamp(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)
