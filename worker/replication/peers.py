"""The other racks, as replication sees them; and what one of them tells of a version, checked as a stranger's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from schemas.errors import ModelManagerError
from schemas.ids import LATEST, MAX_ALIASES, MAX_INTEGER, Alias, Digest, ModelId, Rack, Version, hex_of
from schemas.model import Metadata
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


class Told(BaseModel):
    """A version as its origin tells it. Built from a reply about it or an entry of a listing; other members are passed
    over, since that rack may run a later program."""

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True)

    model_id: ModelId
    version: Version
    checksum: Digest
    size: Annotated[int, Field(ge=0, le=MAX_INTEGER)]
    created_at: AwareDatetime
    model_created_at: AwareDatetime
    revision: Annotated[int, Field(ge=1, le=MAX_INTEGER)]
    aliases: Annotated[list[Alias], Field(max_length=MAX_ALIASES)]
    origin: Rack
    replicas: list[Rack]
    metadata: Metadata

    @classmethod
    def of(cls, reply: Mapping[str, Any]) -> Told:
        """ERR_INTERNAL if it is not what a rack may tell."""
        try:
            return cls.model_validate(reply)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, problem["loc"]))
            raise ModelManagerError("ERR_INTERNAL", f"A rack tells what cannot be: {place}: {problem['msg']}") from None

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


def _unix_ms(text: Any) -> int | None:
    """A time of the wire; None for anything else."""
    try:
        return round(datetime.fromisoformat(text).timestamp() * 1000)
    except (TypeError, ValueError):
        return None
