"""The versions of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from worker.catalog.entries import VersionEntry
from worker.catalog.table import NO_ROW, VersionTable


class Versions(Mapping[str, VersionEntry]):
    """By name, deleted ones included, in the order they were stored; each is read when it is asked for, by `entry`."""

    def __init__(self, table: VersionTable, model: str, entry: Callable[[int], VersionEntry]) -> None:
        self._table = table
        self._model = model
        self._entry = entry

    def __getitem__(self, version: str) -> VersionEntry:
        row = self._table.find(self._model, version)
        if row == NO_ROW:
            raise KeyError(version)
        return self._entry(row)

    def __contains__(self, version: object) -> bool:
        return isinstance(version, str) and self._table.find(self._model, version) != NO_ROW

    def __iter__(self) -> Iterator[str]:
        return iter([self._table.version[row] for row in sorted(self._table.rows(self._model))])

    def __len__(self) -> int:
        return sum(1 for _ in self._table.rows(self._model))
