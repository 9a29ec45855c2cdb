"""A backup, whatever the owner of the journal does meanwhile: complete, durable in itself, and bootable; or nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from tests.crash.disk import Disk
from tests.crash.life import Life, boot, compact
from tests.crash.stage import FOLDER
from worker.journal import Entry, Files, Journal, JournalDamaged, JournalLocked, dump, verify
from worker.journal.backup import backup
from worker.journal.lock import FolderLock
from worker.journal.manifest import read_manifest

ROUNDS = 40


def numbers(folder: Path) -> list[int]:
    return [line.record["n"] for line in dump(folder) if line.op == "put"]


async def booted(folder: Path) -> list[int]:
    """What a worker finds on a copy of the backup."""
    found: list[Entry] = []
    copy = folder.with_name("booted")
    shutil.copytree(folder, copy)
    await Journal.open(copy, replay=found.append).close()
    shutil.rmtree(copy)
    return [entry.record["n"] for entry in found]


@asynccontextmanager
async def owned(folder: Path, *, segment_bytes: int = 4000) -> AsyncIterator[Journal]:
    journal = Journal.open(folder, replay=lambda _: None, segment_bytes=segment_bytes)
    journal.start(lambda _: None)
    yield journal
    await journal.close()


async def put(journal: Journal, count: int, *, start: int = 0) -> None:
    await asyncio.gather(*(journal.append("put", {"n": start + n}) for n in range(count)))


@asynccontextmanager
async def background(work: Callable[[], Any]) -> AsyncIterator[None]:
    """`work` is done again and again meanwhile; if it fails, so does the test."""

    async def again_and_again() -> None:
        while True:
            await work()

    task = asyncio.ensure_future(again_and_again())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_every_backup_beside_a_writer_that_rotates_and_compacts_holds_what_was_acknowledged(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "registry"
    acknowledged = 0
    async with owned(folder) as journal:

        async def write() -> None:
            nonlocal acknowledged
            await put(journal, 7, start=acknowledged)
            acknowledged += 7

        await write()
        async with background(write), background(lambda: compact(journal, Files())):
            for number in range(ROUNDS):
                before, destination = acknowledged, tmp_path / f"backup-{number}"
                report = await asyncio.to_thread(backup, folder, destination)
                found = numbers(destination)
                assert len(found) >= before
                assert found == list(range(len(found))), "no gap, and nothing that was not written"
                assert report.records == len(found)
                assert verify(destination).damage is None
                if number % 8 == 0:
                    assert await booted(destination) == found
                shutil.rmtree(destination)
        assert acknowledged > ROUNDS
        assert journal.stats().generation > ROUNDS // 4, "files were replaced meanwhile"
    assert not list(tmp_path.glob("*.tmp"))


async def test_what_was_acknowledged_just_before_is_waited_for_until_its_owner_proves_it(tmp_path: Path) -> None:
    async with owned(tmp_path / "registry") as journal:
        await put(journal, 3)
        report = await asyncio.to_thread(backup, tmp_path / "registry", tmp_path / "backup")
        assert numbers(tmp_path / "backup") == [0, 1, 2]
        assert report.head == journal.head, "with the mark that proves it"


async def test_an_owner_that_proves_nothing_is_not_waited_for_without_end(tmp_path: Path) -> None:
    async with owned(tmp_path / "registry") as journal:
        await put(journal, 3)
        await asyncio.to_thread(backup, tmp_path / "registry", tmp_path / "backup", patience_s=0)
        assert numbers(tmp_path / "backup") == [0, 1, 2]


async def test_files_that_compaction_removes_before_they_are_opened_are_done_without(tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    loop = asyncio.get_running_loop()
    async with owned(folder) as journal:
        await put(journal, 5)
        await journal.rotate()
        await put(journal, 5, start=5)

        class Late(Files):
            compactions = 0

            def reader(self, path: Path) -> BinaryIO:
                if path.parent == folder and path.suffix == ".jsonl" and not self.compactions:
                    self.compactions += 1
                    asyncio.run_coroutine_threadsafe(compact(journal, Files()), loop).result()
                return super().reader(path)

        files = Late()
        report = await asyncio.to_thread(backup, folder, tmp_path / "backup", files=files)
        assert files.compactions == 1
        assert numbers(tmp_path / "backup") == list(range(10))
        assert report.generation == journal.stats().generation
        assert list((tmp_path / "backup").glob("base-*.jsonl"))


async def test_files_that_compaction_removes_while_they_are_copied_are_copied_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    loop = asyncio.get_running_loop()
    compactions = 0
    async with owned(folder) as journal:
        await put(journal, 5)
        await journal.rotate()
        await put(journal, 5, start=5)

        def progress(done: int, total: int) -> None:
            nonlocal compactions
            if not compactions:
                compactions += 1
                asyncio.run_coroutine_threadsafe(compact(journal, Files()), loop).result()

        await asyncio.to_thread(backup, folder, tmp_path / "backup", progress=progress)
        assert numbers(tmp_path / "backup") == list(range(10))
        assert not list((tmp_path / "backup").glob("base-*.jsonl")), "as it was when the backup began"


async def filled(folder: Path, *, count: int = 9) -> None:
    async with owned(folder, segment_bytes=600) as journal:
        for n in range(count):
            await put(journal, 1, start=n)


async def test_a_torn_tail_is_never_copied(tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    await filled(folder)
    with max(folder.glob("seg-*")).open("ab") as stream:
        stream.write(b'{"v":1,"seq":99,"b":99,"t":1,"op":"put","rec":{"n":')
    report = backup(folder, tmp_path / "backup")
    assert report.left_out_bytes == 51
    assert verify(tmp_path / "backup").torn_bytes == 0
    assert numbers(tmp_path / "backup") == list(range(9))


@pytest.mark.parametrize("which", [0, 1, -1], ids=["MANIFEST", "sealed", "active"])
async def test_a_damaged_journal_is_refused_and_leaves_nothing(tmp_path: Path, which: int) -> None:
    folder = tmp_path / "registry"
    await filled(folder)
    path = [folder / "MANIFEST", *sorted(folder.glob("seg-*"))][which]
    data = bytearray(path.read_bytes())
    data[40] ^= 4
    path.write_bytes(data)
    with pytest.raises(JournalDamaged) as refused:
        backup(folder, tmp_path / "backup")
    assert refused.value.path == path.name
    assert [path.name for path in tmp_path.iterdir()] == ["registry"]


async def test_a_missing_file_and_a_manifest_that_is_too_old_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    await filled(folder, count=2)
    older = (folder / "MANIFEST").read_bytes()
    async with owned(folder, segment_bytes=600) as journal:
        await put(journal, 9, start=2)
        await put(journal, 9, start=11)
    newest = (folder / "MANIFEST").read_bytes()
    assert newest != older
    (folder / "MANIFEST").write_bytes(older)
    with pytest.raises(JournalDamaged, match="not the newest"):
        backup(folder, tmp_path / "backup")
    (folder / "MANIFEST").write_bytes(newest)
    min(folder.glob("seg-*")).unlink()
    with pytest.raises(JournalDamaged, match="missing"):
        backup(folder, tmp_path / "backup")


async def test_a_destination_that_is_there_is_left_alone(tmp_path: Path) -> None:
    await filled(tmp_path / "registry")
    (tmp_path / "backup").mkdir()
    with pytest.raises(FileExistsError):
        backup(tmp_path / "registry", tmp_path / "backup")
    with pytest.raises(NotADirectoryError):
        backup(tmp_path / "registry", tmp_path / "nowhere" / "backup")
    with pytest.raises(FileNotFoundError):
        backup(tmp_path / "backup", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "registry"]
    assert not list((tmp_path / "backup").iterdir())


async def test_what_a_backup_that_died_has_left_is_begun_anew_and_nothing_else_is_removed(tmp_path: Path) -> None:
    await filled(tmp_path / "registry")
    left = tmp_path / "backup.tmp"
    left.mkdir()
    (left / "seg-00000000000000000001.jsonl").write_bytes(b"half a fi")
    (left / "MANIFEST.tmp").write_bytes(b"")
    (left / "note.txt").write_bytes(b"of an operator")
    with pytest.raises(FileExistsError):
        backup(tmp_path / "registry", tmp_path / "backup")
    assert (left / "note.txt").exists()
    (left / "note.txt").unlink()
    backup(tmp_path / "registry", tmp_path / "backup")
    assert numbers(tmp_path / "backup") == list(range(9))
    assert not left.exists()


async def test_two_backups_to_one_destination_do_not_mix(tmp_path: Path) -> None:
    await filled(tmp_path / "registry")
    other = tmp_path / "backup.tmp"
    other.mkdir()
    lock = FolderLock(other)
    with pytest.raises(JournalLocked):
        backup(tmp_path / "registry", tmp_path / "backup")
    assert (other / "LOCK").exists()
    lock.release()


async def test_the_progress_goes_up_to_all_bytes(tmp_path: Path) -> None:
    await filled(tmp_path / "registry")
    seen: list[tuple[int, int]] = []
    report = backup(tmp_path / "registry", tmp_path / "backup", progress=lambda *far: seen.append(far))
    assert seen[-1] == (report.bytes, report.bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_backup_that_was_made_survives_a_power_cut() -> None:
    disk = Disk()
    life = Life(FOLDER, disk)
    life.put([{"n": n} for n in range(3)])
    life.close()
    active = FOLDER / read_manifest(disk, FOLDER).active
    disk.pwrite(disk.open(active, os.O_RDWR), b"torn", len(disk.reader(active).read()))
    destination = FOLDER.with_name("backup")
    backup(FOLDER, destination, files=disk)
    left = disk.after_cut(())
    report = verify(destination, files=left)
    assert (report.damage, report.torn_bytes) == (None, 0)
    found = boot(destination, left)
    assert [entry.record["n"] for entry in found] == [0, 1, 2]
