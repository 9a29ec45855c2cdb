"""Rows in some order, in blocks: 4 bytes a row, cheap to add to, walked from any place."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Key = tuple[Any, ...]
Rows = np.ndarray[Any, np.dtype[np.uint32]]

BLOCK_ROWS = 2048


class Order:
    """Rows sorted by `key`, which never changes for a row, and by row where it is the same. A row is never taken out:
    who walks skips what is gone.

    Settle it before a walk.
    """

    def __init__(self, key: Callable[[int], Key]) -> None:
        self._key = key
        self._blocks: list[array[int]] = []
        self._added: list[int] = []
        self.filled = 0
        """How many rows `fill` brought."""

    def fill(self, rows: Rows) -> None:
        """Take rows that are sorted already, into an empty order."""
        data = rows.astype(np.uint32, copy=False)
        self._blocks = [
            array("I", data[start : start + BLOCK_ROWS].tobytes()) for start in range(0, len(data), BLOCK_ROWS)
        ]
        self.filled = len(data)

    def add(self, rows: Iterable[int]) -> None:
        """Sorted in by `settle`, when the order is next asked for."""
        self._added.extend(rows)

    @property
    def waiting(self) -> int:
        """How many rows are still to be sorted in."""
        return len(self._added)

    def settle(self, most: int) -> bool:
        """Sort in up to `most` of the rows that were added: whether all are in now."""
        added = self._added[-most:]
        del self._added[-most:]
        for row in added:
            self._insert(row)
        return not self._added

    def place(self, row: int) -> Key:
        """Where the row is, for `beyond`: a version that was purged and stored again has two rows with one key."""
        return (*self._key(row), row)

    def _insert(self, row: int) -> None:
        place = self.place(row)
        if not self._blocks:
            self._blocks.append(array("I", [row]))
            return
        index = max(0, bisect_right(self._blocks, place, key=self._first) - 1)
        block = self._blocks[index]
        block.insert(bisect_right(block, place, key=self.place), row)
        if len(block) > 2 * BLOCK_ROWS:
            self._blocks[index : index + 1] = [block[:BLOCK_ROWS], block[BLOCK_ROWS:]]

    def beyond(self, after: Key, *, backwards: bool = False) -> Rows:
        """The next rows behind a place in the order walked: at most a block of them, and none at the end. A key alone
        is a place before all rows that have it."""
        if backwards:
            return self._before(after)
        index = max(0, bisect_right(self._blocks, after, key=self._first) - 1)
        while index < len(self._blocks):
            block = self._blocks[index]
            start = bisect_right(block, after, key=self.place)
            if start < len(block):
                return _rows(block[start:])
            index += 1
        return _rows(array("I"))

    def _before(self, after: Key) -> Rows:
        index = bisect_left(self._blocks, after, key=self._first) - 1
        while index >= 0:
            block = self._blocks[index]
            end = bisect_left(block, after, key=self.place)
            if end > 0:
                return _rows(block[:end])[::-1]
            index -= 1
        return _rows(array("I"))

    def dumped(self) -> bytes:
        """All rows in order, u32 each; settled."""
        return b"".join(block.tobytes() for block in self._blocks)

    def _first(self, block: array[int]) -> Key:
        return self.place(block[0])


def _rows(block: array[int]) -> Rows:
    return np.frombuffer(block.tobytes(), np.uint32)
