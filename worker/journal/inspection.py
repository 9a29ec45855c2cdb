"""Reading a journal from outside: no lock is taken, nothing is written, and a worker may be running."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from worker.journal.boot import STALE_MANIFEST, Place, newer_segment, open_fault, place_of_base
from worker.journal.failures import JournalDamaged
from worker.journal.files import Files
from worker.journal.format import CONTROL_OPS, CheckedLines, Entry, Line, line_decoder
from worker.journal.manifest import SealedFile, is_base, read_manifest
from worker.journal.segment import Digest
from worker.journal.torn import judge

_DISK = Files()
_DECODER = line_decoder(dict[str, Any])


@dataclass(frozen=True, slots=True)
class Damage:
    """The first bad line: file name, byte where it starts, the sequence it should have, and what is wrong."""

    path: str
    offset: int
    sequence: int
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was found up to the end, or up to the first damage.

    `lines` are all, `records` the business ones, `head` is the last good sequence; `torn_bytes` are those of a write
    that is not finished, by a crash or right now.
    """

    registry_id: str
    epoch: int
    generation: int
    files: int
    lines: int
    records: int
    bytes: int
    head: int
    torn_bytes: int
    damage: Damage | None


def verify(folder: Path, *, files: Files = _DISK) -> VerifyReport:
    """Check every byte of the journal in `folder`: each line's chain, each sealed file's crc32 and sha256. Blocks.

    Raises FileNotFoundError if there is no MANIFEST, JournalDamaged if it does not check.
    """
    seen: int | None = None
    while True:
        report = _Walk(files, folder).report()
        # The owner may have compacted, rotated or taken back a batch under our eyes; damage stays, that does not.
        if report.damage is None or report.generation == seen:
            return report
        seen = report.generation


def dump(folder: Path, *, files: Files = _DISK) -> Iterator[Entry]:
    """Every line that checks, those of the journal itself too, in order. Beside a running worker the last batch may not
    be durable yet.

    Raises JournalDamaged at the first damage, FileNotFoundError if there is no MANIFEST.
    """
    return _Walk(files, folder).lines()


class _Walk:
    """One way through all files that MANIFEST names, with what was counted on it."""

    def __init__(self, files: Files, folder: Path) -> None:
        self._files = files
        self._folder = folder
        self.manifest = read_manifest(files, folder)
        # Before the active file is read: when a rotation has made a newer one, its seal is there to be found.
        self._names = files.list(folder)
        self._place = Place()
        self._lines = 0
        self._records = 0
        self._bytes = 0
        self._torn_bytes = 0
        self._last_op = ""

    def report(self) -> VerifyReport:
        damage: Damage | None = None
        try:
            for entry in self.lines():
                self._lines += 1
                self._records += entry.op not in CONTROL_OPS
            self._check_newer_segments()
        except JournalDamaged as error:
            damage = Damage(error.path, error.offset, error.sequence, error.reason)
        return VerifyReport(
            registry_id=self.manifest.registry_id,
            epoch=self.manifest.epoch,
            generation=self.manifest.generation,
            files=len(self.manifest.names),
            lines=self._lines,
            records=self._records,
            bytes=self._bytes,
            head=self._place.sequence,
            torn_bytes=self._torn_bytes,
            damage=damage,
        )

    def lines(self) -> Iterator[Entry]:
        sealed = {file.name: file for file in self.manifest.sealed}
        for name in self.manifest.names:
            try:
                yield from self._lines_of(name)
            except FileNotFoundError:
                self._refuse(name, 0, "the file is missing")
            if name in sealed:
                self._check_sealed(sealed[name])

    def _lines_of(self, name: str) -> Iterator[Entry]:
        before, size, base = self._place, self._bytes, is_base(name)
        with self._files.reader(self._folder / name) as stream:
            lines = CheckedLines(
                stream,
                _DECODER,
                sequence=-1 if base else before.sequence,
                crc=0 if base else before.crc,
                gapless=not base,
            )
            for _, line in lines:
                if self._bytes == size:
                    before = self._begin(name, before, line)
                self._place = before if base else Place(lines.sequence, lines.crc, name)
                self._last_op = line.op
                self._bytes = size + lines.offset
                yield Entry(line.sequence, line.time_ms, line.op, line.record)
            if lines.fault:
                stream.seek(lines.offset)
                self._judge(name, lines, stream.read())
        if not lines.offset:
            self._refuse(name, 0, "the file is empty")

    def _begin(self, name: str, before: Place, line: Line[dict[str, Any]]) -> Place:
        """Check the first line of a file: where the next file goes on from, if it is a base, else `before`."""
        if is_base(name):
            return place_of_base(line.record)
        if fault := open_fault(self.manifest, before, line.op, line.record):
            self._refuse(name, 0, fault)
        return before

    def _judge(self, name: str, lines: CheckedLines[dict[str, Any]], rest: bytes) -> None:
        if name != self.manifest.active or lines.foreign or not lines.offset:
            self._refuse(name, lines.offset, str(lines.fault))
        if reason := judge(rest, offset=lines.offset, sequence=lines.sequence + 1, crc=lines.crc):
            self._refuse(name, lines.offset, f"{lines.fault}; {reason}")
        self._torn_bytes = len(rest)

    def _check_sealed(self, sealed: SealedFile) -> None:
        with self._files.reader(self._folder / sealed.name) as stream:
            if Digest.of(stream).sealed(sealed.name) != sealed:
                self._refuse(sealed.name, 0, "the sealed file does not have its size, lines and checksums")

    def _check_newer_segments(self) -> None:
        name = newer_segment(self._files, self._folder, self.manifest, self._place.sequence, self._last_op)
        # A rotation that ended meanwhile has replaced MANIFEST by then, and it was not too old.
        if name in self._names and read_manifest(self._files, self._folder).generation == self.manifest.generation:
            self._refuse(name, 0, STALE_MANIFEST)

    def _refuse(self, name: str, offset: int, reason: str) -> NoReturn:
        raise JournalDamaged(name, offset=offset, sequence=self._place.sequence + 1, reason=reason)
