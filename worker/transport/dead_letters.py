"""The dead letters of a rack, for people: held for a while, sent back to where they came from, or dropped.

All of them are held at once, by one consumer without a prefetch that matters, however few are looked at. For what is
not settled goes back to a quorum queue in the order in which one consumer got it, and before all that it did not get:
after a look at the oldest few alone these would stand in any order (seen on 3.10). The same happens when the process
or its connection dies. The client reads from its socket only what it has room for.

RabbitMQ counts each look as a delivery, which is why the queue has no delivery limit that matters.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    DeliveryError,
    PublishError,
)
from pamqp.commands import Basic, Queue

from schemas.errors import ModelManagerError
from worker.transport.amqp_decoding import UnreadableTable
from worker.transport.connections import (
    BrokerConnection,
    LinkLostError,
    close_connection,
    link_failures,
    open_channel,
    open_connection,
)
from worker.transport.dead_letter import DeadLetter, read_letter, request_properties
from worker.transport.hot_channel import HotChannel, Message
from worker.transport.replies import Outlet
from worker.transport.topology import RPC_EXCHANGE, dead_letter_hold, dead_letter_queue, examine, topology

CONNECTION_NAME = "model-manager-cli"
ANSWER_TIMEOUT_S = 30.0
# More than the queue holds: what is beyond it would stay, and the order would be lost.
PREFETCH = 65_535
MAX_WAITING = 256
MAX_WAITING_BYTES = 4_000_000
# The broker gives back what a dead command held as soon as it sees that its connection is gone.
PATIENCE_S = 5.0
_POLL_S = 0.02


class NotReplayedError(Exception):
    """The letter did not reach the request queue and is still dead; the message says why."""


class DeadLetters:
    """The dead letters of a rack while they are held; `total` were there at the beginning.

    `remark` tells what is not as it should be with their queue, or is empty. LinkLostError: a connection is lost.
    """

    def __init__(self, url: str, rack: str, connection: BrokerConnection) -> None:
        self.total = 0
        self.remark = ""
        self._url = url
        self._rack = rack
        self._queue = dead_letter_queue(rack)
        self._connection = connection
        self._channel = HotChannel(connection, delivered=self._on_message, lost=self._on_lost)
        self._waiting: deque[Message] = deque()
        self._waiting_bytes = 0
        self._arrived = asyncio.Event()
        self._held = False
        self._settled = 0
        # Of its own, since nothing is read from the other connection for much of the time.
        self._publishing: BrokerConnection | None = None
        self._outlet = Outlet(partial(open_channel, confirms=True))

    async def hold(self) -> None:
        """Take them. ERR_NOT_FOUND: there is no such queue. ERR_CONFLICT: somebody else takes from it."""
        await self._compare()
        deadline = time.monotonic() + PATIENCE_S
        while not await self._claimed() or (declared := await self._declared()).consumer_count:
            if time.monotonic() > deadline:
                raise ModelManagerError("ERR_CONFLICT", f"Somebody else reads {self._queue} now; try again later.")
            await asyncio.sleep(_POLL_S)
        self.total = declared.message_count or 0
        await self._channel.open()
        await self._channel.call(Basic.Qos(prefetch_count=PREFETCH))
        self._held = True
        await self._channel.call(Basic.Consume(queue=self._queue))

    async def read(self) -> AsyncIterator[DeadLetter]:
        """Those that were there at the beginning, oldest first. A bounded number is in memory."""
        for _ in range(self.total):
            message = await self._next(PATIENCE_S)
            if message is None:  # some have expired since they were counted
                return
            yield read_letter(message)

    async def arrival(self, message_id: str, within_s: float) -> DeadLetter | None:
        """The letter of that name, be it there or on its way; None if it does not come within the time."""
        deadline = time.monotonic() + within_s
        while (message := await self._next(deadline - time.monotonic())) is not None:
            if message.properties.message_id == message_id:
                return read_letter(message)
        return None

    async def _next(self, within_s: float) -> Message | None:
        """None: there is none."""
        if not self._waiting and not self._channel.is_closed:
            self._arrived.clear()
            self._waiting_bytes = 0
            self._connection.tap.resume()
            try:
                async with asyncio.timeout(within_s):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        if not self._waiting:
            raise LinkLostError("the connection was lost")
        return self._waiting.popleft()

    def _on_message(self, message: Message) -> None:
        if not self._held:
            return
        self._waiting.append(message)
        self._waiting_bytes += len(message.body)
        if len(self._waiting) >= MAX_WAITING or self._waiting_bytes >= MAX_WAITING_BYTES:
            self._connection.tap.pause()
        self._arrived.set()

    def _on_lost(self) -> None:
        self._arrived.set()

    async def drop(self, letter: DeadLetter) -> None:
        """Remove it for good."""
        self._channel.ack(letter.message.delivery_tag)
        self._settled += 1

    async def replay(self, letter: DeadLetter) -> None:
        """Put it on the request queue, confirmed, and only then remove it here. Raises NotReplayedError.

        It keeps its idempotency key, or gets one: what was replayed twice, after a crash in between, has one effect.
        """
        if not letter.method:
            raise NotReplayedError("nothing names its method")
        if isinstance(letter.properties.headers, UnreadableTable):
            raise NotReplayedError("its headers cannot be read")
        if self._publishing is None:
            self._publishing = await open_connection(self._url, CONNECTION_NAME)
            self._outlet.attach(self._publishing)
        key, properties = f"{self._rack}.{letter.method}", request_properties(letter)
        try:
            await self._publish(letter.body, key, properties)
        except PublishError:
            raise NotReplayedError("the rack has no request queue") from None
        except DeliveryError:
            raise NotReplayedError("the request queue is full") from None
        await self.drop(letter)

    async def _publish(self, body: bytes, key: str, properties: Basic.Properties) -> None:
        try:
            await self._publish_once(body, key, properties)
        except LinkLostError as error:
            if properties.user_id is None or not isinstance(error.__cause__, ChannelPreconditionFailed):
                raise
            # The broker lets nobody but an impersonator send another's user id.
            properties.user_id = None
            await self._publish_once(body, key, properties)

    async def _publish_once(self, body: bytes, key: str, properties: Basic.Properties) -> None:
        channel = await self._outlet.channel()
        with link_failures():
            await channel.basic_publish(
                body,
                exchange=RPC_EXCHANGE,
                routing_key=key,
                properties=properties,
                mandatory=True,
                timeout=ANSWER_TIMEOUT_S,
            )

    async def give_back(self) -> None:
        """Return once the others are in their places. LinkLostError: nobody knows what of the last ones is removed."""
        if self._publishing is not None:
            await close_connection(self._publishing)
            self._publishing = None
        if not self._held:
            return
        self._held = False
        self._waiting.clear()
        self._connection.tap.resume()
        try:
            await self._channel.close()
            deadline = time.monotonic() + PATIENCE_S
            while ((await self._declared()).message_count or 0) < self.total - self._settled:
                if time.monotonic() > deadline:  # some have expired, or somebody else has them
                    return
                await asyncio.sleep(_POLL_S)
        except LinkLostError:
            if self._settled:
                raise

    async def _claimed(self) -> bool:
        """Whether no other command holds them; it is so until this connection ends.

        The number of consumers alone does not tell it of two that begin at once, and a quorum queue lets several
        exclusive consumers in (seen on 3.10).
        """
        channel = await open_channel(self._connection, confirms=False)
        with link_failures():
            try:
                await channel.queue_declare(dead_letter_hold(self._rack), exclusive=True, timeout=ANSWER_TIMEOUT_S)
            except ChannelLockedResource:
                return False
            except ChannelAccessRefused:
                return True  # a login that may only read claims nothing
            await channel.close()
        return True

    async def _declared(self) -> Queue.DeclareOk:
        channel = await open_channel(self._connection, confirms=False)
        with link_failures():
            declared = await channel.queue_declare(self._queue, passive=True, timeout=ANSWER_TIMEOUT_S)
            await channel.close()
        return declared

    async def _compare(self) -> None:
        (wanted,) = (queue for queue in topology(self._rack).queues if queue.name == self._queue)
        problem = await examine(self._connection, wanted)
        if problem is not None and problem.kind == "different":
            self.remark = f"{problem}: if it has a delivery limit, each look at a letter counts against it"


@asynccontextmanager
async def dead_letters(url: str, rack: str) -> AsyncIterator[DeadLetters]:
    """Hold the rack's dead letters; at the end those that were neither dropped nor replayed are back in their places.

    Raises ModelManagerError: ERR_NOT_FOUND for a rack without that queue, ERR_CONFLICT while somebody else holds them,
    ERR_FORBIDDEN for a login that may not.
    """
    connection = await open_connection(url, CONNECTION_NAME)
    letters = DeadLetters(url, rack, connection)
    try:
        await letters.hold()
        yield letters
        await letters.give_back()
    except LinkLostError as error:
        raise _refusal(error, rack) or error from None
    finally:
        with suppress(LinkLostError):
            await letters.give_back()
        await close_connection(connection)


def _refusal(error: LinkLostError, rack: str) -> ModelManagerError | None:
    if isinstance(error.__cause__, ChannelNotFoundEntity):
        return ModelManagerError("ERR_NOT_FOUND", f"Rack {rack} has no queue of dead letters on that broker.")
    if isinstance(error.__cause__, ChannelAccessRefused) or str(error).startswith("ACCESS_REFUSED"):
        return ModelManagerError("ERR_FORBIDDEN", "The broker does not allow this login to do that.")
    return None
