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
from schemas.journal import Blob, StoredFile
from worker.cache import ModelCache
from worker.catalog.entries import VersionEntry
from worker.catalog.replicas import Pull
from worker.catalog.table import NO_ROW
from worker.catalog.updates import moved_record, update_record
from worker.journal import Entry, check_record
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
        self.refused: dict[str, str] = {}
        """Models, in lower case, whose id is taken here; and the rack whose model should be here all the same."""

    def turn(self, model: str) -> asyncio.Lock:
        """To be held from a question about the model to the records that follow from its answer."""
        return self._turns.setdefault(model.lower(), asyncio.Lock())

    def concerns(self, origin: str, model: str, version: str) -> bool:
        """Whether something is here of that version of that rack's, or awaited."""
        pull = self._registry.catalog.replicas.pull_of(model, version)
        return (pull is not None and pull.origin == origin) or self.holds(origin, model)

    def holds(self, origin: str, model: str) -> bool:
        return self._registry.catalog.origin_of(model) == origin

    def owns(self, model: str) -> bool:
        """Whether a model with that id, in any case, is this rack's own."""
        catalog = self._registry.catalog
        return catalog.table.newest(model) != NO_ROW and catalog.origin_of(model) is None

    # --- what the origin tells ---

    async def match(self, told: Told) -> None:
        """Make the copy what was told, but for its bytes: of these a pull is begun."""
        await self._converge(told.model_id, lambda: self._next(told))

    async def drop(self, origin: str, model: str, version: str, gone: Gone) -> None:
        """Make the copy as gone as its original is."""
        await self._converge(model, lambda: self._next_of_gone(origin, model, version, gone))

    async def _converge(self, model: str, decide: Callable[[], Change | None]) -> None:
        while isinstance(entry := await self._registry.transact(model.lower(), decide), Entry):
            record = entry.record
            if entry.op == "delete":
                for version in record["versions"]:
                    self._cache.forget(model, version)
            if entry.op == "update" and "conflict" in record and "replicaOf" not in record:
                _log.error("model_conflict", model=model, version=record["version"], stored_first_by=record["conflict"])

    def _next(self, told: Told) -> Change | None:
        """The next record towards what was told; None if there is no difference left."""
        model, version, origin = told.model_id, told.version, told.origin
        catalog = self._registry.catalog
        named = self._policy.rack in told.replicas
        if named or self.owns(model):
            rival = self._next_of_rivals(told)
            if rival is not None:
                return rival
        claim = self._claim(model)
        taken = (claim is not None and claim[1] != origin) or catalog.case_twin(model) is not None
        if taken and named:
            self.refused[model.lower()] = origin
        if taken or not named:
            return self._next_of_gone(origin, model, version, Gone())
        entry = catalog.find(model, version)
        if entry is not None and not _is_of(entry, told):  # purged there, and stored anew
            return self._next_of_gone(origin, model, version, Gone(purged=True))
        pull = catalog.replicas.pull_of(model, version)
        if (entry is None or entry.quarantined) and (pull is None or pull.checksum != told.sha256):
            return _pull(model, version, origin, told.sha256, told.size, told.since_ms, told.replicas)
        if entry is None:
            return None
        if entry.deleted_at is not None:
            return Change("restore", self._record(entry, versions=[version], whole=False, replicas=[]))
        metadata = told.metadata.as_dict()
        if (entry.revision, entry.metadata, list(entry.replicas)) != (told.revision, metadata, told.replicas):
            changed = {"revision": told.revision, "metadata": metadata, "replicas": told.replicas}
            return Change("update", update_record(catalog, entry, **changed))
        return self._next_alias(entry, told)

    def _claim(self, model: str) -> tuple[int, str] | None:
        """Since when a model with that id, in any case, is whose here; None if nobody's. The least is the right one: it
        was stored first. A copy that is deleted claims nothing."""
        catalog = self._registry.catalog
        for row in catalog.table.rows(model):
            entry = catalog.entry(row)
            if entry.replica_of is None or entry.deleted_at is None:
                return entry.since, entry.replica_of or self._policy.rack
        return next(((pull.since, pull.origin) for pull in catalog.replicas.pulls_of(model)), None)

    def _next_of_rivals(self, told: Told) -> Change | None:
        """What makes room for a model that was stored before the one with its id here: our own is marked, copies go."""
        catalog, origin = self._registry.catalog, told.origin
        claim = self._claim(told.model_id)
        if claim is not None and claim[1] != origin and claim < (told.since_ms, origin):
            return None
        # All versions of a model are one rack's, and have one spelling of its id.
        if catalog.origin_of(told.model_id) != origin or catalog.case_twin(told.model_id) is not None:
            for row in catalog.table.rows(told.model_id):
                entry = catalog.entry(row)
                if entry.replica_of is not None:
                    return Change("delete", self._deletion(entry, Gone(purged=True)))
                if entry.conflict is None:
                    return Change("update", update_record(catalog, entry, conflict=origin))
        for pull in catalog.replicas.pulls_of(told.model_id):
            if (pull.origin, pull.model) != (origin, told.model_id):
                return Change("pull.end", _named(pull))
        return None

    async def settle(self, rival: str, model: str) -> None:
        """That rack has no such model any more: nobody disputes ours."""

        def decide() -> Change | None:
            catalog = self._registry.catalog
            for row in catalog.table.rows(model):
                entry = catalog.entry(row)
                if entry.replica_of is None and entry.conflict == rival:
                    return Change("update", update_record(catalog, entry, conflict=None))
            return None

        await self._converge(model, decide)

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
        return Change("pull.end", _named(pull)) if pull is not None and pull.origin == origin else None

    def _deletion(self, entry: VersionEntry, gone: Gone) -> dict[str, Any]:
        now = time.time_ns() // 1_000_000
        record = self._record(entry, versions=[entry.version], whole=False, replicas=[], deleted=gone.deleted or now)
        if not gone.purged:
            record["until"] = gone.until or now + int(self._policy.undo_s * 1000)
        return record

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

    async def bring(self, pull: Pull, file: Blob | None) -> None:
        """Record that the bytes of a file are here, so that they stay until the pull is over; or, without one, that
        nothing that came need stay."""

        def decide() -> Change | None:
            replicas = self._registry.catalog.replicas
            if replicas.pull_of(pull.model, pull.version) != pull or (file is None and not replicas.has_brought(pull)):
                return None
            return Change("pull.bring", {**_named(pull), "file": file})

        await self._registry.transact(pull.model.lower(), decide, pins=() if file is None else [file["key"]])

    async def end(self, pull: Pull) -> bool:
        """The copy is complete; False if it is not, since its bytes have gone bad meanwhile."""

        def decide() -> Change | bool:
            catalog = self._registry.catalog
            if catalog.replicas.pull_of(pull.model, pull.version) != pull:
                return True
            entry = catalog.find(pull.model, pull.version)
            return False if entry is None or entry.quarantined else Change("pull.end", _named(pull))

        outcome = await self._registry.transact(pull.model.lower(), decide)
        return outcome if isinstance(outcome, bool) else True

    async def mend(self, model: str, version: str) -> None:
        """Begin a pull for a copy that is quarantined, if there is none."""

        def decide() -> Change | None:
            catalog = self._registry.catalog
            entry = catalog.find(model, version)
            if entry is None or entry.replica_of is None or not entry.quarantined:
                return None
            if catalog.replicas.pull_of(model, version) is not None:
                return None
            origin, replicas = entry.replica_of, list(entry.replicas)
            return _pull(model, version, origin, entry.checksum, entry.size, entry.since, replicas)

        await self._registry.transact(model.lower(), decide)

    def _store_record(self, told: Told, files: Sequence[StoredFile]) -> dict[str, Any]:
        record: dict[str, Any] = {
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
        try:
            check_record("store", record)
        except ModelManagerError:  # the metadata has grown since: it comes in an `update`, as it did there
            record["metadata"] = {"type": told.metadata.type, "version": told.version, "description": "", "tags": []}
        return record


def _pull(model: str, version: str, origin: str, checksum: str, size: int, since: int, replicas: list[str]) -> Change:
    """The begin of a pull; `checksum` is sha256 in hex."""
    record: dict[str, Any] = {
        "model": model,
        "version": version,
        "origin": origin,
        "checksum": checksum,
        "size": size,
        "since": since,
        "replicas": replicas,
        "replicaOf": origin,
    }
    return Change("pull.begin", record)


def _named(pull: Pull) -> dict[str, Any]:
    return {"model": pull.model, "version": pull.version, "replicaOf": pull.origin}


def _is_of(entry: VersionEntry, told: Told) -> bool:
    """Whether it is a copy of that very version, and not of one by this name that was purged."""
    return (entry.checksum, entry.type, entry.created, entry.since) == (
        told.sha256,
        told.metadata.type,
        told.created_ms,
        told.since_ms,
    )
