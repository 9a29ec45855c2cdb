"""The record of a change to a version that is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from schemas.journal import StoredFile
from worker.catalog.catalog import Catalog
from worker.catalog.entries import VersionEntry


def update_record(catalog: Catalog, entry: VersionEntry, **changed: Any) -> dict[str, Any]:
    """The `update` record of a version as it is, with `changed` members."""
    known = {"wrong": list(entry.wrong), "moved": list(entry.moved)}
    record: dict[str, Any] = {
        "model": entry.model,
        "version": entry.version,
        "checksum": entry.checksum,
        "size": entry.size,
        "metadata": entry.metadata,
        "replicas": list(entry.replicas),
        "aliases": catalog.aliases_of(entry),
        "state": "quarantined" if entry.quarantined else "available",
        "revision": entry.revision,
        "created": entry.created,
        "origin": entry.origin,
        "since": entry.since,
        "conflict": entry.conflict,
        "replicaOf": entry.replica_of,
        **{name: blobs for name, blobs in known.items() if blobs},
        **changed,
    }
    return {name: value for name, value in record.items() if value is not None}


def moved_record(catalog: Catalog, entry: VersionEntry, files: Sequence[StoredFile]) -> dict[str, Any]:
    """The `update` record that gives a version the blobs of `files`, whose bytes are right, in place of its own."""
    before = {file["path"]: file["key"] for file in entry.files}
    moved = {blob["sha256"]: blob for blob in entry.moved}
    for file in files:
        if file["key"] != before[file["path"]]:
            moved[file["sha256"]] = {"size": file["size"], "sha256": file["sha256"], "key": file["key"]}
    return update_record(catalog, entry, state="available", moved=list(moved.values()))
