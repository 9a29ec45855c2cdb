"""Copying a journal while its owner writes: a folder that is a journal of its own, or nothing."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from worker.journal.boot import STALE_MANIFEST, newer_segment, place_of_base
from worker.journal.failures import JournalDamaged
from worker.journal.files import Files, sync, sync_folder, write_all
from worker.journal.format import CONTROL_OPS, TAIL_BYTES, CheckedLines, line_decoder, stored_crc
from worker.journal.inspection import verify
from worker.journal.lock import LOCK
from worker.journal.manifest import MANIFEST, SealedFile, is_base, read_manifest, segment_first
from worker.journal.segment import Digest
from worker.journal.torn import judge

PATIENCE_S = 3.0
"""More than an owner without records takes to prove its last batch durable."""

_BLOCK_BYTES = 1024 * 1024
_LOOK_AGAIN_S = 0.02
_DISK = Files()
_DECODER = line_decoder(dict[str, Any])

Progress = Callable[[int, int], None]
"""Takes the bytes that are copied, and those there are."""


@dataclass(frozen=True, slots=True)
class BackupReport:
    """What the backup holds, as `verify` found it. `left_out_bytes`: of the active file's end, as they stood there and
    were not known to be durable."""

    registry_id: str
    epoch: int
    generation: int
    files: int
    records: int
    bytes: int
    head: int
    left_out_bytes: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Behind a line of the active file, which does `op`."""

    offset: int
    sequence: int
    crc: int
    op: str


def backup(
    folder: Path,
    destination: Path,
    *,
    files: Files = _DISK,
    progress: Progress = lambda done, total: None,
    patience_s: float = PATIENCE_S,
) -> BackupReport:
    """Copy the journal in `folder` to the new folder `destination`, which appears complete, durable and verified. No
    lock is taken, and an owner may be writing.

    Every record that was acknowledged before this call is in it. Lines whose durability the owner has not proven, by a
    later batch, are waited for; if nothing comes for `patience_s`, as from an owner without room, what has stood there
    all the time is taken. A destination whose copying was cut short, `<destination>.tmp`, is begun anew.

    Raises FileNotFoundError if there is no MANIFEST, FileExistsError if `destination` is there, NotADirectoryError if
    its parent is not, JournalDamaged, JournalLocked if another backup to it is going on, OSError, SyncFailed.
    """
    read_manifest(files, folder)  # before anything is made
    parent = destination.parent
    if not files.is_dir(parent):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    if destination.name in files.list(parent):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(destination))
    copy = parent / f"{destination.name}.tmp"
    if not files.is_dir(copy):
        files.mkdir(copy)
    lock = files.lock(copy)
    try:
        report = _copied(files, folder, copy, progress, patience_s)
        files.rename(copy, destination)
        sync_folder(files, parent)
    except BaseException:
        with suppress(OSError):
            _empty(files, copy)
            files.unlink(copy / LOCK)
            files.rmdir(copy)
        raise
    finally:
        lock.release()
    return report


def _copied(files: Files, folder: Path, copy: Path, progress: Progress, patience_s: float) -> BackupReport:
    seen: int | None = None
    while True:
        _empty(files, copy)
        copying = _Copying(files, folder, copy, progress, patience_s)
        try:
            left_out = copying.run()
            break
        except JournalDamaged:
            # The owner may have compacted, rotated or taken back a batch under our eyes; damage stays, that does not.
            if copying.generation == seen:
                raise
            seen = copying.generation
    found = verify(copy, files=files)
    if found.damage is not None:
        place = found.damage
        reason = f"the copy does not verify: {place.reason}"
        raise JournalDamaged(place.path, offset=place.offset, sequence=place.sequence, reason=reason)
    return BackupReport(
        registry_id=found.registry_id,
        epoch=found.epoch,
        generation=found.generation,
        files=found.files,
        records=found.records,
        bytes=found.bytes,
        head=found.head,
        left_out_bytes=left_out,
    )


def _empty(files: Files, copy: Path) -> None:
    """Remove what an earlier try has left. A file that no backup makes stays, and is in the way."""
    for name in files.list(copy):
        ours = name.removesuffix(".tmp")
        if ours == MANIFEST or is_base(ours) or segment_first(ours) is not None:
            files.unlink(copy / name)
        elif name != LOCK:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(copy / name))


class _Copying:
    """One way through the files that one MANIFEST names."""

    def __init__(self, files: Files, folder: Path, copy: Path, progress: Progress, patience_s: float) -> None:
        self._files = files
        self._folder = folder
        self._copy = copy
        self._progress = progress
        self._patience_s = patience_s
        self._manifest = read_manifest(files, folder)
        self._done = 0
        self._total = sum(file.size for file in self._manifest.sealed)

    @property
    def generation(self) -> int:
        return self._manifest.generation

    def run(self) -> int:
        """How many bytes were left out. Raises JournalDamaged, also if the owner changes the files meanwhile."""
        manifest = self._manifest
        # Before the active file is read: when a rotation has made one of these, its seal is there to be found.
        newer = any(
            (segment_first(name) or 0) > (segment_first(manifest.active) or 0)
            for name in self._files.list(self._folder)
        )
        with ExitStack() as stack:
            # All of them before the first is copied: a file that is open stays readable when compaction removes it.
            streams = [stack.enter_context(self._opened(name)) for name in manifest.names]
            active = streams.pop()
            self._total += active.seek(0, os.SEEK_END)
            crc = 0
            for file, stream in zip(manifest.sealed, streams, strict=True):
                crc = self._copy_sealed(file, stream)
            end, left_out = self._copy_active(active, crc)
        if newer and (name := newer_segment(self._files, self._folder, manifest, end.sequence, end.op)):
            raise _damaged(name, STALE_MANIFEST)
        manifest.publish(self._files, self._copy)  # and with it all names
        return left_out

    def _opened(self, name: str) -> BinaryIO:
        try:
            return self._files.reader(self._folder / name)
        except FileNotFoundError:
            raise _damaged(name, "the file is missing") from None

    def _copy_sealed(self, file: SealedFile, stream: BinaryIO) -> int:
        """The crc that the next file's first line is chained to."""
        digest = Digest()
        with self._created(file.name) as fd:
            while block := stream.read(_BLOCK_BYTES):
                self._write(fd, block, digest.size)
                digest.update(block)
        if digest.sealed(file.name) != file:
            raise _damaged(file.name, "the sealed file does not have its size, lines and checksums")
        if is_base(file.name):
            stream.seek(0)
            return place_of_base(orjson.loads(stream.readline())["rec"]).crc
        stream.seek(-TAIL_BYTES, os.SEEK_END)
        return stored_crc(stream.read()) or 0

    def _copy_active(self, stream: BinaryIO, crc: int) -> tuple[_Place, int]:
        """The last line that was taken, and how many bytes behind it were not."""
        first = segment_first(self._manifest.active) or 0
        proven = _Place(0, first - 1, crc, "")
        wanted: int | None = None
        deadline = time.monotonic() + self._patience_s
        with self._created(self._manifest.active) as fd:
            while True:
                owned = self._files.owned(self._folder)
                size = self._copy_end(stream, fd, proven.offset)
                proven, last = self._examined(proven)
                if not (owned or self._files.owned(self._folder)):
                    proven = last  # nobody is left who could take it back
                wanted = wanted or last.sequence
                if proven.sequence >= min(wanted, last.sequence):
                    break
                if time.monotonic() >= deadline:
                    proven = last
                    break
                time.sleep(_LOOK_AGAIN_S)
            self._files.ftruncate(fd, proven.offset)
            sync(self._files, fd)
        return proven, size - proven.offset

    def _copy_end(self, stream: BinaryIO, fd: int, offset: int) -> int:
        """Copy what the active file has from `offset` on: its size."""
        self._files.ftruncate(fd, offset)
        stream.seek(offset)
        while block := stream.read(_BLOCK_BYTES):
            self._write(fd, block, offset)
            offset += len(block)
        return offset

    def _examined(self, proven: _Place) -> tuple[_Place, _Place]:
        """The last line of the copy that was proven durable, and the last one that checks, both from `proven` on."""
        name, last = self._manifest.active, proven
        with self._files.reader(self._copy / name) as copied:
            copied.seek(proven.offset)
            lines = CheckedLines(copied, _DECODER, sequence=proven.sequence, crc=proven.crc, offset=proven.offset)
            for _, line in lines:
                if line.batch == line.sequence:
                    proven = last
                last = _Place(lines.offset, lines.sequence, lines.crc, line.op)
                if line.op in CONTROL_OPS:  # there is nothing in it that could be taken back
                    proven = last
            copied.seek(lines.offset)
            rest = copied.read()
        reason = judge(rest, offset=lines.offset, sequence=lines.sequence + 1, crc=lines.crc) if rest else None
        if lines.foreign or not lines.offset or reason:
            raise JournalDamaged(name, offset=lines.offset, sequence=lines.sequence + 1, reason=f"{lines.fault}")
        return proven, last

    @contextmanager
    def _created(self, name: str) -> Iterator[int]:
        fd = self._files.open(self._copy / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            yield fd
        finally:
            self._files.close(fd)

    def _write(self, fd: int, block: bytes, offset: int) -> None:
        write_all(self._files, fd, block, offset)
        sync(self._files, fd)  # block by block: the owner's own syncs never wait for a mountain of this
        self._done += len(block)
        self._progress(min(self._done, self._total), self._total)


def _damaged(name: str, reason: str) -> JournalDamaged:
    return JournalDamaged(name, offset=0, sequence=segment_first(name) or 0, reason=reason)
