"""A full disk: what frees room is written all the same, growth is refused, and neither needs a restart to end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from tests.small_disk import MIB, CountedDisk, SmallDisk, mounted
from worker.journal import Entry, Files, Journal, verify
from worker.journal.lock import FolderLock
from worker.journal.reserve import RESERVE

RESERVE_BYTES = 256 * 1024
TEXT = "x" * 3000


@pytest.fixture(params=["counted", "mounted"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    if request.param == "mounted":
        with mounted(tmp_path / "disk", 4 * MIB) as small:
            yield small
    else:
        yield CountedDisk(tmp_path, 4 * MIB)


class Life:
    """A journal on a small disk, from boot to close, and what it acknowledged."""

    def __init__(self, disk: SmallDisk, **options: Any) -> None:
        self.disk = disk
        self.acknowledged: list[Entry] = []
        self.journal = Journal.open(
            disk.folder,
            replay=self.acknowledged.append,
            frees=lambda op, record: op == "delete",
            reserve_bytes=RESERVE_BYTES,
            files=disk.files,
            **options,
        )
        self.journal.start(lambda _: None)

    async def append(self, op: str = "store", **record: Any) -> bool:
        """Whether it was taken; if not, for want of room."""
        try:
            entry = await self.journal.append(op, record)
        except ModelManagerError as error:
            assert error.code == "ERR_STORAGE_FULL"
            return False
        self.acknowledged.append(entry)
        return True

    async def fill(self) -> None:
        """Take all room, and find out."""
        self.disk.fill()
        while await self.append(text=TEXT):
            pass
        assert self.full

    @property
    def full(self) -> bool:
        return self.journal.full_since is not None

    @property
    def held(self) -> int:
        path = self.disk.folder / RESERVE
        return path.stat().st_size if path.exists() else 0

    async def close(self) -> None:
        """Close, and see that exactly what was acknowledged is there."""
        await self.journal.close()
        report = verify(self.disk.folder)
        assert (report.damage, report.torn_bytes) == (None, 0)
        found: list[Entry] = []
        journal = Journal.open(self.disk.folder, replay=found.append, files=self.disk.files, reserve_bytes=0)
        await journal.close()
        assert found == sorted(self.acknowledged, key=lambda entry: entry.sequence)


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_the_reserve_is_made_after_the_boot_and_is_really_allocated(disk: SmallDisk) -> None:
    life = Life(disk)
    await life.append()
    assert life.held == RESERVE_BYTES
    assert (disk.folder / RESERVE).stat().st_blocks * 512 >= RESERVE_BYTES
    assert not life.full
    await life.close()


async def test_a_reserve_that_was_copied_with_holes_is_filled_up(disk: SmallDisk) -> None:
    disk.folder.mkdir()
    with (disk.folder / RESERVE).open("wb") as copy:
        copy.truncate(RESERVE_BYTES)
    life = Life(disk)
    await life.append()
    assert (disk.folder / RESERVE).stat().st_blocks * 512 >= RESERVE_BYTES
    await life.close()


async def test_growth_is_refused_and_deletes_are_taken(disk: SmallDisk) -> None:
    life = Life(disk)
    assert await life.append(text=TEXT)
    before = time.time()
    await life.fill()
    assert before <= (life.journal.full_since or 0) <= time.time()
    for number in range(50):
        assert await life.append("delete", number=number, text=TEXT)
        assert not await life.append(number=number)
    assert 0 < life.held < RESERVE_BYTES
    await life.close()


async def test_a_batch_of_both_is_parted(disk: SmallDisk) -> None:
    life = Life(disk)
    assert await life.append()
    disk.fill()
    ops = ["store", "delete"] * 20
    taken = await asyncio.gather(*(life.append(op, number=n, text=TEXT) for n, op in enumerate(ops)))
    assert all(taken[1::2])
    assert not any(taken[2::2])
    await life.close()


async def test_the_reserve_is_given_up_bit_by_bit_to_its_end_and_the_journal_stays_well(disk: SmallDisk) -> None:
    life = Life(disk)
    assert await life.append()
    await life.fill()
    helds = {life.held}
    while await life.append("delete", text=TEXT):
        disk.fill()  # somebody is greedy
        helds.add(life.held)
    assert len(helds) >= 7
    assert RESERVE not in {path.name for path in disk.folder.iterdir()}
    assert life.journal.healthy
    assert life.full
    assert life.journal.read(0, 10_000) == life.acknowledged
    disk.empty()
    await until(lambda: not life.full)
    assert await life.append()
    await life.close()


async def test_it_stays_full_until_there_is_room_for_twice_the_reserve(disk: SmallDisk) -> None:
    life = Life(disk)
    assert await life.append()
    await life.fill()
    disk.empty()
    disk.fill(leave=RESERVE_BYTES // 2)
    sequence = life.journal.head
    looked = time.monotonic()
    await until(lambda: time.monotonic() > looked + 2.5)  # in which it looks twice
    assert life.full
    assert not await life.append()
    assert life.journal.head <= sequence + 1  # a mark, perhaps
    disk.empty()
    await until(lambda: not life.full)
    assert life.held == RESERVE_BYTES
    assert await life.append(text=TEXT)
    await life.close()


async def test_a_restart_while_it_is_full_is_full_at_once_and_takes_deletes(disk: SmallDisk) -> None:
    life = Life(disk)
    assert await life.append()
    await life.fill()
    for _ in range(2):
        await life.close()
        disk.fill()
        life = Life(disk)
        assert life.full
        assert await life.append("delete", text=TEXT)
        assert not await life.append()
    disk.empty()
    await until(lambda: not life.full)
    assert await life.append()
    await life.close()


async def test_a_boot_that_needs_room_has_that_of_the_reserve(disk: SmallDisk) -> None:
    life = Life(disk)
    assert await life.append(text=TEXT)
    await life.close()
    [segment] = disk.folder.glob("seg-*.jsonl")
    with segment.open("ab") as file:
        file.write(b'{"v":1,"seq":999,' + b"\0" * 4000)  # torn, so that its bytes are to be kept beside
    disk.fill()
    life = Life(disk)
    assert life.full
    assert len(list(disk.folder.glob("*.torn"))) == 1
    assert await life.append("delete")
    await life.close()


async def test_a_rotation_for_compaction_takes_of_the_reserve(disk: SmallDisk) -> None:
    life = Life(disk)
    for number in range(5):
        assert await life.append(number=number)
    await life.fill()
    assert len((await life.journal.rotate()).sealed) == 1
    assert await life.append("delete")
    await life.close()


async def test_a_disk_that_never_had_the_room_takes_deletes_only(tmp_path: Path) -> None:
    life = Life(CountedDisk(tmp_path, RESERVE_BYTES))
    assert life.full
    assert not await life.append()
    assert await life.append("delete")
    assert life.held == 0
    await life.close()


async def test_a_disk_that_cannot_hold_a_reserve_is_used_without(tmp_path: Path) -> None:
    class NoReserve(CountedDisk):
        def allocate(self, fd: int, size: int) -> None:
            raise PermissionError

    disk = NoReserve(tmp_path, 4 * MIB)
    life = Life(disk)
    assert await life.append()
    assert (life.full, life.held) == (False, 0)
    await life.fill()
    disk.empty()
    await until(lambda: not life.full)
    assert await life.append()
    await life.close()


def test_a_lock_needs_no_room(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", MIB) as disk:
        disk.folder.mkdir()
        FolderLock(disk.folder).release()
        disk.fill()
        FolderLock(disk.folder).release()


def test_a_file_system_that_cannot_allocate_gets_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_supported(fd: int, offset: int, size: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", not_supported)
    files = Files()
    fd = files.open(tmp_path / "file", 0o102)
    files.allocate(fd, 100_000)
    files.close(fd)
    assert (tmp_path / "file").read_bytes() == bytes(100_000)
    assert files.allocated(tmp_path / "file") == 100_000
