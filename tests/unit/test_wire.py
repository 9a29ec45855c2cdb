"""JSON from outside, without its loose ends; and JSON to go out, always the same bytes for the same value."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import wire
from schemas.errors import ModelManagerError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def reason(body: bytes) -> str:
    with pytest.raises(ModelManagerError) as error:
        wire.parse_object(body)
    assert error.value.code == "ERR_INVALID_REQUEST"
    return error.value.message


def nested(levels: int) -> bytes:
    """An object with a list in a list, `levels` deep altogether."""
    return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


@given(st.dictionaries(TEXTS, VALUES, max_size=5), st.booleans())
def test_an_object_is_read_as_it_was_written(value: dict[str, Any], ascii_only: bool) -> None:
    assert wire.parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=300))
def test_any_bytes_are_an_object_or_a_coded_error(body: bytes) -> None:
    try:
        assert isinstance(wire.parse_object(body), dict)
    except ModelManagerError as error:
        assert error.code == "ERR_INVALID_REQUEST"


@given(st.dictionaries(TEXTS, VALUES, max_size=5))
def test_what_a_caller_gives_arrives_as_it_is_or_is_refused(value: dict[str, Any]) -> None:
    try:
        body = wire.dump_given(value)
    except TypeError as error:
        assert "53-bit" in str(error)
    else:
        assert wire.parse_object(body) == value


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 2**53, -(2**53), 10**30, "\ud800", {1: 1}, {"\ud800": 1}, {1}, b"x"]
)
def test_what_would_not_arrive_as_it_is_is_not_written(value: Any) -> None:
    for given_value in (value, {"a": None, "b": [1, value]}, {"a": ({"b": value},)}):
        with pytest.raises((TypeError, ValueError)):
            wire.dump_given({"x": given_value})


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "Expecting value"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b"\xef\xbb\xbf{}", "Expecting value"),
        (b"\xff", "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"\\udc00": 1}', "surrogates"),
        (b"{}{}", "Extra data"),
        (b"{}\x00", "Extra data"),
        (b'{"a": "\x00"}', "control character"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": [Infinity]}', "Infinity is not JSON"),
        (b'{"a": -1e400}', "too large"),
        (b'{"a": 01}', "delimiter"),
        (b'{"a": 1, "a": 1}', "'a' occurs twice"),
        (b'{"x": [{"a": 1, "b": 2, "a": 3}]}', "'a' occurs twice"),
        (b'{"a": 1, "\\u0061": 2}', "'a' occurs twice"),
    ],
)
def test_what_is_wrong_with_a_body_is_told(body: bytes, why: str) -> None:
    assert why in reason(body)


def test_a_body_may_be_64_levels_deep_and_no_deeper() -> None:
    assert wire.parse_object(nested(64))
    for levels in (65, 200, 2000, 500_000):
        assert "deeper than 64 levels" in reason(nested(levels))


def test_many_brackets_side_by_side_are_not_deep() -> None:
    assert wire.parse_object(b'{"a":[' + b",".join([b"[]"] * 1000) + b"]}")


def test_brackets_inside_text_are_not_deep() -> None:
    assert wire.parse_object(b'{"a":"' + b"[" * 1000 + b'"}')


def test_the_limit_is_that_of_the_whole_body() -> None:
    padded = b"{}" + b" " * (wire.MAX_BODY_BYTES - 2)
    assert wire.parse_object(padded) == {}
    with pytest.raises(ModelManagerError) as error:
        wire.parse_object(padded + b" ")
    assert error.value.details == {"maxBodySize": wire.MAX_BODY_BYTES}


def test_a_key_twice_is_found_among_all_that_fit_into_a_body() -> None:
    """Counting each of n names among n names would take this test, and an event loop, many minutes."""
    body = b"{" + b"".join(b'"%d":0,' % n for n in range(180_000)) + b'"x":1,"x":2}'
    assert "'x' occurs twice" in reason(body)


def test_walk_sees_every_key_and_scalar() -> None:
    seen: list[Any] = []
    wire.walk({"a": [1, {"b": None}], "c": "d"}, seen.append)
    assert sorted(map(str, seen)) == ["1", "None", "a", "b", "c", "d"]


@given(st.dictionaries(TEXTS, TEXTS, max_size=5))
def test_canonical_json_does_not_depend_on_the_order_of_the_keys(value: dict[str, str]) -> None:
    turned = dict(reversed(value.items()))
    assert wire.canonical(value) == wire.canonical(turned)
    assert json.loads(wire.canonical(value)) == value


def test_canonical_json_is_utf_8_without_blanks() -> None:
    assert wire.canonical({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"é"]}'.encode()


@pytest.mark.parametrize(
    ("unix_ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1_700_000_000_007, "2023-11-14T22:13:20.007Z"),
        (951_782_400_999, "2000-02-29T00:00:00.999Z"),
    ],
)
def test_a_time_is_told_in_utc_with_milliseconds(unix_ms: int, text: str) -> None:
    assert wire.timestamp(unix_ms) == text
