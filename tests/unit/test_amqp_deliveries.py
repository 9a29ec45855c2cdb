"""Reading a delivery: any properties give a request or a refusal, never an exception."""

from __future__ import annotations

import struct
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import header
from pamqp.commands import Basic

from worker.transport import amqp_codec, deliveries
from worker.transport.amqp_decoding import install
from worker.transport.dead_letter import read_letter, request_properties
from worker.transport.deliveries import MAX_KEY_CHARACTERS, Request, read_request
from worker.transport.hot_channel import Message
from worker.transport.replies import dead_letter_properties
from worker.transport.reply_addresses import is_permitted, node_of

DIRECT = "amq.rabbitmq.reply-to.g1h2AA5yZXBseUAyMTczMzU1NgAAA5MAAAAAawT3ew==.9SAiEhneZsLVRwoRjfEkWg=="


def read(*, exchange: str = "model-manager.rpc", key: str = "rack-1.ping", **properties: Any) -> Request:
    # The channel is only touched when a delivery is settled.
    return read_request(Message(None, 1, False, exchange, key, Basic.Properties(**properties), b"{}"))  # type: ignore[arg-type]


def key_of(**properties: Any) -> str | None:
    return read(**properties).context.idempotency_key


def test_the_key_is_the_header_then_the_message_id_then_the_address_of_the_answer() -> None:
    headers = {"x-idempotency-key": "k"}
    assert key_of(headers=headers, message_id="m", reply_to=DIRECT, correlation_id="1") == "k"
    assert key_of(message_id="m", reply_to=DIRECT, correlation_id="1") == "m"
    assert key_of(reply_to=DIRECT) is None
    assert key_of(correlation_id="1") is None


def test_reply_to_and_correlation_id_count_only_where_the_queue_dies_with_the_caller() -> None:
    keys = {key_of(reply_to=reply_to, correlation_id="1") for reply_to in (DIRECT, "amq.gen-a", "amq.gen-b")}
    assert len(keys) == 3 and None not in keys
    assert key_of(reply_to="amq.gen-a", correlation_id="1") in keys
    assert key_of(reply_to="amq.gen-a", correlation_id="2") not in keys
    assert key_of(reply_to="model-manager.reply.a.1", correlation_id="1") is None


@pytest.mark.parametrize("key", ["x" * 129, "\udcff", "ü", "a\nb"])
def test_a_long_or_unprintable_key_is_hashed(key: str) -> None:
    hashed = key_of(headers={"x-idempotency-key": key})
    assert hashed is not None and hashed.startswith("sha256:") and len(hashed) < MAX_KEY_CHARACTERS
    assert hashed != key_of(headers={"x-idempotency-key": key + "!"})


def test_the_method_is_the_last_part_of_the_routing_key_or_the_type() -> None:
    assert read(key="rack-1.getModel").method == "getModel"
    assert read(exchange="", key="model-manager-rack-1", message_type="getModel").method == "getModel"
    assert read(exchange="", key="model-manager-rack-1").refusal is not None
    assert read(key="rack-1.getModel", message_type="deleteModel").refusal is not None


def test_an_expiration_that_is_no_number_sets_no_deadline() -> None:
    assert read(expiration="soon").context.deadline is None
    assert read(expiration="٣").context.deadline is None
    deadline = read(expiration="1000").context.deadline
    assert deadline is not None and 0 < deadline - time.monotonic() <= 1


@pytest.mark.parametrize(
    ("content_type", "accepted"),
    [
        ("", True),
        ("application/json", True),
        ("Application/JSON ;charset=UTF-8", True),
        ('application/json; charset="utf8"', True),
        ("application/json; charset=latin-1", False),
        ("application/json; a*=x; a*0=y", False),
        ("application/json; charset*=x; charset*0=y", False),
        ("application/json\r\n", True),
        ("application/jsonl", False),
        ("\udcff", False),
    ],
)
def test_the_content_type_is_json_in_utf_8(content_type: str, accepted: bool) -> None:
    refusal = read(content_type=content_type).refusal
    assert (refusal is None) is accepted
    assert refusal is None or "content_type" in refusal.message


def test_what_fails_while_reading_is_a_refusal_and_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Message) -> str:
        raise TypeError("planted")

    monkeypatch.setattr(deliveries, "_method", broken)
    request = read(reply_to=DIRECT)
    assert request.refusal is not None
    assert (request.refusal.code, request.refusal.message) == ("ERR_INVALID_REQUEST", "The request cannot be read.")
    assert request.reply_to == ""


@pytest.mark.parametrize(
    ("reply_to", "permitted"),
    [
        (DIRECT, True),
        ("amq.gen-ngnqA6O3jLyl3LlK9suiig", True),
        ("model-manager.reply.cli.1", True),
        ("amq.rabbitmq.reply-to", False),
        ("amq.rabbitmq.reply-to.", False),
        ("amq.rabbitmq.reply-to.x.y", False),
        (DIRECT.replace("g1h2", "g1h3"), False),
        (DIRECT.rpartition(".")[0], False),
        ("amq.gen-", False),
        ("amq.gen-\udcff", False),
        ("model-manager.reply.\n", False),
        ("model-manager-rack-1", False),
        ("Amq.gen-a", False),
        ("", False),
    ],
)
def test_replies_go_to_three_kinds_of_address_only(reply_to: str, permitted: bool) -> None:
    assert is_permitted(reply_to) is permitted
    assert read(reply_to=reply_to).reply_to == (reply_to if permitted else "")


def test_the_node_of_a_direct_address_is_found() -> None:
    assert node_of(DIRECT) == b"reply@21733556"


VALUES = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats() | st.lists(st.integers())
TEXT = st.none() | st.text(st.characters(codec=None), max_size=60)


@given(
    headers=st.dictionaries(st.sampled_from(["x-deadline", "x-idempotency-key", "traceparent", "other"]), VALUES),
    properties=st.fixed_dictionaries(
        {
            "content_type": TEXT,
            "content_encoding": TEXT,
            "correlation_id": TEXT,
            "reply_to": TEXT,
            "expiration": TEXT,
            "message_id": TEXT,
            "message_type": TEXT,
            "user_id": TEXT,
        }
    ),
    key=st.text(max_size=60),
)
def test_any_properties_give_a_request(headers: dict[str, Any], properties: dict[str, Any], key: str) -> None:
    properties = {
        name: value and value.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
        for name, value in properties.items()
    }
    request = read(key=key, headers=headers, **properties)
    for text in (request.method, request.context.caller, request.context.correlation_id):
        text.encode()
    assert request.refusal is None or request.refusal.code == "ERR_INVALID_REQUEST"
    if request.refusal is not None:
        request.refusal.message.encode()
        assert request.refusal.message != "The request cannot be read."


PIECES = (
    *(b"application/json", b";", b"charset", b"a", b"*", b"=", b"utf-8", b"'", b'"', b"\xff", b"0", b"1", b"\r\n"),
    *(b"amq.gen-", b"amq.rabbitmq.reply-to.", b"model-manager.reply.", b"-1", b"9" * 200, DIRECT.encode()),
)
SHORT_STRINGS = st.lists(st.sampled_from(PIECES) | st.binary(max_size=9), max_size=6).map(
    lambda pieces: (text := b"".join(pieces)[:255], bytes((len(text),)) + text)[1]
)
FIELD_VALUES = st.binary(max_size=20) | st.sampled_from(
    (
        *(
            b"V",
            b"t\x01",
            b"b\xff",
            b"I\x00\x00\x00\x01",
            b"l" + b"\xff" * 8,
            b"D\x05\xff\xff\xff\xff",
            b"D\xff\x00\x00\x00\x01",
        ),
        *(
            b"d\x7f\xf8" + b"\x00" * 6,
            b"T" + b"\xff" * 8,
            b"T" + b"\x00" * 8,
            b"S\x00\x00\x00\x01a",
            b"S\x00\x00\x00\x01\xff",
        ),
        *(
            b"S\x00\x00\x00\x00",
            b"x\x00\x00\x00\x01\xff",
            b"A\x00\x00\x00\x00",
            b"F\x00\x00\x00\x00",
            b"F\x00\x00\x00\x04\x01\xfft\x01",
        ),
    )
)
FIELD_NAMES = st.sampled_from((b"x-deadline", b"x-idempotency-key", b"traceparent", b"x-death", b"CC")).map(
    lambda name: bytes((len(name),)) + name
)
FIELDS = st.builds(lambda name, value: name + value, FIELD_NAMES | SHORT_STRINGS, FIELD_VALUES)
TABLES = st.lists(FIELDS, max_size=4).map(lambda fields: struct.pack(">I", len(t := b"".join(fields))) + t)
TIMESTAMPS = st.sampled_from((0, 1, 2**31, 2**40, 253402300799, 2**63, 2**64 - 1)).map(lambda at: struct.pack(">Q", at))
OCTETS = st.integers(0, 255).map(lambda octet: bytes((octet,)))
# By the bits of the flags, from the highest: content type and encoding, headers, delivery mode, priority, ...
SECTIONS = (
    SHORT_STRINGS,
    SHORT_STRINGS,
    TABLES,
    OCTETS,
    OCTETS,
    *[SHORT_STRINGS] * 4,
    TIMESTAMPS,
    *[SHORT_STRINGS] * 4,
)


@given(
    st.tuples(*[st.none() | section for section in SECTIONS]),
    st.integers(0, 3),
)
def test_any_bytes_as_properties_give_a_request_and_a_dead_letter(
    sections: tuple[bytes | None, ...], beyond: int
) -> None:
    install()
    flags = sum(1 << (15 - at) for at, section in enumerate(sections) if section is not None) | beyond
    values = b"".join(section for section in sections if section is not None)
    _, properties = amqp_codec.decode_header(struct.pack(">HHQH", 60, 0, 2, flags) + values)
    message = Message(None, 1, False, "model-manager.rpc", "rack-1.ping", properties, b"{}")  # type: ignore[arg-type]
    refusal = read_request(message).refusal
    assert refusal is None or refusal.message != "The request cannot be read."
    letter = dead_letter_properties(message, "ERR_INVALID_REQUEST", "the reason")
    assert header.ContentHeader(0, 2, letter).marshal()
    assert header.ContentHeader(0, 2, request_properties(read_letter(message))).marshal()
