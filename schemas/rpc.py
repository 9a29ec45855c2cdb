"""The methods: their parameters (pydantic models) and their replies (typed dictionaries).

Parameters are checked on arrival. Replies are built by the worker as plain dictionaries, checked by the type checker
against these types and, in the tests, against the schemas generated from them: no run-time cost on the hot path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self

from pydantic import Field, StringConstraints, model_validator
from typing_extensions import TypedDict

from schemas.ids import (
    MAX_FILES,
    MAX_INTEGER,
    MAX_TAGS,
    Alias,
    Digest,
    FilePath,
    ModelId,
    ModelType,
    Rack,
    Ulid,
    Version,
    VersionRef,
    check_paths,
)
from schemas.model import (
    Base64,
    DeliveredFile,
    File,
    FreeObject,
    ListedVersion,
    Metadata,
    Revision,
    Size,
    State,
    Success,
    Tag,
    WaitMs,
    Wire,
)
from schemas.uploads import (
    AbortReply,
    AbortUpload,
    CompleteUpload,
    CreateUpload,
    GetUpload,
    GetUploadReply,
    UploadReply,
)

Cursor = Annotated[str, StringConstraints(min_length=1, max_length=2048)]
Limit = Annotated[int, Field(ge=1, le=1000)]
Sequence = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


class ModelReply(Success):
    modelId: str


# --- storing ---------------------------------------------------------------------------------------------------------


class InlineFile(Wire):
    """A file inside the message. `data` is base64; its decoded size counts against `maxInlineSize`."""

    path: FilePath
    data: Base64
    checksum: Digest | None = None


class StoreModel(Wire):
    """Store a version, from exactly one of `modelData`, `files` and `uploadId`."""

    model_id: ModelId
    metadata: Metadata
    model_data: Base64 | None = None
    filename: FilePath | None = None
    checksum: Digest | None = None
    files: Annotated[list[InlineFile], Field(min_length=1, max_length=MAX_FILES)] | None = None
    upload_id: Ulid | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [self.model_data is not None, self.files is not None, self.upload_id is not None]
        if sum(given) != 1:
            raise ValueError("exactly one of modelData, files and uploadId must be there")
        if self.model_data is None and (self.filename is not None or self.checksum is not None):
            raise ValueError("filename and checksum go with modelData only")
        if self.files is not None:
            check_paths(file.path for file in self.files)
        return self


class StoreReply(ModelReply):
    version: str
    storageKey: NotRequired[str]
    checksum: str
    size: int
    files: list[File]
    createdAt: str
    created: bool


# --- looking up ------------------------------------------------------------------------------------------------------


class GetModel(Wire):
    model_id: ModelId
    version: VersionRef = "latest"
    delivery: Literal["auto", "inline", "url"] = "auto"


class GetModelReply(ModelReply):
    version: str
    metadata: dict[str, Any]
    checksum: str
    size: int
    files: list[DeliveredFile]
    expiresAt: NotRequired[str]
    modelData: NotRequired[str]


class ListModels(Wire):
    type: ModelType | None = None
    limit: Limit = 100
    cursor: Cursor | None = None


class SizeRange(Wire):
    min: Size | None = None
    max: Size | None = None


Moment = Annotated[
    str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)$", max_length=40)
]


class TimeRange(Wire):
    from_: Annotated[Moment | None, Field(alias="from")] = None
    to: Moment | None = None


class SearchModels(Wire):
    """`criteria` is flat: `tags` (all of), `size`, `createdAt`, `text`; any other member equals a metadata member."""

    criteria: FreeObject = Field(default_factory=dict)
    sort: Literal["modelId", "-modelId", "size", "-size", "createdAt", "-createdAt"] = "modelId"
    limit: Limit = 100
    cursor: Cursor | None = None


class Criteria(Wire):
    """The members of `criteria` with a meaning of their own; the rest are in `equals`."""

    tags: Annotated[list[Tag], Field(max_length=MAX_TAGS)] | None = None
    size: SizeRange | None = None
    created_at: TimeRange | None = None
    text: Annotated[str, StringConstraints(min_length=1, max_length=1024)] | None = None


class ListReply(Success):
    models: list[ListedVersion]
    count: int
    nextCursor: NotRequired[str]


class GetModelMetadata(Wire):
    model_id: ModelId
    version: VersionRef = "latest"


class MetadataReply(ModelReply):
    version: str
    metadata: dict[str, Any]
    revision: int
    checksum: str
    size: int
    files: list[File]
    aliases: list[str]
    origin: str
    replicas: list[str]
    state: State
    createdAt: str
    modelCreatedAt: str


# --- changing --------------------------------------------------------------------------------------------------------


class UpdateModelMetadata(Wire):
    """`metadata` is a JSON merge patch (RFC 7396): null removes a member; `type` and `version` cannot change."""

    model_id: ModelId
    version: VersionRef = "latest"
    metadata: FreeObject
    expected_revision: Revision | None = None


class DeleteModel(Wire):
    model_id: ModelId
    version: Version | None = None
    purge: bool = False


class DeleteReply(ModelReply):
    deletedAt: str
    versions: list[str]
    restorableUntil: NotRequired[str]


class RestoreModel(Wire):
    model_id: ModelId
    version: Version | None = None


class RestoreReply(ModelReply):
    versions: list[str]


class SetAlias(Wire):
    """`expectedVersion` makes it a compare-and-set; null means that the alias must not exist."""

    nullable: ClassVar[frozenset[str]] = frozenset({"expectedVersion"})

    model_id: ModelId
    alias: Alias
    version: Version
    expected_version: Version | None = None


class DeleteAlias(Wire):
    nullable: ClassVar[frozenset[str]] = frozenset({"expectedVersion"})

    model_id: ModelId
    alias: Alias
    expected_version: Version | None = None


class AliasReply(ModelReply):
    alias: str
    version: str | None
    previous: str | None


# --- jobs ------------------------------------------------------------------------------------------------------------


class ReplicateModel(Wire):
    """Name the racks that should hold a version; without `peers` the placement of the settings."""

    model_id: ModelId
    version: VersionRef = "latest"
    peers: Annotated[list[Rack], Field(max_length=256)] | None = None
    wait_ms: WaitMs = 2000


class ReplicationResult(TypedDict):
    """What is known of one peer. `succeeded`: that rack holds a copy; `pending`: the copy is on its way or not begun;
    `failed`: it is tried again, `message` says why it is not there."""

    peer: str
    state: Literal["pending", "succeeded", "failed"]
    message: str


class JobReply(Success):
    """The answer of a job that is not done within `waitMs`."""

    jobId: str
    state: JobState


class ReplicateReply(ModelReply):
    version: str
    totalPeers: int
    successfulReplications: int
    failedReplications: int
    results: list[ReplicationResult]


class ValidateModel(Wire):
    model_id: ModelId
    version: VersionRef = "latest"
    wait_ms: WaitMs = 2000


class ValidatedFile(TypedDict):
    path: str
    expectedChecksum: str
    actualChecksum: str | None
    isValid: bool


class FindingEntry(TypedDict):
    severity: Literal["info", "warning", "error"]
    code: str
    message: str
    path: str
    place: str


class ValidateReply(ModelReply):
    """`files` begins with those that are not valid; `omittedFiles` more of them did not fit into the reply."""

    version: str
    isValid: bool
    expectedChecksum: str
    actualChecksum: str | None
    files: list[ValidatedFile]
    omittedFiles: NotRequired[int]
    findings: list[FindingEntry]


class GetJob(Wire):
    job_id: Ulid
    wait_ms: WaitMs = 0


class CancelJob(Wire):
    job_id: Ulid


class JobStatus(Success):
    jobId: str
    method: str
    state: JobState
    progress: dict[str, int]
    result: NotRequired[dict[str, Any]]
    error: NotRequired[dict[str, Any]]


# --- the rack --------------------------------------------------------------------------------------------------------


class GetStorageStats(Wire):
    pass


class StatsReply(Success):
    storage: dict[str, Any]
    registry: dict[str, Any]
    cache: dict[str, Any]
    replication: dict[str, Any]


class GetChanges(Wire):
    """Changes with a sequence beyond `after`, of the life of the journal that `epoch` names."""

    epoch: Annotated[int, Field(ge=1, le=MAX_INTEGER)]
    after: Sequence
    limit: Limit = 100
    wait_ms: WaitMs = 0


class ChangesReply(Success):
    registryId: str
    epoch: int
    head: int
    changes: list[dict[str, Any]]
    next: int


class Ping(Wire):
    pass


class PingReply(Success):
    """`registryId` is the registry's for all its life; `epoch` is raised when it is rebuilt or restored."""

    rack: str
    version: str
    registryId: str
    epoch: int
    head: int
    ready: bool


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the contract. Lookups never wait behind writes. A repeated `effect` is answered from its record.

    A write that `frees` room is also taken when the registry's disk is full.
    """

    name: str
    params: type[Wire]
    reply: type
    lane: Literal["lookup", "write"]
    effect: bool
    summary: str
    job: bool = False
    frees: bool = False

    @property
    def acknowledges(self) -> bool:
        """Whether an answer says that something was done, by the request itself or by a job."""
        return self.lane == "write" or self.reply is JobStatus


_TABLE = (
    Method("storeModel", StoreModel, StoreReply, "write", True, "Store a version of a model."),
    Method("getModel", GetModel, GetModelReply, "lookup", False, "A version with its bytes or their addresses."),
    Method("listModels", ListModels, ListReply, "lookup", False, "The versions in the catalog, page by page."),
    Method("searchModels", SearchModels, ListReply, "lookup", False, "The versions that meet the criteria."),
    Method("getModelMetadata", GetModelMetadata, MetadataReply, "lookup", False, "What is known of a version."),
    Method("updateModelMetadata", UpdateModelMetadata, MetadataReply, "write", True, "Change metadata by merge patch."),
    Method(
        "deleteModel",
        DeleteModel,
        DeleteReply,
        "write",
        True,
        "Delete a version, or all, with an undo window.",
        frees=True,
    ),
    Method("restoreModel", RestoreModel, RestoreReply, "write", True, "Undo a delete within its window."),
    Method("setAlias", SetAlias, AliasReply, "write", True, "Point an alias at a version."),
    Method("deleteAlias", DeleteAlias, AliasReply, "write", True, "Remove an alias."),
    Method("replicateModel", ReplicateModel, ReplicateReply, "write", True, "Name the racks to hold it.", job=True),
    Method("validateModel", ValidateModel, ValidateReply, "write", True, "Read the bytes back and check.", job=True),
    Method("getStorageStats", GetStorageStats, StatsReply, "lookup", False, "Storage, registry, cache, replication."),
    Method("createUpload", CreateUpload, UploadReply, "write", True, "Begin to bring the bytes of a version."),
    Method("getUpload", GetUpload, GetUploadReply, "lookup", False, "The state of an upload; signs parts."),
    Method("completeUpload", CompleteUpload, UploadReply, "write", True, "Verify what was uploaded.", job=True),
    Method("abortUpload", AbortUpload, AbortReply, "write", True, "Give up an upload.", frees=True),
    Method("getChanges", GetChanges, ChangesReply, "lookup", False, "The change feed of this rack."),
    Method("getJob", GetJob, JobStatus, "lookup", False, "The state of a job."),
    Method("cancelJob", CancelJob, JobStatus, "write", False, "Cancel a job.", frees=True),
    Method("ping", Ping, PingReply, "lookup", False, "Who answers, and how far its journal is."),
)

METHODS: dict[str, Method] = {method.name: method for method in _TABLE}
