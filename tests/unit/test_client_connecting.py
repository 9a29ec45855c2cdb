"""Connections of the client library that were never made, or not closed in time, leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable

from tests.process import free_port
from worker.client.caller import Unreachable
from worker.client.connecting import close, connect


async def warned_of(failing: Awaitable[object]) -> list[str]:
    """What is warned of when the remains of what failed are collected in a thread without an event loop."""
    gc.disable()
    try:
        try:
            await failing
        except (TimeoutError, Unreachable) as error:
            remains: list[object] = [error]  # and with its traceback all that was under way
            remains.append(remains)
            del remains
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            await asyncio.to_thread(gc.collect)
    finally:
        gc.enable()
    return [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]


async def test_a_broker_that_is_not_there_leaves_no_coroutine_behind() -> None:
    assert await warned_of(connect(f"amqp://127.0.0.1:{free_port()}/")) == []


async def test_a_broker_that_says_nothing_leaves_no_coroutine_behind() -> None:
    async with await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with asyncio.timeout(20):
            connecting = connect(f"amqp://127.0.0.1:{port}/")
            assert await warned_of(asyncio.wait_for(connecting, 0.2)) == []


async def test_a_connection_that_does_not_close_in_time_is_closed_for_who_asks() -> None:
    class Hanging:
        closings = 0

        async def close(self) -> None:
            self.closings += 1
            if self.closings == 1:
                await asyncio.sleep(60)

    connection = Hanging()
    await close(connection, within_s=0.01)  # type: ignore[arg-type]
    assert connection.closings == 2
