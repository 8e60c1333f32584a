"""Live Avatar's LoRA: which tensors form pairs, whether they fit the transformer, and W + scale * B @ A."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import tensors
from model.files import listed

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Lora:
    """A LoRA file whose every tensor has its place."""

    path: Path
    scale: float
    """alpha / rank."""
    pairs: dict[str, tuple[str, str]]
    """Name of the weight that is changed -> names of A [rank, in] and B [out, rank] in the file."""

    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of every changed weight, mapped from the file."""
        names = [name for pair in self.pairs.values() for name in pair]
        found = dict(tensors.read(self.path, names))
        return {weight: (found[a], found[b]) for weight, (a, b) in self.pairs.items()}


def merged(weight: Tensor, pair: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """weight [out, in] + scale * B @ A, float32, computed on the weight's device."""
    a, b = (tensor.to(weight.device, torch.float32) for tensor in pair)
    return torch.addmm(weight.float(), b, a, alpha=scale)


def find(path: Path, alpha: float, rank: int, weights: Shapes) -> tuple[Lora, list[str]]:
    """Pairs a LoRA file's tensors with the weights of a model, and says all that does not fit.

    `weights` are the model's names and shapes. Names may carry PEFT's `base_model.model.` and `.default`. A
    kind of layer (say `self_attn.q`) must be adapted in every place of the model or in none: a file that
    lacks some of them was cut short.
    """
    shapes = tensors.shapes(path)
    sides, strangers = _sides(shapes)
    known = {name: pair for name, pair in sides.items() if name in weights}
    pairs = {name: (pair["A"], pair["B"]) for name, pair in known.items() if len(pair) == 2}
    halves = [name for pair in known.values() if len(pair) == 1 for name in pair.values()]
    misfits = [
        misfit for name, pair in pairs.items() for misfit in _misfits(shapes, pair, weights[name], rank)
    ]
    kinds = {_kind(name) for name in known}
    problems = [
        *listed(path, "not of a LoRA", strangers),
        *listed(path, "for a weight that the model lacks", [name for name in sides if name not in weights]),
        *listed(path, "without its other half", halves),
        *listed(path, "misshapen", misfits),
        *listed(path, "without a pair", [n for n in weights if _kind(n) in kinds and n not in known]),
    ]
    if not known:
        problems.append(f"{path}: none of its {len(shapes)} tensors belongs to the model")
    return Lora(path, alpha / rank, pairs), problems


def _sides(shapes: Shapes) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Weight -> side -> tensor name, and the tensors that are no part of a LoRA or there under two names."""
    sides: dict[str, dict[str, str]] = {}
    strangers = []
    for name in shapes:
        match = _NAME.fullmatch(name)
        pair = sides.setdefault(f"{match['module']}.weight", {}) if match else {}
        if match and match["side"] not in pair:
            pair[match["side"]] = name
        else:
            strangers.append(name)
    return sides, strangers


def _misfits(shapes: Shapes, pair: tuple[str, str], weight: tuple[int, ...], rank: int) -> list[str]:
    if len(weight) != 2:
        return [f"{pair[0]} for a weight of {list(weight)}"]
    wanted = ((rank, weight[1]), (weight[0], rank))
    return [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in zip(pair, wanted, strict=True)
        if shapes[name] != shape
    ]


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", name, count=1)
