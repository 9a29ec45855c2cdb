"""Clean-up: blobs that nothing needs, undo windows and uploads that are over.

Storage keys are never reused and only their maker ever records them, so a blob that no record and no pin needs is
garbage for ever: looking and removing cannot race with a store.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import structlog

from schemas.errors import ModelManagerError
from worker.journal import Entry
from worker.registry import Change, Registry
from worker.storage.blobstore import BlobStore
from worker.upkeep.ownership import Owner
from worker.uploads.sessions import UploadSessions

_log = structlog.get_logger()

_SETTLE_S = 0.2  # let a burst of deletes gather


class CleanUp:
    """Runs for the life of the process; wakes at once when a record may have freed bytes."""

    def __init__(
        self,
        registry: Registry,
        store: BlobStore,
        uploads: UploadSessions,
        *,
        period_s: float,
        undo_s: float = 0.0,
        removed: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self._registry = registry
        self._store = store
        self._uploads = uploads
        self._period_s = period_s
        self._undo_s = undo_s
        self._spared_before_s = 0.0
        self._removed = removed
        self._wake = asyncio.Event()
        registry.listen(self._on_entry)

    def spare_older_than(self, owner: Owner) -> None:
        """Let a sweep pass over what is older than this epoch, for the length of an undo window: whoever rebuilt the
        registry up to the wrong point can do it again, up to another.
        """
        began = owner.since / 1000
        if owner.epoch > 1 and time.time() < began + self._undo_s:
            self._spared_before_s = began

    def _on_entry(self, entry: Entry) -> None:
        if entry.op in ("delete", "purge", "upload.end", "pull.begin", "pull.bring", "pull.end"):
            self._wake.set()

    async def run(self) -> None:
        """Sweep the store once, from end to end, and clean up on every wake and every period."""
        swept, parts_due = False, 0.0
        while True:
            swept = swept or await self._guarded(self.sweep)
            if time.monotonic() >= parts_due:
                parts_due = time.monotonic() + self._period_s
                await self._guarded(self.sweep_parts)
            await self._guarded(self.round)
            try:
                async with asyncio.timeout(self._period_s):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()
            await asyncio.sleep(_SETTLE_S)

    async def _guarded(self, work: Callable[[], Any]) -> bool:
        """Whether it could be done to its end."""
        try:
            await work()
        except ModelManagerError as error:
            _log.warning("clean_up_postponed", code=error.code, reason=error.message)
            return False
        return True

    async def round(self) -> None:
        """End what is overdue, then remove the blobs that became unwanted."""
        for upload_id in self._uploads.overdue():
            await self._uploads.expire(upload_id)
        await self._end_undo_windows()
        unwanted = list(self._registry.take_unwanted())
        try:
            while unwanted:
                await self._remove(unwanted[-1], "unneeded")
                unwanted.pop()
        finally:
            self._registry.give_back(unwanted)

    async def sweep(self) -> None:
        """Remove the blobs that no record names: left by a process that died between the bytes and the record."""
        async for blob in self._store.list("blobs/"):
            if blob.modified < self._spared_before_s:
                continue
            if not self._registry.wanted(blob.key) and self._registry.journal.healthy:
                await self._remove(blob.key, "orphan")

    async def sweep_parts(self) -> None:
        """Drop the parts of uploads that no record names: of a process that died, or whose request was cut off."""
        direct = self._store.direct_uploads
        if direct is None:
            return
        async for upload in direct.begun():
            if upload.since < self._spared_before_s:
                continue
            if not self._registry.wanted(upload.key) and self._registry.journal.healthy:
                await direct.abort(upload.key, upload.upload_id)
                _log.info("parts_removed", key=upload.key)

    async def _remove(self, key: str, kind: str) -> None:
        """One that cannot be removed is left to the next round. Raises ModelManagerError if the store is away."""
        try:
            await self._store.delete(key)
        except ModelManagerError as error:
            await self._store.probe()
            _log.warning("blob_not_removed", key=key, code=error.code, reason=error.message)
            self._registry.give_back([key])
            return
        self._removed(kind)
        _log.info("blob_removed", key=key, kind=kind)

    async def _end_undo_windows(self) -> None:
        now = time.time_ns() // 1_000_000
        catalog = self._registry.catalog
        for model, version, deletion in catalog.deleted_versions():
            if deletion.until is None or deletion.until >= now:
                continue

            def decide(model: str = model, version: str = version) -> Change | None:
                current = catalog.find(model, version)
                if current is None or current.restorable_until is None or current.restorable_until >= now:
                    return None
                return Change("purge", {"model": model, "versions": [version]})

            await self._registry.transact(model.lower(), decide)
