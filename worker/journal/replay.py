"""The boot: what of a folder is kept, what is cut, and what refuses."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4
from zlib import crc32

import orjson

from worker.journal.failures import JournalDamaged
from worker.journal.files import Files, publish, sync, sync_folder, write_all
from worker.journal.format import (
    CONTROL_OPS,
    FORMAT_VERSION,
    OPEN,
    SEAL,
    CheckedLines,
    Entry,
    TrustedLines,
    entry_of,
    make_line,
)
from worker.journal.lock import LOCK
from worker.journal.manifest import MANIFEST, Manifest, SealedFile, read_manifest, segment_first, segment_name
from worker.journal.segment import LINES_PER_POINT, Segment
from worker.journal.torn import judge

ASIDE = "aside"
FIRST_EPOCH = 1
STALE_MANIFEST = "MANIFEST does not name this file, so it is not the newest one; or the end of its last file is missing"

_OWN_TEMPORARY = re.compile(r"(MANIFEST|seg-[0-9]{20}\.jsonl(\..+\.torn)?)\.tmp")
_TORN_COPY = re.compile(r"seg-[0-9]{20}\.jsonl\..+\.torn")
_BLOCK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Recovered:
    """A journal as a boot leaves it. The next line follows `sequence` and `crc`."""

    manifest: Manifest
    segments: list[Segment]
    sequence: int
    crc: int
    last_op: str
    torn_bytes: int


def open_line(sequence: int, seed: int, *, time_ms: int, manifest: Manifest, previous: str | None) -> tuple[bytes, int]:
    """The first line of a segment that follows the segment `previous`, and its crc."""
    record = {
        "format": FORMAT_VERSION,
        "registryId": manifest.registry_id,
        "epoch": manifest.epoch,
        "previous": None if previous is None else {"name": previous, "crc": f"{seed:08x}"},
    }
    return make_line(sequence, sequence, time_ms, b'"op":"open","rec":%b' % orjson.dumps(record), seed)


def recover(files: Files, folder: Path, replay: Callable[[Entry], None], clock: Callable[[], float]) -> Recovered:
    """Verify the journal in `folder`, hand each record to `replay` in order, and make durable what is kept.

    A folder without a journal gets a new one. Raises JournalDamaged, with nothing changed, if a durable record is not
    as it was written; OSError and SyncFailed as the disk does.
    """
    if MANIFEST not in files.list(folder):
        _create(files, folder, clock)
    return _Boot(files, folder, replay).run()


def _create(files: Files, folder: Path, clock: Callable[[], float]) -> None:
    for name in files.list(folder):
        # A lone `open` line is what an interrupted creation leaves; it is written anew.
        if (first := segment_first(name)) is not None and not _is_lone_line(files, folder / name):
            raise JournalDamaged(MANIFEST, offset=0, sequence=first, reason="the file is missing")
    manifest = Manifest(uuid4().hex, FIRST_EPOCH, 1, (), segment_name(1))
    line, _ = open_line(1, 0, time_ms=int(clock() * 1000), manifest=manifest, previous=None)
    publish(files, folder, manifest.active, line)
    manifest.publish(files, folder)


def _is_lone_line(files: Files, path: Path) -> bool:
    with files.reader(path) as stream:
        stream.readline()
        return not stream.read(1)


def open_fault(manifest: Manifest, previous: str | None, seed: int, op: str, record: dict[str, Any]) -> str | None:
    """What is wrong with the first line of the segment after `previous`, whose last crc is `seed`; None if nothing."""
    if op != OPEN or record["previous"] != (None if previous is None else {"name": previous, "crc": f"{seed:08x}"}):
        return "the first line does not follow the file before"
    if record["registryId"] != manifest.registry_id or record["epoch"] > manifest.epoch:
        return "the file belongs to another registry"
    return None


def newer_segment(files: Files, folder: Path, manifest: Manifest, sequence: int, last_op: str) -> str | None:
    """The name of a segment that is newer than all in `manifest`, so that it may hold acknowledged records; or None.

    What the first step of a rotation leaves does not count: the lone `open` line that follows the seal.
    """
    active = segment_first(manifest.active) or 0
    for name in files.list(folder):
        first = segment_first(name)
        if first is None or first <= active:
            continue
        begun = last_op == SEAL and first == sequence + 1
        if not (begun and _is_lone_line(files, folder / name)):
            return name
    return None


class _Boot:
    """One pass over the files that MANIFEST names."""

    def __init__(self, files: Files, folder: Path, replay: Callable[[Entry], None]) -> None:
        self._files = files
        self._folder = folder
        self._names = files.list(folder)
        self._replay = replay
        self._manifest = read_manifest(files, folder)
        self._segments: list[Segment] = []
        self._sequence = 0
        self._crc = 0
        self._last_op = ""

    def run(self) -> Recovered:
        for file in self._manifest.sealed:
            self._read_sealed(file)
        lines, cut = self._read_active(self._manifest.active)
        newer = newer_segment(self._files, self._folder, self._manifest, self._sequence, self._last_op)
        if newer:
            self._refuse(newer, 0, STALE_MANIFEST)
        # All is known to be well; from here on the folder is changed.
        self._tidy()
        self._settle(lines, cut)
        return Recovered(
            manifest=self._manifest,
            segments=self._segments,
            sequence=self._sequence,
            crc=self._crc,
            last_op=self._last_op,
            torn_bytes=len(cut),
        )

    def _begin(self, name: str) -> Segment:
        if name not in self._names:
            self._refuse(name, 0, "the file is missing")
        if segment_first(name) != self._sequence + 1:
            self._refuse(name, 0, "the file is not the one that comes next")
        return Segment(self._sequence + 1, self._crc)

    def _read_sealed(self, file: SealedFile) -> None:
        segment = self._begin(file.name)
        path = self._folder / file.name
        with self._files.reader(path) as stream:
            size, crc = 0, 0
            while block := stream.read(_BLOCK_BYTES):
                size += len(block)
                crc = crc32(block, crc)
        if (size, crc) != (file.size, file.crc32):
            self._refuse(file.name, 0, "the sealed file does not have its size and checksum")
        with self._files.reader(path) as stream:
            self._fold(TrustedLines(stream, sequence=self._sequence, crc=self._crc), segment)
        if self._last_op != SEAL:
            self._refuse(file.name, segment.size, "the sealed file does not end in its seal")

    def _read_active(self, name: str) -> tuple[CheckedLines, bytes]:
        """The state after the last good line, and the bytes of an unfinished write behind it."""
        segment = self._begin(name)
        cut = b""
        with self._files.reader(self._folder / name) as stream:
            lines = CheckedLines(stream, sequence=self._sequence, crc=self._crc)
            self._fold(lines, segment)
            if lines.fault:
                stream.seek(lines.offset)
                cut = stream.read()
        if lines.fault and lines.foreign:
            self._refuse(name, lines.offset, lines.fault)
        if lines.offset == 0:
            self._refuse(name, 0, "the first line, which was durable before MANIFEST named the file, does not check")
        reason = judge(cut, offset=lines.offset, sequence=lines.sequence + 1, crc=lines.crc) if cut else None
        if reason:
            self._refuse(name, lines.offset, f"{lines.fault}; {reason}")
        return lines, cut

    def _fold(self, lines: CheckedLines | TrustedLines, segment: Segment) -> None:
        """Hand the records of one file to `replay` and take up the place behind its last line."""
        replay = self._replay
        previous = self._segments[-1].name if self._segments else None
        op, records = "", 0
        for value in lines:
            if op == SEAL:
                self._sequence = lines.sequence - 1
                self._refuse(segment.name, lines.offset, "a line follows the seal")
            op = value["op"]
            if op not in CONTROL_OPS:
                replay(entry_of(value))
                records += 1
            if lines.sequence == segment.first and (
                fault := open_fault(self._manifest, previous, self._crc, op, value["rec"])
            ):
                self._refuse(segment.name, 0, fault)
            if not lines.sequence % LINES_PER_POINT:
                segment.note(lines.sequence, lines.crc, lines.offset)
        segment.size, segment.records = lines.offset, records
        self._segments.append(segment)
        self._sequence, self._crc, self._last_op = lines.sequence, lines.crc, op

    def _tidy(self) -> None:
        """Remove what a crash left half published; set aside, never delete, what is not known."""
        known = {LOCK, MANIFEST, ASIDE, *self._manifest.names, segment_name(self._sequence + 1)}
        for name in self._names:
            if _OWN_TEMPORARY.fullmatch(name):
                self._files.unlink(self._folder / name)
            elif name not in known and not _TORN_COPY.fullmatch(name) and not self._files.is_dir(self._folder / name):
                self._set_aside(name)

    def _set_aside(self, name: str) -> None:
        aside = self._folder / ASIDE
        if ASIDE not in self._files.list(self._folder):
            self._files.mkdir(aside)
        self._files.rename(self._folder / name, aside / _free_name(name, "", self._files.list(aside)))
        sync_folder(self._files, aside)

    def _settle(self, lines: CheckedLines, cut: bytes) -> None:
        """Cut an unfinished write, and make sure that the last batch kept is on the disk, not only in its cache."""
        path = self._folder / self._manifest.active
        if cut:
            copy = _free_name(f"{path.name}.{lines.offset}", ".torn", self._names)
            publish(self._files, self._folder, copy, cut)
        with self._files.reader(path) as stream:
            stream.seek(lines.batch_offset)
            batch = stream.read(lines.offset - lines.batch_offset)
        fd = self._files.open(path, os.O_RDWR)
        try:
            self._files.ftruncate(fd, lines.offset)
            write_all(self._files, fd, batch, lines.batch_offset)
            sync(self._files, fd)
        finally:
            self._files.close(fd)
        sync_folder(self._files, self._folder)

    def _refuse(self, name: str, offset: int, reason: str) -> NoReturn:
        raise JournalDamaged(name, offset=offset, sequence=self._sequence + 1, reason=reason)


def _free_name(stem: str, suffix: str, taken: Container[str]) -> str:
    """`stem` + `suffix`, with a number between them if that name is taken."""
    name, number = f"{stem}{suffix}", 0
    while name in taken:
        number += 1
        name = f"{stem}.{number}{suffix}"
    return name
