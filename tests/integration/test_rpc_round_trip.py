"""A request over RabbitMQ is executed, answered where its sender asked, and acknowledged."""

from __future__ import annotations

import asyncio
import datetime
from typing import Any

import pytest

from schemas import wire
from tests.amqp import calling, eventually, serving
from worker import stall
from worker.context import Context
from worker.transport import frame_tap, topology

pytestmark = pytest.mark.broker


async def test_a_request_is_answered_by_direct_reply_to(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        reply = await caller.call("echo", {"a": 1}, correlation_id="c-1")
        assert reply.body == {"success": True, "params": {"a": 1}}
        assert reply.message.header.properties.correlation_id == "c-1"
        assert reply.message.header.properties.content_type == "application/json"
        assert reply.message.header.properties.message_id
        assert await caller.depth(topology.request_queue(rack)) == 0


@pytest.mark.parametrize("name", ["", "model-manager.reply.{rack}.1"], ids=["exclusive", "named"])
async def test_a_request_is_answered_on_a_reply_queue(amqp_url: str, rack: str, name: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        declared = await caller.channel.queue_declare(name.format(rack=rack), exclusive=True)
        assert declared.queue is not None
        await caller.consume(declared.queue)
        reply = await caller.call("echo", {"a": 1}, reply_to=declared.queue, correlation_id="7")
        assert reply.body["params"] == {"a": 1}
        assert reply.message.routing_key == declared.queue


@pytest.mark.parametrize(
    "correlation_id",
    [b"\xff\xfe\x00raw", "Zürich 💾".encode(), b"x" * 255, b"\xed\xa0\x80", b"a\nb\t"],
    ids=["not UTF-8", "Unicode", "longest", "encoded surrogate", "controls"],
)
async def test_a_correlation_id_comes_back_byte_for_byte(amqp_url: str, rack: str, correlation_id: bytes) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        text = correlation_id.decode("utf-8", "surrogateescape")
        reply = await caller.call("echo", correlation_id=text)
        returned = reply.message.header.properties.correlation_id or ""
        assert returned.encode("utf-8", "surrogateescape") == correlation_id
        served.dispatcher.contexts[0].correlation_id.encode()  # fit for logs


async def test_a_message_from_the_default_exchange_names_its_method_by_type(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        queue = topology.request_queue(rack)
        reply = await caller.call("", {"a": 2}, exchange="", key=queue, message_type="echo")
        assert reply.body["params"] == {"a": 2}
        agreeing = await caller.call("echo", {"a": 3}, message_type="echo")
        assert agreeing.body["params"] == {"a": 3}


async def test_a_request_without_reply_to_is_executed_and_not_answered(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("count", reply_to=None, message_id="m-1")
        await eventually(lambda: served.dispatcher.effects["m-1"] == 1)
        assert (await caller.call("echo")).body["success"]
        assert len(caller.replies) == 1
        assert await caller.depth(topology.dead_letter_queue(rack)) == 0


async def test_a_repeat_with_the_same_key_has_no_second_effect(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        headers = {"x-idempotency-key": "k-1"}
        first = await caller.call("count", headers=headers, correlation_id="1", message_id="m-1")
        second = await caller.call("count", headers=headers, correlation_id="2", message_id="m-2")
        assert first.body == second.body == {"success": True, "effects": 1}
        assert served.dispatcher.effects == {"k-1": 1}


async def test_the_user_id_is_the_caller_and_the_timestamp_shows_the_wait(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        sent = datetime.datetime.now(datetime.UTC)
        await caller.call("echo", user_id="guest", timestamp=sent)
        assert served.dispatcher.contexts[0].caller == "guest"
        assert served.dispatcher.contexts[0].transport == "amqp"
        assert served.observer.counts["queue_wait"] == 1


async def test_a_good_traceparent_comes_back_and_a_bad_one_is_dropped(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        reply = await caller.call("echo", headers={"traceparent": good})
        assert (reply.message.header.properties.headers or {}) == {"traceparent": good}
        reply = await caller.call("echo", headers={"traceparent": "00-nonsense"})
        assert reply.body["success"]
        assert not reply.message.header.properties.headers


async def test_a_reply_that_is_too_large_becomes_an_error(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        reply = await caller.call("big")
        assert reply.code == "ERR_MODEL_TOO_LARGE"
        assert reply.body["error"]["details"] == {"maxReplySize": 4_000_000}


async def test_a_requester_that_has_gone_costs_a_reply_and_nothing_else(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("count", reply_to="model-manager.reply.nobody", message_id="m-1")
        await eventually(lambda: served.observer.counts["reply_unroutable"] == 1)
        async with calling(amqp_url, rack) as other:
            await other.publish("slow", message_id="m-2")
            await eventually(lambda: served.dispatcher.started["slow"] == 1)
        served.dispatcher.released.set()
        assert (await caller.call("echo")).body["success"]
        assert served.dispatcher.effects == {"m-1": 1, "m-2": 1}
        assert await caller.depth(topology.request_queue(rack)) == 0
        assert served.observer.counts["redelivered"] == 0


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xef\xbb\xbf{}", b'{"a": "\x00"}', b"{} trailing", b"[]", b'{"a":1,"a":2}', b"\xff"],
    ids=["empty", "cut", "byte order mark", "NUL", "trailing", "array", "twice", "not UTF-8"],
)
async def test_a_bad_body_reaches_the_dispatcher_and_is_answered(amqp_url: str, rack: str, body: bytes) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        reply = await caller.call("echo", body)
        assert reply.code == "ERR_INVALID_REQUEST"
        assert served.dispatcher.bodies == [body]


@pytest.mark.parametrize("reply_to", ["amq.rabbitmq.reply-to", "model-manager.reply.absent"], ids=["direct", "a queue"])
async def test_a_reply_that_was_not_written_before_an_absence_is_decided_anew(
    amqp_url: str, rack: str, reply_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    away_s = 0.0
    decided = []
    monkeypatch.setattr(frame_tap, "clock", lambda: stall.clock() + away_s)
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        if reply_to != "amq.rabbitmq.reply-to":
            await caller.channel.queue_declare(reply_to, exclusive=True)
            await caller.consume(reply_to)
        answer = served.dispatcher.answer

        async def and_then_away(method: str, body: bytes, context: Context) -> dict[str, Any]:
            reply = await answer(method, body, context)
            decided.append(method)
            if len(decided) == 1:
                # In the next turn of the loop, ahead of the write of what this one sends.
                asyncio.get_running_loop().call_soon(leave)
            return reply

        def leave() -> None:
            nonlocal away_s
            away_s = 2 * stall.ABSENT_TURN_S

        monkeypatch.setattr(served.dispatcher, "answer", and_then_away)
        reply = await caller.call("count", reply_to=reply_to, message_id="m-1")
        assert reply.body == {"success": True, "effects": 1}
        assert len(decided) > 1
        assert served.observer.counts["redelivered"] >= 1
        assert served.observer.counts["reconnected"] >= 1
        assert (await caller.call("echo", reply_to=reply_to)).body["success"]


async def test_many_requests_at_once_are_each_answered_once(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        for number in range(300):
            await caller.publish("echo", {"n": number}, correlation_id=str(number))
        await eventually(lambda: len(caller.replies) == 300)
        for reply in caller.replies:
            assert str(reply.body["params"]["n"]) == reply.message.header.properties.correlation_id
        assert {reply.body["params"]["n"] for reply in caller.replies} == set(range(300))
        assert wire.parse_object(caller.replies[0].message.body)["success"]
