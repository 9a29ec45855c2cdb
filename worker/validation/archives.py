"""Zip directories, tar headers and compressed streams, looked into within limits and never extracted.

Readers disagree on where a zip archive's directory is: some trust the offset in its last record, others count back
from that record. Every place that any of them would read is looked at, so no archive shows one list to us and another
to them.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from worker.validation.source import Ends, Source, read_exactly

DIRECTORY_BYTES_MAX = 8 * 1024 * 1024

_ENTRY, _END, _END64, _LOCAL = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x03\x04"
_END_BYTES, _END64_BYTES, _LOCATOR_BYTES, _ENTRY_BYTES, _LOCAL_BYTES = 22, 56, 20, 46, 30
_IN_EXTRA = 0xFFFF_FFFF
_MEMBER_BYTES = 12 * 1024
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
    """An archive's directories are above our limit together, so what it lists cannot be told."""


def has_zip_directory(ends: Ends, source: Source) -> bool:
    """Whether the end of a file makes it a zip archive that some reader would list."""
    return next(_directories(ends, source), None) is not None


@dataclass(frozen=True, slots=True)
class Member:
    """What a directory says of a file in a zip archive; `places` are where its local header may be."""

    name: str
    method: int
    places: tuple[int, ...]


def zip_members(ends: Ends, source: Source) -> Iterator[Member]:
    """The files in a zip archive, as any reader would see them; raises DirectoryTooLargeError."""
    total = 0  # of directories that lie within each other, each would be read anew
    for offset, length, shift in _directories(ends, source):
        total += length
        if total > DIRECTORY_BYTES_MAX:
            raise DirectoryTooLargeError
        directory = read_exactly(source, offset, length)
        position = 0
        while directory.startswith(_ENTRY, position) and position + _ENTRY_BYTES <= length:
            (method,) = struct.unpack_from("<H", directory, position + 10)
            sizes = struct.unpack_from("<3H", directory, position + 28)
            (place,) = struct.unpack_from("<I", directory, position + 42)
            start = position + _ENTRY_BYTES
            name, extra = start + sizes[0], start + sizes[0] + sizes[1]
            if place == _IN_EXTRA:
                place = _long_place(directory[position:start], directory[name:extra])
            yield Member(directory[start:name].decode("utf-8", "replace"), method, (place, place + shift))
            position = start + sum(sizes)


def _long_place(entry: bytes, extra: bytes) -> int:
    """Where the local header is by an entry's zip64 field, which has those of two sizes and a place that do not fit."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            before = 8 * sum(size == _IN_EXTRA for size in struct.unpack_from("<2I", entry, 20))
            return int.from_bytes(extra[position + 4 + before : position + 12 + before], "little")
        position += 4 + length
    return _IN_EXTRA


def member_begins(member: Member, source: Source) -> Iterator[bytes | None]:
    """How a file in a zip archive begins, some 10 KiB of it, at each place where readers may look for it; None where it
    cannot be told."""
    for place in set(member.places):
        if not 0 <= place <= source.size - _LOCAL_BYTES:
            continue
        data = read_exactly(source, place, min(source.size - place, _LOCAL_BYTES + _MEMBER_BYTES))
        if not data.startswith(_LOCAL):
            continue
        content = data[_LOCAL_BYTES + sum(struct.unpack_from("<2H", data, 26)) :]
        match member.method:
            case zipfile.ZIP_STORED:
                yield content
            case zipfile.ZIP_DEFLATED:
                yield _inflated(content)
            case _:
                yield None


def _inflated(content: bytes) -> bytes | None:
    stream = zlib.decompressobj(wbits=-15)
    try:
        data = stream.decompress(content, _MEMBER_BYTES)
    except zlib.error:
        return b""
    # Blocks of nothing may come before the first byte.
    return data if data or stream.eof else None


def _directories(ends: Ends, source: Source) -> Iterator[tuple[int, int, int]]:
    """Offset and length of every directory that a last record points to, and that begins as a directory does; and how
    far that is behind where it is written to be, as with something put before an archive."""
    seen = set()
    for end in _end_records(ends.tail):
        for offset, length, shift in _places(ends, source, end):
            inside = offset >= 0 and length >= _ENTRY_BYTES and offset + length <= ends.size
            if inside and (offset, length) not in seen and read_exactly(source, offset, 4) == _ENTRY:
                seen.add((offset, length))
                yield offset, length, shift


def _end_records(tail: bytes) -> Iterator[int]:
    """Where last records begin in the tail, from the back; a comment may hold false ones."""
    position = len(tail)
    for _ in range(_END_RECORDS_MAX):
        position = tail.rfind(_END, 0, position)
        if position < 0:
            return
        if position + _END_BYTES <= len(tail):
            yield position


def _places(ends: Ends, source: Source, end: int) -> Iterator[tuple[int, int, int]]:
    """As `_directories`: by the offset that is written, and by counting back; the long form too."""
    length, offset = struct.unpack_from("<2I", ends.tail, end + 12)
    at = ends.tail_offset + end
    yield offset, length, 0
    yield at - length, length, at - length - offset
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
            yield offset, length, 0
            yield place - length, length, place - length - offset


def is_tar(head: bytes) -> bool:
    """Whether a file begins with the header of a tar archive; old ones have a checksum alone to tell that."""
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "replace")
    except tarfile.HeaderError:
        return False
    return True


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
