"""The records of the registry's journal, by `op`: what stands in a line's `rec`.

One effect is one record. A record holds all that its reply, its hint and the catalog need, so that each of these is a
function of the line. `sha256` values are hex here and times are unix milliseconds. `idem` ties a record to the request
that caused it. `replicaOf` is the rack that owns the model, in the records of a rack that holds a copy of it.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from schemas.rpc import JobState


class Idempotency(TypedDict):
    """`key` names the request among its caller's, `hash` is the sha256 (hex) of method and parsed parameters."""

    key: str
    hash: str


class Record(TypedDict):
    idem: NotRequired[Idempotency]
    replicaOf: NotRequired[str]


class Blob(TypedDict):
    """Bytes and where they lie."""

    size: int
    sha256: str
    key: str


class StoredFile(TypedDict):
    path: str
    size: int
    sha256: str
    mediaType: str
    key: str


class StoreRecord(Record):
    """op `store`: a version, with all its files, becomes visible.

    `since` is when the first version of the model was stored, if that was not this one. A copy has the `revision` that
    it was taken at, if that is not the first.
    """

    model: str
    version: str
    type: str
    files: list[StoredFile]
    metadata: dict[str, Any]
    checksum: str
    size: int
    created: int
    origin: str
    replicas: list[str]
    since: NotRequired[int]
    revision: NotRequired[int]
    upload: NotRequired[str]


class UpdateRecord(Record):
    """op `update`: the metadata, the replicas or the state of a version changed; all of them as they are now.

    `wrong` are the storage keys of its blobs, now or before, that were found gone or not what was stored. `moved` are
    the bytes that were stored again, under other keys than the `store` record's; perhaps by an `upload`. `conflict` is
    the rack that stored a model with that id before.
    """

    model: str
    version: str
    checksum: str
    size: int
    metadata: dict[str, Any]
    replicas: list[str]
    aliases: list[str]
    state: Literal["available", "quarantined"]
    revision: int
    created: int
    origin: NotRequired[str]
    since: NotRequired[int]
    conflict: NotRequired[str]
    wrong: NotRequired[list[str]]
    moved: NotRequired[list[Blob]]
    upload: NotRequired[str]


class DeleteRecord(Record):
    """op `delete`: versions are gone from sight; `until` is the end of their undo window, absent when purged."""

    model: str
    versions: list[str]
    whole: bool
    replicas: list[str]
    deleted: int
    until: NotRequired[int]


class RestoreRecord(Record):
    """op `restore`: deleted versions are back."""

    model: str
    versions: list[str]
    whole: bool
    replicas: list[str]


class PurgeRecord(Record):
    """op `purge`: the undo window of these versions is over; their bytes may be freed."""

    model: str
    versions: list[str]


class AliasRecord(Record):
    """op `alias`: an alias was set, moved, or (version null) removed."""

    model: str
    alias: str
    version: str | None
    previous: str | None


class PlannedFile(TypedDict):
    """A file of an upload: `key` and `multipart` where the store takes parts, `key` and `present` where it has it."""

    path: str
    size: int
    sha256: str
    key: NotRequired[str]
    present: NotRequired[bool]
    multipart: NotRequired[str]
    partSize: NotRequired[int]


class UploadBeginRecord(Record):
    """op `upload.begin`."""

    upload: str
    model: str
    version: str
    files: list[PlannedFile]
    expires: int


class UploadEndRecord(Record):
    """op `upload.end`: with `files` when it is completed, that is, all bytes are there and verified."""

    upload: str
    state: Literal["completed", "aborted", "expired"]
    files: NotRequired[list[StoredFile]]


class JobBeginRecord(Record):
    """op `job.begin`: long work was accepted; it is started again at boot until its end is recorded."""

    job: str
    method: str
    params: dict[str, Any]
    created: int


class JobEndRecord(Record):
    """op `job.end`."""

    job: str
    state: JobState
    result: NotRequired[dict[str, Any]]
    error: NotRequired[dict[str, Any]]


class PullBeginRecord(Record):
    """op `pull.begin`: the bytes of a version of another rack's model are to be brought here."""

    model: str
    version: str
    origin: str
    checksum: str
    size: int
    since: int
    replicas: list[str]


class PullBringRecord(Record):
    """op `pull.bring`: a file of a version that is pulled is here, verified, and need not be brought again. The blob is
    kept until the pull is over. No file: none that came is kept any more, since this rack refuses what they hold."""

    model: str
    version: str
    file: Blob | None


class PullEndRecord(Record):
    """op `pull.end`: the version is here, as it is at its origin, or is not to be here any more."""

    model: str
    version: str


class FollowRecord(Record):
    """op `follow`: another rack's changes are taken in up to the sequence `after` of its journal's life `epoch`.
    `registry` is the id of its registry."""

    origin: str
    registry: str
    epoch: int
    after: int


RECORDS: dict[str, type] = {
    "store": StoreRecord,
    "update": UpdateRecord,
    "delete": DeleteRecord,
    "restore": RestoreRecord,
    "purge": PurgeRecord,
    "alias": AliasRecord,
    "upload.begin": UploadBeginRecord,
    "upload.end": UploadEndRecord,
    "job.begin": JobBeginRecord,
    "job.end": JobEndRecord,
    "pull.begin": PullBeginRecord,
    "pull.bring": PullBringRecord,
    "pull.end": PullEndRecord,
    "follow": FollowRecord,
}
