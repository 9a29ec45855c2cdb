"""What of a damaged file still checks, line by line.

A line is intact if it checks against the crc stored in the line before, or against the crc computed from the body of
the line before where that one's own text of it is damaged; which then proves that body too.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO
from zlib import crc32

import msgspec

from worker.journal.format import CONTROL_OPS, FORMAT_VERSION, TAIL_BYTES, Line, checks, line_decoder, stored_crc
from worker.journal.manifest import is_base, segment_first
from worker.journal.torn import judge

_DECODER = line_decoder(dict[str, Any])
# A line's end, whatever stands for its newline, and the beginning of the next one.
_MERGED = re.compile(rb'(?s)(,"crc":"[0-9a-f]{8}"\}.)(?=\{"v":[0-9]+,"seq":[0-9]+,"b":)')
_PREVIOUS_CRC = re.compile(rb'"previous":\{"name":"[^"]{1,60}","crc":"([0-9a-f]{8})"\}')
_BEGINNING = re.compile(rb'\{"v":1,"seq":([0-9]{1,19}),"b":')
_LEAST_LINE_BYTES = 60


class UnknownFormat(Exception):
    """An intact line has a format version that this program does not read."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Bytes of a file that are not intact lines; where lines are simply missing, 0 bytes.

    `first` and `last` are the sequences the lines there had, in a base at most; `last` < `first` if none are missing.
    """

    path: str
    offset: int
    bytes: int
    first: int
    last: int


class SalvagedFile:
    """The intact lines of one file: of business records the `sequences`, and where the `bodies` are (offset, size)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sequences = array("Q")
        self.bodies: tuple[array[int], array[int]] = (array("Q"), array("Q"))
        self.stretches: list[Stretch] = []
        self.opened: dict[str, Any] | None = None
        """The record of its `open` line, if that is intact."""
        self.sequence = -1 if is_base(name) else (segment_first(name) or 1) - 1
        """Of the last intact line."""
        self.crc: int | None = None
        """Of the last intact line."""

    def records(self, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Sequence and body of each business record, from the same file."""
        for sequence, offset, size in zip(self.sequences, *self.bodies, strict=True):
            stream.seek(offset)
            yield sequence, stream.read(size)


@dataclass(slots=True)
class _Piece:
    """What should be a line, at `offset`: `size` bytes of the file, as `line` with its newline."""

    offset: int
    size: int
    line: bytes

    @property
    def body(self) -> bytes:
        return self.line[:-TAIL_BYTES]


def salvage(stream: BinaryIO, name: str, *, crc: int | None, until: int | None, is_active: bool) -> SalvagedFile:
    """What is intact in a file of a journal.

    `crc` is that of the line before its first one, if it is known; `until` the last sequence it can have, None if it is
    the newest file. The end of the active file, if it is what a write leaves that was cut short, is left out in
    silence: nobody was promised it. Raises UnknownFormat.
    """
    return _Salvage(name, crc, until).run(stream, is_active)


class _Salvage:
    def __init__(self, name: str, crc: int | None, until: int | None) -> None:
        self._file = SalvagedFile(name)
        self._until = until
        # What the next line may be chained to, the likeliest first.
        self._seeds: list[int] = [0] if is_base(name) else [] if crc is None else [crc]
        self._bad: list[_Piece] = []

    def run(self, stream: BinaryIO, is_active: bool) -> SalvagedFile:
        size = 0
        for data in stream:
            for piece in self._pieces(size, data):
                self._take(piece)
            size += len(data)
        self._end(stream, size, is_active)
        return self._file

    def _pieces(self, offset: int, data: bytes) -> Iterator[_Piece]:
        """The line `data`; or the lines in it, if the newline between them has turned into another byte."""
        if not any(checks(data, seed) for seed in self._seeds):
            start = 0
            for end in [found.end() for found in _MERGED.finditer(data)]:
                yield _Piece(offset + start, end - start, data[start : end - 1] + b"\n")
                start = end
            offset, data = offset + start, data[start:]
        if data.endswith(b"\n"):
            yield _Piece(offset, len(data), data)
        else:  # at the end of the file: without its newline, or with another byte in its place
            line = data + b"\n"
            yield _Piece(offset, len(data), line if stored_crc(line) is not None else data[:-1] + b"\n")

    def _take(self, piece: _Piece) -> None:
        if piece.offset == 0:
            self._seeds += _own_seeds(piece.line)
        seed = next((seed for seed in self._seeds if checks(piece.line, seed)), None)
        line = None if seed is None else self._decoded(piece, self._file.sequence)
        stored = stored_crc(piece.line)
        if line is None or stored is None:
            computed = [crc32(piece.body, seed) for seed in self._seeds[:1]]
            self._seeds = [*([] if stored is None else [stored]), *computed]
            self._bad.append(piece)
            return
        self._redeem(seed)
        self._close(line.sequence - 1)
        self._add(piece, line)
        self._file.crc = stored
        self._seeds = [stored]

    def _decoded(self, piece: _Piece, after: int) -> Line[dict[str, Any]] | None:
        """The line, if it is one that can stand behind the sequence `after` in this file."""
        try:
            line = _DECODER.decode(piece.body + b"}")
        except msgspec.DecodeError:
            return None
        if line.version != FORMAT_VERSION:
            raise UnknownFormat(f"a line has format version {line.version}, and this program reads {FORMAT_VERSION}")
        return line if after < line.sequence and (self._until is None or line.sequence <= self._until) else None

    def _redeem(self, seed: int | None) -> None:
        """The line before is intact, but for the text of its crc, if the one after it was chained to its body."""
        if not self._bad or seed == stored_crc(self._bad[-1].line):
            return
        piece = self._bad.pop()
        line = self._decoded(piece, self._file.sequence)
        if line is not None:
            self._close(line.sequence - 1)
            self._add(piece, line)

    def _add(self, piece: _Piece, line: Line[dict[str, Any]]) -> None:
        file = self._file
        if line.op not in CONTROL_OPS:
            file.sequences.append(line.sequence)
            for numbers, number in zip(file.bodies, (piece.offset, len(piece.body)), strict=True):
                numbers.append(number)
        elif piece.offset == 0:
            file.opened = line.record
        file.sequence = line.sequence

    def _close(self, last: int) -> None:
        """What was bad until here had the sequences up to `last`."""
        first = self._file.sequence + 1
        if self._bad:
            begin, end = self._bad[0], self._bad[-1]
            size = end.offset + end.size - begin.offset
            self._file.stretches.append(Stretch(self._file.name, begin.offset, size, first, last))
            self._bad = []

    def _end(self, stream: BinaryIO, size: int, is_active: bool) -> None:
        file = self._file
        if is_active and self._bad and file.crc is not None:
            start = self._bad[0].offset
            stream.seek(start)
            rest = stream.read()
            if judge(rest, offset=start, sequence=file.sequence + 1, crc=file.crc) is None:
                self._bad = []
        if is_base(file.name) and file.opened is not None:
            last = file.opened["replaces"]["sequence"]
        elif self._until is not None:
            last = self._until
        elif self._bad:
            last = max(file.sequence + len(self._bad), *map(self._claimed, self._bad))
        else:
            last = file.sequence
        if self._bad:
            self._close(last)
        elif last > file.sequence:
            file.stretches.append(Stretch(file.name, size, 0, file.sequence + 1, last))

    def _claimed(self, piece: _Piece) -> int:
        """The highest sequence that a bad piece says it has, if there is room for so many lines."""
        most = self._file.sequence + 1 + sum(bad.size for bad in self._bad) // _LEAST_LINE_BYTES
        claims = [int(found[1]) for found in _BEGINNING.finditer(piece.line)]
        return max((claim for claim in claims if claim <= most), default=0)


def _own_seeds(line: bytes) -> list[int]:
    """What the first line of a segment says it is chained to."""
    if found := _PREVIOUS_CRC.search(line):
        return [int(found[1], 16)]
    return [0] if b'"previous":null' in line else []
