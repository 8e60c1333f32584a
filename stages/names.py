"""What may be the name of a lesson, and so of a file in the output folder, on any disk."""

from __future__ import annotations

import re
import unicodedata

_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|\u200e\u200f\u202a-\u202e\u2066-\u2069]')
"""Separators, what Windows refuses, control characters, and those that turn the direction of writing."""

_MAX_BYTES = 200


def name_rule(name: str) -> str | None:
    """Why a name cannot be a file in the output folder, or None if it can."""
    if name.startswith("."):
        return "must not begin with a dot: it would hide or leave the output folder"
    if bad := _UNSAFE.search(name):
        return f"must be a plain file name; {bad.group()!r} is not allowed in one"
    if name != name.strip(" .") and name.strip(" .") != "":
        return "must not begin or end with a space, or end with a dot"
    if len(name.encode()) > _MAX_BYTES:
        return f"is {len(name.encode())} bytes long; at most {_MAX_BYTES} are allowed"
    return None


def safe_name(text: str) -> str:
    """The nearest name that `name_rule` allows."""
    name = _UNSAFE.sub("_", text).strip(" .")
    while len(name.encode()) > _MAX_BYTES:
        name = name[:-1]
    return name or "lesson"


def same_file(name: str) -> str:
    """Equal for names that some disks take for one: they fold case, or spell accents in one way only."""
    return unicodedata.normalize("NFC", name).casefold()
