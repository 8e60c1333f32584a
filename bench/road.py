"""The road, measured: is the bottleneck busy, is memory flat, does a long manifest arrive?

    python -m bench.road busy     six short lessons: how long each stage was busy, and the bottleneck's share
    python -m bench.road memory   24 against 6 lessons: peak memory per kind of process
    python -m bench.road rows     200 rows of 2 s: all delivered, the driver's memory, the store's peak

Lessons are made on the spot: the portrait of `examples/`, noise with pauses for speech, the weights of
`lectern weights tiny`. Everything runs on a private Ray on this machine. `--size` and `--seconds` make cells
heavier or lessons longer. Times are wall times of a shared machine: look at the shares.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile

EXAMPLES = Path(__file__).parent.parent / "examples"
RATE = 16_000
SAMPLE_SECONDS = 0.25
LOG = "LECTERN_BENCH_LOG"
"""Environment variable with the folder that timed workers write their calls to."""

STAGES = {
    "check_lesson": "prepare",
    "load_portrait": "prepare",
    "load_speech": "prepare",
    "ConditionWorker": "condition",
    "RankWorker": "denoise",
    "DecodeWorker": "decode",
    "finish_lesson": "mux",
}


# ---------------------------------------------------------------- the run that is measured: its own process


def _timed(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.time()
        try:
            return function(*args, **kwargs)
        finally:
            with open(Path(os.environ[LOG], f"{stage}-{os.getpid()}"), "a") as file:
                file.write(f"{start} {time.time()}\n")

    return call


def _timed_worker(cls: type, *methods: str) -> type:
    wrapped = {name: _timed(getattr(cls, name), STAGES[cls.__name__]) for name in methods}
    return type(cls.__name__, (cls,), wrapped)


def child(manifest: str, out: str, settings: dict[str, str]) -> int:
    """Render with workers that log when they were busy, and sample Ray's object store."""
    from ray_jobs import check, group, road
    from ray_jobs.plan import Request
    from ray_jobs.render import render
    from ray_jobs.settings import Layer

    module: Any
    for module, names in (
        (road, ("load_portrait", "load_speech", "finish_lesson")),
        (check, ("check_lesson",)),
    ):
        for name in names:
            setattr(module, name, _timed(getattr(module, name), STAGES[name]))
    group.RankWorker = _timed_worker(group.RankWorker, "open", "cell", "prefill", "carry")  # type: ignore[misc, assignment]
    road.DecodeWorker = _timed_worker(road.DecodeWorker, "open", "decode", "finish")  # type: ignore[misc, assignment]
    road.ConditionWorker = _timed_worker(road.ConditionWorker, "prompt", "portrait", "speech")  # type: ignore[misc, assignment]
    threading.Thread(target=_sample_store, daemon=True).start()
    return render(Request(manifest, [Layer("bench", settings)], out=out))


def _sample_store() -> None:
    """Write the object store's bytes in use, again and again, to the log folder."""
    import ray
    from ray._private.internal_api import memory_summary

    while True:
        time.sleep(1.0)
        if ray.is_initialized():
            used = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(stats_only=True))
            if used:
                with open(Path(os.environ[LOG], "store"), "a") as file:
                    file.write(f"{used.group(1)}\n")


# ---------------------------------------------------------------- the measurement


class Measurement:
    """One run in a process of its own: its exit code, busy times, and peak memory per kind of process in
    bytes."""

    def __init__(self, lessons: int, seconds: float, settings: dict[str, str]) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            manifest = _course(folder, lessons, seconds)
            log = folder / "log"
            log.mkdir()
            command = [
                sys.executable,
                "-m",
                "bench.road",
                "child",
                str(manifest),
                str(folder / "out"),
                json.dumps(settings),
            ]
            with (folder / "stderr").open("wb") as stderr:
                run = subprocess.Popen(command, env={**os.environ, LOG: str(log)}, stderr=stderr)
                self.peaks = _watch(run)
            self.exit_code = run.returncode
            self.output = (folder / "stderr").read_text()
            self.events = [
                json.loads(line) for line in (folder / "out/events.jsonl").read_text().splitlines()
            ]
            self.busy = {stage: _intervals(log, stage) for stage in dict.fromkeys(STAGES.values())}
            store = log / "store"
            self.store_mib = max(map(int, store.read_text().split()), default=0) if store.exists() else 0

    def times(self, event: str) -> list[float]:
        return [entry["time"] for entry in self.events if entry["event"] == event]


def _course(folder: Path, lessons: int, seconds: float) -> Path:
    manifest = folder / "lessons.csv"
    rows = ["lesson_id,image,audio,prompt"]
    for number in range(lessons):
        noise = np.random.default_rng(number).standard_normal(round(seconds * RATE))
        loud = (np.arange(len(noise)) % RATE) < 0.7 * RATE
        soundfile.write(folder / f"{number}.wav", 0.2 * noise * np.where(loud, 1, 0.01), RATE)
        rows.append(f"{number:03d},{EXAMPLES / 'astronaut.jpg'},{number}.wav,a calm teacher")
    manifest.write_text("\n".join(rows) + "\n")
    return manifest


def _watch(run: subprocess.Popen[bytes]) -> dict[str, int]:
    """Peak unshared memory of every kind of process below `run`, until it ends."""
    peaks: dict[str, int] = defaultdict(int)
    driver = psutil.Process(run.pid)
    while run.poll() is None:
        try:
            family = [driver, *driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for process in family:
            try:
                kind = "driver" if process == driver else _kind(process.cmdline())
                peaks[kind] = max(peaks[kind], process.memory_full_info().uss)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        time.sleep(SAMPLE_SECONDS)
    run.wait()
    return dict(peaks)


def _kind(command: list[str]) -> str:
    match = re.match(r"ray::(\w+)", command[0] if command else "")
    return STAGES.get(match.group(1), "other") if match else "other"


def _intervals(log: Path, stage: str) -> list[tuple[float, float]]:
    lines = [line.split() for path in log.glob(f"{stage}-*") for line in path.read_text().splitlines()]
    return sorted((float(start), float(end)) for start, end in lines)


def _busy_seconds(intervals: list[tuple[float, float]], begin: float, end: float) -> float:
    """Seconds of [begin, end] in which at least one worker of a stage was busy."""
    total, covered = 0.0, begin
    for start, stop in intervals:
        new = min(stop, end) - max(start, covered)
        if new > 0:
            total += new
            covered = min(stop, end)
    return total


# ---------------------------------------------------------------- what is printed


def busy(lessons: int, seconds: float, settings: dict[str, str]) -> bool:
    run = Measurement(lessons, seconds, settings)
    first = run.times("frames")[0]
    last = max(run.times("segment_done"))
    wall = last - first
    print(f"{lessons} lessons of {seconds:g} s: {wall:.1f} s from the first decoded block to the last commit")
    shares = {stage: _busy_seconds(run.busy[stage], first, last) / wall for stage in run.busy}
    for stage, share in shares.items():
        whole = sum(end - start for start, end in run.busy[stage])
        print(f"  {stage:<10} busy {whole:6.1f} s in all, {share:6.1%} of that time")
    bottleneck = max(shares, key=lambda stage: shares[stage])
    passed = run.exit_code == 0 and shares[bottleneck] >= 0.9
    print(
        f"{'pass' if passed else 'FAIL'}: the bottleneck, {bottleneck}, was busy {shares[bottleneck]:.1%}, "
        "at least 90 % wanted"
    )
    return passed


def memory(lessons: int, seconds: float, settings: dict[str, str]) -> bool:
    few, many = Measurement(lessons, seconds, settings), Measurement(4 * lessons, seconds, settings)
    print(f"peak unshared memory in MB, {lessons} and {4 * lessons} lessons of {seconds:g} s")
    passed = few.exit_code == many.exit_code == 0 and many.peaks["driver"] < 400e6
    for kind in sorted(few.peaks):
        before, after = few.peaks[kind] / 1e6, many.peaks.get(kind, 0) / 1e6
        print(f"  {kind:<10} {before:7.0f} {after:7.0f}   {after / before - 1:+.1%}")
        passed &= kind == "other" or after <= 1.1 * before
    print(f"  object store {few.store_mib} and {many.store_mib} MiB")
    print(f"{'pass' if passed else 'FAIL'}: every kind within 10 %, the driver below 400 MB")
    return passed


def rows(lessons: int, seconds: float, settings: dict[str, str]) -> bool:
    run = Measurement(lessons, seconds, settings)
    delivered = sum(entry["status"] == "done" for entry in run.events if entry["event"] == "lesson_ended")
    wall = run.times("run_ended")[0] - run.times("run_started")[0]
    print(f"{delivered} of {lessons} rows of {seconds:g} s delivered in {wall:.0f} s")
    print(f"  driver {run.peaks['driver'] / 1e6:.0f} MB, object store at most {run.store_mib} MiB")
    passed = run.exit_code == 0 and delivered == lessons and run.peaks["driver"] < 400e6
    print(f"{'pass' if passed else 'FAIL'}: all delivered, the driver below 400 MB")
    return passed


def main() -> int:
    if sys.argv[1:2] == ["child"]:
        return child(sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("busy", "memory", "rows"))
    parser.add_argument("--lessons", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--size", default="128*128")
    options = parser.parse_args()
    lessons, seconds = {"busy": (6, 8.0), "memory": (6, 4.0), "rows": (200, 2.0)}[options.what]
    with tempfile.TemporaryDirectory() as folder:
        from model.tiny import write

        write(Path(folder, "tiny"))
        settings = {"ckpt_dir": str(Path(folder, "tiny")), "size": options.size}
        measure = {"busy": busy, "memory": memory, "rows": rows}[options.what]
        passed = measure(options.lessons or lessons, options.seconds or seconds, settings)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
