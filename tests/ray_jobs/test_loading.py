"""Workers are lent out when their model is there; those that find no place hold up nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_jobs.backend import Failed, LocalBackend
from ray_jobs.events import EventLog, read
from ray_jobs.folder import Folder
from ray_jobs.loading import CannotStart, watch_loading
from ray_jobs.pool import Pool

PENDING = object()
"""A reference whose call has found no worker to run on."""


class Backend(LocalBackend):
    """One whose references are values, exceptions, or pending for ever."""

    def wait(self, ref: Any, timeout: float | None = None) -> bool:
        return ref is not PENDING

    def get(self, ref: Any) -> Any:
        if isinstance(ref, Exception):
            raise ref
        return ref


class Worker:
    """One that answers `loading` with one thing after another."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def submit(self, method: str) -> Any:
        if method == "hardware":
            return "a CPU"
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def kill(self) -> None:
        pass


def watch(tmp_path: Path, *workers: Worker, timeout: float = 0.2) -> tuple[Pool, list[dict[str, Any]]]:
    line = iter(workers)
    pool = Pool(lambda: next(line), len(workers), loads=True)
    log = EventLog(Folder(str(tmp_path)), "r")
    log.emit("run_started")
    log.listen(lambda event: pool.stop() if event["event"] == "capacity_missing" else None)
    try:
        watch_loading(Backend(), "transformer", pool, log, timeout)
    finally:
        log.close()
    return pool, read(Folder(str(tmp_path)))


def test_progress_is_told_and_ready_workers_are_admitted(tmp_path: Path) -> None:
    one, other = Worker((0, 10, False), (4, 10, False), (10, 10, True)), Worker((10, 10, True))
    pool, events = watch(tmp_path, one, other)
    assert pool._free == [other, one]
    told = [(event["bytes"], event["total"]) for event in events if event["event"] == "loading"]
    assert told == [(10, 20), (14, 20), (20, 20)]
    assert events[-1]["event"] == "loaded"


def test_a_worker_without_a_place_holds_up_nobody(tmp_path: Path) -> None:
    placed = Worker((10, 10, True))
    pool, events = watch(tmp_path, placed, Worker(PENDING))
    assert pool._free == [placed]
    assert "capacity_missing" in [event["event"] for event in events]


def test_no_place_for_anybody_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        CannotStart, match=r"no place for a transformer worker within placement_timeout=0\.2 s"
    ):
        watch(tmp_path, Worker(PENDING))


def test_a_model_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    broken = Failed(ValueError("truncated file"), "")
    with pytest.raises(CannotStart, match="cannot be loaded: ValueError: truncated file"):
        watch(tmp_path, Worker(broken))


def test_loading_may_take_longer_than_placing(tmp_path: Path) -> None:
    slow = Worker(*[(n, 10, False) for n in range(4)], (10, 10, True))
    pool, _ = watch(tmp_path, slow, timeout=0)
    assert pool._free == [slow]
