"""A file in portions: what a boot takes of some lines, made by this process or by one that helps it.

A file is cut into chunks, each of which can be extracted with no other: where its lines begin is found at the newline
before them, and the checksum that the first one is chained to stands in front of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Generic, TypeVar

import msgspec
import numpy as np

from worker.journal.blocks import Block, CheckedBlocks, trusted_blocks
from worker.journal.format import CONTROL_OPS, SEAL, TAIL_BYTES, CheckedLines, Line, stored_crc, stored_sequence

_CHUNK_BYTES = 1024 * 1024

R = TypeVar("R")
T = TypeVar("T")


class Portion(msgspec.Struct, Generic[T], frozen=True, array_like=True, gc=False):
    """The lines of a file from `offset` on, in order: `records` of business, of which `content` is extracted.

    `starts` tells where each line begins, in bytes from the portion's beginning, and `sequences` theirs, both in 8
    bytes each; `batch` and `crc` are those of the last line. `first_line` is there if it is one of the journal's own.
    `behind_seal` is the place of a line that follows a seal.
    """

    offset: int
    size: int
    starts: bytes
    sequences: bytes
    records: int
    first_line: bytes
    last_op: str
    behind_seal: int | None
    batch: int
    crc: int
    content: T

    @property
    def first(self) -> int:
        """The sequence of the first line."""
        return memoryview(self.sequences).cast("Q")[0]

    @property
    def last(self) -> int:
        """The sequence of the last line."""
        return memoryview(self.sequences).cast("Q")[-1]


def portions(blocks: Iterable[Block[R]], offset: int, extract: Callable[[Block[R]], T]) -> Iterator[Portion[T]]:
    """What a boot takes of each block, the first of which lies at `offset`."""
    for block in blocks:
        yield _portion(block, offset, extract)
        offset += block.size


def _portion(block: Block[R], offset: int, extract: Callable[[Block[R]], T]) -> Portion[T]:
    """The crc is the one that stands in the last line; 0 if there is none."""
    lines = block.lines
    ops = [line.op for line in lines]
    business, behind_seal = block, None
    if not CONTROL_OPS.isdisjoint(ops):
        business = block.business()
        if SEAL in ops[:-1]:
            behind_seal = ops.index(SEAL) + 1
    return Portion(
        offset=offset,
        size=block.size,
        starts=block.starts.tobytes(),
        sequences=np.array([line.sequence for line in lines], np.uint64).tobytes(),
        records=len(business.lines),
        first_line=block.text(0) if ops[0] in CONTROL_OPS else b"",
        last_op=ops[-1],
        behind_seal=behind_seal,
        batch=lines[-1].batch,
        crc=stored_crc(block.text(len(lines) - 1)) or 0,
        content=extract(business),
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """The lines of a file that begin in its bytes from `start` to `end`. `checked`: each line by its checksum, since
    that of the whole file is not known to be right."""

    name: str
    start: int
    end: int
    checked: bool


def chunks_of(name: str, size: int, *, checked: bool) -> list[Chunk]:
    """All of a file."""
    starts = range(0, size, _CHUNK_BYTES)
    return [Chunk(name, start, min(size, start + _CHUNK_BYTES), checked) for start in starts]


def extracted(
    stream: BinaryIO, chunk: Chunk, decoder: msgspec.json.Decoder[Line[R]], extract: Callable[[Block[R]], T]
) -> Iterator[Portion[T]]:
    """The portions of a chunk of `stream`; of one that is checked, those up to a line that does not check.

    A chunk that is checked is none at the beginning of a file, since the line before it is looked at.
    Raises msgspec.DecodeError for what no journal holds, OSError.
    """
    start = _first_start(stream, chunk)
    if start >= chunk.end:
        return
    if not chunk.checked:
        stream.seek(start)
        yield from portions(trusted_blocks(stream, decoder, chunk.end - start), start, extract)
    else:
        stream.seek(start - TAIL_BYTES)
        seed, sequence = stored_crc(stream.read(TAIL_BYTES)), stored_sequence(stream.readline())
        if seed is None or sequence is None:
            return
        lines = CheckedLines(stream, decoder, sequence=sequence - 1, crc=seed, offset=start)
        stream.seek(start)
        yield from portions(CheckedBlocks(stream, decoder, lines).whole(chunk.end - start), start, extract)


def _first_start(stream: BinaryIO, chunk: Chunk) -> int:
    """Where the first line begins that does not begin before the chunk."""
    if chunk.start == 0:
        return 0
    stream.seek(chunk.start - 1)
    return chunk.start - 1 + len(stream.readline(chunk.end - chunk.start + 1))
