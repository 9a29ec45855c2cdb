"""What a replay decodes of a record: what the catalog indexes, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec


class IndexedFile(msgspec.Struct, frozen=True, gc=False):
    """Of a stored file; of a planned one only what it has."""

    size: int
    sha256: str
    key: str = ""


class IndexedMetadata(msgspec.Struct, frozen=True, gc=False):
    tags: tuple[str, ...] = ()


class IndexedRequest(msgspec.Struct, frozen=True, gc=False):
    key: str
    hash: str


class IndexedRecord(msgspec.Struct, frozen=True, gc=False):
    """Of a `store` record all this; of another one `idem`, and whatever else it has by these names."""

    model: str = ""
    version: str | None = None
    type: str = ""
    files: tuple[IndexedFile, ...] = ()
    metadata: IndexedMetadata = IndexedMetadata()
    size: int = 0
    created: int = 0
    upload: str = ""
    idem: IndexedRequest | None = None
    replica_of: str = msgspec.field(default="", name="replicaOf")


class IndexedLine(Protocol):
    """A line of the journal, as the catalog looks at it."""

    @property
    def op(self) -> str: ...

    @property
    def sequence(self) -> int: ...

    @property
    def time_ms(self) -> int: ...

    @property
    def record(self) -> IndexedRecord: ...


class IndexedBlock(Protocol):
    """Some lines, in order."""

    @property
    def lines(self) -> Sequence[IndexedLine]: ...

    # That line as it stands in the journal.
    def text(self, index: int) -> bytes: ...


class AppendedEntry(Protocol):
    """A record that has just become durable."""

    @property
    def op(self) -> str: ...

    @property
    def sequence(self) -> int: ...

    @property
    def time_ms(self) -> int: ...

    @property
    def record(self) -> dict[str, Any]: ...
