"""What kind of failure an exception is, and how often a segment is tried again."""

from __future__ import annotations

import errno
from dataclasses import dataclass

from ray_jobs.folder import FolderError
from stages.types import RowError

_STORAGE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EIO,
}

MAX_LOSSES = 5
"""Workers that a segment may lose before it is taken to be what kills them."""

MAX_TRIES_OUT_OF_MEMORY = 2
"""A group that ran out of GPU memory is rebuilt and its segment tried once more; a third time would not
help."""


def failure_class(error: BaseException) -> str:
    """`input`, `gpu_oom`, `host_oom`, `storage` or `bug`."""
    if isinstance(error, RowError):
        return "input"
    if type(error).__name__ == "OutOfMemoryError":
        return "host_oom" if type(error).__module__.startswith("ray") else "gpu_oom"
    if isinstance(error, MemoryError):
        return "host_oom"
    if isinstance(error, FolderError):
        return "storage"
    if isinstance(error, OSError) and error.errno in _STORAGE_ERRORS:
        return "storage"
    return "bug"


@dataclass
class Tries:
    """Tries of one segment. A lost worker uses none, an error of ours does."""

    max_tries: int
    failed: int = 0
    lost: int = 0

    def again_after_loss(self) -> bool:
        self.lost += 1
        return self.lost < MAX_LOSSES

    def again_after(self, kind: str) -> bool:
        self.failed += 1
        return self.failed < (MAX_TRIES_OUT_OF_MEMORY if kind == "gpu_oom" else self.max_tries)
