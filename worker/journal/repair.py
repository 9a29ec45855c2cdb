"""The way past a refused boot without a backup: what still checks becomes a journal of its own, in a new epoch.

Each step may be the last one before a crash. All files get a second name in `damaged-<time>/`, durably; the salvaged
records are written as a base, and a fresh segment behind it; MANIFEST is published, which is the commit; the old files
lose their first name. Before the commit the folder refuses as it did, after it the next boot ends what is left to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.journal.boot import Place, open_line, replay_base
from worker.journal.compaction import Base, write_bodies
from worker.journal.failures import JournalDamaged
from worker.journal.files import Files, publish, sync_folder
from worker.journal.inspection import Damage, verify
from worker.journal.manifest import (
    MANIFEST,
    Manifest,
    SealedFile,
    base_name,
    is_base,
    read_manifest,
    segment_first,
    segment_name,
)
from worker.journal.replay import EachEntry
from worker.journal.salvage import SalvagedFile, Stretch, UnknownFormat, salvage
from worker.journal.segment import Digest
from worker.journal.tidying import free_name

_DISK = Files()


class JournalBeyondRepair(Exception):
    """Nothing was changed; str() says why there is nothing to make a journal of."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Records from sequence `first` to `last`; where a base was damaged, at most those."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class RepairReport:
    """`damage` is the first that a boot would find, None if there is none. `stretches` are the bytes that do not check,
    `lost` the records that are gone with them, `records` those that still check, up to the sequence `head`.

    `epoch` is the journal's; it is a new one if it was `repaired`, and `kept` names the folder with the old files then.
    """

    registry_id: str
    epoch: int
    head: int
    records: int
    damage: Damage | None
    stretches: tuple[Stretch, ...] = ()
    lost: tuple[Lost, ...] = ()
    repaired: bool = False
    kept: str | None = None


def repair(
    folder: Path, *, accept_loss: bool, files: Files = _DISK, clock: Callable[[], float] = time.time
) -> RepairReport:
    """Tell what of the journal in `folder` is damaged, and what is lost with that. With `accept_loss` go on without it:
    the records that still check are the journal then, under the next epoch. A sound journal is left as it is.

    Raises JournalLocked if another process owns the folder, JournalBeyondRepair, FileNotFoundError if there is no
    journal, OSError, SyncFailed.
    """
    if not any(_is_ours(name) for name in files.list(folder)):
        raise FileNotFoundError
    lock = files.lock(folder)
    try:
        damage = _first_damage(files, folder)
        if damage is None:
            found = verify(folder, files=files)
            return RepairReport(found.registry_id, found.epoch, found.head, found.records, None)
        survey = _Survey(files, folder)
        report = survey.report(damage)
        if not accept_loss:
            return report
        manifest, kept = _Repair(files, folder, survey, clock).run()
        return RepairReport(
            registry_id=report.registry_id,
            epoch=manifest.epoch,
            head=report.head + 1,
            records=report.records,
            damage=damage,
            stretches=report.stretches,
            lost=report.lost,
            repaired=True,
            kept=kept,
        )
    finally:
        lock.release()


def _is_ours(name: str) -> bool:
    return name == MANIFEST or is_base(name) or segment_first(name) is not None


def _first_damage(files: Files, folder: Path) -> Damage | None:
    try:
        return verify(folder, files=files).damage
    except JournalDamaged as error:
        return Damage(error.path, error.offset, error.sequence, error.reason)
    except FileNotFoundError:
        return Damage(MANIFEST, 0, 0, "the file is missing")


class _Survey:
    """All that still checks in the files of a journal that is damaged."""

    def __init__(self, files: Files, folder: Path) -> None:
        self.files = files
        self.folder = folder
        self.names = [name for name in files.list(folder) if is_base(name) or segment_first(name) is not None]
        self.manifest = self._manifest()
        self.sealed: dict[str, SealedFile] = {}
        if self.manifest is not None:
            self.sealed = {file.name: file for file in self.manifest.sealed}
        self.salvaged: list[SalvagedFile] = []
        self._salvage_all()
        opened = [file.opened for file in self.salvaged if file.opened is not None]
        self.registry_id, self.epoch = self._identity(opened)
        stretches = [stretch for file in self.salvaged for stretch in file.stretches]
        self.records = len(set().union(*(file.sequences for file in self.salvaged)))
        if not self.records:
            raise JournalBeyondRepair("there is no record in it that checks")
        firsts = [segment_first(name) or 0 for name in self.names]
        # No sequence that may have been given is given again, and no segment's name.
        self.head = max(
            *firsts, *(file.sequence for file in self.salvaged), *(stretch.last for stretch in stretches), 0
        )
        self.stretches = tuple(stretches)

    def report(self, damage: Damage) -> RepairReport:
        lost = tuple(self._lost())
        return RepairReport(self.registry_id, self.epoch, self.head, self.records, damage, self.stretches, lost)

    def bodies(self) -> Iterator[bytes]:
        """The lines of the business records without their crc, each sequence once, ascending."""
        last = 0
        for file in self.salvaged:
            if not file.sequences:
                continue
            with self.files.reader(self.folder / file.name) as stream:
                for sequence, body in file.records(stream):
                    if sequence > last:
                        last = sequence
                        yield body

    def _manifest(self) -> Manifest | None:
        try:
            return read_manifest(self.files, self.folder)
        except (FileNotFoundError, JournalDamaged):
            return None

    def _order(self) -> list[str]:
        """The files that count, in order: those of MANIFEST and newer ones; without it, what their names tell."""
        segments = [name for name in self.names if not is_base(name)]
        bases = [name for name in self.names if is_base(name)]
        if self.manifest is not None:
            named = self.manifest.names
            if set(named) <= set(self.names) or not set(bases) - set(named):
                active = segment_first(self.manifest.active) or 0
                return [*named, *(name for name in segments if (segment_first(name) or 0) > active)]
        # A base has its name only once it is complete, and the last one stands for the segments before it.
        if not bases:
            return segments
        base = self._salvaged(bases[-1], None, None, is_active=False)
        return [base.name, *(name for name in segments if (segment_first(name) or 0) > base.sequence)]

    def _salvage_all(self) -> None:
        names = self._order()
        crc: int | None = 0
        for name, following in zip(names, [*names[1:], None], strict=True):
            until = None if following is None else (segment_first(following) or 1) - 1
            if name in self.names:
                file = self._salvaged(name, crc, until, is_active=following is None)
                if self._is_of_another(file):
                    file = _nothing_of(name, until)
            else:
                file = _nothing_of(name, until)
            self.salvaged.append(file)
            crc = int(file.opened["replaces"]["crc"], 16) if is_base(name) and file.opened else file.crc

    def _salvaged(self, name: str, crc: int | None, until: int | None, *, is_active: bool) -> SalvagedFile:
        try:
            with self.files.reader(self.folder / name) as stream:
                return salvage(stream, name, crc=crc, until=until, is_active=is_active)
        except UnknownFormat as error:
            raise JournalBeyondRepair(str(error)) from None

    def _is_of_another(self, file: SalvagedFile) -> bool:
        """Whether it is of another registry than MANIFEST."""
        if self.manifest is None or file.opened is None:
            return False
        return bool(file.opened["registryId"] != self.manifest.registry_id)

    def _identity(self, opened: list[dict[str, Any]]) -> tuple[str, int]:
        if self.manifest is not None:
            return self.manifest.registry_id, self.manifest.epoch
        ids = {record["registryId"] for record in opened}
        if len(ids) != 1:
            text = "no file tells which registry this is" if not ids else "there are files of several registries"
            raise JournalBeyondRepair(f"MANIFEST is missing or damaged, and {text}")
        return ids.pop(), max(record["epoch"] for record in opened)

    def _lost(self) -> Iterator[Lost]:
        """Of the sequences that are missing those that may have been records."""
        firsts = {segment_first(name) or 0 for name in (*self.names, *(file.name for file in self.salvaged))}
        control = firsts | {first - 1 for first in firsts}
        for file in self.salvaged:
            sealed = self.sealed.get(file.name)
            if is_base(file.name) and sealed is not None and len(file.sequences) == sealed.lines - 2:
                continue
            for stretch in file.stretches:
                first, last = max(1, stretch.first), stretch.last
                while first <= last and first in control:
                    first += 1
                while last >= first and last in control:
                    last -= 1
                if first <= last:
                    yield Lost(first, last)


def _nothing_of(name: str, until: int | None) -> SalvagedFile:
    """A file that is not there, or does not belong there."""
    file = SalvagedFile(name)
    first = 1 if is_base(name) else file.sequence + 1
    file.stretches.append(Stretch(name, 0, 0, first, first if until is None else until))
    return file


class _Repair:
    def __init__(self, files: Files, folder: Path, survey: _Survey, clock: Callable[[], float]) -> None:
        self._files = files
        self._folder = folder
        self._survey = survey
        self._now = clock()
        self._old = [name for name in files.list(folder) if _is_ours(name) or is_base(name[:-4] + ".jsonl")]

    def run(self) -> tuple[Manifest, str]:
        """The new MANIFEST, and the name of the folder with all that was there before."""
        files, folder = self._files, self._folder
        kept = self._keep()
        begun = self._begin()
        base, manifest = self._write(begun)
        files.rename(folder / f"{base.file.name}.tmp", folder / base.file.name)
        place = self._place()
        line, _ = open_line(
            place.sequence + 1, place.crc, time_ms=int(self._now * 1000), manifest=manifest, previous=place.name
        )
        publish(files, folder, manifest.active, line)
        manifest.publish(files, folder)
        for name in self._old:
            if name != MANIFEST:
                files.unlink(folder / name)  # or the next boot does, as the base stands for them
        return manifest, kept

    def _keep(self) -> str:
        files, folder = self._files, self._folder
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._now))
        kept = free_name(f"damaged-{stamp}", "", files.list(folder))
        files.mkdir(folder / kept)
        for name in self._old:
            files.link(folder / name, folder / kept / name)
        # Its own name becomes durable with that of the segment.
        sync_folder(files, folder / kept)
        return kept

    def _begin(self) -> Manifest:
        """The registry under its next epoch, without files."""
        survey = self._survey
        bases = [int(name.removeprefix("base-").removesuffix(".jsonl")) for name in survey.names if is_base(name)]
        # Without MANIFEST: each of these files has raised it by one, since the last base got its name from it.
        known = len(survey.names) if survey.manifest is None else survey.manifest.generation
        generation = max(known, max(bases, default=0) + len(survey.names)) + 1
        return Manifest(survey.registry_id, survey.epoch + 1, generation, (), segment_name(survey.head + 1))

    def _place(self) -> Place:
        """What the base stands for."""
        last = self._survey.salvaged[-1]
        return Place(self._survey.head, last.crc or 0, last.name)

    def _write(self, begun: Manifest) -> tuple[Base, Manifest]:
        """The base under its name and `.tmp`, read back, and the MANIFEST that names it."""
        files, folder, place = self._files, self._folder, self._place()
        base = write_bodies(
            files,
            folder,
            base_name(begun.generation),
            begun,
            place,
            self._survey.bodies(),
            changes_from=place.sequence,
            time_ms=int(self._now * 1000),
        )
        path = folder / f"{base.file.name}.tmp"
        found: list[int] = []
        replay_base(files, path, EachEntry(lambda entry: found.append(entry.sequence)))
        with files.reader(path) as stream:
            if Digest.of(stream).sealed(base.file.name) != base.file or len(found) != self._survey.records:
                raise OSError("the base that was written is not what was read back")
        return base, Manifest(begun.registry_id, begun.epoch, begun.generation, (base.file,), begun.active)
