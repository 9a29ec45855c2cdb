"""Whose storage prefix this is: `owner.json`, taken by compare-and-set."""

from __future__ import annotations

from typing import Any

import orjson

from schemas.errors import ModelManagerError
from worker.storage.blobstore import BlobStore

DOCUMENT = "owner.json"


class NotOwner(Exception):
    """The storage prefix belongs to another registry; str() tells which, and what to do."""


async def take_ownership(store: BlobStore, *, rack: str, registry_id: str, epoch: int, take_over: bool = False) -> None:
    """Write or confirm `{rack, registryId, epoch}`. NotOwner if another registry is there, unless `take_over`."""
    wanted = {"rack": rack, "registryId": registry_id, "epoch": epoch}
    for _ in range(3):  # a lost race is looked at again
        current = await store.get_document(DOCUMENT)
        if current is not None:
            owner = _parse(current.data)
            if owner == wanted:
                return
            same = owner.get("registryId") == registry_id and owner.get("rack") == rack
            if not same and not take_over:
                raise NotOwner(
                    f"the storage belongs to registry {owner.get('registryId')} of rack {owner.get('rack')}, "
                    f"and this is registry {registry_id} of rack {rack}; use another prefix, "
                    "or --take-over if the other one will never run again"
                )
        try:
            await store.put_document(DOCUMENT, orjson.dumps(wanted), etag=None if current is None else current.etag)
        except ModelManagerError as error:
            if error.code != "ERR_CONFLICT":
                raise
        else:
            return
    raise NotOwner("another process is taking the storage at this moment")


def _parse(data: bytes) -> dict[str, Any]:
    try:
        owner = orjson.loads(data)
    except orjson.JSONDecodeError:
        owner = None
    if not isinstance(owner, dict):
        raise NotOwner(f"{DOCUMENT} in the storage is not readable; look at it before removing it")
    return owner
