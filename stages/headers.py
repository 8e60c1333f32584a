"""What a recording's own header says about its length, where FFmpeg does not tell.

FFmpeg takes the length of a WAV and an Ogg from what is left of the file, and guesses an MP3's from its bit
rate, so that a recording that was cut short looks whole.
"""

import os
import struct
from typing import BinaryIO

_UNKNOWN_WAV_LENGTH = 0x7FFF_0000
"""Sizes from here on are what programs write that do not know the length yet; 0 is another."""

_LARGEST_OGG_PAGE = 65_307
_OGG_PAGE_HEADER = 27


def is_cut_short(file: BinaryIO) -> bool:
    """Whether the header of a WAV, W64, AVI or CAF counts more bytes than are there, or an Ogg ends inside a
    page (RFC 3533, section 6). False for other formats. Leaves the file at its beginning."""
    file.seek(0)
    looks = {b"RIFF": _riff_is_cut, b"riff": _w64_is_cut, b"caff": _caf_is_cut, b"OggS": _ogg_is_cut}
    look = looks.get(file.read(4))
    cut = look is not None and look(file)
    file.seek(0)
    return cut


def mp3_counts_frames(file: BinaryIO) -> bool:
    """Whether an MP3 begins with a header (Xing, Info or VBRI) that knows its length.

    Leaves the file at its beginning.
    """
    file.seek(0)
    head = file.read(10)
    if head[:3] == b"ID3":
        a, b, c, d = head[6:10]
        file.seek(10 + (a << 21 | b << 14 | c << 7 | d))
    else:
        file.seek(0)
    first_frame = file.read(2048)
    file.seek(0)
    return any(tag in first_frame for tag in (b"Xing", b"Info", b"VBRI"))


def _riff_is_cut(file: BinaryIO) -> bool:
    size, form = struct.unpack("<I4s", file.read(8).ljust(8, b"\0"))
    end = file.seek(0, os.SEEK_END)
    if form == b"AVI ":
        return 0 < size < _UNKNOWN_WAV_LENGTH and size + 8 > end
    file.seek(12)
    while len(header := file.read(8)) == 8:
        name, size = struct.unpack("<4sI", header)
        if name == b"data":
            return 0 < size < _UNKNOWN_WAV_LENGTH and file.tell() + size > end
        file.seek(size + size % 2, os.SEEK_CUR)
    return False


def _w64_is_cut(file: BinaryIO) -> bool:
    """A 16-byte name of the format, then the size of the whole file."""
    file.seek(16)
    (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
    return size > file.seek(0, os.SEEK_END)


def _caf_is_cut(file: BinaryIO) -> bool:
    end = file.seek(0, os.SEEK_END)
    file.seek(8)
    while len(header := file.read(12)) == 12:
        name, size = struct.unpack(">4sq", header)
        if name == b"data":
            return size >= 0 and file.tell() + size > end
        if size < 0:
            return False
        file.seek(size, os.SEEK_CUR)
    return False


def _ogg_is_cut(file: BinaryIO) -> bool:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _LARGEST_OGG_PAGE))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < _OGG_PAGE_HEADER:
        return True
    lacing = page[_OGG_PAGE_HEADER : _OGG_PAGE_HEADER + page[26]]
    return len(page) < _OGG_PAGE_HEADER + page[26] + sum(lacing)
