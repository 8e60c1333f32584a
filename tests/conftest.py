"""Fixtures that several rings of tests share: weights, a course, and one Ray cluster for the session."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import psutil
import pytest
import soundfile
from pyarrow import fs

from ray_jobs.plan import Request
from ray_jobs.settings import Layer

# Ray reads these when it is imported, which the first test that touches it does: the cluster of the tests
# listens on loopback only, and Ray would look for it at the machine's own address.
os.environ.update({"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"})

EXAMPLES = Path(__file__).parent.parent / "examples"
RATE = 16_000


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights in the published layout."""
    from model.tiny import write

    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write(folder)
    return folder


@pytest.fixture
def course(tmp_path: Path) -> Course:
    return Course(tmp_path / "course")


class Course:
    """A manifest under construction, with recordings made to measure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.rows: list[dict[str, str]] = []

    def add(self, lesson_id: str, seconds: float = 1.0, seed: int | None = None, **columns: str) -> None:
        """A row with a recording of its own: noise with pauses, another one for every seed."""
        audio = self.folder / f"{len(self.rows)}.wav"
        self.record(audio, seconds, len(self.rows) if seed is None else seed)
        row = {
            "lesson_id": lesson_id,
            "image": str(EXAMPLES / "astronaut.jpg"),
            "audio": audio.name,
            "prompt": "a calm teacher",
        }
        self.rows.append({**row, **columns})

    def record(self, path: Path, seconds: float, seed: int) -> None:
        """Noise that is loud for 0.6 s of every second; a longer one begins with the shorter one's
        samples."""
        noise = (
            np.random.default_rng(seed)
            .standard_normal(round(600 * RATE))
            .astype(np.float32)[: round(seconds * RATE)]
        )
        loud = (np.arange(len(noise)) % RATE) < 0.6 * RATE
        soundfile.write(path, 0.2 * noise * np.where(loud, 1, 0.01), RATE, subtype="PCM_16")

    @property
    def manifest(self) -> Path:
        path = self.folder / "lessons.csv"
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        return path

    def request(self, weights: Path, out: Path, address: str | None = None, **options: object) -> Request:
        """A request for the whole course at the smallest size, in this process unless an address is given."""
        settings = {"ckpt_dir": str(weights), "size": "64*64", **options.pop("settings", {})}  # type: ignore[dict-item]
        return Request(
            str(self.manifest),
            [Layer("command line", settings)],
            out=str(out),
            local=address is None,
            address=address,
            **options,  # type: ignore[arg-type]
        )


RAY_PORT, DASHBOARD_PORT = 6399, 8299


@pytest.fixture(scope="session")
def ray_address(ray_head: int) -> str:
    """Address of the session's cluster."""
    return f"127.0.0.1:{RAY_PORT}"


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Process id of a cluster on this machine, with a job server; both listen on loopback only."""
    log = tmp_path_factory.mktemp("ray") / "head.log"
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=4"]
    command += [f"--port={RAY_PORT}", "--node-ip-address=127.0.0.1", "--object-store-memory=500000000"]
    command += [f"--dashboard-port={DASHBOARD_PORT}", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    with log.open("wb") as file:
        head = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        _wait_for_head(log, head)
        yield head.pid
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        _, alive = psutil.wait_procs([psutil.Process(head.pid), *family], timeout=20)
        for process in alive:
            process.kill()


def _wait_for_head(log: Path, head: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        if head.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the Ray head did not start:\n{log.read_text()}")
        time.sleep(0.2)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """host:port of an S3 server of our own, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3_uri(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of a folder of its own on the S3 server."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    query = f"?scheme=http&region=us-east-1&endpoint_override={quote(s3_server)}&allow_bucket_creation=true"
    filesystem, _ = fs.FileSystem.from_uri(f"s3://courses{query}")
    filesystem.create_dir("courses")
    return f"s3://courses/night-{os.urandom(4).hex()}{query}"
