"""Messages with bad AMQP properties are answered or dead-lettered, and cost nobody else anything."""

from __future__ import annotations

import logging
import struct

import aiormq
import pytest
from aiormq.abc import DeliveredMessage
from pamqp import decode

from tests.amqp import calling, eventually, serving
from worker.transport import deliveries
from worker.transport.hot_channel import Message

pytestmark = pytest.mark.broker


def short(value: bytes) -> bytes:
    return bytes((len(value),)) + value


def table(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


def nested(depth: int) -> bytes:
    """A field table within a field table, and so on."""
    content = b""
    for _ in range(depth):
        content = short(b"a") + b"F" + table(content)
    return content


HEADERS, CORRELATION_ID, MESSAGE_ID, TIMESTAMP, TYPE, APP_ID = 1 << 13, 1 << 10, 1 << 7, 1 << 6, 1 << 5, 1 << 3

POISON = {
    "a correlation id that is not UTF-8": (CORRELATION_ID, short(b"\xff\xfe")),
    "a message id that is not UTF-8": (MESSAGE_ID, short(b"\x80")),
    "an app id that is not UTF-8": (APP_ID, short(b"\xc3\x28")),
    "a timestamp of 2^63": (TIMESTAMP, struct.pack(">Q", 2**63)),
    "a timestamp of 2^64-1": (TIMESTAMP, struct.pack(">Q", 2**64 - 1)),
    "a header name that is not UTF-8": (HEADERS, table(short(b"\xff") + b"t\x01")),
    "a header with a timestamp of 2^63": (HEADERS, table(short(b"t") + b"T" + struct.pack(">Q", 2**63))),
}
REFUSED = {f"headers nested {depth} deep": (HEADERS, table(nested(depth))) for depth in (33, 400, 4000)}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON.keys())
async def test_bad_properties_do_not_keep_a_request_from_being_served(
    amqp_url: str, rack: str, poison: tuple[int, bytes]
) -> None:
    flags, values = poison
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        assert (await caller.call("echo")).body["success"]
        await caller.publish_raw(f"{rack}.fail", struct.pack(">H", flags) + values)
        dead = await caller.dead_letter()
        assert (dead.header.properties.headers or {})["x-error-code"] == "ERR_MODEL_NOT_FOUND"
        assert (await caller.call("echo")).body["success"]
        assert served.observer.counts["redelivered"] == 0
        assert served.observer.counts["reconnected"] == 0


@pytest.mark.parametrize("poison", REFUSED.values(), ids=REFUSED.keys())
async def test_headers_that_cannot_be_read_are_refused(amqp_url: str, rack: str, poison: tuple[int, bytes]) -> None:
    flags, values = poison
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish_raw(f"{rack}.count", struct.pack(">H", flags) + values, b'{"a":1}')
        dead = await caller.dead_letter()
        headers = dead.header.properties.headers or {}
        assert "a" not in headers
        assert headers["x-error-code"] == "ERR_INVALID_REQUEST"
        assert headers["x-error-message"] == "The header table cannot be decoded."
        assert dead.body == b'{"a":1}'
        assert served.dispatcher.effects == {}
        assert served.observer.counts["redelivered"] == 0


async def test_a_content_type_that_parsers_stumble_over_is_refused_and_costs_no_connection(
    amqp_url: str, rack: str
) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        reply = await caller.call("echo", content_type="application/json; a*=x; a*0=y")
        assert reply.code == "ERR_INVALID_REQUEST"
        assert (await caller.call("echo")).body["success"]
        assert served.observer.counts["reconnected"] == 0


async def test_a_request_that_fails_while_it_is_read_is_dead_lettered_and_costs_no_connection(
    amqp_url: str, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_method = deliveries._method

    def broken(message: Message) -> str:
        if message.body == b"poison":
            raise TypeError("planted")
        return read_method(message)

    monkeypatch.setattr(deliveries, "_method", broken)
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("echo", b"poison")
        dead = await caller.dead_letter()
        headers = dead.header.properties.headers or {}
        assert (headers["x-error-code"], headers["x-error-message"]) == (
            "ERR_INVALID_REQUEST",
            "The request cannot be read.",
        )
        assert (await caller.call("echo")).body["success"]
        assert served.observer.counts["reconnected"] == served.observer.counts["redelivered"] == 0


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON.keys())
async def test_without_lenient_decoding_such_a_message_ends_the_connection(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, poison: tuple[int, bytes]
) -> None:
    """Why `amqp_decoding` exists. When this fails, aiormq and pamqp have learned it and ours can go."""
    flags, values = poison
    caplog.set_level(logging.CRITICAL, logger="aiormq")
    async with calling(amqp_url, "none") as caller, aiormq.connect(amqp_url) as victim:
        seen: list[DeliveredMessage] = []

        async def remember(message: DeliveredMessage) -> None:
            seen.append(message)

        channel = await victim.channel()
        queue = (await channel.queue_declare("", exclusive=True)).queue or ""
        await channel.basic_consume(queue, remember, no_ack=True)
        with monkeypatch.context() as patched:
            patched.setitem(decode.METHODS, "shortstr", decode.short_str)
            patched.setitem(decode.METHODS, "timestamp", decode.timestamp)
            patched.setitem(decode.METHODS, "table", decode.field_table)
            patched.setitem(decode.TABLE_MAPPING, b"T", decode.timestamp)
            patched.setitem(decode.TABLE_MAPPING, b"F", decode.field_table)
            await caller.publish_raw(queue, struct.pack(">H", flags) + values, exchange="")
            await eventually(lambda: victim.is_closed or seen)
        assert victim.is_closed
