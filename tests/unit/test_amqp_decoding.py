"""Lenient decoding: what pamqp refuses, what ours makes of it, and that both agree on everything good."""

from __future__ import annotations

import datetime
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import decode, encode
from pamqp.commands import Basic

from worker.transport.amqp_decoding import UnreadableTable, install, printable

install()


def short(value: bytes) -> bytes:
    return bytes((len(value),)) + value


def table(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


@pytest.mark.parametrize("refused", [short(b"\xff"), short(b"\xed\xa0\x80")])
def test_pamqp_refuses_a_short_string_that_is_not_utf_8(refused: bytes) -> None:
    with pytest.raises(ValueError):
        decode.short_str(refused)


def test_pamqp_refuses_a_timestamp_of_2_to_the_63() -> None:
    with pytest.raises((ValueError, OverflowError)):
        decode.timestamp(struct.pack(">Q", 2**63))


def test_pamqp_refuses_a_header_name_that_is_not_utf_8() -> None:
    with pytest.raises(ValueError):
        decode.field_table(table(short(b"\xff") + b"V"))


@given(st.binary(max_size=255), st.binary(max_size=8))
def test_a_short_string_of_any_bytes_survives_there_and_back(value: bytes, rest: bytes) -> None:
    consumed, text = decode.METHODS["shortstr"](short(value) + rest)
    assert consumed == len(value) + 1
    assert encode.METHODS["shortstr"](text) == short(value)
    printable(str(text)).encode()


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_a_timestamp_of_any_value_is_a_time_or_none(value: int) -> None:
    consumed, moment = decode.METHODS["timestamp"](struct.pack(">Q", value))
    assert consumed == 8
    assert moment is None or isinstance(moment, datetime.datetime)


@given(
    st.recursive(
        st.dictionaries(st.text(max_size=20), st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text() | st.none()),
        lambda inner: st.dictionaries(st.text(max_size=20), inner | st.lists(inner, max_size=3), max_size=3),
        max_leaves=5,
    )
)
def test_a_good_table_reads_as_with_pamqp(value: dict[str, object]) -> None:
    encoded = encode.field_table(value)  # type: ignore[arg-type]
    assert decode.METHODS["table"](encoded) == decode.field_table(encoded)


@given(st.binary(max_size=200), st.binary(max_size=8))
def test_a_property_table_of_any_bytes_is_passed_over_in_full(content: bytes, rest: bytes) -> None:
    consumed, value = decode.METHODS["table"](table(content) + rest)
    assert consumed == 4 + len(content)
    assert isinstance(value, dict)


def test_a_deep_table_is_unreadable_and_what_follows_it_is_read() -> None:
    content = b""
    for _ in range(5000):
        content = short(b"a") + b"F" + table(content)
    properties = Basic.Properties()
    properties.unmarshal(1 << 13 | 1 << 10, table(content) + short(b"c-1"))
    assert isinstance(properties.headers, UnreadableTable)
    assert properties.correlation_id == "c-1"
