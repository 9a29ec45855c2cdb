"""What is played under crashes. A new way of writing gets a scenario here, and all checks apply to it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.crash.disk import Disk
from tests.crash.life import boot
from tests.crash.stage import FOLDER, Over, Scenario, Stage, Violation
from worker.journal import JournalDamaged, Until, verify
from worker.journal.backup import backup
from worker.journal.files import SyncFailed
from worker.journal.manifest import read_manifest
from worker.journal.repair import repair
from worker.upkeep.restore import restore

_NOTE = b"left by an operator"
_SPOILED = b'"op":"?ark"'
_FIRST, _SECOND = FOLDER.with_name("backup-1"), FOLDER.with_name("backup-2")


def first_creation(stage: Stage) -> None:
    with stage.life():
        stage.put()


def appending(stage: Stage) -> None:
    """Batches of less than a sector and of several."""
    with stage.life(killed=True):
        for count in (1, 3, 12):
            stage.put(count, size=90)


def rotation(stage: Stage) -> None:
    with stage.life(segment_bytes=700):
        for count in (1, 2, 4, 1, 3):
            stage.put(count)


def rotation_after_a_boot(stage: Stage) -> None:
    """The first line a boot left behind is one the seal has to sum up."""
    with stage.life(segment_bytes=900, killed=True):
        stage.put(3)
    with stage.life(segment_bytes=500):
        stage.put(2)
        stage.put(2)


def closing(stage: Stage) -> None:
    for _ in range(3):
        with stage.life():
            stage.put(2)


def torn_tail(stage: Stage) -> None:
    """A boot that finds the last batch without every other sector, and goes on."""
    with stage.life(killed=True):
        stage.put(2)
        stage.put(9, size=200)
    torn = next(moment for moment in reversed(stage.moments) if moment.name == "fdatasync")
    stage.crash(torn, (unit for unit in torn.disk.units() if unit.kind != "sector" or unit.sector % 2))
    with stage.life(killed=True):
        stage.put(2)


def compaction(stage: Stage) -> None:
    """Twice, so that the second base replaces the first."""
    with stage.life(segment_bytes=700, killed=True):
        stage.put(3)
        stage.put(2)
        stage.compact()
        stage.put(2)
        stage.compact()
        stage.put(1)


def compaction_after_a_boot(stage: Stage) -> None:
    """The files that the boot finds are left of a base that was adopted, and of one that was not."""
    with stage.life(killed=True):
        stage.put(2)
        stage.compact()
        stage.put(1)
    with stage.life(killed=True):
        stage.put(1)
        stage.compact()


def failed_sync(stage: Stage) -> None:
    """The cache shows the next process what the disk does not have."""
    with suppress(Over), stage.life():
        stage.put(2, size=150)
        stage.trouble = failing("fdatasync", errno.EIO)
        stage.put(2, size=300)
    stage.trouble = lambda name: None
    with stage.life(killed=True):
        stage.put(1)


def no_room(stage: Stage) -> None:
    """A write that ends within a batch, behind whole lines of it, and is taken back."""
    with stage.life(killed=True):
        stage.put(1)
        room = iter((700,))

        def full(name: str) -> int | None:
            if name != "pwrite":
                return None
            if (left := next(room, None)) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return left

        stage.trouble = full
        stage.put(8, size=150)
        stage.trouble = lambda name: None
        stage.put(2)


def full_disk(stage: Stage) -> None:
    """The room that is left ends within each write, and grows as the reserve is given up; then there is plenty."""
    with stage.life(segment_bytes=1200, killed=True):
        stage.put(1)
        stage.disk.room = 300
        room = [300]

        def full(name: str) -> int | None:
            if name in ("ftruncate", "unlink"):
                room[0] = 200
            if name != "pwrite":
                return None
            if not room[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left, room[0] = room[0], 0
            return left

        stage.trouble = full
        stage.put(3, size=150)
        stage.put(1, frees=True)
        stage.put(2)
        stage.put(3, frees=True)
        stage.trouble = lambda name: None
        stage.compact()
        stage.put(1, frees=True)
    with stage.life(killed=True):
        stage.put(2)


def backing_up(stage: Stage) -> None:
    """Of an owner that was killed, and beside one that lives: all that was acknowledged."""
    with stage.life(segment_bytes=700, killed=True):
        stage.put(3)
        stage.compact()
        stage.put(3)
        stage.put(2)
    _back_up(stage, _FIRST)
    with stage.life(killed=True):
        stage.put(1)
        _back_up(stage, _SECOND)


def _back_up(stage: Stage, destination: Path) -> None:
    try:
        backup(FOLDER, destination, files=stage.disk, patience_s=0)
    except (OSError, SyncFailed) as error:
        raise Over from error


def repairing(stage: Stage) -> None:
    """A byte of a sealed segment has changed in a `mark`, so that no record is lost with it."""
    with stage.life():
        stage.put(2)
    with stage.life(segment_bytes=300):
        stage.put(1)
    disk = stage.disk
    name = next(
        name for name in read_manifest(disk, FOLDER).names[:-1] if b'"op":"mark"' in disk.reader(FOLDER / name).read()
    )
    data = disk.reader(FOLDER / name).read()
    fd = disk.open(FOLDER / name, os.O_RDWR)
    disk.pwrite(fd, _SPOILED, data.index(b'"op":"mark"'))
    disk.fdatasync(fd)
    disk.close(fd)
    stage.moments.clear()
    try:
        repair(FOLDER, accept_loss=True, files=disk, clock=lambda: 0.0)
    except (OSError, SyncFailed) as error:
        raise Over from error


def restoring(stage: Stage) -> None:
    """Of a backup with a base and a tail, where the folder was lost."""
    _lose_the_folder(stage)
    _play_restore(stage)


def restoring_over_an_empty_journal(stage: Stage) -> None:
    """A worker that was started on nothing has left one."""
    _lose_the_folder(stage)
    boot(FOLDER, stage.disk)
    stage.replace_disk(stage.disk.copy())
    _play_restore(stage)


def _lose_the_folder(stage: Stage) -> None:
    with stage.life(segment_bytes=700, killed=True):
        stage.put(3)
        stage.compact()
        stage.put(3)
        stage.put(2)
    disk = stage.disk
    backup(FOLDER, _FIRST, files=disk, patience_s=0)
    for name in disk.list(FOLDER):
        disk.unlink(FOLDER / name)
    disk.fsync_dir(FOLDER)


def _play_restore(stage: Stage) -> None:
    stage.moments.clear()
    try:
        _restore(stage.disk)
    except (OSError, SyncFailed) as error:
        raise Over from error


def _restore(disk: Disk) -> None:
    restore(_FIRST, FOLDER, epoch=2, until=Until(), progress=lambda step, done, total: None, files=disk)


def restore_if_missing(disk: Disk) -> None:
    """It is there whole, or there is nothing that a worker would serve, and the operator begins anew."""
    if "MANIFEST" not in disk.list(FOLDER) or verify(FOLDER, files=disk).records == 0:
        _restore(disk)


def unknown_file(stage: Stage) -> None:
    disk = stage.disk
    disk.mkdir(FOLDER.parent)
    disk.mkdir(FOLDER)
    fd = disk.open(FOLDER / "note.txt", os.O_RDWR | os.O_CREAT)
    disk.pwrite(fd, _NOTE, 0)
    disk.fdatasync(fd)
    for folder in (Path("/"), FOLDER.parent, FOLDER):
        disk.fsync_dir(folder)
    stage.moments.clear()
    for _ in range(2):
        with stage.life(killed=True):
            stage.put(1)


def failing(name: str, number: int) -> Callable[[str], None]:
    """Every operation of that name fails."""

    def fail(operation: str) -> None:
        if operation == name:
            raise OSError(number, os.strerror(number))

    return fail


def backups_are_whole(disk: Disk) -> None:
    """If it is there, it has what had been acknowledged, and boots."""
    for destination, count in ((_FIRST, 8), (_SECOND, 9)):
        if not disk.is_dir(destination):
            continue
        if (damage := verify(destination, files=disk).damage) is not None:
            raise Violation(f"verify finds {damage} in the backup")
        found = [entry.record["n"] for entry in boot(destination, disk.copy())]
        if found != list(range(1, count + 1)):
            raise Violation(f"{found} is in the backup")


def repair_if_refused(disk: Disk) -> None:
    """Without its repair, or with half of it, the journal refuses; else it has been repaired."""
    try:
        boot(FOLDER, disk.copy())
    except JournalDamaged:
        repair(FOLDER, accept_loss=True, files=disk, clock=lambda: 0.0)


def damaged_bytes_are_kept(disk: Disk) -> None:
    folders = [FOLDER, *(FOLDER / name for name in disk.list(FOLDER) if disk.is_dir(FOLDER / name))]
    files = [folder / name for folder in folders for name in disk.list(folder) if not disk.is_dir(folder / name)]
    if not any(_SPOILED in disk.reader(path).read() for path in files):
        raise Violation("the damaged file is gone")


def note_is_kept(disk: Disk) -> None:
    aside = FOLDER / "aside"
    places = [FOLDER / "note.txt", *(aside / name for name in (disk.list(aside) if disk.is_dir(aside) else []))]
    for path in places:
        if path.name in disk.list(path.parent) and disk.reader(path).read() == _NOTE:
            return
    raise Violation("a file that was not known is gone")


SCENARIOS = (
    Scenario("first creation", first_creation),
    Scenario("append", appending),
    Scenario("rotation", rotation),
    Scenario("rotation after a boot", rotation_after_a_boot),
    Scenario("close", closing),
    Scenario("compaction", compaction),
    Scenario("compaction after a boot", compaction_after_a_boot),
    Scenario("torn tail", torn_tail),
    Scenario("failed sync", failed_sync),
    Scenario("no room", no_room),
    Scenario("full disk", full_disk),
    Scenario("backup", backing_up, intact=backups_are_whole),
    Scenario("repair", repairing, intact=damaged_bytes_are_kept, mend=repair_if_refused),
    Scenario("restore", restoring, mend=restore_if_missing),
    Scenario("restore over an empty journal", restoring_over_an_empty_journal, mend=restore_if_missing),
    Scenario("unknown file", unknown_file, intact=note_is_kept),
)
