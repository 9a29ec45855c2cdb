"""The copies here made what their versions are at their origin: a record for each difference, until there is none.

What is told may be told late, twice or in any order of versions; what counts is the last state that was asked for. So
whoever asks the origin and then writes does both in the model's `turn`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import structlog

from schemas.errors import ModelManagerError
from schemas.journal import StoredFile, StoreRecord
from worker.cache import ModelCache
from worker.catalog.entries import VersionEntry
from worker.catalog.replicas import Pull
from worker.catalog.updates import moved_record, update_record
from worker.journal import Entry
from worker.policy import Policy
from worker.registry import Change, Registry
from worker.replication.peers import Gone, Told

_log = structlog.get_logger()


class Mirror:
    """Writes the copies. Every decision is made on what the catalog says when it is recorded."""

    def __init__(self, registry: Registry, policy: Policy, cache: ModelCache) -> None:
        self._registry = registry
        self._policy = policy
        self._cache = cache
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.conflicts: dict[str, str] = {}
        """Models of other racks that cannot be copied, and the rack that wants it: the id is taken."""

    def turn(self, model: str) -> asyncio.Lock:
        """To be held from a question about the model to the records that follow from its answer."""
        return self._turns.setdefault(model.lower(), asyncio.Lock())

    def concerns(self, origin: str, model: str, version: str) -> bool:
        """Whether something is here of that version of that rack's, or awaited."""
        pull = self._registry.catalog.replicas.pull_of(model, version)
        return (pull is not None and pull.origin == origin) or self.holds(origin, model)

    def holds(self, origin: str, model: str) -> bool:
        return self._registry.catalog.origin_of(model) == origin

    # --- what the origin tells ---

    async def match(self, told: Told) -> None:
        """Make the copy what was told, but for its bytes: of these a pull is begun."""
        await self._converge(told.model_id, lambda: self._next(told))

    async def drop(self, origin: str, model: str, version: str, gone: Gone) -> None:
        """Make the copy as gone as its original is."""
        await self._converge(model, lambda: self._next_of_gone(origin, model, version, gone))

    async def _converge(self, model: str, decide: Callable[[], Change | None]) -> None:
        while isinstance(entry := await self._registry.transact(model.lower(), decide), Entry):
            if entry.op == "delete":
                for version in entry.record["versions"]:
                    self._cache.forget(model, version)

    def _next(self, told: Told) -> Change | None:
        """The next record towards what was told; None if there is no difference left."""
        model, version, origin = told.model_id, told.version, told.origin
        catalog = self._registry.catalog
        if self._policy.rack not in told.replicas or self._is_taken(told):
            return self._next_of_gone(origin, model, version, Gone())
        entry = catalog.find(model, version)
        if entry is not None and entry.checksum != told.sha256:  # purged there, and stored anew
            return self._next_of_gone(origin, model, version, Gone(purged=True))
        pull = catalog.replicas.pull_of(model, version)
        if (entry is None or entry.quarantined) and (pull is None or pull.checksum != told.sha256):
            return Change("pull.begin", self._begin(told))
        if entry is None:
            return None
        if entry.deleted_at is not None:
            return Change("restore", self._record(entry, versions=[version], whole=False, replicas=[]))
        metadata = told.metadata.as_dict()
        if (entry.revision, entry.metadata, list(entry.replicas)) != (told.revision, metadata, told.replicas):
            changed = {"revision": told.revision, "metadata": metadata, "replicas": told.replicas}
            return Change("update", update_record(catalog, entry, **changed))
        return self._next_alias(entry, told)

    def _next_alias(self, entry: VersionEntry, told: Told) -> Change | None:
        here = self._registry.catalog.aliases_of(entry)
        for alias in told.aliases:
            if alias not in here:
                model = self._registry.catalog.model(entry.model)
                previous = None if model is None else model.aliases.get(alias)
                return Change("alias", self._record(entry, alias=alias, version=entry.version, previous=previous))
        for alias in here:
            if alias not in told.aliases:
                return Change("alias", self._record(entry, alias=alias, version=None, previous=entry.version))
        return None

    def _next_of_gone(self, origin: str, model: str, version: str, gone: Gone) -> Change | None:
        catalog = self._registry.catalog
        entry = catalog.find(model, version)
        if entry is not None and entry.replica_of == origin and (gone.purged or entry.deleted_at is None):
            return Change("delete", self._deletion(entry, gone))
        pull = catalog.replicas.pull_of(model, version)
        if pull is not None and pull.origin == origin:
            return Change("pull.end", {"model": model, "version": version, "replicaOf": origin})
        return None

    def _deletion(self, entry: VersionEntry, gone: Gone) -> dict[str, Any]:
        now = time.time_ns() // 1_000_000
        record = self._record(entry, versions=[entry.version], whole=False, replicas=[], deleted=gone.deleted or now)
        if not gone.purged:
            record["until"] = gone.until or now + int(self._policy.undo_s * 1000)
        return record

    def _is_taken(self, told: Told) -> bool:
        """Whether this rack, or another one, owns a model with that id: whose copy it cannot be then."""
        catalog = self._registry.catalog
        owner = catalog.origin_of(told.model_id)
        own = owner is None and catalog.since(told.model_id) is not None
        if not own and owner in (None, told.origin) and catalog.case_twin(told.model_id) is None:
            self.conflicts.pop(told.model_id, None)
            return False
        if self.conflicts.get(told.model_id) != told.origin:
            self.conflicts[told.model_id] = told.origin
            _log.error("model_conflict", model=told.model_id, owner=owner or self._policy.rack, claimed_by=told.origin)
        return True

    def _begin(self, told: Told) -> dict[str, Any]:
        return {
            "model": told.model_id,
            "version": told.version,
            "origin": told.origin,
            "checksum": told.sha256,
            "size": told.size,
            "replicas": told.replicas,
            "replicaOf": told.origin,
        }

    def _record(self, entry: VersionEntry, **members: Any) -> dict[str, Any]:
        return {"model": entry.model, **members, "replicaOf": entry.replica_of}

    # --- what arrives ---

    async def arrive(self, pull: Pull, told: Told, files: Sequence[StoredFile]) -> bool:
        """Record that the bytes are here; False if they are not asked for any more. In the model's turn.

        ERR_CONFLICT if some of them were found to be wrong meanwhile, or gone.
        """
        catalog = self._registry.catalog

        def decide() -> Change | bool:
            if catalog.replicas.pull_of(pull.model, pull.version) != pull:
                return False
            if not all(catalog.blobs.trusts(file["key"]) for file in files):
                raise ModelManagerError("ERR_CONFLICT", "Bytes that the rack had are gone or known to be wrong since.")
            entry = catalog.find(pull.model, pull.version)
            if entry is None:
                return Change("store", self._store_record(told, files))
            return Change("update", moved_record(catalog, entry, files)) if entry.quarantined else True

        keys = [file["key"] for file in files]
        outcome = await self._registry.transact(pull.model.lower(), decide, pins=keys)
        return outcome if isinstance(outcome, bool) else True

    async def end(self, pull: Pull) -> None:
        """The copy is complete."""

        def decide() -> Change | None:
            if self._registry.catalog.replicas.pull_of(pull.model, pull.version) != pull:
                return None
            record = {"model": pull.model, "version": pull.version, "replicaOf": pull.origin}
            return Change("pull.end", record)

        await self._registry.transact(pull.model.lower(), decide)

    def _store_record(self, told: Told, files: Sequence[StoredFile]) -> StoreRecord:
        record: StoreRecord = {
            "model": told.model_id,
            "version": told.version,
            "type": told.metadata.type,
            "files": sorted(files, key=lambda file: file["path"].encode()),
            "metadata": told.metadata.as_dict(),
            "checksum": told.sha256,
            "size": told.size,
            "created": told.created_ms,
            "since": told.since_ms,
            "origin": told.origin,
            "replicas": told.replicas,
            "replicaOf": told.origin,
        }
        if told.revision > 1:
            record["revision"] = told.revision
        return record
