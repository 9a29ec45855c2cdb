"""A broker that is stopped, killed or not there yet: the worker waits, comes back, and nothing is done twice."""

from __future__ import annotations

import asyncio
import time

import pytest

from schemas.hints import head_hint
from tests.amqp import calling, delete_queues, eventually, serving

pytestmark = pytest.mark.broker


async def test_a_worker_outlives_its_broker(rabbitmq, rack: str) -> None:
    """One story, since a broker takes seconds to start: away at boot, stopped under work, killed while idle."""
    await asyncio.to_thread(rabbitmq.stop)
    try:
        async with serving(rabbitmq.url, rack, wait=False) as served:
            transport, dispatcher = served.transport, served.dispatcher
            await eventually(lambda: transport.status.reason == "the broker cannot be reached")
            assert not transport.status.connected
            transport.announce(head_hint(rack=rack, epoch=1, head=1, time_ms=0))
            await asyncio.to_thread(rabbitmq.start)
            await served.until_consuming()
            assert transport.status.connected
            await eventually(lambda: served.observer.counts["hint_published"] == 1)

            async with calling(rabbitmq.url, rack) as caller:
                await caller.publish("slow", headers={"x-idempotency-key": "k-1"}, reply_to=None)
                await eventually(lambda: dispatcher.started["slow"] == 1)
                await asyncio.to_thread(rabbitmq.stop)
            await eventually(lambda: not transport.status.connected)
            await asyncio.to_thread(rabbitmq.start)
            await served.until_consuming()
            await eventually(lambda: dispatcher.started["slow"] == 2, "the redelivery")
            dispatcher.released.set()
            await eventually(lambda: dispatcher.effects["k-1"] == 1)

            async with calling(rabbitmq.url, rack) as caller:
                assert (await caller.call("echo")).body["success"]
                assert await caller.consumers() == 1
            await asyncio.to_thread(rabbitmq.kill)
            await eventually(lambda: not transport.status.connected)
            await asyncio.to_thread(rabbitmq.start)
            await served.until_consuming()
            async with calling(rabbitmq.url, rack) as caller:
                assert (await caller.call("echo")).body["success"]
                assert await caller.consumers() == 1
            assert dispatcher.effects == {"k-1": 1}
            assert dispatcher.cancelled == 0
            assert served.observer.counts["reconnected"] >= 4
    finally:
        await asyncio.to_thread(rabbitmq.start)
        await delete_queues(rabbitmq.url, rack)


async def test_closing_a_worker_whose_broker_never_was_there_is_prompt(rack: str) -> None:
    async with serving("amqp://guest:guest@127.0.0.1:1/", rack, wait=False, delete=False) as served:
        await eventually(lambda: served.transport.status.reason == "the broker cannot be reached")
        async with asyncio.timeout(5):
            await served.transport.drain(1)
            await served.transport.close()
        assert served.transport.status.reason


async def test_a_hint_that_cannot_be_sent_does_not_take_the_time_of_the_drain(rack: str) -> None:
    async with serving("amqp://guest:guest@127.0.0.1:1/", rack, wait=False, delete=False) as served:
        served.transport.announce(head_hint(rack=rack, epoch=1, head=1, time_ms=0))
        started = time.monotonic()
        await served.transport.drain(30)
        assert time.monotonic() - started < 10
