"""Lines in blocks, as a replay takes them: so little is done for each line that most of it is to decode it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, BinaryIO, Generic, TypeVar
from zlib import crc32

import msgspec
import numpy as np

from worker.journal.format import CONTROL_OPS, TAIL_BYTES, CheckedLines, Line

# What a block is decoded to should stay in the processor's cache until it is taken.
_BLOCK_BYTES = 256 * 1024
_BLOCK_LINES = 256
ALL = 1 << 62

_IN_TAIL = np.arange(-TAIL_BYTES, 0)

R = TypeVar("R")
Starts = np.ndarray[Any, np.dtype[np.uint64]]


class Block(Generic[R]):
    """Some lines of a file, in order: each decoded, and where it begins in the block."""

    __slots__ = ("_data", "lines", "starts")

    def __init__(self, data: bytes, starts: Starts, lines: list[Line[R]]) -> None:
        self._data = data
        self.starts = starts
        self.lines = lines

    @property
    def size(self) -> int:
        """Bytes from the block's beginning to its end."""
        return len(self._data)

    def text(self, index: int) -> bytes:
        """That line as it stands in the file."""
        start = int(self.starts[index])
        return self._data[start : self._data.index(b"\n", start) + 1]

    def business(self) -> Block[R]:
        """The block without the lines of the journal's own."""
        kept = [index for index, line in enumerate(self.lines) if line.op not in CONTROL_OPS]
        return Block(self._data, self.starts[kept], [self.lines[index] for index in kept])


class CheckedBlocks(Generic[R]):
    """The lines of a file for as long as they check; `lines` tells how far that was."""

    def __init__(self, stream: BinaryIO, decoder: msgspec.json.Decoder[Line[R]], lines: CheckedLines[R]) -> None:
        """`lines` are those of `stream`, by `decoder`."""
        self._stream = stream
        self._decode = decoder.decode_lines
        self.lines = lines

    def __iter__(self) -> Iterator[Block[R]]:
        yield from self.whole(ALL)
        self._stream.seek(self.lines.offset)  # line by line, to know which it is that does not check
        yield from self._one_by_one()

    def whole(self, size: int) -> Iterator[Block[R]]:
        """Those that check as a whole, up to the first that does not, of the lines that begin in the next `size`
        bytes."""
        end = self.lines.offset + size
        while data := _whole_lines(self._stream, end - self.lines.offset):
            block = self._checked(data)
            if block is None:
                return
            yield block

    def _checked(self, data: bytes) -> Block[R] | None:
        """The block, if all of its lines check."""
        if not data.endswith(b"\n"):
            return None
        characters, starts = np.frombuffer(data, np.uint8), _starts(data)
        ends = np.append(starts[1:], np.uint64(len(data)))
        if (ends - starts).min() <= TAIL_BYTES:
            return None
        view, crc, crcs = memoryview(data), self.lines.crc, []
        for start, end in zip(starts.tolist(), (ends - np.uint64(TAIL_BYTES)).tolist(), strict=True):
            crc = crc32(view[start:end], crc)
            crcs.append(crc)
        tails = characters[ends.astype(np.int64)[:, None] + _IN_TAIL]
        if not np.array_equal(tails, _tails(crcs)):
            return None
        try:
            decoded = self._decode(data)
        except msgspec.DecodeError:
            return None
        if len(decoded) != len(crcs) or not self.lines.take(decoded, crc, len(data)):
            return None
        return Block(data, starts, decoded)

    def _one_by_one(self) -> Iterator[Block[R]]:
        texts: list[bytes] = []
        decoded: list[Line[R]] = []
        for text, line in self.lines:
            texts.append(text)
            decoded.append(line)
            if len(decoded) == _BLOCK_LINES:
                yield _joined(texts, decoded)
                texts, decoded = [], []
        if decoded:
            yield _joined(texts, decoded)


def _joined(texts: list[bytes], decoded: list[Line[R]]) -> Block[R]:
    *starts, _ = accumulate(map(len, texts), initial=0)
    return Block(b"".join(texts), np.array(starts, np.uint64), decoded)


def trusted_blocks(stream: BinaryIO, decoder: msgspec.json.Decoder[Line[R]], size: int) -> Iterator[Block[R]]:
    """The lines that begin in the next `size` bytes of a file whose checksum as a whole is right."""
    while data := _whole_lines(stream, size):
        size -= len(data)
        yield Block(data, _starts(data), decoder.decode_lines(data))


def _whole_lines(stream: BinaryIO, size: int) -> bytes:
    """Some that begin in the next `size` bytes; nothing at the end of the file. The last one may be cut."""
    data = stream.read(max(0, min(size, _BLOCK_BYTES)))
    return data if not data or data.endswith(b"\n") else data + stream.readline()


def _tails(crcs: list[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What closes the lines with these checksums, a row each."""
    tails = np.tile(np.frombuffer(b',"crc":"........"}\n', np.uint8), (len(crcs), 1))
    digits = np.array(crcs, ">u4").tobytes().hex().encode()
    tails[:, 8:16] = np.frombuffer(digits, np.uint8).reshape(-1, 8)
    return tails


def _starts(data: bytes) -> Starts:
    """Where each line of `data` begins. A newline never stands inside of one."""
    starts = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")).astype(np.uint64)
    starts += np.uint64(1)
    return np.concatenate([np.zeros(1, np.uint64), starts[:-1]])
