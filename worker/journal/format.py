"""Lines: how they are written and how they are checked. The package's docstring is the specification."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO
from zlib import crc32

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
_BATCH = re.compile(rb'\{"v":1,"seq":[0-9]+,"b":([0-9]+),')
_STORED_CRC = re.compile(rb',"crc":"([0-9a-f]{8})"\}\n')

# A record is plain JSON, so that a replay gives back what was appended; orjson would quietly convert these.
_PLAIN = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS


@dataclass(frozen=True, slots=True)
class Entry:
    """One record as it stands in the journal."""

    sequence: int
    time_ms: int
    op: str
    record: dict[str, Any]


def encode(op: str, record: dict[str, Any]) -> bytes:
    """The part of a line that does not depend on its place: `"op":...,"rec":{...}`.

    Raises ModelManagerError ERR_INVALID_REQUEST if the record is not plain JSON or its line would be over the limit.
    """
    try:
        payload = b'"op":%b,"rec":%b' % (orjson.dumps(op), orjson.dumps(record, option=_PLAIN))
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


def close(body: bytes, seed: int) -> tuple[bytes, int]:
    """The complete line of `body` (all before `,"crc":"`), chained to `seed`, and its crc."""
    crc = crc32(body, seed)
    return b'%b,"crc":"%08x"}\n' % (body, crc), crc


def make_line(sequence: int, batch: int, time_ms: int, payload: bytes, seed: int) -> tuple[bytes, int]:
    return close(b'{"v":1,"seq":%d,"b":%d,"t":%d,%b' % (sequence, batch, time_ms, payload), seed)


def checks(line: bytes, seed: int) -> bool:
    """Whether `line`, with its newline, is closed as `close` closes it."""
    return line.endswith(b',"crc":"%08x"}\n' % crc32(line[:-TAIL_BYTES], seed))


def stored_crc(line: bytes) -> int | None:
    """The crc that stands in `line`, whether it is right or not; None if there is none."""
    found = _STORED_CRC.fullmatch(line, max(0, len(line) - TAIL_BYTES))
    return int(found[1], 16) if found else None


def stored_batch(line: bytes) -> int | None:
    """The batch number that stands in `line`; None if there is none."""
    found = _BATCH.match(line)
    return int(found[1]) if found else None


def entry_of(value: dict[str, Any]) -> Entry:
    return Entry(value["seq"], value["t"], value["op"], value["rec"])


class CheckedLines:
    """The lines of a file from some point on, for as long as they check.

    After each line `sequence`, `crc` and `offset` (its end) are those of that line, and `batch_offset` is where its
    batch begins. When the iteration is over `fault` says what is wrong with the line at `offset`, None at the end of
    the file; `foreign` tells that the line is closed as it should be but is not one a torn write can leave.
    """

    __slots__ = ("_stream", "batch", "batch_offset", "crc", "fault", "foreign", "offset", "sequence")

    def __init__(self, stream: BinaryIO, *, sequence: int, crc: int, offset: int = 0) -> None:
        """`sequence` and `crc` are those of the line before the one at `offset`, where `stream` stands."""
        self._stream = stream
        self.sequence = sequence
        self.crc = crc
        self.offset = self.batch_offset = offset
        self.batch = 0
        self.fault: str | None = None
        self.foreign = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._stream:
            crc = crc32(line[:-TAIL_BYTES], self.crc)
            if not line.endswith(b',"crc":"%08x"}\n' % crc):
                self.fault = "the line does not have its checksum"
                return
            try:
                value = orjson.loads(line)
                version, sequence, batch = value["v"], value["seq"], value["b"]
            except (ValueError, KeyError, TypeError):
                self._refuse("the line is no record of a journal")
                return
            if version != FORMAT_VERSION:
                self._refuse(f"the line has format version {version}, and this program reads {FORMAT_VERSION}")
                return
            if sequence != self.sequence + 1:
                self._refuse(f"the line has sequence {sequence}")
                return
            if batch != self.batch:
                self.batch, self.batch_offset = batch, self.offset
            self.sequence = sequence
            self.crc = crc
            self.offset += len(line)
            yield value

    def _refuse(self, fault: str) -> None:
        self.fault, self.foreign = fault, True


class TrustedLines:
    """The lines of a file whose checksum as a whole was right, with the same view of them as `CheckedLines`."""

    __slots__ = ("_line", "_seed", "_stream", "offset", "sequence")

    def __init__(self, stream: BinaryIO, *, sequence: int, crc: int) -> None:
        self._stream = stream
        self._seed = crc
        self._line = b""
        self.sequence = sequence
        self.offset = 0

    @property
    def crc(self) -> int:
        stored = stored_crc(self._line)
        return self._seed if stored is None else stored

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._stream:
            value = orjson.loads(line)
            self._line = line
            self.sequence = value["seq"]
            self.offset += len(line)
            yield value
