"""A segment as it stands in memory: how far it goes, what its bytes sum up to, and where its lines are."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from worker.journal.failures import JournalDamaged
from worker.journal.files import Files
from worker.journal.format import CONTROL_OPS, CheckedLines, Entry, entry_of
from worker.journal.manifest import SealedFile, segment_name

# A point costs 20 bytes; to reach a line, half of this many lines before it are read.
LINES_PER_POINT = 16
_BLOCK_BYTES = 1024 * 1024


class Digest:
    """Size, lines, crc32 and sha256 of a file, fed piece by piece."""

    def __init__(self) -> None:
        self.size = 0
        self.lines = 0
        self.crc32 = 0
        self._sha256 = hashlib.sha256()

    def update(self, data: bytes) -> None:
        self.size += len(data)
        self.lines += data.count(b"\n")
        self.crc32 = crc32(data, self.crc32)
        self._sha256.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @classmethod
    def of(cls, stream: BinaryIO) -> Digest:
        digest = cls()
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
        return digest

    def sealed(self, name: str) -> SealedFile:
        return SealedFile(name, self.size, self.lines, self.crc32, self.sha256)


@dataclass(frozen=True, slots=True)
class Point:
    """A place between two lines: `offset` in the file, and `sequence` and `crc` of the line before it."""

    sequence: int
    crc: int
    offset: int


class Segment:
    """Where the durable lines of one file are. One thread adds, any thread looks up."""

    __slots__ = ("_crcs", "_offsets", "_sequences", "first", "name", "records", "size")

    def __init__(self, first: int, crc: int) -> None:
        """`first` is the sequence of its `open` line, `crc` that of the line before."""
        self.name = segment_name(first)
        self.first = first
        self.size = 0
        self.records = 0
        self._sequences = array("Q")
        self._offsets = array("Q")
        self._crcs = array("L")
        self.note(first - 1, crc, 0)

    def note(self, sequence: int, crc: int, offset: int) -> None:
        """Remember a point. Points come in ascending order; every `LINES_PER_POINT`th line makes one."""
        self._offsets.append(offset)
        self._crcs.append(crc)
        # Last, since a reader takes its position from this one.
        self._sequences.append(sequence)

    def point_before(self, sequence: int) -> Point:
        """The last point known that is before the line `sequence`."""
        index = max(0, bisect_right(self._sequences, sequence - 1) - 1)
        return Point(self._sequences[index], self._crcs[index], self._offsets[index])


def read_segment(files: Files, folder: Path, segment: Segment, *, after: int, until: int) -> Iterator[Entry]:
    """The business records of `segment` with `after` < sequence <= `until`, each line checked again.

    Raises JournalDamaged if a line is not any more what it was.
    """
    point = segment.point_before(after + 1)
    if point.sequence >= until:
        return
    with files.reader(folder / segment.name) as stream:
        stream.seek(point.offset)
        lines = CheckedLines(stream, sequence=point.sequence, crc=point.crc, offset=point.offset)
        for value in lines:
            if lines.sequence > after and value["op"] not in CONTROL_OPS:
                yield entry_of(value)
            if lines.sequence >= until:
                return
        if lines.fault:
            raise JournalDamaged(segment.name, offset=lines.offset, sequence=lines.sequence + 1, reason=lines.fault)
