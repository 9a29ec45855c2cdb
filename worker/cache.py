"""Recently stored models: the bytes of their small files.

It spares the storage a read right after a store, when replicas and inference workers ask for what is new.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheStats:
    """How full the cache is, and how it has served since the start."""

    entries: int
    bytes: int
    hits: int
    misses: int
    evictions: int


@dataclass(frozen=True, slots=True)
class _Entry:
    contents: Mapping[str, bytes]
    size: int


class ModelCache:
    """A least-recently-used cache by (model id, version), bounded by entries and by the bytes of their files.

    A zero `max_entries` turns it off. Used from the event loop alone: not locked.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def put(self, model_id: str, version: str, contents: Mapping[str, bytes]) -> None:
        """Keep these files (sha256 to bytes) of a version, in place of what was kept of it before.

        Contents that are together above `max_bytes` are not kept.
        """
        self._drop((model_id, version))
        size = sum(len(data) for data in contents.values())
        if self._max_entries <= 0 or size > self._max_bytes:
            return
        # A view into a larger buffer would keep all of that alive, so it is copied; for bytes this copies nothing.
        entry = _Entry({sha256: bytes(data) for sha256, data in contents.items()}, size)
        self._entries[model_id, version] = entry
        self._bytes += entry.size
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
            self._evictions += 1

    def bytes_of(self, model_id: str, version: str, sha256: str) -> bytes | None:
        """The bytes of a file of a version, or None if they are not kept."""
        entry = self._entries.get((model_id, version))
        data = entry.contents.get(sha256) if entry else None
        if data is not None:
            self._entries.move_to_end((model_id, version))
            self._hits += 1
        else:
            self._misses += 1
        return data

    def forget(self, model_id: str, version: str | None) -> None:
        """Drop a version, or with None every version of a model; what is not kept is no error."""
        gone = [key for key in self._entries if key[0] == model_id] if version is None else [(model_id, version)]
        for key in gone:
            self._drop(key)

    def stats(self) -> CacheStats:
        """A snapshot; a lookup of bytes is a hit or a miss, what is forgotten is no eviction."""
        return CacheStats(len(self._entries), self._bytes, self._hits, self._misses, self._evictions)

    def _drop(self, key: tuple[str, str]) -> None:
        if entry := self._entries.pop(key, None):
            self._bytes -= entry.size
