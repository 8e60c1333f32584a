"""Clocks, memory and the device's own ceiling: what the benchmarks measure with."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from model import memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Spread:
    """A repeated measurement."""

    median: float
    min: float
    max: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))

    @property
    def noise(self) -> float:
        """Distance of the extremes as a share of the median."""
        return (self.max - self.min) / self.median


@contextmanager
def building(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside lie on `device` in `dtype` from the first, with torch's initial weights."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(previous)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Wall time of a call, its kernels included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """Most bytes that torch held at once during the call, above what it held before.

    On a GPU as its allocator counts them, without CUDA's own; on a CPU by watching every storage, which makes
    the call slower.
    """
    if device.type != "cuda":
        return memory.peak(call)
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Product:
    """The matrix product [m, k] x [k, n]: the yardstick of a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, m: int, k: int, n: int) -> None:
        self.name = f"{m}x{k}x{n}"
        self._device, self._flops = device, 2 * m * k * n
        self._left = torch.randn(m, k, device=device, dtype=dtype)
        self._right = torch.randn(k, n, device=device, dtype=dtype)
        self._out = torch.empty(m, n, device=device, dtype=dtype)
        self._ten_times()

    def rate(self) -> float:
        """FLOP/s, now."""
        return 10 * self._flops / seconds(self._device, self._ten_times)

    def _ten_times(self) -> None:
        for _ in range(10):
            torch.mm(self._left, self._right, out=self._out)


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
