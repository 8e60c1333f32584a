"""What is kept between runs: committed segments, what is known of recordings, finished lessons, runs.

    segments/<id[:2]>/<id>/<attempt>/<file>     written first, each attempt in a folder of its own
    segments/<id[:2]>/<id>/done.json            written last, at once: names the attempt, sizes and sha256
    prepared/<key>.json, lessons/<id>.json, runs/<run>/<name>.json

Only what a valid `done.json` names exists. So writers need no locks and cannot mix, a crash leaves nothing or
a whole segment, and any filesystem serves on which a small file can be written at once. A damaged file counts
as one that is not there, with a warning in the log.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ray_jobs.folder import Folder, FolderError

StoreError = FolderError
"""Reading or writing failed, or a file is not what was committed; the text says what, where and why."""

_SCHEMA = 1
_PLAIN_NAME = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._-]{1,199}")
_LISTING_THREADS = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stamp:
    """What a committed file must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Committed:
    """A segment that is in the store, whole."""

    segment_id: str
    attempt: str
    files: dict[str, Stamp]
    meta: dict[str, Any]

    def path(self, name: str) -> str:
        """Where one of its files lies, relative to the store."""
        return f"{_home(self.segment_id)}/{self.attempt}/{name}"


class Store:
    """A folder of this layout on a local path or any URI that `pyarrow.fs` knows.

    Every method raises StoreError if the filesystem fails (disk full, no permission, no network), and
    ValueError for an id or name that cannot be part of a path.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._folder = Folder(uri)

    def commit(self, segment_id: str, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> Committed:
        """Keep a finished segment. Until the last write is through, readers see what was there before."""
        stamps = {
            _plain(name): Stamp(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()
        }
        committed = Committed(segment_id, uuid.uuid4().hex, stamps, dict(meta))
        for name, data in files.items():
            self._folder.write(committed.path(name), data)
        self._put(_done(segment_id), {"schema": _SCHEMA, **asdict(committed)})
        return committed

    def find(self, segment_id: str) -> Committed | None:
        """The committed segment, if its `done.json` is valid and its files have the sizes that it names."""
        committed = self._read_done(segment_id)
        if committed is None:
            return None
        for name, stamp in committed.files.items():
            size = self._folder.size(committed.path(name))
            if size != stamp.bytes:
                found = "is missing" if size is None else f"has {size} of {stamp.bytes} bytes"
                self._warn(committed.path(name), found)
                return None
        return committed

    def read(self, committed: Committed, name: str, verify: bool = True) -> bytes:
        """One file of a segment. StoreError unless it is what was committed; `verify` checks sha256 too."""
        path, stamp = committed.path(name), committed.files[name]
        data = self._folder.read(path)
        if len(data) != stamp.bytes:
            raise StoreError(f"{self._folder.name}/{path}: has {len(data)} of {stamp.bytes} bytes")
        if verify and hashlib.sha256(data).hexdigest() != stamp.sha256:
            raise StoreError(f"{self._folder.name}/{path}: its sha256 is not the one that was committed")
        return data

    def withdraw(self, committed: Committed) -> None:
        """Take back a segment whose files turned out damaged, so that it is rendered again.

        A newer attempt of another writer stays. If it arrives between the look and the write it is lost,
        which costs one rendering and no more.
        """
        current = self._read_done(committed.segment_id)
        if current is not None and current.attempt == committed.attempt:
            self._folder.write(_done(committed.segment_id), b"")

    def put_prepared(self, key: str, value: Mapping[str, Any]) -> None:
        """Remember what was derived from a recording; `key` is the hash of the recording and the settings."""
        self._put(f"prepared/{_plain(key)}.json", value)

    def get_prepared(self, key: str) -> dict[str, Any] | None:
        return self._get(f"prepared/{_plain(key)}.json")

    def put_lesson(self, lesson_id: str, value: Mapping[str, Any]) -> None:
        """Record a finished lesson. Its id may be in any script, but must be the name of one file."""
        if not lesson_id or "/" in lesson_id or "\0" in lesson_id:
            raise ValueError(f"lesson_id={lesson_id!r}: must be usable as a file name")
        self._put(f"lessons/{lesson_id}.json", value)

    def lessons(self) -> dict[str, dict[str, Any]]:
        """All finished lessons by id: one listing, then their small files, several at a time."""
        names = [name for name in self._folder.names("lessons") if name.endswith(".json")]
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            values = pool.map(self._get, names)
            return {
                name.removeprefix("lessons/").removesuffix(".json"): value
                for name, value in zip(names, values, strict=True)
                if value is not None
            }

    def put_run(self, run: str, name: str, value: Mapping[str, Any]) -> None:
        """Keep a document of a run, such as its effective settings; the same name replaces it."""
        self._put(f"runs/{_plain(run)}/{_plain(name)}.json", value)

    def get_run(self, run: str, name: str) -> dict[str, Any] | None:
        return self._get(f"runs/{_plain(run)}/{_plain(name)}.json")

    def _read_done(self, segment_id: str) -> Committed | None:
        value = self._get(_done(segment_id))
        if value is None:
            return None
        try:
            if value["schema"] != _SCHEMA or value["segment_id"] != segment_id:
                raise ValueError(f"is of schema {value['schema']} and segment {value['segment_id']}")
            files = {_plain(name): Stamp(**stamp) for name, stamp in value["files"].items()}
            return Committed(segment_id, _plain(value["attempt"]), files, value["meta"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self._warn(_done(segment_id), repr(error))
            return None

    def _put(self, name: str, value: Mapping[str, Any]) -> None:
        self._folder.write(name, json.dumps(value, ensure_ascii=False, sort_keys=True).encode())

    def _get(self, name: str) -> dict[str, Any] | None:
        if not self._folder.exists(name):
            return None
        try:
            value = json.loads(self._folder.read(name))
            if not isinstance(value, dict):
                raise ValueError("is not a JSON object")
        except ValueError as error:
            self._warn(name, str(error))
            return None
        return value

    def _warn(self, name: str, what: str) -> None:
        _log.warning("store: %s/%s is damaged and counts as missing: %s", self._folder.name, name, what)


def _plain(name: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(
            f"name={name!r}: must be 2 to 200 of letters, digits, `_`, `-`, and `.` after the first"
        )
    return name


def _home(segment_id: str) -> str:
    return f"segments/{segment_id[:2]}/{_plain(segment_id)}"


def _done(segment_id: str) -> str:
    return f"{_home(segment_id)}/done.json"
