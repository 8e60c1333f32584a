"""Watches the workers while they are placed and load their models, and lets the ready ones into their
pool."""

from __future__ import annotations

import time

from ray_jobs.backend import Backend, Failed, Lost, RayBackend
from ray_jobs.events import EventLog
from ray_jobs.pool import Pool

_FIRST_POLL_SECONDS, _POLL_SECONDS = 0.1, 2.0


class CannotStart(Exception):
    """No worker of a stage can be placed, or its model cannot be loaded."""


def watch_loading(backend: Backend, stage: str, pool: Pool, events: EventLog, timeout: float) -> None:
    """Report how far a pool's models are loaded, until all are or the pool is stopped.

    Raises CannotStart if a worker finds no place within `timeout` seconds, or if loading fails.
    """
    began = time.monotonic()
    states = dict.fromkeys(pool.workers, (0, 0))
    waiting = list(pool.workers)
    pause, told = _FIRST_POLL_SECONDS, (-1, -1)
    while waiting and not pool.stopped:
        for worker in list(waiting):
            answer = worker.submit("loading")
            left = max(0.0, timeout - (time.monotonic() - began))
            if not backend.wait(answer, timeout=left):
                raise CannotStart(_no_place(backend, stage, timeout))
            try:
                done, total, over = backend.get(answer)
            except (Failed, Lost) as error:
                raise CannotStart(f"the {stage} model cannot be loaded: {error}") from error
            states[worker] = (done, total)
            if over:
                waiting.remove(worker)
                pool.admit(worker)
        done, total = (sum(column) for column in zip(*states.values(), strict=True))
        if (done, total) != told:
            events.emit("loading", stage=stage, bytes=done, total=total)
            told = (done, total)
        time.sleep(pause if waiting else 0)
        pause = min(2 * pause, _POLL_SECONDS)
    events.emit("loaded", stage=stage, seconds=round(time.monotonic() - began, 2))


def _no_place(backend: Backend, stage: str, timeout: float) -> str:
    have = backend.cluster() if isinstance(backend, RayBackend) else {}
    amounts = ", ".join(f"{name} {amount:g}" for name, amount in sorted(have.items()) if ":" not in name)
    return f"no place for a {stage} worker within placement_timeout={timeout:g} s; the cluster has: {amounts}"
