"""Zip directories and compressed streams, looked into within limits and never extracted.

Readers disagree on where a zip archive's directory is: some trust the offset in its last record, others count back
from that record. Every place that any of them would read is looked at, so no archive shows one list to us and another
to them.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Iterator

from worker.validation.source import Ends, Source, read_exactly

DIRECTORY_BYTES_MAX = 8 * 1024 * 1024

_ENTRY, _END, _END64 = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06"
_END_BYTES, _END64_BYTES, _LOCATOR_BYTES, _ENTRY_BYTES = 22, 56, 20, 46
_END_RECORDS_MAX = 8
_PEEK_BYTES = 4096
_LZMA_MEMORY = 64 * 1024 * 1024

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x5d\x00\x00": "lzma",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class DirectoryTooLargeError(Exception):
    """An archive's directory is above our limit, so what it lists cannot be told."""


def has_zip_directory(ends: Ends, source: Source) -> bool:
    """Whether the end of a file makes it a zip archive that some reader would list."""
    return next(_directories(ends, source), None) is not None


def zip_names(ends: Ends, source: Source) -> Iterator[str]:
    """The names in a zip archive, as any reader would see them; raises DirectoryTooLargeError."""
    for offset, length in _directories(ends, source):
        if length > DIRECTORY_BYTES_MAX:
            raise DirectoryTooLargeError
        directory = read_exactly(source, offset, length)
        position = 0
        while directory.startswith(_ENTRY, position) and position + _ENTRY_BYTES <= length:
            sizes = struct.unpack_from("<3H", directory, position + 28)
            start = position + _ENTRY_BYTES
            yield directory[start : start + sizes[0]].decode("utf-8", "replace")
            position = start + sum(sizes)


def _directories(ends: Ends, source: Source) -> Iterator[tuple[int, int]]:
    """(offset, length) of every directory that a last record points to, and that begins as a directory does."""
    seen = set()
    for end in _end_records(ends.tail):
        for offset, length in _places(ends, source, end):
            inside = offset >= 0 and length >= _ENTRY_BYTES and offset + length <= ends.size
            if inside and (offset, length) not in seen and read_exactly(source, offset, 4) == _ENTRY:
                seen.add((offset, length))
                yield offset, length


def _end_records(tail: bytes) -> Iterator[int]:
    """Where last records begin in the tail, from the back; a comment may hold false ones."""
    position = len(tail)
    for _ in range(_END_RECORDS_MAX):
        position = tail.rfind(_END, 0, position)
        if position < 0:
            return
        if position + _END_BYTES <= len(tail):
            yield position


def _places(ends: Ends, source: Source, end: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of the directory by the offset that is written, and by counting back; the long form too."""
    length, offset = struct.unpack_from("<2I", ends.tail, end + 12)
    at = ends.tail_offset + end
    yield offset, length
    yield at - length, length
    locator = ends.tail[max(0, end - _LOCATOR_BYTES) : end]
    if not locator.startswith(b"PK\x06\x07") or len(locator) < _LOCATOR_BYTES:
        return
    written = int.from_bytes(locator[8:16], "little")
    for place in {written, at - _LOCATOR_BYTES - _END64_BYTES}:
        if not 0 <= place <= ends.size - _END64_BYTES:
            continue
        record = read_exactly(source, place, _END64_BYTES)
        if record.startswith(_END64):
            length, offset = struct.unpack_from("<2Q", record, 40)
            yield offset, length
            yield place - length, length


def compression(head: bytes) -> str | None:
    """The compression that a file begins with, or None."""
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            return name
    # A zlib stream: deflate, and two bytes that are a multiple of 31.
    if head[:1] == b"\x78" and int.from_bytes(head[:2], "big") % 31 == 0:
        return "zlib"
    return None


def peek(head: bytes) -> bytes:
    """The first few KiB inside a compressed stream; empty where it cannot be read."""
    try:
        match compression(head):
            case "gzip" | "zlib":
                return zlib.decompressobj(wbits=47).decompress(head, _PEEK_BYTES)
            case "bzip2":
                return bz2.BZ2Decompressor().decompress(head, _PEEK_BYTES)
            case "xz" | "lzma":
                return lzma.LZMADecompressor(memlimit=_LZMA_MEMORY).decompress(head, _PEEK_BYTES)
            case _:
                return b""
    except (zlib.error, OSError, EOFError, lzma.LZMAError):
        return b""
