"""Calls over RabbitMQ: one connection, one exclusive reply queue, many requests in flight.

A connection is a value that is used up: when it or its channel ends, every waiter on it ends with it, and the next
call makes a new one with a new reply queue. So an answer can neither be lost silently nor reach another's waiter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage
from aio_pika.exceptions import ChannelNotFoundEntity, DeliveryError, PublishError

from schemas.errors import ModelManagerError
from schemas.ids import new_ulid
from schemas.rpc import METHODS
from schemas.wire import MAX_BODY_BYTES, parse_object
from worker.broker_url import login_of
from worker.client.caller import Caller, Unreachable, encoded, error_of, no_answer, until_answered
from worker.client.connecting import CONNECT_S, close, connect, losses

RPC_EXCHANGE = "model-manager.rpc"
MAX_REPLY_BYTES = 16 * 1024**2
_CLOSE_S = 5.0
_WATCH_S = 5.0
_RESEND_S = 10.0
# The broker closes the channel on an `expiration` of 2^32 ms or more.
_LONGEST_S = 4_000_000.0
_CLOSED = "This caller is closed."


@dataclass(slots=True)
class _Link:
    """A connection with its reply queue. `waiters` are by correlation id, which is new for each request.

    `late` is called for a reply that nobody waits for. `user_id` is the login, as far as the address tells it.
    """

    connection: AbstractConnection
    channel: AbstractChannel
    exchange: AbstractExchange
    reply_to: str
    late: Callable[[], None]
    user_id: str | None
    waiters: dict[str, asyncio.Future[bytes]] = field(default_factory=dict)
    lost: bool = False
    watching: asyncio.Task[None] | None = None

    async def answer(self, message: AbstractIncomingMessage) -> None:
        waiter = self.waiters.get(message.correlation_id or "")
        if waiter is None or waiter.done():
            self.late()
        else:
            waiter.set_result(message.body)

    async def watch(self) -> None:
        """Lose the link when the broker does not know its reply queue any more, or says nothing for `_WATCH_S`."""
        while not self.lost:
            await asyncio.sleep(_WATCH_S)
            if not self.waiters or await self._blocked():
                continue
            try:
                with losses():
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
        """Of no more use: its waiters end, and may ask again on the next one."""
        self.end("The connection to the broker was lost.", passing=True)

    def end(self, reason: str, *, passing: bool) -> None:
        self.lost = True
        if self.watching is not None:
            self.watching.cancel()
        for waiter in self.waiters.values():
            if not waiter.done():
                waiter.set_exception(Unreachable(reason, passing=passing))


class AmqpCaller:
    """Calls the worker of `rack` through the broker at `url`: `amqp://`, or `amqps://` with the files of TLS as its
    parameters `cafile`, `certfile` and `keyfile` (`auth=external`: the certificate is the login). A function is asked
    for the address each time, which may have a new password then.

    It connects with the first call, and again with the first one after a loss. Calls that were in flight then are sent
    once more with the key they had, so their effect happens once. It belongs to one event loop.
    """

    def __init__(self, url: str | Callable[[], str], rack: str) -> None:
        self._url = url if callable(url) else lambda: url
        self._rack = rack
        self._opening: asyncio.Task[_Link] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        self._reached = False
        self._answered: set[str] = set()  # the racks that have answered
        self._closed = False
        self.late_replies = 0
        """Replies dropped because nobody waited any more: after the deadline, after a cancelled call, or twice."""
        self.connections = 0
        """Connections made so far; each one after the first follows a loss."""

    @property
    def in_flight(self) -> int:
        """Requests that are published and neither answered nor given up."""
        link = _link_of(self._opening)
        return 0 if link is None else len(link.waiters)

    async def call(
        self, method: str, params: Mapping[str, Any], *, timeout_s: float, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        """See `Caller.call`. ERR_DEADLINE_EXCEEDED tells whether the broker or the worker was slow; `Unreachable` comes
        at once when the rack has no queue or the broker was never reached, ERR_UNAUTHORIZED and ERR_FORBIDDEN when the
        broker refuses the login or what it asks for.
        """
        return await self._call(self._rack, method, params, timeout_s=timeout_s, idempotency_key=idempotency_key)

    def of(self, rack: str) -> Caller:
        """Calls the worker of another rack, over the same connection. Closing it closes nothing."""
        return _OtherRack(self._call, rack)

    async def _call(
        self, rack: str, method: str, params: Mapping[str, Any], *, timeout_s: float, idempotency_key: str | None
    ) -> dict[str, Any]:
        body = encoded(params)
        if len(body) > MAX_BODY_BYTES:  # a broker may close the channel, and all calls on it, for a body too large
            raise ModelManagerError(
                "ERR_INVALID_REQUEST", f"The body is over {MAX_BODY_BYTES} bytes.", maxBodySize=MAX_BODY_BYTES
            )

        request = _Request(rack, method, body, time.monotonic() + timeout_s)

        async def attempt(left_s: float, key: str | None) -> dict[str, Any]:
            request.key = key
            try:
                async with asyncio.timeout(left_s):
                    reply = await self._answer(request)
            except TimeoutError:
                raise no_answer(timeout_s, taken=request.taken) from None
            if reply.get("success") is not True:
                raise error_of(reply)
            return reply

        return await until_answered(method, attempt, timeout_s=timeout_s, key=idempotency_key)

    def headers_for(self, url: str) -> dict[str, str]:
        return {}

    async def close(self) -> None:
        self._closed = True
        opening, self._opening = self._opening, None
        if opening is not None and not opening.done():
            opening.cancel()
            await asyncio.wait([opening])
        link = _link_of(opening)
        if link is not None:
            link.end(_CLOSED, passing=False)
            self._leave(link.connection)
        if self._leaving:
            await asyncio.wait(self._leaving)

    async def _answer(self, request: _Request) -> dict[str, Any]:
        """Send it, and again each time that a doubling patience is over, and return the first answer."""
        patience_s = _RESEND_S
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    return await self._exchange(request)
            except TimeoutError:
                patience_s *= 2

    async def _exchange(self, request: _Request) -> dict[str, Any]:
        link = await self._connected()
        correlation_id = new_ulid()
        waiter: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        link.waiters[correlation_id] = waiter
        try:
            await self._publish(link, request, request.message(link, correlation_id), waiter)
            reply = await waiter
        finally:
            del link.waiters[correlation_id]
            if waiter.done() and not waiter.cancelled():
                waiter.exception()  # taken note of, even if the publish failed first
        self._answered.add(request.rack)
        try:
            return parse_object(reply, limit=MAX_REPLY_BYTES)
        except ModelManagerError as error:
            raise ModelManagerError("ERR_INTERNAL", f"The answer is not a reply: {error.message}") from None

    async def _publish(
        self, link: _Link, request: _Request, message: aio_pika.Message, waiter: asyncio.Future[bytes]
    ) -> None:
        """Publish and wait for the broker's confirm, which a lost connection may never bring."""
        key = f"{request.rack}.{request.method}"
        confirm = asyncio.ensure_future(link.exchange.publish(message, key, mandatory=True))
        either: set[asyncio.Future[Any]] = {confirm, waiter}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if confirm.done():
                with losses(link.lose):
                    await confirm
            request.taken = True
        except PublishError:
            reason = f"There is no worker's queue for rack {request.rack} on that broker."
            # Where it was taken before, the queue has gone since, and whoever made it makes it again.
            raise Unreachable(reason, passing=request.rack in self._answered or request.taken) from None
        except DeliveryError:
            raise ModelManagerError("ERR_OVERLOADED", "The queue of the rack is full.") from None
        finally:
            confirm.cancel()
            await asyncio.gather(confirm, return_exceptions=True)

    # --- connections ---

    async def _connected(self) -> _Link:
        """The link in use, else a new one. A call that gives up waiting for it leaves it to the others."""
        if self._closed:
            raise Unreachable(_CLOSED)
        opening = self._opening
        if opening is not None and opening.done():
            link = _link_of(opening)
            if link is None or link.lost:
                opening = None
            if link is not None and link.lost:
                self._leave(link.connection)
        if opening is None:
            opening = self._opening = asyncio.create_task(self._open())
            opening.add_done_callback(_noted)
        await asyncio.wait([opening])
        if opening.cancelled():
            raise Unreachable(_CLOSED)
        return opening.result()

    def _leave(self, connection: AbstractConnection) -> None:
        """Close it as far as it still goes; no call waits for that, since the other end may be gone."""
        task = asyncio.create_task(close(connection, within_s=_CLOSE_S))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _open(self) -> _Link:
        url = self._url()
        connection = await connect(url, passing=self._reached)
        try:
            async with asyncio.timeout(CONNECT_S):
                link = await self._prepare(connection, login_of(url))
        except TimeoutError:
            self._leave(connection)
            raise Unreachable("The broker does not answer.", passing=self._reached) from None
        except BaseException:
            self._leave(connection)
            raise
        link.watching = asyncio.create_task(link.watch())
        self._reached = True
        self.connections += 1
        return link

    async def _prepare(self, connection: AbstractConnection, user_id: str | None) -> _Link:
        try:
            with losses():
                channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                exchange = await channel.get_exchange(RPC_EXCHANGE, ensure=True)
                replies = await channel.declare_queue(exclusive=True, auto_delete=True)
                link = _Link(connection, channel, exchange, replies.name, self._late, user_id)
                connection.close_callbacks.add(link.lose)
                channel.close_callbacks.add(link.lose)
                # The broker cancels the consumer when the reply queue goes, as with its node: no answer would come.
                (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(link.lose)
                await replies.consume(link.answer, no_ack=True)
        except ChannelNotFoundEntity:
            reason = "No rack is set up on that broker: it has no exchange for requests."
            raise Unreachable(reason, passing=bool(self._answered)) from None
        return link

    def _late(self) -> None:
        self.late_replies += 1


@dataclass(frozen=True, slots=True)
class _OtherRack:
    """A caller on another one's connection."""

    _call: Callable[..., Awaitable[dict[str, Any]]]
    _rack: str

    async def call(
        self, method: str, params: Mapping[str, Any], *, timeout_s: float, idempotency_key: str | None = None
    ) -> dict[str, Any]:
        return await self._call(self._rack, method, params, timeout_s=timeout_s, idempotency_key=idempotency_key)

    def headers_for(self, url: str) -> dict[str, str]:
        return {}

    async def close(self) -> None:
        return


@dataclass(slots=True)
class _Request:
    """A call, in all its attempts. `deadline` is in seconds of `time.monotonic`; `taken`: for all we know the broker
    has had it."""

    rack: str
    method: str
    body: bytes
    deadline: float
    key: str | None = None
    taken: bool = False

    def message(self, link: _Link, correlation_id: str) -> aio_pika.Message:
        left_s = min(max(self.deadline - time.monotonic(), 0.001), _LONGEST_S)
        headers: dict[str, str | int] = {"x-deadline": int((time.time() + left_s) * 1000)}
        if self.key is not None:
            headers["x-idempotency-key"] = self.key
        known = METHODS.get(self.method)
        effect = known is not None and known.effect
        return aio_pika.Message(
            self.body,
            content_type="application/json",
            type=self.method,
            reply_to=link.reply_to,
            correlation_id=correlation_id,
            user_id=link.user_id,  # the broker refuses any but the login, so the worker can trust it
            message_id=new_ulid(),  # new for each publish: returns are matched by it
            timestamp=time.time(),  # the worker's metric of the wait in its queue is made of it
            expiration=left_s,
            headers=dict(headers),
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT if effect else aio_pika.DeliveryMode.NOT_PERSISTENT,
        )


def _link_of(opening: asyncio.Task[_Link] | None) -> _Link | None:
    """The link that a task has opened; None if there is none, or not yet."""
    if opening is None or not opening.done() or opening.cancelled() or opening.exception() is not None:
        return None
    return opening.result()


def _noted(opening: asyncio.Task[_Link]) -> None:
    """Look at the failure, for whoever waited for it may have given up."""
    if not opening.cancelled():
        opening.exception()
