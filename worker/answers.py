"""The reply to a request, as a function of the record of its effect: the first answer and each repeat are the same."""

from __future__ import annotations

from typing import Any, cast

from schemas.ids import digest_of
from schemas.model import File
from schemas.rpc import AliasReply, DeleteReply, MetadataReply, RestoreReply, StoreReply
from schemas.wire import timestamp
from worker.catalog.catalog import Catalog
from worker.catalog.entries import VersionEntry, file_view
from worker.journal import Entry


def store_reply(entry: VersionEntry, *, created: bool) -> StoreReply:
    """The reply for a version that is in the catalog."""
    return _store_reply(entry.model, entry.version, entry.checksum, entry.file_views(), entry.created, created)


def _store_reply(
    model: str, version: str, checksum: str, files: list[File], created_ms: int, created: bool
) -> StoreReply:
    reply: StoreReply = {
        "success": True,
        "modelId": model,
        "version": version,
        "checksum": digest_of(checksum),
        "size": sum(file["size"] for file in files),
        "files": files,
        "createdAt": timestamp(created_ms),
        "created": created,
    }
    if len(files) == 1:
        reply["storageKey"] = files[0]["storageKey"]
    return reply


def answer_of(entry: Entry, catalog: Catalog) -> dict[str, Any]:
    """The reply that a `store`, `update`, `delete`, `restore` or `alias` entry stands for."""
    record = entry.record
    match entry.op:
        case "store":
            files = [file_view(file) for file in record["files"]]
            reply: Any = _store_reply(
                record["model"], record["version"], record["checksum"], files, record["created"], True
            )
        case "update":
            reply = _update_reply(record, catalog)
        case "delete":
            reply = _delete_reply(record)
        case "restore":
            reply = RestoreReply(success=True, modelId=record["model"], versions=record["versions"])
        case "alias":
            reply = AliasReply(
                success=True,
                modelId=record["model"],
                alias=record["alias"],
                version=record["version"],
                previous=record["previous"],
            )
        case _:
            raise KeyError(entry.op)
    return cast(dict[str, Any], reply)


def _update_reply(record: Any, catalog: Catalog) -> MetadataReply:
    """Files never change, so they are not in the record: the catalog has them while the version exists."""
    entry = catalog.find(record["model"], record["version"])
    return {
        "success": True,
        "modelId": record["model"],
        "version": record["version"],
        "metadata": record["metadata"],
        "revision": record["revision"],
        "checksum": digest_of(record["checksum"]),
        "size": record["size"],
        "files": [] if entry is None else entry.file_views(),
        "aliases": record["aliases"],
        "origin": record.get("origin", "" if entry is None else entry.origin),
        "replicas": record["replicas"],
        "state": "conflict" if "conflict" in record and record["state"] == "available" else record["state"],
        "createdAt": timestamp(record["created"]),
        "modelCreatedAt": timestamp(record.get("since", record["created"])),
    }


def _delete_reply(record: Any) -> DeleteReply:
    reply: DeleteReply = {
        "success": True,
        "modelId": record["model"],
        "deletedAt": timestamp(record["deleted"]),
        "versions": record["versions"],
    }
    if "until" in record:
        reply["restorableUntil"] = timestamp(record["until"])
    return reply
