"""What is known to go wrong with RabbitMQ and its Python libraries, each once, where no other test shows it."""

from __future__ import annotations

import aiormq
import pytest
from aiormq.abc import DeliveredMessage

from tests.amqp import calling, delete_queues, eventually, serving
from tests.ledger.proxy import Proxy
from worker.transport import topology

pytestmark = pytest.mark.broker


async def test_an_acknowledgement_whose_channel_is_gone_is_counted_and_the_redelivery_answered(
    amqp_url: str, rack: str
) -> None:
    async with Proxy(amqp_url) as proxy, serving(proxy.url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("slow", headers={"x-idempotency-key": "k-1"})
        await eventually(lambda: served.dispatcher.started["slow"] == 1)
        proxy.reset()
        await eventually(lambda: served.dispatcher.started["slow"] == 2, "the redelivery")
        served.dispatcher.released.set()
        await eventually(lambda: len(caller.replies) == 2)
        await eventually(lambda: served.observer.counts["ack_lost"] == 1)
        assert served.dispatcher.effects == {"k-1": 1}
        await caller.until_depth(topology.request_queue(rack), 0)


async def test_replies_to_requests_with_one_message_id_are_returned_each_for_itself(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        for number in range(5):
            headers = {"x-idempotency-key": f"k-{number}"}
            await caller.publish("slow", headers=headers, message_id="m", reply_to="model-manager.reply.nobody")
        await eventually(lambda: served.dispatcher.started["slow"] == 5)
        served.dispatcher.released.set()
        await eventually(lambda: served.observer.counts["reply_unroutable"] == 5)
        assert served.observer.counts["redelivered"] == served.observer.counts["requeued"] == 0


async def test_a_request_that_fails_is_answered_and_never_given_back(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        assert (await caller.call("fail")).code == "ERR_MODEL_NOT_FOUND"
        assert (await caller.call("echo")).body["success"]
        assert served.dispatcher.started == {"fail": 1, "echo": 1}
        assert served.observer.counts["requeued"] == 0


async def test_a_request_that_no_consumer_gets_done_becomes_a_dead_letter_at_the_limit(
    amqp_url: str, rack: str
) -> None:
    deliveries = 0

    async def give_back(message: DeliveredMessage) -> None:
        nonlocal deliveries
        deliveries += 1
        await message.channel.basic_nack(message.delivery_tag or 0, requeue=True)

    async with aiormq.connect(amqp_url) as connection, calling(amqp_url, rack) as caller:
        await topology.provision(connection, rack)
        await caller.publish("poison", message_id="m-1")
        channel = await connection.channel()
        await channel.basic_consume(topology.request_queue(rack), give_back)
        dead = (await caller.dead_letter()).header.properties
    [death] = (dead.headers or {})["x-death"]
    assert (dead.message_id, death["reason"]) == ("m-1", "delivery_limit")
    assert deliveries == topology.DELIVERY_LIMIT + 1
    await delete_queues(amqp_url, rack)


async def test_a_channel_that_dies_cancels_no_work(amqp_url: str, rack: str) -> None:
    async with Proxy(amqp_url) as proxy, serving(proxy.url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("slow", headers={"x-idempotency-key": "k-1"}, reply_to=None)
        await eventually(lambda: served.dispatcher.started["slow"] == 1)
        proxy.cut()
        await eventually(lambda: served.observer.counts["reconnected"] >= 1)
        assert served.dispatcher.cancelled == 0
        served.dispatcher.released.set()
        await eventually(lambda: served.dispatcher.effects == {"k-1": 1})


async def test_a_connection_that_is_lost_when_it_was_just_made_is_made_again_at_once(amqp_url: str, rack: str) -> None:
    async with Proxy(amqp_url) as proxy, serving(proxy.url, rack) as served, calling(amqp_url, rack) as caller:
        proxy.reset()
        await eventually(lambda: served.observer.counts["reconnected"] == 2, within_s=2)
        await served.until_consuming()
        assert (await caller.call("echo")).body["success"]
