"""The durable end of a journal: whole batches go in, one write and one fdatasync each; segments rotate behind them.

Nothing here knows threads or an event loop; one thread at a time calls.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import orjson

from schemas.errors import ModelManagerError
from worker.journal.base_index import index_name
from worker.journal.boot import Recovered, open_line
from worker.journal.compaction import Base
from worker.journal.failures import JournalFailed
from worker.journal.files import Files, SyncFailed, publish, sync, sync_folder, write_all
from worker.journal.format import CONTROL_OPS, MARK, OPEN, SEAL, make_batch
from worker.journal.manifest import SealedFile
from worker.journal.observer import JournalObserver
from worker.journal.reserve import NO_ROOM, Reserve
from worker.journal.segment import Digest, Segment

# What passes, by our doing or another's, and leaves the durable part of the journal as it was.
_PASSING = {
    errno.ENOSPC: "ERR_STORAGE_FULL",
    errno.EFBIG: "ERR_STORAGE_FULL",
    errno.EDQUOT: "ERR_STORAGE_FULL",
    errno.EMFILE: "ERR_STORAGE_UNAVAILABLE",
    errno.ENFILE: "ERR_STORAGE_UNAVAILABLE",
    errno.ENOMEM: "ERR_STORAGE_UNAVAILABLE",
}
_SUMMED_BYTES = 256 * 1024
_RECORD = ""

T = TypeVar("T")


class Appender:
    """Owns the active segment. `prepare` comes first. After JournalFailed every call raises it again."""

    def __init__(
        self,
        files: Files,
        folder: Path,
        recovered: Recovered,
        reserve: Reserve,
        *,
        segment_bytes: int,
        clock: Callable[[], float],
        observe: JournalObserver,
    ) -> None:
        self._files = files
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._clock = clock
        self.observe = observe
        self.reserve = reserve
        self._digest = Digest()
        self._unsummed: list[bytes] = []
        self._unsummed_bytes = self._unsummed_lines = 0
        self._crc = recovered.crc
        self._last_op = recovered.last_op
        self._fd = files.open(folder / recovered.manifest.active, os.O_RDWR)
        self.manifest = recovered.manifest
        self.segments = tuple(recovered.segments)
        """All files, a base first, the active one last. Replaced, never changed, so any thread may look at it."""
        self.changes_from = recovered.changes_from
        self.sequence = recovered.sequence
        """Of the last durable line."""
        self.fsync_failures = 0
        self.failure: str | None = None

    def prepare(self) -> None:
        """Sum up the active segment as it is, for its seal: apart from the boot, which need not wait for it.

        Raises JournalFailed.
        """
        try:
            with self._files.reader(self._folder / self.manifest.active) as stream:
                self._digest = Digest.of(stream)
        except OSError as error:
            self.failure = f"the disk failed: {error.strerror}"
            raise JournalFailed(self.failure) from error

    def sum_up(self) -> Digest:
        """Of the active segment."""
        if self._unsummed:
            self._digest.update(b"".join(self._unsummed), lines=self._unsummed_lines)
            self._unsummed.clear()
            self._unsummed_bytes = self._unsummed_lines = 0
        return self._digest

    def sum_up_if_due(self) -> None:
        """Called after each batch, once nobody waits for it any more: hashing takes time, and few pieces take less."""
        if self._unsummed_bytes >= _SUMMED_BYTES:
            self.sum_up()

    @property
    def unproven(self) -> bool:
        """Whether the last batch is one that a cut could hide, so that a `mark` is of use."""
        return self._last_op not in CONTROL_OPS

    def append(self, payloads: Sequence[bytes], *, at_any_cost: bool = False) -> tuple[int, int]:
        """Make one batch of business records durable: the sequence of its first line, and its time in ms.

        `at_any_cost` takes all of the reserve for it, if it has to.

        Raises ModelManagerError ERR_STORAGE_FULL if there is no room, or ERR_STORAGE_UNAVAILABLE if there are no file
        descriptors or no memory: nothing of the batch is in the journal then, and it goes on.
        Raises JournalFailed if it is unknown whether the batch is durable.
        """
        self._check()
        try:  # not `_failing`, which takes time
            if at_any_cost:
                return self._helped(partial(self._append, payloads))
            return self._append(payloads)
        except (SyncFailed, OSError) as error:
            raise self._sorted(error) from error

    def _append(self, payloads: Sequence[bytes]) -> tuple[int, int]:
        if self._last_op == SEAL:
            self._open_next()
        first = self.sequence + 1
        time_ms = self._write_batch(payloads, _RECORD)
        self.segments[-1].records += len(payloads)
        return first, time_ms

    def mark(self) -> bool:
        """Close the last batch with a `mark` line, unless another line does so already: whether one was written.

        Without room there is none; it only narrows what a later cut could hide. Raises JournalFailed.
        """
        if not self.unproven:
            return False
        try:
            with self._failing():
                self._write_batch([b'"op":"mark","rec":{}'], MARK)
        except ModelManagerError:
            return False
        return True

    def rotate_if_due(self) -> bool:
        """Begin the next segment if this one is full, or sealed already: whether it did.

        Without room the rotation waits, and `append` goes on with the full segment. Raises JournalFailed.
        """
        if self._last_op != SEAL and self.segments[-1].size < self._segment_bytes:
            return False
        try:
            with self._failing():
                self._seal()
                self._open_next()
        except ModelManagerError:
            return False
        return True

    def rotate(self) -> bool:
        """Begin the next segment, unless the active one has no records: whether it did. Takes of the reserve.

        Raises ModelManagerError ERR_STORAGE_FULL if there is no room for it, JournalFailed.
        """
        if not self.segments[-1].records:
            return False
        with self._failing():
            self._helped(self._seal)
            self._helped(self._open_next)
        return True

    def raise_epoch(self, epoch: int) -> None:
        """Go on in `epoch`, in a segment of its own. Raises ModelManagerError without room, JournalFailed."""
        with self._failing():
            manifest = self.manifest
            self._helped(self._seal)
            self.manifest = replace(manifest, epoch=epoch)
            try:
                self._helped(self._open_next)
            except BaseException:
                self.manifest = manifest
                raise

    def adopt(self, base: Base, segment: Segment) -> list[SealedFile]:
        """Let `base`, whose lines are in `segment`, stand for the files it was made of: those.

        The base lies here under its name and `.tmp`, checked. Raises ModelManagerError ERR_STORAGE_FULL if there is no
        room: nothing has changed then. Raises JournalFailed.
        """
        with self._failing():
            for name in (index_name(base.file.name), base.file.name):
                self._files.rename(self._folder / f"{name}.tmp", self._folder / name)
            sync_folder(self._files, self._folder)
            manifest = self.manifest.compacted(base.file, base.stands_for)
            self._helped(partial(manifest.publish, self._files, self._folder))
        left = [file for file in self.manifest.sealed if file.name not in manifest.names]
        self.manifest = manifest
        self.changes_from = base.changes_from  # before the files, for readers that look at it behind those
        self.segments = (segment, *(kept for kept in self.segments if kept.first > base.stands_for))
        return left

    def close(self) -> None:
        self._files.close(self._fd)

    def _write_batch(self, payloads: Sequence[bytes], op: str) -> int:
        segment = self.segments[-1]
        first, time_ms = self.sequence + 1, int(self._clock() * 1000)
        start = segment.size
        data, offsets, crc = make_batch(first, time_ms, payloads, self._crc, start)
        self._write_durably(data, start)
        segment.note(offsets, range(first, first + len(offsets)))
        segment.size = start + len(data)
        self._crc, self._last_op = crc, op
        self.sequence += len(offsets)
        self._unsummed.append(data)
        self._unsummed_bytes += len(data)
        self._unsummed_lines += len(offsets)
        return time_ms

    def _write_durably(self, data: bytes, offset: int) -> None:
        try:
            write_all(self._files, self._fd, data, offset)
        except OSError as error:
            if error.errno in _PASSING:
                self._roll_back(offset)
            raise
        started = time.perf_counter()
        sync(self._files, self._fd)
        self.observe.fsync_seconds(time.perf_counter() - started)

    def _roll_back(self, size: int) -> None:
        try:
            self._files.ftruncate(self._fd, size)
        except OSError as error:
            raise SyncFailed(f"no room, and cutting the file back failed: {error.strerror}") from error
        sync(self._files, self._fd)

    def _seal(self) -> None:
        if self._last_op != SEAL:
            digest = self.sum_up()
            record = {"lines": digest.lines, "sha256": digest.sha256}
            self._write_batch([b'"op":"seal","rec":%b' % orjson.dumps(record)], SEAL)

    def _open_next(self) -> None:
        """The second half of a rotation, from a durable `seal` on. It may be repeated until it succeeds."""
        sealed = self.segments[-1]
        segment = Segment.after(self.sequence)
        line, crc = open_line(
            segment.first,
            self._crc,
            time_ms=int(self._clock() * 1000),
            manifest=self.manifest,
            previous=sealed.name,
        )
        publish(self._files, self._folder, segment.name, line)
        fd = self._files.open(self._folder / segment.name, os.O_RDWR)
        manifest = self.manifest.rotated(self.sum_up().sealed(sealed.name), segment.name)
        try:
            manifest.publish(self._files, self._folder)
        except BaseException:
            self._files.close(fd)
            raise
        self._files.close(self._fd)
        self._fd = fd
        self._digest = Digest()
        self._digest.update(line)
        segment.note([0], [segment.first])
        segment.size = len(line)
        self.segments = (*self.segments, segment)
        self.manifest = manifest
        self.sequence, self._crc, self._last_op = segment.first, crc, OPEN

    def _helped(self, write: Callable[[], T]) -> T:
        """Do it, and again for as long as there is no room for it and a part of the reserve can be given up."""
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno not in NO_ROOM or not self.reserve.spend():
                    raise

    @contextmanager
    def _failing(self) -> Iterator[None]:
        self._check()
        try:
            yield
        except (SyncFailed, OSError) as error:
            raise self._sorted(error) from error

    def _check(self) -> None:
        if self.failure is not None:
            raise JournalFailed(self.failure)

    def _sorted(self, error: SyncFailed | OSError) -> JournalFailed | ModelManagerError:
        """What a disk can answer is one of two errors that callers know."""
        if isinstance(error, SyncFailed):
            self.fsync_failures += 1
            self.observe.fsync_failed()
            self.failure = f"fsync failed: {error}"
            return JournalFailed(self.failure)
        if error.errno in NO_ROOM:
            self.reserve.found_full()
        if error.errno in _PASSING:
            return ModelManagerError(_PASSING[error.errno], "The registry cannot be written now.")
        self.failure = f"the disk failed: {error.strerror}"
        return JournalFailed(self.failure)
