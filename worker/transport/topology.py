"""The exchanges, queues and bindings on RabbitMQ, as data, and the two things done with them: provision and check.

Every rack has a request queue and a queue for dead letters; the three exchanges are shared by all racks. Both queues
are quorum queues. The request queue dead-letters at least once, which needs `reject-publish` (with `drop-head` the
broker falls back to at most once), and has its own dead-letter routing key: without it expired requests find no queue
behind the exchange, stay, and fill the rack's queue. The dead-letter queue drops its oldest, so it never refuses one.

To look at a dead letter is to have it delivered, and what is delivered too often is dropped: on RabbitMQ 4 after 20
times, if nothing else is said. Its word for "without a limit" is -1, which RabbitMQ 3 takes for a limit of nothing. So
the dead-letter queue has a limit that nobody reaches, which both read alike, also after an upgrade from one to the
other.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from aiormq.abc import AbstractConnection
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity, ChannelPreconditionFailed
from pamqp.common import FieldTable

from schemas.ids import new_ulid
from worker.transport.connections import link_failures, open_channel

RPC_EXCHANGE = "model-manager.rpc"
DEAD_EXCHANGE = "model-manager.dlx"
HINT_EXCHANGE = "model-manager.hints"

DELIVERY_LIMIT = 20
MAX_REQUESTS = 10_000
MAX_REQUEST_BYTES = 256_000_000
MAX_DEAD_LETTERS = 10_000
# All of them are held at once while a command reads them; and they must not fill the broker's disk.
MAX_DEAD_LETTER_BYTES = 128_000_000
MAX_LOOKS = 1_000_000
DEAD_LETTER_TTL_MS = 14 * 24 * 3600 * 1000
PROVISION_REPEATS = 3
PROVISION_AGAIN_S = 0.25


@dataclass(frozen=True, slots=True)
class Exchange:
    name: str
    kind: Literal["topic", "direct", "fanout"]


@dataclass(frozen=True, slots=True)
class Queue:
    name: str
    arguments: FieldTable


@dataclass(frozen=True, slots=True)
class Binding:
    exchange: str
    queue: str
    key: str


@dataclass(frozen=True, slots=True)
class Topology:
    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]
    bindings: tuple[Binding, ...]

    @property
    def objects(self) -> tuple[Exchange | Queue, ...]:
        return (*self.exchanges, *self.queues)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is not as it should be.

    A `missing` object keeps the worker from its work, a `different` one does not. What is `broken` does not do what it
    is there for; `open` is a user who may do more than is meant.
    """

    kind: Literal["missing", "different", "unverified", "broken", "open"]
    name: str
    reason: str = field(default="")

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}" + (f" ({self.reason})" if self.reason else "")


def request_queue(rack: str) -> str:
    return f"model-manager-{rack}"


def dead_letter_queue(rack: str) -> str:
    return f"model-manager-{rack}.dead"


def dead_letter_hold(rack: str) -> str:
    """The exclusive queue of whoever holds the rack's dead letters; it is always empty."""
    return f"{dead_letter_queue(rack)}.held"


def new_hint_queue(rack: str) -> str:
    """A name for one listener's exclusive queue; not the broker's choice, since callers may reply to `amq.gen-*`."""
    return f"model-manager-{rack}.hints.{new_ulid()}"


def new_probe_queue(rack: str) -> str:
    """A name for a queue that lives for one probe."""
    return f"model-manager-{rack}.probe.{new_ulid()}"


def topology(rack: str) -> Topology:
    """All that a rack needs. Listeners and callers declare what is theirs alone."""
    return Topology(
        exchanges=(
            Exchange(RPC_EXCHANGE, "topic"),
            Exchange(DEAD_EXCHANGE, "direct"),
            Exchange(HINT_EXCHANGE, "fanout"),
        ),
        queues=(
            Queue(
                dead_letter_queue(rack),
                {
                    "x-queue-type": "quorum",
                    "x-delivery-limit": MAX_LOOKS,
                    "x-max-length": MAX_DEAD_LETTERS,
                    "x-max-length-bytes": MAX_DEAD_LETTER_BYTES,
                    "x-overflow": "drop-head",
                    "x-message-ttl": DEAD_LETTER_TTL_MS,
                },
            ),
            Queue(
                request_queue(rack),
                {
                    "x-queue-type": "quorum",
                    "x-single-active-consumer": True,
                    "x-delivery-limit": DELIVERY_LIMIT,
                    "x-dead-letter-exchange": DEAD_EXCHANGE,
                    "x-dead-letter-routing-key": rack,
                    "x-dead-letter-strategy": "at-least-once",
                    "x-overflow": "reject-publish",
                    "x-max-length": MAX_REQUESTS,
                    "x-max-length-bytes": MAX_REQUEST_BYTES,
                },
            ),
        ),
        bindings=(
            Binding(DEAD_EXCHANGE, dead_letter_queue(rack), rack),
            Binding(RPC_EXCHANGE, request_queue(rack), f"{rack}.*"),
        ),
    )


async def provision(connection: AbstractConnection, rack: str) -> list[Problem]:
    """Create what is missing and leave what exists; return what exists otherwise. Doing it again changes nothing.

    What the login may not do is an `unverified` problem. Raises LinkLostError when the connection is lost.
    """
    problems = await _make(connection, rack)
    for _ in range(PROVISION_REPEATS):
        # A queue that is being deleted can still be declared for a moment, as if it stayed.
        if not any(problem.kind == "missing" for problem in problems):
            break
        await asyncio.sleep(PROVISION_AGAIN_S)
        problems = await _make(connection, rack)
    return problems


async def _make(connection: AbstractConnection, rack: str) -> list[Problem]:
    wanted = topology(rack)
    problems = [await _declare(connection, item) for item in wanted.objects]
    problems += [await _bind(connection, binding) for binding in wanted.bindings]
    return [problem for problem in problems if problem is not None]


async def check(connection: AbstractConnection, rack: str) -> list[Problem]:
    """What is missing or different; creates nothing. Bindings cannot be read over AMQP and are not checked.

    Raises LinkLostError when the connection is lost.
    """
    problems = [await examine(connection, item) for item in topology(rack).objects]
    return [problem for problem in problems if problem is not None]


async def examine(connection: AbstractConnection, item: Exchange | Queue) -> Problem | None:
    """What is wrong with one object; creates nothing. LinkLostError when the connection is lost."""
    # A passive declaration compares no arguments. Declaring what surely exists does, and creates nothing.
    return await _declare(connection, item, passive=True) or await _declare(connection, item)


async def _declare(connection: AbstractConnection, item: Exchange | Queue, *, passive: bool = False) -> Problem | None:
    # The broker closes the channel with a refusal, so each declaration has a channel of its own.
    channel = await open_channel(connection, confirms=False)
    with link_failures():
        try:
            if isinstance(item, Queue):
                await channel.queue_declare(item.name, durable=True, passive=passive, arguments=item.arguments)
            else:
                await channel.exchange_declare(item.name, exchange_type=item.kind, durable=True, passive=passive)
        except ChannelNotFoundEntity:
            return Problem("missing", item.name)
        except ChannelPreconditionFailed as error:
            return Problem("different", item.name, _broker_text(error))
        except ChannelAccessRefused as error:
            return Problem("unverified", item.name, _broker_text(error))
        await channel.close()
    return None


async def _bind(connection: AbstractConnection, binding: Binding) -> Problem | None:
    channel = await open_channel(connection, confirms=False)
    name = f"{binding.exchange} to {binding.queue}"
    with link_failures():
        try:
            await channel.queue_bind(binding.queue, binding.exchange, binding.key)
        except ChannelNotFoundEntity:
            return Problem("missing", name)
        except ChannelAccessRefused as error:
            return Problem("unverified", name, _broker_text(error))
        await channel.close()
    return None


def _broker_text(error: Exception) -> str:
    """The broker's own words, without its code."""
    text = str(error.args[-1]) if error.args else type(error).__name__
    return text.partition(" - ")[2] or text
