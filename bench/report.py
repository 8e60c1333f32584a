"""Sections that run under limits, and results that are on disk as soon as they are known."""

import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any


@dataclass
class Report:
    """Results so far, on the terminal and in a file."""

    out: Path
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)

    def section(self, name: str, limit: float, run: Callable[[], dict[str, Any]]) -> None:
        """Runs a section for at most `limit` seconds, or what is left of all, and writes what came of it."""
        start = time.monotonic()
        left = min(limit, self.deadline - start)
        print(f"== {name} (at most {max(left, 0):.0f} s)", flush=True)
        try:
            with time_limit(left):
                result = run()
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        self.results[name] = {**result, "seconds": time.monotonic() - start}
        print(f"   {self.results[name]['seconds']:.1f} s", flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.results, indent=2) + "\n"
        (self.out / "gpu.json").write_text(text, encoding="utf-8")

    @property
    def failed(self) -> list[str]:
        return [name for name, result in self.results.items() if "error" in result]


@contextmanager
def time_limit(limit: float) -> Iterator[None]:
    """Raises TimeoutError inside if it takes longer. Main thread only."""
    if limit <= 0:
        raise TimeoutError("no time is left")

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {limit:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
