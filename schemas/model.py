"""What a version is made of, as it stands in replies, hints and the journal."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, NotRequired, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from schemas.ids import (
    DEFAULT_VERSION,
    MAX_INTEGER,
    MAX_METADATA_BYTES,
    MAX_TAGS,
    ModelType,
    Version,
)
from schemas.wire import canonical, walk

State = Literal["available", "quarantined", "deleted", "conflict", "pending"]
Size = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Revision = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
MAX_WAIT_MS = 5000
WaitMs = Annotated[
    int, Field(ge=0, le=MAX_WAIT_MS, description="Waits at most so many milliseconds; a busy rack may answer earlier.")
]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=128)]


def refuse_null(value: Any, nullable: frozenset[str]) -> None:
    """Raise ValidationError, at its place, for a member that is null though the contract lets it only be absent."""
    if isinstance(value, dict):
        nulls = [key for key, member in value.items() if member is None and key not in nullable]
        if nulls:
            kind = PydanticCustomError("null", "must not be null: leave it out")
            raise ValidationError.from_exception_data(
                "null", [{"type": kind, "loc": (key,), "input": None} for key in nulls]
            )


def check_padding(text: str) -> str:
    """Return `text` if it has the padding of base64 (RFC 4648); the decoder passes over `=` in other places."""
    digits = text.rstrip("=")
    if "=" in digits or len(text) - len(digits) != -len(digits) % 4:
        raise ValueError("not base64 (RFC 4648, padded)")
    return text


Base64 = Annotated[str, AfterValidator(check_padding)]


class Wire(BaseModel):
    """A message part: camelCase outside, strict types, unknown fields refused, absent rather than null."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, alias_generator=to_camel, validate_by_alias=True, allow_inf_nan=False
    )
    nullable: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _absent_rather_than_null(cls, value: Any) -> Any:
        refuse_null(value, cls.nullable)
        return value


def _check_free_value(value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_INTEGER:
        raise ValueError("integers must be within 2^53")
    if isinstance(value, str) and "\x00" in value:
        raise ValueError("text must not contain NUL")


def check_free_members(metadata: Any) -> Any:
    """Return `metadata` if its free members fit the limits for integers, text, depth and size."""
    if isinstance(metadata, dict):
        walk(metadata, _check_free_value)
        if len(canonical(metadata)) > MAX_METADATA_BYTES:
            raise ValueError(f"metadata must be at most {MAX_METADATA_BYTES} bytes of JSON")
    return metadata


FreeObject = Annotated[dict[str, Any], BeforeValidator(check_free_members)]


class Metadata(Wire):
    """What the caller says of a version: `type` is required, any further member is kept as it is."""

    model_config = ConfigDict(extra="allow", alias_generator=to_camel)

    type: ModelType
    version: Version = DEFAULT_VERSION
    description: Annotated[str, StringConstraints(max_length=16_384)] = ""
    tags: Annotated[list[Tag], Field(max_length=MAX_TAGS)] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        return check_free_members(value)

    @model_validator(mode="after")
    def _tags_once(self) -> Self:
        if len(set(self.tags)) != len(self.tags):
            raise ValueError("tags must not repeat")
        return self

    def as_dict(self) -> dict[str, Any]:
        """All members, with the defaults filled in, as they are stored and answered."""
        return self.model_dump(by_alias=True)


class Success(TypedDict):
    """What every good reply begins with; an error reply has `success: false` and `error`."""

    success: Literal[True]


class File(TypedDict):
    """One file of a version as replies show it."""

    path: str
    size: int
    checksum: str
    mediaType: str
    storageKey: str


class DeliveredFile(File):
    """A file with its bytes (base64) or with an address they can be fetched from until `expiresAt`."""

    data: NotRequired[str]
    url: NotRequired[str]


class ListedVersion(TypedDict):
    """An entry of a listing: one version. `origin` is the rack that owns the model, `modelCreatedAt` is when its first
    version was stored."""

    modelId: str
    version: str
    type: str
    checksum: str
    size: int
    createdAt: str
    modelCreatedAt: str
    revision: int
    aliases: list[str]
    origin: str
    replicas: list[str]
    state: State
    metadata: dict[str, Any]


class VersionsOfModel(TypedDict):
    """The versions stored last, in their order; `omittedVersions` were stored before them."""

    versions: list[ListedVersion]
    omittedVersions: NotRequired[int]


def version_digest(files: Iterable[tuple[str, int, str]]) -> str:
    """The digest of a version: sha256 (hex) of its canonical manifest.

    The manifest is `{"files":[{"path":..,"sha256":"<hex>","size":..},...]}` in UTF-8 JSON, keys sorted, no blanks,
    files sorted by the bytes of their path. `files` gives (path, size in bytes, sha256 hex).
    """
    ordered = sorted(files, key=lambda file: file[0].encode())
    manifest = {"files": [{"path": path, "sha256": sha256, "size": size} for path, size, sha256 in ordered]}
    return hashlib.sha256(canonical(manifest)).hexdigest()


_types = mimetypes.MimeTypes(filenames=())  # the built-in table only: the same answer on every host
_types.add_type("text/markdown", ".md")
_types.add_type("application/yaml", ".yaml")


def media_type(path: str) -> str:
    """The media type of a file by its name."""
    return _types.guess_type(path, strict=True)[0] or "application/octet-stream"
