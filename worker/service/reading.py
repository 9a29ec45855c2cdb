"""Lookups: what is known of models, and their bytes or the addresses of them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, cast
from urllib.parse import quote

from schemas.errors import ModelManagerError
from schemas.hints import hint_of
from schemas.journal import StoredFile
from schemas.model import DeliveredFile, VersionsOfModel
from schemas.rpc import (
    ChangesReply,
    GetChanges,
    GetModel,
    GetModelMetadata,
    GetModelReply,
    GetStorageStats,
    ListModels,
    ListReply,
    MetadataReply,
    Ping,
    PingReply,
    SearchModels,
    StatsReply,
)
from schemas.wire import timestamp
from worker import __version__
from worker.cache import ModelCache
from worker.catalog.entries import VersionEntry, file_view
from worker.catalog.search import Query, list_query, page, search_query
from worker.content import LocalFile, OpenedFile, Redirect, Stream
from worker.context import Context
from worker.policy import Policy
from worker.readiness import Readiness
from worker.registry import Registry
from worker.storage.blobstore import BlobMissing, BlobStore

VERSIONS_OF_MODEL = 1000
_RECORDS_AT_ONCE = 4  # each has up to 1 MiB in the journal, and some eight times as much in memory

Quarantine = Callable[[VersionEntry, str], Any]


class Reading:
    """The lookups. `file_url` makes a signed address of ours for a path, where the store has none of its own."""

    def __init__(
        self,
        registry: Registry,
        store: BlobStore,
        policy: Policy,
        cache: ModelCache,
        readiness: Readiness,
        file_url: Callable[[str, int], str],
    ) -> None:
        self._registry = registry
        self._store = store
        self._policy = policy
        self._cache = cache
        self._readiness = readiness
        self._file_url = file_url
        self.archive_state: Callable[[], dict[str, Any]] = dict
        """How far the archive of the journal leads, if there is one: `archivedSequence` and `archiveLagSeconds`."""
        self.pull_state: Callable[[str, str], dict[str, Any]] = lambda model, version: {}
        """What is known of a version that is on its way from another rack."""
        self.replication_state: Callable[[], dict[str, Any]] = dict

    async def get_model_metadata(self, params: GetModelMetadata, context: Context) -> MetadataReply:
        entry = await self._resolve(params.model_id, params.version)
        return entry.described(self._registry.catalog.aliases_of(entry))

    async def _resolve(self, model_id: str, reference: str) -> VersionEntry:
        """As the catalog does; ERR_MODEL_NOT_FOUND tells of a copy that is on its way."""
        try:
            return await self._registry.look(lambda: self._registry.catalog.resolve(model_id, reference))
        except ModelManagerError as error:
            if error.code == "ERR_MODEL_NOT_FOUND" and (state := self.pull_state(model_id, reference)):
                text = f"{model_id}:{reference} is on its way from {state['origin']}."
                raise ModelManagerError(error.code, text, **{**error.details, **state}) from None
            raise

    async def list_models(self, params: ListModels, context: Context) -> ListReply:
        query = list_query(params.type)
        return await self._page(query, params.limit, params.cursor)

    async def search_models(self, params: SearchModels, context: Context) -> ListReply:
        query = search_query(params.criteria, params.sort)
        return await self._page(query, params.limit, params.cursor)

    async def _page(self, query: Query, limit: int, cursor: str | None) -> ListReply:
        registry = self._registry
        return await page(registry.catalog, query, look=registry.look, limit=limit, cursor=cursor)

    async def versions_of(self, model_id: str) -> VersionsOfModel:
        """The versions of a model that are not deleted, in the order they were stored; of many those stored last."""
        catalog = self._registry.catalog

        def entry_of(row: int) -> VersionEntry | None:
            # One that was purged while those before it were read has no row any more.
            return catalog.entry(row) if catalog.has_row(row) else None

        rows, omitted = catalog.versions_of(model_id, VERSIONS_OF_MODEL)
        entries = [await self._registry.look(partial(entry_of, row)) for row in reversed(rows)]
        listed = [entry.listed(catalog.aliases_of(entry)) for entry in entries if entry and entry.deleted_at is None]
        return {"versions": listed, "omittedVersions": omitted} if omitted else {"versions": listed}

    async def ping(self, params: Ping, context: Context) -> PingReply:
        return {
            "success": True,
            "rack": self._policy.rack,
            "version": __version__,
            "registryId": self._registry.journal.registry_id,
            "epoch": self._registry.journal.epoch,
            "head": self._registry.journal.head,
            "ready": self._readiness.ready,
        }

    # --- bytes ---

    async def _available(self, model_id: str, reference: str) -> VersionEntry:
        """The version, if its bytes may be given out."""
        entry = await self._resolve(model_id, reference)
        trusts = self._registry.catalog.blobs.trusts
        if entry.quarantined or not all(trusts(file["key"]) for file in entry.files):
            raise ModelManagerError(
                "ERR_CHECKSUM_MISMATCH",
                f"{model_id}:{entry.version} is quarantined: its stored bytes are known to be wrong.",
                version=entry.version,
                state="quarantined",
            )
        return entry

    async def get_model(self, params: GetModel, context: Context) -> GetModelReply:
        entry = await self._available(params.model_id, params.version)
        limit = self._policy.max_inline_size
        inline = params.delivery == "inline" or (params.delivery == "auto" and entry.size <= limit)
        if inline and entry.size > limit:
            raise ModelManagerError(
                "ERR_MODEL_TOO_LARGE",
                f"{entry.size} bytes do not go inside a message; ask for delivery by url.",
                maxInlineSize=limit,
                size=entry.size,
            )
        reply = GetModelReply(
            success=True,
            modelId=entry.model,
            version=entry.version,
            metadata=entry.metadata,
            checksum=f"sha256:{entry.checksum}",
            size=entry.size,
            files=[],
        )
        if inline:
            contents = await self._contents(entry)
            reply["files"] = [_delivered(file, contents[file["sha256"]]) for file in entry.files]
            if len(entry.files) == 1:
                reply["modelData"] = reply["files"][0]["data"]
        else:
            reply["expiresAt"] = timestamp(int((time.time() + self._policy.url_s) * 1000))
            reply["files"] = [await self._linked(entry, file) for file in entry.files]
        return reply

    async def _contents(self, entry: VersionEntry) -> dict[str, bytes]:
        """The bytes of a small version by sha256. They are kept together: an entry of the cache is a whole version."""
        contents: dict[str, bytes] = {}
        complete = True
        for file in entry.files:
            sha256 = file["sha256"]
            if sha256 in contents:
                continue
            data = self._cache.bytes_of(entry.model, entry.version, sha256)
            complete = complete and data is not None
            contents[sha256] = await self._read_verified(entry, file) if data is None else data
        if not complete:
            self._cache.put(entry.model, entry.version, contents)
        return contents

    async def _read_verified(self, entry: VersionEntry, file: StoredFile) -> bytes:
        try:
            data = b"".join([chunk async for chunk in self._store.read(file["key"])])
        except BlobMissing:
            data = b""
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        if sha256 != file["sha256"]:
            raise ModelManagerError(
                "ERR_CHECKSUM_MISMATCH",
                f"The stored bytes of {file['path']} are not what was stored; validateModel tells more.",
                version=entry.version,
                path=file["path"],
            )
        return data

    async def _linked(self, entry: VersionEntry, file: StoredFile) -> DeliveredFile:
        name = file["path"].rpartition("/")[2]
        url = await self._store.presign_get(file["key"], expires_s=self._policy.url_s, filename=name)
        if url is None:
            path = f"/api/models/{entry.model}/versions/{quote(entry.version)}/files/{quote(file['path'])}"
            url = self._file_url(path, self._policy.url_s)
        delivered = cast(DeliveredFile, file_view(file))
        delivered["url"] = url
        return delivered

    async def open_file(self, model_id: str, reference: str, path: str | None, *, redirect: bool = False) -> OpenedFile:
        """A file of a version, for streaming. Without `path`, the only file; ERR_INVALID_REQUEST if it has several."""
        entry = await self._available(model_id, reference)
        if path is None:
            if len(entry.files) != 1:
                raise ModelManagerError(
                    "ERR_INVALID_REQUEST",
                    f"{model_id}:{entry.version} has several files; ask for one of them.",
                    files=[file["path"] for file in entry.files],
                )
            file = entry.files[0]
        else:
            found = next((file for file in entry.files if file["path"] == path), None)
            if found is None:
                raise ModelManagerError("ERR_NOT_FOUND", f"{model_id}:{entry.version} has no file {path}.", path=path)
            file = found
        content = await self._content(file, redirect)
        return OpenedFile(file["path"], file["size"], file["sha256"], file["mediaType"], content, entry.version)

    async def _content(self, file: StoredFile, redirect: bool) -> LocalFile | Stream | Redirect:
        key = file["key"]
        if redirect:
            name = file["path"].rpartition("/")[2]
            url = await self._store.presign_get(key, expires_s=self._policy.url_s, filename=name)
            if url is not None:
                return Redirect(url)
        local = self._store.local_path(key)
        return Stream(partial(self._stream, key)) if local is None else LocalFile(local)

    async def _stream(self, key: str, start: int, length: int) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._store.read(key, start, length):
                yield chunk
        except BlobMissing:
            raise ModelManagerError("ERR_CHECKSUM_MISMATCH", "The stored bytes are gone.") from None

    # --- the rack ---

    async def get_storage_stats(self, params: GetStorageStats, context: Context) -> StatsReply:
        usage = await self._store.usage()
        catalog, journal, cache = self._registry.catalog, self._registry.journal, self._cache.stats()
        storage: dict[str, Any] = {
            "backend": self._store.backend,
            "blobs": len(catalog.blobs),
            "blobBytes": catalog.blobs.bytes,
        }
        if usage.free_bytes is not None:
            storage["freeBytes"] = usage.free_bytes
        if usage.total_bytes is not None:
            storage["totalBytes"] = usage.total_bytes
        return {
            "success": True,
            "storage": storage,
            "registry": {
                "models": catalog.totals.models,
                "versions": catalog.totals.versions,
                "bytes": catalog.totals.bytes,
                "deleted": len(catalog.deleted),
                "epoch": journal.epoch,
                "sequence": journal.head,
                **self.archive_state(),
            },
            "cache": {
                "entries": cache.entries,
                "bytes": cache.bytes,
                "hits": cache.hits,
                "misses": cache.misses,
            },
            "replication": {
                "factor": self._policy.replication_factor,
                "peers": list(self._policy.peers),
                **self.replication_state(),
            },
        }

    async def get_changes(self, params: GetChanges, context: Context) -> ChangesReply:
        journal = self._registry.journal
        if params.epoch != journal.epoch or not journal.changes_from <= params.after <= journal.head:
            raise ModelManagerError("ERR_CHANGES_GONE", epoch=journal.epoch, head=journal.head)
        give_up = time.monotonic() + params.wait_ms / 1000
        after = params.after
        while True:
            head = journal.head
            changes, after = await asyncio.to_thread(self._changes, after, head, params.limit)
            remaining = give_up - time.monotonic()
            if changes or remaining <= 0:
                return {
                    "success": True,
                    "registryId": journal.registry_id,
                    "epoch": journal.epoch,
                    "head": journal.head,
                    "changes": changes,
                    "next": after,
                }
            if after >= journal.head:
                await self._registry.moved(remaining)

    def _changes(self, after: int, head: int, limit: int) -> tuple[list[dict[str, Any]], int]:
        """The hints of the first `limit` records after a sequence, and the sequence to go on from. Blocks.

        Few records are in memory at once: they may have thousands of files, of which a hint tells nothing.
        """
        journal, rack = self._registry.journal, self._policy.rack
        changes: list[dict[str, Any]] = []
        while limit > 0:
            entries = journal.read(after, min(limit, _RECORDS_AT_ONCE))
            if after < journal.changes_from:  # compaction took some away meanwhile
                raise ModelManagerError("ERR_CHANGES_GONE", epoch=journal.epoch, head=journal.head)
            for entry in entries:
                after, time_ms = entry.sequence, entry.time_ms
                hint = hint_of(entry.op, entry.record, rack=rack, epoch=journal.epoch, sequence=after, time_ms=time_ms)
                if hint is not None:
                    changes.append(dict(hint))
            if len(entries) < min(limit, _RECORDS_AT_ONCE):
                return changes, max(after, head)
            limit -= len(entries)
        return changes, after


def _delivered(file: StoredFile, data: bytes) -> DeliveredFile:
    delivered = cast(DeliveredFile, file_view(file))
    delivered["data"] = base64.b64encode(data).decode()
    return delivered
