"""Connections to the broker: opened with our settings, their failures told in one way.

They are made with aiormq, the engine of aio-pika: its robust connection waits a fixed time between attempts, replays
declarations that the broker may refuse for ever, and costs two to three times as much for each message. What is done
once for each request does not even go through aiormq, but through the `FrameTap` below it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiormq
from aiormq.abc import AbstractConnection
from aiormq.channel import Channel
from aiormq.connection import Connection, TransportFactory
from aiormq.exceptions import AMQPError, AuthenticationError, DeliveryError, ProbableAuthenticationError
from yarl import URL

from worker.broker_url import NO_ADDRESS, connect_failure
from worker.transport import amqp_decoding
from worker.transport.frame_tap import FrameTap

HEARTBEAT_S = 20
CONNECT_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 5.0

_STREAM_BUFFER_BYTES = 64 * 1024


class LinkLostError(Exception):
    """The connection or channel under an operation is gone, or did not answer in time."""


@contextmanager
def link_failures() -> Iterator[None]:
    """Turn whatever aiormq raises for a lost channel into LinkLostError.

    That includes a CancelledError which nobody sent: aiormq ends the waiters of a closed channel with one. And one that
    was sent comes out as such, though aiormq may have made another error of it, or nothing: `asyncio.wait_for` forgets
    it when what it waits for is done in the same turn. A message that the broker returned or refused is no lost link:
    its DeliveryError passes.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0

    def cancelled() -> bool:
        return task is not None and task.cancelling() > before

    try:
        yield
    except DeliveryError:
        raise
    except asyncio.CancelledError:
        if task is None or cancelled():
            raise
        raise LinkLostError("the channel was closed") from None
    except (AMQPError, OSError, TimeoutError, RuntimeError) as error:
        if cancelled():
            raise asyncio.CancelledError from error
        raise LinkLostError(reason_of(error)) from error
    else:
        if cancelled():
            raise asyncio.CancelledError


def reason_of(error: BaseException) -> str:
    """Why a connection failed, in words that hold no address and no credentials."""
    if isinstance(error, AuthenticationError | ProbableAuthenticationError):
        return "the broker refused the login"
    if isinstance(error, LinkLostError):
        return str(error)
    if isinstance(error, OSError | TimeoutError | aiormq.AMQPConnectionError) and not _has_reply_text(error):
        return "the broker cannot be reached"
    return next((str(part) for part in reversed(error.args) if isinstance(part, str)), type(error).__name__)


def _has_reply_text(error: BaseException) -> bool:
    """Whether the broker itself gave the reason, as `CODE_IN_CAPITALS - text`."""
    return any(isinstance(part, str) and part[:3].isupper() for part in error.args)


class BrokerConnection(Connection):
    """A connection of aiormq with our tap below it."""

    def __init__(self, url: URL) -> None:
        self._factory = _TappedTransport()
        super().__init__(url, transport_factory=self._factory)
        self.retired = False
        """Another one has taken over: nothing is begun on this one any more."""
        self._retiring: list[Callable[[], None]] = []

    def retire(self) -> None:
        """Have the session go over to another connection; what was begun on this one ends on it."""
        self.retired = True
        for call in self._retiring:
            call()

    def on_retiring(self, call: Callable[[], None]) -> None:
        """Have `call` called when it is retired."""
        self._retiring.append(call)

    @property
    def tap(self) -> FrameTap:
        return self._factory.tap

    def free_channel(self) -> int:
        """A number for a channel that aiormq knows nothing of: it counts from below, so this is from above."""
        highest = self.connection_tune.channel_max or 65535
        for number in range(highest, 0, -1):
            if number not in self.channels and not self.tap.is_taken(number):
                return number
        raise LinkLostError("the connection has no channel left")


class _TappedTransport(TransportFactory):
    """Connects through a `FrameTap`; lets the kernel give up on bytes that nobody acknowledges, long before aiormq's
    63 seconds of silence."""

    tap: FrameTap

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        context = await options["ssl_context_provider"].get_context() if url.scheme == "amqps" else None
        reader = asyncio.StreamReader(_STREAM_BUFFER_BYTES, loop)
        self.tap = FrameTap(reader, loop)
        transport, _ = await loop.create_connection(lambda: self.tap, url.host or "", url.port or 0, ssl=context)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            connected = transport.get_extra_info("socket")
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, HEARTBEAT_S * 1000)
        return reader, self.tap.attach(transport)


async def open_connection(url: str, name: str) -> BrokerConnection:
    """A connection shown as `name` at the broker; LinkLostError when there is none within `CONNECT_TIMEOUT_S`."""
    amqp_decoding.install()
    try:
        address = URL(url).update_query(heartbeat=str(HEARTBEAT_S), name=name)
    except ValueError:  # its trace would show the password
        raise LinkLostError(NO_ADDRESS) from None
    try:
        with link_failures():
            connection = BrokerConnection(address)
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await connection.connect()
            except asyncio.CancelledError:
                if connection.is_opened:
                    await close_connection(connection)
                raise
            return connection
    except LinkLostError as error:
        raise LinkLostError(connect_failure(url, error) or str(error)) from error.__cause__


async def open_channel(connection: AbstractConnection, *, confirms: bool) -> Channel:
    """A new channel; LinkLostError when there is none within `CONNECT_TIMEOUT_S`."""
    with link_failures():
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            channel = await connection.channel(publisher_confirms=confirms)
    assert isinstance(channel, Channel)  # aiormq's abstract channel leaves out what we need of it
    return channel


async def close_connection(connection: BrokerConnection) -> None:
    """Close it as far as it still goes; never raises but CancelledError."""
    try:
        with link_failures():
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                if connection.is_opened:
                    connection.tap.flush()
                    await connection.write_queue.join()  # acknowledgements among it, which aiormq would drop
                await connection.close()
    except LinkLostError:
        pass  # gone already, and that is all that was wanted
    if not connection.closing.done():
        await asyncio.wait([connection.closing], timeout=CLOSE_TIMEOUT_S)


def is_blocked(connection: AbstractConnection) -> bool:
    """Whether the broker has announced that it reads nothing more from this connection."""
    # aiormq tells it only by a coroutine that waits for the end of the block: one step shows whether it would wait.
    waiting = connection.ready().__await__()
    try:
        next(iter(waiting))
    except StopIteration:
        return False
    waiting.close()
    return True
