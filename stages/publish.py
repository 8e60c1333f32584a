"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from pyarrow.fs import FileSystem, FileType

_CHUNK = 1 << 20


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under. Leaving without an error puts it at `path` in one step.

    An existing file is replaced, and stays as it is after an error; the part is then removed. Folders are
    made. The content is on the disk before the name is, so that a power cut leaves no empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def publish(local: Path, filesystem: FileSystem, path: str) -> None:
    """Copy a finished file to `path` of any pyarrow filesystem. Its folder must exist where folders are real.

    Object stores show an object when its stream is closed, after an error a truncated one: that is deleted.

    Raises:
        OSError: the copy failed, or arrived with another size.
    """
    if filesystem.type_name == "local":
        with published(Path(path)) as part:
            shutil.copyfile(local, part)
        return
    try:
        with local.open("rb") as source, filesystem.open_output_stream(path) as target:
            shutil.copyfileobj(source, target, _CHUNK)  # NativeFile.upload loses errors
        arrived, sent = filesystem.get_file_info(path).size, local.stat().st_size
        if arrived != sent:
            raise OSError(f"{path}: {arrived} of {sent} bytes arrived")
    except OSError:
        if filesystem.get_file_info(path).type == FileType.File:
            filesystem.delete_file(path)
        raise
