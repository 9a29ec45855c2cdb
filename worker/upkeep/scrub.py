"""Scrubbing: all bytes are read back once a period, so that rot is found before somebody needs them.

One pass after the other goes over the versions in the order they were stored, evenly through the period, and reads for
at most half of the time. A blob that several versions share is read once a pass, and judged for each of them. How far a
pass has come stands in a document of the store, so that a restart goes on there.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import orjson
import structlog

from schemas.errors import ModelManagerError
from schemas.journal import StoredFile
from worker.catalog.entries import VersionEntry
from worker.registry import Registry
from worker.storage.blobstore import BlobStore

DOCUMENT = "scrub.json"

_SHARE = 0.9  # of the period, for a pass: the rest is for what takes longer, or comes in meanwhile
_KEPT_EVERY_S = 300.0
_AGAIN_S = 30.0

_log = structlog.get_logger()


class ScrubObserver:
    """What the scrubbing tells about itself, for metrics. Does nothing; override what is of interest. Never raises."""

    def looked_at(self, result: Literal["sound", "wrong", "unreadable"], size: int) -> None:
        """One blob of this size was read back, as far as it could be."""

    def pass_ended(self, at: float) -> None:
        """All versions have been looked at; unix seconds."""


@dataclass(frozen=True, slots=True)
class Position:
    """A pass that began at `began` (unix seconds) and has looked at the versions stored up to the sequence `after`;
    `over` when it has looked at all."""

    began: float
    after: int = 0
    over: bool = False


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
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    ) -> None:
        """`is_sound` reads a file back; `judge` records which storage keys of a version are right and which are wrong.
        `clock` tells unix seconds."""
        self._registry = registry
        self._store = store
        self._is_sound = is_sound
        self._judge = judge
        self._period_s = period_s
        self._observe = observe
        self._clock = clock
        self._sleep = sleep
        self._verdicts: dict[str, bool] = {}  # of this pass, about blobs that several versions share
        self._etag: str | None = None
        self._kept_at = 0.0

    async def run(self) -> None:
        position = await self.position()
        while True:
            if position.over:
                left = position.began + self._period_s - self._clock()
                await self._sleep(min(max(0.0, left), self._period_s))
                position = Position(self._clock())
            position = await self.go_through(position)

    async def go_through(self, position: Position) -> Position:
        """The rest of a pass: its end."""
        table = self._registry.catalog.table
        self._verdicts.clear()
        row = bisect_right(table.stored, position.after)
        while row < len(table):
            started = self._clock()
            await self._look_at(row)
            position = Position(position.began, table.stored[row])
            row += 1
            now = self._clock()
            if now - self._kept_at >= _KEPT_EVERY_S:
                await self._keep(position)
            turn = _SHARE * self._period_s / len(table)
            ahead = position.began + turn * row - now
            await self._sleep(max(now - started, min(ahead, turn)))  # never longer, wherever the clock was set
        position = Position(position.began, position.after, over=True)
        await self._keep(position)
        self._observe.pass_ended(self._clock())
        _log.info("scrub_pass_ended", versions=row, seconds=round(self._clock() - position.began, 1))
        return position

    async def _look_at(self, row: int) -> None:
        """Read the files of a version back, and have what is found recorded; wait while the store is away."""
        catalog = self._registry.catalog
        while catalog.has_row(row) and row not in catalog.deleted:
            try:
                await self._check(row)
            except ModelManagerError as error:
                _log.warning("scrub_waits", code=error.code, reason=error.message)
                await self._sleep(_AGAIN_S)
            else:
                return

    async def _check(self, row: int) -> None:
        """Raises ModelManagerError if the store is away, or the verdict cannot be recorded."""
        catalog = self._registry.catalog
        entry = await self._registry.look(lambda: catalog.entry(row) if catalog.has_row(row) else None)
        if entry is None:
            return
        verdicts = {file["key"]: await self._verdict(file) for file in entry.files}
        right = {key for key, sound in verdicts.items() if sound}
        wrong = {key for key, sound in verdicts.items() if sound is False}
        lifted = entry.quarantined and not wrong
        # What is wrong was recorded for all that share it when the first of them was looked at.
        if lifted or wrong - set(entry.wrong) or not all(map(catalog.blobs.trusts, right)):
            await self._judge(entry, right, wrong)

    async def _verdict(self, file: StoredFile) -> bool | None:
        """Whether the bytes are what was stored; None if the store, which is there, does not give them."""
        key, size = file["key"], file["size"]
        if key in self._verdicts:
            return self._verdicts[key]
        try:
            sound = await self._is_sound(file)
        except ModelManagerError as error:
            await self._store.probe()
            _log.error("blob_unreadable", key=key, code=error.code, reason=error.message)
            self._observe.looked_at("unreadable", size)
            return None
        self._observe.looked_at("sound" if sound else "wrong", size)
        if len(self._registry.catalog.blobs.rows_of(key)) > 1:
            self._verdicts[key] = sound
        return sound

    # --- how far it is ---

    async def position(self) -> Position:
        """What an earlier process has left; the beginning of a pass if there is nothing that can be read."""
        now = self._clock()
        try:
            document = await self._store.get_document(DOCUMENT)
            if document is None:
                return Position(now)
            self._etag = document.etag
            kept = orjson.loads(document.data)
            return Position(min(float(kept["began"]), now), int(kept["after"]), bool(kept["over"]))
        except (ModelManagerError, ValueError, KeyError, TypeError) as error:
            _log.warning("scrub_begins_anew", reason=str(error))
            return Position(now)

    async def _keep(self, position: Position) -> None:
        self._kept_at = self._clock()
        data = orjson.dumps({"began": position.began, "after": position.after, "over": position.over})
        try:
            self._etag = (await self._store.put_document(DOCUMENT, data, etag=self._etag)).etag
        except ModelManagerError as error:
            _log.warning("scrub_position_not_kept", code=error.code, reason=error.message)
            if error.code == "ERR_CONFLICT":  # also our own write whose answer was lost: the next one is over that
                await self.position()
