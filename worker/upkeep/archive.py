"""The journal on its way into the rack's storage: sealed files whole, the tail of the active one every few seconds.

Only durable bytes are shipped, and those never change, so a piece can be put again whatever became of the first try.
What is there is looked up once, and again after every failure: a store that was away is caught up with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import orjson
import structlog

from schemas.errors import ModelManagerError
from worker.journal import Durable, Journal, SealedFile
from worker.journal.boot import place_of_base
from worker.journal.format import TAIL_BYTES
from worker.journal.manifest import is_base, segment_first
from worker.storage.blobstore import BlobInfo, BlobMissing, BlobStore
from worker.upkeep.archive_layout import (
    ROOT,
    ArchivedFile,
    ArchiveManifest,
    Piece,
    closed_key,
    epoch_of,
    file_key,
    manifest_key,
    parse_manifest,
    piece_key,
    tails,
)

_log = structlog.get_logger()

PERIOD_S = 5.0
KEEP_S = 30 * 86_400.0
_PIECE_BYTES_MAX = 8 * 1024 * 1024
_READ_BYTES = 1024 * 1024


class ArchiveAhead(Exception):
    """The archive of this epoch holds what the folder does not: the folder is an older copy, and must not be used."""


class ArchiveObserver:
    """What the archive tells about itself, for metrics. Does nothing; override what is of interest."""

    def shipped(self, kind: str, size: int) -> None:
        """An object of `size` bytes is there now: a `tail`, `segment` or `base`."""

    def round_ended(self, seconds: float, error: str | None) -> None:
        """The store holds all there was when the round began, or `error` is the code of what went wrong."""


class Archive:
    """Ships one journal. `round` and `begin` are called by one task at a time."""

    def __init__(
        self,
        journal: Journal,
        store: BlobStore,
        *,
        rack: str,
        period_s: float = PERIOD_S,
        keep_s: float = KEEP_S,
        clock: Callable[[], float] = time.time,
        observe: ArchiveObserver | None = None,
    ) -> None:
        """`keep_s`: how far back a point in time can be reached, in seconds."""
        journal.superseded.holding = True
        self._journal = journal
        self._store = store
        self._info = BlobInfo(format="journal", model="journal", version=str(journal.epoch), rack=rack)
        self._period_s = period_s
        self._keep_s = keep_s
        self._clock = clock
        self._observe = observe or ArchiveObserver()
        self._manifest = ArchiveManifest(journal.registry_id, journal.epoch)
        self._etag: str | None = None
        self._pieces: dict[str, list[Piece]] = {}
        self._older: list[str] = []  # keys of earlier epochs
        self._known = False  # whether the four above are what the store holds
        self._caught_up = clock()
        self.head = 0
        """The last sequence that the archive leads to."""

    @property
    def lag_s(self) -> float:
        """For how long something durable has been missing in the archive, in seconds."""
        return max(0.0, self._clock() - self._caught_up) if self._journal.durable.head > self.head else 0.0

    async def begin(self) -> None:
        """Look what is there, and remove what a writer that died left half done.

        Raises ArchiveAhead if that is more than the folder has; ModelManagerError.
        """
        await self._look()
        await self._check_not_ahead(self._journal.durable)
        await self._store.delete(closed_key(self._journal.epoch))

    async def run(self) -> None:
        """Ship every period. A failure is told, and the next round makes up for it."""
        while True:
            await self._guarded_round()
            await asyncio.sleep(self._period_s)

    async def finish(self, timeout_s: float) -> None:
        """Ship the rest of a journal that is finished but not closed, so that nobody else archives it, and say that
        this is its end, if it can be done in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.round()
                if self.head >= self._journal.durable.head:
                    end = orjson.dumps({"sequence": self.head})
                    await self._store.put_document(closed_key(self._journal.epoch), end, etag=None)
        except (ModelManagerError, OSError) as error:  # the time being over is one of these
            _log.warning("archive_not_finished", reason=str(error), lag_seconds=round(self.lag_s, 1))

    async def _guarded_round(self) -> None:
        started, code = time.monotonic(), None
        try:
            await self.round()
        except ModelManagerError as error:
            code = error.code
            _log.warning("archive_behind", code=code, reason=error.message, lag_seconds=round(self.lag_s, 1))
        except FileNotFoundError:
            code = None  # compaction took a file away; its base is shipped in the next round
        except OSError as error:
            code = "ERR_STORAGE_UNAVAILABLE"
            _log.warning("archive_behind", code=code, reason=str(error), lag_seconds=round(self.lag_s, 1))
        self._observe.round_ended(time.monotonic() - started, code)

    async def round(self) -> None:
        """Ship all that is durable now: segments, the tail, then a base, which may be large.

        Raises ModelManagerError; OSError of the folder, FileNotFoundError if compaction takes a file away meanwhile.
        """
        if not self._known:
            await self._look()
        self._known = False  # until the end: after a failure it is looked up again
        durable = await self._ship_new()
        base = durable.manifest.base
        if base is not None and base.name not in self._manifest.names:
            await self._ship_base(base)
            durable = await self._ship_new()
        if self.head >= durable.head and self._manifest.complete_ms is None:
            await self._publish(replace(self._manifest, complete_ms=self._now_ms()))
        await self._forget_old()
        self._known = True

    async def _ship_new(self) -> Durable:
        """Ship the segments that are sealed by now, and the tail: what was durable when this began."""
        began, durable, held = self._clock(), self._journal.durable, self._journal.superseded.held
        for file in (*held, *durable.manifest.sealed):
            if not is_base(file.name) and file.name not in self._manifest.names:
                await self._ship_segment(file)
        for file in held:
            await self._journal.superseded.let_go(file)
        await self._ship_tail(durable)
        self._count(durable, began)
        return durable

    def _count(self, durable: Durable, began: float) -> None:
        """Take in how far the archive leads."""
        reach, active = self._manifest.reach(), durable.manifest.active
        behind = (segment_first(active) or 0) - 1
        self.head = durable.head if reach == behind and self._end(active) >= durable.active_bytes else reach
        if self.head >= durable.head:
            self._caught_up = began

    def _end(self, segment: str) -> int:
        pieces = self._pieces.get(segment)
        return pieces[-1].end if pieces else 0

    # --- what is there ---

    async def _look(self) -> None:
        epoch = self._journal.epoch
        keys = [stat.key async for stat in self._store.list(ROOT)]
        # Behind the list: so it names all of it that is of use, whoever put it there.
        document = await self._store.get_document(manifest_key(epoch))
        self._etag = None if document is None else document.etag
        if document is not None:
            self._manifest = parse_manifest(document.data)
            if self._manifest.registry_id != self._journal.registry_id:
                raise ArchiveAhead(f"the archive of epoch {epoch} is of registry {self._manifest.registry_id}")
        await self._disown_lost(set(keys))
        found = tails(epoch, (key for key in keys if epoch_of(key) == epoch), self._manifest)
        self._pieces = found.pieces
        self._older = [key for key in keys if (epoch_of(key) or epoch) < epoch]
        for key in found.useless:
            await self._store.delete(key)
        self._known = True

    async def _disown_lost(self, keys: set[str]) -> None:
        """Take out of MANIFEST what was removed from the store: if the folder has it still, it is shipped again."""
        lost = []
        for name in self._manifest.names:
            key = file_key(self._journal.epoch, name)
            if key not in keys:
                try:
                    await self._store.stat(key)  # it may be there since the list was made
                except BlobMissing:
                    lost.append(name)
        if lost:
            _log.error("archived_files_lost", names=sorted(lost))
            await self._publish(self._manifest.without(lost))

    async def _check_not_ahead(self, durable: Durable) -> None:
        """Whether the last bytes that were archived are in the folder, at their place."""
        last = max((each for each in self._manifest.files if each.first), key=lambda each: each.first, default=None)
        name, end = ("", 0) if last is None else (last.file.name, last.file.size)
        for segment in self._pieces:
            if segment > name:
                name, end = segment, self._end(segment)
        if not name:
            return
        sizes = {file.name: file.size for file in durable.manifest.sealed}
        sizes[durable.manifest.active] = durable.active_bytes
        if name > durable.manifest.active or end > sizes.get(name, end):
            raise ArchiveAhead(f"the archive goes on in {name}, where the folder has ended")
        if name in sizes and await self._archived_end(name, end) != await self._local_end(name, end):
            raise ArchiveAhead(f"the archive has other records in {name} than the folder")

    async def _archived_end(self, name: str, end: int) -> bytes:
        if name in self._manifest.names:
            return await self._store.read_at(file_key(self._journal.epoch, name), end - TAIL_BYTES, TAIL_BYTES)
        key = piece_key(self._journal.epoch, name, self._pieces[name][-1])
        document = await self._store.get_document(key)
        return b"" if document is None else document.data[-TAIL_BYTES:]

    async def _local_end(self, name: str, end: int) -> bytes:
        return await asyncio.to_thread(_read, self._journal.folder / name, end - TAIL_BYTES, end)

    # --- shipping ---

    async def _ship_segment(self, file: SealedFile) -> None:
        first = segment_first(file.name) or 0
        chunks = _chunks(self._journal.folder / file.name)
        await self._ship_file(ArchivedFile(file, first + file.lines - 1, self._now_ms()), "segment", chunks)
        await self._drop_pieces(file.name)

    async def _ship_base(self, file: SealedFile) -> None:
        path = self._journal.folder / file.name
        head = orjson.loads(await asyncio.to_thread(_first_line, path))
        last = place_of_base(head["rec"]).sequence
        chunks = self._with_new_between(_chunks(path))
        await self._ship_file(ArchivedFile(file, last, self._now_ms(), head["t"]), "base", chunks)

    async def _with_new_between(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A base may take long: every period, what is new is shipped between two chunks of it."""
        due = time.monotonic() + self._period_s
        async for chunk in chunks:
            yield chunk
            if time.monotonic() >= due:
                await self._ship_new()
                due = time.monotonic() + self._period_s

    async def _ship_file(self, archived: ArchivedFile, kind: str, chunks: AsyncIterator[bytes]) -> None:
        file = archived.file
        await self._store.put(
            file_key(self._journal.epoch, file.name),
            chunks,
            info=self._info,
            size=file.size,
            sha256=file.sha256,
            max_size=file.size,
        )
        await self._publish(self._manifest.with_file(archived))
        self._observe.shipped(kind, file.size)

    async def _drop_pieces(self, segment: str) -> None:
        for piece in self._pieces.pop(segment, []):
            await self._store.delete(piece_key(self._journal.epoch, segment, piece))

    async def _ship_tail(self, durable: Durable) -> None:
        """Put what is new, together with the last pieces that are no larger: so their number grows with the logarithm
        of the segment only."""
        segment, end = durable.manifest.active, durable.active_bytes
        pieces = self._pieces.setdefault(segment, [])
        while (start := self._end(segment)) < end:
            new = Piece(start, min(end, start + _PIECE_BYTES_MAX))
            joined: list[Piece] = []
            while pieces and pieces[-1].size <= new.size and new.end - pieces[-1].start <= _PIECE_BYTES_MAX:
                joined.append(pieces.pop())
                new = Piece(joined[-1].start, new.end)
            data = await asyncio.to_thread(_read, self._journal.folder / segment, new.start, new.end)
            await self._put_piece(segment, new, data)
            pieces.append(new)
            self._observe.shipped("tail", new.size)
            for piece in joined:
                await self._store.delete(piece_key(self._journal.epoch, segment, piece))

    async def _put_piece(self, segment: str, piece: Piece, data: bytes) -> None:
        try:
            await self._store.put_document(piece_key(self._journal.epoch, segment, piece), data, etag=None)
        except ModelManagerError as error:
            if error.code != "ERR_CONFLICT":  # it is there: the answer to an earlier try was lost
                raise

    async def _publish(self, manifest: ArchiveManifest) -> None:
        document = await self._store.put_document(
            manifest_key(self._journal.epoch), manifest.encoded(), etag=self._etag
        )
        self._manifest, self._etag = manifest, document.etag

    # --- what is old ---

    async def _forget_old(self) -> None:
        before = self._now_ms() - int(self._keep_s * 1000)
        stands_for = self._manifest.stands_for(before)
        for segment in [name for name in self._pieces if (segment_first(name) or 0) <= stands_for]:
            await self._drop_pieces(segment)  # compaction was faster than we, so it was never archived whole
        names = self._manifest.outlived(before)
        if names:
            await self._publish(self._manifest.without(names))
            for name in names:
                await self._store.delete(file_key(self._journal.epoch, name))
        complete = self._manifest.complete_ms
        if self._older and complete is not None and complete <= before:
            for key in self._older:
                await self._store.delete(key)
            self._older = []

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(path.open, "rb", buffering=0)
    try:
        while chunk := await asyncio.to_thread(file.read, _READ_BYTES):
            yield chunk
    finally:
        file.close()


def _read(path: Path, start: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()
