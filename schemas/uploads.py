"""The messages of an upload: parameters and replies of its four methods."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, Self

from pydantic import Field, model_validator
from typing_extensions import TypedDict

from schemas.ids import MAX_FILES, Digest, FilePath, ModelId, Ulid, Version, check_paths
from schemas.model import Size, Success, WaitMs, Wire

PartNumber = Annotated[int, Field(ge=1, le=10_000)]


class UploadFile(Wire):
    path: FilePath
    size: Size
    sha256: Digest


class CreateUpload(Wire):
    model_id: ModelId
    version: Version
    files: Annotated[list[UploadFile], Field(min_length=1, max_length=MAX_FILES)]

    @model_validator(mode="after")
    def _paths_fit(self) -> Self:
        check_paths(file.path for file in self.files)
        return self


class UploadFileState(TypedDict):
    """`present`: the rack has these bytes. Else parts to PUT (object store) or one `url` to PUT to (disk)."""

    path: str
    size: int
    sha256: str
    present: bool
    partSize: NotRequired[int]
    parts: NotRequired[int]
    received: NotRequired[list[int]]
    url: NotRequired[str]


class UploadReply(Success):
    uploadId: str
    modelId: str
    version: str
    state: Literal["open", "completed", "stored", "aborted", "expired"]
    expiresAt: str
    files: list[UploadFileState]


class PartToSign(Wire):
    number: PartNumber
    sha256: Digest


class GetUpload(Wire):
    """With `path` and `parts` the reply has signed addresses for these parts of that file, and what was `received` of
    that file only."""

    upload_id: Ulid
    path: FilePath | None = None
    parts: Annotated[list[PartToSign], Field(min_length=1, max_length=1000)] | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.path is None) != (self.parts is None):
            raise ValueError("path and parts go together")
        return self


class SignedPartUrl(TypedDict):
    number: int
    url: str
    headers: dict[str, str]


class GetUploadReply(UploadReply):
    urls: NotRequired[list[SignedPartUrl]]


class CompleteUpload(Wire):
    upload_id: Ulid
    wait_ms: WaitMs = 2000


class AbortUpload(Wire):
    upload_id: Ulid


class AbortReply(Success):
    uploadId: str
    state: Literal["aborted"]
