"""What the racks announce, as it happens. A hint may be lost: `ModelManagerClient.follow` has every change."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from aio_pika.abc import AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import ChannelNotFoundEntity

from schemas.errors import ModelManagerError
from schemas.hints import Hint
from schemas.ids import new_ulid
from schemas.wire import parse_object
from worker.client.caller import Unreachable
from worker.client.connecting import CONNECT_S, close, connect, losses

HINTS_EXCHANGE = "model-manager.hints"
_MAX_WAITING = 10_000
_CLOSE_S = 5.0


@asynccontextmanager
async def hints(url: str, listener: str) -> AsyncIterator[AsyncIterator[Hint]]:
    """The hints of all racks, from entering the block on; `listener` is the rack this is for, in the queue's name.

    The iterator ends with `Unreachable` when the connection or its queue is lost: enter again, and ask `getChanges` for
    what was announced meanwhile. The oldest of more than 10,000 hints that nobody has taken are dropped. Raises
    `Unreachable`, ERR_UNAUTHORIZED or ERR_FORBIDDEN when the broker refuses, ERR_INVALID_REQUEST for what is no `url`.

        async with hints("amqp://guest:guest@127.0.0.1/", "rack-2") as heard:
            async for hint in heard:
                print(hint["type"], hint["subject"], hint["rackseq"])
    """
    waiting: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def take(message: AbstractIncomingMessage) -> None:
        if waiting.qsize() >= _MAX_WAITING:
            waiting.get_nowait()
        with contextlib.suppress(ModelManagerError):  # no JSON, so from nobody we know
            waiting.put_nowait(parse_object(message.body))

    def lost(*_: object) -> None:
        waiting.put_nowait(None)

    connection = await connect(url)
    try:
        try:
            async with asyncio.timeout(CONNECT_S):
                await _consume(connection, listener, take, lost)
        except TimeoutError:
            raise Unreachable("The broker does not answer.") from None
        except ChannelNotFoundEntity:
            raise Unreachable("No rack is set up on that broker: it has no exchange for hints.") from None
        yield _until_lost(waiting)
    finally:
        await close(connection, within_s=_CLOSE_S)


async def _consume(
    connection: AbstractConnection,
    listener: str,
    take: Callable[[AbstractIncomingMessage], Awaitable[None]],
    lost: Callable[..., None],
) -> None:
    with losses():
        channel = await connection.channel()
        connection.close_callbacks.add(lost)
        channel.close_callbacks.add(lost)
        # The broker cancels the consumer when the queue goes, as with its node: nothing would come any more.
        (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(lost)
        # Not named by the broker, since callers may have replies sent to `amq.gen-*`.
        queue = await channel.declare_queue(f"model-manager-{listener}.hints.{new_ulid()}", exclusive=True)
        await queue.bind(HINTS_EXCHANGE)
        await queue.consume(take, no_ack=True)


async def _until_lost(waiting: asyncio.Queue[dict[str, Any] | None]) -> AsyncIterator[Hint]:
    while (hint := await waiting.get()) is not None:
        yield cast("Hint", hint)
    raise Unreachable("The connection to the broker was lost.", passing=True)
