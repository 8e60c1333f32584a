"""A folder on any filesystem that pyarrow knows: a local path, `file://`, `s3://`, `gs://`."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from stages.publish import publish, published

_OBJECT_STORES = ("abfs", "gcs", "s3")
"""Filesystems without folders of their own."""


class FolderError(Exception):
    """A file could not be read or written; the text says which, where and why."""


def join(uri: str, name: str) -> str:
    """The path or URI of `name` inside a folder; options of the filesystem stay behind the path."""
    path, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


class Folder:
    """Small whole files under one root.

    A local write is a temporary file, fsync and rename; an object store publishes an object whole or not at
    all when it is written by one call. Either way a reader never sees half a file.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.name = re.sub(r"//[^/]*@|[?].*", lambda secret: "//" if secret.group()[0] == "/" else "", uri)
        """The URI without the keys that it may carry, for messages."""
        if not uri:
            raise ValueError("the name of a folder is empty")
        if uri.startswith("file://"):
            uri = unquote(urlsplit(uri).path)
        if "://" in uri:
            self._fs, self._root = fs.FileSystem.from_uri(uri)
        else:
            self._fs, self._root = fs.LocalFileSystem(), str(Path(uri).absolute())

    @property
    def is_local(self) -> bool:
        return isinstance(self._fs, fs.LocalFileSystem)

    def local_path(self, name: str) -> Path | None:
        """Path of a file on this machine, its folder made; None on an object store."""
        if not self.is_local:
            return None
        path = Path(self._root, name)
        self._wrap("make the folder of", name, lambda: path.parent.mkdir(parents=True, exist_ok=True))
        return path

    def probe(self) -> None:
        """Raise FolderError now if nothing can be written here."""
        self.write(".probe", b"")

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""
        info = self._wrap("look for", name, lambda: self._fs.get_file_info(self._path(name)))
        return info.size if info.type == fs.FileType.File else None

    def names(self, under: str) -> list[str]:
        """Names of the files in a subfolder, by one listing; empty if there is none."""
        selector = fs.FileSelector(self._path(under), allow_not_found=True)
        infos = self._wrap("list", under, lambda: self._fs.get_file_info(selector))
        return sorted(f"{under}/{info.base_name}" for info in infos if info.type == fs.FileType.File)

    def read(self, name: str) -> bytes:
        def read() -> bytes:
            with self._fs.open_input_stream(self._path(name)) as stream:
                return stream.read()

        return self._wrap("read", name, read)

    def write(self, name: str, data: bytes) -> None:
        local = self.local_path(name)
        if local is None:
            self._make_parent(name)
            self._wrap("write", name, lambda: self._write_object(name, data))
        else:
            self._wrap("write", name, lambda: _write_local(local, data))

    def upload(self, local: Path, name: str) -> None:
        """Publish a finished local file under `name`."""
        self._make_parent(name)
        self._wrap("upload", name, lambda: publish(local, self._fs, self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_parent(self, name: str) -> None:
        if self._fs.type_name not in _OBJECT_STORES:
            parent = self._path(name).rpartition("/")[0]
            self._wrap("make the folder of", name, lambda: self._fs.create_dir(parent, recursive=True))

    def _write_object(self, name: str, data: bytes) -> None:
        with self._fs.open_output_stream(self._path(name)) as stream:
            stream.write(data)

    def _wrap(self, what, name, action):  # type: ignore[no-untyped-def]
        try:
            return action()
        except OSError as error:
            raise FolderError(f"cannot {what} {self.name}/{name}: {error}") from error


def _write_local(path: Path, data: bytes) -> None:
    with published(path) as part:
        part.write_bytes(data)
