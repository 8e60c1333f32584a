"""Encodings that lessons share: computed once per content, dropped after the last use."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable

from ray_jobs.backend import Ref


def content_key(kind: str, *parts: object) -> str:
    """Name of an encoding: equal for equal content."""
    return f"{kind}:{hashlib.sha256(repr(parts).encode()).hexdigest()}"


class Shared:
    """References to encodings by content.

    Args:
        uses: the key of every use that will be made; `release` is called as often.
    """

    def __init__(self, uses: Iterable[str]) -> None:
        self._uses = Counter(uses)
        self._lock = threading.Lock()
        self._making: dict[str, threading.Lock] = {}
        self._refs: dict[str, Ref] = {}

    def get(self, key: str, make: Callable[[], Ref]) -> tuple[Ref, bool]:
        """The encoding, and whether this call computed it. Others that want the same one wait meanwhile."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            if key in self._refs:
                return self._refs[key], False
            self._refs[key] = ref = make()
            return ref, True

    def forget(self, key: str) -> None:
        """Its value may be lost: the next `get` computes it again."""
        self._refs.pop(key, None)

    def release(self, key: str) -> None:
        """One use is over."""
        with self._lock:
            self._uses[key] -= 1
            if self._uses[key] <= 0:
                self._refs.pop(key, None)
