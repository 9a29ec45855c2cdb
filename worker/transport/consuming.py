"""The consumer on the request queue: registered, watched, paused, and registered again.

A connection that dies costs every unacknowledged message on it one delivery out of its limit. So each session starts
with a prefetch of 1: after an unclean end the queue begins with redeliveries, and if one of them killed the last
worker it dies alone. The first message that is no redelivery opens the prefetch in full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from pamqp.commands import Basic

from worker.transport.connections import BrokerConnection, LinkLostError, link_failures, open_channel
from worker.transport.hot_channel import HotChannel, Message

CAUTIOUS_PREFETCH = 1
WATCH_INTERVAL_S = 5.0
ANSWER_TIMEOUT_S = 10.0


class Consumer:
    """Consumes while it is open and not paused.

    `prepare` makes or checks the queue, at the start of a session and after the broker has cancelled the consumer.
    `deliver` gets each message, on the event loop, and must return at once. `before_acks` is called before
    acknowledgements are written.
    """

    def __init__(
        self,
        *,
        queue: str,
        prefetch: int,
        prepare: Callable[[BrokerConnection], Awaitable[None]],
        deliver: Callable[[Message], None],
        before_acks: Callable[[], None],
    ) -> None:
        self._queue = queue
        self._prefetch = prefetch
        self._prepare = prepare
        self._deliver = deliver
        self._before_acks = before_acks
        self._open = True
        self._paused = True
        self._proven = False
        self._cancelled = False
        self._moving = False
        self._tag: str | None = None
        self._registered_prefetch = 0
        self._wake = asyncio.Event()
        self._unregistered = asyncio.Event()
        self._unregistered.set()

    @property
    def consuming(self) -> bool:
        """A consumer is registered at the broker, or on its way from one connection to the next."""
        return self._tag is not None or self._moving

    def pause(self, paused: bool) -> None:
        """Take no work for now, or take it again."""
        self._paused = paused
        self._wake.set()

    async def stop(self) -> None:
        """Take no work any more; return when the consumer is cancelled or lost."""
        self._open = False
        self._wake.set()
        await self._unregistered.wait()

    async def session(self, connection: BrokerConnection) -> None:
        """Consume on this connection until it is retired, or it or its channel is lost; then raise LinkLostError."""
        retired = False
        try:
            await self._prepare(connection)
            channel = HotChannel(
                connection,
                delivered=self._on_message,
                cancelled=self._on_cancel,
                lost=self._wake.set,
                before_acks=self._before_acks,
            )
            await channel.open()
            self._proven, self._cancelled = False, False
            connection.on_retiring(self._wake.set)
            while not retired:
                self._wake.clear()
                retired = connection.retired
                await self._adjust(connection, channel, end=retired)
                if not retired:
                    await self._wait(connection)
        finally:
            self._set_registered(None, 0)
            self._moving = retired

    async def _wait(self, connection: BrokerConnection) -> None:
        """Return when something is to be adjusted; look after the consumer now and then."""
        try:
            async with asyncio.timeout(WATCH_INTERVAL_S):
                await self._wake.wait()
        except TimeoutError:
            await self._watch(connection)

    async def _adjust(self, connection: BrokerConnection, channel: HotChannel, *, end: bool) -> None:
        """Bring the consumer at the broker to what is wanted now; with `end` it is none."""
        if channel.is_closed:
            raise LinkLostError("the consuming channel was closed")
        if self._cancelled:
            self._cancelled = False
            if self._tag is not None:
                # RabbitMQ 4.3 keeps a consumer that it gave up for its slowness, and would give it work later.
                await channel.call(Basic.Cancel(self._tag))
            self._set_registered(None, 0)
            await self._prepare(connection)
        wanted = 0 if end else self._wanted_prefetch()
        if wanted == self._registered_prefetch:
            return
        if self._tag is not None:
            # A prefetch applies to the consumers registered after it.
            await channel.call(Basic.Cancel(self._tag))
            self._set_registered(None, 0)
        if wanted:
            await channel.call(Basic.Qos(prefetch_count=wanted))
            registered = await channel.call(Basic.Consume(queue=self._queue))
            assert isinstance(registered, Basic.ConsumeOk)
            self._set_registered(registered.consumer_tag, wanted)

    def _wanted_prefetch(self) -> int:
        if self._paused or not self._open:
            return 0
        return self._prefetch if self._proven else CAUTIOUS_PREFETCH

    async def _watch(self, connection: BrokerConnection) -> None:
        """Ask the broker whether the queue still has a consumer; a broker that does not answer is lost too."""
        channel = await open_channel(connection, confirms=False)
        with link_failures():
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                declared = await channel.queue_declare(self._queue, passive=True)
                await channel.close()
        if self._tag is not None and not declared.consumer_count:
            raise LinkLostError("the consumer has vanished from the queue")

    def _on_message(self, message: Message) -> None:
        if not (self._proven or message.redelivered):
            self._proven = True
            self._wake.set()
        self._deliver(message)

    def _on_cancel(self) -> None:
        self._cancelled = True
        self._wake.set()

    def _set_registered(self, tag: str | None, prefetch: int) -> None:
        self._tag, self._registered_prefetch = tag, prefetch
        if tag is None:
            self._unregistered.set()
        else:
            self._moving = False
            self._unregistered.clear()
