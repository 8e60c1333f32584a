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
    """Seconds of a repeated call."""

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


def product_rate(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], repeats: int
) -> Spread:
    """Seconds of the product [m, k] x [k, n] for `shape` (m, k, n), each sample the mean of ten."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)

    def ten() -> None:
        for _ in range(10):
            torch.mm(left, right, out=out)

    ten()
    return Spread.of([seconds(device, ten) / 10 for _ in range(repeats)])


def ceiling(
    device: torch.device, dtype: torch.dtype, shapes: list[tuple[int, int, int]], repeats: int
) -> dict[str, float]:
    """FLOP/s of each product at its fastest, and of the best of them as `best`."""
    rates = {}
    for m, k, n in shapes:
        rates[f"{m}x{k}x{n}"] = 2 * m * k * n / product_rate(device, dtype, (m, k, n), repeats).min
    return {**rates, "best": max(rates.values())}


def mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
