"""The steps of a boot that may have to wait for something, or that refuse for good."""

from __future__ import annotations

import asyncio

import structlog

from schemas.errors import ERRORS, EXIT_CONFIG_INVALID, ModelManagerError
from worker.journal import JournalDamaged, JournalLocked
from worker.readiness import Readiness
from worker.registry import Registry
from worker.storage.blobstore import BlobStore
from worker.upkeep.archive import Archive, ArchiveAhead
from worker.upkeep.ownership import NotOwner, Owner, take_ownership

_log = structlog.get_logger()

_POLL_S = 0.5
_EXIT_UNAVAILABLE = ERRORS["ERR_STORAGE_UNAVAILABLE"].exit_code


class BootRefused(Exception):
    """The worker cannot start, and waiting would not help."""

    def __init__(self, reason: str, exit_code: int = EXIT_CONFIG_INVALID) -> None:
        self.exit_code = exit_code
        super().__init__(reason)


async def open_registry(registry: Registry, readiness: Readiness) -> None:
    """Lock and replay; wait while another process holds the lock. Raises BootRefused."""
    waiting = False
    while True:
        try:
            await asyncio.to_thread(registry.open)
        except JournalLocked as locked:
            readiness.set("registry", False, "another process holds the registry's lock")
            if not waiting:
                _log.warning("waiting_for_lock", reason=str(locked))
            waiting = True
            await asyncio.sleep(_POLL_S)
        except JournalDamaged as damaged:
            raise BootRefused(f"the journal is damaged: {damaged}") from None
        except OSError as error:
            reason = f"the registry cannot be opened: {error.strerror}: {error.filename}"
            raise BootRefused(reason, _EXIT_UNAVAILABLE) from None
        else:
            return


async def reach_storage(store: BlobStore, readiness: Readiness) -> None:
    """Wait until the store answers; a bucket that is not there is refused at once. Raises BootRefused."""
    while True:
        try:
            await store.probe()
        except ModelManagerError as error:
            readiness.set("storage", False, error.message)
            if "bucket" in error.details:
                raise BootRefused(error.message, _EXIT_UNAVAILABLE) from None
            _log.warning("waiting_for_storage", reason=error.message)
            await asyncio.sleep(_POLL_S)
        else:
            readiness.set("storage", True)
            return


async def own_storage(store: BlobStore, registry: Registry, *, rack: str, take_over: bool) -> Owner:
    """Take the storage prefix, before the registry is started. Raises BootRefused."""
    journal = registry.journal
    try:
        return await take_ownership(
            store,
            rack=rack,
            registry_id=journal.registry_id,
            epoch=journal.epoch,
            take_over=take_over,
            raise_epoch=journal.raise_epoch,
        )
    except NotOwner as error:
        raise BootRefused(str(error)) from None
    except ModelManagerError as error:
        raise BootRefused(error.message, _EXIT_UNAVAILABLE) from None


async def begin_archive(archive: Archive) -> None:
    """See that the archive holds no more than the registry's folder does. Raises BootRefused."""
    try:
        await archive.begin()
    except ArchiveAhead as error:
        reason = f"the registry's folder is an older copy: {error}; move it away, and `model-manager rebuild`"
        raise BootRefused(reason) from None
    except ModelManagerError as error:
        raise BootRefused(error.message, _EXIT_UNAVAILABLE) from None
