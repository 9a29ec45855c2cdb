"""Hints reach every listener in order, confirmed by the broker, and never hold up whoever announces them."""

from __future__ import annotations

import pytest
from aiormq.abc import DeliveredMessage

from schemas import wire
from schemas.hints import CONTENT_TYPE, Hint, head_hint
from tests.amqp import Caller, calling, eventually, serving
from worker.transport import topology
from worker.transport.hint_outbox import MAX_HINTS

pytestmark = pytest.mark.broker


def hint(rack: str, number: int) -> Hint:
    return head_hint(rack=rack, epoch=1, head=number, time_ms=1_700_000_000_000 + number)


async def listen(caller: Caller, rack: str) -> list[DeliveredMessage]:
    """Everything said about this rack, by a listener's own queue."""
    heard: list[DeliveredMessage] = []

    async def remember(message: DeliveredMessage) -> None:
        if wire.parse_object(message.body)["source"] == f"/racks/{rack}":
            heard.append(message)

    queue = topology.new_hint_queue("listener")
    await caller.channel.queue_declare(queue, exclusive=True)
    await caller.channel.queue_bind(queue, topology.HINT_EXCHANGE)
    await caller.channel.basic_consume(queue, remember, no_ack=True)
    return heard


async def test_hints_arrive_in_the_order_they_were_announced(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        heard = await listen(caller, rack)
        for number in range(500):
            served.transport.announce(hint(rack, number))
        await eventually(lambda: len(heard) == 500)
        assert [wire.parse_object(message.body)["data"]["head"] for message in heard] == list(range(500))
        assert served.observer.counts["hint_published"] == 500
        properties = heard[0].header.properties
        assert (properties.content_type, properties.message_type) == (CONTENT_TYPE, "model-manager.head")
        assert properties.message_id == hint(rack, 0)["id"]


async def test_draining_flushes_the_hints(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        heard = await listen(caller, rack)
        for number in range(200):
            served.transport.announce(hint(rack, number))
        await served.transport.drain(10)
        assert served.observer.counts["hint_published"] == 200
        await eventually(lambda: len(heard) == 200)


async def test_without_a_connection_the_newest_hints_are_kept_and_the_dropped_ones_counted(
    amqp_url: str, rack: str
) -> None:
    async with calling(amqp_url, rack) as caller, serving(amqp_url, rack, wait=False) as served:
        # Nothing is connected before the event loop runs again.
        for number in range(MAX_HINTS + 7):
            served.transport.announce(hint(rack, number))
        assert served.observer.counts["hint_dropped"] == 7
        await served.until_consuming()
        await eventually(lambda: served.observer.counts["hint_published"] == MAX_HINTS)
        assert (await caller.call("echo")).body["success"]


async def test_a_missing_hint_exchange_is_made_again_and_replies_go_on(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.channel.exchange_delete(topology.HINT_EXCHANGE)
        served.transport.announce(hint(rack, 1))
        assert (await caller.call("echo")).body["success"]
        await eventually(lambda: served.observer.counts["hint_published"] == 1)
        assert served.observer.counts["reconnected"] == 0
