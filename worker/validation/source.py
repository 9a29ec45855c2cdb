"""How a check reads a file: bounded random access, and the two ends of a file read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from schemas.findings import Finding

HEAD_BYTES = 64 * 1024
# A zip archive's last record may be followed by a comment of up to 65,535 bytes.
TAIL_BYTES = 64 * 1024 + 22


class Source(Protocol):
    """One file, synchronous, used from a worker thread. Hashable: those that are equal have the same bytes."""

    @property
    def size(self) -> int:
        """Bytes in the file."""

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`, or fewer at the end of the file."""


Hook = Callable[[str, Source], Iterable[Finding]]
"""A check of one format: (path, source) to findings. What it reads, computes and keeps is bounded for any file."""


@dataclass(frozen=True, slots=True)
class BytesSource:
    """A file that came inside a message."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class ShortReadError(Exception):
    """A source gave another number of bytes than its size promises."""


@dataclass(frozen=True, slots=True)
class Ends:
    """The first bytes of a file and, where the file is longer than those, its last bytes."""

    size: int
    head: bytes
    tail: bytes
    tail_offset: int

    @property
    def beyond(self) -> int:
        """Bytes of the file after `head`."""
        return self.size - len(self.head)


def read_exactly(source: Source, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`; raises ShortReadError if the source gives more or fewer."""
    data = source.read_at(offset, length)
    if len(data) != length:
        raise ShortReadError(f"{len(data)} bytes instead of {length} at {offset}")
    return data


def read_ends(source: Source) -> Ends:
    """Both ends of a file, in one read for a small file and two for any other."""
    size = source.size
    head = read_exactly(source, 0, min(size, HEAD_BYTES))
    if size <= HEAD_BYTES:
        return Ends(size, head, head, 0)
    offset = max(0, size - TAIL_BYTES)
    return Ends(size, head, read_exactly(source, offset, size - offset), offset)
