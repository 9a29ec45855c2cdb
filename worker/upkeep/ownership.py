"""Whose storage prefix this is: `owner.json`, taken by compare-and-set, and looked at again while we run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from schemas.errors import ModelManagerError
from worker.storage.blobstore import BlobStore, Document

DOCUMENT = "owner.json"

_ATTEMPTS = 3

_log = structlog.get_logger()


class NotOwner(Exception):
    """The storage prefix belongs to another registry, or to a later epoch of this one; str() tells what to do."""


@dataclass(frozen=True, slots=True)
class Owner:
    """What `owner.json` says. `since` is when this epoch took the prefix, in unix milliseconds."""

    rack: str
    registry_id: str
    epoch: int
    since: int

    def is_like(self, rack: str, registry_id: str, epoch: int) -> bool:
        return (self.rack, self.registry_id, self.epoch) == (rack, registry_id, epoch)

    def encoded(self) -> bytes:
        return orjson.dumps(
            {"rack": self.rack, "registryId": self.registry_id, "epoch": self.epoch, "since": self.since}
        )


async def read_owner(store: BlobStore) -> tuple[Owner | None, str | None]:
    """The owner, if there is one, and the tag of the document. Raises NotOwner if it cannot be read."""
    document = await store.get_document(DOCUMENT)
    return (None, None) if document is None else (_parse(document), document.etag)


def epoch_to_take(owner: Owner | None, *, rack: str, registry_id: str, epoch: int, take_over: bool) -> int:
    """The epoch under which this registry, which is in `epoch`, may have the prefix of `owner`: its own, or, when it
    takes over from another registry, one that is higher than the other's.

    Raises NotOwner if it may not. A later epoch of the same registry never gives way: what it acknowledged would be
    lost.
    """
    if owner is None:
        return epoch
    if (owner.registry_id, owner.rack) == (registry_id, rack):
        if owner.epoch > epoch:
            raise NotOwner(
                f"this registry went on elsewhere in epoch {owner.epoch}, and this folder is of epoch {epoch}; it must"
                " not be used again: move it away, and use the folder that was rebuilt, or rebuild once more"
            )
        return epoch
    if not take_over:
        raise NotOwner(
            f"the storage belongs to registry {owner.registry_id} of rack {owner.rack}, and this is registry"
            f" {registry_id} of rack {rack}; `model-manager rebuild` brings back a registry that was lost; else use"
            " another prefix, or --take-over if the other one will never run again"
        )
    return max(epoch, owner.epoch + 1)


async def take_ownership(
    store: BlobStore,
    *,
    rack: str,
    registry_id: str,
    epoch: int,
    take_over: bool = False,
    raise_epoch: Callable[[int], object] | None = None,
) -> Owner:
    """Make `owner.json` say that the prefix is this registry's, which is in `epoch`.

    `raise_epoch` is called first, in a thread, if it has to be another epoch. Raises as `epoch_to_take` does.
    """
    for _ in range(_ATTEMPTS):
        current, etag = await read_owner(store)
        epoch = epoch_to_take(current, rack=rack, registry_id=registry_id, epoch=epoch, take_over=take_over)
        if current is not None and current.is_like(rack, registry_id, epoch):
            return current
        if raise_epoch is not None:
            await asyncio.to_thread(raise_epoch, epoch)
        owner = Owner(rack, registry_id, epoch, time.time_ns() // 1_000_000)
        try:
            await store.put_document(DOCUMENT, owner.encoded(), etag=etag)
        except ModelManagerError as error:
            if error.code != "ERR_CONFLICT":  # that one is a lost race, or our own write whose answer was lost
                raise
        else:
            return owner
    raise NotOwner("another process is taking the storage at this moment")


async def confirm_ownership(store: BlobStore, owner: Owner) -> None:
    """Return if the prefix is still `owner`'s. Raises NotOwner."""
    current, etag = await read_owner(store)
    if current is None:
        await store.put_document(DOCUMENT, owner.encoded(), etag=etag)
        _log.warning("owner_document_was_missing", document=DOCUMENT)
    elif not current.is_like(owner.rack, owner.registry_id, owner.epoch):
        raise NotOwner(
            f"the storage was taken over by registry {current.registry_id} of rack {current.rack}, epoch"
            f" {current.epoch}; this one is {owner.registry_id}, epoch {owner.epoch}"
        )


async def watch_ownership(store: BlobStore, owner: Owner, *, period_s: float) -> None:
    """Look every period, until the prefix is another's: NotOwner. A store that does not answer proves nothing."""
    while True:
        await asyncio.sleep(period_s)
        try:
            await confirm_ownership(store, owner)
        except ModelManagerError as error:
            _log.warning("ownership_not_confirmed", code=error.code, reason=error.message)


def _parse(document: Document) -> Owner:
    try:
        owner: dict[str, Any] = orjson.loads(document.data)
        return Owner(owner["rack"], owner["registryId"], owner["epoch"], owner.get("since", 0))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise NotOwner(f"{DOCUMENT} in the storage is not readable; look at it before removing it") from None
