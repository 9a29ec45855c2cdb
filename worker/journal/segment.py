"""A file of the journal as it stands in memory: how far it goes, what its bytes sum up to, and where each line is."""

from __future__ import annotations

import hashlib
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import orjson

from worker.journal.failures import JournalDamaged
from worker.journal.files import Files
from worker.journal.format import (
    CONTROL_OPS,
    TAIL_BYTES,
    CheckedLines,
    Entry,
    checks,
    line_decoder,
    stored_crc,
)
from worker.journal.manifest import SealedFile, segment_name
from worker.journal.portions import Portion

_BLOCK_BYTES = 1024 * 1024
_COPIED_BYTES = 512 * 1024
_PLAIN = line_decoder(dict[str, Any])


class RecordCold(Exception):
    """The record is not in memory; reading it would wait for the disk."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        super().__init__(sequence)


class Digest:
    """Size, lines, crc32 and sha256 of a file, fed piece by piece."""

    def __init__(self) -> None:
        self.size = 0
        self.lines = 0
        self.crc32 = 0
        self._sha256 = hashlib.sha256()

    def update(self, data: bytes, *, lines: int | None = None) -> None:
        """`lines`, where it is known how many `data` has."""
        self.size += len(data)
        self.lines += data.count(b"\n") if lines is None else lines
        self.crc32 = crc32(data, self.crc32)
        self._sha256.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @classmethod
    def of(cls, stream: BinaryIO, *, block_bytes: int = _BLOCK_BYTES, rest_s: float = 0) -> Digest:
        """Of the rest of `stream`, read in blocks with a rest after each."""
        digest = cls()
        while block := stream.read(block_bytes):
            digest.update(block)
            if rest_s:
                time.sleep(rest_s)
        return digest

    def sealed(self, name: str) -> SealedFile:
        return SealedFile(name, self.size, self.lines, self.crc32, self.sha256)


class Segment:
    """Where the durable lines of one file are: 8 bytes a line. One thread adds, any thread looks up.

    A segment has every sequence from `first` on. A base has some of those up to `last`, and names them.
    """

    __slots__ = ("_file", "_offsets", "_sequences", "first", "name", "records", "size")

    def __init__(self, name: str, first: int, *, sequences: array[int] | None = None) -> None:
        """`first` is the sequence of its first line; `sequences`, of a base, grows with each `note`."""
        self.name = name
        self.first = first
        self.size = 0
        self.records = 0
        self._offsets = array("Q")
        self._sequences = sequences
        self._file: BinaryIO | None = None

    @classmethod
    def after(cls, sequence: int) -> Segment:
        """The segment whose first line follows the line `sequence`."""
        return cls(segment_name(sequence + 1), sequence + 1)

    @property
    def last(self) -> int:
        """The sequence of its last line."""
        return self._sequences[-1] if self._sequences is not None else self.first + len(self._offsets) - 1

    def note(self, offsets: Sequence[int], sequences: Sequence[int]) -> None:
        """The next lines begin here; `size` is set past them afterwards."""
        self._offsets.extend(offsets)
        if self._sequences is not None:
            self._sequences.extend(sequences)

    def add(self, portion: Portion[Any]) -> None:
        """The lines of the portion come next."""
        self._offsets.frombytes((np.frombuffer(portion.starts, np.uint64) + np.uint64(self.size)).tobytes())
        if self._sequences is not None:
            self._sequences.frombytes(portion.sequences)
        self.size += portion.size

    def adopt(self, sequences: memoryview, offsets: memoryview, *, records: int) -> None:
        """Take a base's lines as its index has them: what `dumped` gave."""
        self._sequences, self._offsets = _numbers(sequences), _numbers(offsets)
        self.records = records

    def dumped(self) -> dict[str, array[int]]:
        """Its lines, for the index of a base."""
        return {"sequences": self._sequences or array("Q"), "offsets": self._offsets}

    def sequences(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Those of its lines, in order."""
        if self._sequences is None:
            return np.arange(self.first, self.first + len(self._offsets), dtype=np.uint64)
        return np.frombuffer(self._sequences.tobytes(), np.uint64)

    def sizes(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """How many bytes each of its lines has, in order."""
        offsets = np.frombuffer(self._offsets.tobytes(), np.uint64)
        return np.diff(offsets, append=np.uint64(self.size))

    def span(self, sequence: int) -> tuple[int, int] | None:
        """Where the line begins and ends; None if it is not among the lines."""
        size = self.size  # before the offsets, which are noted before it grows
        offsets = self._offsets
        if self._sequences is None:
            index = sequence - self.first
        else:
            sequences = self._sequences
            # Where it is if nothing was dropped before it, else somewhere before.
            index = min(sequence, len(sequences) - 1)
            if index < 0 or sequences[index] != sequence:
                index = bisect_left(sequences, sequence, 0, max(0, index))
                if index == len(sequences) or sequences[index] != sequence:
                    return None
        if not 0 <= index < len(offsets):
            return None
        return offsets[index], offsets[index + 1] if index + 1 < len(offsets) else size

    def start_after(self, sequence: int) -> int:
        """Where the first line beyond `sequence` begins; `size` if there is none."""
        size = self.size
        index = (
            max(0, sequence + 1 - self.first) if self._sequences is None else bisect_right(self._sequences, sequence)
        )
        return self._offsets[index] if index < len(self._offsets) else size

    def record(self, files: Files, folder: Path, sequence: int, *, wait: bool) -> tuple[dict[str, Any], int]:
        """The record of that line, checked against its crc, and how many bytes the line has.

        Raises KeyError if there is no such line, RecordCold if it is not in memory and `wait` is false, JournalDamaged
        if it is not what it was.
        """
        span = self.span(sequence)
        if span is None or span[0] == 0:
            raise KeyError(sequence)
        start, end = span
        # With the end of the line before, which holds the crc that this one is chained to.
        data = self._read(files, folder, start - TAIL_BYTES, end, sequence, wait)
        seed, line = stored_crc(data[:TAIL_BYTES]), data[TAIL_BYTES:]
        if seed is None or not checks(line, seed):
            reason = "the line does not have its checksum"
            raise JournalDamaged(self.name, offset=start, sequence=sequence, reason=reason)
        return orjson.loads(line)["rec"], end - start

    def _read(self, files: Files, folder: Path, start: int, end: int, sequence: int, wait: bool) -> bytes:
        # Kept open: once compaction has removed the file's name, its readers still have its bytes.
        file = self._file
        if file is None:
            file = self._file = files.reader(folder / self.name)
        try:
            data = files.pread(file.fileno(), end - start, start, wait=wait)
        except BlockingIOError:
            raise RecordCold(sequence) from None
        if len(data) < end - start and not wait:
            raise RecordCold(sequence)
        return data

    def entries(self, files: Files, folder: Path, *, after: int, until: int) -> Iterator[Entry]:
        """The business records with `after` < sequence <= `until`, each line checked again.

        Raises JournalDamaged if a line is not any more what it was.
        """
        # The first line of a file is never a record; each other one is chained to the end of the line before.
        start = max(self.start_after(after), self.start_after(self.first))
        with files.reader(folder / self.name) as stream:
            stream.seek(start - TAIL_BYTES)
            seed = stored_crc(stream.read(TAIL_BYTES))
            yield from self._checked(stream, start, seed, until)

    def _checked(self, stream: BinaryIO, start: int, seed: int | None, until: int) -> Iterator[Entry]:
        lines = CheckedLines(stream, _PLAIN, sequence=-1, crc=seed or 0, offset=start, gapless=False)
        for _, line in lines:
            if line.sequence > until:
                return
            if line.op not in CONTROL_OPS:
                yield Entry(line.sequence, line.time_ms, line.op, line.record)
            if line.sequence == until:
                return
        if lines.fault:
            raise JournalDamaged(self.name, offset=lines.offset, sequence=lines.sequence + 1, reason=lines.fault)


def _numbers(data: memoryview) -> array[int]:
    """In pieces: to copy all at once would keep every other thread from the interpreter, 13 ms for a million."""
    numbers = array("Q")
    for start in range(0, len(data), _COPIED_BYTES):
        numbers.frombytes(data[start : start + _COPIED_BYTES])
    return numbers
