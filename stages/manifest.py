"""Read a manifest of lessons in any format, every value a string; write one for a folder of recordings.

A reader yields one entry per lesson: the pairs of column and value as they stand there, or the RowError of a
line that has none. What the columns mean is not decided here.
"""

import codecs
import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow
import pyarrow.parquet
import yaml

from stages.names import safe_name, same_file
from stages.paths import is_uri, open_input
from stages.types import Problem, Row, RowError

RECORDINGS = (
    *(".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus", ".wma", ".aiff", ".aif"),
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm"),
)
"""Ends of file names that `init` takes for recordings."""

_SHOWN = 80
_EXCEL_SEPARATOR = re.compile(r"sep=.\r?\n", re.IGNORECASE)
"""A first line by which spreadsheet programs note what stands between cells."""


class _Object(list[tuple[str, Any]]):
    """The pairs of a mapping, names that stand twice included."""


Entry = _Object | RowError


def read(uri: str) -> tuple[list[Row], list[Problem]]:
    """Rows of a CSV, JSON Lines, Parquet, or Live Avatar batch JSON/YAML manifest, and the problems found.

    Rows are numbered from 1; a problem of the manifest as a whole has row 0. Empty values and nulls are left
    out, blank lines are not counted, and spaces around values are dropped.
    """
    try:
        with open_input("manifest", uri) as file:
            data = file.read()
        entries = list(_entries(uri, data))
        if not entries:
            raise RowError("manifest", uri, "has no rows")
    except RowError as error:
        return [], [error.problem(0, "")]
    except OSError as error:
        return [], [Problem(0, "", "manifest", uri, f"cannot be read: {error}")]
    rows, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            rows.append(Row(number, _values(entry)))
        except RowError as error:
            problems.append(error.problem(number, _lesson_id(entry)))
    return rows, problems


def init(
    recordings_dir: str, image: str | None = None, prompt: str | None = None, manifest_dir: str | None = None
) -> str:
    """CSV text with one lesson for each recording of a folder, in natural order (lesson2 before lesson10).

    A lesson is called as its file, with its ending or a number where two would be called the same. Paths are
    absolute, or relative to `manifest_dir` where the manifest is going to be; `image` and `prompt` are
    written as they are. Raises ValueError if the folder holds no recording.
    """
    folder = Path(recordings_dir).absolute()
    found = [file for file in folder.iterdir() if _is_recording(file)]
    if not found:
        raise ValueError(f"{recordings_dir!r} holds no recordings ({', '.join(RECORDINGS)})")
    names = _lesson_names(sorted(found, key=lambda file: _natural(file.name)))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["lesson_id", "image", "audio", "prompt"])
    for file, lesson_id in names.items():
        audio = os.path.relpath(file, manifest_dir) if manifest_dir is not None else str(file)
        table.writerow([lesson_id, image or "", audio, prompt or ""])
    return text.getvalue()


def _entries(uri: str, data: bytes) -> Iterable[Entry]:
    suffix = PurePosixPath(urlsplit(uri).path if is_uri(uri) else uri).suffix.lower()
    if suffix in (".parquet", ".pq") or data.startswith(b"PAR1"):
        return _parquet(uri, data)
    text = _text(uri, data)
    if suffix in (".yaml", ".yml"):
        return _batch_yaml(uri, text)
    if suffix == ".json":
        return _batch_json(uri, text)
    if suffix in (".jsonl", ".ndjson") or text.lstrip().startswith("{"):
        return _json_lines(text)
    return _csv(uri, text)


def _text(uri: str, data: bytes) -> str:
    """UTF-8, or what Excel writes instead: UTF-16 with a mark, or GBK (of which GB 18030 is the whole)."""
    encodings = ["utf-8-sig", "gb18030"]
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise RowError("manifest", uri, "is not text in UTF-8, UTF-16 or GBK; save it as UTF-8")


def _csv(uri: str, text: str) -> Iterator[Entry]:
    if _EXCEL_SEPARATOR.match(text):
        text = text.partition("\n")[2]
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first_line.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        filled = (line for line in lines if any(cell.strip() for cell in line))
        header = [name.strip() for name in next(filled, [])]
        _refuse_twice(uri, header)
        for line in filled:
            while len(line) > len(header) and not line[-1].strip():
                line.pop()  # spreadsheet programs write empty cells beyond the last column
            if len(line) == len(header):
                yield _Object(zip(header, line, strict=True))
            else:
                shown = delimiter.join(line)[:_SHOWN]
                yield RowError("row", shown, f"has {len(line)} cells, but the header has {len(header)}")
    except csv.Error as error:
        raise RowError("manifest", uri, f"is not valid CSV at line {lines.line_num} ({error})") from None


def _json_lines(text: str) -> Iterator[Entry]:
    # Only line feeds end a line: JSON strings may hold the other separators that `splitlines` knows.
    for line in text.split("\n"):
        if line.strip():
            try:
                entry = _json(line)
            except ValueError as error:
                yield RowError("row", line[:_SHOWN], f"is not valid JSON ({error})")
            else:
                is_object = isinstance(entry, _Object)
                yield entry if is_object else RowError("row", line[:_SHOWN], "must be a JSON object")


def _batch_json(uri: str, text: str) -> Iterator[Entry]:
    try:
        batch = _json(text)
    except ValueError as error:
        rule = f"is not valid JSON ({error}); JSON Lines are called .jsonl"
        raise RowError("manifest", uri, rule) from None
    return _batch(uri, batch)


def _batch_yaml(uri: str, text: str) -> Iterator[Entry]:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise RowError("manifest", uri, f"is not valid YAML ({error})") from None
    return _batch(uri, _from_yaml(root, levels=2))


def _from_yaml(node: yaml.Node | None, levels: int) -> Any:
    """The first levels of mappings as pairs, scalars as they are written (001 stays 001), else a list."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag.endswith(":null") else node.value
    if isinstance(node, yaml.MappingNode) and levels:
        return _Object((str(_from_yaml(key, 0)), _from_yaml(value, levels - 1)) for key, value in node.value)
    return []


def _batch(uri: str, batch: object) -> Iterator[Entry]:
    """Live Avatar's `name: {prompt, image, audio, num_clip}`; the name is the lesson's id."""
    if not isinstance(batch, _Object):
        raise RowError("manifest", uri, "must be a mapping of names to {prompt, image, audio, num_clip}")
    for name, lesson in batch:
        if isinstance(lesson, _Object):
            yield _Object([("lesson_id", name), *lesson])
        else:
            yield RowError("lesson_id", name, "must be followed by a mapping such as {prompt, image, audio}")


def _parquet(uri: str, data: bytes) -> Iterator[Entry]:
    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise RowError("manifest", uri, f"is not a valid Parquet file ({error})") from None
    _refuse_twice(uri, table.column_names)
    for row in table.to_pylist():
        yield _Object(row.items())


def _json(text: str) -> Any:
    """Objects as pairs, numbers as they are written. Raises ValueError."""
    try:
        return json.loads(
            text, object_pairs_hook=_Object, parse_int=str, parse_float=str, parse_constant=str, strict=False
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _values(entry: Entry) -> dict[str, str]:
    if isinstance(entry, RowError):
        raise entry
    values: dict[str, str] = {}
    for name, value in entry:
        text = _string(name, value)
        if not text:
            continue
        if not name:
            raise RowError("row", text, "stands in a column that has no name")
        if name in values:
            raise RowError(name, text, "is given twice in this row")
        values[name] = text
    return values


def _string(name: str, value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # A column of whole numbers with gaps becomes one of floats in pandas.
    if isinstance(value, list | tuple | dict | bytes):
        raise RowError(name, repr(value)[:_SHOWN], "must be a single value, not a list, mapping or bytes")
    text = str(value).strip()
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RowError(name, ascii(text)[:_SHOWN], "holds half of a character (a lone surrogate)")
    return text


def _lesson_id(entry: Entry) -> str:
    ids = [value for name, value in entry if name == "lesson_id"] if isinstance(entry, _Object) else []
    return str(ids[0]) if ids and ids[0] is not None else ""


def _refuse_twice(uri: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise RowError("manifest", uri, f"has more than one column called {', '.join(twice)}")


def _is_recording(file: Path) -> bool:
    return file.suffix.lower() in RECORDINGS and not file.name.startswith(".") and file.is_file()


def _lesson_names(files: Sequence[Path]) -> dict[Path, str]:
    """A lesson id for every recording, each a name that no disk takes for another's."""
    stems = Counter(same_file(safe_name(file.stem)) for file in files)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file in files:
        alone = stems[same_file(safe_name(file.stem))] == 1
        name = base = safe_name(file.stem if alone else file.name)
        number = 2
        while same_file(name) in taken:
            name, number = f"{base}-{number}", number + 1
        taken.add(same_file(name))
        names[file] = name
    return names


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"([0-9]+)", name)]
