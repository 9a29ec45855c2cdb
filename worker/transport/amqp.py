"""The RabbitMQ transport: requests in, replies and hints out, whatever happens to the broker.

Two connections, each kept up on its own: one to consume and acknowledge, one to publish. A delivery is read as it
comes out of the socket and served in a task that does not end with its channel: when that dies, work goes on, its reply
goes out, and the redelivery is answered by the dispatcher from what it recorded.

Each delivery ends in one of two ways: its reply was published or its dead letter confirmed, and it is acknowledged; or
it goes back to the broker. The order is always effect, reply, acknowledgement.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

from schemas.errors import ModelManagerError
from schemas.hints import Hint
from schemas.rpc import METHODS
from worker.context import Context
from worker.transport import topology
from worker.transport.amqp_observer import AmqpObserver, SilentObserver
from worker.transport.connections import BrokerConnection, LinkLostError
from worker.transport.consuming import Consumer
from worker.transport.deliveries import Delivery, Request, read_request
from worker.transport.hint_outbox import HintOutbox
from worker.transport.hot_channel import Message
from worker.transport.link import Broker, Link
from worker.transport.replies import Publisher, encode_reply
from worker.transport.reply_addresses import NodeTrials, is_direct
from worker.transport.rotation import Rotation

PREFETCH = 64
FLUSH_HINTS_S = 2.0
_WAITING_METHODS = frozenset(name for name, method in METHODS.items() if "wait_ms" in method.params.model_fields)

log = logging.getLogger(__name__)


class Dispatcher(Protocol):
    """What the transport needs of the dispatcher."""

    async def answer(self, method: str, body: bytes, context: Context) -> dict[str, Any]:
        """The reply body; raises nothing but CancelledError."""


@dataclass(frozen=True, slots=True)
class AmqpStatus:
    """How the transport is, for readiness.

    `connected`: both connections are up. `consuming`: a consumer is registered. `blocked`: the broker reads nothing
    that is published. `reason`: why work is not taken, or "". `degraded`: what works, but not as intended.
    """

    connected: bool
    consuming: bool
    blocked: bool
    reason: str
    degraded: tuple[str, ...]


class AmqpTransport:
    """Serves one rack's request queue.

    `provision` allows it to create the topology, otherwise it only checks it. `prefetch`
    bounds the requests in work; half of them may be waiting for a change or a job, the others are there for the rest.
    """

    def __init__(
        self,
        *,
        broker: Broker,
        rack: str,
        provision: bool,
        dispatcher: Dispatcher,
        prefetch: int = PREFETCH,
        observer: AmqpObserver | None = None,
    ) -> None:
        self._rack = rack
        self._provision = provision
        self._dispatcher = dispatcher
        self._observer = observer or SilentObserver()
        self._trials = NodeTrials(broker, f"model-manager/{rack}/trial")
        self._publisher = Publisher(
            rack=rack, observer=self._observer, repair=self._repair, changed=self._publishing_changed
        )
        self._outbox = HintOutbox(self._publisher, self._observer)
        self._consumer = Consumer(
            queue=topology.request_queue(rack),
            prefetch=prefetch,
            prepare=self._prepare,
            deliver=self._deliver,
            before_acks=self._publisher.flush,
        )
        self._links = {
            role: Link(broker=broker, name=f"model-manager/{rack}/{role}", session=session, changed=self._links_changed)
            for role, session in (("publish", self._publisher.session), ("consume", self._consumer.session))
        }
        self._rotation = Rotation(broker.files, list(self._links.values()))
        self._waiting_most = prefetch // 2
        self._waiting = 0
        self._degraded: tuple[str, ...] = ()
        self._connected = False
        self._reconnections = 0
        self._draining = False
        self._upkeep: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to connect, in the background; a broker that is away is no error."""
        coroutines = [*(link.run() for link in self._links.values()), self._outbox.run(), self._rotation.run()]
        self._upkeep = [asyncio.create_task(coroutine) for coroutine in coroutines]

    @property
    def status(self) -> AmqpStatus:
        reasons = [link.reason for link in self._links.values() if not link.up]
        if not reasons and self._publisher.blocked:
            reasons = ["the broker has blocked publishing"]
        if not reasons and not self._consumer.consuming:
            reasons = ["draining" if self._draining else "the consumer is not registered"]
        return AmqpStatus(
            connected=self._connected,
            consuming=self._consumer.consuming,
            blocked=self._publisher.blocked,
            reason=reasons[0] if reasons else "",
            degraded=self._degraded,
        )

    def announce(self, hint: Hint) -> None:
        """Publish a hint some time soon, in order; returns at once."""
        self._outbox.add(hint)

    async def drain(self, timeout_s: float) -> None:
        """Take no more work, give back what is not begun, let the rest finish for `timeout_s`, then give that back too.

        Work that is cut off is cancelled. Hints are flushed within the same time, or lost after `FLUSH_HINTS_S`.
        """
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._consumer.stop()
                for task in self._held:
                    task.cancel()
                while self._tasks:
                    await asyncio.wait(self._tasks)
                async with asyncio.timeout(FLUSH_HINTS_S):
                    await self._outbox.wait_empty()
        except TimeoutError:
            await self._cancel_work()

    async def close(self) -> None:
        """Stop at once: what is in work is cancelled and given back, both connections are closed."""
        self._draining = True
        await self._cancel_work()
        for task in reversed(self._upkeep):
            task.cancel()
        await asyncio.gather(*self._upkeep, return_exceptions=True)
        self._upkeep.clear()

    async def _cancel_work(self) -> None:
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    # --- a delivery --------------------------------------------------------------------------------------------------

    def _deliver(self, message: Message) -> None:
        self._observer.delivered(message.redelivered)
        delivery = Delivery(message, self._observer)
        task = asyncio.create_task(self._serve(delivery, read_request(message)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, delivery: Delivery, request: Request) -> None:
        try:
            if not self._publisher.usable and not self._draining:
                await self._hold()
            if self._draining:
                delivery.requeue()
            elif delivery.alive:  # else it was held so long that the broker delivers it again
                await self._work(delivery, request)
        except asyncio.CancelledError:
            delivery.requeue()
            raise
        except LinkLostError:
            # The effect is recorded and its reply did not go out: the redelivery is answered from the record.
            delivery.requeue()
        except Exception:
            log.exception("A delivery could not be served")
            delivery.fail()

    async def _hold(self) -> None:
        """Wait, in a way that draining ends, until a reply could be published."""
        task = asyncio.current_task()
        assert task is not None
        self._held.add(task)
        try:
            await self._publisher.wait_usable()
        finally:
            self._held.discard(task)

    async def _work(self, delivery: Delivery, request: Request) -> None:
        refusal, reply_to = request.refusal, request.reply_to
        if reply_to and is_direct(reply_to) and not await self._trials.is_safe(reply_to):
            refusal, reply_to = ModelManagerError("ERR_INVALID_REQUEST", "reply_to is no address of this broker."), ""
        if refusal is None:
            refusal = self._expired(request)
        if refusal is None:
            if request.queue_wait_s is not None:
                self._observer.queue_wait(request.queue_wait_s)
            reply = await self._answer(delivery, request)
        else:
            reply = refusal.body()
        if reply_to:
            await self._publisher.reply(request, encode_reply(reply))
        elif not reply["success"]:
            # Nobody is told, so the dead letter tells it.
            await self._dead_letter(delivery, reply["error"])
        delivery.ack()

    async def _answer(self, delivery: Delivery, request: Request) -> dict[str, Any]:
        if request.method not in _WAITING_METHODS:
            return await self._dispatcher.answer(request.method, request.body, request.context)
        # Redeliveries come one at a time at first, and the caller may have gone.
        may_wait = self._waiting < self._waiting_most and not delivery.message.redelivered
        self._waiting += may_wait
        try:
            context = replace(request.context, may_wait=may_wait)
            return await self._dispatcher.answer(request.method, request.body, context)
        finally:
            self._waiting -= may_wait

    async def _dead_letter(self, delivery: Delivery, error: dict[str, Any]) -> None:
        if not await self._publisher.dead_letter(delivery.message, error["code"], error["message"]):
            delivery.reject()  # no queue took our copy; the broker's own way may be another one

    def _expired(self, request: Request) -> ModelManagerError | None:
        deadline = request.context.deadline
        if deadline is None or deadline > time.monotonic():
            return None
        self._observer.expired()
        return ModelManagerError("ERR_DEADLINE_EXCEEDED", "The deadline passed before the work began.")

    # --- the connections ---------------------------------------------------------------------------------------------

    async def _prepare(self, connection: BrokerConnection) -> None:
        """Make or check the topology; what is different is served as it is. A missing queue shows on consuming."""
        problems = await (topology.provision if self._provision else topology.check)(connection, self._rack)
        # Without the right to provision, not being allowed to compare arguments is as intended.
        self._degraded = tuple(map(str, (p for p in problems if self._provision or p.kind != "unverified")))
        for problem in self._degraded:
            log.warning("The topology is not as intended: %s", problem)

    async def _repair(self, connection: BrokerConnection) -> None:
        if self._provision:
            await topology.provision(connection, self._rack)

    def _publishing_changed(self) -> None:
        self._consumer.pause(not self._publisher.usable)

    def _links_changed(self) -> None:
        connected = all(link.up for link in self._links.values())
        if connected != self._connected:
            self._connected = connected
            self._observer.connected(connected)
        reconnections = sum(max(0, link.connections - 1) for link in self._links.values())
        if reconnections > self._reconnections:
            self._reconnections = reconnections
            self._trials.forget()
            self._observer.reconnected()
