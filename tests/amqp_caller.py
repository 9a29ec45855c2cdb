"""The client's way to call over RabbitMQ, for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from worker.client.amqp_caller import AmqpCaller


@asynccontextmanager
async def calling(url: str, rack: str) -> AsyncIterator[AmqpCaller]:
    """A caller that is closed at the end, and has no call left in flight then."""
    caller = AmqpCaller(url, rack)
    try:
        yield caller
    finally:
        await caller.close()
        assert caller.in_flight == 0
