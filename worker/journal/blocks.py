"""Lines in blocks, as a replay takes them: so little is done for each line that most of it is to decode it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, BinaryIO, Generic, TypeVar

import msgspec
import numpy as np

from worker.journal.format import CONTROL_OPS, CheckedLines, Line, stored_crc

# What a block is decoded to should stay in the processor's cache until it is taken.
_BLOCK_BYTES = 128 * 1024
_BLOCK_LINES = 256

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

    def __init__(self, lines: CheckedLines[R]) -> None:
        self.lines = lines

    @property
    def sequence(self) -> int:
        return self.lines.sequence

    @property
    def crc(self) -> int:
        return self.lines.crc

    def __iter__(self) -> Iterator[Block[R]]:
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


class TrustedBlocks(Generic[R]):
    """The lines of a file whose checksum as a whole is right.

    When the iteration is over `sequence` and `crc` are those of the last line.
    """

    def __init__(self, stream: BinaryIO, decoder: msgspec.json.Decoder[Line[R]], *, sequence: int, crc: int) -> None:
        self._stream = stream
        self._decode = decoder.decode_lines
        self.sequence = sequence
        self.crc = crc

    def __iter__(self) -> Iterator[Block[R]]:
        block: Block[R] | None = None
        while data := self._stream.read(_BLOCK_BYTES):
            if not data.endswith(b"\n"):
                data += self._stream.readline()
            block = Block(data, _starts(data), self._decode(data))
            yield block
        if block is not None:
            self.sequence = block.lines[-1].sequence
            stored = stored_crc(block.text(len(block.lines) - 1))
            self.crc = self.crc if stored is None else stored


def _starts(data: bytes) -> Starts:
    """Where each line of `data` begins. A newline never stands inside of one."""
    starts = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")).astype(np.uint64)
    starts += np.uint64(1)
    return np.concatenate([np.zeros(1, np.uint64), starts[:-1]])
