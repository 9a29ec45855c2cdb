"""Versions that were read from their records not long ago."""

from __future__ import annotations

from collections import OrderedDict

from worker.catalog.entries import VersionEntry


class EntryCache:
    """The entries used last, by row, as long as their lines have no more than `most` bytes in all."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._entries: OrderedDict[int, tuple[VersionEntry, int]] = OrderedDict()

    def get(self, row: int) -> VersionEntry | None:
        found = self._entries.get(row)
        if found is None:
            return None
        self._entries.move_to_end(row)
        return found[0]

    def put(self, row: int, entry: VersionEntry, size: int) -> None:
        self.drop(row)
        self._entries[row] = entry, size
        self._bytes += size
        while self._bytes > self._most:
            _, (_, oldest) = self._entries.popitem(last=False)
            self._bytes -= oldest

    def drop(self, row: int) -> None:
        _, size = self._entries.pop(row, (None, 0))
        self._bytes -= size
