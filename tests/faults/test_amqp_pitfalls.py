"""What is known to go wrong with RabbitMQ and its Python libraries, each once, where no other test shows it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import aiormq
import pamqp.frame
import pytest
from aiormq.abc import DeliveredMessage
from aiormq.exceptions import ChannelPreconditionFailed
from pamqp.commands import Basic

from deploy.local import RabbitMQ
from tests.amqp import Caller, Served, broker_version, calling, delete_queues, eventually, serving
from tests.ledger.proxy import Proxy
from worker.context import Context
from worker.transport import consuming, topology

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


async def test_a_request_that_every_consumer_rejects_becomes_a_dead_letter_at_the_limit(
    amqp_url: str, rack: str
) -> None:
    deliveries = 0

    async def reject(message: DeliveredMessage) -> None:
        nonlocal deliveries
        deliveries += 1
        await message.channel.basic_reject(message.delivery_tag or 0, requeue=True)

    async with calling(amqp_url, rack) as caller:
        await topology.provision(caller.connection, rack)
        await caller.publish("poison", message_id="m-1")
        await caller.channel.basic_consume(topology.request_queue(rack), reject)
        await expect_death_at_the_limit(caller)
    assert deliveries == topology.DELIVERY_LIMIT + 1
    await delete_queues(amqp_url, rack)


async def test_a_request_that_every_consumer_dies_of_becomes_a_dead_letter_at_the_limit(
    amqp_url: str, rack: str
) -> None:
    async with calling(amqp_url, rack) as caller:
        await topology.provision(caller.connection, rack)
        await caller.publish("poison", message_id="m-1")
        for _ in range(topology.DELIVERY_LIMIT + 1):
            async with aiormq.connect(amqp_url) as connection:
                taken: list[DeliveredMessage] = []

                async def take(message: DeliveredMessage, taken: list[DeliveredMessage] = taken) -> None:
                    taken.append(message)

                channel = await connection.channel()
                await channel.basic_consume(topology.request_queue(rack), take)
                await eventually(lambda taken=taken: taken)
        await expect_death_at_the_limit(caller)
    await delete_queues(amqp_url, rack)


async def expect_death_at_the_limit(caller: Caller) -> None:
    dead = (await caller.dead_letter()).header.properties
    [death] = (dead.headers or {})["x-death"]
    assert (dead.message_id, death["reason"]) == ("m-1", "delivery_limit")


async def test_a_request_that_is_given_back_again_and_again_is_done_at_last(amqp_url: str, rack: str) -> None:
    deliveries = 0

    async def give_back(message: DeliveredMessage) -> None:
        nonlocal deliveries
        deliveries += 1
        if deliveries <= 2 * topology.DELIVERY_LIMIT:
            await message.channel.basic_nack(message.delivery_tag or 0, requeue=True)

    async with calling(amqp_url, rack) as caller:
        if broker_version(caller.connection) < (4, 3):
            pytest.skip("before RabbitMQ 4.3 each time counts against the limit of deliveries")
        await topology.provision(caller.connection, rack)
        await caller.publish("unlucky", message_id="m-1")
        await caller.channel.basic_consume(topology.request_queue(rack), give_back)
        await eventually(lambda: deliveries == 2 * topology.DELIVERY_LIMIT + 1)
        assert await caller.depth(topology.dead_letter_queue(rack)) == 0
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


async def test_no_more_is_in_work_than_the_prefetch_allows(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack, prefetch=4) as served, calling(amqp_url, rack) as caller:
        assert (await caller.call("echo")).body["success"]
        for number in range(10):
            await caller.publish("slow", message_id=f"m-{number}")
        await eventually(lambda: served.dispatcher.started["slow"] == 4)
        await caller.until_depth(topology.request_queue(rack), 6)
        assert served.dispatcher.started["slow"] == 4
        served.dispatcher.released.set()
        await eventually(lambda: len(served.dispatcher.effects) == 10)


async def test_a_consumer_that_the_broker_forgot_is_found_and_registered_again(
    amqp_url: str, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consuming, "WATCH_INTERVAL_S", 0.1)
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        assert (await caller.call("echo")).body["success"]
        await forget_the_consumer(served, caller)
        assert (await caller.call("echo")).body["success"]
        assert served.observer.counts["reconnected"] == 1
        assert await caller.consumers() == 1


async def forget_the_consumer(served: Served, caller: Caller) -> None:
    """As far as the broker knows there is none now; the worker believes that it consumes."""
    consumer: Any = served.transport._consumer
    taken: list[Any] = []
    deliver = consumer._deliver
    consumer._deliver = lambda message: (taken.append(message.channel), deliver(message))
    await until_prefetching(served)
    assert (await caller.call("echo")).body["success"]
    (channel,) = taken
    channel._tap.send(pamqp.frame.marshal(Basic.Cancel(consumer._tag, nowait=True), channel._number))


async def until_prefetching(served: Served) -> None:
    """Return when the consumer is the one that is not cautious any more."""
    consumer: Any = served.transport._consumer
    await eventually(lambda: consumer._registered_prefetch == 64)


async def test_a_request_that_is_held_longer_than_the_broker_waits_comes_again_and_is_done_once(
    rabbitmq: RabbitMQ, rack: str
) -> None:
    """The broker closes the channel then, with all that is on it, also RabbitMQ 4.3: the consumer is another by now."""
    be_patient(rabbitmq, 1000, checked_every_ms=1000)
    try:
        async with serving(rabbitmq.url, rack) as served, calling(rabbitmq.url, rack) as caller:
            await caller.publish("slow", headers={"x-idempotency-key": "k-1"}, correlation_id="c-1")
            await eventually(lambda: served.dispatcher.started["slow"] == 2, "the redelivery")
            served.dispatcher.released.set()
            await eventually(lambda: caller.replies)
            await eventually(lambda: served.observer.counts["ack_lost"] == 1)
            assert caller.replies[0].message.header.properties.correlation_id == "c-1"
            assert (served.dispatcher.effects, served.dispatcher.cancelled) == ({"k-1": 1}, 0)
            await caller.until_depth(topology.request_queue(rack), 0)
    finally:
        be_patient(rabbitmq, 1_800_000, checked_every_ms=60_000)


async def test_a_consumer_that_the_broker_gave_up_is_made_again_and_only_the_new_one_takes_work(
    rabbitmq: RabbitMQ, rack: str
) -> None:
    """RabbitMQ 4.3 cancels it, keeps it among those that wait, and takes it back with the late acknowledgement."""
    be_patient(rabbitmq, 1000, checked_every_ms=1000)
    try:
        async with serving(rabbitmq.url, rack) as served, calling(rabbitmq.url, rack) as caller:
            assert (await caller.call("echo")).body["success"]
            await until_prefetching(served)
            # RabbitMQ 4.3.6 may lose a timeout that begins while an earlier one runs.
            await asyncio.sleep(1.2)
            await caller.publish("slow", headers={"x-idempotency-key": "k-1"}, correlation_id="c-1")
            await eventually(lambda: served.dispatcher.started["slow"] == 2, "the redelivery")
            served.dispatcher.released.set()
            await eventually(lambda: len(caller.replies) == 3)
            assert (served.dispatcher.effects, served.dispatcher.cancelled) == ({"k-1": 1}, 0)
            await served.until_consuming()
            assert await caller.consumers() == 1
            await served.transport.drain(10)
            await caller.publish("echo")
            await caller.until_depth(topology.request_queue(rack), 1)
            assert await caller.consumers() == 0
    finally:
        be_patient(rabbitmq, 1_800_000, checked_every_ms=60_000)


def be_patient(rabbitmq: RabbitMQ, milliseconds: int, *, checked_every_ms: int) -> None:
    """How long the broker waits for an acknowledgement on channels that are opened from now on."""
    values = f"[{{consumer_timeout, {milliseconds}}}, {{channel_tick_interval, {checked_every_ms}}}]"
    rabbitmq.ctl("eval", f"[application:set_env(rabbit, Key, Value) || {{Key, Value}} <- {values}].")


async def test_a_consumer_that_the_broker_cancels_with_work_under_way_is_made_again_and_the_work_is_answered(
    amqp_url: str, rack: str
) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("slow", headers={"x-idempotency-key": "k-1"}, correlation_id="c-1")
        await eventually(lambda: served.dispatcher.started["slow"] == 1)
        await caller.channel.queue_delete(topology.request_queue(rack))
        await eventually(lambda: not served.transport.status.consuming)
        await served.until_consuming()
        served.dispatcher.released.set()
        await eventually(lambda: caller.replies)
        assert caller.replies[0].message.header.properties.correlation_id == "c-1"
        assert (served.dispatcher.effects, served.dispatcher.cancelled) == ({"k-1": 1}, 0)
        assert (await caller.call("echo")).body["success"]
        await caller.until_depth(topology.request_queue(rack), 0)


async def test_a_request_that_the_worker_cannot_get_done_ends_as_a_dead_letter_and_not_in_a_loop(
    amqp_url: str, rack: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="worker.transport.amqp")
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        answer, failures = served.dispatcher.answer, 0

        async def fail(method: str, body: bytes, context: Context) -> dict[str, Any]:
            nonlocal failures
            if method != "count":
                return await answer(method, body, context)
            failures += 1
            raise RuntimeError("a fault of ours")

        served.dispatcher.answer = fail  # type: ignore[method-assign]
        await caller.publish("count", message_id="m-1")
        dead = (await caller.dead_letter()).header.properties
        [death] = (dead.headers or {})["x-death"]
        assert (dead.message_id, death["reason"], failures) == ("m-1", "delivery_limit", topology.DELIVERY_LIMIT + 1)
        assert (await caller.call("echo")).body["success"]


async def test_nobody_can_call_in_the_name_of_another_user(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        with pytest.raises(ChannelPreconditionFailed, match="user_id"):
            await caller.publish("count", user_id="somebody", message_id="m-1")
        await caller.open()
        assert (await caller.call("count", user_id="guest", message_id="m-2")).body["success"]
        assert served.dispatcher.effects == {"m-2": 1}
        assert [context.caller for context in served.dispatcher.contexts] == ["guest"]
