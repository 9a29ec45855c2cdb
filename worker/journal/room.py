"""The bound of the write queue: who comes when it is full waits for a place, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque


class Room:
    """Places for records that wait to become durable. The record that goes over the bytes is still let in."""

    def __init__(self, *, lines: int, size: int) -> None:
        self._lines = self._lines_free = lines
        self._bytes_free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return self._lines - self._lines_free

    def try_acquire(self, size: int) -> bool:
        """Take a place for one record of `size` bytes if there is one now."""
        if self._waiting or self._lines_free <= 0 or self._bytes_free <= 0:
            return False
        self._lines_free -= 1
        self._bytes_free -= size
        return True

    async def acquire(self, size: int) -> None:
        """A place for one record of `size` bytes. Raises what `refuse` was given, if that comes first."""
        if self.try_acquire(size):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            # The place may have been granted in the same turn of the loop.
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release(1, size)
            raise

    def release(self, lines: int, size: int) -> None:
        self._lines_free += lines
        self._bytes_free += size
        while self._waiting and self._is_free():
            wanted, turn = self._waiting.popleft()
            if not turn.done():
                self._grant(wanted)
                turn.set_result(None)

    def refuse(self, error: Exception) -> None:
        """Give `error` to all who wait."""
        while self._waiting:
            _, turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(error)

    def _is_free(self) -> bool:
        return self._lines_free > 0 and self._bytes_free > 0

    def _grant(self, size: int) -> None:
        self._lines_free -= 1
        self._bytes_free -= size
