"""The journal as the rest of the program sees it."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import ModelManagerError
from worker.journal.appender import Appender
from worker.journal.base_index import index_name
from worker.journal.boot import Recovered, recover
from worker.journal.compaction import Base, read_written
from worker.journal.failures import JournalFailed, disk_full
from worker.journal.files import Files, SyncFailed
from worker.journal.format import CONTROL_OPS, Entry, encode
from worker.journal.lock import FolderLock
from worker.journal.lookups import Lookups
from worker.journal.manifest import Manifest
from worker.journal.observer import JournalObserver
from worker.journal.replay import Replay
from worker.journal.reserve import RESERVE_BYTES, Reserve
from worker.journal.room import Room
from worker.journal.superseded import Superseded
from worker.journal.writer import Outcome, Pending, Writer

SEGMENT_BYTES = 64 * 1024 * 1024
QUEUE_LINES = 4096
QUEUE_BYTES = 16 * 1024 * 1024

_DISK = Files()
_UNOBSERVED = JournalObserver()


@dataclass(frozen=True, slots=True)
class JournalStats:
    """`bytes` and `records` (business records) are durable ones; `queued` wait; `torn_bytes` were cut at this boot."""

    bytes: int
    segments: int
    records: int
    head: int
    generation: int
    queued: int
    fsync_failures: int
    torn_bytes: int


@dataclass(frozen=True, slots=True)
class Durable:
    """The sealed files of `manifest`, and `active_bytes` of its active one. `head` is the last line that is in these:
    there may be later ones, when the writer was faster than this look."""

    manifest: Manifest
    active_bytes: int
    head: int


class Journal:
    """One owner of one folder, from `open` to `close`. The order of records is the same in the file, in `on_durable`,
    in `read` and in the next replay.

    `append`, `finish` and `close` belong to the event loop that `start` was called on; `read` and `entry` block and may
    be called from any thread.
    """

    def __init__(
        self,
        folder: Path,
        files: Files,
        lock: FolderLock,
        appender: Appender,
        recovered: Recovered,
        frees: Callable[[str, dict[str, Any]], bool],
    ) -> None:
        """Use `open`."""
        self._folder = folder
        self._files = files
        self._lock = lock
        self._appender = appender
        self._lookups = Lookups(files, folder, appender)
        self._frees = frees
        self._torn_bytes = recovered.torn_bytes
        self._observe = appender.observe
        self._head = appender.sequence
        self._room = Room(lines=QUEUE_LINES, size=QUEUE_BYTES)
        self._writer: Writer | None = None
        self._on_durable: Callable[[Sequence[Entry]], None] = lambda _: None
        self._failure: str | None = None
        self._ending: asyncio.Future[None] | None = None
        self.epoch = appender.manifest.epoch
        self.registry_id = appender.manifest.registry_id
        self.superseded = Superseded(files, folder)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        replay: Replay[Any, Any] | Callable[[Entry], object],
        frees: Callable[[str, dict[str, Any]], bool] = lambda op, record: False,
        segment_bytes: int = SEGMENT_BYTES,
        reserve_bytes: int = RESERVE_BYTES,
        files: Files = _DISK,
        clock: Callable[[], float] = time.time,
        observe: JournalObserver = _UNOBSERVED,
    ) -> Journal:
        """Take the folder, verify what is in it and replay it; a folder that is new or empty gets a new journal.

        Blocks for as long as the reading takes. `replay` gets the business records in order, on this thread, as it
        extracts them or, if it is a function, one by one; if the boot is refused it may have got some. `frees` tells of
        an op and its record whether it frees room, so that it is taken, with the help of the reserve, when the disk is
        full. `clock` tells unix seconds.

        Raises JournalLocked at once if another process owns the folder, JournalDamaged if a durable record is not as
        it was written, JournalFailed if an fsync fails, OSError if the disk cannot be used.
        """
        _make_folder(files, folder)
        lock = files.lock(folder)
        try:
            reserve = Reserve(files, folder, size=reserve_bytes, clock=clock)
            reserve.for_a_boot()
            recovered = _recover_without_collections(files, folder, replay, clock)
            appender = Appender(
                files, folder, recovered, reserve, segment_bytes=segment_bytes, clock=clock, observe=observe
            )
        except SyncFailed as error:
            lock.release()
            observe.fsync_failed()
            raise JournalFailed(f"fsync failed: {error}") from error
        except BaseException:
            lock.release()
            raise
        if recovered.torn_bytes:
            observe.torn_tail(recovered.torn_bytes)
        return cls(folder, files, lock, appender, recovered, frees)

    def raise_epoch(self, epoch: int) -> None:
        """Go on in a later epoch. Only before `start`; blocks. Raises ModelManagerError without room, JournalFailed."""
        if self._writer is not None or epoch < self.epoch:
            raise RuntimeError("the epoch is raised before the journal starts, and never lowered")
        if epoch > self.epoch:
            self._appender.prepare()
            self._appender.raise_epoch(epoch)
            self.epoch, self._head = epoch, self._appender.sequence

    def start(self, on_durable: Callable[[Sequence[Entry]], None]) -> None:
        """Begin to write. Called once, on the event loop.

        `on_durable` is called on the loop, in order, with each batch that has become durable, before anybody who waits
        for one of its records goes on and before `head` tells of it. If it raises, the journal stops.
        """
        if self._writer is not None:
            raise RuntimeError("the journal was started before")
        loop = asyncio.get_running_loop()

        def report(outcome: Outcome) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._settle, outcome)

        self._on_durable = on_durable
        self._writer = Writer(self._appender, report, self._frees)
        self._writer.start()

    async def append(self, op: str, record: dict[str, Any]) -> Entry:
        """The record as it stands in the journal, once it is durable. `record` is plain JSON, and is not to be changed
        afterwards.

        Waits for room when too much is queued already. If the task that awaits is cancelled after that, the record is
        appended all the same.

        Raises ModelManagerError: ERR_INVALID_REQUEST for a record that is not JSON or too large, ERR_STORAGE_FULL when
        the disk has no room (nothing was appended, the journal goes on), ERR_SHUTTING_DOWN once it is closing. Raises
        JournalFailed when the journal has stopped: the outcome is unknown.
        """
        since = time.perf_counter()
        self._accepting()
        payload = self._encode(op, record)
        await self._room.acquire(len(payload))
        try:
            # It may have stopped, or begun to close, while this record waited for its turn.
            writer = self._accepting()
        except BaseException:
            self._room.release(1, len(payload))
            raise
        acknowledged: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        writer.submit(Pending(op, record, payload, since, acknowledged))
        return await acknowledged

    def submit(self, op: str, record: dict[str, Any], settled: Callable[[], None]) -> asyncio.Future[Entry] | None:
        """As `append`, but at once; None if it would have to wait for room, and nothing is appended then.

        `settled` is called on the loop as soon as the outcome is known, also when the future was cancelled.
        """
        since = time.perf_counter()
        writer = self._accepting()
        payload = self._encode(op, record)
        if not self._room.try_acquire(len(payload)):
            return None
        acknowledged: asyncio.Future[Entry] = asyncio.get_running_loop().create_future()
        writer.submit(Pending(op, record, payload, since, acknowledged, settled))
        return acknowledged

    def _encode(self, op: str, record: dict[str, Any]) -> bytes:
        if op in CONTROL_OPS:
            raise ValueError(f"{op!r} belongs to the journal")
        payload = encode(op, record)
        if self._appender.reserve.full_since is not None and not self._frees(op, record):
            raise disk_full()
        return payload

    def read(self, after: int, limit: int) -> list[Entry]:
        """The first `limit` (1 or more) business records with a sequence above `after`, up to `head`, in order. Blocks.

        Each line is checked again; raises JournalDamaged if one is not what it was.
        """
        return self._lookups.entries(after, limit, until=self._head)

    def entry(self, sequence: int) -> Entry:
        """That one business record. Blocks. Raises KeyError if there is none with this sequence up to `head`."""
        for entry in self.read(sequence - 1, 1):
            if entry.sequence == sequence:
                return entry
        raise KeyError(sequence)

    def record(self, sequence: int, *, wait: bool = True) -> tuple[dict[str, Any], int]:
        """The record of that line, checked, and how many bytes the line has.

        Raises KeyError if there is no such line, JournalDamaged if it is not what it was; without `wait`, RecordCold if
        it would have to be read from the disk.
        """
        return self._lookups.record(sequence, wait=wait)

    # --- compaction: the files are rewritten by another process, between these two ---

    async def rotate(self) -> Manifest:
        """Begin a new segment, so that all records until now are in sealed files: the MANIFEST that names those.

        Raises ModelManagerError ERR_STORAGE_FULL without room for it, ERR_SHUTTING_DOWN; JournalFailed.
        """
        await asyncio.wrap_future(self._accepting().run(Appender.rotate))
        return self._appender.manifest

    async def adopt(self, base: Base) -> None:
        """Let a base that lies here under its name and `.tmp` stand for the files it was made of, and remove or hold
        those.

        Raises ValueError if it is not what `base` says, or has no index; else as `rotate`. Nothing has changed then.
        """
        segment = await asyncio.to_thread(read_written, self._files, self._folder, base)
        left = await asyncio.wrap_future(self._accepting().run(lambda appender: appender.adopt(base, segment)))
        await self.superseded.take(left)

    async def free_up(self, size: int) -> int:
        """Give up as much of the reserve as it takes for `size` bytes to be free, if it would do: how many are then.

        Raises ModelManagerError ERR_SHUTTING_DOWN; JournalFailed.
        """
        return await asyncio.wrap_future(self._accepting().run(lambda appender: appender.reserve.free_up(size)))

    async def discard(self, name: str) -> None:
        """Remove what there is of a base that was to have this name; one that was adopted stays."""
        if name not in self._appender.manifest.names:
            names = (name, index_name(name))
            await self.superseded.remove(*names, *(f"{each}.tmp" for each in names))

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def full_since(self) -> float | None:
        """When the disk was found full, in unix seconds; None while there is room. Until there is enough again, only
        what frees room is appended."""
        return self._appender.reserve.full_since

    @property
    def changes_from(self) -> int:
        """Of the changes up to this sequence, compaction has dropped some that a reader behind it would need: one that
        `read` and is behind it afterwards may have missed some."""
        return self._appender.changes_from

    @property
    def sealed_bytes(self) -> tuple[int, int]:
        """Bytes of the base, and of the sealed segments behind it."""
        manifest = self._appender.manifest
        base = 0 if manifest.base is None else manifest.base.size
        return base, sum(file.size for file in manifest.sealed) - base

    @property
    def head(self) -> int:
        """Sequence of the last line that is durable and that `on_durable` has been told of."""
        return self._head

    @property
    def healthy(self) -> bool:
        """False once the journal has stopped; it does not recover, and the process should end."""
        return self.failure is None

    @property
    def failure(self) -> str | None:
        """Why the journal stopped."""
        return self._failure or self._appender.failure

    def stop(self, reason: str) -> None:
        """Write and acknowledge nothing more, because of `reason`; what is under way has an unknown outcome."""
        if self._failure is None:
            self._stop(reason)

    @property
    def durable(self) -> Durable:
        """What a reader of the files may take now. From any thread."""
        head = self._appender.sequence
        manifest = self._appender.manifest
        # The segments were there before the MANIFEST that names them, and a segment's size follows its lines.
        size = next(segment.size for segment in self._appender.segments if segment.name == manifest.active)
        return Durable(manifest, size, head)

    def stats(self) -> JournalStats:
        segments = self._appender.segments
        return JournalStats(
            bytes=sum(segment.size for segment in segments),
            segments=len(segments),
            records=sum(segment.records for segment in segments),
            head=self._head,
            generation=self._appender.manifest.generation,
            queued=self._room.taken,
            fsync_failures=self._appender.fsync_failures,
            torn_bytes=self._torn_bytes,
        )

    async def finish(self) -> None:
        """Finish what was appended and write a mark; the folder stays ours, to be read. May be called again.

        Records that still wait for room are refused with ERR_SHUTTING_DOWN. Cancelling it does not stop the finishing.
        """
        if self._ending is None:
            self._room.refuse(ModelManagerError("ERR_SHUTTING_DOWN"))
            self._ending = asyncio.ensure_future(asyncio.to_thread(self._end))
        await asyncio.shield(self._ending)

    async def close(self) -> None:
        """Finish, and give the folder free: its next owner may be there at once. May be called again."""
        await self.finish()
        self._lock.release()

    def _accepting(self) -> Writer:
        if self._failure is not None:
            raise JournalFailed(self._failure)
        if self._ending is not None:
            raise ModelManagerError("ERR_SHUTTING_DOWN")
        if self._writer is None:
            raise RuntimeError("the journal was not started")
        return self._writer

    def _settle(self, outcome: Outcome) -> None:
        if isinstance(outcome.error, JournalFailed) and self._failure is None:
            self._stop(str(outcome.error))
        if self._failure is not None:
            self._reject(outcome.batch, JournalFailed(self._failure))
        elif outcome.error is not None:
            self._reject(outcome.batch, outcome.error)
        else:
            self._take_up(outcome)

    def _take_up(self, outcome: Outcome) -> None:
        if outcome.entries:
            try:
                self._on_durable(outcome.entries)
            except BaseException as error:
                self._stop(f"a durable record could not be taken up: {error!r}")
                self._reject(outcome.batch, JournalFailed(self._failure))
                raise
        self._head = outcome.head
        self._acknowledge(outcome)

    def _acknowledge(self, outcome: Outcome) -> None:
        now, observe = time.perf_counter(), self._observe.append_seconds
        for pending, entry in zip(outcome.batch, outcome.entries, strict=True):
            acknowledged, settled = pending.acknowledged, pending.settled
            if not acknowledged.done():
                acknowledged.set_result(entry)
            if settled is not None:
                settled()
            observe(now - pending.since)
        self._make_room(outcome.batch)

    def _reject(self, batch: list[Pending], error: Exception) -> None:
        for pending in batch:
            if not pending.acknowledged.done():
                pending.acknowledged.set_exception(error)
            if pending.settled is not None:
                pending.settled()
        self._make_room(batch)

    def _make_room(self, batch: list[Pending]) -> None:
        self._room.release(len(batch), sum([len(pending.payload) for pending in batch]))

    def _stop(self, failure: str) -> None:
        """Write and acknowledge nothing from here on."""
        self._failure = failure
        error = JournalFailed(failure)
        self._room.refuse(error)
        if self._writer is not None:
            self._reject(self._writer.abandon(failure), error)

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.stop()
            self._writer.join()
        self._appender.close()


def _recover_without_collections(
    files: Files, folder: Path, replay: Replay[Any, Any] | Callable[[Entry], object], clock: Callable[[], float]
) -> Recovered:
    # The collector would walk the growing catalog again and again, which takes longer than all the rest of a boot; what
    # a replay makes stays for good, so later collections are spared it too.
    collecting = gc.isenabled()
    gc.disable()
    try:
        recovered = recover(files, folder, replay, clock)
    finally:
        if collecting:
            gc.enable()
    gc.freeze()
    return recovered


def _make_folder(files: Files, folder: Path) -> None:
    """Make `folder`, and the folders above it that are missing."""
    if files.is_dir(folder):
        return
    _make_folder(files, folder.parent)
    files.mkdir(folder)
