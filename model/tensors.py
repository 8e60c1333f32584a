"""Files of named tensors, safetensors and torch pickles: shapes without data, and data without copies."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.files import CheckpointError

_LFS_POINTER = b"version https://git-lfs"


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, from the header alone. Raises CheckpointError for a damaged file."""
    with _reading(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return {name: tuple(tensor.shape) for name, tensor in _unpickle(path).items()}


def metadata(path: Path) -> dict[str, str]:
    """Free text in the header; empty for pickles."""
    if path.suffix != ".safetensors":
        return {}
    with _reading(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, mapped from the file: nothing is read before it is used, and then into the page
    cache, which all processes of a machine share. Raises CheckpointError for a damaged file.
    """
    with _reading(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        else:
            tensors = _unpickle(path)
            for name in names:
                yield name, tensors[name]


def _unpickle(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: not a dictionary of tensors")
    return content


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    try:
        yield
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        reason = str(error).partition("\n")[0] or type(error).__name__
        why = "a Git LFS pointer, the file itself was not fetched" if pointer else reason
        raise CheckpointError(f"{path}: truncated or not a tensor file: {why}") from error
