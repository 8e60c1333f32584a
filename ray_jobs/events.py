"""What happened, one line per change of state: `events.jsonl`, which progress, results and `status` are made
from."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ray_jobs.folder import Folder, FolderError

_log = logging.getLogger(__name__)

Event = dict[str, Any]
"""`time` (seconds since 1970), `run`, `event` (its name) and what belongs to it, such as `lesson`."""


class EventLog:
    """Appends events to `events.jsonl` of an output folder and passes each to the listeners.

    Local files grow line by line. An object store cannot append, so there the whole file is written anew at
    most every `upload_seconds`, and at the end.
    """

    def __init__(self, out: Folder, run: str, upload_seconds: float = 15.0) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._listeners: list[Callable[[Event], None]] = []
        self._folder = out
        self._upload_seconds = upload_seconds
        self._uploaded = time.monotonic()
        self._remote = b""
        local = out.local_path("events.jsonl")
        self._file = open(local, "ab", buffering=0) if local else None  # noqa: SIM115
        if self._file is None and out.exists("events.jsonl"):
            self._remote = out.read("events.jsonl")

    def listen(self, listener: Callable[[Event], None]) -> None:
        self._listeners.append(listener)

    def emit(self, event: str, **values: Any) -> None:
        """Record an event. Called from several threads; each line is written whole."""
        entry: Event = {"time": round(time.time(), 3), "run": self._run, "event": event, **values}
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            try:
                self._keep(line)
            except (OSError, FolderError) as error:
                # A full disk ends no lesson here; what a lesson needs of it fails by itself.
                _log.warning("events.jsonl: %s was not recorded: %s", event, error)
            for listener in self._listeners:
                listener(entry)

    def close(self) -> None:
        """Raises FolderError if the last events cannot be uploaded."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            else:
                self._upload()

    def _keep(self, line: bytes) -> None:
        if self._file is not None:
            self._file.write(line)
            return
        self._remote += line
        if time.monotonic() - self._uploaded > self._upload_seconds:
            self._upload()

    def _upload(self) -> None:
        self._folder.write("events.jsonl", self._remote)
        self._uploaded = time.monotonic()


def read(out: Folder) -> list[Event]:
    """Events of the run that began last in an output folder, also if another goes on beside it.

    A line that is still being written is left out.
    """
    events: list[Event] = []
    for line in out.read("events.jsonl").split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        events.append(event)
    newest = next((event["run"] for event in reversed(events) if event["event"] == "run_started"), None)
    return [event for event in events if event["run"] == newest]
