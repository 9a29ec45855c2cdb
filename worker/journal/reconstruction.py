"""A journal that begins a new life: made of the files of an earlier one, up to its end or to a point before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import orjson

from worker.journal.boot import Place, open_fault, open_line, place_of_base
from worker.journal.failures import JournalDamaged
from worker.journal.files import Files, publish, sync, write_all
from worker.journal.format import CONTROL_OPS, SEAL, CheckedLines, Line, line_decoder, make_line
from worker.journal.manifest import Manifest, SealedFile, is_base, segment_first, segment_name
from worker.journal.segment import Digest

_DISK = Files()
_DECODER = line_decoder(dict[str, Any])


class PointUnreachable(Exception):
    """The files do not lead to that point: they begin behind it. Nothing is wrong with them."""


@dataclass(frozen=True, slots=True)
class Until:
    """The point to stop at: behind the line `sequence`, or before the first line that was written after `time_ms`."""

    sequence: int | None = None
    time_ms: int | None = None

    def reaches(self, sequence: int, time_ms: int) -> bool:
        """Whether a line with this sequence and time lies before the point."""
        return (self.sequence is None or sequence <= self.sequence) and (
            self.time_ms is None or time_ms <= self.time_ms
        )


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """`records` business records in `bytes`; `head` is the sequence of the last line that was taken over, and
    `time_ms` when the last record was written (0: there is none)."""

    registry_id: str
    epoch: int
    head: int
    time_ms: int
    records: int
    bytes: int


class Reconstruction:
    """`take` each file in order, a base first, then `finish`. The files lie in `folder` already, and nobody else is at
    them; the folder is a journal only when `finish` has returned.
    """

    def __init__(
        self,
        folder: Path,
        *,
        epoch: int,
        until: Until,
        files: Files = _DISK,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`epoch` is the new one."""
        self._folder = folder
        self._epoch = epoch
        self._until = until
        self._files = files
        self._clock = clock
        self._registry_id = ""
        self._sealed: list[SealedFile] = []
        self._place = Place()
        self._last_op = SEAL
        self._digest = Digest()
        self._name = ""
        self._records = 0
        self._time_ms = 0

    @property
    def head(self) -> int:
        """The sequence of the last line that was taken."""
        return self._place.sequence

    def take(self, name: str) -> bool:
        """Check every line of the next file, and cut it at the point to stop at: whether another file is wanted.

        Raises JournalDamaged if it is not the next one or a line does not check, PointUnreachable if it is a base that
        stands for more than is wanted; OSError, SyncFailed.
        """
        if self._last_op != SEAL:
            self._refuse(name, 0, "the file before it does not end in its seal")
        digest = Digest()
        with self._files.reader(self._folder / name) as stream:
            stopped = self._take_lines(name, stream, digest)
        if not digest.lines:
            self._files.unlink(self._folder / name)
            return False
        self._name, self._digest = name, digest
        self._sealed.append(digest.sealed(name))
        self._keep(name, digest.size)
        return not stopped

    def _take_lines(self, name: str, stream: BinaryIO, digest: Digest) -> bool:
        """Whether a line lies behind the point to stop at; the lines before it are counted in."""
        base, before = is_base(name), self._place
        lines = CheckedLines(
            stream,
            _DECODER,
            sequence=-1 if base else before.sequence,
            crc=0 if base else before.crc,
            gapless=not base,
        )
        for data, line in lines:
            if not digest.lines:
                self._begin(name, line)
            if not base:
                if not self._until.reaches(line.sequence, line.time_ms):
                    return True
                self._place = Place(line.sequence, lines.crc, name)
            digest.update(data)
            self._last_op = line.op
            if line.op not in CONTROL_OPS:
                self._records += 1
                self._time_ms = line.time_ms
        if lines.fault:
            self._refuse(name, lines.offset, lines.fault)
        return False

    def _begin(self, name: str, line: Line[dict[str, Any]]) -> None:
        """Check the first line of a file; of a base, take up where the file behind it goes on."""
        self._registry_id = self._registry_id or str(line.record.get("registryId"))
        if is_base(name):
            place = place_of_base(line.record)
            if self._sealed:
                self._refuse(name, 0, "a base that is not the first file")
            if not self._until.reaches(place.sequence, line.time_ms):
                raise PointUnreachable(f"{name} stands for all up to sequence {place.sequence}")
            self._place = place
            return
        if segment_first(name) != self._place.sequence + 1:
            self._refuse(name, 0, "the file is not the one that comes next")
        if fault := open_fault(self._manifest(name), self._place, line.op, line.record):
            self._refuse(name, 0, fault)

    def _keep(self, name: str, size: int) -> None:
        fd = self._files.open(self._folder / name, os.O_RDWR)
        try:
            self._files.ftruncate(fd, size)
            sync(self._files, fd)
        finally:
            self._files.close(fd)

    def finish(self) -> Reconstructed:
        """Begin the new epoch behind the last line: from now on `folder` is a journal.

        Raises PointUnreachable if nothing was taken; OSError, SyncFailed.
        """
        if not self._sealed:
            raise PointUnreachable("no record is that old")
        head = self._place.sequence
        if self._last_op != SEAL:
            self._seal()
        active = segment_name(self._place.sequence + 1)
        manifest = self._manifest(active)
        line, _ = open_line(
            self._place.sequence + 1,
            self._place.crc,
            time_ms=self._now(),
            manifest=manifest,
            previous=self._place.name,
        )
        publish(self._files, self._folder, active, line)
        manifest.publish(self._files, self._folder)
        return Reconstructed(
            registry_id=self._registry_id,
            epoch=self._epoch,
            head=head,
            time_ms=self._time_ms,
            records=self._records,
            bytes=sum(file.size for file in self._sealed),
        )

    def _seal(self) -> None:
        sequence, digest = self._place.sequence + 1, self._digest
        record = {"lines": digest.lines, "sha256": digest.sha256}
        payload = b'"op":"seal","rec":%b' % orjson.dumps(record)
        line, crc = make_line(sequence, sequence, self._now(), payload, self._place.crc)
        fd = self._files.open(self._folder / self._name, os.O_RDWR)
        try:
            write_all(self._files, fd, line, digest.size)
            sync(self._files, fd)
        finally:
            self._files.close(fd)
        digest.update(line)
        self._sealed[-1] = digest.sealed(self._name)
        self._place = Place(sequence, crc, self._name)

    def _manifest(self, active: str) -> Manifest:
        # Behind the number of a base, so that the next one has a name of its own.
        generation = 1 + max((int(file.name[5:15]) for file in self._sealed if is_base(file.name)), default=0)
        return Manifest(self._registry_id, self._epoch, generation, tuple(self._sealed), active)

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _refuse(self, name: str, offset: int, reason: str) -> NoReturn:
        raise JournalDamaged(name, offset=offset, sequence=self._place.sequence + 1, reason=reason)
