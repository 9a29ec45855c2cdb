"""Lines in blocks: none is lost or doubled where one block ends and the next begins."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest

from worker.journal import blocks
from worker.journal.blocks import ALL, Block, CheckedBlocks, trusted_blocks
from worker.journal.format import MARK, CheckedLines, close, encode, line_decoder, make_line

DECODER = line_decoder(dict[str, Any])


def written(count: int) -> list[bytes]:
    """Lines of many lengths, each third one a line of the journal's own."""
    lines: list[bytes] = []
    crc = 0
    for sequence in range(1, count + 1):
        op = MARK if sequence % 3 == 0 else "put"
        line, crc = make_line(sequence, sequence, 0, encode(op, {"text": "\n" * (sequence * 37 % 90)}), crc)
        lines.append(line)
    return lines


def read(kind: str, lines: list[bytes]) -> list[Block[dict[str, Any]]]:
    stream = io.BytesIO(b"".join(lines))
    if kind == "checked":
        return list(CheckedBlocks(stream, DECODER, CheckedLines(stream, DECODER, sequence=0, crc=0)))
    return list(trusted_blocks(stream, DECODER, ALL))


@pytest.fixture(autouse=True, params=[1, 64, 300, 100_000], ids=lambda size: f"{size} bytes")
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", request.param)
    monkeypatch.setattr(blocks, "_BLOCK_LINES", 1 + request.param // 100)


@pytest.mark.parametrize("kind", ["checked", "trusted"])
def test_all_lines_come_once_in_order_and_as_they_stand_in_the_file(kind: str) -> None:
    lines = written(60)
    read_blocks = read(kind, lines)
    assert [line.sequence for block in read_blocks for line in block.lines] == list(range(1, 61))
    assert [block.text(index) for block in read_blocks for index in range(len(block.lines))] == lines
    begin = accumulate((block.size for block in read_blocks), initial=0)
    starts = [start + at for block, at in zip(read_blocks, begin, strict=False) for start in block.starts.tolist()]
    assert starts == list(accumulate(map(len, lines), initial=0))[:-1]


@pytest.mark.parametrize("kind", ["checked", "trusted"])
def test_of_business_are_all_lines_but_the_journals_own(kind: str) -> None:
    lines = written(60)
    business = [block.business() for block in read(kind, lines)]
    texts = [block.text(index) for block in business for index in range(len(block.lines))]
    assert texts == [line for number, line in enumerate(lines, 1) if number % 3]
    assert {line.op for block in business for line in block.lines} == {"put"}


@pytest.mark.parametrize("kind", ["checked", "trusted"])
def test_a_file_without_lines_has_no_block(kind: str) -> None:
    assert read(kind, []) == []


def damages() -> Iterator[bytes]:
    """A small file as it should be, and as it should not."""
    lines = written(12)
    data = b"".join(lines)
    yield data
    for at in range(0, len(data), 5):
        yield data[:at]
        yield data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
    for at in range(11):
        yield b"".join([*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]])
        yield b"".join([*lines[:at], *lines[at + 1 :]])
        yield b"".join([*lines[:at], lines[at], *lines[at:]])
    crc = 0
    for members in (b'"v":2,"seq":1', b'"v":1,"seq":2', b'"v":1,"seq":0', b'"v":1,"seq":"1"'):
        line, _ = close(b'{%b,"b":1,"t":0,"op":"put","rec":{}' % members, crc)
        yield line
    yield close(b"no json", 0)[0] + data
    yield b"\n" + data


@pytest.mark.parametrize("gapless", [True, False])
def test_where_lines_do_not_check_blocks_tell_what_single_lines_tell(gapless: bool) -> None:
    for data in damages():
        alone = CheckedLines(io.BytesIO(data), DECODER, sequence=0, crc=0, gapless=gapless)
        expected = list(alone)
        stream = io.BytesIO(data)
        lines = CheckedLines(stream, DECODER, sequence=0, crc=0, gapless=gapless)
        found = list(CheckedBlocks(stream, DECODER, lines))
        assert [line for block in found for line in block.lines] == [line for _, line in expected]
        assert [block.text(at) for block in found for at in range(len(block.lines))] == [text for text, _ in expected]
        for what in ("sequence", "batch", "crc", "offset", "fault", "foreign"):
            assert getattr(lines, what) == getattr(alone, what), (what, data)
