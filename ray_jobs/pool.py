"""Pools of workers, and how large each is: one pure function, so that a simulation can run it."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from conf.schema import Settings


class Stopped(Exception):
    """The run is ending; nothing new is begun."""


@dataclass(frozen=True)
class Sizes:
    """Workers of each stage, and lessons on the road at once."""

    conditioners: int
    groups: int
    decoders: int
    lessons: int
    """Enough that a group never waits for a lesson to be read or finished, and no more: every lesson on the
    road holds its sound in memory."""


def pool_sizes(settings: Settings, lessons: int) -> Sizes:
    """Sizes for a run that has `lessons` lessons left to render; zero everywhere when nothing is left."""
    if lessons == 0:
        return Sizes(0, 0, 0, 0)
    groups = min(settings.num_groups, lessons)
    decoders = min(settings.num_decoders, lessons)
    slots = decoders * settings.decode_slots
    return Sizes(
        conditioners=min(settings.num_conditioners, lessons),
        groups=groups,
        decoders=decoders,
        lessons=min(lessons, slots, 2 * groups + settings.prepare_workers),
    )


def cpus_needed(settings: Settings) -> float:
    """CPUs that all pools ask for together, with one task beside them."""
    return (
        settings.num_groups * settings.denoise_cpus
        + settings.num_decoders * settings.decode_cpus
        + settings.num_conditioners * settings.condition_cpus
        + settings.prepare_workers * settings.prepare_cpus
    )


class Pool:
    """Workers of one stage that are lent out, longest remaining chain first, and replaced when they are lost.

    Args:
        start: makes one worker.
        size: workers of the pool.
        slots: how many borrowers one worker serves at a time.
        loads: whether a new worker is lent out only once `admit` was called for it.
    """

    def __init__(self, start: Callable[[], Any], size: int, slots: int = 1, loads: bool = False) -> None:
        self._start = start
        self._changed = threading.Condition()
        self.workers = [start() for _ in range(size)]
        self._free = [] if loads else self.workers * slots
        self._slots = slots
        self._waiting: list[tuple[float, int]] = []
        self._tickets = itertools.count()
        self.stopped = False

    @contextmanager
    def lease(self, priority: float) -> Iterator[Lease]:
        """Borrow a worker, once one is free and nobody with a higher priority waits. Raises Stopped."""
        lease = Lease(self, self._take(priority))
        try:
            yield lease
        finally:
            lease.release()

    def _take(self, priority: float) -> Any:
        with self._changed:
            ticket = (-priority, next(self._tickets))
            heapq.heappush(self._waiting, ticket)
            try:
                self._changed.wait_for(lambda: self.stopped or (self._free and self._waiting[0] == ticket))
            finally:
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
                self._changed.notify_all()
            if self.stopped:
                raise Stopped
            return self._free.pop(0)

    def admit(self, worker: Any) -> None:
        """A worker has loaded its model and may be lent out."""
        with self._changed:
            if worker in self.workers:
                self._free += [worker] * self._slots
            self._changed.notify_all()

    def give_back(self, worker: Any) -> None:
        with self._changed:
            if worker in self.workers:
                self._free.append(worker)
            self._changed.notify_all()

    def replace(self, worker: Any) -> None:
        """Put a fresh worker in the place of one that was lost, in all of its slots."""
        with self._changed:
            if worker not in self.workers or self.stopped:
                return
            worker.kill()
            fresh = self._start()
            self.workers = [fresh if other is worker else other for other in self.workers]
            self._free = [other for other in self._free if other is not worker] + [fresh] * self._slots
            self._changed.notify_all()

    def stop(self) -> None:
        """Wake everybody who waits, with Stopped."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Stop, and end the workers."""
        self.stop()
        for worker in self.workers:
            worker.kill()


class Lease:
    """A worker on loan; may be given back before its `with` ends, so that the next borrower can line up."""

    def __init__(self, pool: Pool, worker: Any) -> None:
        self.worker = worker
        self._pool = pool
        self._open = True

    def release(self) -> None:
        if self._open:
            self._open = False
            self._pool.give_back(self.worker)

    def replace(self) -> None:
        """The worker was lost or is not to be trusted any more."""
        self._open = False
        self._pool.replace(self.worker)
