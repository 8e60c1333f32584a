"""The store on an S3 server of our own (moto), which has no folders, no rename and no abort."""

import contextlib
import os

import pytest
from pyarrow import fs

from ray_jobs.store import Store, StoreError
from stages.publish import publish
from tests.test_store import FILES, ID, META, check_protocol


def test_store_on_s3_keeps_every_promise(s3_uri):
    check_protocol(Store(s3_uri))


def test_truncated_object_on_s3_makes_the_segment_not_there(s3_uri):
    """An error inside an open stream publishes what was written so far."""
    store = Store(s3_uri)
    committed = store.commit(ID, FILES, META)
    filesystem, root = fs.FileSystem.from_uri(s3_uri)
    with (
        contextlib.suppress(InterruptedError),
        filesystem.open_output_stream(f"{root}/{committed.path('video.mov')}") as stream,
    ):
        stream.write(b"v" * 10)
        raise InterruptedError
    assert store.find(ID) is None
    with pytest.raises(StoreError, match=r"video\.mov: has 10 of 1000 bytes"):
        store.read(committed, "video.mov")


def test_upload_to_s3_arrives_whole(s3_uri, tmp_path):
    (tmp_path / "lesson.mp4").write_bytes(os.urandom(3_000_000))
    filesystem, root = fs.FileSystem.from_uri(s3_uri)
    publish(tmp_path / "lesson.mp4", filesystem, f"{root}/数学 一.mp4")
    with filesystem.open_input_file(f"{root}/数学 一.mp4") as file:
        assert file.read() == (tmp_path / "lesson.mp4").read_bytes()


def test_missing_bucket_is_a_store_error_that_names_it(s3_uri):
    store = Store(s3_uri.replace("://courses/", "://missing/"))
    with pytest.raises(StoreError, match="write s3://missing/"):
        store.commit(ID, FILES, META)
