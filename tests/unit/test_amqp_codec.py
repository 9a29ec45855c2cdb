"""Our frames against pamqp's: both say the same of everything good, and nothing bad gets further than its name."""

from __future__ import annotations

import datetime
from typing import Any

import pamqp.frame
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from worker.transport import amqp_codec as codec
from worker.transport.amqp_codec import BadFrameError, FrameSplitter
from worker.transport.amqp_decoding import UnreadableTable, install

install()

CHANNELS = st.integers(1, 65535)
TAGS = st.integers(1, 2**63 - 1)
# Whatever bytes a short string can hold, as we read them.
SHORT = st.binary(max_size=255).map(lambda value: value.decode("utf-8", "surrogateescape"))
TABLES = st.dictionaries(st.text(max_size=20), st.booleans() | st.text(max_size=50) | st.integers(-(2**63), 2**63 - 1))
TIMES = st.integers(0, 2**32).map(lambda seconds: datetime.datetime.fromtimestamp(seconds, datetime.UTC))
PROPERTIES = st.fixed_dictionaries(
    {},
    optional={
        "content_type": SHORT,
        "content_encoding": SHORT,
        "headers": TABLES,
        "delivery_mode": st.sampled_from([1, 2]),
        "priority": st.integers(0, 255),
        "correlation_id": SHORT,
        "reply_to": SHORT,
        "expiration": SHORT,
        "message_id": SHORT,
        "timestamp": TIMES,
        "message_type": SHORT,
        "user_id": SHORT,
        "app_id": SHORT,
    },
)


def payload_of(frame: bytes) -> bytes:
    return frame[7:-1]


def good_frames() -> bytes:
    properties = Basic.Properties(content_type="application/json", headers={"a": 1}, correlation_id="c")
    frames = (
        Basic.Deliver("tag", 7, False, "exchange", "rack-1.ping"),
        ContentHeader(0, 4, properties),
        ContentBody(b"body"),
    )
    return b"".join(pamqp.frame.marshal(frame, 1) for frame in frames)


# --- in ---


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 8]), CHANNELS, st.binary(max_size=300)), max_size=8), st.data())
def test_frames_are_found_however_the_bytes_arrive(frames: list[tuple[int, int, bytes]], data: st.DataObject) -> None:
    stream = b"".join(codec.frame(*one) for one in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    splitter = FrameSplitter()
    found = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += splitter.feed(stream[start:end])
    assert found == frames


@given(SHORT, TAGS, st.booleans(), SHORT, SHORT)
def test_a_delivery_reads_as_with_pamqp(consumer: str, tag: int, redelivered: bool, exchange: str, key: str) -> None:
    method = Basic.Deliver()
    method.consumer_tag, method.delivery_tag, method.redelivered = consumer, tag, redelivered
    method.exchange, method.routing_key = exchange, key
    method.validate = lambda: None  # type: ignore[method-assign]  # it refuses names that the broker lets pass
    read = codec.decode_deliver(payload_of(pamqp.frame.marshal(method, 1)))
    assert read == codec.Deliver(consumer, tag, redelivered, exchange, key)


@given(st.integers(0, 2**63), PROPERTIES)
def test_properties_read_as_with_pamqp(size: int, given_properties: dict[str, Any]) -> None:
    marshalled = payload_of(pamqp.frame.marshal(ContentHeader(0, size, Basic.Properties(**given_properties)), 1))
    expected = ContentHeader()
    expected.unmarshal(marshalled)
    assert codec.decode_header(marshalled) == (size, expected.properties)


@given(TAGS, st.booleans(), st.sampled_from([Basic.Ack, Basic.Nack]))
def test_a_confirm_reads_as_with_pamqp(tag: int, multiple: bool, kind: type[Basic.Ack] | type[Basic.Nack]) -> None:
    assert codec.decode_confirm(payload_of(pamqp.frame.marshal(kind(tag, multiple), 1))) == (tag, multiple)


@given(st.data())
def test_whatever_is_cut_or_changed_is_read_or_refused_by_name(data: st.DataObject) -> None:
    stream = bytearray(good_frames())
    for at in data.draw(st.lists(st.integers(0, len(stream) - 1), max_size=4)):
        stream[at] = data.draw(st.integers(0, 255))
    _read_all(bytes(stream[: data.draw(st.integers(0, len(stream)))]))


@given(st.binary(max_size=400))
def test_random_bytes_are_read_or_refused_by_name(stream: bytes) -> None:
    _read_all(stream)
    for decode in (codec.decode_deliver, codec.decode_header, codec.decode_confirm):
        _refused_or(lambda decode=decode: decode(stream))


def _read_all(stream: bytes) -> None:
    def read() -> None:
        for kind, _, payload in FrameSplitter().feed(stream):
            if kind == codec.METHOD:
                _refused_or(lambda payload=payload: codec.decode_deliver(payload))
            elif kind == codec.HEADER:
                _refused_or(lambda payload=payload: codec.decode_header(payload))

    _refused_or(read)


def _refused_or(read: Any) -> None:
    try:
        read()
    except BadFrameError as error:
        assert str(error)


@given(PROPERTIES.filter(bool), st.data())
def test_properties_cut_off_are_the_messages_fault(given_properties: dict[str, Any], data: st.DataObject) -> None:
    whole = payload_of(pamqp.frame.marshal(ContentHeader(0, 9, Basic.Properties(**given_properties)), 1))
    assume(len(whole) > 14)  # else there is nothing in them to cut
    size, properties = codec.decode_header(whole[: data.draw(st.integers(14, len(whole) - 1))])
    assert size == 9
    assert isinstance(properties.headers, UnreadableTable)


def test_properties_beyond_the_fifteenth_are_the_messages_fault() -> None:
    payload = bytearray(payload_of(pamqp.frame.marshal(ContentHeader(0, 9, Basic.Properties(app_id="a")), 1)))
    payload[13] |= 1
    _, properties = codec.decode_header(bytes(payload))
    assert isinstance(properties.headers, UnreadableTable)


def test_a_delivery_with_something_behind_it_is_refused() -> None:
    payload = payload_of(pamqp.frame.marshal(Basic.Deliver("tag", 7, False, "exchange", "rack-1.ping"), 1))
    with pytest.raises(BadFrameError, match="wrong length"):
        codec.decode_deliver(payload + b"x")


@pytest.mark.parametrize(
    "stream",
    [b"AMQP\x00\x00\x09\x01", b"\x01\x00\x01\xff\xff\xff\xff\x00", codec.frame(1, 1, b"x")[:-1] + b"\xcd"],
    ids=["another protocol", "too large", "without its end"],
)
def test_what_is_no_frame_is_refused(stream: bytes) -> None:
    with pytest.raises(BadFrameError):
        FrameSplitter().feed(stream)


# --- out ---


@given(CHANNELS, TAGS, st.booleans())
def test_settlements_are_written_as_with_pamqp(channel: int, tag: int, flag: bool) -> None:
    assert codec.encode_ack(channel, tag, multiple=flag) == pamqp.frame.marshal(Basic.Ack(tag, flag), channel)
    nack = Basic.Nack(tag, multiple=False, requeue=flag)
    assert codec.encode_nack(channel, tag, requeue=flag) == pamqp.frame.marshal(nack, channel)


@given(
    CHANNELS,
    SHORT,
    st.binary(max_size=500),
    SHORT,
    st.none() | st.just({"traceparent": "00-" + "a" * 50}),
    st.booleans(),
    st.sampled_from([0, 64, 131_072]),
)
def test_a_reply_is_written_as_with_pamqp(
    channel: int,
    key: str,
    body: bytes,
    correlation_id: str,
    headers: dict[str, Any] | None,
    mandatory: bool,
    frame_max: int,
) -> None:
    properties = Basic.Properties(
        content_type="application/json",
        headers=headers,
        delivery_mode=1,
        correlation_id=correlation_id or None,
        message_id="m-1",
    )
    most = frame_max - 8 if frame_max else 500
    frames = [
        Basic.Publish(exchange="", routing_key=key, mandatory=mandatory),
        ContentHeader(0, len(body), properties),
        *(ContentBody(body[at : at + most]) for at in range(0, len(body), most)),
    ]
    assert codec.encode_reply(
        channel,
        key,
        body,
        message_id="m-1",
        correlation_id=correlation_id,
        headers=headers,
        mandatory=mandatory,
        frame_max=frame_max,
    ) == b"".join(pamqp.frame.marshal(frame, channel) for frame in frames)


def test_a_name_that_no_short_string_can_hold_is_not_written() -> None:
    rest: dict[str, Any] = {"message_id": "m", "correlation_id": "", "headers": None, "mandatory": False}
    assert codec.encode_reply(1, "q" * 255, b"", frame_max=0, **rest)
    with pytest.raises(ValueError, match="at most 255"):
        codec.encode_reply(1, "q" * 256, b"", frame_max=0, **rest)
