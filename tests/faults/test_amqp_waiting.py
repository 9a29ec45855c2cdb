"""Requests that wait for a change or a job keep nobody else waiting, also when a lost connection brings them again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.amqp import Caller, CountingObserver, calling, close_connections, delete_queues, eventually
from tests.rack import LocalRack
from worker.transport.amqp import PREFETCH, AmqpTransport
from worker.transport.link import Broker

pytestmark = pytest.mark.broker

WAIT_MS = 5000
SOON_S = 2.5


@asynccontextmanager
async def real_rack(url: str, name: str, folder: Path) -> AsyncIterator[tuple[AmqpTransport, CountingObserver, bytes]]:
    """A rack with its real service behind the queue, and the body of a getChanges that waits at its head."""
    rack, observer = LocalRack(folder).open(), CountingObserver()
    await rack.store_bytes("net", "1.0.0", b"x")
    transport = AmqpTransport(
        broker=Broker.at(url), rack=name, provision=True, dispatcher=rack.dispatcher, observer=observer
    )
    await transport.start()
    journal = rack.registry.journal
    try:
        await eventually(lambda: transport.status.consuming, "consuming")
        yield transport, observer, b'{"epoch":%d,"after":%d,"waitMs":%d}' % (journal.epoch, journal.head, WAIT_MS)
    finally:
        await transport.close()
        await delete_queues(url, name)
        await rack.close()


async def answered_soon(caller: Caller) -> None:
    """A lookup is answered long before those that wait."""
    started = time.monotonic()
    await caller.publish("ping")
    await eventually(lambda: any("rack" in reply.body for reply in caller.replies), "the answer to ping")
    assert time.monotonic() - started < SOON_S


async def test_lookups_are_answered_beside_as_many_waiting_requests_as_the_worker_takes(
    amqp_url: str, rack: str, tmp_path: Path
) -> None:
    async with real_rack(amqp_url, rack, tmp_path) as (_, observer, waiting), calling(amqp_url, rack) as caller:
        started = time.monotonic()
        for _ in range(PREFETCH):
            await caller.publish("getChanges", waiting)
        await eventually(lambda: observer.counts["delivered"] == PREFETCH)
        await eventually(lambda: len(caller.replies) >= PREFETCH // 2, "the answers to those beyond half the places")
        await answered_soon(caller)
        assert len(caller.replies) < PREFETCH, "the others wait"
        await eventually(lambda: len(caller.replies) == PREFETCH + 1, "the answers to those that waited")
        assert time.monotonic() - started > WAIT_MS / 1000
        assert all(reply.body["success"] for reply in caller.replies)


async def test_requests_that_waited_on_a_lost_connection_do_not_stall_those_behind_them(
    rabbitmq, rack: str, tmp_path: Path
) -> None:
    url = rabbitmq.url
    async with real_rack(url, rack, tmp_path) as (transport, observer, waiting), calling(url, rack) as caller:
        for _ in range(10):
            await caller.publish("getChanges", waiting)
        await eventually(lambda: observer.counts["delivered"] == 10)
        close_connections(rabbitmq, f"model-manager/{rack}/consume")
        await eventually(lambda: observer.counts["reconnected"] == 1)
        await eventually(lambda: transport.status.consuming)
        await answered_soon(caller)
        assert observer.counts["redelivered"] == 10
