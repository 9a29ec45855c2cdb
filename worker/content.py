"""The bytes of a stored file on their way out, as one small value.

Whoever sends them never sees the storage, and can still use sendfile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LocalFile:
    """The bytes are this regular file, whole and unchanging."""

    path: Path


@dataclass(frozen=True, slots=True)
class Stream:
    """`read(start, length)` gives these bytes in chunks; ModelManagerError when they cannot be had."""

    read: Callable[[int, int], AsyncIterator[bytes]]


@dataclass(frozen=True, slots=True)
class Redirect:
    """The caller may fetch the bytes from this address, which is signed and expires."""

    url: str


Content = LocalFile | Stream | Redirect


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """A file of a version: `size` in bytes, `sha256` in hex, `version` the one a label has led to."""

    path: str
    size: int
    sha256: str
    media_type: str
    content: Content
    version: str
