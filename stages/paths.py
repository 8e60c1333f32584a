"""Where a manifest's files are: resolve what a cell says, and open it wherever it lies."""

import errno
import os
import re
import shutil
import stat
import tempfile
from typing import BinaryIO, cast
from urllib.parse import unquote, urlsplit, urlunsplit

import pyarrow.fs

from stages.types import RowError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_uri(path: str) -> bool:
    return _SCHEME.match(path) is not None


def resolve(path: str, manifest: str) -> str:
    """`path` as a manifest's cell has it -> absolute path or URI.

    URIs and absolute paths stay as they are; everything else is relative to the manifest's own folder, which
    may be a URI (whose options, such as `?region=`, are kept), and never to the working directory.
    """
    if is_uri(path) or os.path.isabs(path):
        return path
    if is_uri(manifest):
        parts = urlsplit(manifest, allow_fragments=False)
        return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{path}"))
    return os.path.join(os.path.dirname(os.path.abspath(manifest)), path)


def open_binary(path: str) -> BinaryIO:
    """Opens a local file, or a temporary copy of what a URI names: decoders seek, and a seek is a request.

    Keys of object stores are taken literally: spaces and Chinese are not escaped, as they are in `file://`
    URIs. Raises FileNotFoundError and IsADirectoryError for both, and ValueError for pipes and devices and
    for a URI that `pyarrow.fs` does not know.
    """
    if path.startswith("file://"):
        path = unquote(urlsplit(path, allow_fragments=False).path)
    if not is_uri(path):
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise ValueError("is not a regular file")  # a pipe or a device would never end
        return open(path, "rb")
    parts = urlsplit(path, allow_fragments=False)
    query = f"?{parts.query}" if parts.query else ""
    filesystem, root = pyarrow.fs.FileSystem.from_uri(f"{parts.scheme}://{parts.netloc}/{query}")
    key = f"{root.rstrip('/')}{parts.path}"
    kind = filesystem.get_file_info(key).type
    if kind == pyarrow.fs.FileType.NotFound:
        raise FileNotFoundError(path)
    if kind == pyarrow.fs.FileType.Directory:
        raise IsADirectoryError(path)
    copy = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 (the caller closes it)
    with filesystem.open_input_file(key) as source:
        shutil.copyfileobj(source, copy, 1 << 20)
    copy.seek(0)
    return copy


def open_input(field: str, path: str) -> BinaryIO:
    """`open_binary` for the file that a row's `field` names. Raises RowError if it is not there, not readable
    or empty; other failures of a storage pass through, since they are not the row's fault."""
    try:
        file = open_binary(path)
    except FileNotFoundError:
        raise RowError(field, path, "no such file") from None
    except IsADirectoryError:
        raise RowError(field, path, "is a folder, not a file") from None
    except PermissionError:
        raise RowError(field, path, "may not be read by this user") from None
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP):
            raise
        raise RowError(field, path, f"cannot be opened: {error.strerror}") from None
    except ValueError as error:
        raise RowError(field, path, f"cannot be opened: {error}") from None
    if not file.seek(0, os.SEEK_END):
        file.close()
        raise RowError(field, path, "is an empty file")
    file.seek(0)
    return file
