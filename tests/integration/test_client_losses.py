"""The client over RabbitMQ when things go wrong: no answer is lost or crossed, no effect is doubled, nothing leaks."""

from __future__ import annotations

import asyncio
import time

import pytest

from deploy.local import RabbitMQ
from schemas.errors import ModelManagerError
from schemas.wire import MAX_BODY_BYTES
from tests.amqp import eventually, serving
from tests.amqp_caller import calling
from tests.wire import wire
from worker.client.caller import Unreachable
from worker.client.hints import hints


async def test_a_hundred_calls_outlive_a_cut_connection_with_one_effect_and_one_answer_each(
    amqp_url: str, rack: str
) -> None:
    async with (
        serving(amqp_url, rack, prefetch=256) as served,
        wire(amqp_url) as between,
        calling(between.url, rack) as caller,
    ):
        calls = [asyncio.create_task(caller.call("slow", {}, timeout_s=30, idempotency_key=f"{n}")) for n in range(100)]
        await eventually(lambda: served.dispatcher.started["slow"] >= 100, "all calls to arrive")
        assert caller.in_flight == 100
        between.cut()
        await eventually(lambda: served.dispatcher.started["slow"] >= 200, "all calls to arrive again")
        served.dispatcher.released.set()
        replies = await asyncio.gather(*calls)
        assert [reply["effects"] for reply in replies] == [1] * 100
        assert len(served.dispatcher.effects) == 100
        assert (caller.in_flight, caller.connections, caller.late_replies) == (0, 2, 0)


async def test_a_change_has_a_key_also_if_its_caller_names_none(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        for _ in range(2):
            with pytest.raises(ModelManagerError, match="no method deleteModel"):
                await caller.call("deleteModel", {}, timeout_s=20)
        first, second = (context.idempotency_key for context in served.dispatcher.contexts)
        assert first and second and first != second


async def test_answers_that_come_in_another_order_reach_their_own_calls(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        first = asyncio.create_task(caller.call("slow", {}, timeout_s=20, idempotency_key="first"))
        await eventually(lambda: served.dispatcher.started["slow"] == 1)
        assert (await caller.call("echo", {"n": 2}, timeout_s=10))["params"] == {"n": 2}
        assert not first.done()
        served.dispatcher.released.set()
        assert (await first)["effects"] == 1


async def test_an_answer_after_the_deadline_is_dropped_and_counted(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        with pytest.raises(ModelManagerError, match=r"No answer within 0\.5 seconds") as caught:
            await caller.call("slow", {}, timeout_s=0.5, idempotency_key="K")
        assert caught.value.code == "ERR_DEADLINE_EXCEEDED"
        assert (caller.in_flight, caller.late_replies) == (0, 0)
        served.dispatcher.released.set()
        await eventually(lambda: caller.late_replies == 1, "the late answer")
        assert (await caller.call("echo", {"n": 1}, timeout_s=10))["params"] == {"n": 1}
        assert caller.late_replies == 1


async def test_a_cancelled_call_frees_its_place(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        calls = [asyncio.create_task(caller.call("slow", {}, timeout_s=20, idempotency_key=f"{n}")) for n in range(20)]
        await eventually(lambda: served.dispatcher.started["slow"] == 20)
        for call in calls:
            call.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*calls, return_exceptions=True)
        )
        assert caller.in_flight == 0
        served.dispatcher.released.set()
        await eventually(lambda: caller.late_replies == 20, "the answers that nobody wants")
        assert caller.connections == 1


async def test_a_call_that_gives_up_while_connecting_leaves_the_connection_to_the_others(
    amqp_url: str, rack: str
) -> None:
    async with serving(amqp_url, rack), wire(amqp_url) as between, calling(between.url, rack) as caller:
        between.leads_on.clear()
        patient = asyncio.create_task(caller.call("echo", {}, timeout_s=20))
        with pytest.raises(ModelManagerError, match="broker did not take the request"):
            await caller.call("echo", {}, timeout_s=0.2)
        between.leads_on.set()
        assert (await patient)["success"]
        assert (between.accepted, caller.connections) == (1, 1)


async def test_a_connection_that_stays_away_ends_every_waiter(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, wire(amqp_url) as between, calling(between.url, rack) as caller:
        calls = [asyncio.create_task(caller.call("slow", {}, timeout_s=2, idempotency_key=f"K{n}")) for n in range(5)]
        await eventually(lambda: served.dispatcher.started["slow"] >= 5, "all calls to arrive")
        between.cut_for_good()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(outcome, ModelManagerError) and outcome.retryable for outcome in outcomes)


async def test_closing_ends_every_call_at_once(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        calls = [asyncio.create_task(caller.call("slow", {}, timeout_s=60, idempotency_key=f"{n}")) for n in range(50)]
        await eventually(lambda: served.dispatcher.started["slow"] == 50)
        await caller.close()
        ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
        assert {str(end) for end in ends} == {"ERR_SHUTTING_DOWN: This caller is closed."}
        with pytest.raises(Unreachable, match="closed"):
            await caller.call("echo", {}, timeout_s=10)
        await caller.close()


async def test_closing_while_connecting_ends_the_calls_too(amqp_url: str, rack: str) -> None:
    async with wire(amqp_url) as between, calling(between.url, rack) as caller:
        between.leads_on.clear()
        call = asyncio.create_task(caller.call("echo", {}, timeout_s=60))
        await eventually(lambda: between.accepted == 1)
        started = time.monotonic()
        await caller.close()
        with pytest.raises(Unreachable, match="closed"):
            await call
        assert time.monotonic() - started < 5


async def test_a_blocked_broker_costs_calls_their_time_and_nothing_else(rabbitmq: RabbitMQ, rack: str) -> None:
    async with serving(rabbitmq.url, rack), calling(rabbitmq.url, rack) as caller:
        await caller.call("echo", {}, timeout_s=10)
        await asyncio.to_thread(rabbitmq.ctl, "set_vm_memory_high_watermark", "0.00001")
        try:
            # The broker stops to read from a connection with the next message that it brings.
            with pytest.raises(ModelManagerError, match="did not take the request"):
                for _ in range(20):
                    await caller.call("echo", {}, timeout_s=1)
            refused = [
                asyncio.create_task(caller.call("count", {}, timeout_s=1, idempotency_key="K")) for _ in range(50)
            ]
            for end in await asyncio.gather(*refused, return_exceptions=True):
                assert isinstance(end, ModelManagerError)
                assert (end.code, end.message) == (
                    "ERR_DEADLINE_EXCEEDED",
                    "The broker did not take the request within 1.0 seconds.",
                )
            assert caller.in_flight == 0
            waiting = asyncio.create_task(caller.call("count", {}, timeout_s=40, idempotency_key="K"))
        finally:
            await asyncio.to_thread(rabbitmq.ctl, "set_vm_memory_high_watermark", "0.4")
        assert (await waiting)["effects"] == 1
        assert caller.connections == 1


async def test_a_reply_queue_that_is_deleted_costs_no_answer(rabbitmq: RabbitMQ, rack: str) -> None:
    async with serving(rabbitmq.url, rack) as served, calling(rabbitmq.url, rack) as caller:
        call = asyncio.create_task(caller.call("slow", {}, timeout_s=30, idempotency_key="K"))
        await eventually(lambda: served.dispatcher.started["slow"] == 1)
        link = caller._opening
        assert link is not None
        await asyncio.to_thread(rabbitmq.ctl, "delete_queue", link.result().reply_to)
        await eventually(lambda: served.dispatcher.started["slow"] >= 2, "the call to be sent again")
        served.dispatcher.released.set()
        assert (await call)["effects"] == 1


async def test_a_body_that_is_too_large_is_refused_before_it_could_cost_the_others_their_channel(
    amqp_url: str, rack: str
) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        with pytest.raises(ModelManagerError, match="The body is over") as caught:
            await caller.call("echo", {"x": "x" * MAX_BODY_BYTES}, timeout_s=10)
        assert caught.value.code == "ERR_INVALID_REQUEST"
        assert (await caller.call("echo", {}, timeout_s=10_000_000))["success"], "also with a deadline years away"


async def test_hints_end_aloud_when_their_connection_is_cut(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), wire(amqp_url) as between, hints(between.url, rack) as heard:
        between.cut()
        with pytest.raises(Unreachable, match="lost"):
            await asyncio.wait_for(anext(heard), 20)


async def test_hints_end_aloud_when_their_queue_is_deleted(rabbitmq: RabbitMQ, rack: str) -> None:
    async with serving(rabbitmq.url, rack), hints(rabbitmq.url, rack) as heard:
        listed = await asyncio.to_thread(rabbitmq.ctl, "list_queues", "name", "--quiet")
        [queue] = [name for name in listed.split() if name.startswith(f"model-manager-{rack}.hints.")]
        await asyncio.to_thread(rabbitmq.ctl, "delete_queue", queue)
        with pytest.raises(Unreachable, match="lost"):
            await asyncio.wait_for(anext(heard), 20)


@pytest.mark.parametrize("address", ["amqp://guest:se/cret@127.0.0.1/", "nonsense"])
async def test_listening_at_what_is_no_address_is_refused_in_words_that_hold_nothing_of_it(address: str) -> None:
    with pytest.raises(ModelManagerError, match="is not an AMQP URL") as refused:
        await hints(address, "rack-2").__aenter__()
    assert refused.value.code == "ERR_INVALID_REQUEST"
    assert "cret" not in str(refused.value)


async def test_a_broker_without_any_rack_is_told_from_one_that_is_not_there(rabbitmq: RabbitMQ, rack: str) -> None:
    await asyncio.to_thread(rabbitmq.ctl, "add_vhost", rack)
    try:
        await asyncio.to_thread(rabbitmq.ctl, "set_permissions", "-p", rack, "guest", ".*", ".*", ".*")
        async with calling(rabbitmq.url + rack, rack) as caller:
            with pytest.raises(Unreachable, match="it has no exchange for requests"):
                await caller.call("echo", {}, timeout_s=10)
        with pytest.raises(Unreachable, match="it has no exchange for hints"):
            await hints(rabbitmq.url + rack, rack).__aenter__()
    finally:
        await asyncio.to_thread(rabbitmq.ctl, "delete_vhost", rack)
