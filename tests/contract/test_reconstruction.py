"""A journal made anew of the files of an earlier one, up to its end or to any point before."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.disk import Disk
from tests.crash.life import Life, boot
from tests.crash.stage import FOLDER
from tests.rack import LocalRack
from worker.journal import Entry, Journal, JournalDamaged, dump, verify
from worker.journal.backup import backup
from worker.journal.files import Files
from worker.journal.format import CONTROL_OPS
from worker.journal.manifest import read_manifest
from worker.journal.reconstruction import PointUnreachable, Reconstructed, Reconstruction, Until
from worker.upkeep.compaction import compact_folder
from worker.upkeep.restore import restore


class Clock:
    """A second later at each look."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


async def filled(folder: Path, records: int, *, segment_bytes: int = 400) -> list[Entry]:
    """A closed journal with that many records in several segments, one batch and one second each."""
    journal = Journal.open(folder, replay=lambda _: None, segment_bytes=segment_bytes, clock=Clock())
    journal.start(lambda _: None)
    entries = [await journal.append("put", {"n": number}) for number in range(records)]
    await journal.close()
    return entries


def reconstructed(source: Path, folder: Path, until: Until, epoch: int = 2) -> Reconstructed:
    names = read_manifest(Files(), source).names
    folder.mkdir()
    work = Reconstruction(folder, epoch=epoch, until=until)
    for name in names:
        shutil.copy(source / name, folder / name)
        if not work.take(name):
            break
    return work.finish()


def business(entries: Iterator[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.op not in CONTROL_OPS]


async def booted(folder: Path) -> list[Entry]:
    entries: list[Entry] = []
    journal = Journal.open(folder, replay=entries.append)
    await journal.close()
    return entries


async def test_every_sequence_can_be_the_end(tmp_path: Path) -> None:
    entries = await filled(tmp_path / "old", 12)
    lines = list(dump(tmp_path / "old"))
    assert sum(line.op == "seal" for line in lines) > 2
    for line in lines:
        folder = tmp_path / f"until-{line.sequence}"
        done = reconstructed(tmp_path / "old", folder, Until(sequence=line.sequence))
        wanted = [entry for entry in entries if entry.sequence <= line.sequence]
        assert (done.head, done.records, done.epoch) == (line.sequence, len(wanted), 2)
        assert verify(folder).damage is None
        assert await booted(folder) == wanted


async def test_every_time_can_be_the_end(tmp_path: Path) -> None:
    entries = await filled(tmp_path / "old", 8)
    for entry in entries:
        folder = tmp_path / f"until-{entry.sequence}"
        done = reconstructed(tmp_path / "old", folder, Until(time_ms=entry.time_ms))
        assert done.time_ms == entry.time_ms
        assert await booted(folder) == [each for each in entries if each.time_ms <= entry.time_ms]


async def test_it_goes_on_in_a_new_epoch_of_the_same_registry(tmp_path: Path) -> None:
    entries = await filled(tmp_path / "old", 5)
    before = verify(tmp_path / "old")
    reconstructed(tmp_path / "old", tmp_path / "new", Until(), epoch=7)
    journal = Journal.open(tmp_path / "new", replay=lambda _: None)
    assert (journal.registry_id, journal.epoch) == (before.registry_id, 7)
    journal.start(lambda _: None)
    added = await journal.append("put", {"n": "new"})
    await journal.close()
    assert added.sequence > before.head
    assert await booted(tmp_path / "new") == [*entries, added]


async def test_a_compacted_journal_leads_to_every_point_behind_its_base(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    for number in range(4):
        await rack.store_bytes("net", f"1.{number}.0", b"bytes")
    await rack.call("deleteModel", {"modelId": "net", "version": "1.0.0", "purge": True})
    await rack.close()
    await compact_folder(tmp_path / "registry")
    rack = LocalRack(tmp_path).open()
    head = rack.registry.journal.head
    await rack.store_bytes("net", "2.0.0", b"other bytes")
    await rack.close()
    base = read_manifest(Files(), tmp_path / "registry").base
    assert base is not None

    reconstructed(tmp_path / "registry", tmp_path / "whole", Until())
    reconstructed(tmp_path / "registry", tmp_path / "before", Until(sequence=head))
    for name, versions in (("whole", 4), ("before", 3)):
        again = LocalRack(tmp_path)
        again.registry = type(again.registry)(tmp_path / name)
        await asyncio.to_thread(again.registry.open)
        assert again.registry.catalog.totals.versions == versions
        await again.registry.close()
    with pytest.raises(PointUnreachable, match="stands for"):
        reconstructed(tmp_path / "registry", tmp_path / "too-early", Until(sequence=3))
    with pytest.raises(PointUnreachable, match="stands for"):
        reconstructed(tmp_path / "registry", tmp_path / "too-old", Until(time_ms=1))


async def test_a_point_before_the_first_line_is_told(tmp_path: Path) -> None:
    await filled(tmp_path / "old", 2)
    with pytest.raises(PointUnreachable, match="no record"):
        reconstructed(tmp_path / "old", tmp_path / "new", Until(time_ms=1))


async def test_damage_before_the_point_is_refused_and_behind_it_does_not_matter(tmp_path: Path) -> None:
    entries = await filled(tmp_path / "old", 12)
    last = read_manifest(Files(), tmp_path / "old").names[-2]
    file = tmp_path / "old" / last
    data = bytearray(file.read_bytes())
    data[data.rindex(b'"n":') + 4] ^= 1
    file.write_bytes(data)
    with pytest.raises(JournalDamaged, match=last):
        reconstructed(tmp_path / "old", tmp_path / "all", Until())
    reconstructed(tmp_path / "old", tmp_path / "some", Until(sequence=entries[3].sequence))
    assert await booted(tmp_path / "some") == entries[:4]


async def test_a_file_that_is_not_the_next_one_is_refused(tmp_path: Path) -> None:
    await filled(tmp_path / "old", 12)
    first, _, third, *_ = read_manifest(Files(), tmp_path / "old").names
    (tmp_path / "new").mkdir()
    work = Reconstruction(tmp_path / "new", epoch=2, until=Until())
    for name in (first, third):
        shutil.copy(tmp_path / "old" / name, tmp_path / "new" / name)
    assert work.take(first)
    with pytest.raises(JournalDamaged, match=third):
        work.take(third)


def test_a_restore_that_was_made_survives_a_power_cut() -> None:
    disk = Disk()
    life = Life(FOLDER, disk)
    life.put([{"n": number} for number in range(5)])
    left = disk.copy()
    life.close()
    backup(FOLDER, FOLDER.with_name("backup"), files=left, patience_s=0)
    elsewhere = FOLDER.with_name("elsewhere")
    restore(FOLDER.with_name("backup"), elsewhere, epoch=2, until=Until(), progress=lambda *_: None, files=left)
    assert len(boot(elsewhere, left.after_cut(()))) == 5
