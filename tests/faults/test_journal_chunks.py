"""A file that is read in chunks, of any size, is the file that is read as a whole: whatever has happened to it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worker.journal import Entry, Journal, JournalDamaged, portions
from worker.journal.format import TAIL_BYTES, close, stored_crc, stored_sequence

SIZES = (portions._CHUNK_BYTES, 1, 50, 333)  # a line has some 100 bytes


async def write(folder: Path) -> None:
    journal = Journal.open(folder, replay=lambda _: None, segment_bytes=1500)
    journal.start(lambda _: None)
    for batch in (1, 4, 2, 1, 3, 2, 5, 1, 2):
        await asyncio.gather(*(journal.append("put", {"n": n, "text": "x" * (n * 31)}) for n in range(batch)))
    await journal.close()


def outcome(folder: Path) -> tuple[list[Entry], str, dict[str, bytes]]:
    """What a boot hands over, why it refuses, and what it leaves."""
    entries: list[Entry] = []
    refused = ""
    try:
        asyncio.run(Journal.open(folder, replay=entries.append, reserve_bytes=0, clock=lambda: 1).close())
    except JournalDamaged as error:
        refused = str(error)
        entries = []  # how many a refused boot has handed over is not promised
    left = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "LOCK"}
    return entries, refused, left


def damages(data: bytes) -> Iterator[bytes]:
    """The file as it is, cut, with flipped bits, and with lines dropped, doubled and swapped."""
    yield data
    lines = data.splitlines(keepends=True)
    for at in range(0, len(data), 101):
        yield data[:at]
        yield data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        yield data[:at] + bytes(len(data) - at)
    for at in range(len(lines) - 1):
        yield b"".join([*lines[:at], *lines[at + 1 :]])
        yield b"".join([*lines[:at], lines[at], *lines[at:]])
        yield b"".join([*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]])
        yield b"".join([*lines[: at + 1], *skipping(lines[at + 1 :], lines[at])])
    yield data + b"\n"
    yield data + data


def skipping(lines: list[bytes], before: bytes) -> Iterator[bytes]:
    """The lines with all checksums right, as no torn write leaves them: the first has the sequence after its own."""
    crc = stored_crc(before) or 0
    for number, line in enumerate(lines):
        sequence = stored_sequence(line) or 0
        body = line[:-TAIL_BYTES]
        if number == 0:
            body = body.replace(b'"seq":%d,' % sequence, b'"seq":%d,' % (sequence + 1))
        text, crc = close(body, crc)
        yield text


def test_any_damage_of_the_active_file_has_the_same_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "registry"
    asyncio.run(write(folder))
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    active = max(folder.glob("seg-*.jsonl"))
    assert len(whole[active].splitlines()) > 8
    outcomes: dict[bytes, Any] = {}
    for size, data in itertools.product(SIZES, damages(whole[active])):
        for path in folder.iterdir():
            if path not in whole:
                path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)
        active.write_bytes(data)
        monkeypatch.setattr(portions, "_CHUNK_BYTES", size)
        found = outcome(folder)
        assert outcomes.setdefault(data, found) == found
    assert sum(bool(refused) for _, refused, _ in outcomes.values()) > 20
    assert sum(not refused for _, refused, _ in outcomes.values()) > 20
