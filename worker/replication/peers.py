"""The other racks, as replication sees them; and what one of them tells of a version, checked as a stranger's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from schemas.errors import ModelManagerError
from schemas.ids import (
    LATEST,
    MAX_ALIASES,
    MAX_FILES,
    MAX_INTEGER,
    Alias,
    Digest,
    FilePath,
    ModelId,
    Rack,
    Version,
    check_paths,
    hex_of,
)
from schemas.model import Metadata, version_digest
from schemas.rpc import ChangesReply, GetModelReply, ListReply, MetadataReply, PingReply


class Peer(Protocol):
    """The methods of one other rack that replication calls; ModelManagerClient has them all, and its errors."""

    async def ping(self) -> PingReply: ...

    async def get_changes(self, epoch: int, after: int, *, limit: int | None = None) -> ChangesReply: ...

    async def list_models(self, *, limit: int | None = None, cursor: str | None = None) -> ListReply: ...

    async def get_model_metadata(self, model_id: str, version: str | None = None) -> MetadataReply: ...

    async def get_model(
        self, model_id: str, version: str | None = None, *, delivery: Literal["auto", "inline", "url"] | None = None
    ) -> GetModelReply: ...


class Peers(Protocol):
    """All other racks."""

    # The rack with this name, whether it is there or not.
    def rack(self, name: str) -> Peer: ...

    # The bytes at an address that a rack gave, from `start` on. ModelManagerError, ERR_STORAGE_UNAVAILABLE when the
    # connection breaks: what came until then is good to go on from.
    def read(self, url: str, start: int) -> AsyncGenerator[bytes]: ...

    async def close(self) -> None: ...


def _ours(moment: datetime) -> datetime:
    if not 0 <= moment.timestamp() * 1000 <= MAX_INTEGER:
        raise ValueError("is no time that a journal can hold")
    return moment


Time = Annotated[AwareDatetime, AfterValidator(_ours)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER)]
T = TypeVar("T", bound="_Tale")


class _Tale(BaseModel):
    """Something that another rack tells; members that are not known are passed over: it may run a later program."""

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True)

    @classmethod
    def of(cls: type[T], reply: Mapping[str, Any]) -> T:
        """ERR_INTERNAL if it is not what a rack may tell."""
        try:
            return cls.model_validate(reply)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, problem["loc"]))
            raise ModelManagerError("ERR_INTERNAL", f"A rack tells what cannot be: {place}: {problem['msg']}") from None


class Head(_Tale):
    """How far a rack's journal is: from `ping`."""

    registry_id: str
    epoch: Count
    head: Count


class Changes(_Tale):
    """A page of a rack's changes."""

    registry_id: str
    head: Count
    next: Count
    changes: list[dict[str, Any]]


class Given(_Tale):
    """A file that a rack gives."""

    path: FilePath
    size: Count
    checksum: Digest
    url: str

    @property
    def sha256(self) -> str:
        """The checksum in hex."""
        return hex_of(self.checksum)


class Files(_Tale):
    """The files of a version, with the addresses of their bytes: from `getModel`."""

    files: Annotated[list[Given], Field(min_length=1, max_length=MAX_FILES)]


class Told(_Tale):
    """A version as its origin tells it, in a reply about it or an entry of a listing."""

    model_id: ModelId
    version: Version
    checksum: Digest
    size: Count
    created_at: Time
    model_created_at: Time
    revision: Count
    aliases: Annotated[list[Alias], Field(max_length=MAX_ALIASES)]
    origin: Rack
    replicas: list[Rack]
    metadata: Metadata

    @property
    def sha256(self) -> str:
        """The checksum in hex."""
        return hex_of(self.checksum)

    @property
    def created_ms(self) -> int:
        return round(self.created_at.timestamp() * 1000)

    @property
    def since_ms(self) -> int:
        """When the model's first version was stored."""
        return round(self.model_created_at.timestamp() * 1000)


@dataclass(frozen=True, slots=True)
class Gone:
    """A version is not at its origin (any more). `until` is the end of its undo window there (unix ms), if it is known;
    `purged`: its bytes are to go now."""

    deleted: int | None = None
    until: int | None = None
    purged: bool = False

    @classmethod
    def of(cls, error: ModelManagerError) -> Gone:
        """What the origin answers about it."""
        return cls(_unix_ms(error.details.get("deletedAt")), _unix_ms(error.details.get("restorableUntil")))


async def ask(peers: Peers, origin: str, model: str, version: str) -> Told | Gone:
    """What the origin tells of exactly that version now, or of `latest`. Raises ModelManagerError if it does not
    tell."""
    try:
        reply = await peers.rack(origin).get_model_metadata(model, version)
    except ModelManagerError as error:
        if error.code != "ERR_MODEL_NOT_FOUND":
            raise
        return Gone.of(error)
    if reply["modelId"] != model or version not in (reply["version"], LATEST):  # by now the name is that of an alias
        return Gone()
    told = Told.of(reply)
    if told.origin != origin:
        raise ModelManagerError("ERR_INTERNAL", f"{origin} tells that {model} is of {told.origin}.")
    return told


async def locate(peers: Peers, rack: str, told: Told) -> list[Given]:
    """The files of a version with the addresses that a rack gives. ERR_CHECKSUM_MISMATCH if they are not those of what
    was told, ERR_MODEL_NOT_FOUND if the rack does not have it."""
    reply = await peers.rack(rack).get_model(told.model_id, told.version, delivery="url")
    files = Files.of(reply).files
    manifest = [(file.path, file.size, file.sha256) for file in files]
    try:
        check_paths(file.path for file in files)
    except ValueError as error:
        raise ModelManagerError("ERR_INTERNAL", f"A rack tells what cannot be: {error}.") from None
    actual = files[0].sha256 if len(files) == 1 else version_digest(manifest)
    if actual != told.sha256 or sum(file.size for file in files) != told.size:
        raise ModelManagerError("ERR_CHECKSUM_MISMATCH", f"{rack} has other files under that name.")
    return files


def _unix_ms(text: Any) -> int | None:
    """A time of the wire; None for anything else."""
    try:
        return round(datetime.fromisoformat(text).timestamp() * 1000)
    except (TypeError, ValueError):
        return None
