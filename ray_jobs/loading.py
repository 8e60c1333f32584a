"""Watches workers while they find their place and load their models, and lets the ready ones be lent out."""

from __future__ import annotations

import time
from typing import Any

from ray_jobs.backend import Backend, Failed, Lost, RayBackend
from ray_jobs.events import EventLog
from ray_jobs.pool import Pool

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.1, 2.0


class CannotStart(Exception):
    """No worker of a stage can be placed, or its model cannot be loaded."""


def watch_loading(backend: Backend, stage: str, pool: Pool, events: EventLog, timeout: float) -> None:
    """Report how far a pool's models are loaded, until all are or the pool is stopped.

    Workers that find no place within `timeout` seconds are reported, and admitted if they find one later.
    Raises CannotStart if none of the pool found a place, or if a model cannot be loaded.
    """
    began = time.monotonic()
    waiting: dict[Any, Any] = {worker: worker.submit("loading") for worker in pool.workers}
    states: dict[Any, tuple[int, int]] = {}
    pause, told, complained = _FIRST_PAUSE_SECONDS, (-1, -1), False
    while waiting and not pool.stopped:
        for worker in list(waiting):
            _poll(backend, stage, pool, events, worker, waiting, states)
        done, total = sum(d for d, _ in states.values()), sum(t for _, t in states.values())
        if (done, total) != told:
            events.emit("loading", stage=stage, bytes=done, total=total)
            told = (done, total)
        unplaced = waiting.keys() - states.keys()
        if unplaced and not complained and time.monotonic() - began > timeout:
            reason = _no_place(backend, stage, timeout)
            if not states:
                raise CannotStart(reason)
            events.emit("capacity_missing", stage=stage, workers=len(unplaced), reason=reason)
            complained = True
        time.sleep(pause if waiting else 0)
        pause = min(2 * pause, _LAST_PAUSE_SECONDS)
    events.emit("loaded", stage=stage, seconds=round(time.monotonic() - began, 2))


def _poll(
    backend: Backend,
    stage: str,
    pool: Pool,
    events: EventLog,
    worker: Any,
    waiting: dict[Any, Any],
    states: dict[Any, tuple[int, int]],
) -> None:
    """Look at a worker's answer if it is there. One that is ready, or lost, is waited for no longer."""
    if not backend.wait(waiting[worker], timeout=0):
        return
    try:
        done, total, over = backend.get(waiting[worker])
    except Failed as error:
        raise CannotStart(f"the {stage} model cannot be loaded: {error}") from error
    except Lost:
        pool.replace(worker)
        del waiting[worker]
        return
    states[worker] = (done, total)
    if over:
        events.emit("worker_ready", stage=stage, hardware=backend.get(worker.submit("hardware")))
        pool.admit(worker)
        del waiting[worker]
    else:
        waiting[worker] = worker.submit("loading")


def _no_place(backend: Backend, stage: str, timeout: float) -> str:
    have = backend.cluster() if isinstance(backend, RayBackend) else {}
    amounts = ", ".join(f"{name} {amount:g}" for name, amount in sorted(have.items()) if ":" not in name)
    return f"no place for a {stage} worker within placement_timeout={timeout:g} s; the cluster has: {amounts}"
