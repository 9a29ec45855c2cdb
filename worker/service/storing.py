"""Storing versions: bytes first, durable and verified, then one record."""

from __future__ import annotations

import base64
import binascii
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import structlog

from schemas.errors import ModelManagerError
from schemas.ids import digest_of, hex_of
from schemas.journal import StoredFile, StoreRecord
from schemas.model import Metadata, media_type, version_digest
from schemas.rpc import StoreModel, StoreReply
from worker.answers import store_reply
from worker.cache import ModelCache
from worker.catalog.entries import UploadEntry, VersionEntry
from worker.catalog.updates import moved_record
from worker.context import Context
from worker.journal import Entry
from worker.pins import Pins, pinned
from worker.policy import Policy
from worker.registry import Change, Registry
from worker.replication.placement import place
from worker.service.editing import with_request
from worker.service.examining import Examining
from worker.storage.blobstore import BlobInfo, BlobStore
from worker.uploads.plan import FEW_FILES, check_fits
from worker.uploads.sessions import UploadSessions
from worker.validation.source import BytesSource, Source

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Inline:
    """A file whose bytes came inside the message."""

    path: str
    data: bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The version that a caller stores; of each file path, size and sha256."""

    model_id: str
    metadata: Metadata
    files: tuple[tuple[str, int, str], ...]


class Storing:
    """storeModel in its three forms, and the streaming upload of one file.

    A store of what is there already ends as `created: false`, in whichever form it comes. If the rack's own bytes of it
    are known to be wrong, those that came take their place, and the version is available again.
    """

    def __init__(
        self,
        registry: Registry,
        store: BlobStore,
        policy: Policy,
        cache: ModelCache,
        uploads: UploadSessions,
        examining: Examining,
    ) -> None:
        self._registry = registry
        self._store = store
        self._policy = policy
        self._cache = cache
        self._uploads = uploads
        self._examining = examining

    async def store_model(self, params: StoreModel, context: Context) -> StoreReply:
        self._policy.check_type(params.metadata.type)
        if params.upload_id is not None:
            return await self._store_uploaded(params, context)
        inline = _decode(params, self._policy.max_inline_size)
        wanted = _Wanted(
            params.model_id, params.metadata, tuple((file.path, len(file.data), file.sha256) for file in inline)
        )
        sources = [(file.path, BytesSource(file.data)) for file in inline]
        with pinned(self._registry) as pins:
            files = None
            if await self._is_missing(wanted, sources):
                await self._check_fits(wanted, context)
                files = await self._put_inline(inline, wanted, pins)
            reply = await self._commit(wanted, files, context)
        if reply["created"]:
            contents = {file.sha256: file.data for file in inline}
            self._cache.put(params.model_id, params.metadata.version, contents)
        return reply

    async def store_stream(
        self,
        model_id: str,
        metadata: Metadata,
        *,
        filename: str,
        chunks: AsyncIterator[bytes],
        size: int | None,
        sha256: str | None,
        context: Context,
    ) -> StoreReply:
        """Store a version of one file from a stream of unknown length; `sha256` in hex, if the caller declared it."""
        self._policy.check_type(metadata.type)
        self._registry.catalog.check_own(model_id)
        self._check_not_alias(model_id, metadata.version)
        if size is not None:
            self._policy.check_size(size)
        with pinned(self._registry) as pins:
            key = pins.new(self._store.new_key())
            stored = await self._store.put(
                key,
                chunks,
                info=self._info(model_id, metadata),
                size=size,
                sha256=sha256,
                max_size=self._policy.max_model_size,
            )
            wanted = _Wanted(model_id, metadata, ((filename, stored.size, stored.sha256),))
            file = _stored_file(filename, stored.size, stored.sha256, key)
            if await self._is_missing(wanted, self._examining.stored([file])):
                file["key"] = await pins.stored(stored.sha256) or key
            return await self._commit(wanted, [file], context)

    async def _store_uploaded(self, params: StoreModel, context: Context) -> StoreReply:
        upload = self._uploads.completed(params.upload_id or "", params.model_id, params.metadata.version)
        files = await self._uploads.stored_files(upload)
        wanted = _Wanted(
            params.model_id, params.metadata, tuple((file["path"], file["size"], file["sha256"]) for file in files)
        )
        with pinned(self._registry) as pins:
            for file in files:
                pins.new(file["key"])
            if upload.state == "completed":
                await self._is_missing(wanted, self._examining.stored(files))
            return await self._commit(wanted, files, context, upload=upload)

    async def _put_inline(self, inline: list[_Inline], wanted: _Wanted, pins: Pins) -> list[StoredFile]:
        """The files, with the bytes that are not there yet put into the store, once each."""
        keys: dict[str, str] = {}
        for file in inline:
            if file.sha256 in keys:
                continue
            known = await pins.stored(file.sha256)
            keys[file.sha256] = known or pins.new(self._store.new_key())
            if known is None:
                await self._store.put(
                    keys[file.sha256],
                    _once(file.data),
                    info=self._info(wanted.model_id, wanted.metadata),
                    size=len(file.data),
                    sha256=file.sha256,
                    max_size=self._policy.max_model_size,
                )
        return [_stored_file(file.path, len(file.data), file.sha256, keys[file.sha256]) for file in inline]

    # --- the commit ---

    async def _is_missing(self, wanted: _Wanted, sources: Sequence[tuple[str, Source]]) -> bool:
        """Whether bytes of the version are needed. Raises what refuses it: by its name, or by what its files hold."""
        existing = await self._registry.look(lambda: self._existing(wanted))
        if existing is not None:
            return not self._is_sound(existing)
        await self._examining.refuse(wanted.metadata.type, sources)
        return True

    def _existing(self, wanted: _Wanted) -> VersionEntry | None:
        """The stored version if it has the same files and type; ERR_MODEL_ALREADY_EXISTS if it has others."""
        model_id, metadata = wanted.model_id, wanted.metadata
        catalog = self._registry.catalog
        twin = catalog.case_twin(model_id)
        if twin is not None:
            raise ModelManagerError("ERR_CONFLICT", f"The model {twin} differs in case only.", modelId=twin)
        catalog.check_own(model_id)
        entry = catalog.find(model_id, metadata.version)
        if entry is None:
            self._check_not_alias(model_id, metadata.version)
            self._check_undisputed(model_id)
            return None
        stored = sorted((file["path"], file["size"], file["sha256"]) for file in entry.files)
        if entry.type != metadata.type or stored != sorted(wanted.files):
            raise ModelManagerError(
                "ERR_MODEL_ALREADY_EXISTS",
                f"{model_id}:{entry.version} is stored already, with other files or another type.",
                checksum=digest_of(entry.checksum),
                type=entry.type,
                state=entry.state,
            )
        return entry

    def _is_sound(self, entry: VersionEntry) -> bool:
        """Whether none of its bytes are known to be wrong."""
        trusts = self._registry.catalog.blobs.trusts
        return not entry.quarantined and all(trusts(file["key"]) for file in entry.files)

    def _check_not_alias(self, model_id: str, version: str) -> None:
        model = self._registry.catalog.model(model_id)
        if model is not None and version in model.aliases:
            raise ModelManagerError("ERR_CONFLICT", f"{version} is an alias of {model_id}.", alias=version)

    def _check_undisputed(self, model_id: str) -> None:
        newest = self._registry.catalog.newest(model_id)
        if newest is not None and newest.conflict is not None:
            message = f"{newest.conflict} stored a model {model_id} first: give yours another name."
            raise ModelManagerError("ERR_CONFLICT", message, modelId=model_id, origin=newest.conflict)

    async def _commit(
        self, wanted: _Wanted, files: list[StoredFile] | None, context: Context, *, upload: UploadEntry | None = None
    ) -> StoreReply:
        """Record the version, or find it there. `files` is None if it was there before; they are those of `upload`."""
        model_id, version = wanted.model_id, wanted.metadata.version
        self._policy.check_size(sum(size for _, size, _ in wanted.files))

        def decide() -> Change | StoreReply:
            existing = self._existing(wanted)
            if existing is None:
                return Change("store", self._record(wanted, self._usable(files, upload), context, upload))
            if not self._is_sound(existing):
                return Change("update", self._moved(existing, self._usable(files, upload), context, upload))
            if existing.deleted_at is None:
                return store_reply(existing, created=False)
            record = {"model": model_id, "versions": [version], "whole": False, "replicas": list(existing.replicas)}
            return Change("restore", with_request(record, context))

        keys = [file["key"] for file in files or ()]
        outcome = await self._registry.transact(model_id.lower(), decide, pins=keys)
        if isinstance(outcome, Entry) and outcome.op == "update":  # a deleted version is yet to be restored
            outcome = await self._registry.transact(model_id.lower(), decide, pins=keys)
        if not isinstance(outcome, Entry):
            return outcome
        entry = await self._registry.look(lambda: self._registry.catalog.find(model_id, version))
        if entry is None:  # deleted and purged by someone else since
            raise ModelManagerError("ERR_MODEL_NOT_FOUND", f"{model_id}:{version} was purged meanwhile.")
        return store_reply(entry, created=outcome.op == "store")

    def _record(
        self, wanted: _Wanted, files: list[StoredFile], context: Context, upload: UploadEntry | None = None
    ) -> dict[str, Any]:
        metadata, policy = wanted.metadata, self._policy
        checksum = wanted.files[0][2] if len(wanted.files) == 1 else version_digest(wanted.files)
        record: StoreRecord = {
            "model": wanted.model_id,
            "version": metadata.version,
            "type": metadata.type,
            "files": sorted(files, key=lambda file: file["path"].encode()),
            "metadata": metadata.as_dict(),
            "checksum": checksum,
            "size": sum(size for _, size, _ in wanted.files),
            "created": time.time_ns() // 1_000_000,
            "origin": policy.rack,
            "replicas": list(place(checksum, policy.peers, policy.replication_factor, policy.rack)),
        }
        newest = self._registry.catalog.newest(wanted.model_id)
        if newest is not None:
            record["since"] = newest.since
        if upload is not None:
            record["upload"] = upload.id
        return with_request(cast("dict[str, Any]", record), context)

    def _moved(
        self, entry: VersionEntry, files: list[StoredFile], context: Context, upload: UploadEntry | None
    ) -> dict[str, Any]:
        """The record that gives a version these blobs, whose bytes are right, in place of its own."""
        if entry.quarantined and not entry.wrong:  # since before records said which of its blobs are wrong
            raise ModelManagerError("ERR_CONFLICT", "The version is quarantined: validate it, then store it again.")
        record = moved_record(self._registry.catalog, entry, files)
        if upload is not None:
            record["upload"] = upload.id
        return record if entry.deleted_at is not None else with_request(record, context)

    def _usable(self, files: list[StoredFile] | None, upload: UploadEntry | None) -> list[StoredFile]:
        """The files, if a version may be recorded with them; ERR_CONFLICT if not."""
        if upload is not None and upload.state != "completed":
            message = f"The upload is {upload.state}; begin a new one."
            raise ModelManagerError("ERR_CONFLICT", message, state=upload.state)
        if files is None or not all(self._registry.catalog.blobs.trusts(file["key"]) for file in files):
            message = "Bytes that the rack had are gone or known to be wrong since: send them again."
            raise ModelManagerError("ERR_CONFLICT", message)
        return files

    async def _check_fits(self, wanted: _Wanted, context: Context) -> None:
        """ERR_INVALID_REQUEST if the record would be too large, before there are bytes."""
        if len(wanted.files) <= FEW_FILES:
            return
        key = self._store.new_key()
        files = [_stored_file(path, size, sha256, key) for path, size, sha256 in wanted.files]
        check_fits("store", await self._registry.look(lambda: self._record(wanted, files, context)))

    def _info(self, model_id: str, metadata: Metadata) -> BlobInfo:
        return BlobInfo(format=metadata.type, model=model_id, version=metadata.version, rack=self._policy.rack)


def _decode(params: StoreModel, limit: int) -> list[_Inline]:
    """The inline files, decoded and checked against their declared checksums."""
    if params.files is not None:
        given = [(f"files.{i}.data", f.path, f.data, f.checksum) for i, f in enumerate(params.files)]
    else:
        filename = params.filename or f"model.{params.metadata.type}"
        given = [("modelData", filename, params.model_data or "", params.checksum)]
    if sum(len(text) for _, _, text, _ in given) // 4 * 3 > limit + 2 * len(given):
        raise _too_large(limit)
    files = []
    total = 0
    for place_, path, text, checksum in given:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise ModelManagerError("ERR_INVALID_MODEL_DATA", f"{place_}: not base64 (RFC 4648, padded).") from None
        total += len(data)
        if total > limit:
            raise _too_large(limit)
        sha256 = hashlib.sha256(data).hexdigest()
        if checksum is not None and hex_of(checksum) != sha256:
            raise ModelManagerError(
                "ERR_CHECKSUM_MISMATCH",
                f"{place_}: the bytes do not have the declared checksum.",
                path=path,
                expected=checksum,
                actual=digest_of(sha256),
            )
        files.append(_Inline(path, data, sha256))
    return files


def _too_large(limit: int) -> ModelManagerError:
    return ModelManagerError(
        "ERR_MODEL_TOO_LARGE",
        f"At most {limit} bytes may come inside a message; upload what is larger.",
        maxInlineSize=limit,
    )


def _stored_file(path: str, size: int, sha256: str, key: str) -> StoredFile:
    return {"path": path, "size": size, "sha256": sha256, "mediaType": media_type(path), "key": key}


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
