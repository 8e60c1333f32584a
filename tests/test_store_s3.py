"""The store on an S3 server of our own (moto), which has no folders, no rename and no abort."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from urllib.parse import quote

import pytest
from pyarrow import fs

from ray_jobs.store import Store, StoreError
from stages.publish import publish
from tests.test_store import FILES, ID, META, check_protocol

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


@pytest.fixture(scope="module")
def server():
    """host:port of an S3 server with an empty bucket `courses`."""
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
def uri(server, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    query = f"?scheme=http&region=us-east-1&endpoint_override={quote(server)}&allow_bucket_creation=true"
    filesystem, _ = fs.FileSystem.from_uri(f"s3://courses{query}")
    filesystem.create_dir("courses")
    return f"s3://courses/night-{os.urandom(4).hex()}{query}"


def test_store_on_s3_keeps_every_promise(uri):
    check_protocol(Store(uri))


def test_truncated_object_on_s3_makes_the_segment_not_there(uri):
    """An error inside an open stream publishes what was written so far."""
    store = Store(uri)
    committed = store.commit(ID, FILES, META)
    filesystem, root = fs.FileSystem.from_uri(uri)
    with (
        contextlib.suppress(InterruptedError),
        filesystem.open_output_stream(f"{root}/{committed.path('video.mov')}") as stream,
    ):
        stream.write(b"v" * 10)
        raise InterruptedError
    assert store.find(ID) is None
    with pytest.raises(StoreError, match=r"video\.mov: has 10 of 1000 bytes"):
        store.read(committed, "video.mov")


def test_upload_to_s3_arrives_whole(uri, tmp_path):
    (tmp_path / "lesson.mp4").write_bytes(os.urandom(3_000_000))
    filesystem, root = fs.FileSystem.from_uri(uri)
    publish(tmp_path / "lesson.mp4", filesystem, f"{root}/数学 一.mp4")
    with filesystem.open_input_file(f"{root}/数学 一.mp4") as file:
        assert file.read() == (tmp_path / "lesson.mp4").read_bytes()


def test_missing_bucket_is_a_store_error_that_names_it(uri):
    store = Store(uri.replace("://courses/", "://missing/"))
    with pytest.raises(StoreError, match="write s3://missing/"):
        store.commit(ID, FILES, META)
