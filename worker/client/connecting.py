"""Connections of the client library, ended in every case.

One that it could not make, or not close, is closed by its finalizer, which may run in any thread: where no event loop
runs, the program is warned of a coroutine that was never awaited.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from aio_pika import Connection
from aio_pika.abc import AbstractConnection
from aio_pika.connection import make_url
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AuthenticationError,
    ChannelNotFoundEntity,
    DeliveryError,
    ProbableAuthenticationError,
)
from aiormq.exceptions import ChannelAccessRefused

from schemas.errors import ModelManagerError
from worker.broker_url import connect_failure
from worker.client.caller import Unreachable

CONNECT_S = 10.0
_HEARTBEAT_S = 10


async def connect(url: str, *, passing: bool = False) -> AbstractConnection:
    """A new connection. ERR_UNAUTHORIZED: the login is refused; ERR_INVALID_REQUEST: `url` is no address of a broker.

    `Unreachable`, `passing` or not: there is none within `CONNECT_S`.
    """
    try:
        connection = Connection(make_url(url, heartbeat=_HEARTBEAT_S))
        async with asyncio.timeout(CONNECT_S):
            try:
                await connection.connect()
            except BaseException:
                await connection.close()
                raise
    except (AuthenticationError, ProbableAuthenticationError):
        raise ModelManagerError("ERR_UNAUTHORIZED", "The broker refuses the login.") from None
    except ValueError:
        raise ModelManagerError("ERR_INVALID_REQUEST", "The broker's address is not an AMQP URL.") from None
    except (TimeoutError, *CONNECTION_EXCEPTIONS) as error:
        reason = connect_failure(url, error) or "the broker cannot be reached"
        raise Unreachable(f"{reason[0].upper()}{reason[1:]}.", passing=passing) from None
    return connection


async def close(connection: AbstractConnection, *, within_s: float) -> None:
    """Close it as far as it still goes within that time."""
    with contextlib.suppress(TimeoutError, *CONNECTION_EXCEPTIONS):
        async with asyncio.timeout(within_s):
            await connection.close()
            return
    await connection.close()  # nothing is waited for any more; it is closed now for who asks


@contextlib.contextmanager
def losses(lose: Callable[[], None] | None = None) -> Iterator[None]:
    """Turn the many signs of a lost connection into Unreachable, and call `lose`; what is not allowed is ERR_FORBIDDEN.

    One of the signs is a CancelledError that nobody sent. Refusals by the broker are none, and pass.
    """
    try:
        yield
    except (DeliveryError, ChannelNotFoundEntity):
        raise
    except ChannelAccessRefused:
        if lose is not None:
            lose()
        raise ModelManagerError("ERR_FORBIDDEN", "The broker does not allow this login to do that.") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
    except CONNECTION_EXCEPTIONS:
        # Told below, as a CancelledError that nobody sent.
        pass
    else:
        return
    if lose is not None:
        lose()
    raise Unreachable("The connection to the broker was lost.", passing=True)
