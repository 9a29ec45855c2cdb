"""The publishing connection: replies and dead letters.

It is apart from the consuming one, because the broker stops reading from publishers when it is short of memory or disk,
and acknowledgements must get through then. Whatever kills a channel kills all that is under way on it, so direct
replies, replies to queues, dead letters and hints have a channel each.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from aiormq.channel import Channel
from aiormq.exceptions import ChannelNotFoundEntity, DeliveryError
from pamqp import encode
from pamqp.commands import Basic
from pamqp.common import FieldTable

from schemas.errors import ModelManagerError
from schemas.wire import dump
from worker.transport.amqp_decoding import UnreadableTable, printable
from worker.transport.amqp_observer import AmqpObserver
from worker.transport.connections import BrokerConnection, LinkLostError, is_blocked, link_failures, open_channel
from worker.transport.deliveries import Request
from worker.transport.hot_channel import HotChannel, Message
from worker.transport.reply_addresses import is_direct
from worker.transport.topology import DEAD_EXCHANGE

PUBLISH_TIMEOUT_S = 10.0
PATIENCE_S = 30.0
BLOCK_POLL_S = 0.2
WATCH_INTERVAL_S = 5.0
MAX_REPLY_BYTES = 4_000_000
# A larger one waits until the socket has taken it, which bounds what piles up for a slow broker.
MAX_UNAWAITED_BYTES = 16_384
# A header frame holds all properties in one frame, at most 128 KiB at the broker's default.
MAX_HEADER_BYTES = 100_000
# Sender-selected distribution: these would send the copy to queues of the sender's choice.
ROUTING_HEADERS = ("CC", "BCC")
# The worker's own words on a dead letter; of what the sender wrote there, and of earlier deaths, none is kept.
REASON_PREFIX = "x-error-"
DEATH_HEADERS = ("x-death", "x-first-death-", "x-last-death-")


class Closable(Protocol):
    """A channel, of either kind."""

    @property
    def is_closed(self) -> bool: ...


OneChannel = TypeVar("OneChannel", bound=Closable)


class Outlet(Generic[OneChannel]):
    """A channel to publish on, made by `opening` when first needed and again whenever it was closed."""

    def __init__(self, opening: Callable[[BrokerConnection], Awaitable[OneChannel]]) -> None:
        self._opening = opening
        self._connection: BrokerConnection | None = None
        self._channel: OneChannel | None = None
        self._lock = asyncio.Lock()

    def attach(self, connection: BrokerConnection | None) -> None:
        """Publish on this connection from now on."""
        self._connection, self._channel = connection, None

    async def channel(self) -> OneChannel:
        """The open channel; LinkLostError when there is no connection to open it on."""
        if self._channel is not None and not self._channel.is_closed:
            return self._channel
        async with self._lock:
            if self._channel is None or self._channel.is_closed:
                if self._connection is None:
                    raise LinkLostError("the publishing connection is down")
                self._channel = await self._opening(self._connection)
            return self._channel


async def _opened(connection: BrokerConnection, *, confirms: bool) -> HotChannel:
    channel = HotChannel(connection)
    await channel.open(confirms=confirms)
    return channel


class Publisher:
    """Publishes on whatever connection its session runs on.

    `repair` is called when an exchange is missing, to make it again where that is allowed.
    """

    def __init__(
        self,
        *,
        rack: str,
        observer: AmqpObserver,
        repair: Callable[[BrokerConnection], Awaitable[None]],
        changed: Callable[[], None],
    ) -> None:
        self._rack = rack
        self._observer = observer
        self._repair = repair
        self._changed = changed
        self._direct = Outlet(partial(_opened, confirms=False))
        self._named = Outlet(partial(_opened, confirms=True))
        self._dead = Outlet(partial(open_channel, confirms=True))
        self.hints = Outlet(partial(open_channel, confirms=True))
        self._connection: BrokerConnection | None = None
        self._usable = asyncio.Event()
        self._dead_letter_lock = asyncio.Lock()
        self.blocked = False

    async def session(self, connection: BrokerConnection) -> None:
        """Serve publishes on this connection until it closes or is retired, and watch whether the broker blocks it.

        LinkLostError: the broker answers no more, and has not said that it would not.
        """
        closed = connection.closing
        watching = asyncio.create_task(self._watch(connection))
        self._attach(connection)
        try:
            while not (closed.done() or watching.done() or connection.retired):
                self._set_blocked(is_blocked(connection))
                await asyncio.wait([closed, watching], timeout=BLOCK_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                await watching
        finally:
            if not connection.retired:  # else it serves until the next one is attached
                self._attach(None)
            self._set_blocked(False)
            watching.cancel()
            closed.cancel()

    async def _watch(self, connection: BrokerConnection) -> None:
        """Open a channel now and then: to a connection whose other end is gone, nothing tells it for a minute."""
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if is_blocked(connection):
                continue
            try:
                channel = await open_channel(connection, confirms=False)
                with link_failures():
                    async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                        await channel.close()
            except LinkLostError:
                if not is_blocked(connection):
                    raise

    @property
    def usable(self) -> bool:
        """Connected, and not blocked."""
        return self._usable.is_set()

    async def wait_usable(self) -> None:
        """Return as soon as publishing may succeed."""
        await self._usable.wait()

    def flush(self) -> None:
        """Write the replies that were sent so far. LinkLostError: some of this turn are lost with their connection."""
        if self._connection is not None:
            self._connection.tap.flush()
            if self._connection.tap.dropped:
                raise LinkLostError("the publishing connection was lost")

    async def reply(self, request: Request, body: bytes) -> None:
        """Answer `request`. A requester that has gone is counted, and no failure.

        A direct reply is written with the next `flush`, any other one is confirmed. LinkLostError: not sent within
        `PATIENCE_S` after it failed once, or nobody knows, or the process was absent: it is for the request to come
        again, and for what it asks to be looked into again.
        """
        publish = self._reply_directly if is_direct(request.reply_to) else self._reply_to_queue
        if self.usable:  # as nearly always, and then there is no need of a timer
            connection = self._connection
            try:
                await publish(request, body)
                return
            except LinkLostError:
                if connection is not None and connection.tap.absent:
                    raise
        await self._patiently(lambda: publish(request, body))

    async def _reply_directly(self, request: Request, body: bytes) -> None:
        channel = await self._direct.channel()
        _send(channel, request, body, mandatory=False)
        if len(body) > MAX_UNAWAITED_BYTES or channel.congested:
            await channel.drained()

    async def _reply_to_queue(self, request: Request, body: bytes) -> None:
        started = time.monotonic()
        channel = await self._named.channel()
        try:
            routed = await channel.confirmed(_send(channel, request, body, mandatory=True))
        except LinkLostError:
            self._observer.publish_failed()
            raise
        self._observer.publish_confirmed(time.monotonic() - started)
        if not routed:
            self._observer.reply_unroutable()

    async def dead_letter(self, message: Message, code: str, reason: str) -> bool:
        """Put a copy of the message, with the reason, among the rack's dead letters; False when no queue took it.

        LinkLostError: not confirmed within `PATIENCE_S`.
        """
        properties = dead_letter_properties(message, code, reason)
        try:
            # One at a time: the copy keeps its message_id, and aiormq finds returned messages by it.
            async with self._dead_letter_lock:
                await self._patiently(
                    lambda: self.confirmed(
                        self._dead, message.body, exchange=DEAD_EXCHANGE, key=self._rack, properties=properties
                    )
                )
        except DeliveryError:
            return False
        self._observer.dead_lettered(code)
        return True

    async def confirmed(
        self,
        outlet: Outlet[Channel],
        body: bytes,
        *,
        exchange: str,
        key: str,
        properties: Basic.Properties,
        mandatory: bool = True,
    ) -> None:
        """Publish once, until confirmed. DeliveryError: returned or refused. LinkLostError: nobody knows."""
        started = time.monotonic()
        channel = await outlet.channel()
        try:
            with link_failures():
                await channel.basic_publish(
                    body,
                    exchange=exchange,
                    routing_key=key,
                    properties=properties,
                    mandatory=mandatory,
                    timeout=PUBLISH_TIMEOUT_S,
                )
        except LinkLostError as error:
            self._observer.publish_failed()
            if isinstance(error.__cause__, ChannelNotFoundEntity) and self._connection is not None:
                await self._repair(self._connection)
            raise
        self._observer.publish_confirmed(time.monotonic() - started)

    async def _patiently(self, publish: Callable[[], Awaitable[None]]) -> None:
        """Publish as soon as the connection allows, and once more for each connection lost, within `PATIENCE_S`."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    await self._usable.wait()
                    connection = self._connection
                    try:
                        return await publish()
                    except LinkLostError:
                        if connection is not None and connection.tap.absent:
                            raise
                        if connection is self._connection:  # it lives: this was its channel, or the broker hangs
                            await asyncio.sleep(BLOCK_POLL_S)
        except TimeoutError:
            raise LinkLostError("the broker takes no replies") from None

    def _attach(self, connection: BrokerConnection | None) -> None:
        self._connection = connection
        for outlet in (self._direct, self._named, self._dead, self.hints):
            outlet.attach(connection)
        self._update()

    def _set_blocked(self, blocked: bool) -> None:
        if blocked != self.blocked:
            self.blocked = blocked
            self._observer.blocked(blocked)
            self._update()

    def _update(self) -> None:
        if self._connection is not None and not self.blocked:
            self._usable.set()
        else:
            self._usable.clear()
        self._changed()


def _send(channel: HotChannel, request: Request, body: bytes, *, mandatory: bool) -> int:
    return channel.reply(
        request.reply_to,
        body,
        correlation_id=request.correlation_id,
        headers={"traceparent": request.traceparent} if request.traceparent else None,
        mandatory=mandatory,
    )


def encode_reply(reply: dict[str, Any]) -> bytes:
    """The reply as JSON; one that is too large or is no JSON becomes an error reply."""
    try:
        body = dump(reply)
    except TypeError:  # orjson's error for what JSON cannot hold, such as lone surrogates
        return dump(ModelManagerError("ERR_INTERNAL").body())
    if len(body) > MAX_REPLY_BYTES:
        message = f"The reply is over {MAX_REPLY_BYTES} bytes; ask for less."
        return dump(ModelManagerError("ERR_MODEL_TOO_LARGE", message, maxReplySize=MAX_REPLY_BYTES).body())
    return body


def dead_letter_properties(message: Message, code: str, reason: str) -> Basic.Properties:
    """The message's own properties and the reason, without what would expire, divert or refuse the copy."""
    original = message.properties
    refused: FieldTable = {
        "x-error-code": code,
        "x-error-message": printable(reason),
        "x-error-time": int(time.time() * 1000),
        # The copy has a routing key of its own, and none but its user may send a user id.
        **({"x-error-routing-key": printable(message.routing_key or "")} if message.exchange else {}),
        **({"x-error-user-id": printable(original.user_id)} if original.user_id else {}),
    }
    headers = {name: value for name, value in encodable(original.headers or {}).items() if not _is_ours(name)}
    if isinstance(original.headers, UnreadableTable) or not _fits(headers):
        headers = {}
    return kept_properties(original, {**headers, **refused})


def kept_properties(original: Basic.Properties, headers: FieldTable) -> Basic.Properties:
    """For a message sent on, persistent, with these headers: what its sender said, but `expiration` and `user_id`."""
    return Basic.Properties(
        content_type=original.content_type,
        content_encoding=original.content_encoding,
        headers=headers,
        delivery_mode=2,
        priority=original.priority,
        correlation_id=original.correlation_id,
        reply_to=original.reply_to,
        message_id=original.message_id,
        timestamp=original.timestamp,
        message_type=original.message_type,
        app_id=original.app_id,
    )


def _is_ours(name: str) -> bool:
    return name in ROUTING_HEADERS or name.startswith((REASON_PREFIX, *DEATH_HEADERS))


def encodable(table: FieldTable) -> FieldTable:
    """Decoded headers in a form that pamqp can encode: names in UTF-8, and bytes as byte arrays."""

    def convert(value: Any) -> Any:
        match value:
            case bytes():
                return bytearray(value)
            case dict():
                return {printable(name): convert(member) for name, member in value.items()}
            case list():
                return [convert(member) for member in value]
            case _:
                return value

    return {printable(name): convert(value) for name, value in table.items()}


def _fits(headers: FieldTable) -> bool:
    try:
        return len(encode.field_table(headers)) <= MAX_HEADER_BYTES
    except (TypeError, ValueError, ArithmeticError, struct.error):
        return False
