"""Calls over RabbitMQ: one connection, one exclusive reply queue, many requests in flight.

A connection is a value that is used up: when it or its channel ends, every waiter on it ends with it, and the next
call makes a new one with a new reply queue. So an answer can neither be lost silently nor reach another's waiter.

While somebody waits, the broker is asked now and then whether it still has the reply queue: a connection whose other
end is gone is found in seconds, where heartbeats take a minute. A request that stays without an answer although its
connection lives was lost with its queue, or its worker's; it is sent again with the same idempotency key.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage
from aio_pika.exceptions import (
    CONNECTION_EXCEPTIONS,
    AuthenticationError,
    ChannelNotFoundEntity,
    DeliveryError,
    ProbableAuthenticationError,
    PublishError,
)
from aiormq.exceptions import ChannelAccessRefused

from schemas.errors import ModelManagerError
from schemas.ids import new_ulid
from schemas.rpc import METHODS
from schemas.wire import dump, parse_object
from worker.client.caller import Unreachable, error_of, no_answer, until_answered

RPC_EXCHANGE = "model-manager.rpc"
MAX_REPLY_BYTES = 16 * 1024**2
_HEARTBEAT_S = 20
_CONNECT_S = 10.0
_CLOSE_S = 5.0
_WATCH_S = 5.0
_RESEND_S = 10.0


@dataclass(slots=True)
class _Link:
    """A connection with its reply queue. `waiters` are by correlation id, which is new for each request."""

    connection: AbstractConnection
    channel: AbstractChannel
    exchange: AbstractExchange
    reply_to: str
    waiters: dict[str, asyncio.Future[bytes]] = field(default_factory=dict)
    lost: bool = False
    watching: asyncio.Task[None] | None = None

    async def answer(self, message: AbstractIncomingMessage) -> None:
        waiter = self.waiters.get(message.correlation_id or "")
        if waiter is not None and not waiter.done():
            waiter.set_result(message.body)

    async def watch(self) -> None:
        """Lose the link when the broker does not know its reply queue any more, or says nothing for `_WATCH_S`."""
        while not self.lost:
            await asyncio.sleep(_WATCH_S)
            if not self.waiters or await self._blocked():
                continue
            try:
                with _lost():
                    await self.channel.declare_queue(self.reply_to, passive=True, timeout=_WATCH_S)
            except (Unreachable, ChannelNotFoundEntity):
                if not await self._blocked():
                    self.lose()

    async def _blocked(self) -> bool:
        """Whether the broker has said that it reads nothing for now; it answers nothing then."""
        if self.connection.transport is None:
            return False
        unblocked = asyncio.ensure_future(self.connection.transport.connection.ready())
        await asyncio.sleep(0)
        blocked = not unblocked.done()
        unblocked.cancel()
        return blocked

    def lose(self, *_: object) -> None:
        self.lost = True
        if self.watching is not None:
            self.watching.cancel()
        for waiter in self.waiters.values():
            if not waiter.done():
                waiter.set_exception(Unreachable("The connection to the broker was lost.", passing=True))


class AmqpCaller:
    """Calls the worker of `rack` through the broker at `url`. Connects with the first call."""

    def __init__(self, url: str, rack: str) -> None:
        self._url = url
        self._rack = rack
        self._link: _Link | None = None
        self._connecting = asyncio.Lock()
        self._reached = False
        self._answered = False
        self._closed = False
        self._closing: set[asyncio.Task[None]] = set()

    async def call(
        self, method: str, params: Mapping[str, Any], *, timeout_s: float, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        body = dump(params)

        async def attempt(left_s: float, key: str | None) -> dict[str, Any]:
            try:
                async with asyncio.timeout(left_s):
                    reply = await self._answer(method, body, left_s, key)
            except TimeoutError:
                raise no_answer(timeout_s) from None
            if reply.get("success") is not True:
                raise error_of(reply)
            return reply

        return await until_answered(method, attempt, timeout_s=timeout_s, key=idempotency_key)

    def headers_for(self, url: str) -> dict[str, str]:
        return {}

    async def close(self) -> None:
        self._closed = True
        async with self._connecting:
            self._discard()
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _answer(self, method: str, body: bytes, left_s: float, key: str | None) -> dict[str, Any]:
        """Send it, and again each time that a doubling patience is over, and return the first answer."""
        deadline = time.monotonic() + left_s
        patience_s = _RESEND_S
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    return await self._exchange(method, body, deadline - time.monotonic(), key)
            except TimeoutError:
                patience_s *= 2

    async def _exchange(self, method: str, body: bytes, left_s: float, key: str | None) -> dict[str, Any]:
        deadline = time.monotonic() + left_s
        link = await self._connected()
        correlation_id = new_ulid()
        waiter: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        link.waiters[correlation_id] = waiter
        try:
            message = self._request(link, method, body, deadline - time.monotonic(), key, correlation_id)
            await self._publish(link, message, method, waiter)
            reply = await waiter
        finally:
            del link.waiters[correlation_id]
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # taken note of, even if the publish failed first
        self._answered = True
        return parse_object(reply, limit=MAX_REPLY_BYTES)

    def _request(
        self, link: _Link, method: str, body: bytes, left_s: float, key: str | None, correlation_id: str
    ) -> aio_pika.Message:
        left_s = max(left_s, 0.001)
        headers: dict[str, str | int] = {"x-deadline": int((time.time() + left_s) * 1000)}
        if key is not None:
            headers["x-idempotency-key"] = key
        known = METHODS.get(method)
        effect = known is not None and known.effect
        return aio_pika.Message(
            body,
            content_type="application/json",
            type=method,
            reply_to=link.reply_to,
            correlation_id=correlation_id,
            message_id=new_ulid(),  # new for each publish: returns are matched by it
            expiration=left_s,
            headers=dict(headers),
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT if effect else aio_pika.DeliveryMode.NOT_PERSISTENT,
        )

    async def _publish(
        self, link: _Link, message: aio_pika.Message, method: str, waiter: asyncio.Future[bytes]
    ) -> None:
        """Publish and wait for the broker's confirm, which a lost connection may never bring."""
        confirm = asyncio.ensure_future(link.exchange.publish(message, f"{self._rack}.{method}", mandatory=True))
        either: set[asyncio.Future[Any]] = {confirm, waiter}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if confirm.done():
                with _lost(link):
                    await confirm
        except PublishError:
            reason = f"There is no worker's queue for rack {self._rack} on that broker."
            raise Unreachable(reason, passing=self._answered) from None
        except DeliveryError:
            raise ModelManagerError("ERR_OVERLOADED", "The queue of the rack is full.") from None
        finally:
            confirm.cancel()
            await asyncio.gather(confirm, return_exceptions=True)

    async def _connected(self) -> _Link:
        async with self._connecting:
            if self._closed:
                raise Unreachable("This caller is closed.")
            if self._link is not None and not self._link.lost:
                return self._link
            self._discard()
            self._link = await self._open()
            self._link.watching = asyncio.create_task(self._link.watch())
            self._reached = True
            return self._link

    def _discard(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.lose()
            self._close_soon(link.connection)

    def _close_soon(self, connection: AbstractConnection) -> None:
        """Close it as far as it still goes; no call waits for that, since the other end may be gone."""

        async def close() -> None:
            with contextlib.suppress(TimeoutError, *CONNECTION_EXCEPTIONS):
                await asyncio.wait_for(connection.close(), _CLOSE_S)

        closing = asyncio.create_task(close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _open(self) -> _Link:
        try:
            async with asyncio.timeout(_CONNECT_S):
                connection = await aio_pika.connect(self._url, heartbeat=_HEARTBEAT_S)
        except (AuthenticationError, ProbableAuthenticationError):
            raise ModelManagerError("ERR_UNAUTHORIZED", "The broker refuses the login.") from None
        except ValueError:
            raise ModelManagerError("ERR_INVALID_REQUEST", "The broker's address is not an AMQP URL.") from None
        except (TimeoutError, *CONNECTION_EXCEPTIONS):
            raise Unreachable("The broker cannot be reached.", passing=self._reached) from None
        try:
            async with asyncio.timeout(_CONNECT_S):
                return await self._prepare(connection)
        except TimeoutError:
            self._close_soon(connection)
            raise Unreachable("The broker does not answer.", passing=self._reached) from None
        except BaseException:
            self._close_soon(connection)
            raise

    async def _prepare(self, connection: AbstractConnection) -> _Link:
        try:
            with _lost():
                channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                exchange = await channel.get_exchange(RPC_EXCHANGE, ensure=True)
                replies = await channel.declare_queue(exclusive=True, auto_delete=True)
                link = _Link(connection, channel, exchange, replies.name)
                connection.close_callbacks.add(link.lose)
                channel.close_callbacks.add(link.lose)
                await replies.consume(link.answer, no_ack=True)
        except ChannelNotFoundEntity:
            reason = "No rack is set up on that broker: it has no exchange for requests."
            raise Unreachable(reason, passing=self._answered) from None
        return link


@contextmanager
def _lost(link: _Link | None = None) -> Iterator[None]:
    """Turn the many signs of a lost connection into Unreachable, and end the waiters of `link`.

    One of them is a CancelledError that nobody sent. Refusals by the broker are no such signs, and pass.
    """
    try:
        yield
    except (DeliveryError, ChannelNotFoundEntity):
        raise
    except ChannelAccessRefused:
        if link is not None:
            link.lose()
        raise ModelManagerError("ERR_FORBIDDEN", "The broker does not allow this login to do that.") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
    except CONNECTION_EXCEPTIONS:
        pass
    else:
        return
    if link is not None:
        link.lose()
    raise Unreachable("The connection to the broker was lost.", passing=True)
