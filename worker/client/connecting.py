"""Connections of the client library, ended in every case.

One that it could not make, or not close, is closed by its finalizer, which may run in any thread: where no event loop
runs, the program is warned of a coroutine that was never awaited.
"""

from __future__ import annotations

import asyncio
import contextlib

from aio_pika import Connection
from aio_pika.abc import AbstractConnection
from aio_pika.connection import make_url
from aio_pika.exceptions import CONNECTION_EXCEPTIONS


async def connect(url: str, *, heartbeat_s: int) -> AbstractConnection:
    """A new connection. Raises what `aio_pika.connect` raises."""
    connection = Connection(make_url(url, heartbeat=heartbeat_s))
    try:
        await connection.connect()
    except BaseException:
        await connection.close()
        raise
    return connection


async def close(connection: AbstractConnection, *, within_s: float) -> None:
    """Close it as far as it still goes within that time."""
    with contextlib.suppress(TimeoutError, *CONNECTION_EXCEPTIONS):
        async with asyncio.timeout(within_s):
            await connection.close()
            return
    await connection.close()  # nothing is waited for any more; it is closed now for who asks
