"""Scrubbing: all bytes of the versions are read back once a period, so that rot is found before somebody needs them.

One pass after the other goes over the versions in the order they were stored, evenly through the period, and reads for
at most half of the time. A blob that several versions share is read once a pass, as long as the process lives and there
are not too many. How far a pass has come stands in a document of the store, so that a restart goes on there.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import orjson
import structlog

from schemas.errors import ModelManagerError
from schemas.journal import StoredFile
from worker.catalog.entries import VersionEntry
from worker.journal import JournalDamaged
from worker.registry import Registry
from worker.storage.blobstore import BlobStore

DOCUMENT = "scrub.json"

_SHARE = 0.9  # of the period, for a pass: the rest is for what takes longer, or comes in meanwhile
_KEPT_EVERY_S = 300.0
_AGAIN_S = 30.0
_FIRST_TRIES = 3
_REMEMBERED = 100_000

_log = structlog.get_logger()


class ScrubObserver:
    """What the scrubbing tells about itself, for metrics. Does nothing; override what is of interest. Never raises."""

    def looked_at(self, result: Literal["sound", "wrong", "unreadable"], size: int) -> None:
        """One blob was read back: `size` bytes, 0 if it could not be."""

    def pass_ended(self, at: float) -> None:
        """All versions have been looked at; unix seconds. Also told at the start, of what an earlier process did."""


@dataclass(frozen=True, slots=True)
class Position:
    """A pass that began at `began` (unix seconds) and has looked at the versions stored up to the sequence `after`;
    `over` when it has looked at all. `ended` is when a pass ended last; `registry` and `epoch` are whose sequences
    these are."""

    registry: str
    epoch: int
    began: float
    after: int = 0
    over: bool = False
    ended: float = 0.0


class Scrub:
    """Runs for the life of the process."""

    def __init__(
        self,
        registry: Registry,
        store: BlobStore,
        *,
        is_sound: Callable[[StoredFile], Awaitable[bool]],
        judge: Callable[[VersionEntry, set[str], set[str]], Awaitable[None]],
        period_s: float,
        observe: ScrubObserver,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`is_sound` reads a file back; `judge` records which storage keys of a version are right and which are wrong.
        `clock` tells unix seconds, `timer` is never set."""
        self._registry = registry
        self._store = store
        self._is_sound = is_sound
        self._judge = judge
        self._period_s = period_s
        self._observe = observe
        self._clock = clock
        self._timer = timer
        self._sleep = sleep
        self._read_s = 0.0  # since the last rest
        self._verdicts: dict[str, bool] = {}  # of this pass, about blobs that several versions share
        self._etag: str | None = None
        self._kept_at: float | None = None

    async def run(self) -> None:
        position = await self.position()
        if position.ended:
            self._observe.pass_ended(position.ended)
        while True:
            if position.over:
                await self._rest(position.began + self._period_s - self._clock(), most=self._period_s)
                position = replace(self._beginning(), ended=position.ended)
            position = await self.go_through(position)

    async def go_through(self, position: Position) -> Position:
        """The rest of a pass: its end."""
        table = self._registry.catalog.table
        self._verdicts.clear()
        row = bisect_right(table.stored, position.after)
        while row < len(table):
            await self._look_at(row)
            position = replace(position, after=table.stored[row])
            row += 1
            if self._kept_at is None or self._timer() - self._kept_at >= _KEPT_EVERY_S:
                await self._keep(position)
            turn = _SHARE * self._period_s / len(table)
            await self._rest(position.began + turn * row - self._clock(), most=turn)
        position = replace(position, over=True, ended=self._clock())
        await self._keep(position)
        self._observe.pass_ended(position.ended)
        _log.info("scrub_pass_ended", versions=row, seconds=round(position.ended - position.began, 1))
        return position

    async def _rest(self, seconds: float, *, most: float) -> None:
        """Rest so long, as long as there was read at least, and not longer than `most` else: the clock may be set."""
        await self._sleep(max(self._read_s, min(seconds, most)))
        self._read_s = 0.0

    # --- a version ---

    async def _look_at(self, row: int) -> None:
        """Read the files of a version back, and have what is found recorded; wait while the store is away.

        One whose record cannot be read, or that of another one which shares its bytes, is not for us to mend.
        """
        catalog = self._registry.catalog
        verdicts: dict[str, tuple[bool | None, bool]] = {}
        while True:
            try:
                entry = await self._registry.look(lambda: catalog.entry(row) if catalog.has_row(row) else None)
                if entry is not None:
                    await self._check(entry, verdicts)
            except ModelManagerError as error:
                _log.warning("scrub_waits", code=error.code, reason=error.message)
                await self._sleep(_AGAIN_S)
            except (JournalDamaged, KeyError, OSError) as error:
                model, version = catalog.table.model[row], catalog.table.version[row]
                _log.error("scrub_record_unreadable", model=model, version=version, reason=str(error))
                return
            else:
                return

    async def _check(self, entry: VersionEntry, verdicts: dict[str, tuple[bool | None, bool]]) -> None:
        """Read what is not among the verdicts yet: whether it is sound, and whether it was trusted before.

        Raises ModelManagerError if the store is away, or the verdict cannot be recorded.
        """
        trusts = self._registry.catalog.blobs.trusts
        for file in entry.files:
            key = file["key"]
            if key not in verdicts:
                trusted = trusts(key)
                verdicts[key] = await self._verdict(file, trusted), trusted
        # What somebody else has found since is newer.
        current = {key: sound for key, (sound, trusted) in verdicts.items() if trusts(key) == trusted}
        right = {key for key, sound in current.items() if sound}
        wrong = {key for key, sound in current.items() if sound is False}
        lifted = entry.quarantined and not wrong
        # What is wrong was recorded for all that share it when the first of them was looked at.
        if lifted or wrong - set(entry.wrong) or not all(map(trusts, right)):
            await self._judge(entry, right, wrong)

    async def _verdict(self, file: StoredFile, trusted: bool) -> bool | None:
        """Whether the bytes are what was stored; None if the store, which is there, does not give them."""
        key, size = file["key"], file["size"]
        if self._verdicts.get(key) == trusted:
            return trusted
        started = self._timer()
        try:
            sound = await self._is_sound(file)
            if not sound:
                await self._find_store()
        except ModelManagerError as error:
            await self._find_store()
            _log.error("blob_unreadable", key=key, code=error.code, reason=error.message)
            self._observe.looked_at("unreadable", 0)
            return None
        self._read_s += self._timer() - started
        self._observe.looked_at("sound" if sound else "wrong", size)
        if self._registry.catalog.blobs.is_shared(key):
            if len(self._verdicts) >= _REMEMBERED:
                self._verdicts.clear()
            self._verdicts[key] = sound
        return sound

    async def _find_store(self) -> None:
        """Raises ModelManagerError if the store is away, or is not the one it was: a disk that is not mounted has no
        bytes, and they are not lost."""
        await self._store.probe()
        if self._etag is not None and await self._store.get_document(DOCUMENT) is None:
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", f"The storage has lost its {DOCUMENT}.")

    # --- how far it is ---

    def _beginning(self) -> Position:
        journal = self._registry.journal
        return Position(journal.registry_id, journal.epoch, self._clock())

    async def position(self) -> Position:
        """What an earlier process of this registry has left; else the beginning of a pass."""
        beginning = self._beginning()
        for _ in range(_FIRST_TRIES):
            try:
                document = await self._store.get_document(DOCUMENT)
            except ModelManagerError as error:
                _log.warning("scrub_waits", code=error.code, reason=error.message)
                await self._sleep(_AGAIN_S)
                continue
            if document is None:
                return beginning
            self._etag = document.etag
            kept = _parse(document.data)
            if kept is None or (kept.registry, kept.epoch) != (beginning.registry, beginning.epoch):
                return beginning
            return kept
        return beginning

    async def _keep(self, position: Position) -> None:
        self._kept_at = self._timer()
        try:
            self._etag = (await self._store.put_document(DOCUMENT, _encoded(position), etag=self._etag)).etag
        except ModelManagerError as error:
            _log.warning("scrub_position_not_kept", code=error.code, reason=error.message)
            if error.code == "ERR_CONFLICT":
                await self._look_again()

    async def _look_again(self) -> None:
        """Another process has written it, or we have and the answer was lost: the next one is written over that."""
        try:
            document = await self._store.get_document(DOCUMENT)
        except ModelManagerError:
            return
        if document is not None:
            self._etag = document.etag


def _encoded(position: Position) -> bytes:
    return orjson.dumps(asdict(position))


def _parse(data: bytes) -> Position | None:
    try:
        kept = orjson.loads(data)
        return Position(
            str(kept["registry"]),
            int(kept["epoch"]),
            float(kept["began"]),
            int(kept["after"]),
            bool(kept["over"]),
            float(kept["ended"]),
        )
    except (ValueError, KeyError, TypeError):
        return None
