"""What the catalog keeps of a version, a model, an upload and a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from msgspec.structs import force_setattr

from schemas.ids import digest_of
from schemas.journal import Blob, PlannedFile, StoredFile, StoreRecord, UpdateRecord
from schemas.model import File, ListedVersion, State
from schemas.rpc import JobState, MetadataReply
from schemas.wire import timestamp


@dataclass(frozen=True, slots=True)
class Deletion:
    """A delete inside its undo window: unix milliseconds, and the sequence of its record."""

    at: int
    until: int | None
    sequence: int


class VersionEntry(msgspec.Struct, frozen=True, gc=False):
    """A stored version, as its records say. `checksum` is sha256 in hex, times are unix milliseconds, `sequence` is its
    `store` record's.

    `wrong` and `moved` are those of the last `update` record; `files` says where the bytes lie now. `since` is when the
    model's first version was stored. `replica_of` is the rack that owns the model, if that is another one: `origin`.
    `conflict` is another rack that owns a model with that id, and stored it first.
    `deleted_at` is set from a delete until a restore or the end of the undo window, at which the entry goes.
    """

    model: str
    version: str
    type: str
    files: tuple[StoredFile, ...]
    metadata: dict[str, Any]
    checksum: str
    size: int
    created: int
    origin: str
    replicas: tuple[str, ...]
    sequence: int
    since: int = 0
    replica_of: str | None = None
    conflict: str | None = None
    revision: int = 1
    quarantined: bool = False
    wrong: tuple[str, ...] = ()
    moved: tuple[Blob, ...] = ()
    deleted_at: int | None = None
    restorable_until: int | None = None
    _description: MetadataReply | None = None

    @classmethod
    def of(
        cls, sequence: int, store: StoreRecord, update: UpdateRecord | None, deletion: Deletion | None
    ) -> VersionEntry:
        """The version that was stored by the record `store` at `sequence`, and changed last by `update`."""
        moved = () if update is None else tuple(update.get("moved", ()))
        return cls(
            model=store["model"],
            version=store["version"],
            type=store["type"],
            files=_where_they_lie(store["files"], moved),
            metadata=store["metadata"] if update is None else update["metadata"],
            checksum=store["checksum"],
            size=store["size"],
            created=store["created"],
            origin=store["origin"],
            replicas=tuple((update or store)["replicas"]),
            sequence=sequence,
            since=store.get("since", store["created"]),
            replica_of=store.get("replicaOf"),
            conflict=None if update is None else update.get("conflict"),
            revision=store.get("revision", 1) if update is None else update["revision"],
            quarantined=update is not None and update["state"] == "quarantined",
            wrong=() if update is None else tuple(update.get("wrong", ())),
            moved=moved,
            deleted_at=None if deletion is None else deletion.at,
            restorable_until=None if deletion is None else deletion.until,
        )

    @property
    def state(self) -> State:
        if self.deleted_at is not None:
            return "deleted"
        if self.quarantined:
            return "quarantined"
        return "available" if self.conflict is None else "conflict"

    def file_views(self) -> list[File]:
        return [file_view(file) for file in self.files]

    def listed(self, aliases: list[str]) -> ListedVersion:
        return {
            "modelId": self.model,
            "version": self.version,
            "type": self.type,
            "checksum": digest_of(self.checksum),
            "size": self.size,
            "createdAt": timestamp(self.created),
            "modelCreatedAt": timestamp(self.since),
            "revision": self.revision,
            "aliases": aliases,
            "origin": self.origin,
            "replicas": list(self.replicas),
            "state": self.state,
            "metadata": self.metadata,
        }

    def described(self, aliases: list[str]) -> MetadataReply:
        """The reply about this version. What is in it is shared with other replies, and is not to be changed."""
        description = self._description
        if description is None:
            description = self._describe()
            force_setattr(self, "_description", description)  # made once: all of it but the aliases is final
        reply = description.copy()
        reply["aliases"] = aliases
        return reply

    def _describe(self) -> MetadataReply:
        return {
            "success": True,
            "modelId": self.model,
            "version": self.version,
            "metadata": self.metadata,
            "revision": self.revision,
            "checksum": digest_of(self.checksum),
            "size": self.size,
            "files": self.file_views(),
            "aliases": [],
            "origin": self.origin,
            "replicas": list(self.replicas),
            "state": self.state,
            "createdAt": timestamp(self.created),
            "modelCreatedAt": timestamp(self.since),
        }


def _where_they_lie(files: Sequence[StoredFile], moved: Sequence[Blob]) -> tuple[StoredFile, ...]:
    if not moved:
        return tuple(files)
    keys = {blob["sha256"]: blob["key"] for blob in moved}
    return tuple({**file, "key": keys.get(file["sha256"], file["key"])} for file in files)


def file_view(file: StoredFile) -> File:
    """A stored file as replies show it."""
    return {
        "path": file["path"],
        "size": file["size"],
        "checksum": digest_of(file["sha256"]),
        "mediaType": file["mediaType"],
        "storageKey": file["key"],
    }


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model: its versions in the order they were stored, deleted ones included, and its aliases."""

    id: str
    versions: Mapping[str, VersionEntry]
    aliases: Mapping[str, str]

    def aliases_of(self, version: str) -> list[str]:
        return sorted(alias for alias, target in self.aliases.items() if target == version)


@dataclass(slots=True)
class UploadEntry:
    """An upload. `stored_files` are there once it is completed: verified bytes that wait for `storeModel`. `sequences`
    are those of its records, `over` is when it ended (unix ms). What is over has its files in its first record only."""

    id: str
    model: str
    version: str
    files: tuple[PlannedFile, ...]
    expires: int
    state: Literal["open", "completed", "stored", "aborted", "expired"] = "open"
    stored_files: tuple[StoredFile, ...] = ()
    sequences: list[int] = field(default_factory=list)
    over: int | None = None

    def end(self, time_ms: int) -> None:
        """It is over: thousands of files would stay in memory, for a reply that is rarely asked for."""
        self.over = time_ms
        self.files = self.stored_files = ()

    @property
    def keys(self) -> list[str]:
        """The storage keys this upload needs to stay: what it brings or found present, while it is not over."""
        if self.state == "completed":
            return [file["key"] for file in self.stored_files]
        return [file["key"] for file in self.files if "key" in file] if self.state == "open" else []


@dataclass(slots=True)
class JobEntry:
    """A job. `ended` is false until its end is recorded. `sequences` are those of its records, `over` is when it ended
    (unix ms). Its result is in its last record only."""

    id: str
    method: str
    params: dict[str, Any]
    created: int
    state: JobState = "queued"
    error: dict[str, Any] | None = None
    sequences: list[int] = field(default_factory=list)
    over: int | None = None

    @property
    def ended(self) -> bool:
        return self.state not in ("queued", "running")
