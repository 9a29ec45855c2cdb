"""A journal that refuses to boot is repaired: what is lost is what was damaged, and no more; the worker boots again."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contract.test_compaction import History, append, opened, store
from tests.crash.disk import Disk
from tests.crash.life import Life, boot
from tests.crash.stage import FOLDER
from tests.registry_view import compact_here, view, view_after_boot
from worker.catalog.catalog import Totals
from worker.journal import Entry, Files, Journal, JournalDamaged, JournalLocked, verify
from worker.journal.lock import FolderLock
from worker.journal.manifest import read_manifest
from worker.journal.repair import JournalBeyondRepair, RepairReport, repair

CONTROL = {"open", "seal", "mark"}


@dataclass(frozen=True)
class Place:
    """A line, where it is."""

    path: Path
    offset: int
    size: int
    sequence: int
    op: str


def filled(folder: Path) -> list[int]:
    """A base, sealed segments and an active one; the sequences of its records."""
    life = Life(folder, Files(), segment_bytes=700)
    life.put([{"n": n, "text": "base"} for n in range(4)])
    life.compact()
    for n in range(4, 16):
        life.put([{"n": n, "text": "sealed"}])
    life.put([{"n": n, "text": "active"} for n in range(16, 18)])
    life.close()
    return booted(folder)


def booted(folder: Path) -> list[int]:
    found: list[Entry] = []
    asyncio.run(Journal.open(folder, replay=found.append).close())
    return [entry.sequence for entry in found]


def files_of(folder: Path) -> list[Path]:
    manifest = read_manifest(Files(), folder)
    return [folder / name for name in manifest.names]


def places(folder: Path) -> Iterator[Place]:
    for path in files_of(folder):
        offset = 0
        for line in path.read_bytes().splitlines(keepends=True):
            value = json.loads(line)
            yield Place(path, offset, len(line), value["seq"], value["op"])
            offset += len(line)


def flip(path: Path, offset: int, bit: int = 2) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("LOCK", "RESERVE")
    }


def sequences(report: RepairReport) -> set[int]:
    return {sequence for lost in report.lost for sequence in range(lost.first, lost.last + 1)}


def repaired(folder: Path) -> RepairReport:
    """Repair what refuses to boot; its listing beforehand changes nothing."""
    with pytest.raises(JournalDamaged):
        Journal.open(folder, replay=lambda _: None)
    before = content(folder)
    listed = repair(folder, accept_loss=False)
    assert content(folder) == before
    assert listed.damage is not None
    assert not listed.repaired
    report = repair(folder, accept_loss=True)
    assert report.repaired
    assert (report.lost, report.stretches, report.records) == (listed.lost, listed.stretches, listed.records)
    assert report.epoch == listed.epoch + 1
    assert verify(folder).damage is None
    assert report.kept is not None
    assert content(folder / report.kept) == before, "all that was there is kept"
    return report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.mark.parametrize("kind", ["base", "sealed", "active"])
def test_a_flipped_bit_in_a_record_costs_that_record(folder: Path, kind: str) -> None:
    whole = filled(folder)
    paths = files_of(folder)
    path = {"base": paths[0], "sealed": paths[2], "active": paths[-1]}[kind]
    of_it = [place for place in places(folder) if place.path == path and place.op not in CONTROL]
    place = of_it[len(of_it) // 2]
    flip(path, place.offset + place.size // 2)
    report = repaired(folder)
    assert sequences(report) == {place.sequence}
    assert [stretch.offset for stretch in report.stretches] == [place.offset]
    assert [stretch.bytes for stretch in report.stretches] == [place.size]
    assert booted(folder) == [sequence for sequence in whole if sequence != place.sequence]


def test_a_flipped_bit_anywhere_costs_at_most_the_record_it_is_in(folder: Path) -> None:
    whole = filled(folder)
    lines = list(places(folder))
    for line in lines:
        for within in range(line.size):
            flip(line.path, line.offset + within, bit := within % 8)
            report = repair(folder, accept_loss=False)
            assert report.damage is not None
            lost = sequences(report)
            is_record = line.op not in CONTROL
            # What chains the records is in the last 19 bytes, and the line behind has it again.
            in_its_end = within >= line.size - 19
            assert report.records == len(whole) - (is_record and not in_its_end), (line, within)
            assert lost & set(whole) <= {line.sequence}, "in a base it is told where it was, between two that are there"
            if line is not lines[-1]:  # of the very last one nobody can tell that it was a mark
                assert (line.sequence in lost) == (is_record and not in_its_end)
            flip(line.path, line.offset + within, bit)


def test_a_text_of_a_crc_costs_nothing(folder: Path) -> None:
    whole = filled(folder)
    place = next(place for place in places(folder) if place.op == "put" and place.path == files_of(folder)[2])
    flip(place.path, place.offset + place.size - 5)
    report = repaired(folder)
    assert (report.lost, report.stretches) == ((), ())
    assert booted(folder) == whole


def test_lost_sectors_cost_the_lines_they_touch_and_what_is_chained_to_them_alone(folder: Path) -> None:
    whole = filled(folder)
    path = files_of(folder)[1]
    data = bytearray(path.read_bytes())
    data[200:460] = bytes(260)
    path.write_bytes(data)
    touched = [
        place.sequence
        for place in places_of(folder, path, whole)
        if place.offset < 460 and place.offset + place.size > 200
    ]
    report = repaired(folder)
    assert set(touched) & set(whole) <= sequences(report)
    assert len(sequences(report)) <= len(touched) + 1
    assert booted(folder) == [sequence for sequence in whole if sequence not in sequences(report)]


def places_of(folder: Path, path: Path, whole: list[int]) -> list[Place]:
    """The lines of a file as they were before its damage, from the sequences and equal sizes of a filled journal."""
    twin = folder.with_name("twin")
    filled(twin)
    return [place for place in places(twin) if place.path.name == path.name]


def test_a_missing_segment_costs_its_records(folder: Path) -> None:
    whole = filled(folder)
    path = files_of(folder)[2]
    gone = {place.sequence for place in places(folder) if place.path == path}
    path.unlink()
    report = repaired(folder)
    assert sequences(report) == gone & set(whole)
    assert booted(folder) == [sequence for sequence in whole if sequence not in gone]


@pytest.mark.parametrize("how", ["missing", "damaged", "too old"])
def test_a_manifest_costs_nothing(folder: Path, how: str) -> None:
    life = Life(folder, Files())
    life.close()
    older = (folder / "MANIFEST").read_bytes()
    whole = filled(folder)
    if how == "damaged":
        flip(folder / "MANIFEST", 30)
    elif how == "missing":
        (folder / "MANIFEST").unlink()
    else:
        (folder / "MANIFEST").write_bytes(older)
    report = repaired(folder)
    assert (report.lost, report.stretches) == ((), ()) if how != "too old" else report.lost == ()
    assert booted(folder) == whole


def test_a_missing_active_segment_costs_what_nobody_can_tell_and_its_sequences_are_not_given_again(
    folder: Path,
) -> None:
    whole = filled(folder)
    path = files_of(folder)[-1]
    first = min(place.sequence for place in places(folder) if place.path == path)
    path.unlink()
    report = repaired(folder)
    assert report.head > first
    assert booted(folder) == [sequence for sequence in whole if sequence < first]


def test_an_index_is_no_part_of_a_journal(folder: Path) -> None:
    whole = filled(folder)
    next(folder.glob("*.idx")).unlink()
    report = repair(folder, accept_loss=True)
    assert (report.damage, report.repaired) == (None, False)
    assert booted(folder) == whole


def test_a_torn_write_is_no_damage_and_a_sound_journal_is_left_as_it_is(folder: Path) -> None:
    filled(folder)
    with files_of(folder)[-1].open("ab") as stream:
        stream.write(b'{"v":1,"seq":')
    before = content(folder)
    report = repair(folder, accept_loss=True)
    assert (report.damage, report.repaired, report.epoch) == (None, False, 1)
    assert content(folder) == before


def test_damage_before_a_torn_write_does_not_make_the_torn_write_a_loss(folder: Path) -> None:
    whole = filled(folder)
    place = next(place for place in places(folder) if place.op == "put" and place.path == files_of(folder)[2])
    with files_of(folder)[-1].open("ab") as stream:
        stream.write(b'{"v":1,"seq":')
    flip(place.path, place.offset + 60)
    assert sequences(repaired(folder)) == {place.sequence}
    assert booted(folder) == [sequence for sequence in whole if sequence != place.sequence]


def test_readers_of_changes_have_to_start_over_and_the_journal_goes_on(folder: Path) -> None:
    filled(folder)
    files_of(folder)[1].unlink()
    report = repaired(folder)
    life = Life(folder, Files())
    journal = life.journal
    assert (journal.epoch, journal.changes_from) == (report.epoch, journal.head - 1)
    assert report.kept is not None
    assert list((folder / report.kept).iterdir()), "a boot leaves it"
    life.put([{"n": 99}])
    life.compact()
    life.put([{"n": 100}])
    life.close()
    assert [entry.record["n"] for entry in boot(folder, Files())][-2:] == [99, 100]


def test_a_journal_in_use_is_not_repaired(folder: Path) -> None:
    filled(folder)
    lock = FolderLock(folder)
    with pytest.raises(JournalLocked):
        repair(folder, accept_loss=True)
    lock.release()


def test_what_is_beyond_repair_is_told_and_left_as_it_is(folder: Path) -> None:
    filled(folder)
    paths = files_of(folder)
    (folder / "MANIFEST").unlink()
    for path in paths:
        path.write_bytes(bytes(path.stat().st_size))
    before = content(folder)
    with pytest.raises(JournalBeyondRepair):
        repair(folder, accept_loss=True)
    assert content(folder) == before
    with pytest.raises(FileNotFoundError):
        repair(folder.parent, accept_loss=True)


def without_open_lines(folder: Path) -> None:
    for path in files_of(folder):
        flip(path, 20)
    (folder / "MANIFEST").unlink()


def of_two_registries(folder: Path) -> None:
    other = folder.with_name("other")
    filled(other)
    (folder / "MANIFEST").unlink()
    name = files_of(other)[2].name
    shutil.copy(other / name, folder / name)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(without_open_lines, "which registry"), (of_two_registries, "several registries")],
)
def test_a_registry_that_cannot_be_told_is_not_made_up(
    folder: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    filled(folder)
    spoil(folder)
    with pytest.raises(JournalBeyondRepair, match=reason):
        repair(folder, accept_loss=True)


def test_a_file_of_another_registry_is_not_taken_in(folder: Path) -> None:
    whole = filled(folder)
    other = folder.with_name("other")
    filled(other)
    name = files_of(folder)[2].name
    theirs = {place.sequence for place in places(folder) if place.path.name == name}
    shutil.copy(other / name, folder / name)
    assert sequences(repaired(folder)) == theirs & set(whole)
    assert booted(folder) == [sequence for sequence in whole if sequence not in theirs]


@pytest.mark.parametrize("seed", range(8))
def test_records_whose_predecessors_are_lost_do_not_break_the_catalog(folder: Path, seed: int) -> None:
    async def history() -> None:
        registry = opened(folder)
        registry.start()
        made = History(seed)
        for _ in range(200):
            await append(registry, *made.next())
        await registry.close()

    asyncio.run(history())
    choose = random.Random(seed)
    of_records = [place for place in places(folder) if place.op not in CONTROL]
    damaged = choose.sample(of_records[:-1], 60)
    for place in damaged:
        flip(place.path, place.offset + 50)
    report = repaired(folder)
    assert sequences(report) == {place.sequence for place in damaged}
    registry = opened(folder)
    seen = view(registry)
    table = registry.catalog.table
    there = [(table.model[row], table.version[row]) for row in range(len(table)) if registry.catalog.has_row(row)]
    assert len(set(there)) == len(there)
    assert seen["totals"].versions == table.visible().sum()
    asyncio.run(registry.close())

    async def go_on() -> None:
        registry = opened(folder)
        registry.start()
        for name in {model for model, *_ in registry.catalog.aliases.items()} | set(seen["versions"]):
            versions = [entry.version for entry, _ in seen["versions"].get(name, ([], {}))[0]]
            await append(registry, "purge", {"model": name, "versions": versions})
        assert registry.catalog.totals.versions == 0
        assert len(registry.catalog.blobs) == 0
        await registry.close()

    asyncio.run(go_on())


@pytest.mark.parametrize("gone", [False, True], ids=["and kept", "and purged again"])
def test_a_version_whose_purge_is_lost_is_not_there_beside_the_one_stored_after_it(folder: Path, gone: bool) -> None:
    purge = {"model": "net", "versions": ["1.0"]}

    async def history() -> None:
        registry = opened(folder)
        registry.start()
        await append(registry, "store", store("other", "1.0", 1))
        await append(registry, "store", store("net", "1.0", 2))
        await append(registry, "purge", purge)
        await append(registry, "store", store("net", "1.0", 3))
        await append(registry, "alias", {"model": "net", "alias": "best", "version": "1.0", "previous": None})
        if gone:
            await append(registry, "purge", purge)
        await registry.close()

    asyncio.run(history())
    whole = view_of(folder)
    place = next(place for place in places(folder) if place.op == "purge")
    flip(place.path, place.offset + 50)
    assert sequences(repaired(folder)) == {place.sequence}
    assert view_of(folder) == whole

    async def go_on() -> None:
        registry = opened(folder)
        registry.start()
        await compact_here(registry)
        await append(registry, "purge", purge)
        assert registry.catalog.totals == Totals(models=1, versions=1, bytes=11)
        await registry.close()

    asyncio.run(go_on())
    assert set(view_of(folder)["versions"]) == {"other"}


def view_of(folder: Path) -> dict[str, Any]:
    return asyncio.run(view_after_boot(folder))


def test_a_repair_that_was_made_survives_a_power_cut() -> None:
    disk = Disk()
    life = Life(FOLDER, disk)
    life.put([{"n": n} for n in range(4)])
    life.close()
    name = read_manifest(disk, FOLDER).active
    fd = disk.open(FOLDER / name, os.O_RDWR)
    disk.pwrite(fd, b"?", disk.reader(FOLDER / name).read().index(b'{"n":1}'))
    disk.fdatasync(fd)
    assert repair(FOLDER, accept_loss=True, files=disk).repaired
    assert [entry.record["n"] for entry in boot(FOLDER, disk.after_cut(()))] == [0, 2, 3]


class Swallowing(Files):
    """A disk that says it has written the seal of a base, and has not."""

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        if bytes(data).startswith(b'{"v":1,') and b'"op":"seal"' in bytes(data)[:80]:
            return len(data)
        return super().pwrite(fd, data, offset)


def test_a_base_that_is_not_on_the_disk_as_it_was_written_is_not_taken(tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    filled(folder)
    flip(files_of(folder)[1], 200)
    with pytest.raises(OSError, match="read back"):
        repair(folder, accept_loss=True, files=Swallowing())
    with pytest.raises(JournalDamaged):
        booted(folder)
    assert repair(folder, accept_loss=True).repaired
