"""Lines: how they are written and how they are checked. The package's docstring is the specification."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from operator import lt
from typing import Any, BinaryIO, Generic, TypeVar
from zlib import crc32

import msgspec
import orjson

from schemas.errors import ModelManagerError

FORMAT_VERSION = 1
LINE_BYTES = 1024 * 1024
# `,"crc":"xxxxxxxx"}` and the newline.
TAIL_BYTES = 19
OPEN, SEAL, MARK = "open", "seal", "mark"
CONTROL_OPS = frozenset({OPEN, SEAL, MARK})

# More than the members before `op`, with numbers of 19 digits, and the tail need.
_AROUND_PAYLOAD_BYTES = 128
_SEQUENCE_BATCH = re.compile(rb'\{"v":1,"seq":([0-9]+),"b":([0-9]+),')
_STORED_CRC = re.compile(rb',"crc":"([0-9a-f]{8})"\}\n')

# A record is plain JSON, so that a replay gives back what was appended; orjson would quietly convert these.
_PLAIN = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS


R = TypeVar("R")


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One record as it stands in the journal."""

    sequence: int
    time_ms: int
    op: str
    record: dict[str, Any]


class Line(msgspec.Struct, Generic[R], frozen=True, gc=False):
    """A line as a replay reads it: of the record only what `R` asks for is decoded."""

    version: int = msgspec.field(name="v")
    sequence: int = msgspec.field(name="seq")
    batch: int = msgspec.field(name="b")
    time_ms: int = msgspec.field(name="t")
    op: str
    record: R = msgspec.field(name="rec")


def line_decoder(record: type[R]) -> msgspec.json.Decoder[Line[R]]:
    return msgspec.json.Decoder(Line[record])  # type: ignore[valid-type]


def encode(op: str, record: dict[str, Any]) -> bytes:
    """The part of a line that does not depend on its place: `"op":...,"rec":{...}`.

    Raises ModelManagerError ERR_INVALID_REQUEST if the record is not plain JSON or its line would be over the limit.
    """
    try:
        payload = _before_record(op) + orjson.dumps(record, option=_PLAIN)
    except orjson.JSONEncodeError as error:
        raise ModelManagerError("ERR_INVALID_REQUEST", f"The record is not plain JSON: {error}.") from error
    if len(payload) > LINE_BYTES - _AROUND_PAYLOAD_BYTES:
        raise ModelManagerError(
            "ERR_INVALID_REQUEST",
            f"The record has {len(payload)} bytes; the limit is {LINE_BYTES - _AROUND_PAYLOAD_BYTES}.",
            size=len(payload),
            limit=LINE_BYTES - _AROUND_PAYLOAD_BYTES,
        )
    return payload


def check_record(op: str, record: dict[str, Any]) -> None:
    """Raises as `encode` does: to know it before work is done that would be for nothing."""
    encode(op, record)


@lru_cache(maxsize=64)
def _before_record(op: str) -> bytes:
    return b'"op":%b,"rec":' % orjson.dumps(op)


def close(body: bytes, seed: int) -> tuple[bytes, int]:
    """The complete line of `body` (all before `,"crc":"`), chained to `seed`, and its crc."""
    crc = crc32(body, seed)
    return b'%b,"crc":"%08x"}\n' % (body, crc), crc


def make_line(sequence: int, batch: int, time_ms: int, payload: bytes, seed: int) -> tuple[bytes, int]:
    return close(b'{"v":1,"seq":%d,"b":%d,"t":%d,%b' % (sequence, batch, time_ms, payload), seed)


def make_batch(
    first: int, time_ms: int, payloads: Sequence[bytes], seed: int, offset: int
) -> tuple[bytes, list[int], int]:
    """The lines of a batch in one piece that is to lie at `offset`, where each begins, and the crc of the last.

    As `make_line` for each, without a copy of a payload before the last one.
    """
    pieces: list[bytes] = []
    offsets: list[int] = []
    after_sequence = b',"b":%d,"t":%d,' % (first, time_ms)
    crc = seed
    for sequence, payload in enumerate(payloads, first):
        offsets.append(offset)
        head = b'{"v":1,"seq":%d%b' % (sequence, after_sequence)
        crc = crc32(payload, crc32(head, crc))
        pieces += (head, payload, b',"crc":"%08x"}\n' % crc)
        offset += len(head) + len(payload) + TAIL_BYTES
    return b"".join(pieces), offsets, crc


def checks(line: bytes, seed: int) -> bool:
    """Whether `line`, with its newline, is closed as `close` closes it."""
    return line.endswith(b',"crc":"%08x"}\n' % crc32(line[:-TAIL_BYTES], seed))


def stored_crc(line: bytes) -> int | None:
    """The crc that stands in `line`, whether it is right or not; None if there is none."""
    found = _STORED_CRC.fullmatch(line, max(0, len(line) - TAIL_BYTES))
    return int(found[1], 16) if found else None


def stored_batch(line: bytes) -> int | None:
    """The batch number that stands in `line`; None if there is none."""
    found = _SEQUENCE_BATCH.match(line)
    return int(found[2]) if found else None


def stored_sequence(line: bytes) -> int | None:
    """The sequence that stands in `line`; None if there is none."""
    found = _SEQUENCE_BATCH.match(line)
    return int(found[1]) if found else None


def entry_of(line: bytes) -> Entry:
    """The record in a line that was checked."""
    value = orjson.loads(line)
    return Entry(value["seq"], value["t"], value["op"], value["rec"])


class CheckedLines(Generic[R]):
    """The lines of a file from some point on, for as long as they check: each as bytes and decoded.

    After each line `sequence`, `crc` and `offset` (its end) are those of that line, and `batch` the one it is of. When
    the iteration is over `fault` says what is wrong with the line at `offset`, None at the end of the file; `foreign`
    tells that the line is closed as it should be but is not one a torn write can leave.
    """

    __slots__ = ("_decode", "_gapless", "_stream", "batch", "crc", "fault", "foreign", "offset", "sequence")

    def __init__(
        self,
        stream: BinaryIO,
        decoder: msgspec.json.Decoder[Line[R]],
        *,
        sequence: int,
        crc: int,
        offset: int = 0,
        gapless: bool = True,
    ) -> None:
        """`sequence` and `crc` are those of the line before the one at `offset`, where `stream` stands. `gapless`: each
        line has the next sequence; else (in a base) a higher one."""
        self._stream = stream
        self._decode = decoder.decode
        self._gapless = gapless
        self.sequence = sequence
        self.crc = crc
        self.offset = offset
        self.batch = 0
        self.fault: str | None = None
        self.foreign = False

    def __iter__(self) -> Iterator[tuple[bytes, Line[R]]]:
        decode, gapless = self._decode, self._gapless
        crc, sequence = self.crc, self.sequence
        for data in self._stream:
            crc = crc32(data[:-TAIL_BYTES], crc)
            if not data.endswith(b',"crc":"%08x"}\n' % crc):
                self.fault = "the line does not have its checksum"
                return
            try:
                line = decode(data)
            except msgspec.DecodeError:
                self._refuse("the line is no record of a journal")
                return
            if line.version != FORMAT_VERSION:
                self._refuse(f"the line has format version {line.version}, and this program reads {FORMAT_VERSION}")
                return
            if line.sequence != sequence + 1 if gapless else line.sequence <= sequence:
                self._refuse(f"the line has sequence {line.sequence}")
                return
            self.sequence = sequence = line.sequence
            self.batch = line.batch
            self.crc = crc
            self.offset += len(data)
            yield data, line

    def take(self, lines: Sequence[Line[R]], crc: int, size: int) -> bool:
        """The next `lines`, `size` bytes whose checksums are right up to `crc`, taken at once, if they are as they
        should be."""
        sequences = [line.sequence for line in lines]
        first = self.sequence + 1
        if self._gapless:
            in_order = sequences == list(range(first, first + len(lines)))
        else:
            in_order = all(map(lt, [self.sequence, *sequences], sequences))
        if not in_order or any(line.version != FORMAT_VERSION for line in lines):
            return False
        self.sequence, self.batch, self.crc = sequences[-1], lines[-1].batch, crc
        self.offset += size
        return True

    def _refuse(self, fault: str) -> None:
        self.fault, self.foreign = fault, True
