"""The RabbitMQ transport under test: a small dispatcher behind it, a caller before it, an observer beside it."""

from __future__ import annotations

import asyncio
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiormq
import pamqp.frame
from aiormq.abc import AbstractChannel, AbstractConnection, ChannelFrame, DeliveredMessage
from aiormq.exceptions import AMQPError
from pamqp.body import ContentBody
from pamqp.commands import Basic

from schemas import wire
from schemas.errors import ModelManagerError
from worker.context import Context
from worker.transport import topology
from worker.transport.amqp import AmqpTransport
from worker.transport.amqp_decoding import install
from worker.transport.amqp_observer import SilentObserver
from worker.transport.connections import open_channel
from worker.transport.link import Broker

PATIENCE_S = 20.0


async def eventually(condition: Callable[[], Any], what: str = "the condition", within_s: float = PATIENCE_S) -> None:
    """Return when `condition` holds; fail when it does not within the time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true within {within_s} s"
        await asyncio.sleep(0.01)


def broker_version(connection: AbstractConnection) -> tuple[int, int]:
    """What a test may depend on whose promise is not one of all versions."""
    version = connection.server_properties["version"]
    assert isinstance(version, str)
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def close_connections(rabbitmq, name: str) -> None:
    """Have the broker close the worker's connection of that name."""
    listed = rabbitmq.ctl("list_connections", "pid", "client_properties", "--quiet")
    pids = [line.split("\t")[0] for line in listed.splitlines() if name in line]
    assert pids, f"there is no connection {name}"
    for pid in pids:
        rabbitmq.ctl("close_connection", pid, "test")


class EffectDispatcher:
    """Does real work on a dictionary: `echo`, `count` (an effect by key), `slow` (until released), `fail`, `big`."""

    def __init__(self) -> None:
        self.effects: Counter[str] = Counter()
        self.contexts: list[Context] = []
        self.bodies: list[bytes] = []
        self.started: Counter[str] = Counter()
        self.cancelled = 0
        self.released = asyncio.Event()
        self._answers: dict[str, asyncio.Task[dict[str, Any]]] = {}

    async def answer(self, method: str, body: bytes, context: Context) -> dict[str, Any]:
        self.contexts.append(context)
        self.bodies.append(body)
        self.started[method] += 1
        key = context.idempotency_key
        try:
            if key is None:
                return await self._call(method, body, "")
            if key not in self._answers:
                self._answers[key] = asyncio.create_task(self._call(method, body, key))
            return await asyncio.shield(self._answers[key])
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        except ModelManagerError as error:
            return error.body()

    async def _call(self, method: str, body: bytes, key: str) -> dict[str, Any]:
        params = wire.parse_object(body)
        match method:
            case "echo":
                return {"success": True, "params": params}
            case "count":
                self.effects[key] += 1
                return {"success": True, "effects": self.effects[key]}
            case "slow":
                await self.released.wait()
                self.effects[key] += 1
                return {"success": True, "effects": self.effects[key]}
            case "fail":
                raise ModelManagerError("ERR_MODEL_NOT_FOUND")
            case "big":
                return {"success": True, "filling": "x" * 4_000_000}
            case _:
                raise ModelManagerError("ERR_UNKNOWN_METHOD", f"There is no method {method}.")


class CountingObserver(SilentObserver):
    """Remembers how often what was told."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def reconnected(self) -> None:
        self.counts["reconnected"] += 1

    def delivered(self, redelivered: bool) -> None:
        self.counts["redelivered" if redelivered else "delivered"] += 1

    def queue_wait(self, seconds: float) -> None:
        self.counts["queue_wait"] += 1

    def expired(self) -> None:
        self.counts["expired"] += 1

    def dead_lettered(self, reason: str) -> None:
        self.counts[f"dead_lettered {reason}"] += 1

    def requeued(self) -> None:
        self.counts["requeued"] += 1

    def ack_lost(self) -> None:
        self.counts["ack_lost"] += 1

    def reply_unroutable(self) -> None:
        self.counts["reply_unroutable"] += 1

    def hint_published(self, kind: str) -> None:
        self.counts["hint_published"] += 1

    def hint_dropped(self) -> None:
        self.counts["hint_dropped"] += 1


@dataclass(frozen=True)
class Reply:
    body: dict[str, Any]
    message: DeliveredMessage

    @property
    def code(self) -> str | None:
        return None if self.body["success"] else str(self.body["error"]["code"])


class Caller:
    """A client with a direct reply-to address, and whatever queues it declares."""

    def __init__(self, connection: AbstractConnection, rack: str) -> None:
        self.connection = connection
        self.rack = rack
        self.replies: list[Reply] = []
        self.channel: AbstractChannel

    async def open(self) -> None:
        self.channel = await self.connection.channel()
        await self.consume("amq.rabbitmq.reply-to")

    async def consume(self, queue: str) -> None:
        async def remember(message: DeliveredMessage) -> None:
            self.replies.append(Reply(wire.parse_object(message.body, limit=5_000_000), message))

        await self.channel.basic_consume(queue, remember, no_ack=True)

    async def publish(
        self,
        method: str,
        body: Any = b"{}",
        *,
        exchange: str = topology.RPC_EXCHANGE,
        key: str | None = None,
        reply_to: str | None = "amq.rabbitmq.reply-to",
        **properties: Any,
    ) -> None:
        await self.channel.basic_publish(
            body if isinstance(body, bytes) else wire.dump(body),
            exchange=exchange,
            routing_key=f"{self.rack}.{method}" if key is None else key,
            mandatory=True,
            properties=Basic.Properties(reply_to=reply_to, **{"delivery_mode": 2, **properties}),
        )

    async def publish_raw(
        self, key: str, properties: bytes, body: bytes = b"{}", *, exchange: str = topology.RPC_EXCHANGE
    ) -> None:
        """Publish with a property section of our own making: 2 bytes of flags, then the values."""
        publish = Basic.Publish(exchange=exchange, routing_key=key)
        header = struct.pack(">HHQ", 60, 0, len(body)) + properties
        channel = await open_channel(self.connection, confirms=False)
        number = channel.number
        payload = (
            pamqp.frame.marshal(publish, number)
            + struct.pack(">BHI", 2, number, len(header))
            + header
            + b"\xce"
            + pamqp.frame.marshal(ContentBody(body), number)
        )
        await channel.write_queue.put(ChannelFrame(payload=payload, should_close=False))
        await channel.close()

    async def call(self, method: str, body: Any = b"{}", **properties: Any) -> Reply:
        """Publish, and wait for one more reply."""
        expected = len(self.replies) + 1
        await self.publish(method, body, **properties)
        await eventually(lambda: len(self.replies) >= expected, f"the reply to {method}")
        return self.replies[-1]

    async def dead_letter(self) -> DeliveredMessage:
        """Take one message from the rack's dead letters, when there is one."""
        deadline = time.monotonic() + PATIENCE_S
        channel = await self.connection.channel()
        while True:
            message = await channel.basic_get(topology.dead_letter_queue(self.rack), no_ack=True)
            if message.delivery_tag:
                await channel.close()
                return message
            assert time.monotonic() < deadline, "there is no dead letter"
            await asyncio.sleep(0.02)

    async def depth(self, queue: str) -> int:
        """How many messages are ready in a queue."""
        channel = await self.connection.channel()
        declared = await channel.queue_declare(queue, passive=True)
        await channel.close()
        return declared.message_count or 0

    async def until_depth(self, queue: str, count: int) -> None:
        """Return when that many messages are ready: the broker gives messages back some time after a channel closed."""
        deadline = time.monotonic() + PATIENCE_S
        while (depth := await self.depth(queue)) != count:
            assert time.monotonic() < deadline, f"{queue} has {depth} messages"
            await asyncio.sleep(0.05)

    async def consumers(self) -> int:
        channel = await self.connection.channel()
        declared = await channel.queue_declare(topology.request_queue(self.rack), passive=True)
        await channel.close()
        return declared.consumer_count or 0


@asynccontextmanager
async def calling(url: str, rack: str) -> AsyncIterator[Caller]:
    install()
    connection = await aiormq.connect(url)
    try:
        caller = Caller(connection, rack)
        await caller.open()
        yield caller
    finally:
        await connection.close()


@dataclass(frozen=True)
class Served:
    transport: AmqpTransport
    dispatcher: EffectDispatcher
    observer: CountingObserver

    async def until_consuming(self) -> None:
        await eventually(lambda: self.transport.status.consuming, "consuming")


@asynccontextmanager
async def serving(
    url: str, rack: str, *, provision: bool = True, prefetch: int = 64, wait: bool = True, delete: bool = True
) -> AsyncIterator[Served]:
    """A transport on the rack's queue; the queues are deleted afterwards, if the broker is there."""
    observer, dispatcher = CountingObserver(), EffectDispatcher()
    transport = AmqpTransport(
        broker=Broker.at(url),
        rack=rack,
        provision=provision,
        dispatcher=dispatcher,
        prefetch=prefetch,
        observer=observer,
    )
    served = Served(transport, dispatcher, observer)
    await transport.start()
    try:
        if wait:
            await served.until_consuming()
        yield served
    finally:
        await transport.close()
        if delete:
            await delete_queues(url, rack)


async def delete_queues(url: str, rack: str) -> None:
    with suppress(AMQPError, OSError):
        async with aiormq.connect(url) as connection:
            channel = await connection.channel()
            await channel.queue_delete(topology.request_queue(rack))
            await channel.queue_delete(topology.dead_letter_queue(rack))
