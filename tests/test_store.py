"""The store: what a valid `done.json` names is there, whole, and nothing else is."""

import json
import logging
import multiprocessing
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import fs

from ray_jobs.folder import Folder
from ray_jobs.store import Store, StoreError

ID = "ab12cd34"
FILES = {"video.mov": b"v" * 1000, "carry.bin": b"c" * 50}
META = {"frames": 1500, "lesson": "数学 一"}
ROOT = Path(__file__).parents[1]


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "课程 100%"))


def home(tmp_path):
    return tmp_path / "课程 100%" / "segments" / "ab" / ID


# ---------------------------------------------------------------- segments


def test_committed_segment_is_found_and_read(store):
    assert store.find(ID) is None
    written = store.commit(ID, FILES, META)
    found = store.find(ID)
    assert found == written
    assert found.meta == META
    assert {name: store.read(found, name) for name in found.files} == FILES


def test_layout_is_the_documented_one(store, tmp_path):
    committed = store.commit(ID, FILES, META)
    files = {str(path.relative_to(home(tmp_path))) for path in home(tmp_path).rglob("*") if path.is_file()}
    assert files == {"done.json", *(f"{committed.attempt}/{name}" for name in FILES)}
    done = json.loads((home(tmp_path) / "done.json").read_text("utf-8"))
    assert done["attempt"] == committed.attempt
    assert done["files"]["carry.bin"]["bytes"] == 50


def test_another_process_finds_the_same(store, tmp_path):
    committed = store.commit(ID, FILES, META)
    assert Store(f"file://{tmp_path}/%E8%AF%BE%E7%A8%8B%20100%25").find(ID) == committed
    assert pickle.loads(pickle.dumps(committed)) == committed


def test_relative_path_is_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Store("out/.lectern").commit(ID, FILES, META)
    assert (tmp_path / "out/.lectern/segments/ab" / ID / "done.json").is_file()


def test_second_commit_takes_over_whole(store):
    first = store.commit(ID, FILES, META)
    second = store.commit(ID, {"video.mov": b"new"}, {})
    assert store.find(ID) == second != first
    assert store.read(second, "video.mov") == b"new"
    assert store.read(first, "video.mov") == FILES["video.mov"]


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_truncated_done_json_is_not_there_and_reported(store, tmp_path, caplog, keep):
    store.commit(ID, FILES, META)
    done = home(tmp_path) / "done.json"
    done.write_bytes(done.read_bytes()[:keep])
    with caplog.at_level(logging.WARNING):
        assert store.find(ID) is None
    assert f"{ID}/done.json is damaged" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{}",
        b'{"schema": 1, "segment_id": "ab12cd34", "files": {"video.mov": 3}, "attempt": "a1", "meta": {}}',
        b'{"schema": 1, "segment_id": "ab12cd34", "files": {}, "attempt": "../../x", "meta": {}}',
        b'{"schema": 99, "segment_id": "ab12cd34", "files": {}, "attempt": "a1", "meta": {}}',
        b'{"schema": 1, "segment_id": "another", "files": {}, "attempt": "a1", "meta": {}}',
    ],
)
def test_damaged_done_json_is_not_there(store, tmp_path, content):
    store.commit(ID, FILES, META)
    (home(tmp_path) / "done.json").write_bytes(content)
    assert store.find(ID) is None


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_missing_or_short_file_makes_the_segment_not_there(store, tmp_path, caplog, damage):
    file = home(tmp_path) / store.commit(ID, FILES, META).attempt / "video.mov"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"v" * (999 if damage == "short" else 1001))
    assert store.find(ID) is None
    assert "video.mov is damaged and counts as missing" in caplog.text


def test_changed_byte_is_found_on_reading(store, tmp_path):
    committed = store.commit(ID, FILES, META)
    (home(tmp_path) / committed.attempt / "video.mov").write_bytes(b"v" * 999 + b"x")
    assert store.find(ID) == committed
    with pytest.raises(StoreError, match=r"video\.mov: its sha256"):
        store.read(committed, "video.mov")
    assert store.read(committed, "video.mov", verify=False).endswith(b"x")


def test_file_that_vanished_is_a_store_error_that_names_it(store, tmp_path):
    committed = store.commit(ID, FILES, META)
    (home(tmp_path) / committed.attempt / "video.mov").unlink()
    with pytest.raises(StoreError, match=rf"read .*{ID}/{committed.attempt}/video\.mov"):
        store.read(committed, "video.mov")


def test_withdrawn_segment_is_not_there_until_it_is_committed_again(store):
    store.withdraw(store.commit(ID, FILES, META))
    assert store.find(ID) is None
    again = store.commit(ID, FILES, META)
    assert store.find(ID) == again


def test_withdrawing_an_old_attempt_keeps_the_new_one(store):
    old, new = store.commit(ID, FILES, META), store.commit(ID, FILES, META)
    store.withdraw(old)
    assert store.find(ID) == new


@pytest.mark.parametrize("name", ["", "a", "../../etc", "a/b", ".hidden", "x" * 300])
def test_ids_that_would_leave_the_store_are_refused(store, name):
    for action in (
        lambda: store.find(name),
        lambda: store.commit(name, FILES, META),
        lambda: store.commit(ID, {name: b""}, META),
        lambda: store.put_prepared(name, {}),
        lambda: store.get_run("run1", name),
    ):
        with pytest.raises(ValueError, match="name="):
            action()


# ---------------------------------------------------------------- crashes and writers


@pytest.mark.parametrize("writes", [0, 1, 2])
@pytest.mark.parametrize("segment_id", [ID, "new"])
def test_error_at_any_write_leaves_what_was_there(store, monkeypatch, writes, segment_id):
    store.commit(ID, FILES, META)
    before, write, left = store.find(segment_id), Folder.write, iter(range(writes))

    def failing(self, name, data):
        if next(left, None) is None:
            raise StoreError(f"cannot write {name}: No space left on device")
        write(self, name, data)

    monkeypatch.setattr(Folder, "write", failing)
    with pytest.raises(StoreError, match="No space left"):
        store.commit(segment_id, FILES, META)
    assert store.find(segment_id) == before


def test_full_disk_is_a_store_error_and_leaves_nothing(store, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(StoreError, match=r"write .*video\.mov.*too large"):
            store.commit(ID, FILES, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.find(ID) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_store_that_may_not_be_written_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match="file"):
        Store(str(tmp_path / "file")).commit(ID, FILES, META)


def test_killed_writer_leaves_nothing_or_a_valid_segment(tmp_path):
    """kill -9 while segments are committed one after the other, at five moments."""
    script = (
        "import sys, itertools\nfrom ray_jobs.store import Store\nstore = Store(sys.argv[1])\n"
        "for k in itertools.count():\n"
        "    files = {'video.mov': bytes([k % 256]) * 300_000, 'carry.bin': b'c' * 9}\n"
        "    store.commit(f'seg{k:05d}', files, {})\n"
        "    print(k, flush=True)\n"
    )
    for moment in range(5):
        root = tmp_path / str(moment)
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(root)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        acknowledged = [int(writer.stdout.readline()) for _ in range(3 + 4 * moment)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout.read().split()]
        writer.wait()
        store = Store(str(root))
        assert all(store.find(f"seg{k:05d}") for k in acknowledged)
        for folder in root.glob("segments/*/*"):
            committed = store.find(folder.name)
            if committed is not None:
                k = int(folder.name.removeprefix("seg"))
                assert store.read(committed, "video.mov") == bytes([k % 256]) * 300_000


def _commit_many(uri, letter, times):
    store = Store(uri)
    for _ in range(times):
        store.commit(
            ID, {"video.mov": letter * 20_000, "carry.bin": letter * 10}, {"writer": letter.decode()}
        )


def test_two_writers_of_one_segment_never_mix(store, tmp_path):
    context = multiprocessing.get_context("spawn")
    uri = str(tmp_path / "课程 100%")
    writers = [context.Process(target=_commit_many, args=(uri, letter, 20)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers) or not seen:
        committed = store.find(ID)
        if committed is not None:
            letter = committed.meta["writer"].encode()
            assert store.read(committed, "video.mov") == letter * 20_000
            assert store.read(committed, "carry.bin") == letter * 10
            seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen > 1


# ---------------------------------------------------------------- documents


def test_prepared_is_remembered_by_key(store):
    assert store.get_prepared("0f" * 32) is None
    store.put_prepared("0f" * 32, {"segments": [ID]})
    assert store.get_prepared("0f" * 32) == {"segments": [ID]}


def test_run_documents_are_kept_per_run(store):
    store.put_run("2026-01-01T00", "settings", {"crf": 18})
    store.put_run("2026-01-01T00", "settings", {"crf": 20})
    assert store.get_run("2026-01-01T00", "settings") == {"crf": 20}
    assert store.get_run("another", "settings") is None


def test_lessons_of_any_name_come_by_one_listing(store, monkeypatch):
    assert store.lessons() == {}
    lessons = {name: {"sha256": name * 2} for name in ("001", "数学 第一课", "a.json", "50%", "é")}
    for name, value in lessons.items():
        store.put_lesson(name, value)
    listings, names = [], Folder.names

    def counted(self, under):
        listings.append(under)
        return names(self, under)

    monkeypatch.setattr(Folder, "names", counted)
    assert store.lessons() == lessons
    assert listings == ["lessons"]


def test_damaged_lesson_is_left_out_and_reported(store, tmp_path, caplog):
    store.put_lesson("001", {"frames": 1})
    store.put_lesson("002", {"frames": 2})
    (tmp_path / "课程 100%" / "lessons" / "002.json").write_text('{"frames":')
    assert store.lessons() == {"001": {"frames": 1}}
    assert "lessons/002.json is damaged" in caplog.text


@pytest.mark.parametrize("name", ["", "../001", "a/b", "a\0b"])
def test_lesson_that_would_leave_its_folder_is_refused(store, name):
    with pytest.raises(ValueError, match="lesson_id="):
        store.put_lesson(name, {})


# ---------------------------------------------------------------- filesystems


def on(filesystem, root):
    """A store on a pyarrow filesystem that no URI names."""
    store = Store("store")
    store._folder._fs, store._folder._root = filesystem, root
    return store


@pytest.mark.parametrize("kind", ["mock", "subtree"])
def test_any_pyarrow_filesystem_serves(tmp_path, kind):
    if kind == "mock":
        store = Store("mock:///store")
    else:
        store = on(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "store")
    check_protocol(store)


def test_uri_of_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="zz://"):
        Store("zz://bucket/store")


def check_protocol(store):
    """All that a store promises, on whatever filesystem it is."""
    assert store.find(ID) is None
    assert store.lessons() == {}
    committed = store.commit(ID, FILES, META)
    assert store.find(ID) == committed
    assert store.read(committed, "video.mov") == FILES["video.mov"]
    store.put_lesson("数学 一", {"frames": 1})
    assert store.lessons() == {"数学 一": {"frames": 1}}
    store.withdraw(committed)
    assert store.find(ID) is None
    store.put_prepared("0f", {"a": 1})
    assert store.get_prepared("0f") == {"a": 1}
