"""Changing what is stored: metadata, deletes and their undo, aliases. Each is one decision and one record."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, cast

from pydantic import ValidationError

from schemas.errors import ModelManagerError
from schemas.ids import MAX_ALIASES
from schemas.model import Metadata
from schemas.rpc import (
    AliasReply,
    DeleteAlias,
    DeleteModel,
    DeleteReply,
    MetadataReply,
    RestoreModel,
    RestoreReply,
    SetAlias,
    UpdateModelMetadata,
)
from schemas.wire import timestamp
from worker.answers import answer_of
from worker.cache import ModelCache
from worker.catalog.entries import ModelEntry, VersionEntry
from worker.catalog.updates import update_record
from worker.context import Context
from worker.journal import Entry
from worker.policy import Policy
from worker.registry import Change, Registry


class Editing:
    """The small writes."""

    def __init__(self, registry: Registry, policy: Policy, cache: ModelCache) -> None:
        self._registry = registry
        self._policy = policy
        self._cache = cache

    async def update_model_metadata(self, params: UpdateModelMetadata, context: Context) -> MetadataReply:
        def decide() -> Change:
            self._registry.catalog.check_own(params.model_id)
            entry = self._registry.catalog.resolve(params.model_id, params.version)
            if params.expected_revision not in (None, entry.revision):
                raise ModelManagerError(
                    "ERR_CONFLICT",
                    f"The metadata is at revision {entry.revision}, not {params.expected_revision}.",
                    revision=entry.revision,
                )
            metadata = patched(entry, params.metadata)
            record = update_record(self._registry.catalog, entry, metadata=metadata, revision=entry.revision + 1)
            return Change("update", with_request(record, context))

        return cast(MetadataReply, await self._write(params.model_id, decide))

    async def delete_model(self, params: DeleteModel, context: Context) -> DeleteReply:
        def decide() -> Change:
            model = self._model(params.model_id)
            if params.version is None:
                chosen = [v for v in model.versions.values() if params.purge or v.deleted_at is None]
            else:
                chosen = [v for v in (model.versions.get(params.version),) if v is not None]
                chosen = [v for v in chosen if params.purge or v.deleted_at is None]
            if not chosen:
                wanted = params.model_id if params.version is None else f"{params.model_id}:{params.version}"
                raise ModelManagerError("ERR_MODEL_NOT_FOUND", f"There is no {wanted} to delete.")
            now = _now()
            record: dict[str, Any] = {
                "model": model.id,
                "versions": [entry.version for entry in chosen],
                "whole": params.version is None,
                "replicas": _replicas(chosen),
                "deleted": now,
            }
            if not params.purge:
                record["until"] = now + int(self._policy.undo_s * 1000)
            return Change("delete", with_request(record, context))

        reply = await self._write(params.model_id, decide, whole=params.version is None)
        for version in reply["versions"]:
            self._cache.forget(params.model_id, version)
        return cast(DeleteReply, reply)

    async def restore_model(self, params: RestoreModel, context: Context) -> RestoreReply:
        def decide() -> Change:
            model = self._model(params.model_id)
            deleted = [v for v in model.versions.values() if v.deleted_at is not None]
            wanted = [v for v in deleted if params.version in (None, v.version)]
            if not wanted:
                what = params.model_id if params.version is None else f"{params.model_id}:{params.version}"
                raise ModelManagerError("ERR_MODEL_NOT_FOUND", f"There is no deleted {what} to restore.")
            now = _now()
            chosen = [v for v in wanted if v.restorable_until is None or v.restorable_until >= now]
            if not chosen:
                last = max(wanted, key=lambda v: v.restorable_until or 0)
                raise ModelManagerError(
                    "ERR_MODEL_NOT_FOUND",
                    f"The time to restore {last.model}:{last.version} is over.",
                    restorableUntil=timestamp(last.restorable_until or 0),
                )
            record = {
                "model": model.id,
                "versions": [entry.version for entry in chosen],
                "whole": params.version is None,
                "replicas": _replicas(chosen),
            }
            return Change("restore", with_request(record, context))

        return cast(RestoreReply, await self._write(params.model_id, decide, whole=True))

    async def set_alias(self, params: SetAlias, context: Context) -> AliasReply:
        def decide() -> Change | AliasReply:
            model = self._model(params.model_id)
            entry = self._registry.catalog.resolve(model.id, params.version)
            if entry.version != params.version:
                raise ModelManagerError("ERR_INVALID_REQUEST", f"{params.version} is an alias; name a version.")
            if params.alias in model.versions:
                raise ModelManagerError("ERR_CONFLICT", f"{params.alias} is a version of {model.id}.")
            previous = self._check_alias(model, params)
            if previous is None and len(model.aliases) >= MAX_ALIASES:
                # They all go into a record, with an update, and into a reply.
                raise ModelManagerError(
                    "ERR_INVALID_REQUEST",
                    f"{model.id} has {MAX_ALIASES} aliases, the most there may be.",
                    limit=MAX_ALIASES,
                )
            if previous == params.version:
                return _alias_reply(model.id, params.alias, params.version, previous)
            return Change("alias", _alias_record(model.id, params.alias, params.version, previous, context))

        return cast(AliasReply, await self._write(params.model_id, decide))

    async def delete_alias(self, params: DeleteAlias, context: Context) -> AliasReply:
        def decide() -> Change:
            model = self._model(params.model_id)
            if params.alias not in model.aliases:
                raise ModelManagerError("ERR_NOT_FOUND", f"{model.id} has no alias {params.alias}.", alias=params.alias)
            previous = self._check_alias(model, params)
            return Change("alias", _alias_record(model.id, params.alias, None, previous, context))

        return cast(AliasReply, await self._write(params.model_id, decide))

    def _check_alias(self, model: ModelEntry, params: SetAlias | DeleteAlias) -> str | None:
        """The version the alias names now; ERR_CONFLICT if it is not the expected one."""
        previous = model.aliases.get(params.alias)
        if "expected_version" in params.model_fields_set and previous != params.expected_version:
            raise ModelManagerError(
                "ERR_CONFLICT",
                f"{params.alias} names {previous or 'nothing'}, not {params.expected_version or 'nothing'}.",
                alias=params.alias,
                version=previous,
            )
        return previous

    def _model(self, model_id: str) -> ModelEntry:
        """The model, if it is this rack's own."""
        self._registry.catalog.check_own(model_id)
        model = self._registry.catalog.model(model_id)
        if model is None:
            raise ModelManagerError("ERR_MODEL_NOT_FOUND", f"There is no model {model_id}.", modelId=model_id)
        return model

    async def _write(self, model_id: str, decide: Any, *, whole: bool = False) -> dict[str, Any]:
        """`whole`: all versions of the model are looked at."""
        ahead = partial(self._registry.catalog.records_of, model_id) if whole else None
        outcome = await self._registry.transact(model_id.lower(), decide, ahead=ahead)
        if not isinstance(outcome, Entry):
            return cast(dict[str, Any], outcome)
        return await self._registry.look(lambda: answer_of(outcome, self._registry.catalog))


def patched(entry: VersionEntry, patch: dict[str, Any]) -> dict[str, Any]:
    """The metadata after a JSON merge patch (RFC 7396); ERR_INVALID_METADATA if it is then no valid metadata."""
    for member in ("type", "version"):
        if member in patch and patch[member] != entry.metadata[member]:
            raise ModelManagerError("ERR_INVALID_METADATA", f"metadata.{member}: cannot change.")
    merged = cast(dict[str, Any], _merge(entry.metadata, patch))
    try:
        return Metadata.model_validate(merged).as_dict()
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        reason = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems[:3])
        raise ModelManagerError("ERR_INVALID_METADATA", f"metadata: {reason}") from None


def _merge(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merge(merged.get(name), value)
    return merged


def with_request(record: dict[str, Any], context: Context) -> dict[str, Any]:
    """The record, tied to the request that causes it."""
    return record if context.idempotency is None else {**record, "idem": context.idempotency}


def _alias_record(
    model: str, alias: str, version: str | None, previous: str | None, context: Context
) -> dict[str, Any]:
    return with_request({"model": model, "alias": alias, "version": version, "previous": previous}, context)


def _alias_reply(model: str, alias: str, version: str | None, previous: str | None) -> AliasReply:
    return {"success": True, "modelId": model, "alias": alias, "version": version, "previous": previous}


def _replicas(entries: list[VersionEntry]) -> list[str]:
    return sorted({peer for entry in entries for peer in entry.replicas})


def _now() -> int:
    return time.time_ns() // 1_000_000
