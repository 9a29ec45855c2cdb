"""Sorted keys with cheap bulk loading and paging from any place."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Any


class SortedKeys:
    """A sorted list of unique tuples. Adding many at once is lazy: they are sorted in when the order is next needed."""

    def __init__(self) -> None:
        self._keys: list[tuple[Any, ...]] = []
        self._added: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._keys) + len(self._added)

    def add(self, key: tuple[Any, ...]) -> None:
        self._added.append(key)

    def discard(self, key: tuple[Any, ...]) -> None:
        keys = self._sorted()
        index = bisect_left(keys, key)
        if index < len(keys) and keys[index] == key:
            del keys[index]

    def walk(self, after: tuple[Any, ...] | None = None, *, backwards: bool = False) -> Iterator[tuple[Any, ...]]:
        """The keys beyond `after`, in order. Keys may be added and removed while walking; no key is given twice."""
        block = 512
        while True:
            keys = self._sorted()
            if backwards:
                end = len(keys) if after is None else bisect_left(keys, after)
                page = keys[max(0, end - block) : end][::-1]
            else:
                begin = 0 if after is None else bisect_right(keys, after)
                page = keys[begin : begin + block]
            if not page:
                return
            yield from page
            after = page[-1]

    def _sorted(self) -> list[tuple[Any, ...]]:
        if len(self._added) > 64:
            self._keys += self._added
            self._keys.sort()
        else:
            for key in self._added:
                insort(self._keys, key)
        self._added.clear()
        return self._keys
