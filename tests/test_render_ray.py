"""The road on a real Ray cluster: the same files as in one process, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ray_jobs.plan import Refused
from ray_jobs.render import render
from tests.conftest import Course
from tests.test_render_local import CUTS, events, hashes, results

pytestmark = [pytest.mark.ray, pytest.mark.e2e]

LECTERN = Path(sys.executable).parent / "lectern"


def command(course: Course, weights: Path, out: Path, **settings: str) -> list[str]:
    pairs = {"ckpt_dir": str(weights), "size": "64*64", **CUTS, **settings}
    arguments = [f"{name}={value}" for name, value in pairs.items()]
    return [str(LECTERN), "render", str(course.manifest), "--out", str(out), *arguments]


def start(arguments: list[str], address: str, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "RAY_ADDRESS": address}
    with log.open("wb") as file:
        return subprocess.Popen(arguments, env=environment, stdout=file, stderr=file)


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a condition holds while the driver runs."""
    deadline = time.monotonic() + 120
    while not condition():
        if driver.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the driver ended, or nothing happened:\n{log.read_text()}")
        time.sleep(0.02)


def happened(out: Path, name: str, times: int = 1) -> bool:
    return (out / "events.jsonl").exists() and len(events(out, name)) >= times


def workers_of(cls: str, head: int) -> list[psutil.Process]:
    """Processes of this session's cluster that run an actor of a class."""
    processes = psutil.Process(head).children(recursive=True)
    return [process for process in processes if " ".join(process.cmdline()).startswith(f"ray::{cls}")]


@pytest.fixture
def undisturbed(course: Course, weights: Path, tmp_path: Path) -> dict[str, str]:
    """Hashes of a course of three lessons, one of them in three segments, rendered in one process."""
    course.add("long", 13.0)
    course.add("short", 1.0)
    course.add("shorter", 0.5)
    assert render(course.request(weights, tmp_path / "undisturbed", settings=CUTS)) == 0
    assert results(tmp_path / "undisturbed")[0]["segments"] == "3"
    return hashes(tmp_path / "undisturbed")


def test_ray_and_one_process_give_equal_files(
    course: Course, weights: Path, tmp_path: Path, ray_address: str, undisturbed: dict[str, str]
) -> None:
    out = tmp_path / "out"
    settings = {**CUTS, "num_groups": "2"}
    assert render(course.request(weights, out, ray_address, settings=settings)) == 0
    assert hashes(out) == undisturbed
    starts = {event["lesson"]: event["time"] for event in events(out, "segment_started")}
    ends = {event["lesson"]: event["time"] for event in events(out, "lesson_ended")}
    assert starts["short"] < ends["long"], "lessons overlap"
    prompts = sum(int(row["prompt_encodings"]) for row in results(out))
    portraits = sum(int(row["portrait_encodings"]) for row in results(out))
    assert (prompts, portraits) == (1, 1)


def test_killed_driver_loses_no_finished_segment(
    course: Course, weights: Path, tmp_path: Path, ray_address: str, undisturbed: dict[str, str]
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    driver = start(command(course, weights, out), ray_address, log)
    wait_for(lambda: happened(out, "segment_done"), driver, log)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = {path: path.read_bytes() for path in (out / ".lectern/segments").rglob("done.json")}
    assert kept
    assert render(course.request(weights, out, ray_address, settings=CUTS)) == 0
    rendered = sum(int(row["segments_rendered"]) for row in results(out))
    # Workers may have committed another one before Ray ended them too.
    assert rendered <= 5 - len(kept)
    assert all(path.read_bytes() == done for path, done in kept.items()), "none was rendered again"
    assert hashes(out) == undisturbed


@pytest.mark.parametrize("cls", ["RankWorker", "DecodeWorker", "ConditionWorker"])
def test_a_killed_worker_costs_only_what_it_was_doing(
    course: Course, weights: Path, tmp_path: Path, ray_head: int, undisturbed: dict[str, str], cls: str
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    driver = start(command(course, weights, out), "127.0.0.1:6399", log)
    wait_for(lambda: happened(out, "frames"), driver, log)
    for process in workers_of(cls, ray_head):
        process.kill()
    assert driver.wait(240) == 0, log.read_text()
    assert hashes(out) == undisturbed
    assert {row["failed_tries"] for row in results(out)} == {"0"}, "a lost worker uses no try"


def test_sigterm_ends_in_order_and_the_next_run_goes_on(
    course: Course, weights: Path, tmp_path: Path, ray_address: str, undisturbed: dict[str, str]
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    driver = start(command(course, weights, out), ray_address, log)
    wait_for(lambda: happened(out, "frames"), driver, log)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 130, log.read_text()
    assert "stopped" in {row["status"] for row in results(out)}
    assert events(out, "run_ended")[-1]["exit_code"] == 130
    assert render(course.request(weights, out, ray_address, settings=CUTS)) == 0
    assert hashes(out) == undisturbed


def test_two_runs_at_once_share_a_store(
    course: Course, weights: Path, tmp_path: Path, ray_address: str, undisturbed: dict[str, str]
) -> None:
    drivers = []
    for name in ("one", "two"):
        arguments = [*command(course, weights, tmp_path / name), "--store", str(tmp_path / "store")]
        # Two runs need more CPUs than this cluster has, if each reserves whole ones.
        arguments += ["denoise_cpus=0.5", "decode_cpus=0.2"]
        drivers.append(start(arguments, ray_address, tmp_path / f"{name}.log"))
    for driver, name in zip(drivers, ("one", "two"), strict=True):
        assert driver.wait(240) == 0, (tmp_path / f"{name}.log").read_text()
        assert hashes(tmp_path / name) == undisturbed


def test_resources_that_nobody_has_are_named(
    course: Course, weights: Path, tmp_path: Path, ray_address: str
) -> None:
    course.add("a", 0.5)
    settings = {"denoise_cpus": "64", "placement_timeout": "3"}
    with pytest.raises(Refused, match=r"transformer.*placement_timeout=3.*CPU 4"):
        render(course.request(weights, tmp_path / "out", ray_address, settings=settings))


def test_a_job_gives_the_same_files_and_a_truthful_exit_code(
    course: Course, weights: Path, tmp_path: Path, ray_address: str, undisturbed: dict[str, str]
) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient("http://127.0.0.1:8299")
    course.rows.append({"lesson_id": "bad", "image": "nowhere.jpg", "audio": "0.wav", "prompt": "x"})
    good = [*command(course, weights, tmp_path / "good"), "--only", "long,short,shorter"]
    mixed = command(course, weights, tmp_path / "mixed")
    jobs = {}
    for expected, arguments in ((0, good), (3, mixed)):
        job = client.submit_job(entrypoint=" ".join(f"'{argument}'" for argument in arguments))
        deadline = time.monotonic() + 240
        while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.2)
        jobs[expected] = client.get_job_info(job)
        assert jobs[expected].driver_exit_code == expected, client.get_job_logs(job)
    assert [jobs[code].status for code in (0, 3)] == [JobStatus.SUCCEEDED, JobStatus.FAILED]
    for name in ("good", "mixed"):
        delivered = {lesson: sha256 for lesson, sha256 in hashes(tmp_path / name).items() if sha256}
        assert delivered == undisturbed


def test_status_tells_of_a_run_from_elsewhere(
    course: Course, weights: Path, tmp_path: Path, ray_address: str
) -> None:
    course.add("a", 0.5)
    course.add("bad", 0.5, image="nowhere.jpg")
    assert render(course.request(weights, tmp_path / "out", ray_address)) == 3
    told = subprocess.run([LECTERN, "status", tmp_path / "out"], capture_output=True, text=True, check=True)
    assert "2/2 (1 done, 1 invalid)" in told.stdout
    assert "exit code 3" in told.stdout
    assert "nowhere.jpg" in told.stdout
    assert json.loads((tmp_path / "out/events.jsonl").read_text().splitlines()[-1])["exit_code"] == 3
