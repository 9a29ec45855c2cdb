"""Reading a delivery: any properties give a request or a refusal, never an exception."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic

from worker.transport.deliveries import MAX_KEY_CHARACTERS, Request, read_request
from worker.transport.hot_channel import Message
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
