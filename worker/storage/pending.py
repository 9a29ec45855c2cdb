"""Calls that go on in their threads after whoever waited for them was cancelled."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

_T = TypeVar("_T")


class Pending:
    """Remembers calls in threads, so that what they work on is not taken away before they have ended."""

    def __init__(self) -> None:
        self._calls: set[asyncio.Future[Any]] = set()

    async def result(self, call: asyncio.Future[_T]) -> _T:
        """The result of `call`. Cancelling this leaves the call alone: it is remembered until it has ended."""
        return await asyncio.shield(self.started(call))

    def started(self, call: asyncio.Future[_T]) -> asyncio.Future[_T]:
        """Remember `call` until it has ended."""
        self._calls.add(call)
        call.add_done_callback(self._forget)
        return call

    def _forget(self, call: asyncio.Future[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # looked at: whoever waited may be gone

    async def ended(self) -> None:
        """Wait until no call goes on, whatever came of them."""
        while self._calls:
            await asyncio.wait(self._calls)
