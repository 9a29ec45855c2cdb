"""What breaks the contract is not executed: its sender gets a coded error, or a dead letter holds the reason."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.amqp import calling, eventually, serving
from worker.transport import topology

pytestmark = pytest.mark.broker

REFUSALS: dict[str, dict[str, Any]] = {
    "another content type": {"content_type": "text/plain"},
    "another charset": {"content_type": "application/json; charset=latin-1"},
    "a content encoding": {"content_encoding": "gzip"},
    "an x-deadline that is text": {"headers": {"x-deadline": "tomorrow"}},
    "a negative x-deadline": {"headers": {"x-deadline": -1}},
    "an x-deadline that is a flag": {"headers": {"x-deadline": True}},
    "an empty idempotency key": {"headers": {"x-idempotency-key": ""}},
    "an idempotency key that is a number": {"headers": {"x-idempotency-key": 5}},
    "a type that is another method": {"message_type": "fail"},
    "a body over the limit": {"body": b" " * 2_000_001},
}


@pytest.mark.parametrize("request_", REFUSALS.values(), ids=REFUSALS.keys())
async def test_a_refusal_is_answered_or_dead_lettered(amqp_url: str, rack: str, request_: dict[str, Any]) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        reply = await caller.call("echo", **request_)
        assert reply.code == "ERR_INVALID_REQUEST"
        assert await caller.depth(topology.dead_letter_queue(rack)) == 0

        await caller.publish("echo", **request_, reply_to=None)
        dead = await caller.dead_letter()
        headers = dead.header.properties.headers or {}
        assert headers["x-error-code"] == "ERR_INVALID_REQUEST"
        assert headers["x-error-message"] == reply.body["error"]["message"]
        assert dead.body == request_.get("body", b"{}")
        assert served.dispatcher.bodies == []
        assert served.observer.counts["dead_lettered ERR_INVALID_REQUEST"] == 1


@pytest.mark.parametrize("content_type", ["application/json", 'Application/JSON; charset="UTF-8"'])
async def test_json_in_utf_8_is_accepted(amqp_url: str, rack: str, content_type: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        assert (await caller.call("echo", content_type=content_type)).body["success"]


async def test_a_request_from_the_default_exchange_without_a_type_is_refused(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        reply = await caller.call("", exchange="", key=topology.request_queue(rack))
        assert reply.code == "ERR_INVALID_REQUEST"


@pytest.mark.parametrize("reply_to", ["somebody.elses.queue", "model-manager-rack-2", "amq.rabbitmq.reply-to.forged.x"])
async def test_a_reply_address_outside_the_allow_list_is_dead_lettered(amqp_url: str, rack: str, reply_to: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("count", b'{"a":1}', reply_to=reply_to, message_id="m-1", correlation_id="c-1")
        dead = await caller.dead_letter()
        properties = dead.header.properties
        assert (properties.headers or {})["x-error-code"] == "ERR_INVALID_REQUEST"
        assert "reply_to" in str((properties.headers or {})["x-error-message"])
        assert (dead.body, properties.message_id, properties.correlation_id) == (b'{"a":1}', "m-1", "c-1")
        assert served.dispatcher.effects == {}
        assert caller.replies == []


async def test_a_dead_letter_keeps_headers_and_loses_what_would_expire_divert_or_refuse_it(
    amqp_url: str, rack: str
) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        await caller.publish(
            "fail",
            reply_to=None,
            headers={"x-mine": "kept", "CC": ["elsewhere"], "x-nested": {"a": [1, None]}},
            expiration="60000",
            user_id="guest",
            app_id="orchestrator",
        )
        properties = (await caller.dead_letter()).header.properties
        headers = properties.headers or {}
        assert (headers["x-mine"], headers["x-nested"]) == ("kept", {"a": [1, None]})
        assert headers["x-error-code"] == "ERR_MODEL_NOT_FOUND"
        assert "CC" not in headers
        assert (properties.expiration, properties.user_id, properties.app_id) == (None, None, "orchestrator")


async def test_an_unknown_method_is_answered_even_when_its_name_is_not_text(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack), calling(amqp_url, rack) as caller:
        assert (await caller.call("noSuchMethod")).code == "ERR_UNKNOWN_METHOD"
        reply = await caller.call("", key=f"{rack}." + b"\xff\xfe".decode("utf-8", "surrogateescape"))
        assert reply.code == "ERR_UNKNOWN_METHOD"
        assert "\\xff\\xfe" in reply.body["error"]["message"]


async def test_a_request_past_its_deadline_is_not_executed(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        past = {"x-deadline": int(time.time() * 1000) - 1}
        assert (await caller.call("count", headers=past)).code == "ERR_DEADLINE_EXCEEDED"
        await caller.publish("count", headers=past, reply_to=None)
        dead = await caller.dead_letter()
        assert (dead.header.properties.headers or {})["x-error-code"] == "ERR_DEADLINE_EXCEEDED"
        assert served.observer.counts["expired"] == 2
        assert served.dispatcher.effects == {}


async def test_the_deadline_is_the_earlier_of_x_deadline_and_expiration(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        in_an_hour = {"x-deadline": int(time.time() * 1000) + 3_600_000}
        await caller.call("echo", headers=in_an_hour, expiration="60000")
        await caller.call("echo", headers=in_an_hour)
        await caller.call("echo")
        by_expiration, by_header, none = (context.deadline for context in served.dispatcher.contexts)
        assert none is None
        assert by_expiration is not None and 50 < by_expiration - time.monotonic() <= 60
        assert by_header is not None and 3590 < by_header - time.monotonic() <= 3600


async def test_a_request_that_expires_in_the_queue_is_dead_lettered_by_the_broker(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await served.transport.drain(5)
        await caller.publish("count", expiration="1")
        dead = await caller.dead_letter()
        deaths: Any = (dead.header.properties.headers or {})["x-death"]
        assert deaths[0]["reason"] == "expired"
        await eventually(lambda: served.dispatcher.effects == {})
