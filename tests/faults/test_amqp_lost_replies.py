"""A reply goes out before its acknowledgement, or neither does: a real broker, and connections that end just then."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.amqp import Served, calling, eventually, serving
from tests.ledger.proxy import Proxy
from worker.context import Context
from worker.transport.connections import LinkLostError
from worker.transport.topology import request_queue

pytestmark = pytest.mark.broker

COUNT = 20
FAILURES = 5


def publishing_transport(served: Served) -> asyncio.WriteTransport:
    connection = served.transport._publisher._connection
    assert connection is not None
    return connection.tap.writer.transport


async def test_a_reply_that_is_lost_before_it_is_written_is_not_acknowledged_and_comes_again(
    amqp_url: str, rack: str
) -> None:
    """The connection for replies ends between a reply and the end of its turn; the other one is as good as before."""
    async with Proxy(amqp_url) as proxy, serving(proxy.url, rack) as served, calling(amqp_url, rack) as caller:
        assert (await caller.call("echo")).body["success"]
        answer, ended = served.dispatcher.answer, []

        async def answer_at_the_end(method: str, body: bytes, context: Context) -> dict[str, Any]:
            reply = await answer(method, body, context)
            if not ended:
                ended.append(publishing_transport(served))
                ended[0].abort()
            return reply

        served.dispatcher.answer = answer_at_the_end  # type: ignore[method-assign]
        await caller.publish("count", headers={"x-idempotency-key": "k-1"}, correlation_id="c-1")
        await eventually(lambda: len(caller.replies) == 2, "the reply")
        assert caller.replies[1].message.header.properties.correlation_id == "c-1"
        assert served.dispatcher.effects == {"k-1": 1}
        assert served.observer.counts["redelivered"] == 1
        await caller.until_depth(request_queue(rack), 0)


async def test_while_replies_cannot_be_written_nothing_is_acknowledged(
    amqp_url: str, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Proxy(amqp_url) as proxy, serving(proxy.url, rack) as served, calling(amqp_url, rack) as caller:
        assert (await caller.call("echo")).body["success"]
        publisher, failed = served.transport._publisher, []
        flush = publisher.flush

        def fail() -> None:
            if len(failed) < FAILURES:
                failed.append(True)
                raise LinkLostError("on purpose")
            flush()

        # The consumer was given the method of then: it is this one that the channel calls.
        monkeypatch.setattr(served.transport._consumer, "_before_acks", fail)
        proxy.cut()
        await eventually(lambda: served.observer.counts["reconnected"] == 2)
        await served.until_consuming()
        for number in range(COUNT):
            await caller.publish("count", headers={"x-idempotency-key": f"k-{number}"}, correlation_id=str(number))
        await eventually(lambda: len(failed) == FAILURES, "the failures")
        await caller.until_depth(request_queue(rack), 0)
        await eventually(
            lambda: len({reply.message.header.properties.correlation_id for reply in caller.replies}) > COUNT
        )
        assert set(served.dispatcher.effects.values()) == {1}
        assert len(served.dispatcher.effects) == COUNT
        assert served.observer.counts["redelivered"] >= 1
