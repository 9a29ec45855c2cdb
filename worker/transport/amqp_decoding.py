"""Lenient decoding of AMQP properties: one bad message must not end a connection.

pamqp raises when a property, a routing key or a header name is not UTF-8, when a timestamp lies beyond the year 9999,
and when a header table is malformed or very deep. aiormq then drops the connection, the broker delivers the same
message again, and every other unacknowledged message pays one of its deliveries for it. The broker checks none of it.

`install` replaces pamqp's decoders for those three types (and the encoder of short strings, for their echo):

- short strings and header names that are not UTF-8 keep their bytes by `surrogateescape`, so that an echo is the same;
- a timestamp that `datetime` cannot hold reads as None;
- a property table that cannot be read, or is deeper than 32 levels, is an empty `UnreadableTable`, so that the request
  can be refused by name.

The tests pin what pamqp does without this, so that it can go when pamqp does it by itself.
"""

from __future__ import annotations

import datetime
import struct

from pamqp import common, decode, encode

_MAX_SHORT_STRING = 255
_MAX_DEPTH = 32


class UnreadableTable(dict[str, common.FieldValue]):
    """The headers of a message whose header table cannot be decoded."""


def install() -> None:
    """Make pamqp's decoding lenient in this process; calling it again changes nothing."""
    decode.METHODS["shortstr"] = _short_string
    decode.METHODS["timestamp"] = decode.TABLE_MAPPING[b"T"] = _timestamp
    decode.METHODS["table"] = _property_table
    decode.TABLE_MAPPING[b"F"] = _field_table
    encode.METHODS["shortstr"] = _encode_short_string


def printable(text: str) -> str:
    r"""`text` with the bytes that were not UTF-8 shown as `\xNN`: fit for JSON, logs and metrics."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _short_string(value: bytes) -> tuple[int, str]:
    if not value:
        raise ValueError("Could not unpack short string value")
    end = value[0] + 1
    return end, value[1:end].decode("utf-8", "surrogateescape")


def _encode_short_string(value: str) -> bytes:
    if not isinstance(value, str):
        raise TypeError(f"str required, received {type(value)}")
    encoded = value.encode("utf-8", "surrogateescape")
    if len(encoded) > _MAX_SHORT_STRING:
        raise ValueError(f"a short string holds at most {_MAX_SHORT_STRING} bytes")
    return bytes((len(encoded),)) + encoded


def _timestamp(value: bytes) -> tuple[int, datetime.datetime | None]:
    try:
        return decode.timestamp(value)
    except (ValueError, OverflowError, OSError):
        if len(value) < common.Struct.timestamp.size:
            raise ValueError("Could not unpack timestamp value") from None
        return common.Struct.timestamp.size, None


def _property_table(value: bytes) -> tuple[int, common.FieldTable]:
    try:
        end, table = _field_table(value)
        _check_depth(table)
        return end, table
    except (ValueError, OverflowError, ArithmeticError, struct.error, RecursionError):
        # The length comes first, so what follows the table can be read even when the table cannot.
        return _table_end(value), UnreadableTable()


def _field_table(value: bytes) -> tuple[int, common.FieldTable]:
    end = _table_end(value)
    table: common.FieldTable = {}
    offset = 4
    while offset < end:
        name_end = offset + 1 + value[offset]
        if name_end > end:
            raise ValueError("Field table key length exceeds data")
        name = value[offset + 1 : name_end].decode("utf-8", "surrogateescape")
        consumed, table[name] = decode.embedded_value(value[name_end:end])
        offset = name_end + consumed
    return end, table


def _check_depth(value: common.FieldValue, depth: int = 1) -> None:
    if isinstance(value, dict | list):
        if depth > _MAX_DEPTH:
            raise ValueError(f"deeper than {_MAX_DEPTH} levels")
        for member in value.values() if isinstance(value, dict) else value:
            _check_depth(member, depth + 1)


def _table_end(value: bytes) -> int:
    if len(value) < 4:
        raise ValueError("Could not unpack table length")
    end = 4 + int.from_bytes(value[:4], "big")
    if end > len(value):
        raise ValueError("Field table length exceeds available data")
    return end
