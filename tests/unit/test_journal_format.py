"""What a line of the journal is, and how the rest of a file after its last good line is judged."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from zlib import crc32

import pytest

from schemas.errors import ModelManagerError
from worker.journal.format import (
    LINE_BYTES,
    CheckedLines,
    checks,
    encode,
    line_decoder,
    make_batch,
    make_line,
    stored_batch,
    stored_crc,
)
from worker.journal.torn import judge


def chain(*batches: int) -> list[bytes]:
    """Lines from sequence 1 on, in batches of these lengths."""
    lines: list[bytes] = []
    crc = 0
    for length in batches:
        first = len(lines) + 1
        for sequence in range(first, first + length):
            line, crc = make_line(sequence, first, 1790000000000, encode("put", {"n": sequence}), crc)
            lines.append(line)
    return lines


def test_a_line_is_one_json_object_with_the_members_of_the_specification_in_order() -> None:
    line, crc = make_line(123, 120, 1790000000000, encode("put", {"text": "line\nbreak", "ü": [1, None]}), 0x1234)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    value = json.loads(line)
    assert list(value) == ["v", "seq", "b", "t", "op", "rec", "crc"]
    assert (value["v"], value["seq"], value["b"], value["t"], value["op"]) == (1, 123, 120, 1790000000000, "put")
    assert value["rec"] == {"text": "line\nbreak", "ü": [1, None]}
    assert value["crc"] == f"{crc:08x}"


def test_the_crc_covers_all_bytes_before_it_and_is_seeded_with_the_line_before() -> None:
    first, second = chain(1, 1)
    body = second[: second.index(b',"crc":"')]
    assert stored_crc(second) == crc32(body, stored_crc(first) or 0)
    assert checks(second, stored_crc(first) or 0)
    assert not checks(second, 0)


def test_the_tail_is_compared_as_bytes_so_an_upper_case_digit_is_not_the_same() -> None:
    line = next(line for line in chain(*[1] * 50) if any(digit in b"abcdef" for digit in line[-11:-3]))
    seed = 0 if stored_batch(line) == 1 else stored_crc(chain(*[1] * 50)[(stored_batch(line) or 0) - 2]) or 0
    assert checks(line, seed)
    assert not checks(line[:-11] + line[-11:-3].upper() + line[-3:], seed)
    assert stored_crc(line[:-11] + b"1a2b3c4D" + line[-3:]) is None


@pytest.mark.parametrize("line", [b"", b"\n", b'{"v":1}\n', b',"crc":"12345678"}', b"\0" * 600])
def test_what_is_no_line_has_no_crc_and_no_batch(line: bytes) -> None:
    assert stored_crc(line) is None
    assert stored_batch(line) is None


def test_a_record_over_the_limit_is_refused_before_anything_is_queued() -> None:
    longest = LINE_BYTES - 128 - len(encode("put", {"text": ""}))
    line, _ = make_line(10**18, 10**18, 10**13, encode("put", {"text": "x" * longest}), 0)
    assert len(line) <= LINE_BYTES
    with pytest.raises(ModelManagerError) as refused:
        encode("put", {"text": "x" * (longest + 1)})
    assert refused.value.code == "ERR_INVALID_REQUEST"


@dataclass
class NotJson:
    n: int = 1


@pytest.mark.parametrize("value", [NotJson(), datetime.now(UTC), {1: 2}, {1, 2}, 2**70, "\ud800", b"bytes"])
def test_a_record_that_would_not_come_back_as_it_went_in_is_refused(value: Any) -> None:
    with pytest.raises(ModelManagerError) as refused:
        encode("put", {"value": value})
    assert refused.value.code == "ERR_INVALID_REQUEST"


def test_lines_are_read_for_as_long_as_they_check() -> None:
    lines = chain(1, 3)
    stream = io.BytesIO(b"".join(lines[:3]) + lines[3].replace(b'"n":4', b'"n":5'))
    reader = CheckedLines(stream, line_decoder(dict), sequence=0, crc=0)
    assert [line.record["n"] for _, line in reader] == [1, 2, 3]
    assert (reader.sequence, reader.offset, reader.batch) == (3, sum(map(len, lines[:3])), 2)
    assert reader.fault
    assert not reader.foreign


@pytest.mark.parametrize(
    "foreign",
    [
        make_line(3, 1, 0, encode("put", {}), 0)[0],
        make_line(1, 1, 0, encode("put", {}), 0)[0].replace(b'"v":1', b'"v":2'),
        b'[1],"crc":"00000000"}\n',
    ],
)
def test_a_line_that_checks_but_is_not_the_next_one_of_this_format_is_foreign(foreign: bytes) -> None:
    body = foreign[:-19]
    closed = b'%b,"crc":"%08x"}\n' % (body, crc32(body))
    reader = CheckedLines(io.BytesIO(closed), line_decoder(dict), sequence=0, crc=0)
    assert list(reader) == []
    assert reader.foreign


def test_a_later_batch_proves_that_a_bad_line_had_been_durable() -> None:
    lines = chain(1, 1, 1)
    rest = lines[1].replace(b'"n":2', b'"n":7') + lines[2]
    assert "later batch" in (judge(rest, offset=len(lines[0]), sequence=2, crc=stored_crc(lines[0]) or 0) or "")


def test_a_lost_sector_in_the_last_batch_is_a_torn_write_though_lines_after_it_check() -> None:
    lines = chain(1, 40)
    rest = bytearray(b"".join(lines[1:]))
    offset = len(lines[0])
    hole = 512 - offset % 512
    rest[hole : hole + 512] = bytes(512)
    lost_from = next(n for n in range(1, 41) if sum(map(len, lines[1 : n + 1])) > hole)
    start = sum(map(len, lines[1:lost_from]))
    seed = stored_crc(lines[lost_from - 1]) or 0
    assert judge(bytes(rest[start:]), offset=offset + start, sequence=lost_from + 1, crc=seed) is None


def test_a_bad_line_in_a_last_batch_that_is_all_there_is_damage() -> None:
    lines = chain(1, 2)
    rest = lines[1].replace(b'"n":2', b'"n":7') + lines[2]
    assert judge(rest, offset=len(lines[0]), sequence=2, crc=stored_crc(lines[0]) or 0) is not None


@pytest.mark.parametrize("byte", [b"\x0b", b"\x08", b"\x8a", b"x"])
def test_a_last_newline_that_turned_into_another_byte_is_damage(byte: bytes) -> None:
    lines = chain(1, 1)
    seed = stored_crc(lines[0]) or 0
    assert judge(lines[1][:-1] + byte, offset=len(lines[0]), sequence=2, crc=seed) is not None
    assert judge(lines[1][:-1], offset=len(lines[0]), sequence=2, crc=seed) is None


def test_a_batch_is_its_lines_one_after_the_other() -> None:
    payloads = [encode("put", {"n": n, "text": "x" * n}) for n in range(5)]
    data, offsets, crc = b"", [], 0x1234
    for sequence, payload in enumerate(payloads, 98):
        line, crc = make_line(sequence, 98, 1790000000000, payload, crc)
        offsets.append(7000 + len(data))
        data += line
    assert make_batch(98, 1790000000000, payloads, 0x1234, 7000) == (data, offsets, crc)
