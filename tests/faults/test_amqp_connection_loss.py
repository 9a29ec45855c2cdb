"""Connections and channels that die under work: it goes on, and every request gets its answer and one effect."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.amqp import PATIENCE_S, Caller, Served, calling, close_connections, eventually, serving
from tests.ledger.proxy import Proxy
from worker.transport import connections, consuming, replies, topology
from worker.transport.reply_addresses import DIRECT_PREFIX, node_of

pytestmark = pytest.mark.broker

FORGED = {
    "no process id": "forged.a2V5",
    "no base64": "!!!.a2V5",
    "another node": "g1h2AAtyZXBseUAxMjM0NQAAA5MAAAAAawT3ew==.9SAiEhneZsLVRwoRjfEkWg==",
    "a node of no reply": "g1h2AA5taW5lQGxvY2FsaG9zdAAAA5MAAAAAawT3ew==.9SAiEhneZsLVRwoRjfEkWg==",
}


async def expect_one_consumer(caller: Caller, served: Served) -> None:
    """The broker counts a consumer that is gone for a moment longer."""
    await served.until_consuming()
    deadline = time.monotonic() + PATIENCE_S
    while (count := await caller.consumers()) != 1:
        assert time.monotonic() < deadline, f"{count} consumers"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("role", ["consume", "publish"])
async def test_work_goes_on_when_a_connection_is_closed_in_the_middle_of_it(rabbitmq, rack: str, role: str) -> None:
    async with serving(rabbitmq.url, rack) as served, calling(rabbitmq.url, rack) as caller:
        await caller.publish("slow", headers={"x-idempotency-key": "k-1"}, correlation_id="c-1")
        await eventually(lambda: served.dispatcher.started["slow"] == 1)
        close_connections(rabbitmq, f"model-manager/{rack}/{role}")
        await eventually(lambda: served.observer.counts["reconnected"] == 1)
        await served.until_consuming()
        if role == "consume":
            await eventually(lambda: served.dispatcher.started["slow"] == 2, "the redelivery")
        served.dispatcher.released.set()
        await eventually(lambda: caller.replies)
        assert {reply.message.header.properties.correlation_id for reply in caller.replies} == {"c-1"}
        assert served.dispatcher.effects == {"k-1": 1}
        assert served.dispatcher.cancelled == 0
        await expect_one_consumer(caller, served)
        assert (await caller.call("echo")).body["success"]


async def test_connections_whose_other_end_is_gone_are_found_without_any_heartbeat(
    amqp_url: str, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (consuming, replies):
        monkeypatch.setattr(module, "WATCH_INTERVAL_S", 0.2)
    monkeypatch.setattr(connections, "CONNECT_TIMEOUT_S", 1.0)
    async with Proxy(amqp_url) as proxy, serving(proxy.url, rack) as served, calling(amqp_url, rack) as caller:
        await eventually(lambda: served.transport.status.connected)
        proxy.half_open("far")
        assert proxy.counts["half-opened"] == 2
        await caller.publish("count", headers={"x-idempotency-key": "k-1"})
        await eventually(lambda: caller.replies)
        await eventually(lambda: served.observer.counts["reconnected"] == 2)
        assert served.dispatcher.effects == {"k-1": 1}


async def test_a_queue_deleted_under_the_consumer_is_made_again(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.channel.queue_delete(topology.request_queue(rack))
        await eventually(lambda: not served.transport.status.consuming)
        await expect_one_consumer(caller, served)
        assert (await caller.call("echo")).body["success"]
        # A broker that tells of the deletion before it has ended it may yet refuse the consumer: once, and rarely.
        assert served.observer.counts["reconnected"] <= 1


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED.keys())
async def test_a_forged_direct_reply_address_does_not_cost_the_publishing_connection(
    amqp_url: str, rack: str, forged: str
) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("count", reply_to=DIRECT_PREFIX + forged, message_id="m-1")
        counts = served.observer.counts
        await eventually(lambda: served.dispatcher.effects or counts["dead_lettered ERR_INVALID_REQUEST"])
        if served.dispatcher.effects:
            # To RabbitMQ 4.0 another node is nothing that a reply could harm, and as good as a caller who has gone.
            assert node_of(DIRECT_PREFIX + forged) is not None
            assert served.dispatcher.effects == {"m-1": 1}
        else:
            dead = await caller.dead_letter()
            assert (dead.header.properties.headers or {})["x-error-code"] == "ERR_INVALID_REQUEST"
        assert (await caller.call("echo")).body["success"]
        assert counts["reconnected"] == 0


async def test_a_blocked_broker_stops_the_work_and_an_unblocked_one_resumes_it(rabbitmq, rack: str) -> None:
    async with calling(rabbitmq.url, rack) as caller, serving(rabbitmq.url, rack) as served:
        for number in range(3):
            await caller.publish("slow", headers={"x-idempotency-key": f"k-{number}"}, correlation_id=str(number))
        await eventually(lambda: served.dispatcher.started["slow"] == 3)
        rabbitmq.ctl("set_vm_memory_high_watermark", "0.00001")
        try:
            served.dispatcher.released.set()
            await eventually(lambda: served.transport.status.blocked)
            await eventually(lambda: not served.transport.status.consuming)
            assert served.transport.status.reason == "the broker has blocked publishing"
            assert served.transport.status.connected
        finally:
            rabbitmq.ctl("set_vm_memory_high_watermark", "0.4")
        await served.until_consuming()
        await eventually(lambda: len(caller.replies) == 3)
        assert {reply.message.header.properties.correlation_id for reply in caller.replies} == {"0", "1", "2"}
        assert served.dispatcher.effects == {"k-0": 1, "k-1": 1, "k-2": 1}
        assert (await caller.call("echo")).body["success"]
        assert await caller.depth(topology.request_queue(rack)) == 0


async def test_draining_lets_work_finish_and_takes_no_more(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("slow", correlation_id="c-1")
        await eventually(lambda: served.dispatcher.started["slow"] == 1)
        served.dispatcher.released.set()
        await served.transport.drain(10)
        await served.transport.close()
        await caller.publish("echo")
        await eventually(lambda: len(caller.replies) == 1)
        assert caller.replies[0].body["success"]
        await caller.until_depth(topology.request_queue(rack), 1)
        assert await caller.consumers() == 0


async def test_work_that_outlasts_the_drain_is_given_back_and_served_by_the_next_worker(
    amqp_url: str, rack: str
) -> None:
    async with calling(amqp_url, rack) as caller, serving(amqp_url, rack) as served:
        await caller.publish("slow", correlation_id="c-1")
        await eventually(lambda: served.dispatcher.started["slow"] == 1)
        await served.transport.drain(0.05)
        assert served.dispatcher.cancelled == 1
        assert served.observer.counts["requeued"] == 1
        await served.transport.close()
        await caller.until_depth(topology.request_queue(rack), 1)
        async with serving(amqp_url, rack) as successor:
            successor.dispatcher.released.set()
            await eventually(lambda: len(caller.replies) == 1)
            assert successor.observer.counts["redelivered"] == 1


async def test_after_an_unclean_end_redeliveries_come_one_at_a_time_until_a_new_request_does(
    rabbitmq, rack: str
) -> None:
    async with calling(rabbitmq.url, rack) as caller, serving(rabbitmq.url, rack, delete=False) as first:
        assert (await caller.call("echo")).body["success"]
        for _ in range(5):
            await caller.publish("slow")
        await eventually(lambda: first.dispatcher.started["slow"] == 5)
        await first.transport.close()
        async with serving(rabbitmq.url, rack) as second:
            await caller.publish("echo")
            await eventually(lambda: second.dispatcher.started["slow"] == 1)
            await (await caller.connection.channel()).close()  # a round trip: nothing more is on its way
            assert second.dispatcher.started == {"slow": 1}
            second.dispatcher.released.set()
            await eventually(lambda: len(caller.replies) == 7)
            second.dispatcher.released.clear()
            for _ in range(5):
                await caller.publish("slow")
            await eventually(lambda: second.dispatcher.started["slow"] == 10)
            second.dispatcher.released.set()
            await eventually(lambda: len(caller.replies) == 12)
