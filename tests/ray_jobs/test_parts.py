"""The small parts of a run: shared encodings, classes of failure, tries, events, progress, results,
folders."""

from __future__ import annotations

import errno
import json
import threading
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

from ray_jobs.events import EventLog, read
from ray_jobs.failures import MAX_LOSSES, Tries, failure_class
from ray_jobs.folder import Folder, FolderError
from ray_jobs.progress import Reporter, Summary, duration
from ray_jobs.results import Result, write
from ray_jobs.shared import Shared, content_key
from stages.types import RowError


def test_an_encoding_is_computed_once_also_by_lessons_that_ask_at_once() -> None:
    shared, made = Shared(["k"] * 8), Counter[str]()

    def make() -> str:
        made["k"] += 1
        return "value"

    fresh: list[bool] = []
    threads = [threading.Thread(target=lambda: fresh.append(shared.get("k", make)[1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made["k"] == 1
    assert sorted(fresh) == [False] * 7 + [True]


def test_an_encoding_is_dropped_after_its_last_use() -> None:
    shared = Shared(["k", "k"])
    shared.get("k", lambda: "first")
    shared.release("k")
    assert shared.get("k", lambda: "second") == ("first", False)
    shared.release("k")
    assert shared.get("k", lambda: "third") == ("third", True)


def test_a_failed_encoding_is_tried_again() -> None:
    shared = Shared(["k"])
    with pytest.raises(ZeroDivisionError):
        shared.get("k", lambda: 1 / 0)
    assert shared.get("k", lambda: "value") == ("value", True)


def test_a_forgotten_encoding_is_computed_again() -> None:
    shared = Shared(["k"])
    shared.get("k", lambda: "lost")
    shared.forget("k")
    assert shared.get("k", lambda: "again") == ("again", True)


def test_equal_content_has_equal_keys() -> None:
    assert content_key("prompt", "a") == content_key("prompt", "a")
    assert content_key("prompt", "a") != content_key("portrait", "a")
    assert content_key("prompt", "a") != content_key("prompt", "b")


def test_classes_of_failure() -> None:
    from torch import OutOfMemoryError

    assert failure_class(RowError("image", "a", "b")) == "input"
    assert failure_class(OutOfMemoryError("CUDA out of memory")) == "gpu_oom"
    assert failure_class(MemoryError()) == "host_oom"
    assert failure_class(FolderError("disk full")) == "storage"
    assert failure_class(OSError(errno.ENOSPC, "No space left on device")) == "storage"
    assert failure_class(KeyError("x")) == "bug"


def test_errors_use_tries_and_losses_do_not() -> None:
    tries = Tries(max_tries=3)
    assert [tries.again_after("bug") for _ in range(3)] == [True, True, False]
    assert [Tries(3).again_after_loss() for _ in range(3)] == [True] * 3


def test_a_segment_that_keeps_losing_its_worker_is_given_up() -> None:
    tries = Tries(max_tries=3)
    assert [tries.again_after_loss() for _ in range(MAX_LOSSES)] == [True] * (MAX_LOSSES - 1) + [False]


def test_out_of_gpu_memory_is_tried_twice_at_most() -> None:
    tries = Tries(max_tries=10)
    assert [tries.again_after("gpu_oom") for _ in range(2)] == [True, False]


def test_events_are_whole_lines_also_from_several_threads(tmp_path: Path) -> None:
    log = EventLog(Folder(str(tmp_path)), "r")
    log.emit("run_started")

    def emit() -> None:
        for number in range(50):
            log.emit("frames", done=number)

    threads = [threading.Thread(target=emit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len([json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]) == 201


def test_reading_events_tells_of_the_newest_run_and_skips_half_a_line(tmp_path: Path) -> None:
    runs = ["old", "new", "old", "new"]
    names = ["run_started", "run_started", "frames", "frames"]
    lines = [{"time": 1, "run": run, "event": name} for run, name in zip(runs, names, strict=True)]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"time": 3, "event": "fra'
    (tmp_path / "events.jsonl").write_text(text)
    events = read(Folder(str(tmp_path)))
    assert [(event["run"], event["event"]) for event in events] == [("new", "run_started"), ("new", "frames")]


def test_events_reach_an_object_store_when_the_log_is_closed(tmp_path: Path) -> None:
    folder = Folder(f"file://{tmp_path}")
    folder.local_path = lambda name: None  # type: ignore[method-assign]
    for run in ("one", "two"):
        log = EventLog(folder, run)
        log.emit("run_started")
        log.close()
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2


def summary_of(*events: dict[str, object]) -> Summary:
    summary = Summary()
    for time, event in enumerate(events):
        summary.feed({"time": 100.0 + 10 * time, **event})
    return summary


def test_progress_counts_what_the_events_say() -> None:
    summary = summary_of(
        {"event": "run_started", "run": "r"},
        {"event": "checked", "lessons": 3},
        {"event": "work_planned", "segments": 4, "frames": 1000},
        {"event": "loading", "stage": "transformer", "bytes": 10_000_000_000, "total": 32_600_000_000},
        {"event": "frames", "done": 50},
        {"event": "segment_done", "lesson": "a", "segment": 0},
        {"event": "frames", "done": 200},
        {"event": "lesson_ended", "lesson": "a", "row": 1, "status": "done"},
        {
            "event": "lesson_ended",
            "lesson": "",
            "row": 2,
            "status": "invalid",
            "reason": "image: no such file",
        },
    )
    line = summary.line()
    assert "loading transformer 10.0 GB of 32.6 GB" in line
    assert "lessons 2/3 (1 done, 1 invalid)" in line
    assert "segments 1/4" in line
    assert "frames 200/1000" in line
    assert "frames/s 5.0" in line
    assert "time left 2:40" in line
    assert summary.failures == [("row 2", "image: no such file")]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(summary_of({"event": "checked", "lessons": 3}), 0.02, Console(file=None))
    reporter.start()
    threading.Event().wait(0.2)
    reporter.stop()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all("lessons 0/3" in line for line in lines)


def test_results_keep_order_types_and_own_columns(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    second = Result(2, "第二课", "failed", "bug", "KeyError: x", extras={"x_b": "2"})
    write(Folder(str(tmp_path)), [second, Result(1, "001", "done", frames=33, extras={"x_a": "1"})])
    table = pq.read_table(tmp_path / "results.parquet")
    assert table.column("lesson_id").to_pylist() == ["001", "第二课"]
    assert table.column("frames").to_pylist() == [33, None]
    assert str(table.schema.field("video_seconds").type) == "double"
    assert table.column("x_b").to_pylist() == ["", "2"]
    assert (tmp_path / "results.csv").read_bytes().startswith(b"\xef\xbb\xbfrow,lesson_id,status")


def test_a_folder_that_cannot_be_written_says_which_file_and_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"file/sub/a\.txt"):
        Folder(str(tmp_path / "file")).write("sub/a.txt", b"")
    with pytest.raises(FolderError, match="cannot read"):
        Folder(str(tmp_path)).read("nothing")


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path))
    folder.write("a", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FolderError, match="No space left"):
        folder.write("a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"
