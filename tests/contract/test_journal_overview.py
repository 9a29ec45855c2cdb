"""A journal in numbers, from its first and last lines: the same that reading all of it gives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.crash.life import compact
from worker.journal import Files, Journal, JournalDamaged, dump, verify
from worker.journal.overview import Overview, overview

NOW_S = 1_800_000_000.0


@asynccontextmanager
async def owned(folder: Path) -> AsyncIterator[Journal]:
    journal = Journal.open(folder, replay=lambda _: None, segment_bytes=3000, clock=lambda: NOW_S)
    journal.start(lambda _: None)
    yield journal
    await journal.close()


async def put(journal: Journal, count: int, *, size: int = 10) -> None:
    for n in range(count):
        await journal.append("put", {"n": n, "text": "x" * size})


def check(found: Overview, folder: Path) -> None:
    """What is told is what is read."""
    read = verify(folder)
    assert (found.registry_id, found.epoch, found.generation) == (read.registry_id, read.epoch, read.generation)
    assert found.base.bytes + found.segments.bytes == read.bytes + read.torn_bytes
    assert found.base.lines + found.segments.lines == read.lines
    assert found.base.count + found.segments.count == read.files
    assert found.head == read.head
    if any(line.op == "put" for line in dump(folder)):
        assert found.written_ms == NOW_S * 1000


@pytest.mark.parametrize("size", [10, 300, 200_000], ids=str)
async def test_the_numbers_are_those_that_a_reading_of_all_gives(tmp_path: Path, size: int) -> None:
    """Also of lines that are larger than what is read at a time."""
    async with owned(tmp_path):
        assert overview(tmp_path).owned
    assert overview(tmp_path).written_ms is None
    check(overview(tmp_path), tmp_path)
    for _ in range(2):
        async with owned(tmp_path) as journal:
            await put(journal, 30 if size < 1000 else 3, size=size)
        check(overview(tmp_path), tmp_path)
        async with owned(tmp_path) as journal:
            await compact(journal, Files())
        found = overview(tmp_path)
        check(found, tmp_path)
        assert (found.base.count, found.compactable_bytes, found.owned) == (1, 0, False)


async def test_a_torn_tail_is_passed_over(tmp_path: Path) -> None:
    async with owned(tmp_path) as journal:
        await put(journal, 2)
    before = overview(tmp_path)
    with max(tmp_path.glob("seg-*")).open("ab") as stream:
        stream.write(b"\0" * 100_000 + b'\n{"v":1,"seq":9')
    after = overview(tmp_path)
    assert (after.head, after.segments.lines) == (before.head, before.segments.lines)


async def test_a_large_journal_is_not_read_through(tmp_path: Path) -> None:
    async with owned(tmp_path) as journal:
        await put(journal, 100, size=3000)
        await journal.rotate()
    opened: list[str] = []

    class Watched(Files):
        def reader(self, path: Path) -> BinaryIO:
            opened.append(path.name)
            return super().reader(path)

    overview(tmp_path, files=Watched())
    assert len(opened) <= 4 < len(list(tmp_path.glob("seg-*")))


async def test_what_is_looked_at_is_checked(tmp_path: Path) -> None:
    async with owned(tmp_path / "registry") as journal:
        await put(journal, 5)
        await compact(journal, Files())
    base = next((tmp_path / "registry").glob("base-*.jsonl"))
    data = bytearray(base.read_bytes())
    data[60] ^= 1
    base.write_bytes(data)
    with pytest.raises(JournalDamaged, match="checksum"):
        overview(tmp_path / "registry")
    base.unlink()
    with pytest.raises(JournalDamaged, match="missing"):
        overview(tmp_path / "registry")
    with pytest.raises(FileNotFoundError):
        overview(tmp_path)
