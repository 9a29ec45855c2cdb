"""A disk that is full, that fails, or that a process loses between two calls: nothing false is acknowledged."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from worker.journal import Entry, Files, Journal, JournalFailed, JournalObserver, verify

CHANGING = ("mkdir", "open", "pwrite", "ftruncate", "fdatasync", "fsync_dir", "rename", "unlink")


class FaultyFiles(Files):
    """Counts the calls that change something, and lets `fault` raise before any of them: it gets name and number."""

    def __init__(self) -> None:
        self.calls = 0
        self.fault: Callable[[str, int], None] = lambda name, number: None

    def __getattribute__(self, name: str) -> Any:
        attribute = super().__getattribute__(name)
        if name not in CHANGING:
            return attribute

        def counted(*arguments: Any) -> Any:
            number = self.calls
            self.calls += 1
            self.fault(name, number)
            return attribute(*arguments)

        return counted


class FullFiles(Files):
    """A disk with so many bytes left for new writes; the last write that fits in part is a short one."""

    def __init__(self) -> None:
        self.room = 2**40

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        # The test sets the room while the writer uses it up.
        room = self.room
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().pwrite(fd, memoryview(data)[:room], offset)
        self.room -= written
        return written


def opened(folder: Path, **options: Any) -> tuple[Journal, list[Entry]]:
    """Without a reserve, so that each write meets the disk as it is; test_journal_full.py has the others."""
    entries: list[Entry] = []
    journal = Journal.open(folder, replay=entries.append, reserve_bytes=0, **options)
    return journal, entries


async def replayed(folder: Path, **options: Any) -> list[Entry]:
    journal, entries = opened(folder, **options)
    await journal.close()
    return entries


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("LOCK", "aside")}


@pytest.mark.parametrize("room", [0, 1, 50, 150])
async def test_a_full_disk_refuses_the_batch_leaves_no_trace_and_the_journal_goes_on(tmp_path: Path, room: int) -> None:
    files = FullFiles()
    journal, _ = opened(tmp_path, files=files)
    told: list[Entry] = []
    journal.start(told.extend)
    first = await journal.append("put", {"n": 1})
    before = content(tmp_path)
    files.room = room
    refused = await asyncio.gather(*(journal.append("put", {"n": "x" * 200}) for _ in range(5)), return_exceptions=True)
    assert [getattr(error, "code", None) for error in refused] == ["ERR_STORAGE_FULL"] * 5
    assert content(tmp_path) == before
    assert journal.healthy
    assert journal.read(0, 10) == [first]
    files.room = 2**40
    second = await journal.append("put", {"n": 2})
    assert second.sequence == first.sequence + 1
    await journal.close()
    assert await replayed(tmp_path) == told == [first, second]


async def test_a_rotation_that_finds_no_room_waits_and_is_done_when_there_is_some(tmp_path: Path) -> None:
    files = FullFiles()
    journal, _ = opened(tmp_path, files=files, segment_bytes=600)
    journal.start(lambda _: None)
    acknowledged: list[Entry] = []
    refused = 0
    for n in range(400):
        # Often less than a rotation needs, so that each of its steps is the one that finds no room some time.
        files.room = n * 37 % 3000
        try:
            acknowledged.append(await journal.append("put", {"n": n}))
        except ModelManagerError as error:
            assert error.code == "ERR_STORAGE_FULL"
            refused += 1
    assert refused > 10
    assert journal.healthy
    files.room = 2**40
    acknowledged.append(await journal.append("put", {}))
    assert journal.stats().segments > 5
    assert journal.read(0, 1000) == acknowledged
    await journal.close()
    assert verify(tmp_path).damage is None
    assert await replayed(tmp_path) == acknowledged


async def test_a_full_disk_at_closing_costs_the_mark_and_nothing_else(tmp_path: Path) -> None:
    files = FullFiles()
    journal, _ = opened(tmp_path, files=files)
    journal.start(lambda _: None)
    entry = await journal.append("put", {})
    files.room = 0
    await journal.close()
    assert await replayed(tmp_path) == [entry]


@pytest.mark.parametrize("passing", [errno.EMFILE, errno.ENOMEM])
async def test_a_shortage_of_descriptors_or_memory_is_retryable(tmp_path: Path, passing: int) -> None:
    files = FaultyFiles()
    journal, _ = opened(tmp_path, files=files)
    journal.start(lambda _: None)

    def fail(name: str, _: int) -> None:
        if name in ("open", "pwrite"):
            raise OSError(passing, os.strerror(passing))

    files.fault = fail
    with pytest.raises(ModelManagerError) as refused:
        await journal.append("put", {})
    assert refused.value.retryable
    files.fault = lambda name, number: None
    entry = await journal.append("put", {})
    await journal.close()
    assert await replayed(tmp_path) == [entry]


class Failures(JournalObserver):
    def __init__(self) -> None:
        self.count = 0

    def fsync_failed(self) -> None:
        self.count += 1


async def test_after_an_fsync_error_nothing_is_acknowledged_any_more(tmp_path: Path) -> None:
    files, seen = FaultyFiles(), Failures()
    journal, _ = opened(tmp_path, files=files, observe=seen)
    told: list[Entry] = []
    journal.start(told.extend)
    first = await journal.append("put", {"n": 1})
    syncs: list[int] = []

    def fail_once(name: str, number: int) -> None:
        if name == "fdatasync":
            syncs.append(number)
            if len(syncs) == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    files.fault = fail_once
    outcomes = await asyncio.gather(*(journal.append("put", {"n": n}) for n in range(700)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {JournalFailed}
    with pytest.raises(JournalFailed, match="fsync failed"):
        await journal.append("put", {})
    assert not journal.healthy
    assert "fsync failed" in (journal.failure or "")
    assert journal.head == first.sequence
    assert journal.read(0, 10) == told == [first]
    assert (seen.count, journal.stats().fsync_failures, journal.stats().queued) == (1, 1, 0)
    await journal.close()
    assert len(syncs) == 1, "a second sync could report success for bytes that are not on the disk"
    assert (await replayed(tmp_path))[:1] == [first]


async def test_a_rollback_that_fails_stops_the_journal(tmp_path: Path) -> None:
    files = FaultyFiles()
    journal, _ = opened(tmp_path, files=files)
    journal.start(lambda _: None)

    def fail(name: str, _: int) -> None:
        if name in ("pwrite", "ftruncate"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    files.fault = fail
    with pytest.raises(JournalFailed, match="cutting the file back"):
        await journal.append("put", {})
    assert not journal.healthy
    await journal.close()


async def test_a_sync_error_at_boot_refuses_and_frees_the_folder(tmp_path: Path) -> None:
    assert await replayed(tmp_path) == []
    files, seen = FaultyFiles(), Failures()

    def fail(name: str, _: int) -> None:
        if name == "fdatasync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    files.fault = fail
    with pytest.raises(JournalFailed):
        opened(tmp_path, files=files, observe=seen)
    assert seen.count == 1
    assert await replayed(tmp_path) == []


class Stuck(Files):
    """Writes nothing and says so, without an error."""

    stuck = False

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return 0 if self.stuck else super().pwrite(fd, data, offset)


async def test_a_write_that_gets_nowhere_counts_as_a_full_disk(tmp_path: Path) -> None:
    files = Stuck()
    journal, _ = opened(tmp_path, files=files)
    journal.start(lambda _: None)
    files.stuck = True
    with pytest.raises(ModelManagerError) as refused:
        await journal.append("put", {})
    assert refused.value.code == "ERR_STORAGE_FULL"
    files.stuck = False
    entry = await journal.append("put", {})
    await journal.close()
    assert await replayed(tmp_path) == [entry]


class Gone(BaseException):
    """The process ends here."""


async def life(folder: Path, files: Files) -> tuple[list[Entry], int]:
    """One life of a process until it ends or is Gone: what it had acknowledged, and how many records it had tried."""
    acknowledged: list[Entry] = []
    tried = 0
    try:
        journal, _ = opened(folder, files=files, segment_bytes=500)
    except Gone:
        return acknowledged, tried
    journal.start(lambda _: None)
    try:
        for n in range(6):
            tried += 1
            acknowledged.append(await journal.append("put", {"n": n}))
    except JournalFailed:
        pass
    await journal.close()
    return acknowledged, tried


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_process_that_ends_before_any_call_leaves_a_journal_with_all_that_was_acknowledged(
    tmp_path: Path,
) -> None:
    counting = FaultyFiles()
    await life(tmp_path / "whole", counting)
    assert counting.calls > 40
    for last_call in range(counting.calls):
        folder = tmp_path / str(last_call)
        files = FaultyFiles()

        def end(_: str, number: int, last_call: int = last_call) -> None:
            if number >= last_call:
                raise Gone

        files.fault = end
        acknowledged, tried = await life(folder, files)
        found = await replayed(folder)
        assert found[: len(acknowledged)] == acknowledged
        assert len(found) <= tried
        assert not [name for name in content(folder) if name.endswith(".tmp")]
        journal, _ = opened(folder, segment_bytes=500)
        journal.start(lambda _: None)
        added = [await journal.append("put", {"n": n}) for n in range(6)]
        await journal.close()
        assert await replayed(folder) == found + added
        report = verify(folder)
        assert (report.damage, report.torn_bytes) == (None, 0)


LIMITED = """
import asyncio, resource, sys
from pathlib import Path
from schemas.errors import ModelManagerError
from worker.journal import Journal

async def main(folder):
    journal = Journal.open(folder, replay=lambda _: None)
    journal.start(lambda _: None)
    await journal.append("put", {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    acknowledged = 0
    try:
        while True:
            await journal.append("put", {"text": "x" * 300})
            acknowledged += 1
    except ModelManagerError as error:
        assert error.code == "ERR_STORAGE_FULL", error
    await journal.append("put", {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await journal.append("put", {"text": "x" * 300})
    await journal.close()
    print(acknowledged + 3)

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_a_real_file_size_limit_is_survived(tmp_path: Path) -> None:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert len(await replayed(tmp_path)) == int(done.stdout)
    assert verify(tmp_path).damage is None
